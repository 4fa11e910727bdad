"""The compiled kernels, for tests that are about them."""

import shutil

import pytest
import torch

from worker.kernels.native import step_kernels as module
from worker.kernels.native.compiler import COMPILERS
from worker.kernels.native.step_kernels import StepKernels, step_kernels


def kernels_or_skip(dtype: torch.dtype = torch.float32) -> StepKernels:
    """Skips the test where none can be; where a compiler and threads are there and kernels are not, it fails."""
    if not any(map(shutil.which, COMPILERS)) or module._parallel() is None:
        pytest.skip("needs a C compiler, and an OpenMP library that torch has loaded")
    kernels = step_kernels(dtype)
    assert kernels is not None, "the kernels did not compile, or failed their trial: see the log"
    return kernels
