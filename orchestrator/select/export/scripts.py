"""The `load.py` of an export: put together of texts, so that the folder needs neither this package nor its imports."""

from __future__ import annotations

from typing import Literal

from orchestrator.spec import Kind

WHAT: dict[Kind, str] = {
    "classification": "Classifies an image: python load.py IMAGE.",
    "multilabel": "Tells the classes of an image: python load.py IMAGE.",
    "segmentation": "Tells the class of each pixel: python load.py IMAGE [MASK.png], to write the mask as well.",
}

TORCH = '''\
"""{what}

Needs {needs}.
"""

{imports}

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
'''

NETWORK = '''\
def network():
    """The network with its weights, in evaluation mode: [B, 3, S, S] normalised images -> {logits} logits."""
    {network}
'''

LOGITS: dict[Kind, str] = {"classification": "[B, C]", "multilabel": "[B, C]", "segmentation": "[B, C, S, S]"}

BASE_TIMM = '''\
def base():
    """timm's network, without weights."""
    return timm.create_model(CONFIG["architecture"], num_classes=CONFIG["num_classes"], **CONFIG["model_args"])
'''

BASE_CLIP = '''\
class Tower(torch.nn.Module):
    """open_clip's image tower under a head."""

    def __init__(self, visual):
        super().__init__()
        self.visual, self.head = visual, torch.nn.Identity()

    def reset_classifier(self, outputs):
        self.head = torch.nn.Linear(CONFIG["num_features"], outputs)

    def forward(self, images):
        return self.head(self.visual(images))


def base():
    """The image tower, without weights."""
    tower = Tower(open_clip.create_model(f"local-dir:{HERE}", load_weights=False).visual)
    tower.reset_classifier(CONFIG["num_classes"])
    return tower
'''

BASE_CLIPART = '''\
def base():
    """The network of timm's parts, without weights."""
    stem = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(3,))
    stem.blocks = stem.blocks[:5]  # up to the map of stride 16
    model = VisionTransformer(embed_layer=lambda **kwargs: HybridEmbed(stem, **kwargs), **CONFIG["model_args"])
    model.patch_embed.backbone = freeze_batch_norm_2d(model.patch_embed.backbone)
    return model
'''

STRUCTURE = '''\
def structured(model):
    """The network with the modules that structure.py puts into it or around it."""
    spec = importlib.util.spec_from_file_location("exported_structure", HERE / CONFIG["structure"]["file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, CONFIG["structure"]["function"])(model, **CONFIG["structure"]["arguments"])
'''

OPENED = '''\
def opened(path):
    """The image, upright and in RGB: transparency on white, wide greyscale scaled to its largest value."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image, np.float64)
        if not np.isfinite(wide).all():
            raise ValueError(f"{path}: values that are not finite")
        low = min(wide.min(), 0)
        image = Image.fromarray(((wide - low) / (wide.max() - low or 1) * 255).astype(np.uint8))
    return image.convert("RGB")
'''

PIXELS = '''\
def pixels(path):
    """The central square, resized; as the student was evaluated."""
    image = opened(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = F.pil_to_tensor(image.crop((left, top, left + side, top + side)))
    size, mode = CONFIG["pretrained_cfg"]["input_size"][1:], CONFIG["pretrained_cfg"]["interpolation"]
    image = F.resize(image, size, F.InterpolationMode(mode), antialias=True) / 255
    return F.normalize(image, CONFIG["pretrained_cfg"]["mean"], CONFIG["pretrained_cfg"]["std"])[None]


if __name__ == "__main__":
    with torch.inference_mode():
        logits = network()(pixels(sys.argv[1]))[0]
'''

BEST = """\
    for share, label in sorted(zip(shares.tolist(), CONFIG["label_names"]), reverse=True){top}:
        print(f"{share:.4f} {label}")
"""

MAIN_TORCH: dict[Kind, str] = {
    "classification": "    shares = logits.softmax(0)\n",
    "multilabel": "    shares = logits.sigmoid()\n",
    "segmentation": """\
    mask = logits.argmax(0)
    if len(sys.argv) > 2:
        Image.fromarray(mask.byte().numpy()).save(sys.argv[2])
    shares = torch.bincount(mask.flatten(), minlength=len(logits)) / mask.numel()
""",
}

