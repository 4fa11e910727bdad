"""What every fault starts from, made once: a nursery, a tiny base model, a migrated SQLite file, a Postgres server."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from shared import db
from tests.chaos.lab import Lab
from tests.chaos.programs import Nursery
from tests.servers import Postgres, run_postgres

Database = Literal["sqlite", "postgres"]


class Bench:
    """Makes labs. `directory` is where everything is written; nothing in it is removed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lab_directory = directory
        """Of the newest lab: its logs tell what happened."""
        self._stack = ExitStack()
        self._postgres: Postgres | None = None
        self._num_labs = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.nursery = stack.enter_context(Nursery(self.directory / "nursery.log"))
            self._base = self.directory / "base"
            self._base.mkdir()
            maker = self.nursery.start(
                "base", log=self.directory / "base.log", env={}, call="tests.chaos.nursery:make_tiny_base",
                arguments=[str(self._base)],
            )  # fmt: skip
            self._sqlite = self.directory / "template.db"
            db.migrate(f"sqlite:///{self._sqlite}")
            maker.wait_dead(120)
            assert maker.code == 0, maker.log.read_text()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def postgres(self) -> Postgres:
        """One server for all labs, each with a database of its own; started when first asked for."""
        if self._postgres is None:
            self._postgres = self._stack.enter_context(run_postgres())
            self._postgres.execute("CREATE DATABASE template_lab")
            db.migrate(self._postgres.url("template_lab"))
        return self._postgres

    @contextmanager
    def lab(
        self,
        database: Database = "sqlite",
        *,
        data_dir: Path | None = None,
        lease_s: float = 4.0,
        all_ended: bool = True,
        **settings: Any,
    ) -> Iterator[Lab]:
        """A service to break. When the block ends well, all invariants are checked; with `all_ended` False jobs may
        still wait."""  # fmt: skip
        self._num_labs += 1
        place = self.lab_directory = self.directory / f"lab{self._num_labs}"
        place.mkdir()
        data_dir = data_dir or place / "data"
        if database == "sqlite":
            data_dir.mkdir(exist_ok=True)
            shutil.copyfile(self._sqlite, data_dir / "lorad.db")
            url = f"sqlite:///{data_dir / 'lorad.db'}"
        else:
            name = f"lab{self._num_labs}"
            self.postgres.execute(f"CREATE DATABASE {name} TEMPLATE template_lab")
            url = self.postgres.url(name)
        row = json.loads(self._base.with_suffix(".json").read_text())
        lab = Lab(
            self.nursery, place, data_dir=data_dir, database_url=url,
            settings={
                "LORAD_LEASE_S": f"{lease_s:g}", "LORAD_HEARTBEAT_S": f"{min(1.0, lease_s / 4):g}",
                **{f"LORAD_{name.upper()}": str(value) for name, value in settings.items()},
            },
        )  # fmt: skip
        with lab:
            lab.add_base(self._base, row["digest"], row["config"])
            yield lab
            lab.check(all_ended=all_ended)
