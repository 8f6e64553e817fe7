"""The contract between a method and whatever runs it: plain PyTorch, no Ray, no file system.

A method is a chain of stages. A stage is built from its own slice of the configuration and from the
results of earlier stages, and can read nothing else: `Given` refuses what the stage did not declare.
That is why a stage's key in the store can be computed from the declaration alone.
"""

from methods.contract.given import Given, Table, UndeclaredInputError
from methods.contract.learner import Batch, Deployed, Learner, Structure, freeze, trainable_parameters
from methods.contract.loss import IGNORE, supervised_loss
from methods.contract.method import Method
from methods.contract.setting import Kind, NetworkInfo, Setting, TaskInfo, Texts
from methods.contract.stages import (
    TEACHER,
    Feed,
    FitStage,
    Images,
    ImageStage,
    Maker,
    Recipe,
    Source,
    Stage,
    TrainStage,
)

__all__ = [
    "IGNORE",
    "TEACHER",
    "Batch",
    "Deployed",
    "Feed",
    "FitStage",
    "Given",
    "ImageStage",
    "Images",
    "Kind",
    "Learner",
    "Maker",
    "Method",
    "NetworkInfo",
    "Recipe",
    "Setting",
    "Source",
    "Stage",
    "Structure",
    "Table",
    "TaskInfo",
    "Texts",
    "TrainStage",
    "UndeclaredInputError",
    "freeze",
    "supervised_loss",
    "trainable_parameters",
]
