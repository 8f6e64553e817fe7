"""The sweep file and what it searches: whatever the schema accepts survives YAML, whatever is drawn is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from methods import discover
from methods.knobs import Choice, Range, default_space
from orchestrator.errors import UserError
from orchestrator.spec import (
    METRICS,
    Cluster,
    Corpus,
    Estimate,
    Expect,
    Generate,
    Latency,
    Limits,
    Model,
    NodeType,
    Search,
    Splits,
    Start,
    StoreLimits,
    SweepSpec,
    Task,
    Train,
    Upstream,
    documented_keys,
    parse_spec,
    read_mapping,
    read_spec,
)
from orchestrator.sweep.space import Dice, default_knobs, method_space, sample

FEW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{}"), max_size=8)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(lambda n: n != "store")
PLAIN = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1e9, 1e9) | TEXT
KNOBS = PLAIN | st.lists(PLAIN, max_size=3) | st.fixed_dictionaries({"low": st.floats(0, 1), "high": st.floats(1, 2)})
MODELS = st.sampled_from(["timm/", "open_clip/", "local:", "packaged/"]).flatmap(
    lambda p: TEXT.map(lambda t: p + t.replace("/", "_"))
)


def of_field(section: type[BaseModel], name: str) -> st.SearchStrategy[Any]:
    """Values that one field of plain type accepts, its bounds included."""
    field = section.model_fields[name]
    bounds = {k: v for m in field.metadata for k in ("ge", "gt", "le", "lt") if (v := getattr(m, k, None)) is not None}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    choices = []
    for kind in (field.annotation, *get_args(field.annotation)):
        if get_origin(kind) is Literal:
            choices.append(st.sampled_from(get_args(kind)))
        elif kind is type(None):
            choices.append(st.none())
        elif kind is bool:
            choices.append(st.booleans())
        elif kind is int:
            choices.append(st.integers(low, high if high is not None else 10**12))
        elif kind is float:
            floats = st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_nan=False)
            choices.append(floats)
    assert choices, f"{section.__name__}.{name} needs its own strategy"
    return st.one_of(choices)


def section_of(section: type[BaseModel], **own: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of a section's keys."""
    fields = {n: own[n] if n in own else of_field(section, n) for n in section.model_fields}
    required = {n: s for n, s in fields.items() if section.model_fields[n].is_required()}
    return st.fixed_dictionaries(required, optional={n: s for n, s in fields.items() if n not in required})


def fits(section: type[BaseModel], raw: dict[str, Any]) -> bool:
    """Rules between keys, which the strategies of single fields do not know."""
    try:
        section.model_validate(raw)
    except ValueError:
        return False
    return True


def one_budget(train: dict[str, Any]) -> dict[str, Any]:
    if train.get("steps") is not None:
        train.pop("epochs", None)
    workers = train.get("workers", 1)
    train["batch"] = train.get("batch", 64) * workers * train.get("accumulate", 1)
    gpus = train.get("gpus_per_worker", 1.0)
    if train.get("device") == "cuda" and (gpus > 1 or workers > 1):
        train["gpus_per_worker"] = max(1.0, float(int(gpus)))
    if train.get("min_workers") is not None:
        train["min_workers"] = min(train["min_workers"], workers) if train.get("sync_batchnorm", True) else workers
    if workers > 1 and train.get("sync_batchnorm", True):
        train.pop("compile", None)
    return train


def agreed(raw: dict[str, Any]) -> dict[str, Any]:
    """A rule between sections: workers that stream a corpus stay as many as they are."""
    if raw.get("corpus", {}).get("images") is not None:
        raw.get("train", {}).pop("min_workers", None)
    return raw


def one_kind(task: dict[str, Any]) -> dict[str, Any]:
    if task["data"].startswith("packaged/"):
        task.pop("kind", None)
    if task.get("kind") != "segmentation":
        task.pop("decoder", None)
        task.pop("ignore_index", None)
    return task


