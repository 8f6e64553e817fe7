"""Few-shot tasks, replayable views, and stored teacher outputs."""

from orchestrator.data.task import TaskData, load_task

__all__ = ["TaskData", "load_task"]
