"""/v1/files: data sets in, results out."""

from flask import Request, Response

from api.call import Call
from api.downloads import send
from api.endpoint import endpoint
from api.idempotency import Attempt
from api.inspection import named_base, token_report
from api.multipart import Form, Readable, read_form
from api.schemas.estimates import ReportQuery
from api.schemas.files import FileListQuery, FileName, FileObject, FileReport, FileUpload
from api.schemas.wire import Deleted, Listed
from api.validate import validated
from shared import data_format, limits
from shared.db import Tx
from shared.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from shared.store import files
from shared.store.files import Received
from shared.tables import File

_FORM_BYTES = limits.DATASET_BYTES + (1 << 20)


@endpoint(
    "POST /v1/files",
    scope="files:write",
    form={"purpose": "'fine-tune'", "file": f"the data set, up to {limits.DATASET_BYTES >> 20} MiB"},
)
def create(call: Call, request: Request, attempt: Attempt) -> FileObject | Response:
    """Upload a data set. It is checked at once: see `status`, `status_details` and the report."""
    form: Form[Received] = Form()
    try:
        _receive(call, request, form)
        filename, received = _checked(form)
        return _store(call, attempt, received, filename)
    finally:
        for _, received in form.files.values():
            received.discard()


@endpoint("GET /v1/files", scope="files:read")
def list_(call: Call, query: FileListQuery) -> Listed[FileObject]:
    """Files, newest first unless `order` is asc."""
    with call.read() as tx:
        page = files.list_page(
            tx, call.tenant, limit=query.limit, after=query.after, purpose=query.purpose,
            newest_first=query.order == "desc",
        )  # fmt: skip
    return Listed[FileObject].of([FileObject.of(row) for row in page.items], has_more=page.has_more)


@endpoint("GET /v1/files/<file_id>", scope="files:read")
def retrieve(call: Call, file_id: str) -> FileObject:
    """One file's metadata."""
    with call.read() as tx:
        return FileObject.of(files.get(tx, call.tenant, file_id))


@endpoint("GET /v1/files/<file_id>/report", scope="files:read")
def report(call: Call, file_id: str, query: ReportQuery) -> FileReport:
    """What the check of a data set found: format, number of samples, problems by line; with `model`, its tokens too."""
    with call.read() as tx:
        file = files.get(tx, call.tenant, file_id)
        base = named_base(tx, query.model) if query.model else None
    return FileReport.of(file, token_report(call, file, base, query) if base else None)


@endpoint(
    "GET /v1/files/<file_id>/content",
    scope="files:read",
    media={"application/octet-stream": "the bytes"},
    statuses=(200, 206, 304),
)
def content(call: Call, file_id: str, request: Request) -> Response:
    """The bytes of a file, with ETag and Range."""
    with call.read() as tx:
        row: File = files.get(tx, call.tenant, file_id)
    return send(request, call.layout.files(row.id), sha256=row.sha256, filename=row.filename, immutable=True)


@endpoint("DELETE /v1/files/<file_id>", scope="files:write")
def delete(call: Call, file_id: str) -> Deleted:
    """Delete a file; a conflict while an unfinished job needs it."""
    with call.write() as tx:
        return Deleted(id=files.delete(tx, call.tenant, file_id).id, object="file")


def _receive(call: Call, request: Request, form: Form[Received]) -> None:
    """Stream the form's file to disk."""
    if request.mimetype != "multipart/form-data":
        raise UnsupportedMediaType(f"Content-Type must be multipart/form-data, not {request.mimetype or 'missing'!r}.")
    if not (boundary := request.mimetype_params.get("boundary")):
        raise InvalidRequest("The Content-Type has no boundary.")
    if (request.content_length or 0) > _FORM_BYTES:
        raise PayloadTooLarge(f"A file may have {limits.DATASET_BYTES} bytes.", param="file")
    request.max_content_length = _FORM_BYTES

    def receive(stream: Readable) -> Received:
        return files.receive(call.layout, stream, max_bytes=limits.DATASET_BYTES)

    read_form(request.stream, boundary, receive, form)


def _checked(form: Form[Received]) -> tuple[str, Received]:
    """The one file of the form; raises InvalidRequest for fields and parts that mean nothing here."""
    if unknown := [name for name in form.files if name != "file"]:
        raise InvalidRequest(f"'{unknown[0]}' is not a file part; the file's part is 'file'.", param=unknown[0])
    validated(FileUpload, form.fields)
    validated(FileName, {name: filename for name, (filename, _) in form.files.items()})
    return form.files["file"]


def _store(call: Call, attempt: Attempt, received: Received, filename: str) -> FileObject | Response:
    report = data_format.check_file(received.path)

    def add(tx: Tx) -> FileObject:
        row = files.add(
            tx, call.layout, received,
            tenant=call.tenant, purpose="fine-tune", filename=filename,
            status="processed" if report.is_valid else "error",
            status_details=None if report.is_valid else str(report.problems[0]),
            report=report.to_json(),
        )  # fmt: skip
        return FileObject.of(row)

    return attempt.once(call, {"purpose": "fine-tune", "filename": filename, "sha256": received.sha256}, add)
