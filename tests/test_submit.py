"""Sweeps as jobs of a real job server, on a cluster that grows and shrinks, with a token."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import psutil
import pytest
import requests
import yaml
from local_cluster import LIMIT_S, ROOT, LocalCluster, local_cluster
from small import small_spec

from orchestrator.errors import UserError, WorkError
from orchestrator.spec import SweepSpec
from orchestrator.sweep import submit
from orchestrator.sweep.ledger import Ledger
from orchestrator.sweep.upload import check_size, measure


@pytest.fixture
def project(tmp_path: Path, colours: Path) -> Path:
    """A folder of a user's, with a sweep file and what should not be uploaded."""
    folder = tmp_path / "project"
    (folder / "big").mkdir(parents=True)
    (folder / "big" / "photo.bin").write_bytes(b"0" * 3_000_000)
    (folder / "notes.txt").write_bytes(b"0" * 1000)
    (folder / "sweep.yaml").write_text(small_spec(colours, tmp_path / "runs").to_yaml())
    return folder


def spec_of(project: Path, **changes: Any) -> SweepSpec:
    return SweepSpec.model_validate(yaml.safe_load((project / "sweep.yaml").read_text()) | changes)


def test_an_upload_is_what_ray_would_pack(project: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    (project / ".rayignore").write_text("big/\n")
    (project / "deep").mkdir()
    (project / "deep" / ".gitignore").write_text("*.tmp\n")
    (project / "deep" / "left.tmp").write_bytes(b"0" * 500)
    (project / "deep" / "kept.py").write_bytes(b"0" * 500)
    target = project.parent / "package.zip"
    create_package(str(project), target, include_gitignore=True)
    import zipfile

    packed = [entry for entry in zipfile.ZipFile(target).infolist() if not entry.is_dir()]
    upload = measure(project)
    assert upload.size == sum(entry.file_size for entry in packed)
    assert upload.files == len(packed)
    assert "left.tmp" not in str(packed)


def test_too_big_an_upload_is_refused_naming_the_biggest_folders(project: Path) -> None:
    upload = measure(project)
    assert upload.biggest[0] == ("big", 3_000_000)
    check_size(upload, 4)
    with pytest.raises(UserError, match=r"3\.0 MB in 3 files, and --max-upload-mb is 2; .* are big \(3\.0 MB\), "):
        check_size(upload, 2)


def test_relative_paths_are_refused_by_key(project: Path) -> None:
    for changes, key in (
        ({"storage": "runs"}, "storage: 'runs'"),
        ({"teachers": [{"model": "local:w.pth", "architecture": "timm/test_vit"}]}, "teachers[0].model: 'local:w.pth'"),
        ({"corpus": {"images": "shards"}}, "corpus.images: 'shards'"),
    ):
        with pytest.raises(UserError, match=re.escape(key) + " is relative"):
            submit.check_addresses(spec_of(project, **changes))


def test_code_is_sent_where_the_folder_does_not_hold_it(project: Path) -> None:
    path = project / "sweep.yaml"
    outside = submit.prepare(spec_of(project), path, [], project, ["timm==1.0.31"], 100)
    assert [module.name for module in outside.modules] == ["orchestrator", "methods"]
    assert outside.runtime_env()["pip"] == ["timm==1.0.31"]
    assert outside.entrypoint == "python -m orchestrator sweep sweep.yaml"
    inside = submit.prepare(
        spec_of(project), ROOT / "search_spaces" / "kd.yaml", ["--set", "a=1 2"], ROOT, [], 100, True
    )
    assert inside.modules == ()
    assert inside.entrypoint == "python -m orchestrator sweep search_spaces/kd.yaml --set 'a=1 2' --resume"
    with pytest.raises(UserError, match="is not in"):
        submit.prepare(spec_of(project), path, [], ROOT, [], 100)


def test_the_token_is_looked_for_where_ray_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert submit.token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert submit.token() == "home"
    (tmp_path / "other").write_text("file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert submit.token() == "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert submit.token() == "variable"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH: there is no file"):
        submit.token()


def test_an_address_where_nothing_answers_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"No job server answers at http://127\.0\.0\.1:9 "):
        submit.client_of("127.0.0.1:9")
    with pytest.raises(UserError, match="is no dashboard's address"):
        submit.client_of("ray://127.0.0.1:9")


class Clock:
    """Time that passes while one sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Server:
    """A job server that is away for some calls, and whose log is `log`.

    Args:
        away: by call, in how many of the first ones the connection is lost.
    """

    def __init__(self, log: str, **away: int) -> None:
        self.log, self.away = log, away

    def _reach(self, call: str) -> None:
        self.away[call] = self.away.get(call, 0) - 1
        if self.away[call] >= 0:
            raise requests.ConnectionError("Connection refused")

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield self.log[:4]
        self.away["tail"] = self.away.get("tail", 0) - 1
        if self.away["tail"] >= 0:
            raise aiohttp.ServerDisconnectedError
        yield self.log[4:6]

    def get_job_status(self, job: str) -> Any:
        self._reach("status")
        return SimpleNamespace(value="SUCCEEDED" if self.away["tail"] < 0 else "RUNNING")

    def get_job_logs(self, job: str) -> str:
        self._reach("logs")
        return self.log


def test_a_lost_connection_is_made_again_wherever_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "time", Clock())
    shown: list[str] = []
    assert submit.watch(Server("one\ntwo\nthree\n", tail=2, status=3, logs=2), "small", shown.append) == "SUCCEEDED"
    assert "".join(shown) == "one\ntwo\nthree\n"


@pytest.mark.parametrize("call", ["status", "logs"])
def test_a_connection_that_stays_lost_ends_in_a_sentence_that_says_how_to_watch_on(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    clock = Clock()
    monkeypatch.setattr(submit, "time", clock)
    with pytest.raises(WorkError, match=r"the job 'small', .*`orchestrator submit --attach small` .*refused\)\.$"):
        submit.watch(Server("log", **{call: 1_000_000}), "small", lambda text: None)
    assert clock.now >= submit.LOST_S


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started
    assert started.process.returncode == 0
    folder = Path(started.environment["RAY_AUTH_TOKEN_PATH"]).parent
    assert not folder.exists(), "its files are removed"
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.ray
def test_a_sweep_is_sent_watched_stopped_and_continued_while_the_cluster_grows_and_shrinks(
    cluster: LocalCluster, project: Path
) -> None:
    assert set(cluster.nodes()) == {"ray.head.default"}
    where = ("--address", cluster.url)
    sent = cluster.run("submit", "sweep.yaml", "--set", "search.trials=40", "--detach", "--json", *where, cwd=project)
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout)["job"] == "small"
    twice = cluster.run("submit", "sweep.yaml", *where, cwd=project)
    assert twice.returncode == 2
    assert "is running as job 'small'" in twice.stderr
    ledger = Ledger(project.parent / "runs" / "small")
    wait_for(lambda: any(row["status"] == "complete" for row in ledger.rows()))
    assert "cpu-trials" in cluster.nodes(), "the cluster grew"

    watcher = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "submit", "--attach", "small", *where],
        env=cluster.environment | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit none
    )
    assert watcher.stdout is not None
    assert next(line for line in watcher.stdout if "finetune" in line)
    watcher.send_signal(signal.SIGINT)
    _, told = watcher.communicate(timeout=LIMIT_S)
    assert "The job runs on" in told

    stopped = cluster.run("submit", "--stop", "small", "--json", *where)
    assert json.loads(stopped.stdout) == {"job": "small", "sweep": "small", "status": "STOPPED"}, stopped.stderr
    before = {row["trial_id"]: row for row in ledger.rows() if row["status"] == "complete"}
    assert before
    wait_for(lambda: set(cluster.nodes()) == {"ray.head.default"})

    (ledger.folder / "sweep.yaml").write_text(
        (ledger.folder / "sweep.yaml").read_text().replace("trials: 40", f"trials: {len(before) + 1}")
    )
    resumed = cluster.run("submit", "sweep.yaml", "--resume", *where, cwd=project)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "Job small-2 of sweep small: SUCCEEDED" in resumed.stdout
    after = {row["trial_id"]: row for row in ledger.rows()}
    assert len(after) >= len(before) + 1
    assert {name: after[name] for name in before} == before, "nothing finished is repeated"
    assert cluster.token() not in json.dumps([str(job) for job in submit.jobs_of(_client(cluster))])


def _client(cluster: LocalCluster) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            if name.startswith("RAY_"):
                patch.setenv(name, value)
        return submit.client_of(cluster.url)


@pytest.mark.ray
def test_rays_own_command_runs_the_same_sweep(cluster: LocalCluster, project: Path, colours: Path) -> None:
    # A sweep that the cluster refuses says so at once, which is enough to see that it arrived.
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.url]
    command += ["--working-dir", str(project), "--runtime-env-json", json.dumps({"py_modules": _modules()})]
    command += ["--", "python", "-m", "orchestrator", "sweep", "sweep.yaml", "--set", "methods.nothing={}"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode != 0
    assert "nothing" in done.stdout


def _modules() -> list[str]:
    return [str(ROOT / "orchestrator"), str(ROOT / "methods")]


@pytest.mark.ray
def test_a_sweep_that_is_refused_there_ends_with_2_here(cluster: LocalCluster, project: Path) -> None:
    wrong = ("submit", "sweep.yaml", "--name", "wrong", "--set", "task.data=folder:/nowhere", "--address", cluster.url)
    refused = cluster.run(*wrong, cwd=project)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "/nowhere" in refused.stdout
    unknown = cluster.run("submit", "--attach", "wrongg", "--address", cluster.url)
    assert unknown.returncode == 2
    assert "Did you mean 'wrong'?" in unknown.stderr


@pytest.mark.ray
def test_whoever_has_no_token_or_another_is_refused(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    with pytest.raises(UserError, match="refuses the token that was sent"):
        submit.client_of(cluster.url)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="wants a token and none was found"):
        submit.client_of(cluster.url)


@pytest.mark.ray
def test_preflight_looks_from_inside_and_names_what_is_wrong_with_a_fix(cluster: LocalCluster, project: Path) -> None:
    look = ("check", "sweep.yaml", "--cluster", "--json", "--address", cluster.url)
    limits = ("--set", f"cluster.file={ROOT / 'clusters' / 'local' / 'cluster.yaml'}")
    found = cluster.run(*look, *limits, cwd=project)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = {line["name"]: line for line in json.loads(found.stdout)}
    wanted = [
        "schema",
        "upload, paths",
        "dashboard",
        "token",
        "nodes",
        "resources",
        "storage",
        "python",
        "ray",
        "torch",
    ]
    assert list(lines) == [*wanted, "code", "disk", "teachers, data"]
    assert "6 at a time by cluster's limits" in lines["resources"]["told"], "3 nodes of 2 CPUs, though none is up"
    assert not (project.parent / "runs").exists(), "it leaves nothing behind"

    wrong = ("--set", "task.data=folder:/nowhere", "--set", "storage=/proc/none")
    found = cluster.run(*look, *wrong, cwd=project)
    assert found.returncode == 2, found.stdout + found.stderr
    bad = {line["name"]: line for line in json.loads(found.stdout) if not line["good"]}
    assert list(bad) == ["resources", "storage", "teachers, data"]
    assert "cluster.file" in bad["resources"]["told"]
    assert "/proc/none cannot be written on the head" in bad["storage"]["told"]
    assert "there is no folder '/nowhere'" in bad["teachers, data"]["told"]
    assert all(line["fix"] for line in bad.values())
