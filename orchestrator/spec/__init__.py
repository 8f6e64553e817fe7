"""The sweep file: its schema (pydantic, strict), a module a section, reading it, and `--set` overrides.

The descriptions of the keys are their documentation: `orchestrator check --keys` prints them.
"""

from orchestrator.spec.corpus import Corpus, Estimate, Expect
from orchestrator.spec.explain import check_method, explain
from orchestrator.spec.metrics import LATENCY, METRICS, better, is_metric, latency_column, shown
from orchestrator.spec.networks import Model, Upstream, as_student
from orchestrator.spec.places import Cluster, NodeType, StoreLimits
from orchestrator.spec.search import STUDY_SCHEMES, Search, Start
from orchestrator.spec.section import Section
from orchestrator.spec.sweep import NAME, SweepSpec, documented_keys, parse_spec, read_spec
from orchestrator.spec.task import METRIC_NAMES, Kind, Splits, Task
from orchestrator.spec.text import read_mapping, read_overrides
from orchestrator.spec.train import Generate, Train
from orchestrator.spec.wanted import Latency, Limits, Objective, near_limits

__all__ = [
    "LATENCY",
    "METRICS",
    "METRIC_NAMES",
    "NAME",
    "STUDY_SCHEMES",
    "Cluster",
    "Corpus",
    "Estimate",
    "Expect",
    "Generate",
    "Kind",
    "Latency",
    "Limits",
    "Model",
    "NodeType",
    "Objective",
    "Search",
    "Section",
    "Splits",
    "Start",
    "StoreLimits",
    "SweepSpec",
    "Task",
    "Train",
    "Upstream",
    "as_student",
    "better",
    "check_method",
    "documented_keys",
    "explain",
    "is_metric",
    "latency_column",
    "near_limits",
    "parse_spec",
    "read_mapping",
    "read_overrides",
    "read_spec",
    "shown",
]
