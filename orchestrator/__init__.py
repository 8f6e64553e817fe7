"""Searches over ways to transfer a vision foundation model into a small student, on a Ray cluster."""

__version__ = "0.1.0"
