"""Bytes of a stored file with ETag, Range, HEAD and Repr-Digest, where werkzeug's send_file needs a hand."""

import base64
import re
from pathlib import Path
from typing import cast

from flask import Request, Response
from werkzeug.exceptions import PreconditionFailed
from werkzeug.utils import send_file

_ONE_RANGE = re.compile(r"bytes=(?:[0-9]{1,18}-[0-9]{0,18}|-[0-9]{1,18})")


def send(request: Request, path: Path, *, sha256: str, filename: str, immutable: bool) -> Response:
    """The file at `path`: 200, 206, 304, 412 or 416 as the request's headers ask; the ETag is the SHA-256.

    `immutable` says that this URL will never mean other bytes. The file itself is not checked here.
    """
    environ = dict(request.environ)
    _settle_range(environ, path.stat().st_size)
    response = cast("Response", send_file(
        path, environ,
        mimetype="application/octet-stream", as_attachment=True, download_name=filename,
        conditional=True, etag=sha256, response_class=Response,
    ))  # fmt: skip
    if response.status_code == PreconditionFailed.code:
        response.close()
        raise PreconditionFailed
    response.headers.pop("Last-Modified", None)
    response.headers["Cache-Control"] = "private, max-age=31536000, immutable" if immutable else "private, no-cache"
    response.headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"
    return response


def _settle_range(environ: dict[str, object], size_bytes: int) -> None:
    """Ignore an unknown unit, several ranges and a malformed one; '-N' beyond the file is all of it.

    Source: RFC 9110, section 14. Werkzeug would answer 416 to each of these.
    """
    asked = str(environ.get("HTTP_RANGE", "")).strip()
    if _ONE_RANGE.fullmatch(asked) is None:
        environ.pop("HTTP_RANGE", None)
        return
    first, _, last = asked.removeprefix("bytes=").partition("-")
    if first and last and int(last) < int(first):
        environ.pop("HTTP_RANGE")
    elif not first and int(last) >= size_bytes > 0:
        environ["HTTP_RANGE"] = "bytes=0-"
