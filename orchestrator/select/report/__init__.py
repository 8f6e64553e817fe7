"""A sweep's report: one page, one text or one table, made from what is recorded in the sweep's folder alone."""

from orchestrator.select.report.gather import Gathered, Importance, Study, gather
from orchestrator.select.report.page import html, markdown
from orchestrator.select.report.table import table

__all__ = ["Gathered", "Importance", "Study", "gather", "html", "markdown", "table"]
