"""Teachers and students by name: `timm/<name>`, `local:<path>`, `packaged/<name>`."""

from orchestrator.models.load import (
    Network,
    Preprocessing,
    build_network,
    deploy_network,
    load_network,
    load_student,
    plan_network,
    save_student,
)
from orchestrator.models.names import check_model

__all__ = [
    "Network",
    "Preprocessing",
    "build_network",
    "check_model",
    "deploy_network",
    "load_network",
    "load_student",
    "plan_network",
    "save_student",
]
