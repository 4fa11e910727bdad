"""Bodies of /v1/files."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from api.schemas.estimates import TokenReport
from api.schemas.wire import Out, PageSize, Query, stored_text
from shared import limits
from shared.tables import File

Purpose = Literal["fine-tune", "fine-tune-results"]


class FileUpload(Query):
    """The text fields of an upload."""

    purpose: Literal["fine-tune"]


class FileName(Query):
    """What a file is called; it is shown and never used as a path."""

    file: Annotated[str, Field(min_length=1, max_length=255), AfterValidator(stored_text)]


class FileListQuery(Query):
    limit: PageSize = limits.MAX_PAGE
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"
    purpose: Purpose | None = None


class FileObject(Out):
    """A data set or a result file. `status` is 'error' for a data set that cannot be trained on."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    expires_at: None = None
    sha256: str

    @classmethod
    def of(cls, row: File) -> "FileObject":
        return cls.model_validate(
            {
                "id": row.id,
                "bytes": row.size_bytes,
                "created_at": row.created_at // 1000,
                "filename": row.filename,
                "purpose": row.purpose,
                "status": row.status,
                "status_details": row.status_details,
                "sha256": row.sha256,
            }
        )


class FileReport(Out):
    """What the check of a data set found, line by line.

    `tokens` is null unless a model was asked about and the file can be trained on.
    """

    object: Literal["file.report"] = "file.report"
    id: str
    status: Literal["uploaded", "processed", "error"]
    report: dict[str, Any] | None
    tokens: TokenReport | None

    @classmethod
    def of(cls, row: File, tokens: TokenReport | None) -> "FileReport":
        return cls.model_validate({"id": row.id, "status": row.status, "report": row.report, "tokens": tokens})
