"""Taking a student away: plain timm or open_clip, ONNX, a program of torch, with a model card."""

from orchestrator.select.export.config import kind_of
from orchestrator.select.export.evidence import Evidence
from orchestrator.select.export.folder import export_student
from orchestrator.select.export.wanted import FORMATS, Wanted

__all__ = ["FORMATS", "Evidence", "Wanted", "export_student", "kind_of"]