SPLITS = section_of(Splits).filter(lambda raw: fits(Splits, raw))
DATA = st.just("packaged/clipart") | st.tuples(st.sampled_from(["folder:", "parquet:"]), TEXT).map("".join)
ENTRIES = st.lists(
    MODELS | section_of(Model, model=MODELS, architecture=st.none() | TEXT, kwargs=st.dictionaries(TEXT, KNOBS)),
    max_size=3,
)
METRIC = st.sampled_from(sorted(METRICS))
OBJECTIVE = METRIC | st.fixed_dictionaries({"metric": METRIC}, optional={"mode": st.sampled_from([None, "max", "min"])})
STUDIES = st.sampled_from(["journal", "sqlite", "postgresql", "postgresql://me@host:5433/db"])
STARTS = st.lists(section_of(Start, method=NAMES, knobs=st.dictionaries(TEXT, PLAIN, max_size=2)), max_size=2)
PROFILE = section_of(Latency, profile=st.text(st.characters(exclude_categories=["Cs"]), max_size=8)).filter(
    lambda raw: fits(Latency, raw)
)
SPECS = section_of(
    SweepSpec,
    name=NAMES,
    task=section_of(
        Task,
        data=DATA,
        splits=SPLITS,
        names=st.dictionaries(TEXT, TEXT, max_size=2),
        templates=st.lists(WORDS.map(lambda w: w + "{}") | WORDS.map(lambda w: "{}" + w), min_size=1, max_size=3),
    ).map(one_kind),
    teachers=ENTRIES,
    students=ENTRIES,
    methods=st.dictionaries(NAMES, st.none() | st.dictionaries(TEXT, KNOBS, max_size=3), min_size=1, max_size=3),
    objectives=st.lists(OBJECTIVE, min_size=1, max_size=1),
    limits=section_of(Limits, latency=st.just({})),
    latency=PROFILE
    | st.lists(PROFILE, min_size=1, max_size=3).map(
        lambda raws: [raw | {"profile": f"p{at}"} for at, raw in enumerate(raws)]
    ),
    search=section_of(
        Search, budget=st.none(), study=STUDIES, study_file=st.none() | TEXT, warm_start=st.none() | TEXT, begin=STARTS
    ).filter(lambda raw: fits(Search, raw)),
    train=section_of(Train).map(one_budget),
    upstream=section_of(
        Upstream,
        vq=st.none() | MODELS,
        diffusion=st.none() | MODELS,
        pipeline=st.none() | TEXT | st.dictionaries(TEXT, PLAIN, max_size=2),
    ),
    generate=section_of(Generate),
    corpus=section_of(Corpus, images=st.none() | TEXT, sentences=st.none() | TEXT, expect=section_of(Expect)).filter(
        lambda c: fits(Corpus, c)
    ),
    estimate=section_of(Estimate),
    store=section_of(StoreLimits),
    cluster=section_of(
        Cluster,
        file=st.none() | TEXT,
        nodes=st.dictionaries(
            NAMES,
            section_of(NodeType, resources=st.dictionaries(TEXT, st.floats(0, 1e9), max_size=2)),
            max_size=2,
        ),
        prices=st.dictionaries(NAMES, st.floats(0, 1e3), max_size=2),
    ).filter(lambda raw: fits(Cluster, raw)),
    storage=TEXT,
).map(agreed)


@FEW
@given(raw=SPECS)
def test_every_accepted_spec_survives_yaml(tmp_path_factory, raw):
    spec = parse_spec(raw)
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(spec.to_yaml(), encoding="utf-8")
    again = read_spec(path)
    assert again == spec
    assert again.to_yaml() == spec.to_yaml()


@FEW
@given(raw=st.dictionaries(TEXT | st.sampled_from(sorted(SweepSpec.model_fields)), KNOBS, max_size=5))
def test_any_mapping_is_accepted_or_refused_in_one_line(raw):
    said = "."
    try:
        parse_spec(raw)
    except UserError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert said.endswith((".", "?", ")"))


def minimal(**more: Any) -> dict[str, Any]:
    return {"name": "s", "task": {"data": "packaged/clipart"}, "methods": {"linear_probe": {}}, **more}


