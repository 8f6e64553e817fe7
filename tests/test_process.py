"""A program's own process: its end is quick, and what it leaves is what it would have left."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def test_a_reader_that_has_gone_is_no_failure() -> None:
    command = f"{sys.executable} -m orchestrator check --keys | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("key")
    assert (done.returncode, done.stderr) == (0, "")
