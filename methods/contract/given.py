"""What a stage is given to read: what it declared, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from methods.contract.setting import Kind, Texts
from methods.outputs import Output


class Table(Protocol):
    """Rows of numbers that need not fit into memory."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        ...

    def rows(self, indices: Any) -> Tensor:
        """[n, ...] the rows at these positions."""
        ...


class UndeclaredInputError(LookupError):
    """A stage asked for something that its declaration does not name."""


class Given:
    """What a stage may read: exactly what it declared.

    Args:
        values: `teacher`, `student` (fresh copies, safe to change), `labels` ([n] int64).
        results: tensors of earlier stages by stage name.
        outputs: for a `FitStage`, teacher outputs by `Output.key`, view 0, one row an image: [n, ...]; a `Table` of
            them where `images` is `corpus`.
        num_classes: of the task.
        kind: of the task.
    """

    def __init__(
        self,
        *,
        values: Mapping[str, Any],
        num_classes: int,
        results: Mapping[str, Mapping[str, Tensor]] | None = None,
        outputs: Mapping[str, Any] | None = None,
        kind: Kind = "classification",
    ) -> None:
        self._values = dict(values)
        self._results = dict(results or {})
        self._outputs = dict(outputs or {})
        self.num_classes = num_classes
        self.kind: Kind = kind

    def _value(self, name: str) -> Any:
        if name not in self._values:
            raise UndeclaredInputError(f"The stage reads {name!r} but does not declare it in `reads`.")
        return self._values[name]

    @property
    def teacher(self) -> nn.Module:
        """A fresh copy of the teacher with its pre-trained weights."""
        return self._value("teacher")

    @property
    def student(self) -> nn.Module:
        """A fresh student with `num_classes` outputs."""
        return self._value("student")

    @property
    def labels(self) -> Tensor:
        """Labels of the labelled images, aligned with `output()`; shapes as in `Batch.labels`."""
        return self._value("labels")

    def upstream(self, name: Literal["vq", "diffusion", "pipeline"]) -> Any:
        """A generator that was trained upstream, as the sweep file names it under `upstream`."""
        return self._value(name)

    def output(self, output: Output) -> Tensor:
        """[n, ...] a teacher output on the images of a `FitStage`."""
        if output.key not in self._outputs:
            raise UndeclaredInputError(f"The stage reads the output {output.key!r} but does not declare it.")
        return self._outputs[output.key]

    def table(self, output: Output) -> Table:
        """[n, ...] a teacher output on the images of a `FitStage` over the corpus."""
        return self.output(output)  # type: ignore[return-value]

    def texts(self, name: Texts) -> Table:
        """[n, d] the teacher's embeddings of texts, not normalised; of `prompts` class by class, then templates."""
        return self._value(name)

    def result(self, stage: str) -> Mapping[str, Tensor]:
        """The tensors that an earlier stage published."""
        if stage not in self._results:
            raise UndeclaredInputError(f"The stage reads the result of {stage!r} but does not name it in `inputs`.")
        return self._results[stage]
