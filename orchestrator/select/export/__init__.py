"""Taking a student away: plain timm or open_clip, ONNX, with a model card."""

from orchestrator.select.export.config import kind_of
from orchestrator.select.export.folder import export_student

__all__ = ["export_student", "kind_of"]
