"""What a program refuses to start with: one clear line and exit code 2 instead of damage, or of an open door."""

import ipaddress
import os
import platform
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click

from shared import db, keys
from shared.config import Settings
from shared.errors import SchemaTooNew, StartupError

PORT_PATIENCE_S: Final = 3.0
"""How long the port of an API that was just killed may still be taken."""

# SQLite's locks and shared memory hold on one host only (sqlite.org/wal.html, "all processes ... same host").
NETWORK_FILE_SYSTEMS: Final = frozenset((
    "nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "webdav", "ncpfs", "afs", "ceph", "lustre",
    "gpfs", "beegfs", "orangefs", "pvfs2", "glusterfs", "ocfs2", "gfs2",
    "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.s3fs", "fuse.rclone", "fuse.davfs",
    "fuse.moosefs", "fuse.juicefs", "fuse.seaweedfs", "fuse.goofys", "fuse.gcsfuse",
))  # fmt: skip
SHARED_WITH_A_HOST: Final = frozenset(
    ("9p", "virtiofs", "fuse.grpcfuse", "fuse.osxfs", "fakeowner", "vboxsf", "prl_fs")
)
"""Directories that a virtual machine has from its host: safe as long as the host leaves the file alone."""


@dataclass(frozen=True)
class Mount:
    place: str
    kind: str


def refuse(settings: Settings) -> None:
    """StartupError, with all that is wrong, if a program must not run with these settings; makes the data directory."""
    problems = []
    for look in (refuse_open_broker, refuse_network_sqlite, refuse_read_only):
        try:
            look(settings)
        except StartupError as error:
            problems.append(error.message)
    if problems:
        raise StartupError("; ".join(problems))


def refuse_open_broker(settings: Settings) -> None:
    """StartupError if others could talk to the broker without a password: whoever writes to it commands the workers.

    A name that only a private network knows counts as others: its neighbours are not all ours.
    """
    url = urlsplit(settings.broker_url or "")
    if url.scheme in ("redis", "rediss") and not url.password and not is_loopback(url.hostname or "localhost"):
        raise StartupError(
            f"the broker on {url.hostname} needs a password, since whoever reaches it commands this service:"
            f" set one there and in LORAD_BROKER_URL={url.scheme}://:PASSWORD@{url.hostname}:{url.port or 6379}"
        )


def refuse_network_sqlite(settings: Settings, mounts: Callable[[], Iterable[Mount]] | None = None) -> None:
    """StartupError if the SQLite file lies on a file system that other hosts share; a warning if a host might."""
    if not settings.database_url.startswith("sqlite:///"):
        return
    path = Path(settings.database_url.removeprefix("sqlite:///").partition("?")[0])
    kind = file_system_of(path, (mounts or mounted)())
    if kind in NETWORK_FILE_SYSTEMS:
        raise StartupError(
            f"{path} lies on a network file system ({kind}), where SQLite loses data:"
            " let LORAD_DATABASE_URL name a local path or a Postgres database"
        )
    if kind in SHARED_WITH_A_HOST:
        click.echo(f"lorad: warning: {path} lies on {kind}: nothing outside this machine may use it", err=True)


def refuse_read_only(settings: Settings) -> None:
    """StartupError if the data directory cannot be made, or nothing can be written to it."""
    prepare_data_dir(settings)
    try:
        with tempfile.TemporaryFile(dir=settings.data_dir / "tmp") as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise StartupError(f"cannot write to the data directory {settings.data_dir}: {error.strerror}") from error


def refuse_newer_schema(settings: Settings) -> None:
    """SchemaTooNew if a newer lorad wrote the database. One that is away or empty may come: /readyz tells."""
    engine = db.open_engine(settings.database_url)
    try:
        db.check_schema(engine)
    except SchemaTooNew:
        raise
    except StartupError:
        return
    finally:
        engine.dispose()


def refuse_open_door(settings: Settings) -> None:
    """Raise StartupError if others than this machine could reach an API that asks for no key."""
    if is_loopback(settings.host):
        return
    engine = db.open_engine(settings.database_url)
    try:
        db.check_schema(engine)
        with db.read(engine) as tx:
            if keys.any_exist(tx):
                return
    finally:
        engine.dispose()
    raise StartupError(
        f"LORAD_HOST={settings.host} is open to other machines and there is no API key yet: "
        "make one with 'lorad keys create', or listen on 127.0.0.1"
    )


def refuse_taken_port(settings: Settings, *, patience_s: float = 0.0) -> None:
    """StartupError if the API could not listen where it is told to."""
    until = time.monotonic() + patience_s
    while (error := _listen(settings.host, settings.port)) is not None:
        if time.monotonic() >= until:
            reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
            place = f"{settings.host} port {settings.port}"
            raise StartupError(f"cannot listen on {place}: {reason}; LORAD_PORT chooses another") from error
        time.sleep(0.1)


def is_loopback(host: str) -> bool:
    """True if only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def prepare_data_dir(settings: Settings) -> None:
    """The data directory and what lies in it, made for us alone; StartupError if it cannot be written."""
    from shared.store.layout import Layout

    try:
        Layout(settings.data_dir).prepare()
    except OSError as error:
        raise StartupError(f"cannot write to the data directory {settings.data_dir}: {error.strerror}") from error


def _listen(host: str, port: int) -> OSError | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gunicorn does: old connections may linger
        try:
            listener.bind((host, port))
        except OSError as error:
            return error
    return None


def file_system_of(path: Path, mounts: Iterable[Mount]) -> str | None:
    """The kind of file system that `path` lies on, or will; None if no mount holds it."""
    here = os.path.realpath(path)
    holding = [mount for mount in mounts if here == mount.place or here.startswith(mount.place.rstrip("/") + "/")]
    # Of two mounts at one place the later one hides the other.
    return max(enumerate(holding), key=lambda found: (len(found[1].place), found[0]))[1].kind if holding else None


def mounted() -> list[Mount]:
    """What is mounted, in the order of mounting; nothing where the system does not tell."""
    if platform.system() == "Linux":
        try:
            return parse_mountinfo(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape"))
        except OSError:
            return []
    try:
        listed = subprocess.run(["/sbin/mount"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [Mount(place, kind) for place, kind in re.findall(r" on (/.*) \(([a-z0-9]+)[,)]", listed)]


def parse_mountinfo(text: str) -> list[Mount]:
    """The lines of /proc/self/mountinfo (proc_pid_mountinfo(5)): the kind follows a lone '-', blanks are \\040."""
    mounts = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        if len(fields := head.split(" ")) > 4 and tail:
            place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            mounts.append(Mount(place, tail.split(" ")[0]))
    return mounts
