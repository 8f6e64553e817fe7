"""A program's own process: its end is quick, and what it leaves is what it would have left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main

BEGUN = """
import atexit, logging, os, sys, threading, time
from orchestrator.process import run

def main():
    atexit.register(lambda: print("handler"))
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))
    print("main")
    {end}

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
held.itself = held
run(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("return", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit(257)", 1, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("raise ValueError('broken')", 1, "ValueError: broken\n"),
    ],
)
def test_a_program_ends_as_ever_but_for_what_is_taken_apart(end: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGUN.format(end=end)], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.splitlines() == ["main", "thread", "handler"]
    assert done.stderr.endswith(said)
    assert bool(said) == bool(done.stderr)


def test_the_command_line_is_such_a_program() -> None:
    """It says so where nobody sees the difference: the collector is seldom asked while torch is imported."""
    code = """
import gc, runpy, sys
from orchestrator.process import SELDOM
sys.argv = ["orchestrator", "check", "nowhere.yaml"]
try:
    runpy.run_module("orchestrator", run_name="__main__")
except SystemExit as stop:
    print(stop.code, gc.get_threshold() == SELDOM)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "True"]
    assert done.returncode == 2


def test_what_cannot_be_written_at_the_end_is_a_failure_unless_the_reader_has_gone() -> None:
    """Little enough is printed that all of it waits for the end."""
    code = f"{sys.executable} -c 'from orchestrator.process import run; run(lambda: print(7))'"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ends = {
        f"{code} > /dev/full": (1, "Failed: the output cannot be written (No space left on device).\n"),
        f"exec > >(exec true); sleep 0.5; {code}": (0, ""),
        f"{code} >&-": (0, ""),
    }
    for command, expected in ends.items():
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=buffered)
        assert (done.returncode, done.stderr) == expected, command


def test_ctrl_c_that_no_command_takes_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.cli.sweeps.read_sweep_file", interrupted)
    monkeypatch.setattr(sys, "argv", ["orchestrator", "check", "sweep.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\n"


PLANS = """
import sys
from pathlib import Path
sys.argv = ["orchestrator", "check", "{spec}", "--set", "storage={storage}"]
from orchestrator.cli import main
try:
    main()
except SystemExit:
    pass
loaded = {{name for name in ("pandas", "optuna", "sqlalchemy", "ray") if name in sys.modules}}
idle = "torch._dynamo" not in sys.modules
import torch
seen = torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
print(sorted(loaded), idle, "torch._dynamo" in sys.modules, tuple(seen.shape))
"""


def test_check_imports_neither_what_trains_nor_torch_s_compiler_which_is_still_there_for_others(
    tmp_path: Path,
) -> None:
    """Each of them takes a tenth to a quarter of what `check` does. The first look at a data set may need more."""
    spec = Path(__file__).parent.parent / "search_spaces" / "quickstart.yaml"
    code = PLANS.format(spec=spec, storage=tmp_path)
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[] True True (1, 2)", done.stderr


SEEKS = """
import sys
from orchestrator.imports import without_compiler
with without_compiler():
    import timm
    assert "torch._dynamo.eval_frame" not in sys.modules
    from transformers import RobertaModel
    import torch
    import torch._dynamo.eval_frame as sought
assert torch._dynamo.eval_frame is sought and sought.__spec__.origin == sought.__file__
assert not [one for one in sys.meta_path if type(one).__module__ == "orchestrator.imports"]
print(tuple(torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2)).shape))
"""


def test_what_imports_a_module_of_the_compiler_while_a_command_plans_gets_it() -> None:
    """transformers' text towers do, which open_clip builds."""
    done = subprocess.run([sys.executable, "-c", SEEKS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "(1, 2)\n"), done.stderr
