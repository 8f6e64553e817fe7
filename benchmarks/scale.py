"""The cost model against real runs of growing size, and what it says for 40 million and a billion images.

    python -m benchmarks.scale            # writes benchmarks/results/scale.json and docs/scale.md
    python -m benchmarks.scale --reckon   # no run: the estimates, and what takes a minute

A run: a tiny dual encoder embeds a corpus of images and one of sentences, and DIME-FM trains a tiny student for one
pass. Bytes are compared as they are. The machine's FLOP/s are taken from the smallest run, to predict the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.corpora import image_corpus, sentence_corpus
from benchmarks.record import RESULTS, ROOT, write_result
from benchmarks.streaming import planning
from orchestrator.data.task import listing_of
from orchestrator.errors import listed
from orchestrator.spec import SweepSpec, Task, parse_spec, read_spec
from orchestrator.store import Store, key_of
from orchestrator.sweep.costs import BACKWARD, Costs, costs_of, loss_flops
from orchestrator.sweep.run import prepare
from orchestrator.train.job import TrainJob
from orchestrator.train.work import run_job
from orchestrator.trial.context import SweepContext
from orchestrator.trial.plan import TrialConfig
from orchestrator.trial.run import run_trial

PAGE = ROOT / "docs" / "scale.md"
SCALE = ROOT / "search_spaces" / "dime_fm_scale.yaml"
SIZES = (2_000, 6_000, 18_000)
LISTED = (2_000, 20_000, 200_000)
TINY = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 48, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"size": 48, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"},
}
KNOBS = {"texts": "sentences", "text_rule": "all", "mass": 0}


def tiny_teacher(folder: Path) -> Path:
    """An untrained dual encoder as open_clip reads it from a folder."""
    import open_clip

    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(TINY))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def one_run(folder: Path, teacher: Path, images: int) -> dict[str, Any]:
    """What a run of that size took, and what was reckoned for it (with the default rates, which count for bytes)."""
    folder.mkdir()
    pictures = image_corpus(folder / "images", images, 64)
    lines = sentence_corpus(folder / "sentences", images * 7 // 10)
    spec = parse_spec(
        {
            "name": "run",
            "task": {"data": "packaged/clipart", "shots": 20},
            "teachers": [f"local:{teacher}"],
            "students": [{"model": "timm/test_convnext", "image_size": 48}],
            "methods": {"dime_fm": KNOBS},
            "search": {"trials": 1},
            "train": {"steps": max(1, images // 64), "batch": 64, "checkpoint_s": 1e-9, "device": "cpu"},
            "corpus": {"images": str(pictures), "sentences": str(lines), "window": 1024},
            "estimate": {"nodes": 1, "gpus": 1, "decode": 1e9, "read_gb_s": 1e6},
            "storage": str(folder / "runs"),
        }
    )
    checkpoint = [0]

    def measured(job: TrainJob, folder: Path, report: Any) -> dict[str, Any]:
        file = Path(job.scratch) / "checkpoint.pt"

        def look(state: Any) -> None:
            checkpoint[0] = max(checkpoint[0], file.stat().st_size if file.is_file() else 0)

        return run_job(job, folder, look)

    prepared = prepare(spec)
    reckoned = costs_of(spec, prepared.task, prepared.cells, prepared.spaces)
    assert reckoned is not None
    config = TrialConfig("t0000", 0, prepared.cells[0], KNOBS, 0)
    row = run_trial(SweepContext(spec, f"{spec.storage}/run"), config, runner=measured)
    if row["status"] != "complete":
        raise SystemExit(row["reason"])
    entries = [e for e in Store(Path(spec.storage) / "store").entries() if "rows" in e.meta["about"]]
    bytes_of = {s: sum(e.bytes for e in entries if e.stage == s) for s in ("corpus_outputs", "text_embeddings")}
    _, (training,), costs = reckoned
    assert isinstance(costs, Costs)
    stored = sum(p.stat().st_size for f in (pictures, lines) for p in f.glob("*.parquet"))
    work = images * training.image_flops + images * 7 // 10 * training.text_flops
    pairs = loss_flops(64, training.text_batch, training.width) / 64
    return {
        "images": images,
        "sentences": images * 7 // 10,
        "bytes": {
            "corpus": [costs.corpus_bytes, stored],
            "image embeddings": [costs.image_embedding_bytes, bytes_of["corpus_outputs"]],
            "text embeddings": [costs.text_embedding_bytes, bytes_of["text_embeddings"]],
            "checkpoint": [costs.checkpoint_bytes, checkpoint[0]],
        },
        "embed_flops": work,
        "train_flops": training.steps * 64 * (BACKWARD * training.student_flops + pairs),
        "embed_s": sum(e.meta["about"]["seconds"] for e in entries),
        "train_s": row["loop_seconds"],
    }


def scaled(**overrides: Any) -> tuple[SweepSpec, Costs, dict[str, Any]]:
    """The estimate of the paper-scale file with some keys changed."""
    with tempfile.TemporaryDirectory() as folder:
        spec = read_spec(SCALE, [f"storage={folder}", *(f"{k}={v}" for k, v in overrides.items())])
        prepared = prepare(spec, dry=True)
        reckoned = costs_of(spec, prepared.task, prepared.cells, prepared.spaces)
    assert reckoned is not None
    holdings, (training,), costs = reckoned
    assert isinstance(costs, Costs)
    facts: dict[str, float] = {
        "images": holdings.images,
        "shards": len(holdings.image_shards) + len(holdings.sentence_shards),
    }
    rate = spec.estimate
    compute = rate.tflops * 1e12 * rate.utilisation
    pairs = loss_flops(spec.train.batch, training.text_batch, training.width) * spec.train.workers / spec.train.batch
    facts["compute_images_s"] = compute / (BACKWARD * training.student_flops + pairs)
    return spec, costs, facts


CASES: dict[str, dict[str, Any]] = {
    "40 M images, 28.4 M sentences": {},
    "the same, decoding 450 images/s a core": {"estimate.decode": 450},
    "1 B images, 28.4 M sentences": {"corpus.expect": "{images: 1000000000, sentences: 28400000}"},
    "1 B images, 16 nodes, batch 640 each": {
        "corpus.expect": "{images: 1000000000, sentences: 28400000}",
        "train.workers": 128,
        "train.batch": 81920,
        "train.steps": 48828,
        "corpus.actors": 128,
        "estimate.nodes": 16,
    },
}


def applied() -> dict[str, Any]:
    """Every case's facts."""
    found = {}
    for name, overrides in CASES.items():
        _, costs, facts = scaled(**overrides)
        found[name] = costs.facts() | facts
    return found


