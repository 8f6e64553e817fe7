"""A small real-shaped task that every test of the orchestrator can use: images on disk, networks from timm."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.process import SELDOM

COLOURS = {"red": (200, 60, 50), "green": (60, 180, 70), "blue": (60, 80, 200)}
PER_CLASS = 24


def pytest_collection_finish() -> None:
    """Looks for garbage seldom, and not at what is imported by now: the looking is a fifth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*SELDOM)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: three colours with noise and a random square, 24 images each, 40 x 36 pixels."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(PER_CLASS):
            pixels = rng.normal(0, 50, (36, 40, 3)) + np.array(colour)
            top, left = rng.integers(0, 20, 2)
            pixels[top : top + 12, left : left + 12] = rng.integers(0, 255, 3)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root
