"""PEFT as the oracle: what we write it loads, what it writes we load, and the logits agree."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.worker.lora.conftest import Subject, add_trained
from worker.lora import AdapterManager

pytestmark = [
    # PEFT 0.21.2 asks for an attribute that Transformers 5.24 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT says that it sets fan_in_fan_out by itself for Conv1D, where its own config left it at the default.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"),
]

# Rounding only: PEFT multiplies by s after B, we do before; logits here are of the order of 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def peft_adapter(subject: Subject, directory: Path, **changes: object) -> Tensor:
    """Logits of an adapter that PEFT made, with random A and B, after PEFT saved it to `directory`."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": subject.targets} | changes)
    model = get_peft_model(copy.deepcopy(subject.model), config).eval()
    draws = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
    # Not "auto": that asks the Hub about the base model's vocabulary.
    model.save_pretrained(directory, save_embedding_layers=False)
    return subject.logits(model)


SHAPES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "odd scale": {"r": 5, "alpha": 7.5, "dropout": 0.25},
    "all-linear": {"target_modules": "all-linear"},
    "attention": {"target_modules": "attention"},
    "mlp": {"target_modules": "mlp"},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_peft_loads_what_we_save(subject: Subject, tmp_path: Path, changes: dict[str, Any]) -> None:
    """PEFT finds every tensor and no other, and gives our logits, which are not the base's."""
    base, bare = subject.logits(), copy.deepcopy(subject.model)
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", subject.spec(**changes))
    manager.activate("math")
    manager.save("math", tmp_path, base_model_name="tiny/base")

    theirs = PeftModel.from_pretrained(bare, tmp_path).eval()
    result = theirs.load_adapter(tmp_path, "again")

    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    torch.testing.assert_close(subject.logits(theirs), subject.logits(), **CLOSE)
    assert not torch.allclose(subject.logits(), base, atol=1e-2)


PEFT_SHAPES = {
    "plain": {"task_type": "CAUSAL_LM"},
    "no task type": {},
    "rslora": {"use_rslora": True, "r": 5},
    "all-linear": {"target_modules": "all-linear"},
    "other starts": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


@pytest.mark.parametrize("changes", PEFT_SHAPES.values(), ids=PEFT_SHAPES)
def test_we_load_what_peft_saves(subject: Subject, tmp_path: Path, changes: dict[str, Any]) -> None:
    """An adapter that PEFT wrote gives PEFT's logits, which are not the base's."""
    base = subject.logits()
    theirs = peft_adapter(subject, tmp_path, **changes)
    manager = AdapterManager(subject.model)

    manager.load("theirs", tmp_path)
    manager.activate("theirs")

    torch.testing.assert_close(subject.logits(), theirs, **CLOSE)
    assert not torch.allclose(theirs, base, atol=1e-2)


PATTERNS = {
    "rank": {"rank_pattern": {"{0}": 2, "{1}": 3}},
    "alpha": {"alpha_pattern": {"{0}": 3, "{1}": 0.5}},
    "both, rslora": {"rank_pattern": {"{1}": 6}, "alpha_pattern": {"{0}": 1}, "use_rslora": True},
    "first match": {"rank_pattern": {"0.{path}": 2, "{0}": 6}},
}


@pytest.mark.parametrize("changes", PATTERNS.values(), ids=PATTERNS)
def test_patterns_mean_what_they_mean_to_peft(subject: Subject, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Ranks and alphas of single modules give PEFT's logits, and survive being saved by us and loaded by PEFT."""
    bare = copy.deepcopy(subject.model)
    path = next(n for n, _ in subject.model.named_modules() if ".0." in n and n.endswith(subject.targets[0]))
    names = {"path": path.partition(".0.")[2]}
    changes = {
        key: {k.format(*subject.targets, **names): v for k, v in value.items()} if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    theirs = peft_adapter(subject, tmp_path / "theirs", **changes)
    manager = AdapterManager(subject.model)
    manager.load("theirs", tmp_path / "theirs")
    manager.activate("theirs")
    torch.testing.assert_close(subject.logits(), theirs, **CLOSE)

    manager.save("theirs", tmp_path / "ours", base_model_name="tiny/base")
    again = PeftModel.from_pretrained(bare, tmp_path / "ours").eval()

    torch.testing.assert_close(subject.logits(again), theirs, **CLOSE)


def test_a_round_trip_through_peft_keeps_every_bit(subject: Subject, tmp_path: Path) -> None:
    """Saved by us, loaded and saved by PEFT, loaded by us: the very tensors that we had."""
    bare = copy.deepcopy(subject.model)
    manager = AdapterManager(subject.model)
    add_trained(manager, "ours", subject.spec())
    manager.save("ours", tmp_path / "ours", base_model_name="tiny/base")

    theirs = PeftModel.from_pretrained(bare, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    manager.load("back", tmp_path / "theirs")

    ours, back = manager.parameters("ours"), manager.parameters("back")
    assert list(ours) == list(back)
    assert all(torch.equal(ours[path], back[path]) for path in ours)


def test_the_config_has_no_field_unknown_to_peft(llama: Subject, tmp_path: Path) -> None:
    """Every field we write is one of PEFT's, with the type that it writes itself."""
    manager = AdapterManager(llama.model)
    manager.add("math", llama.spec())
    manager.save("math", tmp_path, base_model_name="tiny/base")
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads(json.dumps(LoraConfig(target_modules=["q_proj"]).to_dict(), default=list))

    assert ours.keys() <= theirs.keys()
    same_type = {name for name in ours if type(ours[name]) is type(theirs[name])}
    assert ours.keys() - same_type <= {"base_model_name_or_path", "task_type"}
