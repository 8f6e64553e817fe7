"""Train the packaged upstream package: clip art and emoji that the default task has not, through `store prime`.

``MODEL_CARD.md`` beside this file has the command and the numbers.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from orchestrator.models.upstream import load_upstream
from orchestrator.packaged.clipart.build import hashes_and_pixels, is_variant
from orchestrator.packaged.vit_clipart.pictures import DATA, drawings, emoji_pictures
from orchestrator.sweep.prime import prime

SIDE = 64  # pixels
CHECK_SIDE = 96  # pixels of the default task's pictures, at which variants are looked for
SETTINGS = (
    "f=4",
    "codes=512",
    "dim=16",
    "channels=[16, 32, 64]",
    "prior_width=128",
    "prior_layers=4",
    "batch=16",
    "lr=2e-3",
    "prior_steps=1800",
    "prior_batch=32",
    "prior_lr=1.5e-3",
    "precision=bf16",
)


def task_pictures() -> tuple[set[str], np.ndarray, np.ndarray]:
    """Stems, difference hashes and pixels of all pictures of the default task, its train split included."""
    table = pq.read_table(DATA)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in table["image"].to_pylist()]
    return set(table["stem"].to_pylist()), *hashes_and_pixels(images)


def clipart_pictures(root: Path) -> list[Image.Image]:
    """Every usable drawing of Debian's package that is neither in the default task nor a variant of one that is."""
    stems, hashes, pixels = task_pictures()
    return [square for square in drawings(root, stems, CHECK_SIDE) if not is_variant(square, hashes, pixels)]


def encoded(picture: Image.Image) -> bytes:
    """As PNG, ``SIDE`` px square."""
    buffer = io.BytesIO()
    picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def collect(openclipart: Path, emoji: list[Path], out: Path) -> None:
    """Writes the upstream pictures as one Parquet file, without labels or names."""
    sources = {"clip art": clipart_pictures(openclipart)}
    sources |= {f"emoji {i}": emoji_pictures(package, CHECK_SIDE) for i, package in enumerate(emoji)}
    print({name: len(pictures) for name, pictures in sources.items()}, flush=True)
    images = [encoded(picture) for pictures in sources.values() for picture in pictures]
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), out, compression="NONE")


def default_task(split: str) -> torch.Tensor:
    """[n, 3, 64, 64] in [-1, 1]: one split of the default task."""
    table = pq.read_table(DATA, filters=[("split", "=", split)])
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in table["image"].to_pylist()]
    small = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def measure(model: str) -> None:
    """Prints what the package makes of the default task's train and val pictures, of which it has seen none."""
    package = load_upstream(model, "vq").module
    mean = default_task("train").mean(0)
    for split in ("train", "val"):
        images = default_task(split)
        indices = package.indices(images)
        used = indices.unique().numel() / package.codes
        nll = torch.stack([package.prior_loss(part) * len(part) for part in indices.split(64)]).sum() / len(indices)
        print(
            f"{split}: {len(images)} pictures, PSNR {psnr(package.decode(indices), images):.2f} dB "
            f"(mean picture {psnr(mean.expand_as(images), images):.2f}), {used:.1%} of the codes used, "
            f"{nll:.3f} nats a code (uniform {np.log(package.codes):.3f})"
        )


def psnr(made: torch.Tensor, images: torch.Tensor) -> float:
    """Mean over pictures, in dB."""
    return float((-10 * ((made - images) / 2).square().flatten(1).mean(1).log10()).mean())


@torch.no_grad()
def contact_sheet(model: str, out: Path, columns: int = 12, rows: int = 2) -> None:
    """A PNG of val pictures; below each its re-representation, then completions of its upper half and quarter."""
    package = load_upstream(model, "vq").module
    every = default_task("val")
    chosen = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: columns * rows]]
    sheet = []
    for part in chosen.split(columns):
        indices = package.indices(part)
        sheet += [part, package.decode(indices)]
        for share, seed in ((0.5, 0), (0.5, 1), (0.25, 2)):
            keep = [int(share * package.side) * package.side] * len(part)
            seeds = [seed * columns + i for i in range(len(part))]
            sheet.append(package.decode(package.complete(indices, keep, temperature=1.0, top_k=64, seeds=seeds)))
    tiles = torch.cat(sheet).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    picture = Image.new("RGB", (columns * (SIDE + 4), len(tiles) // columns * (SIDE + 4)), "black")
    for i, tile in enumerate(tiles):
        picture.paste(Image.fromarray(tile), (i % columns * (SIDE + 4) + 2, i // columns * (SIDE + 4) + 2))
    picture.save(out)


def main() -> None:
    """Collect the pictures, train, write the package, print what it makes of the default task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--emoji", type=Path, nargs="*", default=[], help="unpacked emoji-datasource-* packages")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder of the pictures and of the store")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("vq_clipart"), help="folder of the package")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of val pictures there")
    parser.add_argument("--measure", action="store_true", help="only measure (and draw) the packaged weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = "packaged/vq_clipart"
    if not args.measure:
        pictures = args.work / "vq_clipart.parquet"
        if not pictures.is_file():
            collect(args.openclipart, args.emoji, pictures)
        overrides = [*SETTINGS, *args.set]
        facts = prime(args.work, f"parquet:{pictures}", "vq", SIDE, args.steps, args.out, overrides, _print)
        print(facts)
        model = f"local:{args.out}"
    measure(model)
    if args.sheet:
        contact_sheet(model, args.sheet)


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
