"""What the packaged ViT learns from: pictures outside the default task's val and test stems, drawn as views."""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from torch import nn

from orchestrator.packaged.clipart.build import hashes_and_pixels, is_variant, load_square, stem_of
from orchestrator.packaged.models import VIT_SIDE

DATA = Path(__file__).parents[1] / "clipart" / "images.parquet"
TARGET_SIDE = 160  # pixels: Lite0 sees each view larger than the ViT does, which makes better targets
SOURCE_SIDE = 192  # pixels: pictures before a view is cut
MAX_STARS = 150  # of 1,378 nearly equal stars
SKIN_TONES = re.compile(r"1f3f[b-f]", re.IGNORECASE)
FONTS = ("remixicon", "materialdesignicons6", "fontawesome6-solid", "phosphor")
DARK = 110  # highest channel value of a colour that icons are drawn with


def held_out() -> tuple[set[str], np.ndarray, np.ndarray]:
    """Stems, difference hashes and pixels of the default task's val and test pictures."""
    table = pq.read_table(DATA, filters=[("split", "in", ["val", "test"])])
    images = [Image.open(io.BytesIO(data)) for data in table["image"].to_pylist()]
    return set(table["stem"].to_pylist()), *hashes_and_pixels(images)


def drawings(root: Path, but: set[str], side: int) -> Iterator[Image.Image]:
    """Every usable drawing of Debian's package, whatever its folder, but those of some stems and most of the stars."""
    stars = 0
    for path in sorted(root.rglob("*.png")):
        is_star = "stars" in path.parts
        stars += is_star
        if stem_of(path) in but or (is_star and stars > MAX_STARS):
            continue
        square = load_square(path, side)
        if square is not None:
            yield square


def clipart_pictures(root: Path) -> list[Image.Image]:
    """Every drawing that is no variant of a held-out one."""
    stems, hashes, pixels = held_out()
    pictures = []
    for square in drawings(root, stems, SOURCE_SIDE):
        small = square.resize((VIT_SIDE, VIT_SIDE), Image.Resampling.BICUBIC)
        if not is_variant(small, hashes, pixels):
            pictures.append(square)
    return pictures


def emoji_pictures(package: Path, side: int = SOURCE_SIDE) -> list[Image.Image]:
    """The 64 px emoji of one vendor's package, one skin tone each."""
    files = sorted(path for path in package.glob("img/*/64/*.png") if not SKIN_TONES.search(path.name))
    return [square for path in files if (square := load_square(path, side)) is not None]


def icon_pictures(fonts: Path, count: int, rng: random.Random) -> list[Image.Image]:
    """``count`` glyphs from icon fonts in a random dark colour on white."""
    glyphs = []
    for name in FONTS:
        for charmap in sorted(fonts.glob(f"{name}*charmap*.json")):
            font = fonts / charmap.name.replace("-charmap", "").replace(".json", ".ttf")
            glyphs += [(font, int(code, 16)) for code in json.loads(charmap.read_text()).values()]
    pictures = []
    for font, code in rng.sample(glyphs, min(count, len(glyphs))):
        picture = Image.new("RGB", (SOURCE_SIDE, SOURCE_SIDE), "white")
        colour = (0, 0, 0) if rng.random() < 0.5 else tuple(rng.randrange(DARK) for _ in range(3))
        type_face = ImageFont.truetype(str(font), int(SOURCE_SIDE * 0.9))
        middle = (SOURCE_SIDE // 2, SOURCE_SIDE // 2)
        ImageDraw.Draw(picture).text(middle, chr(code), font=type_face, fill=colour, anchor="mm")
        pictures.append(picture)
    return pictures


# --- stored views -------------------------------------------------------------------------------------------


def draw_view(picture: Image.Image, rng: random.Random, plain: bool) -> Image.Image:
    """One random view, ``TARGET_SIDE`` px square; a plain view is the whole picture."""
    if plain:
        return picture.resize((TARGET_SIDE, TARGET_SIDE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if rng.random() < 0.3:
        picture = picture.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
    width, height = (int(SOURCE_SIDE * rng.uniform(0.65, 1.1)) for _ in range(2))
    left, top = (
        rng.randint(*sorted((0, SOURCE_SIDE - width))),
        rng.randint(*sorted((0, SOURCE_SIDE - height))),
    )
    window = Image.new("RGB", (width, height), "white")
    window.paste(picture, (-left, -top))
    view = window.resize((TARGET_SIDE, TARGET_SIDE), Image.Resampling.BICUBIC)
    if rng.random() < 0.15:
        view = ImageOps.grayscale(view).convert("RGB")
    elif rng.random() < 0.5:
        hsv = np.array(view.convert("HSV"))
        hsv[..., 0] += np.uint8(rng.randrange(256) if rng.random() < 0.2 else rng.randrange(-20, 21) % 256)
        view = Image.fromarray(hsv, "HSV").convert("RGB")
    if rng.random() < 0.5:
        view = ImageEnhance.Brightness(view).enhance(rng.uniform(0.7, 1.1))
        view = ImageEnhance.Contrast(view).enhance(rng.uniform(0.7, 1.2))
    return view


def stack(images: Iterable[Image.Image]) -> np.ndarray:
    """(n, side, side, 3) bytes."""
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def normalise(pixels: np.ndarray) -> np.ndarray:
    """Bytes (n, side, side, 3) as float32 (n, 3, side, side) in [-1, 1]: mean = std = 0.5."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0)


def _both_sides(job: tuple[list[Image.Image], int, bool]) -> tuple[np.ndarray, np.ndarray]:
    pictures, seed, plain = job
    rng = random.Random(seed)
    views = [draw_view(picture, rng, plain) for picture in pictures]
    return stack(view.resize((VIT_SIDE, VIT_SIDE), Image.Resampling.BICUBIC) for view in views), stack(views)


class Head(nn.Module):
    """Lite0 to its pooled feature: (N, 3, H, W) -> (N, 1280)."""

    def __init__(self, lite0: Any) -> None:
        super().__init__()
        self.lite0 = lite0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1280)."""
        return self.lite0.forward_head(self.lite0.forward_features(x), pre_logits=True)


def session(model: nn.Module, side: int, threads: int) -> ort.InferenceSession:
    """The frozen model in ONNX Runtime, 8 to 10 times faster than torch with these layers on a CPU."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, side, side),),
            path,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )
        content = path.read_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def store_views(
    pictures: list[Image.Image], stem: nn.Module, lite0: nn.Module, views: int, threads: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stem maps (views, n, 112, 6, 6) at 96 px, Lite0's features (views, n, 1280) at 160 px; both fp16."""
    run_stem, run_lite0 = session(stem, VIT_SIDE, threads), session(Head(lite0), TARGET_SIDE, threads)
    chunks = [pictures[i : i + 64] for i in range(0, len(pictures), 64)]
    jobs = [(chunk, seed * 10**6 + v * 10**4 + i, v == 0) for v in range(views) for i, chunk in enumerate(chunks)]
    maps, features = [], []
    with Pool(threads) as pool:
        for small, large in pool.imap(_both_sides, jobs):
            maps.append(torch.from_numpy(run_stem.run(None, {"x": normalise(small)})[0]).half())
            features.append(torch.from_numpy(run_lite0.run(None, {"x": normalise(large)})[0]).half())
    shape = (views, len(pictures))
    return torch.cat(maps).view(*shape, *maps[0].shape[1:]), torch.cat(features).view(*shape, -1)
