"""Wrong input: one sentence that names the key, what was found and what is allowed, and nothing left on disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from orchestrator.errors import UserError
from orchestrator.models.load import load_network
from orchestrator.spec import Model, parse_spec, read_spec
from orchestrator.sweep.folder import check_storage, create, resolved
from orchestrator.sweep.ledger import open_sweep
from orchestrator.sweep.run import Prepared, prepare

STUDENT = {"model": "timm/test_resnet", "image_size": 32}
TEACHER = {"model": "timm/test_vit", "pretrained": False, "image_size": 32}


def images(root: Path, classes: int = 2, count: int = 10) -> Path:
    rng = np.random.default_rng(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(root / f"class{c}" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return images(tmp_path_factory.mktemp("images") / "good")


@pytest.fixture
def raw(tmp_path, good) -> dict[str, Any]:
    """A sweep file with nothing wrong."""
    return {
        "name": "mine",
        "task": {"data": f"folder:{good}", "shots": 4},
        "teachers": [TEACHER],
        "students": [STUDENT],
        "methods": {"finetune": {}, "kd": {}},
        "storage": str(tmp_path / "runs"),
    }


@pytest.fixture(autouse=True)
def _no_sweep_is_left(tmp_path):
    yield
    store = tmp_path / "runs" / "store"
    left = [p for p in (tmp_path / "runs").glob("*") if p != store] if (tmp_path / "runs").is_dir() else []
    left += [p for part in (".tmp", ".partial") for p in store.glob(f"{part}/*")]
    assert left == []


def checked(raw: dict[str, Any], tmp_path: Path) -> Prepared:
    """What `orchestrator check` does, in this process."""
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    spec = resolved(read_spec(path))
    check_storage(spec)
    return prepare(spec)


def changed(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`task__shots=5` sets the key shots of task."""
    for key, value in changes.items():
        node = raw
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return raw


