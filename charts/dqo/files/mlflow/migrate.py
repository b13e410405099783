"""Bring MLflow's tables to the version of this image before a server starts.

Waits for the database, so that a database that starts later is no failure, and holds a lock in it, so that of several
pods that start together one migrates and the others find the work done. Usage: migrate.py TRACKING_URI [AUTH_URI]
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy

WAIT_SECONDS = float(os.environ.get("DQO_DATABASE_WAIT_SECONDS", "300"))
LOCK = 6454271980  # any number that no other program on this database uses


def wait_for(engine: sqlalchemy.Engine) -> None:
    """Return when the database answers; exit with its last words when it has not in time."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            engine.connect().close()
            return
        except sqlalchemy.exc.OperationalError as error:
            if time.monotonic() > end:
                sys.exit(f"migrate: no connection to the database in {WAIT_SECONDS:.0f} s: {error.orig}")
            print(f"migrate: waiting for the database: {error.orig}".strip(), flush=True)
            time.sleep(2)


@contextmanager
def alone(engine: sqlalchemy.Engine) -> Iterator[None]:
    """Hold PostgreSQL's advisory lock; a sqlite file has only this pod."""
    if engine.dialect.name != "postgresql":
        yield
        return
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("select pg_advisory_lock(:key)"), {"key": LOCK})
        try:
            yield
        finally:
            connection.execute(sqlalchemy.text("select pg_advisory_unlock(:key)"), {"key": LOCK})


def main(tracking: str, auth: str = "") -> None:
    """Migrate the tracking tables and, where asked for, the tables of users and permissions."""
    engine = sqlalchemy.create_engine(tracking)
    wait_for(engine)
    with alone(engine):
        from mlflow.db import upgrade

        upgrade.callback(tracking)
        if auth:
            from mlflow.server.auth.db.cli import upgrade as upgrade_auth

            upgrade_auth.callback(auth, "head")
    print("migrate: the tables are up to date", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
