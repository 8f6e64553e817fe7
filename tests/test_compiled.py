"""`train.compile`: blocks are compiled while a stage trains, and are what they were afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

from orchestrator.train.compiled import CompileError, blocks_of, compiled

COUNTS = {"test_vit": 6, "test_resnet": 4, "test_convnext": 9, "test_efficientnet": 5, "test_nfnet": 4}


@pytest.mark.parametrize("name", COUNTS)
def test_every_block_of_a_network_is_found_once_and_none_lies_in_another(name: str) -> None:
    blocks = blocks_of(timm.create_model(name))
    assert len(blocks) == len(set(map(id, blocks))) == COUNTS[name]
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not inside & set(map(id, blocks))


def test_compiled_training_gives_the_plain_gradients_and_leaves_the_network_as_it_was() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", img_size=32, num_classes=3, depth=2)
    other = copy.deepcopy(network)
    images = torch.randn(4, 3, 32, 32)
    names = list(network.state_dict())
    with compiled(network, True):
        assert all(block._compiled_call_impl is not None for block in blocks_of(network))
        network(images).square().sum().backward()
        copy.deepcopy(network)(images)  # as the val metric's candidate is
    other(images).square().sum().backward()
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert list(network.state_dict()) == names
    assert all(block._compiled_call_impl is None for block in blocks_of(network))


def test_without_a_compiler_the_error_is_a_sentence_that_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    error = type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def fails(*_: Any, **__: Any) -> Any:
        raise error("No compiler found\nmore")

    network = timm.create_model("test_vit", img_size=32)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", fails))
    words = r"train\.compile: true, and torch\.compile has failed: No compiler found$"
    with pytest.raises(CompileError, match=words), compiled(network, True):
        network(torch.randn(1, 3, 32, 32))
