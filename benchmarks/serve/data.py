"""Prompts and adapters: GSM8K's questions where they lie, else sixteen of our own; adapters as training leaves them."""

import json
import shutil
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import publish
from benchmarks.base import unpack_base
from benchmarks.serve.plan import FAMILIES, Plan, adapter_names

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE: Final = "valid-200.jsonl"
DEFAULT: Final = Path("..") / "shared" / "data" / "gsm8k"
"""Beside the repository; it is not part of it."""
BUNDLED: Final = Path(__file__).with_name("prompts.txt")


@dataclass(frozen=True)
class Prompts:
    """Users' messages, and what to call them in the results."""

    name: str
    texts: list[str]


def find(directory: Path | None, root: Path, *, count: int) -> Prompts:
    """`count` prompts from GSM8K in `directory` or in the default place, else those that come with the benchmark.

    Exits with one clear line if a directory was given that does not hold it.
    """
    path = (directory or root / DEFAULT) / FILE
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()[:count]
        return Prompts("questions of GSM8K", [json.loads(line)["question"] for line in lines])
    if directory is not None:
        sys.exit(f"DATA={directory} lacks {FILE} (JSON Lines with `question`)")
    print(f"GSM8K is not at {DEFAULT}; DATA=dir names another place. Going on with bundled prompts.", file=sys.stderr)
    return Prompts("bundled prompts", BUNDLED.read_text(encoding="utf-8").splitlines()[:count])


def version_id(name: str) -> str:
    """The id under which the store holds the adapter of this name."""
    return f"adv-{sha256(name.encode()).hexdigest()[:32]}"


def adapter_path(work: Path, name: str) -> Path:
    """Where the adapter of this name lies, in the layout of a data directory."""
    return work / "store" / "adapters" / version_id(name)


def read_prompts(work: Path) -> list[list[int]]:
    """The token ids of each prompt."""
    return json.loads((work / "prompts.json").read_text())


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """The base model, the prompts' tokens and the store, below the work directory; what is there already stays.

    The prompts' tokens are those of a chat, by the base's own template.
    """
    import torch

    from worker.base_model import load_base_model

    plan, work = Plan(**request["plan"]), Path(request["work"])
    base = load_base_model(unpack_base(work), name="base", digest="", device="cpu", dtype="float32")

    def tokens(text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        return base.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]

    prompts = [tokens(text) for text in request["prompts"]]
    (work / "prompts.json").write_text(json.dumps(prompts))
    made_as, note = json.dumps([plan.seed, plan.update_shares]), work / "store" / "made-as.json"
    if not note.is_file() or note.read_text() != made_as:
        shutil.rmtree(work / "store", ignore_errors=True)
        (work / "store" / "adapters").mkdir(parents=True)
        note.write_text(made_as)
    norms = {path: float(layer.weight.norm()) for path, layer in base.model.named_modules() if _is_linear(layer)}
    names = adapter_names(plan.store_size)
    for name in names:
        if not adapter_path(work, name).is_dir():
            dice = torch.Generator().manual_seed(int(sha256(f"{plan.seed} {name}".encode()).hexdigest()[:12], 16))
            _write(work, name, base.model, norms, plan.update_shares, dice)
    processor = torch.cuda.get_device_name() if plan.device == "cuda" else publish.processor()
    return {"num_adapters": len(names), "prompt_tokens": [len(ids) for ids in prompts], "processor": processor}


def _write(
    work: Path, name: str, model: "nn.Module", norms: dict[str, float], shares: dict[str, float], dice: Any
) -> None:
    """One adapter: A as it is initialised, B normal, scaled so that the update has the plan's share of W's norm."""
    import torch

    from shared.store.durable import inventory
    from worker.lora.format import write_adapter
    from worker.lora.spec import AdapterSpec, LoadedAdapter
    from worker.lora.targets import resolve_targets

    family, number = name.split("-")
    targets, rank = FAMILIES[family].targets, FAMILIES[family].rank(int(number))
    spec = AdapterSpec(r=rank, alpha=2.0 * rank, target_modules=targets)
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for path in resolve_targets(model, targets):
        num_out, num_in = model.get_submodule(path).weight.shape
        a_RI = (torch.rand(rank, num_in, generator=dice) * 2 - 1) / num_in**0.5
        b_OR = torch.randn(num_out, rank, generator=dice)
        share = float(torch.linalg.matrix_norm(b_OR @ a_RI)) * spec.scaling(path) / norms[path]
        tensors[path] = a_RI, b_OR * (shares[family] / share)
    place = adapter_path(work, name)
    part = place.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    write_adapter(part, LoadedAdapter(spec=spec, tensors=tensors), base_model_name="base")
    (part / "manifest.json").write_text(json.dumps({"files": inventory(part)}))
    part.rename(place)


def _is_linear(layer: Any) -> bool:
    import torch

    return isinstance(layer, torch.nn.Linear)
