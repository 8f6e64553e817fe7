"""Where a study lies: a journal, SQLite, or a real PostgreSQL that goes away and comes back; and what is never told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import PASSWORD, Postgres, postgres_binaries
from small import small_spec, study_of

from orchestrator.errors import StudyLostError, UserError
from orchestrator.spec import SweepSpec, parse_spec
from orchestrator.sweep.ledger import FINAL, Ledger
from orchestrator.sweep.run import prepare
from orchestrator.sweep.study import Study
from orchestrator.sweep.study_storage import check_study, database_of

needs_postgres = pytest.mark.skipif(
    postgres_binaries() is None, reason="no PostgreSQL on this machine (initdb); .ci/run installs one"
)
VARIABLES = ("ORCHESTRATOR_STUDY_URL", "PGHOST", "PGSERVICE", "PGDATABASE", "PGPASSWORD", "PGUSER", "PGPASSFILE")


@pytest.fixture
def logs() -> Iterator[Path]:
    """A folder for Ray's files; its path is short, as those of Ray's sockets must be."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "postgresql":
        monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", request.getfixturevalue("postgres").url())
    return str(request.param)


def spec_of(data: Path, storage: Path, study: str, **search: Any) -> SweepSpec:
    return small_spec(data, storage, search={"trials": 5, "study": study, **search})


def row(number: int) -> dict[str, Any]:
    return {"status": "complete", "reason": "", "val_metric": (number * 7 % 5) / 10}


def told(study: Study, first: int, last: int) -> list[str]:
    """Proposals of these numbers, each told its end."""
    seen = []
    for number in range(first, last):
        seen.append(study.ask().to_json())
        study.tell(number, row(number))
    return seen


def test_every_storage_proposes_the_same_and_a_reopened_one_goes_on(colours: Path, tmp_path: Path, kind: str) -> None:
    whole = told(study_of(spec_of(colours, tmp_path, "journal"), tmp_path / "journal"), 0, 12)
    spec = spec_of(colours, tmp_path, kind)
    assert told(study_of(spec, tmp_path / "s"), 0, 5) == whole[:5]
    again = study_of(spec, tmp_path / "s")
    assert [(c.to_json(), done) for c, done in again.proposed()] == [(text, True) for text in whole[:5]]
    assert told(again, 5, 12) == whole[5:]


