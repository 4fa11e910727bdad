"""Bodies of /v1/adapters and /v1/models."""

from typing import Any, Literal

from api.schemas.wire import Out
from shared.tables import Adapter, AdapterVersion, BaseModelRow


class Model(Out):
    """What generation can be asked for: a base model, or an adapter with `parent` as its base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None

    @classmethod
    def of_base(cls, row: BaseModelRow) -> "Model":
        return cls(id=row.name, created=row.created_at // 1000, owned_by="lorad", root=row.name, parent=None)

    @classmethod
    def of_adapter(cls, adapter: Adapter, version: AdapterVersion, *, model_id: str, base: str) -> "Model":
        """`model_id` is how it was asked for; `root` is the version that this means now."""
        return cls(
            id=model_id,
            created=version.created_at // 1000,
            owned_by=adapter.tenant,
            root=f"{adapter.name}@{version.version}",
            parent=base,
        )


class AdapterFile(Out):
    filename: str
    size_bytes: int
    sha256: str


class AdapterVersionObject(Out):
    """Immutable weights in PEFT's format. `sha256` is that of adapter_model.safetensors."""

    id: str
    object: Literal["adapter.version"] = "adapter.version"
    name: str
    version: int
    state: Literal["ready", "corrupt"]
    created_at: int
    base_model: str
    base_model_digest: str
    job_id: str | None
    size_bytes: int
    sha256: str
    aliases: list[str]
    files: list[AdapterFile]
    manifest: dict[str, Any]

    @classmethod
    def of(
        cls, adapter: Adapter, row: AdapterVersion, *, base: BaseModelRow, aliases: dict[str, int]
    ) -> "AdapterVersionObject":
        return cls.model_validate(
            {
                "id": row.id,
                "name": adapter.name,
                "version": row.version,
                "state": row.state,
                "created_at": row.created_at // 1000,
                "base_model": base.name,
                "base_model_digest": base.digest,
                "job_id": row.job_id,
                "size_bytes": row.size_bytes,
                "sha256": row.sha256,
                "aliases": sorted(alias for alias, version in aliases.items() if version == row.version),
                "files": [{"filename": name, **facts} for name, facts in sorted(row.manifest["files"].items())],
                "manifest": row.manifest,
            }
        )


class AdapterObject(Out):
    """A name and what it stands for now. `versions` is null in lists."""

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    description: str | None
    tags: dict[str, Any]
    created_at: int
    updated_at: int
    latest_version: int | None
    base_model: str | None
    aliases: dict[str, int]
    versions: list[AdapterVersionObject] | None = None

    @classmethod
    def of(
        cls,
        row: Adapter,
        *,
        latest: AdapterVersion | None,
        base: BaseModelRow | None,
        aliases: dict[str, int],
        versions: list[AdapterVersionObject] | None = None,
    ) -> "AdapterObject":
        return cls(
            id=row.id,
            name=row.name,
            description=row.description,
            tags=row.tags,
            created_at=row.created_at // 1000,
            updated_at=row.updated_at // 1000,
            latest_version=latest.version if latest else None,
            base_model=base.name if base else None,
            aliases=aliases,
            versions=versions,
        )
