"""Evaluation beyond a sweep's val metric: zero-shot, retrieval, probes and robustness on a suite of tasks."""

from orchestrator.evaluate.suite.run import run_suite
from orchestrator.evaluate.suite.spec import Suite, SuiteTask, read_suite
from orchestrator.evaluate.suite.subject import Subject, named_subject, stored_subject
from orchestrator.evaluate.suite.table import check_out, markdown, write_result

__all__ = [
    "Subject",
    "Suite",
    "SuiteTask",
    "check_out",
    "markdown",
    "named_subject",
    "read_suite",
    "run_suite",
    "stored_subject",
    "write_result",
]
