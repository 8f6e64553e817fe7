"""`python -m orchestrator`, and the command `orchestrator`."""

from orchestrator.cli import main
from orchestrator.process import run


def start() -> None:
    """The command line as a program of its own."""
    run(main)


if __name__ == "__main__":
    start()
