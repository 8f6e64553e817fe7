"""What is read from the store or a model file is data: nothing unpickles, evaluates, or imports what it names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import timm
import torch

from orchestrator.errors import UserError
from orchestrator.models.load import structure_of

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
    ("cloudpickle", "loads"),
    ("joblib", "load"),
    ("dill", "loads"),
    ("marshal", "loads"),
    ("os", "system"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
}
# What a process of this very sweep pickled, on its way through Ray: a request, a trial's job.
KNOWN = {("orchestrator/data/actors.py", "pickle.loads"), ("orchestrator/train/group.py", "pickle.loads")}


def calls() -> list[tuple[str, ast.Call, str, str]]:
    """(file, call, what it is an attribute of, name) of every call in our sources."""
    found = []
    for folder in ("orchestrator", "methods"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    file = path.relative_to(ROOT).as_posix()
                    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                        found.append((file, node, node.func.value.id, node.func.attr))
                    elif isinstance(node.func, ast.Name):
                        found.append((file, node, "", node.func.id))
    return found


def keyword(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def test_no_source_unpickles_or_evaluates_what_it_reads() -> None:
    seen = calls()
    assert len(seen) > 1000
    for file, call, of, name in seen:
        where = f"{file}:{call.lineno}"
        if (of, name) in FORBIDDEN:
            assert (file, f"{of}.{name}") in KNOWN, where
        if (of, name) == ("torch", "load"):
            assert keyword(call, "weights_only") is True, where
        assert keyword(call, "allow_pickle") is not True, where
        assert keyword(call, "trust_remote_code") is not True, where
        assert keyword(call, "shell") is not True, where
        assert not (of == "" and name in ("eval", "exec")), where


@pytest.mark.parametrize(
    "build",
    ["os:system", "subprocess:Popen", "builtins:exec", "methods.parts.dense:torch", "methods.parts.dense:_x", "x"],
)
def test_a_student_that_names_other_code_is_refused(build: str) -> None:
    with pytest.raises(UserError, match=r"structure\.build"):
        structure_of({"structure": {"build": build, "arguments": {}}})


def test_a_student_that_names_a_part_of_a_method_is_taken() -> None:
    meta = {"structure": {"build": "methods.parts.zero_shot:attach", "arguments": {"width": 4, "classes": 2}}}
    structure = structure_of(meta)
    assert structure is not None
    network = structure.apply(timm.create_model("test_vit", num_classes=0))
    assert network(torch.zeros(1, 3, 160, 160)).shape == (1, 2)