def refusal(raw: dict[str, Any], tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        checked(raw, tmp_path)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    return said.replace(str(tmp_path), "")


def test_the_file_with_nothing_wrong_is_accepted(raw, tmp_path):
    prepared = checked(raw, tmp_path)
    assert len(prepared.cells) == 2
    assert (prepared.dropped, prepared.unchecked) == ([], [])
    assert prepared.task.info.labelled == 8


SCHEMA = [
    ({"task__shotz": 5}, "Unknown key 'task.shotz'", "Did you mean 'shots'?"),
    ({"train__learning": 5}, "Unknown key 'train.learning'", "allowed here: steps, epochs, batch, "),
    ({"objective": []}, "Unknown key 'objective'", "Did you mean 'objectives'?"),
    ({"teachers": [{**TEACHER, "size": 3}]}, "Unknown key 'teachers.0.size'", "Did you mean 'image_size'?"),
    ({"task__shots": "five"}, "task.shots: input should be a valid integer", "found 'five'"),
    ({"task__shots": 0}, "task.shots: input should be greater than or equal to 1", "found 0"),
    ({"task__unlabelled": "yes"}, "task.unlabelled: input should be a valid boolean", "found 'yes'"),
    ({"task__data": "/data"}, "'/data' is not a data source", "folder:PATH, parquet:PATH"),
    ({"task__splits": {"val": 0.5, "test": 0.5}}, "val + test = 1 leaves no images", "at most 0.95"),
    ({"teachers": ["resnet50"]}, "'resnet50' is not a model", "timm/NAME, open_clip/NAME, local:PATH, packaged/NAME"),
    ({"objectives": ["val_metrc"]}, "unknown metric 'val_metrc'", "Did you mean 'val_metric'?"),
    ({"objectives": ["flops", "flops"]}, "objectives name flops and flops", "each metric once"),
    ({"search__sampler": "bayes"}, "search.sampler: input should be 'gp', 'tpe', 'random' or 'grid'", "found 'bayes'"),
    ({"train": {"steps": 5, "epochs": 1.0}}, "steps: 5 and epochs: 1 are both given", "give one of them"),
    ({"train": {"batch": 5, "workers": 2}}, "batch: 5 is not divisible by workers: 2", "train"),
    ({"name": "a/b"}, "'a/b' cannot name a folder", "at most 64"),
    ({"methods": {}}, "methods: ", "at least 1"),
]


@pytest.mark.parametrize(("changes", "found", "allowed"), SCHEMA, ids=[" ".join(map(str, c[0])) for c in SCHEMA])
def test_what_does_not_fit_the_schema_is_named_with_what_would(raw, tmp_path, changes, found, allowed):
    said = refusal(changed(raw, **changes), tmp_path)
    assert found in said
    assert allowed in said
    assert not (tmp_path / "runs").exists()


KNOBS = [
    ({"kd": {"temprature": 2}}, "Unknown knob 'methods.kd.temprature'", "Did you mean 'temperature'?"),
    ({"kd": {"temperature": {"low": 4, "high": 2}}}, "methods.kd.temperature: the range is upside down", "low 4 is"),
    ({"kd": {"temperature": {"low": 2, "high": 2}}}, "low and high are both 2, which samples nothing", "value itself"),
    ({"kd": {"temperature": {"low": 2, "hihg": 3}}}, "key 'hihg' in methods.kd.temperature", "Did you mean 'high'?"),
    ({"kd": {"temperature": {"low": 2}}}, "The key 'high' is missing", "methods.kd.temperature"),
    ({"kd": {"lr": {"low": 0, "high": 1, "log": True}}}, "methods.kd.lr: a log range must begin above 0", "low 0"),
    ({"kd": {"temperature": []}}, "methods.kd.temperature: an empty list samples nothing", "at least one"),
    ({"kd": {"temperature": [[1, 2]]}}, "methods.kd.temperature: a list holds plain values", "[1, 2]"),
    ({"kd": {"temperature": 0.5}}, "methods.kd, temperature: input should be greater than or equal to 1", "found 0.5"),
    ({"kd": {"weight": [0.5, 1.5]}}, "methods.kd, weight: input should be less than or equal to 1", "found 1.5"),
    ({"kd": {"lr": {"low": 0.1, "high": 10}}}, "methods.kd, lr: input should be less than or equal to 1", "found 10"),
    ({"kd": {"weight": "half"}}, "methods.kd, weight: input should be a valid number", "found 'half'"),
    ({"lora": {"rank": {"low": 1.5, "high": 4}}}, "methods.lora.rank: this knob takes whole numbers", "1.5 to 4"),
    ({"lora": {"rank": 4.5}}, "methods.lora, rank: input should be a valid integer", "found 4.5"),
    ({"lora": {"variant": "qlora"}}, "methods.lora, variant: input should be 'lora', 'rslora' or 'dora'", "'qlora'"),
    ({"fine_tune": {}}, "methods: there is no method 'fine_tune'", "Did you mean 'finetune'?"),
    ({"linear_probe": {"lr": 1}}, "Unknown knob 'methods.linear_probe.lr'", "linear_probe has none"),
]


@pytest.mark.parametrize(("methods", "found", "allowed"), KNOBS, ids=[str(k[0]) for k in KNOBS])
def test_a_wrong_method_or_knob_is_named_with_its_bound(raw, tmp_path, methods, found, allowed):
    said = refusal(changed(raw, methods=methods), tmp_path)
    assert found in said
    assert allowed in said


def test_a_misspelt_required_key_is_called_misspelt_and_an_absent_one_missing(raw, tmp_path):
    raw["nmae"] = raw.pop("name")
    said = refusal(raw, tmp_path)
    assert "Unknown key 'nmae'" in said
    assert "Did you mean 'name'?" in said
    del raw["nmae"]
    assert "The key 'name' is missing in /sweep.yaml." in refusal(raw, tmp_path)


def test_a_range_cannot_be_searched_as_a_grid(raw, tmp_path):
    raw = changed(raw, methods={"kd": {"lr": {"low": 0.01, "high": 0.1}}}, search__sampler="grid")
    said = refusal(raw, tmp_path)
    assert said.startswith("methods.kd.lr: search.sampler grid needs a list or a fixed value")
    assert "0.01 to 0.1" in said


MODELS = [
    ("timm/test_vitt", "There is no timm model 'test_vitt'", "Did you mean 'test_vit"),
    ("timm/resnet18.a1_in2k", "has no weights tagged 'a1_in2k'", "Did you mean 'a1_in1k'?"),
    ("packaged/vit_clipartt", "There is no packaged model 'packaged/vit_clipartt'", "Did you mean 'vit_clipart'?"),
    ("local:/nowhere/model.safetensors", "There is no weight file '/nowhere/model.safetensors'", "local:"),
]


@pytest.mark.parametrize("role", ["teachers", "students"])
@pytest.mark.parametrize(("model", "found", "allowed"), MODELS)
def test_an_unknown_model_names_the_nearest(raw, tmp_path, role, model, found, allowed):
    said = refusal(changed(raw, **{role: [{"model": model, "pretrained": False}]}), tmp_path)
    assert found in said
    assert allowed in said


def test_a_weight_file_is_named_with_what_it_lacks(raw, tmp_path):
    for name in ("model.safetensors", "model.pkl"):
        (tmp_path / name).write_bytes(b"x")
    raw["teachers"] = [{"model": f"local:{tmp_path}/model.safetensors"}]
    assert "needs `architecture: timm/NAME`" in refusal(raw, tmp_path)
    raw["teachers"] = [{"model": f"local:{tmp_path}/model.pkl", "architecture": "timm/test_vit"}]
    assert "ends in '.pkl'; allowed: .safetensors, .pth, .pt, .bin and .tar." in refusal(raw, tmp_path)
    raw["teachers"] = [{"model": f"local:{tmp_path}/model.safetensor", "architecture": "timm/test_vit"}]
    assert "Did you mean 'model.safetensors'?" in refusal(raw, tmp_path)


@pytest.mark.parametrize("name", ["garbage.safetensors", "garbage.pth"])
def test_unreadable_weights_are_one_sentence_that_names_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    entry = Model(model=f"local:{tmp_path}/{name}", architecture="timm/test_vit")
    with pytest.raises(UserError) as caught:
        load_network(entry, "teacher")
    said = str(caught.value)
    assert said.startswith(f"The weight file '{tmp_path}/{name}' cannot be read: ")
    assert len(said.splitlines()) == 1


def test_weights_of_another_network_are_refused(tmp_path):
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    entry = Model(model=f"local:{tmp_path}/other.safetensors", architecture="timm/test_vit")
    with pytest.raises(UserError, match=r"The weights in '.*other\.safetensors' do not fit timm/test_vit: "):
        load_network(entry, "teacher")


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    import torch

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    entry = Model(model=f"local:{tmp_path}/trap.pth", architecture="timm/test_vit")
    with pytest.raises(UserError, match="cannot be read"):
        load_network(entry, "teacher")
    assert not (tmp_path / "sprung").exists()


def test_missing_or_empty_data_is_named_with_the_nearest(raw, tmp_path, good):
    said = refusal(changed(raw, task__data=f"folder:{good}d"), tmp_path)
    assert f"there is no folder '{good}d'" in said
    assert "Did you mean 'good'?" in said
    (tmp_path / "hollow" / "ant").mkdir(parents=True)
    said = refusal(changed(raw, task__data=f"folder:{tmp_path}/hollow"), tmp_path)
    assert said == "task.data: there are no images below 'folder:/hollow' (one subfolder a class is expected)."
    said = refusal(changed(raw, task__data=f"parquet:{tmp_path}/hollow"), tmp_path)
    assert "there is no Parquet file at '/hollow'" in said
    said = refusal(changed(raw, task__data="packaged/cliparts"), tmp_path)
    assert "Did you mean 'clipart'?" in said


def test_a_parquet_file_that_is_none_or_lacks_a_column_says_so(raw, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "i.parquet"
    path.write_text("no parquet")
    assert "'/i.parquet' is not a readable Parquet file" in refusal(
        changed(raw, task__data=f"parquet:{path}"), tmp_path
    )
    pq.write_table(pa.table({"image": [b""], "labels": ["a"]}), path)
    said = refusal(raw, tmp_path)
    assert "has no column 'label'; it has image and labels. Did you mean 'labels'?" in said
    pq.write_table(pa.table({"image": [b""], "label": ["a"], "split": ["validate"]}), path)
    assert "the split 'validate' of 0:0 is none of train, val and test" in refusal(raw, tmp_path)


def test_data_with_one_class_or_nothing_but_broken_images_is_refused(raw, tmp_path):
    said = refusal(changed(raw, task__data=f"folder:{images(tmp_path / 'one', classes=1)}"), tmp_path)
    assert "has only one class (class0); at least two are needed." in said
    for i in range(3):
        (tmp_path / "broken" / "ant").mkdir(parents=True, exist_ok=True)
        (tmp_path / "broken" / "ant" / f"{i}.png").write_bytes(b"" if i else b"x")
    said = refusal(changed(raw, task__data=f"folder:{tmp_path}/broken"), tmp_path)
    assert said == "task.data: none of the 3 images can be used: 1 cannot be decoded and 2 empty file."


def test_fewer_images_than_shots_says_how_many_there_are(raw, tmp_path):
    said = refusal(changed(raw, task__shots=7), tmp_path)
    assert said.startswith("task.shots: 7 labelled images a class are asked for, and the class 'class0' has only 6")
    assert "use at most 6, or null for all" in said
    assert checked(changed(raw, task__shots=6), tmp_path).task.info.labelled == 12


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_storage_with_a_file_in_the_way_cannot_be_written(raw, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    said = refusal(changed(raw, storage=f"{tmp_path}/file{below}"), tmp_path)
    assert said.startswith(f"storage: the folder '/file{below}' cannot be written (")
    assert (tmp_path / "file").read_text() == "mine"


def test_storage_that_is_no_folder_is_refused(raw, tmp_path):
    assert "storage: 's3://bucket/runs' is not a folder" in refusal(changed(raw, storage="s3://bucket/runs"), tmp_path)


def test_a_method_that_the_teachers_or_students_cannot_feed_is_left_out_with_the_reason(raw, tmp_path):
    prepared = checked(changed(raw, teachers=[], methods={"finetune": {}, "kd": {}}), tmp_path)
    assert [c.method for c in prepared.cells] == ["finetune"]
    assert prepared.dropped == ["kd needs a teacher, and `teachers` is empty"]
    cnn = {"model": "timm/test_resnet", "pretrained": False, "image_size": 32}
    prepared = checked(changed(raw, teachers=[TEACHER, cnn], methods={"wecolora": {}}), tmp_path)
    assert [(c.method, c.teacher) for c in prepared.cells] == [("wecolora", 0)]
    assert prepared.dropped == ["wecolora needs a vit teacher, and timm/test_resnet is of kind cnn"]
    prepared = checked(
        changed(raw, methods={"wecolora": {"factor": [9]}, "finetune": {}}, teachers=[TEACHER]), tmp_path
    )
    assert prepared.dropped == ["factor 9 is larger than the 6 blocks of timm/test_vit"]


def test_where_no_method_can_run_every_reason_is_given(raw, tmp_path):
    said = refusal(changed(raw, teachers=[], students=[], methods={"kd": {}, "finetune": {}}), tmp_path)
    assert said.startswith("methods: none of kd and finetune can run on this data: ")
    assert "kd needs a teacher, and `teachers` is empty; finetune needs a student, and `students` is empty." in said


def test_a_name_that_is_taken_says_how_to_resume_and_changes_nothing(raw, tmp_path):
    prepared = checked(changed(raw, storage=str(tmp_path / "elsewhere")), tmp_path)
    folder = create(prepared.spec)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert open_sweep(folder) == prepared.spec
    with pytest.raises(UserError) as caught:
        create(prepared.spec)
    said = str(caught.value)
    assert "There is a sweep 'mine' in " in said
    assert f"`orchestrator resume {folder}`, or give this one another --name." in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_that_is_no_sweep_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match=r"is not a sweep's folder: it has no sweep\.yaml"):
        open_sweep(tmp_path)


FILES = {
    "name: [": "is not valid YAML at line ",
    "- a\n- b\n": "holds a list, not a mapping of keys",
    "": "is empty; `orchestrator check --keys`",
    "name: \xff\n": "cannot be read: 'utf-8' codec can't decode",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_is_no_sweep_file_says_what_it_is(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_spec(path)
    assert FILES[text] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_sweep_file_names_the_nearest(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(
        UserError, match=r"There is no sweep file .*quikstart\.yaml'\. Did you mean 'quickstart\.yaml'\?"
    ):
        read_spec(tmp_path / "quikstart.yaml")


COMMANDS = {
    "a misspelt key": ({"task__shotz": 5}, [], "Did you mean 'shots'?"),
    "data that is not there": (
        {},
        ["--set", "task.data=folder:/nowhere/at/all"],
        "there is no folder '/nowhere/at/all'",
    ),
    "storage in the way of a file": ({}, ["--json", "--set", "storage=/dev/null/runs"], "cannot be written ("),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_line_answers_with_one_line_on_stderr_and_exit_code_2(raw, tmp_path, case):
    changes, options, expected = COMMANDS[case]
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(changed(raw, **changes)))
    command = [sys.executable, "-m", "orchestrator", "check", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert expected in line


def test_check_reads_local_weights_and_says_what_is_wrong_with_them(raw: dict[str, Any], tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), whole)
    cut.write_bytes(whole.read_bytes()[:500])

    def teacher(path: Path, architecture: str) -> list[dict[str, Any]]:
        return [{"model": f"local:{path}", "architecture": architecture, "image_size": 32}]

    checked(changed(raw, teachers=teacher(whole, "timm/test_vit")), tmp_path)
    message = refusal(changed(raw, teachers=teacher(cut, "timm/test_vit")), tmp_path)
    assert message.startswith("The weight file '/cut.safetensors' cannot be read")
    message = refusal(changed(raw, teachers=teacher(whole, "timm/test_resnet")), tmp_path)
    assert message.startswith("The weights in '/whole.safetensors' do not fit timm/test_resnet")


def test_an_empty_file_and_a_folder_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(UserError, match=r"empty\.yaml' is empty; .*check --keys"):
        read_spec(tmp_path / "empty.yaml")
    with pytest.raises(UserError, match="is a folder"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        ("net2net", "timm/vgg11", "net2net cannot grow a VGG as asked"),
        (
            "adapter",
            "timm/vit_small_patch16_18x2_224",
            "adapter serves timm's pre-norm transformer blocks (Block), and the",
        ),
        ("adaptformer", "timm/vit_small_patch16_18x2_224", "of VisionTransformer are ParallelThingsBlock"),
        (
            "net2net",
            "timm/vit_small_patch16_18x2_224",
            "net2net cannot widen a transformer block of kind ParallelThingsBlock",
        ),
    ],
)
def test_a_teacher_that_a_tuning_cannot_adapt_is_refused_before_any_trial(
    raw: dict[str, Any], tmp_path: Path, method: str, model: str, reason: str
) -> None:
    teacher = {"model": model, "pretrained": False, "image_size": 224}
    message = refusal(changed(raw, teachers=[teacher], methods={method: {}}), tmp_path)
    assert f"{method} cannot serve {model}: " in message
    assert reason in message


def test_an_empty_split_folder_is_not_silently_drawn_anew(raw: dict[str, Any], tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(Path(raw["task"]["data"].removeprefix("folder:")), tmp_path / "images" / split)
    (tmp_path / "images" / "test").mkdir()
    message = refusal(changed(raw, task__data=f"folder:{tmp_path / 'images'}"), tmp_path)
    folder = "task.data: the folder '/images/test' holds no images; "
    assert message == folder + "without that folder, test is drawn from the other images."


def test_a_sweep_file_with_relative_paths_means_the_same_from_any_folder(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw["task"]["data"] = "folder:photos"
    raw["teachers"] = [{"model": "local:w.safetensors", "architecture": "timm/test_vit"}, "packaged/vit_clipart"]
    raw["students"] = ["timm/test_resnet"]
    raw["upstream"] = {"vq": "local:vq", "pipeline": {"model": "local:pipe"}}
    raw["corpus"] = {"images": "pictures", "sentences": "s3://bucket/texts"}
    spec = resolved(parse_spec(raw))
    assert spec.task.data == f"folder:{tmp_path}/photos"
    assert [m.model for m in spec.teachers] == [f"local:{tmp_path}/w.safetensors", "packaged/vit_clipart"]
    assert (spec.students[0].model, spec.upstream.vq) == ("timm/test_resnet", f"local:{tmp_path}/vq")
    assert spec.upstream.pipeline == {"model": f"local:{tmp_path}/pipe"}
    assert (spec.corpus.images, spec.corpus.sentences) == (f"{tmp_path}/pictures", "s3://bucket/texts")
    assert resolved(spec) == spec
    packaged = resolved(parse_spec({**raw, "task": {"data": "packaged/clipart"}, "corpus": {"images": "packaged/x"}}))
    assert (packaged.task.data, packaged.corpus.images) == ("packaged/clipart", "packaged/x")