@pytest.mark.parametrize("name", discover())
def test_every_default_is_a_valid_configuration_and_lies_in_the_default_space(name):
    method = discover()[name]
    space = method_space(parse_spec(minimal(methods={name: {}})), name)
    assert space == default_space(method.Config)
    defaults = method.Config()
    knobs = default_knobs(space, name)
    assert method.Config.model_validate(knobs) == defaults
    for knob, domain in space.items():
        inside = domain.values if isinstance(domain, Choice) else [min(max(knobs[knob], domain.low), domain.high)]
        assert knobs[knob] in inside, knob


@pytest.mark.parametrize("name", discover())
@FEW
@given(seed=st.integers(0, 2**32))
def test_every_sampled_configuration_is_valid_and_inside_its_space(name, seed):
    method = discover()[name]
    space = default_space(method.Config)
    knobs = sample(space, name, Dice(seed))
    assert knobs.keys() == space.keys()
    method.Config.model_validate(knobs)
    assert knobs == sample(space, name, Dice(seed))
    for knob, domain in space.items():
        if isinstance(domain, Range):
            assert domain.low <= knobs[knob] <= domain.high, knob
        else:
            assert knobs[knob] in domain.values, knob


def test_a_whole_number_knob_samples_whole_numbers_between_its_ends():
    spec = parse_spec(minimal(methods={"lora": {"rank": {"low": 1, "high": 4}, "lr": 0.01, "targets": ["mlp"]}}))
    space = method_space(spec, "lora")
    drawn = [sample(space, "lora", Dice(seed)) for seed in range(100)]
    assert {type(d["rank"]) for d in drawn} == {int}
    assert {d["rank"] for d in drawn} == {1, 2, 3, 4}
    assert all(d["lr"] == 0.01 and d["targets"] == "mlp" for d in drawn)


@pytest.mark.parametrize(
    ("block", "knob", "expected"),
    [
        ({"rank": {"low": 16, "high": 64}}, "rank", 16),  # the default is 8
        ({"rank": {"low": 1, "high": 4}}, "rank", 4),
        ({"rank": [2, 8, 4]}, "rank", 8),
        ({"rank": [2, 4]}, "rank", 2),
        ({"rank": 32}, "rank", 32),
        ({"lr": {"low": 0.01, "high": 0.1, "log": True}}, "lr", 0.01),
    ],
)
def test_where_the_default_lies_outside_the_nearest_value_is_tried_first(block, knob, expected):
    space = method_space(parse_spec(minimal(methods={"lora": block})), "lora")
    knobs = default_knobs(space, "lora")
    assert knobs == {knob: expected}
    discover()["lora"].Config.model_validate(knobs)


BASE = minimal(teachers=["packaged/vit_clipart", {"model": "timm/test_vit"}])
OVERRIDES = {
    "task.shots=5": lambda s: s.task.shots == 5,
    "task.shots=null": lambda s: s.task.shots is None,
    "task.splits.val=0.3": lambda s: s.task.splits.val == 0.3 and s.task.splits.test == 0.2,
    "name=other": lambda s: s.name == "other",
    "storage=a=b": lambda s: s.storage == "a=b",
    "teachers.1.image_size=64": lambda s: s.teachers[1].image_size == 64,
    "teachers.0=timm/test_resnet": lambda s: [t.model for t in s.teachers] == ["timm/test_resnet", "timm/test_vit"],
    "students=[timm/test_resnet]": lambda s: [m.model for m in s.students] == ["timm/test_resnet"],
    "methods.kd.temperature=[1, 2]": lambda s: s.methods == {"linear_probe": {}, "kd": {"temperature": [1, 2]}},
    "methods={kd: }": lambda s: s.methods == {"kd": {}},
}


