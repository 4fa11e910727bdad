"""Peak memory of a real training beside the estimate: `python -m benchmarks.memory MODEL_DIRECTORY`.

Each row is a process of its own, which trains two steps of one sample of so many tokens; its peak resident size is
read from the kernel. The last column is what is kept for each token and feature; the constants that should give it are
in worker/training/memory.py: the first alone without adapters, both together with one on all linear layers.
Linux only: /proc/self/clear_refs forgets the peak of loading.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from shared.specs import LoraSpec, Order, TrainSpec
from worker.base_model import load_base_model
from worker.training import memory
from worker.training.engine import TrainingEngine, TrainingJob

ROWS = [(dtype, tokens, targets) for dtype in ("float32", "bfloat16") for tokens, targets in
        [(256, "attention"), (1024, "attention"), (1024, "all-linear")]]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a safetensors directory, as in models/ of the data directory")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        measure(arguments.model, *ROWS[int(arguments.row)])
        return
    print("dtype     tokens targets      peak MiB  estimate MiB  kept/T/F")
    for row in range(len(ROWS)):
        command = [sys.executable, "-m", "benchmarks.memory", str(arguments.model), "--row", str(row)]
        subprocess.run(command, check=True)


def measure(model: Path, dtype: str, num_tokens: int, targets: str) -> None:
    """Print one row."""
    base = load_base_model(model, name="base", digest="", device="cpu", dtype=dtype)  # type: ignore[arg-type]
    lora = LoraSpec(target_modules=targets)  # type: ignore[arg-type]
    spec = TrainSpec(lora=lora, batch_size=1, max_steps=2, max_seq_len=num_tokens, train_on="all")
    engine = TrainingEngine(base, max_tokens=num_tokens)
    Path("/proc/self/clear_refs").write_text("5")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write(json.dumps({"text": "lorem ipsum dolor sit amet " * num_tokens}) + "\n")
        file.flush()
        job = TrainingJob(
            job_id="ftjob-1", spec=spec, train_path=Path(file.name), checkpoint_due=lambda: False,
            save_checkpoint=lambda *_: None, on_event=lambda *_: None, on_step=lambda _: None,
            order=lambda: Order.GO_ON,
        )  # fmt: skip
        engine.submit(job).result()
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10
    engine.close()
    sizes, adapter, as_dtype = (
        memory.ModelSizes.of(base.model), memory.AdapterSizes.of(base.model, lora), getattr(torch, dtype)
    )  # fmt: skip

    def estimate(longest: int) -> int:
        return memory.training_bytes(sizes, adapter, dtype=as_dtype, longest=longest, batch_size=1, max_tokens=longest)

    per_token = (peak - estimate(0)) / num_tokens / as_dtype.itemsize / sizes.num_features
    row = f"{dtype:<9} {num_tokens:>6} {targets:<11} {peak >> 20:>9,} {estimate(num_tokens) >> 20:>13,}"
    print(f"{row} {per_token:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
