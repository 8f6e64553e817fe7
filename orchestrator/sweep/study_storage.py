"""Where a sweep's study lies: a journal or an SQLite file in its folder, or a PostgreSQL database.

What opens a database is kept out of everything that is written: the password goes to the driver of the database beside
the address, and no message of a library below is passed on before `Database.scrubbed` has seen it.
"""

from __future__ import annotations

import json
import os
import time
import urllib.parse
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from orchestrator.errors import StudyLostError, UserError, behind, first_lines
from orchestrator.files import once
from orchestrator.spec import STUDY_SCHEMES, SweepSpec
from orchestrator.sweep.study_lock import StudyLock

VARIABLE = "ORCHESTRATOR_STUDY_URL"
FORM = "postgresql://USER[:PASSWORD]@HOST[:PORT]/DATABASE"
FILES = {"journal": "study.db", "sqlite": "study.sqlite", "postgresql": "study.json"}
LOST = (StorageInternalError, OperationalError, DBAPIError)  # what a connection that breaks looks like
LONGEST_WAIT_S = 15.0
CONNECT_S = 10
OPENING_S = 5.0  # a database that cannot be reached when a sweep starts is told soon
NO_CURE = ("authentication failed", "does not exist", "no password supplied", "permission denied", "no pg_hba.conf")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Database:
    """A PostgreSQL database.

    Attributes:
        url: without its password; what it leaves out comes from libpq's variables (PGHOST, PGPASSFILE, ...).
        password: None where libpq finds it, or none is needed.
    """

    url: URL
    password: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """`host:port/database`, for people."""
        host = self.url.host or os.environ.get("PGHOST", "localhost")
        port = self.url.port or os.environ.get("PGPORT", "5432")
        return f"{host}:{port}/{self.url.database or os.environ.get('PGDATABASE', '')}"

    def scrubbed(self, error: BaseException) -> str:
        """The first line of what is behind an error, without any secret that this process knows."""
        *_, cause = behind(error, contexts=False)
        text = (str(getattr(cause, "orig", None) or cause).strip().splitlines() or [type(cause).__name__])[0]
        for secret in filter(None, (self.password, os.environ.get("PGPASSWORD"))):
            for form in (secret, urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret)):
                text = text.replace(form, "***")
        return text

    def storage(self) -> RDBStorage:
        """Connected.

        Raises:
            UserError: if its driver is not installed.
        """
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise UserError(
                "search.study: postgresql needs psycopg: pip install 'transfer-orchestrator[postgresql]'."
            ) from None
        options: dict[str, Any] = {"connect_timeout": CONNECT_S, "application_name": "transfer-orchestrator"}
        if self.password is not None:
            options["password"] = self.password
        return RDBStorage(
            self.url.render_as_string(hide_password=True),
            engine_kwargs={"pool_pre_ping": True, "hide_parameters": True, "connect_args": options},
        )


