"""Upstream packages by name, priming them through the store, and the packaged one (OTA-10)."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from methods.generators.vq import VQPackage
from orchestrator import cli
from orchestrator.data.sources import FolderSource, open_source
from orchestrator.data.upstream import UpstreamFeeder, upstream_pixels
from orchestrator.errors import UserError, WorkError
from orchestrator.models.upstream import check_upstream, load_upstream, save_upstream
from orchestrator.packaged import models
from orchestrator.store import Records, Store
from orchestrator.sweep.prime import prime
from orchestrator.train.prime import psnr

SHAPE = {"f": 4, "codes": 16, "dim": 4, "channels": [8, 8, 8], "prior_width": 16, "prior_layers": 1, "prior_heads": 2}
TINY = [*(f"{k}={v}" for k, v in SHAPE.items()), "batch=4", "prior_batch=4", "checkpoint_s=1e-9"]
PACKAGED = Path(models.__file__).parent / "vq_clipart"
MB = 1_000_000


def primed(
    where: Path, data: Path, out: Path, *more: str, kind: str = "vq", steps: int = 10, tell: Callable | None = None
) -> dict:
    extra = TINY if kind == "vq" else ["channels=[8,8]", "batch=4"]
    return prime(where, f"folder:{data}", kind, 16, steps, out, [*extra, *more], tell or (lambda line: None))


@pytest.fixture(scope="module")
def done(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """A storage folder in which a tiny package was primed, the package, and its facts."""
    root = tmp_path_factory.mktemp("primed")
    return root / "runs", root / "package", primed(root / "runs", colours, root / "package")


# --- priming ------------------------------------------------------------------------------------------------


def test_priming_leaves_a_package_that_loads_and_holds_no_image(done, colours: Path) -> None:
    _, out, facts = done
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert facts["images"] == 72
    assert facts["heldout"] == 4
    package = load_upstream(f"local:{out}", "vq")
    assert isinstance(package.module, VQPackage)
    assert package.module.codes == 16
    assert package.module.side == 4
    assert not any(p.requires_grad for p in package.module.parameters())
    size = sum(t.numel() for t in package.module.state_dict().values())
    assert (out / "model.safetensors").stat().st_size < 2 * size + 20_000  # weights in 16 bits, and nothing else
    assert package.facts["heldout_psnr"] == facts["heldout_psnr"]
    assert 0 < facts["codes_used"] <= 1
    assert facts["uniform_nll"] == pytest.approx(np.log(16), abs=1e-3)


def test_the_same_call_is_found_in_the_store_and_writes_the_same_package(done, colours: Path, tmp_path: Path) -> None:
    where, out, facts = done
    lines: list[str] = []
    again = primed(where, colours, tmp_path / "again", tell=lines.append)
    assert [line.split(":")[0] for line in lines if "found in the store" in line] == ["upstream_vq", "upstream_prior"]
    assert not any("steps," in line for line in lines)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert again["heldout_nll"] == facts["heldout_nll"]
    copied = tmp_path / "moved"  # another place, the same content
    shutil.copytree(colours, copied)
    lines.clear()
    primed(where, copied, tmp_path / "third", tell=lines.append)
    assert sum("found in the store" in line for line in lines) == 2


def test_another_prior_trains_the_prior_only_and_other_images_train_everything(
    done, colours: Path, tmp_path: Path
) -> None:
    where = done[0]
    lines: list[str] = []
    primed(where, colours, tmp_path / "wider", "prior_width=8", "prior_steps=3", tell=lines.append)
    trained = {line.split(":")[0] for line in lines if "steps," in line}
    assert trained == {"upstream_prior"}
    assert any("upstream_prior: 3/3" in line for line in lines)
    lines.clear()
    primed(where, colours / "red", tmp_path / "red", tell=lines.append)
    assert {line.split(":")[0] for line in lines if "steps," in line} == {"upstream_vq", "upstream_prior"}


@pytest.mark.parametrize("at", ["upstream_vq: 7/10", "upstream_prior: 4/10"])
def test_killed_and_resumed_priming_gives_the_same_weights(done, colours: Path, tmp_path: Path, at: str) -> None:
    def dies(line: str) -> None:
        if line.startswith(at):
            raise KeyboardInterrupt

    where, out = tmp_path / "runs", tmp_path / "package"
    with pytest.raises(KeyboardInterrupt):
        primed(where, colours, out, tell=dies)
    assert not out.exists()
    (checkpoint,) = (where / "store" / ".partial").rglob("checkpoint.pt")
    done_steps = int(at.split(": ")[1].split("/")[0]) - 1
    assert torch.load(checkpoint, weights_only=True)["step"] == done_steps
    lines: list[str] = []
    primed(where, colours, out, tell=lines.append)
    stage = at.split(":")[0]
    assert next(line for line in lines if line.startswith(stage)).startswith(f"{stage}: {done_steps + 1}/10")
    found, expected = load_file(out / "model.safetensors"), load_file(done[1] / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_diffusion_package_is_primed_the_same_way(colours: Path, tmp_path: Path) -> None:
    facts = primed(tmp_path / "runs", colours, tmp_path / "unet", kind="diffusion", steps=4)
    package = load_upstream(f"local:{tmp_path / 'unet'}", "diffusion").module
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(package.sdedit(images, 0.0, 4, [0, 1]), images)
    assert 0.2 < facts["heldout_loss"] < 3
    with pytest.raises(UserError, match=r"upstream\.diffusion"):
        load_upstream(f"local:{tmp_path / 'unet'}", "vq")


def test_upstream_images_are_read_without_labels_once_each_and_bad_ones_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    buffers = []
    for _ in range(9):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (20, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
        buffers.append(buffer.getvalue())
    table = pa.table({"image": pa.array([*buffers, buffers[0], b"broken"], pa.binary())})
    pq.write_table(table, tmp_path / "x.parquet")
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, data in enumerate(buffers):
        (folder / f"{i}.png").write_bytes(data)
    store = Store(tmp_path / "store")
    entry = upstream_pixels(store, f"parquet:{tmp_path / 'x.parquet'}", 8)
    assert entry.meta["about"] == {"images": 9, "skipped": {"cannot be decoded": 1, "exact duplicate": 1}}
    assert upstream_pixels(store, f"folder:{folder}", 8).key == entry.key  # the content is what counts
    pixels = Records(entry.path / "pixels.arrow")
    assert pixels.shape == (3, 8, 8)
    assert len(pixels) == 9


def test_an_upstream_image_that_cannot_be_read_now_is_named_and_nothing_is_stored_of_it(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = Store(tmp_path / "store"), FolderSource.read
    bad = sorted((colours / "red").iterdir())[1].relative_to(colours).as_posix()

    def failing(source: FolderSource, where: str) -> bytes:
        if where == bad:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(source, where)

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read", failing)
        with pytest.raises(WorkError, match=rf"^--data: '{bad}' cannot be read \(Permission denied\)\.$"):
            upstream_pixels(store, f"folder:{colours}", 8)
    assert not list(store.root.glob("upstream_*/*"))
    assert upstream_pixels(store, f"folder:{colours}", 8).meta["about"] == {"images": 72, "skipped": {}}


def test_the_feeder_gives_every_image_once_an_epoch_and_any_step_alone(tmp_path: Path) -> None:
    class Table:
        def rows(self, rows: np.ndarray) -> Tensor:
            return torch.as_tensor(rows)[:, None]

    rows = np.arange(3, 13)
    feeder = UpstreamFeeder(Table(), rows, 4, seed=1, flip=False)  # type: ignore[arg-type]
    seen = torch.cat([feeder(step, "cpu").images[:, 0] for step in range(5)])
    for epoch in seen.split(10):
        assert sorted(epoch.tolist()) == rows.tolist()
    assert seen[:10].tolist() != seen[10:].tolist()
    fresh = UpstreamFeeder(Table(), rows, 4, seed=1, flip=False)  # type: ignore[arg-type]
    assert torch.equal(fresh(3, "cpu").images[:, 0], seen[12:16])
    small = UpstreamFeeder(Table(), rows[:3], 8, seed=0, flip=False)  # type: ignore[arg-type]
    assert len(small(1, "cpu").images) == 8


# --- the command --------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["orchestrator", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_the_command_prints_json_and_the_store_lists_its_stages(
    done, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = str(done[0])
    options = ["--data", f"folder:{colours}", "--kind", "vq", "--size", "16", "--steps", "10"]
    options += ["--out", str(tmp_path / "out"), "--json", *(word for pair in TINY for word in ("--set", pair))]
    assert command(monkeypatch, "store", "prime", where, *options) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["images"] == 72
    assert answer["out"] == str(tmp_path / "out")
    assert command(monkeypatch, "store", "ls", where, "--json") == 0
    stages = {row["stage"] for row in json.loads(capsys.readouterr().out)}
    assert stages == {"upstream_catalogue", "upstream_pixels", "upstream_vq", "upstream_codes", "upstream_prior"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--kind": "vqq"}, "--kind: 'vqq' is none of vq and diffusion. Did you mean 'vq'?"),
        ({"--data": "nonsense"}, "--data: 'nonsense' is not a data source"),
        ({"--data": "folder:nowhere"}, "--data: there is no folder 'nowhere'"),
        ({"--data": "packaged/clipar"}, "Did you mean 'clipart'?"),
        ({"--set": "coodes=4"}, "Did you mean 'codes'?"),
        ({"--set": "codes=0"}, "codes: input should be greater than or equal to 2; found 0"),
        ({"--set": "size=32"}, "given by --size"),
        ({"--set": "nothing"}, "key.path=value"),
        ({"--size": "18"}, "multiple of f"),
        ({"--steps": "0"}, "--steps: 0 is below 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    change, words, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "--data": f"folder:{colours}",
        "--kind": "vq",
        "--size": "16",
        "--steps": "2",
        "--out": str(tmp_path / "o"),
    }
    options |= change
    code = command(monkeypatch, "store", "prime", str(tmp_path / "r"), *(w for pair in options.items() for w in pair))
    told = capsys.readouterr().err
    assert code == 2
    assert words in " ".join(told.split())
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_too_few_images_and_a_folder_of_something_else_are_refused(colours: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((colours / "red").iterdir())[:7]:
        shutil.copy(path, few)
    with pytest.raises(UserError, match="7 usable images; at least 8"):
        primed(tmp_path / "runs", few, tmp_path / "out")
    with pytest.raises(UserError, match="is no upstream package"):
        primed(tmp_path / "runs", colours, few)
    assert len(list(few.iterdir())) == 7


# --- packages by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("packaged/vq_clipar", "vq", "Did you mean 'vq_clipart'?"),
        ("packaged/vq_clipart", "diffusion", "is a package of kind 'vq', and 'diffusion' is needed"),
        ("vq_clipart", "vq", "allowed: packaged/NAME and local:FOLDER"),
        ("local:nowhere", "vq", "there is no folder 'nowhere'"),
        ("packaged/vq_clipart", "vg", "Did you mean 'vq'?"),
    ],
)
def test_a_wrong_name_says_what_is_allowed_and_what_is_near(name: str, kind: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_upstream(name, kind)
    assert words in str(caught.value)


def test_a_folder_that_is_no_whole_package_is_refused(done, tmp_path: Path) -> None:
    out = tmp_path / "package"
    name = f"local:{out}"
    shutil.copytree(done[1], out)
    content = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(content | {"config": content["config"] | {"codes": 17}}))
    with pytest.raises(UserError, match="do not fit"):
        load_upstream(name, "vq")
    (out / "config.json").write_text(json.dumps(content | {"config": {"coodes": 17}}))
    with pytest.raises(UserError, match="coodes"):
        check_upstream(name, "vq")
    (out / "config.json").write_text("{")
    with pytest.raises(UserError, match="no readable upstream package"):
        check_upstream(name, "vq")
    (out / "config.json").write_text(json.dumps(content))
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="is not the file"):
        load_upstream(name, "vq")
    (out / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        check_upstream(name, "vq")


def test_the_hash_follows_weights_and_configuration_and_a_model_card_survives_a_rewrite(tmp_path: Path) -> None:
    out = tmp_path / "package"
    hashes = []
    for seed, change in ((0, {}), (0, {}), (1, {}), (1, {"prior_heads": 1})):
        torch.manual_seed(seed)
        module = VQPackage.build({"size": 16, **SHAPE, **change})
        save_upstream(out, module, module.config.model_dump(mode="json"), {"seed": seed})
        (out / "MODEL_CARD.md").write_text("kept")
        loaded = load_upstream(f"local:{out}", "vq")
        assert torch.equal(loaded.module.codebook, module.codebook)
        assert loaded.module.config == module.config
        hashes.append(loaded.weights_hash)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert sorted(p.name for p in out.iterdir()) == ["MODEL_CARD.md", "config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


# --- the packaged package -----------------------------------------------------------------------------------


def clipart(split: str, count: int, size: int = 64) -> Tensor:
    """[n, 3, size, size] in [-1, 1], every so-and-so-many-th image of a split of the default task."""
    source = open_source("packaged/clipart")
    items = [item for item in source.items() if item.split == split]
    chosen = [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
    images = [Image.open(io.BytesIO(source.read(item.where))).convert("RGB") for item in chosen]
    small = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_ota_10_the_packaged_codes_are_in_use_and_say_more_of_an_image_than_the_mean_image() -> None:
    package = load_upstream("packaged/vq_clipart", "vq").module
    images = clipart("train", 120)
    indices = package.indices(images)
    assert indices.unique().numel() > 0.1 * package.codes
    made = package.decode(indices)
    plain = psnr(images.mean(0).expand_as(images), images)
    assert psnr(made, images).mean() > plain.mean() + 4
    assert len({tuple(row) for row in indices.tolist()}) > 115  # no collapse: images keep codes of their own


def test_the_packaged_prior_knows_pictures_from_noise_and_completes_the_lower_half() -> None:
    package = load_upstream("packaged/vq_clipart", "vq").module
    images = clipart("val", 24)
    indices = package.indices(images)
    with torch.no_grad():
        real = package.prior_loss(indices).item()
        shuffled = package.prior_loss(indices[:, torch.randperm(indices.shape[1])]).item()
    assert real < 0.8 * np.log(package.codes)
    assert shuffled > real + 0.3
    half = package.side**2 // 2
    made = package.complete(indices[:6], [half] * 6, top_k=64, seeds=range(6))
    assert torch.equal(made[:, :half], indices[:6, :half])
    assert (made[:, half:] != indices[:6, half:]).float().mean() > 0.2


def test_the_package_is_small_and_its_card_says_where_it_comes_from() -> None:
    assert (PACKAGED / "model.safetensors").stat().st_size <= 4 * MB
    card = (PACKAGED / "MODEL_CARD.md").read_text()
    facts = check_upstream("packaged/vq_clipart", "vq")["facts"]
    for word in ("openclipart", "emoji-datasource-google", "emoji-datasource-twitter", "CC-BY-4.0"):
        assert word in card
    assert f"{facts['heldout_psnr']:.2f}" in card
    assert f"{facts['heldout_nll']:.2f}" in card
