"""The bytes of adapter versions: published once under adapters/<version id>, checked whenever they are read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from shared import failpoints, ids
from shared.errors import AdapterCorrupt, NotFound
from shared.specs import Spec
from shared.store.durable import inventory, make_durable, place, sha256_file, sync
from shared.store.layout import Layout
from shared.tables import AdapterVersion

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
CARD: Final = "README.md"
MANIFEST: Final = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class PreparedVersion:
    """Durable bytes under adapters/<version_id> that no row names yet. `sha256` is that of the weights file."""

    version_id: str
    base_model_id: str
    manifest: Mapping[str, Any]
    size_bytes: int
    sha256: str


def prepare(
    layout: Layout,
    staged: Path,
    *,
    validate: Callable[[Path], object],
    base_model_id: str,
    base_digest: str,
    spec: Spec,
    job_id: str | None,
    name: str,
    training_sha256: str | None,
) -> PreparedVersion:
    """Make the adapter in `staged` durable, validate what was written, add the manifest, and publish the directory.

    The row comes with `insert_version`; until then, and if this raises, there is at most garbage that the sweeper
    finds. The version's number is not in the manifest: it is given out with the row.
    """
    for required in (WEIGHTS, CONFIG):
        if not (staged / required).is_file():
            raise ValueError(f"an adapter needs the file {required}")
    if not (staged / CARD).exists():
        (staged / CARD).write_text(_card(name, base_digest, job_id), encoding="utf-8")
    failpoints.hit("adapter.before_fsync")
    make_durable(staged)
    validate(staged)
    files = inventory(staged)
    version_id = ids.new_id(ids.ADAPTER_VERSION)
    manifest = {
        "version_id": version_id,
        "adapter": name,
        "job_id": job_id,
        "base_model": {"id": base_model_id, "digest": base_digest},
        "spec": spec.model_dump(mode="json"),
        "training_file_sha256": training_sha256,
        "files": files,
    }
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(staged / MANIFEST)
    sync(staged)
    failpoints.hit("adapter.before_rename")
    place(staged, layout.adapter(version_id))
    failpoints.hit("adapter.published")
    return PreparedVersion(
        version_id=version_id,
        base_model_id=base_model_id,
        manifest=manifest,
        size_bytes=sum(file["size_bytes"] for file in files.values()),
        sha256=files[WEIGHTS]["sha256"],
    )


def verified_file(layout: Layout, version: AdapterVersion, filename: str) -> tuple[Path, str, int]:
    """Path, sha256 and size of one file whose bytes match the row now; NotFound, AdapterCorrupt."""
    recorded = version.manifest["files"].get(filename)
    if recorded is None:
        raise NotFound(f"adapter version {version.id} has no file {filename!r}")
    path = layout.adapter(version.id) / filename
    try:
        found = path.lstat()
        sha256 = _sha256_of(path, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
    except OSError as error:
        raise AdapterCorrupt(f"{filename} of adapter version {version.id} cannot be read") from error
    if (sha256, found.st_size) != (recorded["sha256"], recorded["size_bytes"]):
        raise AdapterCorrupt(f"{filename} of adapter version {version.id} does not match its recorded checksum")
    return path, recorded["sha256"], recorded["size_bytes"]


def verify(layout: Layout, version: AdapterVersion) -> Path:
    """The directory of a version all of whose files match the row; AdapterCorrupt."""
    for filename in version.manifest["files"]:
        verified_file(layout, version, filename)
    return layout.adapter(version.id)


def rehash(layout: Layout, version: AdapterVersion) -> bool:
    """True if every byte of a version is as recorded, read anew from the disk."""
    try:
        found = inventory(layout.adapter(version.id))
    except OSError:
        return False
    found.pop(MANIFEST, None)
    return bool(found == version.manifest["files"])


@lru_cache(maxsize=8192)
def _sha256_of(path: Path, _inode: int, _mtime_ns: int, _ctime_ns: int, _size: int) -> str:
    """The checksum of a file, read again whenever its inode, times or size have changed."""
    return sha256_file(path)


def _card(name: str, base_digest: str, job_id: str | None) -> str:
    """A model card, as PEFT's tools expect beside an adapter."""
    origin = "was imported" if job_id is None else f"was trained by job `{job_id}`"
    return (
        "---\nlibrary_name: peft\ntags:\n- lora\n---\n\n"
        f"# {name}\n\nThis LoRA adapter {origin}.\n"
        f"It fits the base model whose files have the digest `{base_digest}`.\n"
    )