ONNX = '''\
"""{what}

Needs onnxruntime, numpy and pillow only.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))


{opened}

{pixels}


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(HERE / "model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {{"{name}": pixels(sys.argv[1])}})[0][0].astype(np.float64)
'''

PIXELS_ONNX = '''\
def pixels(path):
    """The central square, resized; to a grey level as the student was evaluated."""
    image = opened(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    size, mode = CONFIG["pretrained_cfg"]["input_size"][1:], CONFIG["pretrained_cfg"]["interpolation"]
    image = image.crop((left, top, left + side, top + side)).resize(size, Image.Resampling[mode.upper()])
    image = (np.asarray(image, np.float32) / 255 - CONFIG["pretrained_cfg"]["mean"]) / CONFIG["pretrained_cfg"]["std"]
    return image.astype(np.float32).transpose(2, 0, 1)[None]
'''

PIXELS_WHOLE = '''\
def pixels(path):
    """The whole image; the network's graph crops, resizes and normalises it."""
    return np.asarray(opened(path), np.uint8)[None]
'''

MAIN_ONNX: dict[Kind, str] = {
    "classification": "    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()\n",
    "multilabel": "    shares = 1 / (1 + np.exp(-logits))\n",
    "segmentation": """\
    mask = logits.argmax(0)
    if len(sys.argv) > 2:
        Image.fromarray(mask.astype(np.uint8)).save(sys.argv[2])
    shares = np.bincount(mask.flatten(), minlength=len(logits)) / mask.size
""",
}


def torch_script(kind: Kind, *, base: Literal["timm", "clipart", "clip", "program"], structured: bool) -> str:
    """`load.py` beside safetensors.

    Args:
        kind: of the task.
        base: what is built first: timm's network, the packaged transformer, which timm has not registered, or
            open_clip's image tower, or nothing, as a program of torch.export needs nothing built.
        structured: whether `structure.py` lies beside it.
    """
    plain = base == "timm" and not structured
    standard = [*(["import importlib.util"] if structured else []), "import json", "import sys"]
    program = base == "program"
    packages = ["import numpy as np"]
    packages += [] if program else ["import open_clip" if base == "clip" else "import timm"]
    packages += ["import torch", "from PIL import Image, ImageOps"]
    if not plain and not program:
        packages.append("from safetensors.torch import load_file")
    if base == "clipart":
        packages.append("from timm.layers import HybridEmbed, freeze_batch_norm_2d")
        packages.append("from timm.models.vision_transformer import VisionTransformer")
    packages.append("from torchvision.transforms.v2 import functional as F")
    imports = "\n".join([*standard, "from pathlib import Path", "", *packages])
    steps = ['return timm.create_model(f"local-dir:{HERE}", pretrained=True).eval()']
    if program:
        steps = ['return torch.export.load(HERE / "model.pt2").module()']
    elif not plain:
        steps = [
            f"model = {'structured(base())' if structured else 'base()'}",
            'model.load_state_dict(load_file(HERE / "model.safetensors"))',
            "return model.eval()",
        ]
    brings = "open_clip_torch" if base == "clip" else "timm"
    needs = (
        "torch, torchvision and pillow" if program else f"{brings} (which brings torch and torchvision) and safetensors"
    )
    builders = {"timm": BASE_TIMM, "clipart": BASE_CLIPART, "clip": BASE_CLIP}
    blocks = [
        TORCH.format(what=WHAT[kind], needs=needs, imports=imports),
        *([builders[base]] if not plain and not program else []),
        *([STRUCTURE] if structured else []),
        NETWORK.format(logits=LOGITS[kind], network="\n    ".join(steps)),
        OPENED,
        PIXELS + MAIN_TORCH[kind] + _best(kind),
    ]
    return "\n\n".join(blocks)


def onnx_script(kind: Kind, whole: bool = False) -> str:
    """`load.py` beside an ONNX file; `whole`: of one that has its preprocessing inside."""
    pixels, name = (PIXELS_WHOLE, "image") if whole else (PIXELS_ONNX, "images")
    text = ONNX.format(what=WHAT[kind], opened=OPENED, pixels=pixels.rstrip(), name=name)
    return text + MAIN_ONNX[kind] + _best(kind)


def _best(kind: Kind) -> str:
    return BEST.replace("{top}", "" if kind == "segmentation" else "[:5]")
