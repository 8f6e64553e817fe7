"""The stream of a corpus: images a second against a bare reader, peak memory by corpus size, time to the first batch.

    python -m benchmarks.streaming            # writes benchmarks/results/streaming.json and docs/performance.md
    python -m benchmarks.streaming --quick    # under a minute, nothing written
    python -m benchmarks.streaming --corpus FOLDER --size 224    # your own corpus (`corpus build`); written nowhere

The bare reader has the same threads, row groups in file order, the same decoder, crops and resize, and neither order
nor window nor position. Rates are taken from the first batch on, for every reader, so start-up is not in them: that is
the time to the first batch. Memory is that of a fresh process for each size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from benchmarks.corpora import beginning, image_corpus
from benchmarks.record import RESULTS, publish
from orchestrator.data.corpus import corpus_at
from orchestrator.data.corpus.corpus import Shard
from orchestrator.data.images import decode
from orchestrator.data.memory import StreamMemory, stream_memory
from orchestrator.data.stream import Plan, Stream, blocks_of, decoding_threads, read_on_ray, read_on_threads
from orchestrator.data.views import Policy, draw, render
from orchestrator.models.load import Preprocessing
from orchestrator.store import JoinedRecords, OpenFiles, write_records
from orchestrator.train.feed import Order, StreamFeeder, TextFeed

MARK = "streaming"
BATCH = 64
POLICY = Policy(0.35, 0.0)
Batches = Iterator[np.ndarray]


def preprocessing(size: int) -> Preprocessing:
    return Preprocessing(size, (0.5,) * 3, (0.25,) * 3, "bilinear")


def bare(corpus: Path, size: int, threads: int) -> Batches:
    """uint8 [64, 3, S, S]: pyarrow, PIL and a resize of a random crop."""

    def read(path: Path, group: int) -> np.ndarray:
        rows = pq.ParquetFile(path).read_row_group(group, columns=["image", "height", "width"])
        pixels = np.empty((len(rows), 3, size, size), dtype=np.uint8)
        for i, (data, *shape) in enumerate(zip(*rows.columns, strict=True)):
            some = views[tuple(side.as_py() for side in shape)]
            pixels[i] = render(decode(data.as_py()), some[i % len(some)], size, "bilinear").numpy()
        return pixels

    files = sorted(corpus.glob("*.parquet"))
    sizes = {tuple(size.values()) for f in files for size in pq.read_table(f, columns=["height", "width"]).to_pylist()}
    # Of the same distribution as the stream's, drawn beforehand: some of each size of image.
    views = {size: [draw(POLICY, str(i), size, 1) for i in range(max(1, 64 // len(sizes)))] for size in sizes}

    groups = [(f, g) for f in files for g in range(pq.read_metadata(f).num_row_groups)]
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Any] = deque()
        rest = np.empty((0, 3, size, size), dtype=np.uint8)
        for file, group in itertools.cycle(groups):
            waiting.append(pool.submit(read, file, group))
            if len(waiting) > 4 * threads:
                block = waiting.popleft().result()
                block = np.concatenate([rest, block]) if len(rest) else block
                whole = len(block) // BATCH * BATCH
                yield from (block[i : i + BATCH] for i in range(0, whole, BATCH))
                rest = block[whole:]


def reserve(corpus: Path, size: int, window: int, readers: int) -> StreamMemory:
    """What the stream may take, as a trial reckons it."""
    return stream_memory(window, int(corpus_at(str(corpus)).manifest["row_group"]), size, BATCH, readers, 2e9)


def stream(corpus: Path, size: int, window: int, reader: str, threads: int) -> Stream:
    """As a trial makes it."""
    shards = corpus_at(str(corpus)).shards
    memory = reserve(corpus, size, window, threads)
    made = (
        read_on_ray(threads, memory.ahead, memory.block) if reader == "ray" else read_on_threads(threads, memory.ahead)
    )
    return Stream(Plan(blocks_of(shards), 0, 0, 1, window), shards, POLICY, preprocessing(size), made)


def trivial(batch: np.ndarray) -> None:
    """A consumer that costs nothing."""
    assert batch.shape[0] == BATCH


def training_step(size: int) -> Callable[[np.ndarray], None]:
    """A real step of a small student towards targets: forward, backward, AdamW; on a GPU, if there is one."""
    import timm

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student: nn.Module = timm.create_model("test_convnext", num_classes=64).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    targets = torch.randn(BATCH, 64).to(device)

    def step(batch: np.ndarray) -> None:
        loss = (student(torch.from_numpy(batch).to(device).float() / 255) - targets).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ahead(batches: Batches) -> Generator[np.ndarray, None, None]:
    """The next batch is read while the last one is used, as in the training loop."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches)
        while True:
            batch = waiting.result()
            waiting = pool.submit(next, batches)
            yield batch


