"""Networks as ONNX: written by torch's exporter, checked by onnx, run by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.errors import WorkError, first_lines

ONE_FILE = 1_800_000_000  # bytes of weights; beyond 2 GB an ONNX file keeps them beside it
INPUT, OUTPUT = "images", "logits"


def write_onnx(
    network: nn.Module, size: int, path: Path, name: str = "The network", facts: Mapping[str, str] | None = None
) -> None:
    """Writes `images` [B, 3, S, S] float32, normalised -> `logits`, any B.

    Args:
        network: on the CPU, in evaluation mode; its parameters lose their gradients.
        size: S.
        path: of the file.
        name: of the network, in errors.
        facts: that the file carries as metadata.

    Raises:
        WorkError: if the exporter cannot write it, or the checker refuses what it wrote.
    """
    import onnx

    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    try:
        with quiet():
            program = torch.onnx.export(
                network,
                (torch.zeros(2, 3, size, size),),  # a batch of 1 would be exported as fixed
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
            assert program is not None
            program.model.metadata_props.update(facts or {})
            program.save(str(path), external_data=weights > ONE_FILE)
            onnx.checker.check_model(str(path))
    except OSError:
        raise
    except Exception as error:  # the exporter and the checker share no base class
        raise WorkError(f"{name} cannot be exported to ONNX: {first_lines(error)}") from error


def onnx_runner(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """What runs an ONNX file in onnxruntime on the CPU: images to logits.

    Args:
        path: of a file with one input and one output.
        threads: of an operation; None: torch's.

    Raises:
        WorkError: if the runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors share no base class
        raise WorkError(f"onnxruntime cannot load {path.name!r}: {first_lines(error)}") from error
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's progress, notes and warnings are for its authors."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
