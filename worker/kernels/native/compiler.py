"""Compiles the C files beside it for the processor that they will run on."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shared.errors import LoradError

_SOURCES: Final = sorted(Path(__file__).parent.glob("*.c"))
_COMPILE_S: Final = 60.0
"""No compiler takes longer that is worth waiting for; it usually takes two seconds."""
COMPILERS: Final = ("cc", "gcc", "clang")
_FLAGS: Final = (
    "-std=c11", "-O3", "-shared", "-fPIC", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-Wno-psabi", "-Wl,-Bsymbolic",
)  # fmt: skip
_FOR_THIS_PROCESSOR: Final = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",))
"""The first of these sets that the compiler knows is taken."""


class CannotCompile(LoradError):
    """There is no C compiler that compiles the kernels."""

    code = "cannot_compile"


def compile_kernels(
    directory: Path, *, bfloat16: bool, target: Sequence[tuple[str, ...]] = _FOR_THIS_PROCESSOR
) -> Path:
    """The kernels for one type of element as a shared library in `directory`. Raises CannotCompile.

    The compiler is the first of cc, gcc and clang in the path. Nothing is kept from one process to the next:
    compiling takes about two seconds, and code that lies about would have to be guarded, and told apart by processor.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise CannotCompile(f"there is no C compiler in the path: none of {', '.join(COMPILERS)}")
    library = directory / "kernels.so"
    options = [*_FLAGS, *(["-DBFLOAT16"] if bfloat16 else []), *map(str, _SOURCES), "-o", str(library)]
    said = ""
    for flags in target:
        command = [compiler, *flags, *options]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotCompile(f"{compiler} did not run: {error}") from error
        if ended.returncode == 0:
            return library
        said = said or ended.stderr.strip()
    raise CannotCompile(f"{compiler} did not compile the kernels: {said[:500]}")
