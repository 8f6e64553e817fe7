"""Searches over ways to transfer a vision foundation model into a small student, on a Ray cluster."""

from orchestrator.api import Sweep, compare

__all__ = ["Sweep", "compare"]
__version__ = "0.1.0"
