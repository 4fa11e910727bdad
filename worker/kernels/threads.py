"""Who may compute on several cores at once: one thread of a process, the one that owns the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_core() -> Iterator[None]:
    """Inside, torch operations of the calling thread use one core; afterwards as many as before.

    For what a thread computes before another takes the model over. libgomp keeps a team of waiting threads for every
    thread that ever computed on several cores, and counts them: with more of them than there are processors, nobody
    waits for the next operation by spinning any more, and each of the hundreds of operations of a step costs a wake-up.
    Measured on two cores: a step of 16 rows takes 33 to 39 ms after the model was loaded by another thread on both,
    and 24 ms else. Source: libgomp's manual, GOMP_SPINCOUNT.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