def database_of(spec: SweepSpec) -> Database:
    """The database that the sweep file, a file that it names, or the environment tells.

    Raises:
        UserError: if it is none; what was found is not shown.
    """
    search = spec.search
    if search.study_file is not None:
        where = f"search.study_file: the file {search.study_file!r}"
        try:
            text = Path(search.study_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read ({type(error).__name__}).") from None
    elif os.environ.get(VARIABLE):
        where, text = VARIABLE, os.environ[VARIABLE].strip()
    elif "://" in search.study:
        where, text = "search.study", search.study
    elif any(os.environ.get(name) for name in ("PGHOST", "PGSERVICE", "PGDATABASE")):
        return Database(URL.create("postgresql+psycopg"))
    else:
        raise UserError(
            f"search.study: postgresql, and nothing says which: set {VARIABLE} or libpq's PGHOST, PGDATABASE, PGUSER "
            f"and PGPASSFILE in the driver's environment, or name a file with search.study_file; it holds {FORM}."
        )
    try:
        url = sqlalchemy.make_url(text)
    except (ArgumentError, ValueError):
        raise UserError(f"{where} holds no address of the form {FORM}.") from None
    if url.drivername not in STUDY_SCHEMES:
        raise UserError(f"{where} is not the address of a PostgreSQL database; allowed: {FORM}.")
    query = dict(url.query)
    password = query.pop("password", None) or url.password
    bare = URL.create("postgresql+psycopg", url.username, None, url.host, url.port, url.database, query)
    return Database(bare, str(password) if password is not None else None)


class StudyPlace:
    """Where one sweep's study lies, and how long a lost connection to it is waited for.

    A study in a database has a name of its own, which only this sweep's folder knows: sweeps of one name that share a
    database never meet.

    Args:
        spec: the sweep file.
        folder: the sweep's.
        sole: keep other drivers off a study in a database, for as long as this process lives. The file lock on the
            sweep's folder does so on one machine, and among machines only where their locks reach each other.

    Raises:
        UserError: if the sweep's study lies elsewhere already.
    """

    def __init__(self, spec: SweepSpec, folder: Path, sole: bool = False) -> None:
        self.spec, self.folder, self.sole = spec, folder, sole
        self.lock: StudyLock | None = None
        self.kind = spec.search.study.partition(":")[0]
        for kind, file in FILES.items():
            if kind != self.kind and (folder / file).exists():
                raise UserError(
                    f"search.study: {self.kind}, and the study of {str(folder)!r} lies in its {file} ({kind}) already; "
                    f"leave search.study: {kind}, or give the sweep another name."
                )
        self.database = database_of(spec) if self.kind == "postgresql" else None

    def open(self) -> optuna.Study:
        """The study, made if there is none.

        Raises:
            UserError: if a sweep with trials has no study in its database any more, or has another driver.
        """
        path = self.folder / FILES[self.kind]
        if self.database is None:
            if self.kind == "journal":
                _mend(path)
            return self._study(self._in_file(path), self.spec.name)
        if not path.exists():
            text = json.dumps({"name": f"{self.spec.name}-{uuid.uuid4().hex}"})
            once(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        name = json.loads(path.read_text(encoding="utf-8"))["name"]
        storage = self.database.storage()
        known = any(one == name for one in optuna.get_all_study_names(storage))
        if not known and next((self.folder / "trials").glob("**/t*.json"), None) is not None:
            raise UserError(
                f"The database {self.database.name} does not hold the study {name!r} of {str(self.folder)!r}: was "
                "another database meant?"
            )
        if self.sole:
            self.lock = self.lock or StudyLock(name)
            other = self.lock.take(storage.engine)
            if other is not None:
                raise UserError(
                    f"Another process is running the sweep {str(self.folder)!r}: it holds the study {name!r} in the "
                    f"database {self.database.name} ({other})."
                )
        return self._study(storage, name)

    def look(self) -> BaseStorage:
        """The storage of a study that its driver may be working with: nothing is made or mended.

        Raises:
            UserError: if nothing was proposed yet.
        """
        path = self.folder / FILES[self.kind]
        if not path.exists():
            raise UserError(f"The sweep {str(self.folder)!r} has no study yet: there is no {path.name}.")
        return self.database.storage() if self.database is not None else self._in_file(path)

    def _in_file(self, path: Path) -> BaseStorage:
        if self.kind == "journal":
            return JournalStorage(JournalFileBackend(str(path)))
        return RDBStorage(URL.create("sqlite", database=str(path)).render_as_string())

    def _study(self, storage: BaseStorage, name: str) -> optuna.Study:
        study = optuna.create_study(
            study_name=name,
            storage=storage,
            load_if_exists=True,
            directions=["maximize" if o.direction == "max" else "minimize" for o in self.spec.objectives],
            pruner=optuna.pruners.NopPruner(),
        )
        names = [o.metric for o in self.spec.objectives]
        if study.metric_names != names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(names)
        return study

    def patiently(self, work: Callable[[], Result], reopen: Callable[[], None], patience_s: float) -> Result:
        """`work()`; after a lost connection `reopen()` and `work()` again, later and later.

        Raises:
            StudyLostError: if the connection stays lost for so many seconds.
        """
        if self.kind == "journal":
            return work()
        started, wait, again = time.monotonic(), 0.5, False
        while True:
            try:
                if again:
                    reopen()
                elif self.lock is not None:
                    self.lock.check()  # a pool would connect anew without it
                return work()
            except LOST as error:
                lost = time.monotonic() - started
                if lost + wait > patience_s:
                    raise StudyLostError(self._farewell(error, lost)) from None
            time.sleep(wait)
            wait, again = min(2 * wait, LONGEST_WAIT_S), True

    def _farewell(self, error: BaseException, seconds: float) -> str:
        if self.database is None:
            cause = error.__cause__ or error
            said = first_lines(getattr(cause, "orig", None) or cause)
            return f"The study {str(self.folder / FILES[self.kind])!r} cannot be used: {said}"
        said = self.database.scrubbed(error)
        return f"The study's database {self.database.name} could not be reached for {seconds:.0f} s ({said})."


def check_study(spec: SweepSpec) -> None:
    """Connects once to the study's database, if the sweep file asks for one.

    Raises:
        UserError: if there is none, or it does not let us in.
        StudyLostError: if it cannot be reached.
    """
    if not spec.search.on_server:
        return
    database = database_of(spec)
    deadline = time.monotonic() + OPENING_S
    while True:
        try:
            storage = database.storage()
            try:
                storage.get_all_studies()
            finally:
                storage.engine.dispose()
            return
        except LOST as error:
            said = database.scrubbed(error)
            if any(words in said for words in NO_CURE):
                raise UserError(f"search.study: the database {database.name} lets nobody in: {said}.") from None
            if time.monotonic() > deadline:
                raise StudyLostError(f"The study's database {database.name} cannot be reached ({said}).") from None
        time.sleep(0.5)


def has_study(folder: Path) -> bool:
    """Whether anything was proposed in a sweep's folder."""
    return any((folder / file).exists() for file in FILES.values())


def _mend(journal: Path) -> None:
    """Drops a last line that its writer did not finish: it was killed, or the disk was full."""
    if not journal.is_file():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
