"""One driver at a time for a study in PostgreSQL, wherever it runs."""

from __future__ import annotations

import hashlib

from sqlalchemy import Connection, Engine

# Seconds after which, and how often, the server asks a silent driver whether it lives: one whose machine vanished is
# given up after a minute, not after two hours.
ALIVE = {"tcp_keepalives_idle": 30, "tcp_keepalives_interval": 10, "tcp_keepalives_count": 3}
SESSION = "pid || '/' || backend_start"  # process ids come again
HOLDER = f"""
SELECT pid, {SESSION} AS session, coalesce(host(client_addr), 'the server itself') AS address,
    to_char(backend_start, 'YYYY-MM-DD HH24:MI:SS') AS since
FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND objsubid = 1 AND classid = %s::oid AND objid = %s::oid
"""


class StudyLock:
    """An advisory lock of the server's, which is given back when the connection that took it ends, however it does.

    Args:
        name: of the study.
    """

    def __init__(self, name: str) -> None:
        digest = hashlib.sha256(name.encode()).digest()
        self.key = int.from_bytes(digest[:8], "big", signed=True)
        self.halves = (int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big"))  # as the server shows it
        self.held: Connection | None = None
        self.session = ""  # of the server's, that holds it for us

    def __getstate__(self) -> dict[str, object]:
        """A copy, as Ray Tune writes of what it works with, holds nothing."""
        return self.__dict__ | {"held": None}

    def take(self, engine: Engine) -> str | None:
        """Takes it on a connection of its own, anew after a lost one. Returns who else has it, in words; None: we have.

        Raises:
            sqlalchemy.exc.DBAPIError: if the server cannot be asked.
        """
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        for setting, value in ALIVE.items():
            connection.exec_driver_sql(f"SET {setting} = {value}")
        if self.held is not None:
            self.held.invalidate()
            # The server may not know yet that our connection was lost.
            ours = f"SELECT pg_terminate_backend(pid, 5000) FROM ({HOLDER}) AS holder WHERE session = %s"
            connection.exec_driver_sql(ours, (*self.halves, self.session))
        if connection.exec_driver_sql("SELECT pg_try_advisory_lock(%s)", (self.key,)).scalar():
            self.held = connection
            own = f"SELECT {SESSION} FROM pg_stat_activity WHERE pid = pg_backend_pid()"
            self.session = str(connection.exec_driver_sql(own).scalar_one())
            return None
        holder = connection.exec_driver_sql(HOLDER, self.halves).first()
        connection.close()
        return f"connected from {holder.address} since {holder.since}" if holder is not None else "just gone"

    def check(self) -> None:
        """Whether what holds it is still connected.

        Raises:
            sqlalchemy.exc.DBAPIError: if it is not.
        """
        if self.held is not None:
            self.held.exec_driver_sql("SELECT 1")
