"""What programs refuse to start with: the line that says so, exit code 2, and what they do not refuse."""

import os
import pwd
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from shared import db
from shared.cli.servers import CODE_DIR
from shared.cli.startup import (
    Mount,
    file_system_of,
    mounted,
    parse_mountinfo,
    refuse_network_sqlite,
    refuse_open_broker,
    refuse_taken_port,
)
from shared.config import Settings
from shared.errors import SettingsError, StartupError
from shared.store.layout import Layout
from tests.shared.conftest import Lorad


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refused(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line of a program that did not start."""
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    return ended.stderr


@pytest.mark.parametrize("command", ["api", "trainer", "generator", "sweeper", "up"])
def test_no_program_talks_to_an_open_broker(lorad: Lorad, command: str):
    """The line names the host and what to write, once for every program that has a broker."""
    line = refused(lorad(command, LORAD_BROKER_URL="redis://redis:6379/0"))

    assert "the broker on redis needs a password" in line
    assert "LORAD_BROKER_URL=redis://:PASSWORD@redis:6379" in line


def test_the_api_does_not_start_on_a_taken_port(lorad: Lorad, taken_port: int):
    """Instead of trying again and again."""
    line = refused(lorad("api", LORAD_PORT=str(taken_port)))

    assert f"127.0.0.1 port {taken_port}: address already in use; LORAD_PORT" in line


@pytest.mark.parametrize("command", ["api", "trainer", "generator", "sweeper", "migrate", "up"])
def test_a_newer_schema_is_refused(lorad: Lorad, tmp_path: Path, command: str):
    """A program that does not know the tables leaves them alone."""
    url = f"sqlite:///{tmp_path}/newer.db"
    db.migrate(url)
    engine = db.open_engine(url)
    with db.write(engine) as tx:
        tx.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()

    assert "9999" in refused(lorad(command, LORAD_DATABASE_URL=url))


@pytest.mark.parametrize("command", ["api", "trainer", "sweeper", "up"])
def test_a_data_directory_that_cannot_be_is_refused(lorad: Lorad, tmp_path: Path, command: str):
    """It would lie below a file."""
    (tmp_path / "file").write_text("")

    assert "cannot write to the data directory" in refused(lorad(command, LORAD_DATA_DIR=f"{tmp_path}/file/data"))


@pytest.mark.skipif(os.geteuid() != 0, reason="a directory of another user needs two users")
def test_a_read_only_data_directory_is_refused():
    """All directories exist, but are another user's: found before the first upload fails."""
    with tempfile.TemporaryDirectory() as directory:
        Layout(Path(directory)).prepare()
        for place in (Path(directory), *Path(directory).iterdir()):
            place.chmod(0o755)
        program = [sys.executable, "-c", AS_NOBODY, str(pwd.getpwnam("nobody").pw_uid), directory]

        done = subprocess.run(program, cwd=CODE_DIR, capture_output=True, text=True, timeout=60)

    assert done.stdout == f"cannot write to the data directory {directory}: Permission denied\n", done.stderr


AS_NOBODY = """
import os, sys, tempfile
from shared.cli.startup import refuse_read_only
from shared.config import Settings
from shared.errors import StartupError
import shared.store.layout
os.setuid(int(sys.argv[1]))
try:
    refuse_read_only(Settings.from_env({"LORAD_DATA_DIR": sys.argv[2]}))
except StartupError as error:
    print(error.message)
"""


def test_all_that_is_wrong_is_said_at_once(lorad: Lorad, tmp_path: Path):
    """A broker and a data directory: one line, both faults."""
    (tmp_path / "file").write_text("")

    line = refused(lorad("sweeper", LORAD_DATA_DIR=f"{tmp_path}/file/data", LORAD_BROKER_URL="redis://10.0.0.1"))

    assert "needs a password" in line
    assert "cannot write" in line


@pytest.mark.parametrize("url", ["redis://redis", "redis://10.0.0.1:6379/0", "rediss://user@broker.example:6380"])
def test_a_broker_that_others_reach_needs_a_password(url: str):
    """By a name of a private network too, and with TLS too: encryption keeps nobody from writing."""
    settings = Settings.from_env({"LORAD_BROKER_URL": url})

    with pytest.raises(StartupError, match="needs a password"):
        refuse_open_broker(settings)


@pytest.mark.parametrize(
    "url",
    ["", "redis://127.0.0.1:6379/0", "redis://localhost", "redis://[::1]:1", "unix:///run/x.sock", "redis://:pw@redis"],
)
def test_a_broker_that_is_ours_alone_does_not(url: str):
    """The embedded one, a socket, this machine; or one that asks for a password."""
    refuse_open_broker(Settings.from_env({"LORAD_BROKER_URL": url}))


@pytest.mark.parametrize("url", ["redis://:c4n/4ry@h", "redis://:c4n#4ry@h:1", "redis://:c4n@4ry@h", "redis://h:c4n"])
def test_a_url_that_libraries_would_misread_is_refused_without_showing_it(url: str):
    """A password with a slash would appear in some library's error as a bad port."""
    with pytest.raises(SettingsError, match="LORAD_BROKER_URL") as caught:
        Settings.from_env({"LORAD_BROKER_URL": url})

    assert "c4n" not in caught.value.message
    assert Settings.from_env({"LORAD_BROKER_URL": "redis://:c4n%2F4ry@h"}).broker_url


MOUNTINFO = """\
22 1 0:21 / / rw,relatime - ext4 /dev/root rw
30 22 0:30 / /mnt/with\\040blank rw,relatime shared:15 - nfs4 server:/a rw
31 22 0:31 / /srv rw - cifs //server/share rw
32 31 0:32 / /srv rw - xfs /dev/sdb rw
33 22 0:33 / /host rw shared:1 master:2 - virtiofs share rw
34 22 0:34 / /home/me/far rw - fuse.sshfs me@far:/ rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/lorad.db", "ext4"),
        ("/mnt/with blank/lorad.db", "nfs4"),
        ("/mnt/with blankets/lorad.db", "ext4"),
        ("/srv/lorad.db", "xfs"),
        ("/home/me/far/not/there/yet.db", "fuse.sshfs"),
    ],
)
def test_the_deepest_and_latest_mount_holds_a_file(path: str, kind: str):
    """Escaped blanks, a mount over another, a name that only begins alike, a file that is not there yet."""
    assert file_system_of(Path(path), parse_mountinfo(MOUNTINFO)) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "fuse.sshfs"])
def test_sqlite_on_a_network_is_refused(kind: str, capsys: pytest.CaptureFixture[str]):
    """The line names the file system and the two ways out."""
    settings = Settings.from_env({"LORAD_DATA_DIR": "/shared/lorad"})

    with pytest.raises(StartupError, match=rf"/shared/lorad/lorad.db lies on a network file system \({kind}\)"):
        refuse_network_sqlite(settings, lambda: [Mount("/", "ext4"), Mount("/shared", kind)])

    postgres = replace(settings, database_url="postgresql://lorad@db/lorad")
    refuse_network_sqlite(postgres, lambda: [Mount("/shared", kind)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("kind", "is_warned"), [("9p", True), ("virtiofs", True), ("ext4", False), ("overlay", False)])
def test_sqlite_on_a_directory_of_a_virtual_machine_s_host_is_warned_of(
    kind: str, is_warned: bool, capsys: pytest.CaptureFixture[str]
):
    """It works while the host keeps away, which only its owner knows."""
    refuse_network_sqlite(Settings.from_env({"LORAD_DATA_DIR": "/d"}), lambda: [Mount("/", kind)])

    assert ("warning" in capsys.readouterr().err) == is_warned


@pytest.mark.skipif(sys.platform != "linux", reason="other systems list mounts in other words")
def test_this_machine_tells_what_is_mounted():
    """The root, and /proc as what it is."""
    assert file_system_of(Path("/proc/self"), mounted()) == "proc"


def test_a_port_may_take_a_moment_to_become_free(taken_port: int):
    """Refused at once without patience; with patience it is waited for until its holder lets go."""
    settings = Settings.from_env({"LORAD_PORT": str(taken_port)})
    with pytest.raises(StartupError, match="already in use"):
        refuse_taken_port(settings)

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        waiting = replace(settings, port=holder.getsockname()[1])
        with ThreadPoolExecutor() as pool:
            waited = pool.submit(refuse_taken_port, waiting, patience_s=30.0)
            holder.close()
            waited.result(timeout=60)
