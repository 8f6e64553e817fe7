"""Train the packaged ViT teacher on two CPU cores, without one label of the default task.

The ViT regresses the pooled feature of EfficientNet-Lite0, so it learns from pictures alone: clip art outside
the default task's val and test stems, emoji and icons. ``MODEL_CARD.md`` beside this file has the command and
the numbers. The stem is frozen, so its maps are computed once for each stored view and only the blocks train.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import tempfile
import time
import warnings
from collections.abc import Iterable
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from orchestrator.packaged.clipart.build import hashes_and_pixels, is_variant, load_square, stem_of
from orchestrator.packaged.models import VIT_SIDE, VIT_WEIGHTS, efficientnet_lite0, vit_clipart

DATA = Path(__file__).parents[1] / "clipart" / "images.parquet"
TARGET_SIDE = 160  # pixels: Lite0 sees each view larger than the ViT does, which makes better targets
SOURCE_SIDE = 192  # pixels: pictures before a view is cut
MAX_STARS = 150  # of 1,378 nearly equal stars
SKIN_TONES = re.compile(r"1f3f[b-f]", re.IGNORECASE)
FONTS = ("remixicon", "materialdesignicons6", "fontawesome6-solid", "phosphor")
DARK = 110  # highest channel value of a colour that icons are drawn with


# --- pictures -----------------------------------------------------------------------------------------------


def held_out() -> tuple[set[str], np.ndarray, np.ndarray]:
    """Stems, difference hashes and pixels of the default task's val and test pictures."""
    table = pq.read_table(DATA, filters=[("split", "in", ["val", "test"])])
    images = [Image.open(io.BytesIO(data)) for data in table["image"].to_pylist()]
    return set(table["stem"].to_pylist()), *hashes_and_pixels(images)


def clipart_pictures(root: Path) -> list[Image.Image]:
    """Every usable drawing of the package, whatever its folder, that is no variant of a held-out one."""
    stems, hashes, pixels = held_out()
    pictures, stars = [], 0
    for path in sorted(root.rglob("*.png")):
        is_star = "stars" in path.parts
        stars += is_star
        if stem_of(path) in stems or (is_star and stars > MAX_STARS):
            continue
        square = load_square(path, SOURCE_SIDE)
        if square is None:
            continue
        small = square.resize((VIT_SIDE, VIT_SIDE), Image.Resampling.BICUBIC)
        if not is_variant(small, hashes, pixels):
            pictures.append(square)
    return pictures


def emoji_pictures(package: Path) -> list[Image.Image]:
    """The 64 px emoji of one vendor's package, one skin tone each."""
    files = sorted(path for path in package.glob("img/*/64/*.png") if not SKIN_TONES.search(path.name))
    return [square for path in files if (square := load_square(path, SOURCE_SIDE)) is not None]


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


# --- training -----------------------------------------------------------------------------------------------


def feature_of(model: VisionTransformer, maps: torch.Tensor) -> torch.Tensor:
    """Pooled features (N, 128) from the stem's maps (N, 112, 6, 6): timm's forward without the stem."""
    x = model._pos_embed(model.patch_embed.proj(maps).flatten(2).transpose(1, 2))
    return model.forward_head(model.norm(model.blocks(model.norm_pre(x))), pre_logits=True)


def train(
    model: VisionTransformer,
    maps: torch.Tensor,
    features: torch.Tensor,
    classifier: nn.Linear,
    args: argparse.Namespace,
) -> None:
    """Regress the standardised features from the class token; the regression head is thrown away."""
    views, count = maps.shape[:2]
    mean = features.float().mean((0, 1))
    std = features.float().std((0, 1)) + 1e-3
    head = nn.Linear(model.embed_dim, features.shape[-1])
    weights = [p for p in model.parameters() if p.requires_grad] + list(head.parameters())
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    start, order = time.time(), torch.empty(0, dtype=torch.long)
    model.train()
    block: Any
    for block in model.blocks:
        block.attn.fused_attn = False  # with 37 tokens, the fused kernel's backward is half of a step on a CPU
    for step in range(1, args.steps + 1):
        if len(order) < args.batch:
            order = torch.randperm(count, generator=generator)
        ids, order = order[: args.batch], order[args.batch :]
        view = torch.randint(views, (len(ids),), generator=generator)
        target = features[view, ids].float()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = head(feature_of(model, maps[view, ids].float()))
        predicted = predicted.float()
        wanted = (target - mean) / std
        loss = F.smooth_l1_loss(predicted, wanted) + 1 - F.cosine_similarity(predicted, wanted).mean()
        if args.kl:
            with torch.autocast("cpu", torch.bfloat16):
                logits = classifier(torch.cat([predicted * std + mean, target])).float()
            soft, hard = (logits / 2).log_softmax(-1).chunk(2)
            loss = loss + args.kl * F.kl_div(soft, hard, log_target=True, reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps:
            cosine = F.cosine_similarity(predicted.detach(), wanted).mean().item()
            print(
                f"step {step} loss {loss.item():.4f} cosine {cosine:.4f} {time.time() - start:.0f} s",
                flush=True,
            )
    model.eval()


# --- measuring ----------------------------------------------------------------------------------------------


def task_images() -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The default task: images (n, 3, 96, 96) in [-1, 1], topic numbers (n,), split names (n,)."""
    table = pq.read_table(DATA)
    pixels = stack(Image.open(io.BytesIO(data)) for data in table["image"].to_pylist())
    images = torch.from_numpy(normalise(pixels))
    labels = np.unique(np.array(table["label"].to_pylist()), return_inverse=True)[1]
    return images, labels, np.array(table["split"].to_pylist())


@torch.inference_mode()
def pooled(model: Any, images: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """Pooled features (n, width) of any timm model."""
    model.eval()
    parts = [model.forward_head(model.forward_features(x), pre_logits=True) for x in images.split(batch)]
    return torch.cat(parts)


def probe(
    features: torch.Tensor,
    labels: np.ndarray,
    splits: np.ndarray,
    seed: int,
    per_class: int = 20,
    decay: float = 1.0,
) -> dict[str, float]:
    """Accuracy on val and test of logistic regression on standardised features, ``per_class`` labels a topic.

    ``decay`` is the L2 penalty on the weights, summed over samples: scikit-learn's 1 / C.
    """
    rng = np.random.default_rng(seed)
    train_ids = [np.flatnonzero((labels == k) & (splits == "train")) for k in range(labels.max() + 1)]
    chosen = np.concatenate([rng.choice(ids, per_class, replace=False) for ids in train_ids])
    mean, std = features[chosen].mean(0), features[chosen].std(0) + 1e-6
    x, y = (features - mean) / std, torch.from_numpy(labels)
    weight = torch.zeros(len(train_ids), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(train_ids), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x[chosen] @ weight.T + bias, y[chosen], reduction="sum")
        loss = (loss + 0.5 * decay * weight.square().sum()) / len(chosen)
        loss.backward()
        return loss

    optimizer.step(closure)
    right = ((x @ weight.T + bias).argmax(1) == y).numpy()
    return {split: float(right[splits == split].mean()) for split in ("val", "test")}


def report(name: str, features: torch.Tensor, labels: np.ndarray, splits: np.ndarray, seeds: int, decay: float) -> None:
    """Print one line: mean and standard deviation over the label draws."""
    runs = [probe(features, labels, splits, seed, decay=decay) for seed in range(seeds)]
    cells = []
    for split in ("val", "test"):
        accuracy = [run[split] for run in runs]
        cells.append(f"{split} {np.mean(accuracy):.3f} ± {np.std(accuracy, ddof=1):.3f}")
    print(f"{name}: {', '.join(cells)}", flush=True)


def truncated(model: VisionTransformer, keep: slice) -> VisionTransformer:
    """A shallower copy with every weight but the dropped blocks'."""
    kept = list(range(len(model.blocks)))[keep]
    small = vit_clipart(depth=len(kept), pretrained=False)
    small.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}, strict=False)
    for new, old in enumerate(kept):
        small.blocks[new].load_state_dict(model.blocks[old].state_dict())
    return small