def test_a_proposal_that_a_dead_driver_left_half_made_is_made_again(
    colours: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optuna.storages import RDBStorage

    whole = told(study_of(spec_of(colours, tmp_path, "journal"), tmp_path / "journal"), 0, 11)
    spec = spec_of(colours, tmp_path, kind)
    study = study_of(spec, tmp_path / "s")
    assert told(study, 0, 9) == whole[:9]
    writes = {name: getattr(RDBStorage, name) for name in ("_set_trial_param", "set_trial_user_attr")}
    for allowed in range(3):  # writes of the proposal that are made before the driver dies
        left = [allowed]

        def dying(write: Any, left: list[int] = left) -> Any:
            def replacement(*words: Any, **more: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return write(*words, **more)

            return replacement

        with monkeypatch.context() as patch:
            for name, write in writes.items():
                patch.setattr(RDBStorage, name, dying(write))
            with pytest.raises(KeyboardInterrupt):
                study.ask()
        study = study_of(spec, tmp_path / "s")
        assert len(study.proposed()) == 9
    assert told(study, 9, 11) == whole[9:]


def test_a_sweep_keeps_the_storage_that_it_began_with(colours: Path, tmp_path: Path, kind: str) -> None:
    study_of(spec_of(colours, tmp_path, kind), tmp_path / "s").ask()
    with pytest.raises(UserError, match=rf"lies in its study\..* \({kind}\) already"):
        study_of(spec_of(colours, tmp_path, "journal"), tmp_path / "s")


@needs_postgres
def test_two_sweeps_of_one_name_in_one_database_never_meet(
    colours: Path, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", postgres.url())
    spec = spec_of(colours, tmp_path, "postgresql")
    one, two = study_of(spec, tmp_path / "one"), study_of(spec, tmp_path / "two")
    whole = told(one, 0, 4)
    assert two.proposed() == []
    assert told(two, 0, 4) == whole
    assert len(study_of(spec, tmp_path / "one").proposed()) == 4


@needs_postgres
def test_a_lost_connection_is_waited_for_and_changes_no_proposal(
    colours: Path, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = told(study_of(spec_of(colours, tmp_path, "journal"), tmp_path / "journal"), 0, 11)
    monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", postgres.url())
    study = study_of(spec_of(colours, tmp_path, "postgresql", study_patience_s=60), tmp_path / "s")
    assert told(study, 0, 9) == whole[:9]
    postgres.stop()
    seen: list[str] = []
    asking = threading.Thread(target=lambda: seen.extend(told(study, 9, 11)))
    asking.start()
    time.sleep(1)
    assert asking.is_alive()
    assert seen == []
    postgres.start()
    asking.join(60)
    assert seen == whole[9:]
    assert [c.number for c, _ in study.proposed()] == list(range(11))


@needs_postgres
def test_a_connection_that_stays_lost_is_one_sentence_and_the_study_goes_on_later(
    colours: Path, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", postgres.url())
    spec = spec_of(colours, tmp_path, "postgresql", study_patience_s=1)
    study = study_of(spec, tmp_path / "s")
    first = told(study, 0, 2)
    postgres.stop()
    try:
        with pytest.raises(StudyLostError, match=rf"database 127\.0\.0\.1:{postgres.port}/postgres could not") as lost:
            study.ask()
        assert PASSWORD not in str(lost.value)
        assert lost.value.__cause__ is None
        monkeypatch.setattr("orchestrator.sweep.study_storage.OPENING_S", 0)
        with pytest.raises(StudyLostError, match="cannot be reached"):
            check_study(spec)
    finally:
        postgres.start()
    assert [c.to_json() for c, _ in study_of(spec, tmp_path / "s").proposed()] == first


@needs_postgres
def test_a_database_that_has_lost_the_study_is_refused(
    colours: Path, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", postgres.url())
    spec = spec_of(colours, tmp_path, "postgresql")
    study_of(spec, tmp_path / "s").ask()
    (tmp_path / "s" / "trials").mkdir()
    (tmp_path / "s" / "trials" / "t0000.json").write_text("{}")
    (tmp_path / "s" / "study.json").write_text('{"name": "gone"}')
    with pytest.raises(UserError, match="does not hold the study 'gone'"):
        study_of(spec, tmp_path / "s")


@needs_postgres
def test_a_study_has_one_driver_wherever_it_runs_also_after_a_lost_connection(
    colours: Path, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", postgres.url())
    spec = spec_of(colours, tmp_path, "postgresql", study_patience_s=60)
    prepared = prepare(spec)

    def driver(folder: str) -> Study:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Study(spec, tmp_path / folder, prepared.cells, prepared.spaces, prepared.task.info, sole=True)

    first = driver("s")
    driver("another").ask()  # of the same name in the same database
    refused = r"Another process is running the sweep '.*s'.*connected from 127\.0\.0\.1 since \d{4}-"
    with pytest.raises(UserError, match=refused):
        driver("s")
    assert [c.number for c, _ in first.proposed()] == []  # the refused one has voided nothing
    first.ask()
    first._open()  # as after a lost connection of which the server does not know
    with pytest.raises(UserError, match=refused):
        driver("s")
    postgres.stop()
    postgres.start()
    assert first.ask().number == 1  # opened anew by itself
    with pytest.raises(UserError, match=refused):
        driver("s")
    holder = first._place.lock
    assert holder is not None
    assert holder.held is not None
    holder.held.invalidate()  # the driver dies
    second = driver("s")
    assert [c.number for c, _ in second.proposed()] == [0, 1]
    postgres.stop()
    postgres.start()
    assert second.ask().number == 2
    with pytest.raises(UserError, match=refused):
        first._open()  # whoever thought itself the driver all the while


@needs_postgres
@pytest.mark.parametrize("way", ["variable", "file", "libpq"])
def test_the_password_comes_from_the_environment_or_a_file(
    colours: Path, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    search: dict[str, Any] = {}
    if way == "variable":
        monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", postgres.url())
    elif way == "file":
        (tmp_path / "secret").write_text(postgres.url() + "\n")
        search["study_file"] = str(tmp_path / "secret")
    else:
        escaped = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
        (tmp_path / "pgpass").write_text(f"127.0.0.1:{postgres.port}:*:tester:{escaped}\n")
        (tmp_path / "pgpass").chmod(0o600)
        for name, value in {
            "HOST": "127.0.0.1",
            "PORT": postgres.port,
            "USER": "tester",
            "DATABASE": "postgres",
        }.items():
            monkeypatch.setenv(f"PG{name}", str(value))
        monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    spec = spec_of(colours, tmp_path, "postgresql", **search)
    check_study(spec)
    study_of(spec, tmp_path / "s").ask()
    assert PASSWORD not in (tmp_path / "s" / "study.json").read_text()


@needs_postgres
@pytest.mark.parametrize("change", ["password", "database"])
def test_a_database_that_lets_nobody_in_is_the_users_error_without_the_password(
    colours: Path, tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    url = postgres.url(password="wr0ng-one") if change == "password" else postgres.url(database="nowhere")
    monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", url)
    with pytest.raises(UserError, match="lets nobody in") as refused:
        check_study(spec_of(colours, tmp_path, "postgresql"))
    assert not any(secret in str(refused.value) for secret in (PASSWORD, "wr0ng-one"))


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:hunter2@host/db",
        "postgres://:hunter2@host/db",
        "postgresql+psycopg://host/db?password=hunter2",
        "postgresql://host/db?sslpassword=hunter2",
    ],
)
def test_a_password_in_the_sweep_file_is_refused_and_not_shown(colours: Path, tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match="study holds a password") as refused:
        spec_of(colours, tmp_path, address)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("text", ["hunter2", "mysql://me:hunter2@host/db", "postgresql:/hunter2", "://hunter2"])
def test_an_address_that_is_none_is_refused_and_not_shown(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", text)
    with pytest.raises(UserError, match="ORCHESTRATOR_STUDY_URL") as refused:
        check_study(spec_of(colours, tmp_path, "postgresql"))
    assert "hunter2" not in str(refused.value)
    monkeypatch.delenv("ORCHESTRATOR_STUDY_URL")
    with pytest.raises(UserError, match="nothing says which"):
        check_study(spec_of(colours, tmp_path, "postgresql"))


def test_whatever_is_behind_an_error_the_password_is_taken_out(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STUDY_URL", f"postgresql://me:{urllib.parse.quote(PASSWORD, safe='')}@h/db")
    database = database_of(spec_of(colours, tmp_path, "postgresql"))
    assert PASSWORD not in repr(database)
    for form in (PASSWORD, urllib.parse.quote(PASSWORD, safe=""), urllib.parse.quote_plus(PASSWORD)):
        assert database.scrubbed(RuntimeError(f"bad dsn {form}\nmore {form}")) == "bad dsn ***"


@needs_postgres
@pytest.mark.slow  # a minute; a connection that is lost is looked at above
@pytest.mark.ray
def test_a_sweep_whose_database_dies_ends_with_a_sentence_resumes_and_writes_the_password_nowhere(
    colours: Path, tmp_path: Path, postgres: Postgres, logs: Path
) -> None:
    spec = spec_of(colours, tmp_path / "runs", "postgresql", study_patience_s=1, concurrency=1)
    spec = parse_spec(spec.model_dump(mode="json") | {"methods": {"finetune": {}}, "train": {"steps": 40, "batch": 12}})
    (tmp_path / "spec.yaml").write_text(spec.to_yaml())
    folder = tmp_path / "runs" / "small"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"ORCHESTRATOR_STUDY_URL": postgres.url(), "RAY_TMPDIR": str(logs)}

    def command(*words: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-m", "orchestrator", *words], env=environment, **pipes)

    process = command("sweep", str(tmp_path / "spec.yaml"))
    while not any(r["status"] in FINAL for r in Ledger(folder).rows()):
        assert process.poll() is None, process.stderr.read()[-2000:] if process.stderr else ""
        time.sleep(0.05)
    postgres.stop()
    out, err = process.communicate(timeout=300)
    postgres.start()
    assert process.returncode == 1, err[-2000:]
    assert "could not be reached" in err
    assert f"Continue with `orchestrator resume {folder}`" in " ".join(err.split())
    assert "Traceback" not in err
    before = {r["trial_id"]: r["ended"] for r in Ledger(folder).rows() if r["status"] in FINAL}
    process = command("resume", str(folder), "--json")
    out_again, err_again = process.communicate(timeout=300)
    assert process.returncode == 0, err_again[-2000:]
    rows = {r["trial_id"]: r for r in json.loads(out_again)}
    assert [r["status"] for r in rows.values()] == ["complete"] * 5
    assert before.items() <= {i: r["ended"] for i, r in rows.items()}.items(), "a finished trial was repeated"
    assert any(logs.rglob("*.log")), "Ray's logs are not where they are sought"
    for secret in (PASSWORD, urllib.parse.quote(PASSWORD, safe=""), urllib.parse.quote_plus(PASSWORD)):
        assert not any(secret in text for text in (out, err, out_again, err_again))
        for path in [*(tmp_path / "runs").rglob("*"), *logs.rglob("*")]:
            if path.is_file() and not path.is_symlink():
                assert secret.encode() not in path.read_bytes(), path