def store_lookups(count: int = 2000) -> float:
    """Seconds of one look-up of a published entry, on this machine's disk."""

    def write(folder: Path) -> None:
        (folder / "records.arrow").write_bytes(b"0")

    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        for number in range(count):
            store.compute("x", key_of(number), write)
        began = time.perf_counter()
        for number in range(count):
            store.get("x", key_of(number))
        return (time.perf_counter() - began) / count


def listings() -> dict[str, float]:
    """Seconds that a trial takes to list a folder of so many images: the median of five."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        written = 0
        for count in LISTED:
            for number in range(written, count):
                image = Path(name) / f"class{number % 100:02}" / f"{number:06}.jpg"
                image.parent.mkdir(exist_ok=True)
                image.write_bytes(b"0")  # it is not opened
            written = count
            rounds = []
            for _ in range(5):
                began = time.perf_counter()
                listing_of(Task(data=f"folder:{name}"))
                rounds.append(time.perf_counter() - began)
            found[str(count)] = statistics.median(rounds)
    return found


def main() -> None:
    """Runs, reckons, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reckon", action="store_true", help="no runs: estimates, and what takes a minute")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = RESULTS / "scale.json"
    known = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    if not options.reckon:
        with tempfile.TemporaryDirectory() as name:
            teacher = tiny_teacher(Path(name) / "teacher")
            known["runs"] = [one_run(Path(name) / str(images), teacher, images) for images in SIZES]
        known["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread of torch"
    known["lookup_s"] = store_lookups()
    known["listing_s"] = listings()
    known["plan_of_a_billion"] = planning(10**9, 10**9)
    known["estimates"] = applied()
    write_result(target, known)
    text = PAGE.read_text(encoding="utf-8")
    for mark, table in (("runs", runs_table(known)), ("estimates", estimates_table(known)), ("limits", limits(known))):
        block = f"<!-- {mark} -->\n{table}\n<!-- end -->"
        text = re.sub(rf"<!-- {mark} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.S)  # type: ignore[misc]
    PAGE.write_text(text, encoding="utf-8")
    print("\n\n".join((runs_table(known), estimates_table(known), limits(known))))


def runs_table(known: dict[str, Any]) -> str:
    """Predicted against measured."""
    runs = known.get("runs", [])
    if not runs:
        return "Not run yet."
    first = runs[0]
    rates = {what: first[f"{what}_flops"] / first[f"{what}_s"] for what in ("embed", "train")}
    lines = [
        f"{known['machine']}; FLOP/s of the first run: embedding {rates['embed'] / 1e9:.2f} G, training "
        f"{rates['train'] / 1e9:.2f} G.",
        "",
        "| images + sentences | what | predicted | measured | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        title = f"{run['images']:,} + {run['sentences']:,}"
        for what, (mine, real) in run["bytes"].items():
            lines.append(f"| {title} | {what}, bytes | {mine:,} | {real:,} | {_error(mine, real)} |")
        for what, name in (("embed", "embedding"), ("train", "training")):
            mine, real = run[f"{what}_flops"] / rates[what], run[f"{what}_s"]
            error = "taken from it" if run is first else _error(mine, real)
            lines.append(f"| {title} | {name}, seconds | {mine:.1f} | {real:.1f} | {error} |")
    return "\n".join(lines)


def _error(mine: float, real: float) -> str:
    return "0" if mine == real else f"{100 * (mine - real) / real:+.1f} %"


def estimates_table(known: dict[str, Any]) -> str:
    """One column a case."""
    cases = known["estimates"]
    rows: list[tuple[str, Any]] = [
        ("files of the corpora", lambda c: f"{c['shards']:,}"),
        ("corpora, GB", lambda c: f"{c['corpus_bytes'] / 1e9:,.0f}"),
        ("embeddings of images, GB", lambda c: f"{c['image_embedding_bytes'] / 1e9:,.1f}"),
        ("embeddings of sentences, GB", lambda c: f"{c['text_embedding_bytes'] / 1e9:,.1f}"),
        ("checkpoint, GB", lambda c: f"{c['checkpoint_bytes'] / 1e9:,.2f}"),
        ("read in a pass, GB", lambda c: f"{c['read_bytes_per_epoch'] / 1e9:,.0f}"),
        ("stream's memory, GB a node", lambda c: f"{c['stream_bytes_per_node'] / 1e9:,.1f}"),
        ("of it in the object store, GB a node", lambda c: f"{c['object_store_bytes_per_node'] / 1e9:,.1f}"),
        ("matrices of the loss, GB a GPU", lambda c: f"{c['loss_bytes'] / 1e9:,.1f}"),
        ("embedding, device-hours", lambda c: f"{c['embed_device_seconds'] / 3600:,.1f}"),
        ("embedding, images/s a GPU", lambda c: f"{c['embed_images_s'][0]:,.0f} ({c['embed_images_s'][1]})"),
        ("training, device-hours", lambda c: f"{c['train_device_seconds'] / 3600:,.0f}"),
        ("training, images/s a GPU", lambda c: f"{c['train_images_s'][0]:,.0f} ({c['train_images_s'][1]})"),
        ("it would be, by compute alone", lambda c: f"{c['compute_images_s']:,.0f}"),
        ("embedding, hours", lambda c: f"{c['embed_hours']:,.2f}"),
        ("training, hours", lambda c: f"{c['trial_hours']:,.1f}"),
    ]
    lines = [f"| | {' | '.join(cases)} |", "| --- |" + " --- |" * len(cases)]
    return "\n".join(lines + [f"| {name} | {' | '.join(show(c) for c in cases.values())} |" for name, show in rows])


def limits(known: dict[str, Any]) -> str:
    """Measured unit costs of what grows with the number of shards."""
    plan, lookup, listing = known["plan_of_a_billion"], known["lookup_s"], known["listing_s"]
    shards = known["estimates"]["1 B images, 28.4 M sentences"]["shards"]
    return (
        f"Measured here: a look-up of a store's entry takes {lookup * 1e6:.0f} µs on a local disk, so {shards:,} of "
        f"them {lookup * shards:.0f} s; the plan of a billion images and the order of a billion sentences take "
        f"{plan['bytes'] / 1e6:.0f} MB and {plan['seconds']:.1f} s in each worker. Each trial lists the images of "
        f"`task.data: folder:` once: {listed(f'{int(n):,}' for n in listing)} of them in "
        f"{listed(f'{s:.2f}' for s in listing.values())} s."
    )


if __name__ == "__main__":
    main()
