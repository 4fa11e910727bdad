"""Whether the client is still on the line. WSGI does not say, but gunicorn and Werkzeug hand out the connection."""

import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from shared.errors import LoradError

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_SOCKETS = ("gunicorn.socket", "werkzeug.socket")
_SENDS_NO_MORE = getattr(select, "POLLRDHUP", select.POLLHUP)
"""Linux sees that the other end has closed; elsewhere the next write to it has to find out."""


class ClientGone(LoradError):
    """The client hung up before it had its answer."""

    code = "client_gone"


def watch(environ: "WSGIEnvironment") -> Callable[[], None]:
    """A look at this request's connection, to be taken while it is being answered: raises ClientGone once it is closed.

    A look is one system call, reads nothing, and works under TLS too. A client that closes only its sending side has
    gone, as it has for nginx. Under a server that hands out no connection nobody ever goes.
    """
    connection = next((environ[key] for key in _SOCKETS if key in environ), None)
    if not isinstance(connection, socket.socket):
        return lambda: None
    poll = select.poll()
    poll.register(connection, _SENDS_NO_MORE)

    def look() -> None:
        if poll.poll(0):
            raise ClientGone

    return look
