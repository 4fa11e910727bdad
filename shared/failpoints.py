"""Named points at which a test makes this process crash, stop or meet an I/O error.

`LORAD_FAILPOINT=publish.before_rename:stop` acts at the first arrival at that point; `...:stop:3` at the third. Several
are separated by commas. Unset, as in production, a point costs one look into an empty dictionary.
"""

import errno
import os
import signal
from collections.abc import Callable, Mapping
from typing import Final

from shared.errors import SettingsError


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number))


ACTIONS: Final[Mapping[str, Callable[[], None]]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(70),
    "eio": lambda: _raise(errno.EIO),
    "enospc": lambda: _raise(errno.ENOSPC),
}


def hit(name: str) -> None:
    """Do what was asked for this point, if anything was."""
    if name not in _armed:
        return
    action, arrivals_left = _armed[name]
    if arrivals_left > 1:
        _armed[name] = action, arrivals_left - 1
        return
    del _armed[name]
    ACTIONS[action]()


def arm(text: str) -> None:
    """Replace what is armed by what `text` says, in the form of LORAD_FAILPOINT; SettingsError."""
    armed = {}
    for item in filter(None, text.split(",")):
        name, _, rest = item.partition(":")
        action, _, count = rest.partition(":")
        if action not in ACTIONS or not (count or "1").isdecimal():
            raise SettingsError(f"LORAD_FAILPOINT={item!r}: needed is point:action or point:action:count, "
                                f"action one of {', '.join(ACTIONS)}")  # fmt: skip
        armed[name] = action, int(count or "1")
    _armed.clear()
    _armed.update(armed)


_armed: dict[str, tuple[str, int]] = {}
arm(os.environ.get("LORAD_FAILPOINT", ""))
