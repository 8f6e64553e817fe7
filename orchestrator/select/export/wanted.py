"""What an export is to be."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import UserError, listed, nearest

FORMATS = ("safetensors", "onnx", "pt2")


@dataclass(frozen=True)
class Wanted:
    """What an export is to be.

    Attributes:
        format: `safetensors` (timm's own folder format, unless the network has modules that timm does not build: then
            with a copy of the file that does, `structure.py`), `onnx`, or `pt2` (a program of torch.export).
        with_preprocessing: ONNX: whole images go in, uint8 [B, H, W, 3]; the graph crops, resizes and normalises.
        int8: ONNX: 8-bit integers, see `int8.quantise`.
        max_loss: with int8: loss of the val metric that is accepted; None: no more than noise.
        licence, data_licence: as the user states them; None: as far as they are known.

    Raises:
        UserError: if the format is unknown, or an option does not fit it.
    """

    format: str = "safetensors"
    with_preprocessing: bool = False
    int8: bool = False
    max_loss: float | None = None
    licence: str | None = None
    data_licence: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(
                f"Unknown format {self.format!r}; allowed: {listed(FORMATS)}.{nearest(self.format, FORMATS)}"
            )
        for option, given in (("--with-preprocessing", self.with_preprocessing), ("--int8", self.int8)):
            if given and self.format != "onnx":
                raise UserError(f"{option} is for --format onnx, not {self.format}.")
        if self.max_loss is not None and not self.int8:
            raise UserError("--max-loss is for --int8: what it may lose of the val metric.")
