"""Ranks and alphas of single modules: asked for in a LoraSpec, trained, written and read back; PEFT agrees."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from shared.errors import UnknownTarget
from tests.worker.lora.conftest import Subject, add_trained
from worker.lora import AdapterManager, LoraSpec, read_adapter

pytestmark = [
    # PEFT 0.21.2 asks for an attribute that Transformers 5.24 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT says that it sets fan_in_fan_out by itself for Conv1D, where its own config left it at the default.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"),
]

# Rounding only: PEFT multiplies by s after B, we do before; logits here are of the order of 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def patterned(subject: Subject, **changes: object) -> LoraSpec:
    """The first target has rank 2 and alpha 3, but rank 6 and alpha 1 in block 0, whose key comes first."""
    deep = next(n for n, _ in subject.model.named_modules() if ".0." in n and n.endswith(f".{subject.targets[0]}"))
    first, second = deep.partition(".0.")[2], subject.targets[0]
    return subject.spec(
        rank_pattern={f"0.{first}": 6, second: 2}, alpha_pattern={f"0.{first}": 1.0, second: 3.0}, **changes
    )


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_the_patterns_we_save(subject: Subject, tmp_path: Path, use_rslora: bool) -> None:
    """With patterns PEFT gives our logits; they are neither the base's nor those of one rank and alpha for all."""
    base, bare = subject.logits(), copy.deepcopy(subject.model)
    spec = patterned(subject, use_rslora=use_rslora)
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", spec)
    manager.activate("math")
    manager.save("math", tmp_path, base_model_name="tiny/base")

    theirs = PeftModel.from_pretrained(bare, tmp_path).eval()
    result = theirs.load_adapter(tmp_path, "again")

    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    torch.testing.assert_close(subject.logits(theirs), subject.logits(), **CLOSE)
    assert not torch.allclose(subject.logits(), base, atol=1e-2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {}}))
    manager.load("one alpha", tmp_path)
    ours = subject.logits()
    manager.activate("one alpha")
    assert not torch.allclose(subject.logits(), ours, atol=1e-2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_patterned_spec_is_shaped_as_by_peft(subject: Subject, use_rslora: bool) -> None:
    """Every module gets the A, B and scale that PEFT gives it for the same r, alpha and patterns."""
    spec = patterned(subject, use_rslora=use_rslora)
    config = LoraConfig(
        r=spec.r, lora_alpha=int(spec.alpha), target_modules=subject.targets, use_rslora=use_rslora,
        rank_pattern=spec.rank_pattern, alpha_pattern=spec.alpha_pattern,
    )  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(subject.model), config)
    manager = AdapterManager(subject.model)
    paths = manager.add("math", spec)

    ours = {path: manager.parameters("math")[f"{path}.lora_A"].shape for path in paths}
    layers = {path: theirs.get_submodule(f"base_model.model.{path}") for path in paths}
    assert ours == {path: layer.lora_A["default"].weight.shape for path, layer in layers.items()}
    assert {path: manager.spec("math").scaling(path) for path in paths} == pytest.approx(
        {path: layer.scaling["default"] for path, layer in layers.items()}
    )
    assert len(set(ours.values())) > 1


def test_patterns_survive_our_files(subject: Subject, tmp_path: Path) -> None:
    """Read back, an adapter has the same patterns in the same order and the same logits, bit for bit."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", patterned(subject))
    manager.activate("math")
    logits = subject.logits()
    manager.save("math", tmp_path, base_model_name="tiny/base")

    manager.load("back", tmp_path)
    manager.activate("back")

    assert torch.equal(subject.logits(), logits)
    assert list(manager.spec("back").rank_pattern.items()) == list(manager.spec("math").rank_pattern.items())


def test_the_first_pattern_that_matches_counts(llama: Subject, tmp_path: Path) -> None:
    """A general key before a special one wins, also after the file was written: keys are not sorted."""
    spec = llama.spec(rank_pattern={"q_proj": 2, "0.self_attn.q_proj": 3})
    manager = AdapterManager(llama.model)
    manager.add("math", spec)
    manager.save("math", tmp_path, base_model_name="tiny/base")

    back = read_adapter(tmp_path)

    assert {a_RI.shape[0] for path, (a_RI, _) in back.tensors.items() if path.endswith("q_proj")} == {2}
    swapped = llama.spec(rank_pattern={"0.self_attn.q_proj": 3, "q_proj": 2})
    manager.add("swapped", swapped)
    ranks = {len(p) for path, p in manager.parameters("swapped").items() if path.endswith("q_proj.lora_A")}
    assert ranks == {2, 3}


def test_a_pattern_that_matches_nothing_is_refused(llama: Subject) -> None:
    """Every key without an adapted module is named, those of both patterns, and nothing is attached."""
    manager = AdapterManager(llama.model)
    spec = llama.spec(rank_pattern={"q_proj": 2, "up_proj": 4, "proj": 4}, alpha_pattern={"5.self_attn.q_proj": 1.0})

    with pytest.raises(UnknownTarget) as raised:
        manager.add("math", spec)

    assert raised.value.message == (
        "rank_pattern: 'up_proj', 'proj' match; alpha_pattern: '5.self_attn.q_proj' match no adapted module;"
        " adapted are q_proj, v_proj, down_proj"
    )
    assert raised.value.param == "lora.rank_pattern"
    assert manager.list() == []