def measure(model: VisionTransformer, seeds: int, decay: float) -> None:
    """Print the probes of the model, its truncations, its random initialisation and Lite0."""
    images, labels, splits = task_images()
    torch.manual_seed(0)
    models = {
        "Lite0 at 96 px": efficientnet_lite0(),
        "vit_clipart": model,
        "blocks [0::2]": truncated(model, slice(0, None, 2)),
        "blocks [0::3]": truncated(model, slice(0, None, 3)),
        "random stem and blocks": vit_clipart(pretrained=False),
        "Lite0's stem, random blocks": with_stem(vit_clipart(pretrained=False)),
    }
    for name, candidate in models.items():
        report(name, pooled(candidate, images), labels, splits, seeds, decay)


def with_stem(model: VisionTransformer) -> VisionTransformer:
    """The model with Lite0's ImageNet weights in its stem."""
    lite0 = efficientnet_lite0().state_dict()
    backbone = model.patch_embed.backbone
    backbone.load_state_dict({name: lite0[name] for name in backbone.state_dict()}, strict=True)
    return model


def main() -> None:
    """Store the views, train, write the weights, print the probes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--emoji", type=Path, nargs="*", default=[], help="unpacked emoji-datasource-* packages")
    parser.add_argument("--icons", type=Path, help="the fonts folder of qtawesome 1.4.2")
    parser.add_argument("--icon-count", type=int, default=3000)
    parser.add_argument("--views", type=int, default=4, help="stored views a picture; the first is plain")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--kl", type=float, default=0.3, help="weight of Lite0's softened ImageNet predictions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe-seeds", type=int, default=10)
    parser.add_argument("--decay", type=float, default=1.0, help="L2 penalty of the probes")
    parser.add_argument("--cache", type=Path, help="file that keeps the stored views between runs")
    parser.add_argument("--out", type=Path, default=VIT_WEIGHTS)
    parser.add_argument("--measure", action="store_true", help="only print the probes of the packaged weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.measure:
        return measure(vit_clipart(), args.probe_seeds, args.decay)

    start = time.time()
    model = with_stem(vit_clipart(pretrained=False))
    lite0: Any = efficientnet_lite0()
    if args.cache and args.cache.is_file():
        maps, features = torch.load(args.cache, weights_only=True)
    else:
        rng = random.Random(args.seed)
        sources = {"clip art": clipart_pictures(args.openclipart)}
        sources |= {f"emoji {i}": emoji_pictures(package) for i, package in enumerate(args.emoji)}
        if args.icons:
            sources["icons"] = icon_pictures(args.icons, args.icon_count, rng)
        print(
            {name: len(pictures) for name, pictures in sources.items()},
            f"{time.time() - start:.0f} s",
            flush=True,
        )
        pictures = [picture for of_source in sources.values() for picture in of_source]
        maps, features = store_views(pictures, model.patch_embed.backbone, lite0, args.views, args.threads, args.seed)
        if args.cache:
            torch.save((maps, features), args.cache)
    print(f"views stored: {tuple(maps.shape)} {time.time() - start:.0f} s", flush=True)
    train(model, maps, features, lite0.classifier.requires_grad_(False), args)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.out)
    print(f"{args.out.name}: {args.out.stat().st_size} bytes, {time.time() - start:.0f} s", flush=True)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    measure(model, args.probe_seeds, args.decay)


if __name__ == "__main__":
    main()
