"""Weights and activations of an ONNX file as 8-bit integers, by onnxruntime's own quantiser, and what that costs."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.errors import WorkError, first_lines, listed
from orchestrator.evaluate.cost import processor, timed
from orchestrator.evaluate.outcomes import compare_outcomes
from orchestrator.models.onnx import INPUT, onnx_runner, quiet
from orchestrator.select.export.evidence import Evidence
from orchestrator.spec import METRIC_NAMES, Kind

CALIBRATION, HELD = 128, 64  # train images that set the ranges, and others that choose among the ways
SMALLER = 0.5  # a way that does not halve the file is none
TIMED_S = 0.3
BATCH = 16  # images that calibrate in one pass
PASS_BYTES = 2_000_000_000  # that such a pass may take: all its activations are kept until it ends
DYNAMIC = "dynamic"


def quantise(path: Path, kind: Kind, evidence: Evidence, max_loss: float | None) -> dict[str, Any]:
    """Changes a float ONNX file of normalised images into an 8-bit one.

    Several ways are tried. The one whose outputs are nearest to the float network's on train images that calibrated
    none of them is taken, and only that one is scored on val, image by image against the float network.

    Args:
        path: of the file.
        kind: of the task.
        evidence: its images.
        max_loss: of the val metric that is accepted; None: no more than noise (the 95 % interval holds 0).

    Returns:
        As plain JSON: `way`, `val_float`, `val_int8`, `loss` with its interval `low` and `high`, `val_images`; `bytes`
        and `bytes_float`, `latency_ms` and `latency_ms_float`, their ratios; `apart` of every way that works, and in
        `problems` what is wrong with the others.

    Raises:
        WorkError: if no way works, or the loss is not accepted.
    """
    images = evidence.train(CALIBRATION + HELD)
    half = max(1, min(HELD, len(images) // 3))
    held, calibration = images[:half], images[half:] if len(images) > half else images
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".int8-") as scratch:
        folder = Path(scratch)
        plain = onnx_runner(path)
        want = _outputs(kind, one_by_one(plain)(held))
        tried: dict[str, tuple[float, Path]] = {}
        problems: list[str] = []
        for way, make in _ways(calibration).items():
            target = folder / f"{len(tried) + len(problems)}.onnx"
            try:
                with _still():
                    make(path, target, folder)
                if target.stat().st_size > SMALLER * path.stat().st_size:
                    problems.append(f"{way} leaves {target.stat().st_size / path.stat().st_size:.0%} of the file")
                    continue
                apart = float((_outputs(kind, one_by_one(onnx_runner(target))(held)) - want).abs().mean())
            except Exception as error:  # the quantiser's errors share no base class
                problems.append(f"{way} fails ({first_lines(error).rstrip('.')})")
                continue
            tried[way] = (apart, target)
        if not tried:
            raise WorkError(f"No way to int8 works for this network: {listed(problems)}; nothing was written.")
        way = min(tried, key=lambda name: tried[name][0])
        small = one_by_one(onnx_runner(tried[way][1]))
        val_float = evidence.score(plain, folder / "float")
        val_int8 = evidence.score(small, folder / "int8")
        found = compare_outcomes(kind, folder / "float", folder / "int8")
        assert found is not None
        facts = {
            "way": way,
            "val_float": val_float,
            "val_int8": val_int8,
            "loss": found.value,
            "low": found.low,
            "high": found.high,
            "val_images": found.images,
            "bytes_float": path.stat().st_size,
            "bytes": tried[way][1].stat().st_size,
            **_latencies(path, tried[way][1], images[:1]),
            "apart": {name: value for name, (value, _) in tried.items()},
            "problems": problems,
            "calibration_images": len(calibration),
        }
        facts["bytes_ratio"] = facts["bytes"] / facts["bytes_float"]
        _judge(facts, kind, max_loss)
        shutil.move(tried[way][1], path)
    return facts


def int8_sentences(facts: dict[str, Any], kind: Kind) -> list[str]:
    """Loss, size and time, for people."""
    gain, low, high = (0.0 - facts[name] for name in ("loss", "high", "low"))
    sign = f"{gain:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
    faster = facts["latency_ratio"]
    time = f"{1 / faster:.2f} times as fast" if faster <= 1 else f"{faster:.2f} times as slow"
    return [
        f"int8 ({facts['way']}): {METRIC_NAMES[kind]} on val {facts['val_int8']:.4f} instead of "
        f"{facts['val_float']:.4f} ({sign}, {facts['val_images']:,} images).",
        f"{facts['bytes'] / 1e6:.1f} MB instead of {facts['bytes_float'] / 1e6:.1f} ({facts['bytes_ratio']:.2f}); "
        f"{facts['latency_ms']:.2f} ms instead of {facts['latency_ms_float']:.2f}, {time} ({facts['latency_setup']}).",
        *([f"Other ways do not work here: {listed(facts['problems'])}."] if facts["problems"] else []),
    ]


def one_by_one(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Each image in a call of its own: a dynamic way takes its ranges from a whole call, and neighbours would count."""
    return lambda images: torch.cat([run(image[None]) for image in images])


