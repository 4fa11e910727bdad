"""Freed memory stays in the process: measured in a process of its own, since the setting is for good."""

import subprocess
import sys

import pytest

PAGES_TOUCHED_AGAIN = """
import resource, sys, threading, torch
from worker.kernels.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("unsupported")

def touch():
    torch.ones(1 << 24)  # 64 MiB

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def in_thread():
    for _ in range(12):  # until freed blocks have merged to ones that hold an aligned buffer
        touch()
    before = faults()
    for _ in range(4):
        touch()
    print(faults() - before)

thread = threading.Thread(target=in_thread)
thread.start()
thread.join()
"""


def fresh_pages(mode: str) -> int:
    """Page faults of filling 64 MiB four more times, in a thread, as the engine computes in one."""
    ran = subprocess.run(
        [sys.executable, "-c", PAGES_TOUCHED_AGAIN, mode], capture_output=True, text=True, timeout=120, check=False
    )
    if "unsupported" in ran.stderr:
        pytest.skip("this C library has no mallopt")
    return int(ran.stdout)


def test_freed_memory_is_used_again() -> None:
    """A buffer of the size of one that was freed takes hardly any fresh pages; unset, it takes all."""
    assert fresh_pages("keep") < 100
    assert fresh_pages("default") > 4 * 16  # all pages again, of 4 KiB or, where the kernel prefers that, of 2 MiB
