"""POSTs that create, once: by Idempotency-Key, or by the OpenAI SDK's count of its retries where there is no key."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from flask import Request, Response
from pydantic import BaseModel

from api.call import Call
from shared import idempotency, limits
from shared.db import Tx
from shared.errors import InvalidRequest
from shared.idempotency import Kept

KEY_HEADERS: Final = ("Idempotency-Key", "X-Idempotency-Key")
"""The second is what some clients send; both mean the same."""
KEY_PATTERN: Final = rf"[!-~]{{1,{limits.MAX_IDEMPOTENCY_KEY}}}"
RETRY_HEADER: Final = "X-Stainless-Retry-Count"
"""OpenAI's SDKs count here how often they have sent a request before; they send no key."""
REPLAYED: Final = ("Idempotent-Replayed", "true")

_KEY = re.compile(KEY_PATTERN)
_COUNT = re.compile("[0-9]{1,4}")
A = TypeVar("A", bound=BaseModel)


@dataclass(frozen=True)
class Attempt:
    """A request to `route` that may come again."""

    route: str
    key: str | None
    retry_count: int | None

    @classmethod
    def of(cls, request: Request, route: str) -> Self:
        """What the headers say; raises InvalidRequest for a key that cannot be one. A count that is no number is
        none: the header belongs to the SDKs."""
        keys = {name: request.headers[name] for name in KEY_HEADERS if name in request.headers}
        if wrong := [name for name, key in keys.items() if not _KEY.fullmatch(key)]:
            raise InvalidRequest(
                f"{wrong[0]} must be 1 to {limits.MAX_IDEMPOTENCY_KEY} visible ASCII characters without blanks"
                f" (given: {len(keys[wrong[0]])} characters).",
                param=wrong[0],
            )
        if len(set(keys.values())) > 1:
            raise InvalidRequest(f"{' and '.join(keys)} are given and differ.", param=KEY_HEADERS[0])
        count = request.headers.get(RETRY_HEADER, "")
        return cls(route, next(iter(keys.values()), None), int(count) if _COUNT.fullmatch(count) else None)

    def once(self, call: Call, content: Mapping[str, object], make: Callable[[Tx], A]) -> A | Response:
        """The answer of `make`, committed with all that it wrote; or, if this request was answered before, that answer.

        `content` is what the request asks for, as JSON can say it. What `make` raises undoes all and is not kept.
        Raises IdempotencyMismatch, RequestInFlight.
        """
        request = self._request(call, content)
        with call.write() as tx:
            if request is not None and (kept := idempotency.take(tx, request)) is not None:
                call.intent.is_repeat = True
                return Response(kept.body, kept.status, [REPLAYED], mimetype="application/json")
            answer = make(tx)
            call.intent.object_id = getattr(answer, "id", None)
            if request is not None:
                idempotency.keep(tx, request, Kept(200, answer.model_dump_json()))
        return answer

    def _request(self, call: Call, content: Mapping[str, object]) -> idempotency.Request | None:
        """None if the client sends nothing by which a second time could be told from a second wish."""
        if self.key is not None:
            return idempotency.Request(
                tenant=call.tenant, key=self.key, request_sha256=_sha256(self.route, dict(content))
            )
        if self.retry_count is None:
            return None
        digest = _sha256(self.route, dict(content), call.caller.key_id)
        return idempotency.Request(
            tenant=call.tenant,
            key=f"retry of {digest}",  # has blanks, so it is nobody's Idempotency-Key
            request_sha256=digest,
            kept_s=limits.SDK_RETRY_S,
            retry_count=self.retry_count,
        )


def _sha256(*parts: object) -> str:
    """The same whatever the order of keys, blanks, or a form's boundary."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
