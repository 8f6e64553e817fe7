"""What every benchmark does with its result: where it was measured, the JSON, and its block in a page of docs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TOKEN = "BENCHMARK_RUN"
PAGE = ROOT / "docs" / "performance.md"


def machine(processes: int, threads: int = 1) -> str:
    """Such as `x86_64, 2 cores, 2 processes of 1 thread`."""
    many = f"{processes} process{'es' if processes > 1 else ''} of {threads} thread{'s' if threads > 1 else ''}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {many}"


def versions(*packages: str) -> str:
    """Of Python and of the packages that a figure depends on."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def command_of(name: str, parser: argparse.ArgumentParser, options: argparse.Namespace, but: Sequence[str] = ()) -> str:
    """What runs `python -m benchmarks.NAME` again: every option with a value that is not its default, but these."""
    given = {key: value for key, value in vars(options).items() if key not in but}
    changed = [(key, value) for key, value in given.items() if value != parser.get_default(key)]
    shown = [(key, [] if v is True else v if isinstance(v, list) else [v]) for key, v in changed]  # a flag has no value
    words = [" ".join([f"--{key.replace('_', '-')}", *map(str, values)]) for key, values in shown]
    return " ".join([f"python -m benchmarks.{name}", *words])


def quiet_environment() -> dict[str, str]:
    """For a process that is timed: one thread a process, and no cluster but its own."""
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`1.05 (1.01 to 1.10)`: the median and the range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def begun(path: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    """What a run that was stopped has written to a file, if it measured the same."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["spec"] == json.loads(json.dumps(spec)) else None


def measured_alike(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """A result that was measured with the same of `about` (setting, machine, versions), so that more may join it."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if all(found.get(key) == value for key, value in about.items()) else None


def timm_name(text: str) -> str:
    """A network of timm as timm calls it; sweep files put `timm/` before it."""
    return text.removeprefix("timm/")


def own_sweep(path: Path) -> dict[str, Any]:
    """What a user's sweep file says, read as `sweep` reads it, with absolute paths."""
    from orchestrator.errors import UserError
    from orchestrator.spec import read_spec
    from orchestrator.sweep.folder import resolved

    try:
        given = read_spec(path, [])
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None
    whole, said = resolved(given).model_dump(mode="json"), given.model_dump(mode="json", exclude_unset=True)
    return {key: whole[key] for key in said}


def on_cpu(raw: dict[str, Any]) -> dict[str, Any]:
    """The sweep file, if it does not ask for a GPU: what trains in the benchmark's own process is on the CPU."""
    if raw.get("train", {}).get("device") == "cuda":
        raise SystemExit("Error: train.device: cuda; this benchmark trains on the CPU: allowed are auto and cpu.")
    return raw


def checked(raw: dict[str, Any]) -> Any:
    """What `orchestrator check` makes of a sweep: its task, cells and spaces."""
    from orchestrator.errors import UserError
    from orchestrator.spec import parse_spec
    from orchestrator.sweep.folder import resolved
    from orchestrator.sweep.run import prepare

    try:
        return prepare(resolved(parse_spec(raw)))
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None


def network_of(name: str, size: int, classes: int) -> Any:
    """A network of timm with new weights, made for images of that size, as the product makes it; for training."""
    from orchestrator.errors import UserError
    from orchestrator.models.load import build_network
    from orchestrator.spec import Model

    try:
        entry = Model(model=f"timm/{name}", image_size=size, pretrained=False)
        return build_network(entry, num_classes=classes).train()
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None


def write_result(path: Path, result: Any) -> None:
    """A result, or as much of it as there is, as JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def publish(mark: str, result: dict[str, Any], text: str, page: Path = PAGE) -> None:
    """Writes `results/MARK.json`, and `text` between `<!-- MARK -->` and `<!-- end -->` of the page."""
    write_result(RESULTS / f"{mark}.json", result)
    old = page.read_text(encoding="utf-8")
    new, found = re.subn(
        rf"<!-- {mark} -->.*?<!-- end -->", lambda _: f"<!-- {mark} -->\n{text}\n<!-- end -->", old, flags=re.S
    )
    if found != 1:
        raise SystemExit(f"{page.name} has {found} blocks {mark!r}; one is needed.")
    page.write_text(new, encoding="utf-8")


def watched(command: Sequence[str], every_s: float = 0.5) -> tuple[str, float, float]:
    """Runs a command to its end: (its output, wall seconds, CPU seconds of it and of all that it started).

    Everything that it starts inherits a variable by which it is found again, Ray's own processes too. A process that
    names itself writes over its environment, so children of what is counted are counted as well; what a process used
    after its last sample is not. CPU seconds tell what a comparison costs where other work shares the machine.
    """
    token = f"{os.getpid()}-{time.monotonic_ns()}"
    began = time.time()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env=quiet_environment() | {TOKEN: token})
        mark = f"{TOKEN}={token}".encode()
        used: dict[tuple[int, str], float] = {}
        ours: dict[tuple[int, str], bool] = {}
        while process.poll() is None:
            parents: dict[tuple[int, str], int] = {}
            ticks: dict[tuple[int, str], int] = {}
            for folder in Path("/proc").iterdir():
                if not folder.name.isdigit():
                    continue
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                    key = (int(folder.name), fields[19])  # a number is given again; with the start it is not
                    if not ours.get(key):  # between its fork and its exec it may not have been told yet
                        ours[key] = mark in (folder / "environ").read_bytes()
                    parents[key], ticks[key] = int(fields[1]), int(fields[11]) + int(fields[12])
            counted = {key[0] for key in ticks if ours[key]}
            while children := [key for key in ticks if not ours[key] and parents[key] in counted]:
                ours |= dict.fromkeys(children, True)
                counted |= {key[0] for key in children}
            used |= {key: ticks[key] / os.sysconf("SC_CLK_TCK") for key in ticks if ours[key]}
            time.sleep(every_s)
        wall = time.time() - began
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
    return text, wall, sum(used.values())