@pytest.fixture
def sweep_file(tmp_path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


@pytest.mark.parametrize("override", OVERRIDES)
def test_set_overrides_nested_keys_and_items_of_lists(sweep_file, override):
    assert not OVERRIDES[override](read_spec(sweep_file))
    assert OVERRIDES[override](read_spec(sweep_file, [override]))


def test_of_several_overrides_the_last_holds(sweep_file):
    assert read_spec(sweep_file, ["task.shots=1", "task.shots=2"]).task.shots == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.shots", "is not of the form key.path=value"),
        ("=5", "is not of the form key.path=value"),
        ("task.shots=[", "'[' is not a YAML value: expected the node content, but found '<stream end>'."),
        ("methods={kd: , kd: }", "a YAML value: the key 'kd' stands there a second time (first in line 1)."),
        ("teachers.2.image_size=64", "'2' is not a position in a list of 2 (0 to 1)"),
        ("teachers.x=64", "'x' is not a position in a list of 2 (0 to 1)"),
        ("teachers.0.image_size=64", "teachers.0 is 'packaged/vit_clipart', which has no keys below it"),
        ("teachers.0.kwargs.depth=2", "teachers.0 is 'packaged/vit_clipart', which has no keys below it"),
        ("name.x=1", "name is 's', which has no keys below it"),
        ("task.shotz=1", "Did you mean 'shots'?"),
        ("task.shots=many", "task.shots: input should be a valid integer; found 'many'"),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(sweep_file, override, said):
    with pytest.raises(UserError) as caught:
        read_spec(sweep_file, [override])
    assert said in str(caught.value)


def fields_of(section: type[BaseModel]) -> int:
    return len(section.model_fields)


def test_every_key_is_documented_once_and_has_a_description():
    rows = documented_keys()
    keys = [key for key, _, _ in rows]
    assert len(set(keys)) == len(keys)
    sections = [SweepSpec, Task, Splits, Model, Model, Upstream, Search, Train, Generate, Corpus, Expect, Estimate]
    sections += [StoreLimits, Limits, Latency, Cluster, NodeType, Start]
    assert len(rows) == sum(map(fields_of, sections)) + 2  # and metric and mode of objectives
    for top in SweepSpec.model_fields:
        assert any(key.split(".")[0].removesuffix("[]") == top for key in keys), top
    assert {"task.splits.val", "teachers[].image_size", "objectives[].mode", "train.sync_batchnorm"} <= set(keys)
    assert all(len(text) > 10 for _, _, text in rows)
    assert [key for key, default, _ in rows if default == "required"] == [
        "name", "task", "task.data", "teachers[].model", "students[].model", "methods",
        "search.begin[].method", "cluster.nodes.NAME.max", "cluster.nodes.NAME.resources",
    ]  # fmt: skip


def test_documented_defaults_are_the_defaults():
    spec = parse_spec(minimal()).model_dump(mode="json")
    for key, default, _ in documented_keys():
        if "[]" in key or default in ("", "required"):
            continue
        value: Any = spec
        for part in key.split("."):
            value = value[part]
        assert yaml.safe_load(default) == value, key


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "10e-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"name: a\ntask: {{data: packaged/clipart}}\nmethods: {{finetune: {{lr: {text}}}}}\n")
    assert read_spec(path).methods["finetune"]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 5}\nstorage: x\ntrain: {batch: 8}\n", "line 3, column 1: the key 'train' {} 1)."),
        ("task:\n  shots: 1\n\n  'shots': 2\n", "line 4, column 3: the key 'shots' {} 2)."),
        ("students:\n- {model: a, model: b}\n", "line 2, column 14: the key 'model' {} 2)."),
        ("a: &x {b: 1}\nc:\n  <<: *x\n  d: 1\n  d: 2\n", "line 5, column 3: the key 'd' {} 4)."),
    ],
    ids=["on top", "below", "in a list", "beside a merge"],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_spec(path)
    said = said.format("stands there a second time (first in line")
    assert str(caught.value) == f"The sweep file '{path}' is not valid YAML at {said}"


def test_merged_keys_may_be_given_again_and_the_same_key_may_stand_in_two_mappings(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "a: &a {x: 1, y: 1}\nb: &b\n  <<: *a\n  y: 2\nc: &c {z: 1}\nd: {<<: [*a, *c], z: 2}\ne: *b\n1: one\n'1': text\n"
    )
    assert read_mapping(path, "file") == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 1, "y": 2},
        "c": {"z": 1},
        "d": {"x": 1, "y": 1, "z": 2},
        "e": {"x": 1, "y": 2},
        1: "one",
        "1": "text",
    }
