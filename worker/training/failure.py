"""What an exception of torch means for a job, and letting go of what its traceback holds."""

import traceback
from typing import TypeVar

import torch

from shared.errors import TrainingFailed

E = TypeVar("E", bound=BaseException)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or the CPU; torch has no class of its own for all of them."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = str(error)
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in told
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator: can't allocate memory" in told or "CUBLAS_STATUS_ALLOC_FAILED" in told
    )


def is_device_broken(error: BaseException) -> bool:
    """Whether the error stays: after, say, an illegal access every call to CUDA fails until the process ends.

    Source: the CUDA runtime's error codes, "the process must be terminated and relaunched".
    """
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def as_told(error: BaseException) -> BaseException:
    """The error to end a job with: TrainingFailed (out_of_memory) for memory, since another try would end likewise."""
    if not is_out_of_memory(error):
        return error
    return TrainingFailed(
        "the adapter and its optimizer do not fit into memory beside the base model; use a lower rank, fewer target"
        " modules, a smaller base model, or a machine with more memory",
        code="out_of_memory",
    )


def sample_too_large(num_tokens: int) -> TrainingFailed:
    """The error of a job with a sample that does not fit into memory even alone."""
    return TrainingFailed(
        f"one sample of {num_tokens} tokens does not fit into memory; use a smaller max_seq_len, fewer target modules,"
        " a smaller base model, or a machine with more memory",
        code="out_of_memory",
    )


def without_frames(error: E) -> E:
    """The error, its traceback as a note of text: the frames themselves, which an error holds for as long as somebody
    keeps it, keep runs and tensors alive."""
    if error.__traceback__ is not None and not hasattr(error, "__notes__"):
        error.add_note("".join(traceback.format_exception(error)))
    reason: BaseException | None = error
    while reason is not None:
        reason.__traceback__ = None
        reason = reason.__cause__ or reason.__context__
    return error
