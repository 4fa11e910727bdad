"""Bad data sets, rows 30 to 38 of the catalogue in test_bad_inputs.py.

A data set that holds something wrong is kept, its `status` says `error`, and no job can be made over it: whoever sent
it is told the line. Only what is no upload at all is refused.
"""

import gzip
import socket

import pytest

from shared import limits
from tests.api.conftest import Api
from tests.api.refused import JOBS, assert_told, unchanged

GOOD = b'{"prompt": "p", "completion": " c"}\n'
CHAT = '{{"messages": [{{{}}}, {{"role": "assistant", "content": "{}"}}]}}\n'

BAD_FILES = {
    "30-empty": (b"", "file: there is no line"),
    "30-only white space": (b"\n \n\t\n", "file: there is no line"),
    "31-one long line": (b"a" * (2 * limits.DATASET_LINE_BYTES), "line 1: a line has at most 1,048,576 bytes"),
    "32-bad JSON on line 7": (GOOD * 6 + b'{"prompt": \n' + GOOD, "line 7: not JSON"),
    "33-invalid UTF-8": (GOOD + b'{"prompt": "\xff", "completion": " c"}\n', "line 2: byte 13 is not UTF-8"),
    "33-UTF-16": (GOOD.decode().encode("utf-16"), "line 1: byte 1 is not UTF-8"),
    "35-no role": (CHAT.format('"content": "q"', "a").encode(), "line 1: messages[0].role"),
    "35-unknown role": (CHAT.format('"role": "tool", "content": "q"', "a").encode(), "line 1: messages[0].role"),
    "35-empty reply": (CHAT.format('"role": "user", "content": "q"', "").encode(), "line 1: messages[1].content"),
    "37-gzip bomb": (gzip.compress(bytes(64 << 20)), "line 1"),
    "37-half a gzip": (gzip.compress(GOOD * 1000)[:-8], ""),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_set_is_told_its_line_and_makes_no_job(api: Api, name: str) -> None:
    """The upload says what is wrong and where, and a job over it is 400 with the same words."""
    content, told = BAD_FILES[name]
    file = api.upload(content)
    with unchanged(api):
        answer = api.http.post(JOBS, json={"model": "tiny", "training_file": file["id"]})

    assert file["status"] == "error"
    assert file["status_details"].startswith(told)
    assert_told(answer, 400, "invalid_training_file", "training_file")
    assert file["status_details"] in answer.json()["error"]["message"]


GOOD_FILES = {
    "33-byte order mark": b"\xef\xbb\xbf" + GOOD,
    "33-CRLF": GOOD.replace(b"\n", b"\r\n") * 2,
    "36-special tokens": b'{"messages": [{"role": "user", "content": "<|im_start|>system"},'
    b' {"role": "assistant", "content": "<|im_end|>"}]}\n',
    "37-a gzip of ordinary text": gzip.compress(GOOD * 100),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_what_only_looks_bad_is_accepted(api: Api, name: str) -> None:
    """A byte order mark, CRLF, gzip, and text that looks like a special token do not stand in the way."""
    assert api.upload(GOOD_FILES[name])["status"] == "processed"


@pytest.mark.parametrize("key", ["training_file", "validation_file"])
@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "http://2130706433:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/data.jsonl",
    ],
)
def test_row_38_no_url_is_a_data_set(api: Api, url: str, key: str) -> None:
    """Data sets are uploaded. A URL in their place is refused, and nobody connects to where it leads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        files = {"training_file": api.upload()["id"], key: url.format(port=listener.getsockname()[1])}
        with unchanged(api):
            answer = api.http.post(JOBS, json={"model": "tiny"} | files)

        assert_told(answer, 400, "not_found", key)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_form_that_ends_early_leaves_nothing(api: Api) -> None:
    """Half an upload is no upload: 400, no row, no bytes."""
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + GOOD
    with unchanged(api):
        answer = api.http.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})

    assert_told(answer, 400, "invalid_value")
