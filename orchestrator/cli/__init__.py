"""The command line: commands, no logic. Exit code 0 done, 1 the work failed, 2 the user's input is wrong, 130 a Ctrl-C
that the command does not handle itself.

A file of this package is a group of commands, and is found by itself; importing one imports nothing slow.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import pkgutil
import sys

from orchestrator.cli.face import app, err
from orchestrator.errors import UserError, WorkError, disk_full

INTERRUPTED = 130  # what typer makes of a Ctrl-C that no command has taken

for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
    importlib.import_module(f"{__name__}.{_module.name}")


def main() -> None:
    """Runs the command line; every failure is one sentence on stderr and an exit code."""
    # Ray tells of its usage and warns of settings that this program chose on purpose.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Torch warns of a CUDA toolkit without a GPU; on a CPU machine that is no news.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # A file's name need not be text, nor fit the terminal: such a character is shown by its escape, as on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except UserError as error:
        err.print(f"Error: {error}", markup=False)
        sys.exit(2)
    except WorkError as error:
        err.print(f"Failed: {error}", markup=False)
        sys.exit(1)
    except OSError as error:
        if not disk_full(error):
            raise
        err.print(f"Failed: the disk is full ({error}).", markup=False)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            err.print("Stopped by Ctrl-C.")
        raise
