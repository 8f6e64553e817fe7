"""Preprocessing inside an ONNX graph: whole images go in, and the graph crops, resizes and normalises them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.views import Policy, draw, render
from orchestrator.errors import WorkError, first_lines
from orchestrator.models.onnx import INPUT

IMAGE = "image"
LEVELS = 2.0  # grey levels by which a pixel may differ from the sweep's own preprocessing

# The resize is done side by side with rounding between, as Pillow and torchvision do it for bytes: across, then down.
GRAPH = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
prepare (uint8[batch, height, width, 3] image) => (float[batch, 3, {size}, {size}] prepared)
{{
  two = Constant <value_ints: ints = [2]> ()
  rows_cols = Constant <value_ints: ints = [1, 2]> ()
  three = Constant <value_ints: ints = [3]> ()
  target = Constant <value_ints: ints = [{size}]> ()
  none = Constant <value_float: float = 0.0> ()
  full = Constant <value_float: float = 255.0> ()
  batch_size = Shape <start: int = 0, end: int = 1> (image)
  sides = Shape <start: int = 1, end: int = 3> (image)
  side = ReduceMin <keepdims: int = 1> (sides)
  beyond = Sub (sides, side)
  begin = Div (beyond, two)
  end = Add (begin, side)
  square = Slice (image, begin, end, rows_cols)
  planes = Transpose <perm: ints = [0, 3, 1, 2]> (square)
  values = Cast <to: int = 1> (planes)
  wide_shape = Concat <axis: int = 0> (batch_size, three, side, target)
  wide_raw = Resize <{how}> (values, , , wide_shape)
  wide_round = Round (wide_raw)
  wide = Clip (wide_round, none, full)
  small_shape = Concat <axis: int = 0> (batch_size, three, target, target)
  small_raw = Resize <{how}> (wide, , , small_shape)
  small_round = Round (small_raw)
  small = Clip (small_round, none, full)
  centred = Sub (small, mean)
  prepared = Div (centred, deviation)
}}
"""
HOW = {
    "bilinear": 'mode: string = "linear", antialias: int = 1, exclude_outside: int = 1',
    "bicubic": 'mode: string = "cubic", antialias: int = 1, cubic_coeff_a: float = -0.5, exclude_outside: int = 1',
}


def put_preprocessing(path: Path, facts: Mapping[str, Any]) -> None:
    """Changes an ONNX file that takes normalised images into one that takes whole ones, uint8 [B, H, W, 3].

    Args:
        path: of the file.
        facts: `pretrained_cfg` of its `config.json`.

    Raises:
        WorkError: if the two graphs do not fit together.
    """
    import onnx
    from onnx import compose, numpy_helper, parser

    try:
        network = onnx.load(str(path))
        opset = next(o.version for o in network.opset_import if o.domain in ("", "ai.onnx"))
        text = GRAPH.format(
            ir=network.ir_version, opset=opset, size=facts["input_size"][-1], how=HOW[facts["interpolation"]]
        )
        before = parser.parse_model(text)
        for name in ("mean", "std"):
            values = np.asarray(facts[name], np.float32).reshape(1, 3, 1, 1) * np.float32(255)
            before.graph.initializer.append(numpy_helper.from_array(values, "deviation" if name == "std" else name))
        before = compose.add_prefix(before, "before/", rename_inputs=False, rename_outputs=False)
        both = compose.merge_models(before, network, io_map=[("prepared", network.graph.input[0].name)])
        del both.metadata_props[:]
        both.metadata_props.extend(network.metadata_props)
        onnx.checker.check_model(both)
        onnx.save(both, str(path))
    except Exception as error:  # the parser, the checker and protobuf share no base class
        raise WorkError(f"Preprocessing cannot be put into the graph: {first_lines(error)}") from error


def prepared_runner(path: Path) -> Callable[[Sequence[Tensor]], Tensor]:
    """Whole images, uint8 [3, H, W] each, one after another through the file, to logits [n, ...]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors share no base class
        raise WorkError(f"onnxruntime cannot load {path.name!r}: {first_lines(error)}") from error

    def run(images: Sequence[Tensor]) -> Tensor:
        rows = [session.run(None, {IMAGE: i.permute(1, 2, 0)[None].numpy()})[0] for i in images]
        return torch.from_numpy(np.concatenate([np.asarray(row) for row in rows]))

    return run


def takes_whole_images(path: Path) -> bool:
    """Whether an ONNX file has its preprocessing inside."""
    import onnx

    return onnx.load(str(path), load_external_data=False).graph.input[0].name != INPUT


def compare_preprocessing(facts: Mapping[str, Any], images: Sequence[Tensor], folder: Path) -> dict[str, float]:
    """By how much the graph's pixels differ from those that the student was evaluated on.

    Args:
        facts: `pretrained_cfg`.
        images: uint8 [3, H, W], as they were decoded.
        folder: for a graph of the preprocessing alone.

    Returns:
        `pixels_max` and `pixels_mean`, in grey levels; `pixels_equal`, the share without a difference.

    Raises:
        WorkError: if a pixel differs by more than `LEVELS`.
    """
    import onnx
    from onnx import TensorProto, helper

    size = int(facts["input_size"][-1])
    value = helper.make_tensor_value_info
    shape: list[str | int | None] = ["batch", 3, size, size]
    node = helper.make_node("Identity", [INPUT], ["same"])
    graph = helper.make_graph([node], "same", [value(INPUT, 1, shape)], [value("same", TensorProto.FLOAT, shape)])
    path = folder / ".prepared.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    try:
        put_preprocessing(path, facts)
        run = prepared_runner(path)
        mean, std = (torch.tensor(facts[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
        apart = []
        for image in images:
            view = draw(Policy(1.0, 0.0), "", (image.shape[1], image.shape[2]), 0)
            want = render(image, view, size, facts["interpolation"]).float()
            apart.append(((run([image])[0] * std + mean) - want).abs().flatten())
    finally:
        path.unlink(missing_ok=True)
    every = torch.cat(apart)
    largest = float(every.max())
    if not largest <= LEVELS:
        raise WorkError(
            f"The graph's preprocessing differs from the student's by {largest:.3g} grey levels, more than {LEVELS:g}; "
            "nothing was written."
        )
    equal = float((every < 0.01).float().mean())
    return {"pixels_max": round(largest, 3), "pixels_mean": float(every.mean()), "pixels_equal": equal}


def preprocessing_sentence(measured: Mapping[str, Any]) -> str:
    """What preprocessing inside the graph changes, for people."""
    return (
        f"Preprocessing is inside: of {measured['images']} val images, {measured['pixels_equal']:.2%} of the pixels "
        f"are equal and none is more than {measured['pixels_max']:.2g} grey levels apart; logits within "
        f"{measured['logits_max']:.2g}, the same answer in {measured['same_answer']:.1%}."
    )