def _judge(facts: dict[str, Any], kind: Kind, max_loss: float | None) -> None:
    refused = facts["low"] > 0 if max_loss is None else facts["loss"] > max_loss
    if not refused:
        return
    limit = "more than noise" if max_loss is None else f"more than --max-loss {max_loss:g}"
    hint = f"accept it by --max-loss {facts['loss'] + 0.0005:.3f}, or leave --int8 out"
    raise WorkError(
        f"int8 ({facts['way']}) loses {facts['loss']:.4f} {METRIC_NAMES[kind]} on {facts['val_images']:,} val images "
        f"(95 % interval {facts['low']:+.4f} to {facts['high']:+.4f}), {limit}; nothing was written: {hint}."
    )


def _outputs(kind: Kind, logits: Tensor) -> Tensor:
    return logits.sigmoid() if kind == "multilabel" else logits.float().softmax(1)


def _ways(calibration: Tensor) -> dict[str, Callable[[Path, Path, Path], None]]:
    from onnxruntime.quantization import CalibrationMethod

    return {
        "static, min-max": _static(calibration, CalibrationMethod.MinMax),
        "static, percentile": _static(calibration, CalibrationMethod.Percentile),
        DYNAMIC: _dynamic,
    }


def _static(calibration: Tensor, method: Any) -> Callable[[Path, Path, Path], None]:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        """Batches of which the quantiser takes a range at a time: what it keeps of one is gone before the next."""

        def __init__(self, batch: int) -> None:
            self.batches = calibration.split(batch)
            self.left: Iterator[Tensor] = iter(())

        def __len__(self) -> int:
            return len(self.batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(self.batches[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {INPUT: batch.numpy()}

    def make(source: Path, target: Path, scratch: Path) -> None:
        prepared = _prepared(source, scratch)
        quantize_static(
            str(prepared),
            str(target),
            Reader(_batch(prepared, calibration[:1], scratch)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,  # signed both: unsigned by signed saturates on CPUs without VNNI
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            extra_options={"CalibStridedMinMax": 1},  # a batch at a time, of every method, not of min-max alone
        )

    return make


def _batch(path: Path, image: Tensor, scratch: Path) -> int:
    """Images that calibrate in one pass.

    Args:
        path: of the prepared graph.
        image: one, [1, 3, S, S].
        scratch: for a graph that counts.

    Raises:
        WorkError: if one takes too much memory.
    """
    each = _activation_bytes(path, image, scratch)
    if each > PASS_BYTES:
        raise WorkError(f"activations of one image take {each / 1e9:.2g} GB, more than {PASS_BYTES / 1e9:g}")
    return max(1, min(BATCH, PASS_BYTES // (2 * each)))  # twice: the runtime takes more than it hands out


def _activation_bytes(path: Path, image: Tensor, scratch: Path) -> int:
    """Of all tensors that calibration looks at, in a pass of `image` [1, 3, S, S].

    Their sizes are counted in the graph, as many have no shape before it runs, and none of them is kept.
    """
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibraterBase

    found = CalibraterBase(str(path))
    names, _ = found.select_tensors_to_calibrate(found.model)
    graph = found.model.graph
    del graph.output[:]
    for name in sorted(names):
        size = f"{name}/size"
        graph.node.append(onnx.helper.make_node("Size", [name], [size]))
        graph.output.append(onnx.helper.make_tensor_value_info(size, onnx.TensorProto.INT64, []))
    counted = scratch / "counted.onnx"
    onnx.save(found.model, str(counted))
    session = InferenceSession(str(counted), providers=["CPUExecutionProvider"])
    return 4 * sum(int(size) for size in session.run(None, {INPUT: image.numpy()}))


def _dynamic(source: Path, target: Path, scratch: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(_prepared(source, scratch)),
        str(target),
        op_types_to_quantize=["MatMul", "Gemm"],  # integer convolutions of that kind are slower than float ones
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def _prepared(source: Path, scratch: Path) -> Path:
    """The graph with its shapes, folded as the quantiser asks for; made once."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target = scratch / "prepared.onnx"
    if not target.is_file():
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    return target


@contextlib.contextmanager
def _still() -> Iterator[None]:
    """The quantiser logs to the root logger and leaves files in the working folder's place of temporary ones."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logging.root.setLevel(level)


def _latencies(plain: Path, small: Path, image: Tensor) -> dict[str, Any]:
    """Median of a pass of one image on one thread: of two turns each, taken alternately, the better."""
    best = [float("inf"), float("inf")]
    runs = [onnx_runner(path, threads=1) for path in (plain, small)]
    for _ in range(2):
        for i, run in enumerate(runs):
            best[i] = min(best[i], timed(lambda run=run: run(image), "cpu", 1, 1, TIMED_S).median_ms)  # type: ignore[misc]
    setup = f"{processor()}, onnxruntime, 1 thread, batch 1"
    return {
        "latency_ms_float": best[0],
        "latency_ms": best[1],
        "latency_ratio": best[1] / best[0],
        "latency_setup": setup,
    }
