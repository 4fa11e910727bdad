"""Directories that appear whole or not at all, whenever the writer dies."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import failpoints, ids
from shared.errors import (
    NotFound,
    SettingsError,
)
from shared.store import durable, garbage
from shared.store.layout import Layout
from tests.shared.conftest import make_old, tree

Arm = Callable[[str], None]


@pytest.mark.parametrize(
    "text", ["", "..", "../../etc/passwd", "adv-" + "A" * 32, "adv-" + "0" * 32 + "\n", "adv-" + "0" * 31]
)
def test_only_ids_become_paths(layout: Layout, text: str) -> None:
    """What no id can be is an object that does not exist."""
    for path_of in (layout.adapter, layout.files, layout.model, layout.checkpoints):
        with pytest.raises(NotFound):
            path_of(text)


def test_directories_are_private(layout: Layout) -> None:
    """Nobody else on the machine reads the store."""
    assert {path.stat().st_mode & 0o777 for path in (layout.root, *layout.root.iterdir())} == {0o700}


def test_staging_leaves_nothing(layout: Layout) -> None:
    """A staged directory is gone at the end of the block, also after an error."""

    def stage_and_raise() -> None:
        with durable.staging(layout) as staged:
            (staged / "x").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        stage_and_raise()
    assert list(layout.tmp.iterdir()) == []


def test_publish_moves_everything(layout: Layout) -> None:
    """A published directory has every file, nested ones too, and the staging place is empty."""
    final = layout.adapter(ids.new_id(ids.ADAPTER_VERSION))
    with durable.staging(layout) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_bytes(b"1")
        (staged / "b").write_bytes(b"2")
        durable.publish(staged, final)

    assert tree(final) == {"deep/a": b"1", "b": b"2"}
    assert list(layout.tmp.iterdir()) == []


def test_publish_never_replaces(layout: Layout) -> None:
    """A name that exists keeps its content."""
    final = layout.adapter(ids.new_id(ids.ADAPTER_VERSION))
    for content in (b"first", b"second"):
        with durable.staging(layout) as staged:
            (staged / "a").write_bytes(content)
            if content == b"first":
                durable.publish(staged, final)
            else:
                with pytest.raises(FileExistsError):
                    durable.publish(staged, final)

    assert tree(final) == {"a": b"first"}


@pytest.mark.parametrize("where", ["a", "deep/a"])
def test_links_are_not_published(layout: Layout, tmp_path: Path, where: str) -> None:
    """A symbolic link among the staged files stops the publication."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    final = layout.adapter(ids.new_id(ids.ADAPTER_VERSION))
    with durable.staging(layout) as staged:
        (staged / where).parent.mkdir(exist_ok=True)
        (staged / where).symlink_to(secret)
        with pytest.raises(OSError, match="symbolic link"):
            durable.publish(staged, final)

    assert not final.exists()


def test_links_to_directories_are_not_published(layout: Layout, tmp_path: Path) -> None:
    """Nor is a link to a directory followed or kept."""
    with durable.staging(layout) as staged:
        (staged / "d").symlink_to(tmp_path)
        with pytest.raises(ValueError, match="symbolic link"):
            durable.publish(staged, layout.adapter(ids.new_id(ids.ADAPTER_VERSION)))


def test_every_file_and_directory_is_synced_before_the_rename(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of all files and directories, then rename, then fsync of the parent."""
    log: list[str] = []
    sync, rename = os.fsync, os.rename

    def logged_sync(descriptor: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(os, "rename", logged_rename)
    with durable.staging(layout) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_bytes(b"1")
        (staged / "b").write_bytes(b"2")
        durable.publish(staged, layout.adapter(ids.new_id(ids.ADAPTER_VERSION)))

        at = log.index("rename")
        assert sorted(log[:at]) == sorted(["a", "deep", "b", staged.name])
        assert log.index("a") < log.index("deep") < log.index(staged.name)
        assert log[at + 1 :] == ["adapters"]


@pytest.mark.parametrize("arrival", range(1, 5))
@pytest.mark.parametrize("action", ["eio", "enospc"])
def test_io_error_publishes_nothing(layout: Layout, failpoint: Arm, arrival: int, action: str) -> None:
    """An error of the n-th fsync leaves no final directory and no staged one."""
    final = layout.adapter(ids.new_id(ids.ADAPTER_VERSION))
    failpoint(f"publish.before_fsync:{action}:{arrival}")
    with durable.staging(layout) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_bytes(b"1")
        (staged / "b").write_bytes(b"2")
        with pytest.raises(OSError, match=r"."):
            durable.publish(staged, final)

    assert not final.exists()
    assert list(layout.tmp.iterdir()) == []


def test_checksum_does_not_follow_links(tmp_path: Path) -> None:
    """A link has no checksum, its target has."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"abc")
    link.symlink_to(target)

    assert durable.sha256_file(target) == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(OSError, match="symbolic link"):
        durable.sha256_file(link)


CRASHER = """
import sys
from pathlib import Path
from shared.store import adapters
from shared.store.layout import Layout
from shared.specs import TrainSpec
layout = Layout(Path(sys.argv[1]))
staged = layout.tmp / "stage-crash"
staged.mkdir()
(staged / "adapter_model.safetensors").write_bytes(b"weights")
(staged / "adapter_config.json").write_text("{}")
adapters.prepare(layout, staged, validate=lambda _: None, base_model_id="base", base_digest="d", spec=TrainSpec(),
                 job_id=None, name="math", training_sha256=None)
"""
POINTS = ["adapter.before_fsync", "publish.before_fsync", "publish.before_fsync_dir", "adapter.before_rename",
          "publish.before_rename", "publish.after_rename", "adapter.published"]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
def test_crash_while_publishing_leaves_whole_or_nothing(layout: Layout, point: str) -> None:
    """Killed at any point of a publication, there is a whole directory or none; the sweeper removes the rest."""
    env = os.environ | {"LORAD_FAILPOINT": f"{point}:kill"}
    done = subprocess.run([sys.executable, "-c", CRASHER, str(layout.root)], env=env, check=False)

    assert done.returncode == -signal.SIGKILL
    found = list((layout.root / "adapters").iterdir())
    for directory in found:
        assert set(tree(directory)) == {
            "adapter_model.safetensors", "adapter_config.json", "README.md", "manifest.json",
        }  # fmt: skip
    assert len(found) == (point in ("publish.after_rename", "adapter.published"))
    for path in layout.tmp.iterdir():
        make_old(path)
    assert garbage.remove_old_staging(layout) == 1 - len(found)


def test_crasher_without_failpoint_publishes(layout: Layout) -> None:
    """The program of the test above ends well when nobody kills it."""
    env = {key: value for key, value in os.environ.items() if key != "LORAD_FAILPOINT"}
    subprocess.run([sys.executable, "-c", CRASHER, str(layout.root)], env=env, check=True)

    assert len(list((layout.root / "adapters").iterdir())) == 1


def test_failpoint_counts_arrivals(failpoint: Arm) -> None:
    """A point acts at the arrival asked for, once."""
    failpoint("here:eio:2")
    failpoints.hit("here")
    failpoints.hit("there")
    with pytest.raises(OSError, match="Input/output"):
        failpoints.hit("here")
    failpoints.hit("here")


@pytest.mark.parametrize("text", ["here", "here:explode", "here:eio:x"])
def test_wrong_failpoints_are_refused(failpoint: Arm, text: str) -> None:
    """A typing error in a failpoint is not silently a run without one."""
    with pytest.raises(SettingsError, match="LORAD_FAILPOINT"):
        failpoint(text)