def rate(batches: Batches, images: int, consume: Callable[[np.ndarray], None]) -> dict[str, float]:
    """`first_s` to the first batch, `images_s` from it on."""
    began = time.perf_counter()
    reading = ahead(batches)
    consume(next(reading))
    first = time.perf_counter()
    for batch in itertools.islice(reading, images // BATCH):
        consume(batch)
    seconds = time.perf_counter() - first
    reading.close()
    return {"first_s": first - began, "images_s": images // BATCH * BATCH / seconds}


def throughput(
    corpus: Path, size: int, images: int, rounds: int, window: int, readers: list[str], consumers: tuple[str, ...]
) -> dict[str, Any]:
    """Every reader under every consumer, by turns."""
    threads = decoding_threads()
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        for consumer in consumers:
            for reader in readers[number % len(readers) :] + readers[: number % len(readers)]:
                consume = trivial if consumer == "trivial" else training_step(size)
                if reader == "bare":
                    source: Any = bare(corpus, size, threads)
                    batches: Batches = source
                else:
                    source = stream(corpus, size, window, reader, threads).batches(0, BATCH)
                    batches = (pixels for pixels, _ in source)
                found.setdefault(f"{consumer} {reader}", []).append(rate(batches, images, consume))
                source.close()
                settle()
    result: dict[str, Any] = {"images": images, "size": size, "window": window, "threads": threads}
    for name, runs in found.items():
        rates = sorted(r["images_s"] for r in runs)
        base = found[f"{name.split()[0]} bare"]
        ratios = [mine["images_s"] / theirs["images_s"] for mine, theirs in zip(runs, base, strict=True)]
        result[name] = {
            "images_s": statistics.median(rates),
            "spread": [rates[0], rates[-1]],
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "first_s": statistics.median(r["first_s"] for r in runs),
        }
    return result


def settle() -> None:
    """Waits for the tasks of a stream that was left in the middle, so that they disturb nothing that comes after."""
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(60)
    time.sleep(1)


def end_ray() -> None:
    """Ends the cluster of this process."""
    import ray

    settle()
    ray.shutdown()


class Peak:
    """The largest resident memory of this process while it is open, and of Ray's object store if there is one."""

    def __init__(self, ray: bool) -> None:
        self.ray, self.anonymous, self.files, self.store = ray, 0, 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        store = _object_store if self.ray else lambda: 0
        while not self._done.wait(0.05):
            status = dict(re.findall(r"(Rss\w+):\s+(\d+)", Path("/proc/self/status").read_text()))
            self.anonymous = max(self.anonymous, int(status["RssAnon"]) * 1024)
            self.files = max(self.files, int(status["RssFile"]) * 1024)
            self.store = max(self.store, store())

    def close(self) -> dict[str, int]:
        self._done.set()
        self._thread.join()
        return {"process": self.anonymous, "mapped_files": self.files, "object_store": self.store}


def _object_store() -> int:
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def memory_child(corpus: Path, reader: str, window: int) -> dict[str, Any]:
    """Streams an epoch with teacher outputs and texts beside it; the consumer rests at times."""
    torch.set_num_threads(1)
    if reader == "ray":
        from orchestrator.sweep.cluster import start_ray

        start_ray(1)
    shards = corpus_at(str(corpus)).shards
    files = []
    for number, shard in enumerate(shards):
        files.append(corpus / f"part-{number:05}.arrow")
        write_records(files[-1], shard.rows, [torch.zeros(shard.rows, 64)], "float16")
    idle = _anonymous()
    peak = Peak(reader == "ray")
    own = stream(corpus, 64, window, reader, 2)
    tables = {"embedding": JoinedRecords(OpenFiles(files), [s.rows for s in shards])}
    texts = TextFeed(tables["embedding"], None, BATCH, 0)
    feeder = StreamFeeder(own, preprocessing(64), tables, texts=texts, batch=BATCH)
    steps = sum(s.rows for s in shards) // BATCH
    for step in range(steps):
        feeder(step, "cpu")
        if step % max(1, steps // 3) == steps // 6:
            time.sleep(1)  # so that the readers get as far ahead as they may
    feeder.close()
    found = peak.close()
    if reader == "ray":
        end_ray()
    reckoned = reserve(corpus, 64, window, 2)
    own_blocks = reckoned.waiting if reader == "threads" else 0
    return {
        "rows": sum(s.rows for s in shards),
        "reckoned_process": reckoned.window + reckoned.batches + own_blocks,
        "reckoned_store": reckoned.waiting - own_blocks,
        "idle": idle,
        **found,
    }


def planning(images: int = 40 * 10**6, sentences: int = 284 * 10**5) -> dict[str, float]:
    """Seconds and bytes of the order of so many images and sentences, without a file; in a process of its own."""
    code = f"import json, benchmarks.streaming as b; print(json.dumps(b.plan_child({images}, {sentences})))"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def plan_child(images: int, sentences: int) -> dict[str, float]:
    before = _anonymous()
    began = time.perf_counter()
    shards = [Shard("/x", f"part-{i:05}.parquet", 4096, 0, "0" * 64, (256,) * 16) for i in range(images // 4096)]
    plan = Plan(blocks_of(shards), 0, 3, 32, 4096)
    for _ in itertools.islice(plan.windows(images // 64), 20):
        pass
    order = Order(sentences, 0, 20)
    for step in range(1000):
        order.take(step * 640, 640)
    seconds = time.perf_counter() - began
    return {"images": images, "sentences": sentences, "bytes": _anonymous() - before, "seconds": seconds}


def _anonymous() -> int:
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


def memory(base: Path, folder: Path, sizes: dict[str, int], reader: str, window: int) -> dict[str, Any]:
    """Peaks by corpus size, each in a process of its own that reads the whole corpus."""
    result = {}
    for name, shards in sizes.items():
        corpus = beginning(base, folder / f"{name}-{reader}", shards)
        command = [sys.executable, "-m", "benchmarks.streaming", "--memory", str(corpus), reader]
        command += [str(window)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        result[name] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measures, prints, and writes the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small, threads only, nothing written")
    parser.add_argument("--part", choices=["throughput", "memory"], help="measure this alone, keep the rest as written")
    parser.add_argument("--corpus", type=Path, help="of images, of yours: its throughput alone, written nowhere")
    parser.add_argument("--size", type=int, default=224, help="pixels of the student, with --corpus")
    parser.add_argument("--memory", nargs=3, metavar=("CORPUS", "READER", "WINDOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        corpus, reader, window = options.memory
        print(json.dumps(memory_child(Path(corpus), reader, int(window))))
        return
    torch.set_num_threads(1)
    quick = options.quick
    target = RESULTS / f"{MARK}.json"
    result = json.loads(target.read_text(encoding="utf-8")) if options.part and target.is_file() else {}
    result |= {
        "command": "python -m benchmarks.streaming",
        "rounds": 1 if quick else options.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if options.corpus:
        own_throughput(options.corpus, options.size, result["rounds"], ["threads"] if quick else ["threads", "ray"])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.part != "memory":
            result |= both_throughputs(folder, quick, result["rounds"])
        if options.part != "throughput":
            result["planning"] = planning()
            small = image_corpus(folder / "whole", 4096 if quick else 102_400, 64)
            sizes = {"1x": 1, "3x": 3} if quick else {"1x": 10, "3x": 30, "10x": 100}
            result["memory"] = {
                reader: memory(small, folder, sizes, reader, 512 if quick else 4096)
                for reader in (["threads"] if quick else ["threads", "ray"])
            }
            print(json.dumps(result["memory"], indent=1), flush=True)
    if quick:
        return
    publish(MARK, result, page(result))


def both_throughputs(folder: Path, quick: bool, rounds: int) -> dict[str, Any]:
    """At two sizes, first without a cluster on the machine, then with one; each reader beside the bare one."""
    corpora = {
        "64 px": image_corpus(folder / "64px", 4096 if quick else 10_240, 64),
        "256 px": image_corpus(folder / "256px", 512 if quick else 2048, 256),
    }
    found: dict[str, Any] = {name: {} for name in corpora}
    for reader in ["threads"] if quick else ["threads", "ray"]:
        if reader == "ray":
            from orchestrator.sweep.cluster import start_ray

            start_ray(1)
        for name, size, images, window, consumers in (
            ("64 px", 64, 2048 if quick else 10_240, 1024 if quick else 2048, ("trivial",)),
            ("64 px", 64, 2048 if quick else 4096, 1024 if quick else 2048, ("step",)),
            ("256 px", 224, 512 if quick else 6144, 512, ("trivial",)),
        ):
            made = throughput(corpora[name], size, images, rounds, window, [reader, "bare"], consumers)
            tell(name, made)
            for key, value in made.items():
                own = f"{key} beside {reader}" if key.endswith("bare") else key
                found[name][own] = value
    if not quick:
        end_ray()
    return found


def own_throughput(corpus: Path, size: int, rounds: int, readers: list[str]) -> None:
    """Prints the rates of a user's corpus, of at most 10,000 images a reader; the order window is the product's."""
    from orchestrator.errors import UserError
    from orchestrator.spec import Corpus

    try:
        rows = sum(shard.rows for shard in corpus_at(str(corpus), "images").shards)
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None
    if rows < 4 * BATCH:
        raise SystemExit(f"Error: {corpus} has {rows} images; {4 * BATCH} at least are needed.")
    images, window = min(10_240, rows), min(Corpus().window, rows)
    for reader in readers:
        if reader == "ray":
            from orchestrator.sweep.cluster import start_ray

            start_ray(1)
        for consumer in ("trivial", "step"):
            tell(f"{size} px", throughput(corpus, size, images, rounds, window, [reader, "bare"], (consumer,)))
    if "ray" in readers:
        end_ray()


def tell(name: str, found: dict[str, Any]) -> None:
    """Prints one table."""
    for key, value in found.items():
        if isinstance(value, dict):
            print(
                f"{name} {key}: {value['images_s']:.0f} images/s, {value['ratio']:.2f} of the bare reader, first batch "
                f"{value['first_s']:.2f} s",
                flush=True,
            )


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"`{result['command']}`: {result['rounds']} rounds by turns, median and range; {result['machine']}, "
        f"{result['64 px']['threads']} decoding threads or tasks.",
        "",
        "| images, consumer, reader | images/s | of the bare reader | to the first batch |",
        "| --- | --- | --- | --- |",
    ]
    for name in ("64 px", "256 px"):
        for key, value in result[name].items():
            if isinstance(value, dict):
                low, high = value["spread"]
                lines.append(
                    f"| {name}, {key} | {value['images_s']:.0f} ({low:.0f} to {high:.0f}) | {value['ratio']:.2f} "
                    f"({min(value['ratios']):.2f} to {max(value['ratios']):.2f}) | {value['first_s']:.2f} s |"
                )
    lines += ["", "| reader, images in the corpus | process, MB | object store, MB | mapped files, MB |"]
    lines.append("| --- | --- | --- | --- |")
    for reader, sizes in result["memory"].items():
        for one in sizes.values():
            lines.append(
                f"| {reader}, {one['rows']:,} | {one['process'] / 1e6:.0f} | {one['object_store'] / 1e6:.0f} | "
                f"{one['mapped_files'] / 1e6:.0f} |"
            )
    plan = result["planning"]
    lines += [
        "",
        f"The plan of {plan['images']:,} images and the order of {plan['sentences']:,} sentences take "
        f"{plan['bytes'] / 1e6:.0f} MB and {plan['seconds']:.1f} s a worker, 20 windows and 1000 steps included.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
