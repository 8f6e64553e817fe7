"""Train the packaged ViT teacher on two CPU cores, without one label of the default task.

The ViT regresses the pooled feature of EfficientNet-Lite0, so it learns from pictures alone: clip art outside
the default task's val and test stems, emoji and icons. ``MODEL_CARD.md`` beside this file has the command and
the numbers. The stem is frozen, so its maps are computed once for each stored view and only the blocks train.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from orchestrator.packaged.models import VIT_WEIGHTS, efficientnet_lite0, vit_clipart
from orchestrator.packaged.vit_clipart.measure import measure, with_stem
from orchestrator.packaged.vit_clipart.pictures import clipart_pictures, emoji_pictures, icon_pictures, store_views


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
