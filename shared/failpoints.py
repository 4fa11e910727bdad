"""Named points at which a test makes this process crash, stop or meet an error.

`LORAD_FAILPOINT=publish.before_rename:stop` acts at the first arrival at that point; `...:stop:3` at the third. Several
are separated by commas. Unset, as in production, a point costs one look into an empty dictionary.

Actions: `kill` and `stop` are SIGKILL and SIGSTOP to this very process, `exit` ends it at once, `eio` and `enospc`
raise the OSError, `memory` raises MemoryError.

    submit.before_commit      a job and the answer kept for its key are written, in the transaction that makes them
    submit.after_commit       the job is queued, no doorbell has rung for it
    job.claimed               the trainer owns a job and has done nothing for it
    train.step                after an optimizer step, on the engine's thread
    checkpoint.written        the checkpoint's files are written, none is durable
    adapter.before_fsync      the adapter's files are written, none is durable
    publish.before_fsync      each file and directory of a publication (checkpoint, adapter, base), before its fsync
    publish.before_fsync_dir  each directory of it, before that
    adapter.before_rename     the adapter and its manifest are durable under tmp
    publish.before_rename     each publication, right before its rename
    publish.after_rename      ... and right after, before the fsync of the parent
    adapter.published         the directory has its final name, no row names it
    publish.before_commit     before the transaction that makes version and success
    publish.in_transaction    in it, before its COMMIT
    publish.after_commit      after it
"""

import errno
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Final

from shared.errors import SettingsError


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number))


def _run_out_of_memory() -> None:
    raise MemoryError("as a failpoint asked")


ACTIONS: Final[Mapping[str, Callable[[], None]]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    # To this thread, not to the process: else another thread may take it, and this one goes on until it does.
    "stop": lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP),
    "exit": lambda: os._exit(70),
    "eio": lambda: _raise(errno.EIO),
    "enospc": lambda: _raise(errno.ENOSPC),
    "memory": _run_out_of_memory,
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
