"""Training on from an adapter that was made before."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.errors import IncompatibleAdapter, StateConflict, UnknownTarget
from tests.worker.lora.conftest import Subject, add_trained
from worker.lora import AdapterManager, LoadedAdapter, LoraSpec, read_adapter

PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5.0}, "use_rslora": True}


def trained(subject: Subject, directory: Path, spec: LoraSpec) -> LoadedAdapter:
    """An adapter as the store gives it back."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "first", spec)
    manager.save("first", directory, base_model_name="tiny/base")
    manager.remove("first")
    return read_adapter(directory)


@pytest.mark.parametrize("changes", [{}, {"target_modules": "all-linear"}, {"use_rslora": True, "alpha": 3.5}])
def test_it_starts_where_the_other_ended(subject: Subject, tmp_path: Path, changes: dict[str, object]) -> None:
    """Before the first step the logits are the first adapter's, bit for bit, and not the base's."""
    spec, base = subject.spec(**changes), subject.logits()
    adapter = trained(subject, tmp_path, spec)
    manager = AdapterManager(subject.model)
    manager.load_tensors("served", adapter)
    manager.activate("served")
    served = subject.logits()

    paths = manager.add_from("second", adapter, spec)
    manager.activate("second")

    assert torch.equal(subject.logits(), served)
    assert not torch.allclose(served, base, atol=1e-2)
    assert paths == list(dict.fromkeys(path.rpartition(".")[0] for path in manager.parameters("second")))


def test_every_one_of_its_tensors_learns(subject: Subject, tmp_path: Path) -> None:
    """All of A and B get gradients, a step moves them, and what they were read from stays as it was."""
    spec = subject.spec()
    adapter = trained(subject, tmp_path, spec)
    before = copy.deepcopy(dict(adapter.tensors))
    manager = AdapterManager(subject.model)
    manager.add_from("second", adapter, spec)
    manager.activate("second")
    parameters = manager.parameters("second")
    assert manager.num_trainable() == sum(p.numel() for p in parameters.values()) > 0

    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    subject.model(subject.ids_BT, labels=subject.ids_BT, use_cache=False).loss.backward()
    optimizer.step()

    after = manager.snapshot("second").tensors
    assert all(not torch.equal(after[p][half], before[p][half]) for p in before for half in (0, 1))
    assert all(torch.equal(adapter.tensors[p][half], before[p][half]) for p in before for half in (0, 1))


def test_the_dropout_is_the_new_specs(subject: Subject, tmp_path: Path) -> None:
    """Dropout and its seed come from the new job; the shape, its patterns too, is published again."""
    adapter = trained(subject, tmp_path, subject.spec(dropout=0.0))

    def in_training(seed: int) -> Tensor:
        manager = AdapterManager(subject.model)
        manager.add_from("second", adapter, subject.spec(dropout=0.5), seed=seed)
        manager.activate("second")
        manager.train(True)
        logits = subject.logits()
        manager.remove("second")
        return logits

    assert torch.equal(in_training(1), in_training(1))
    assert not torch.equal(in_training(1), in_training(2))


def test_what_is_published_again_keeps_the_shape(llama: Subject, tmp_path: Path) -> None:
    """Patterns, rsLoRA and the new dropout are in the files of the continued adapter."""
    adapter = trained(llama, tmp_path / "first", llama.spec(**PATTERNS))
    manager = AdapterManager(llama.model)
    manager.add_from("second", adapter, llama.spec(**PATTERNS, dropout=0.25))
    manager.save("second", tmp_path / "second", base_model_name="tiny/base")

    again = read_adapter(tmp_path / "second")

    assert (again.spec.rank_pattern, again.spec.alpha_pattern) == ({"v_proj": 2}, {"v_proj": 5.0})
    assert (again.spec.use_rslora, again.spec.dropout) == (True, 0.25)
    assert all(
        torch.equal(again.tensors[p][half], adapter.tensors[p][half]) for p in adapter.tensors for half in (0, 1)
    )


@pytest.mark.parametrize(
    ("changes", "problems", "says"),
    [
        ({"r": 8, "alpha": 16.0}, 12, r"q_proj.lora_A is \(4, 32\), the model needs \(8, 32\)"),
        ({"alpha": 16.0}, 6, r"q_proj is scaled by 2, the new shape says 4"),
        ({"use_rslora": True}, 6, r"q_proj is scaled by 2, the new shape says 4"),
        ({"alpha_pattern": {"v_proj": 1.0}}, 2, r"v_proj is scaled by 2, the new shape says 0.25"),
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4.0}}, 4, r"v_proj.lora_B is \(16, 4\)"),
        ({"target_modules": ["q_proj", "v_proj"]}, 2, r"down_proj is not among the target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}, 2, r"o_proj: lora_A and lora_B are missing"),
    ],
)
def test_another_shape_is_refused(
    llama: Subject, tmp_path: Path, changes: dict[str, object], problems: int, says: str
) -> None:
    """Whatever differs is counted in one error, module by module, and nothing is attached."""
    adapter = trained(llama, tmp_path, llama.spec())
    manager = AdapterManager(llama.model)

    with pytest.raises(IncompatibleAdapter, match=says) as raised:
        manager.add_from("second", adapter, llama.spec(**changes))

    assert f"{problems} modules -- " in raised.value.message
    assert raised.value.param == "training.init_from"
    assert manager.list() == []


def test_weights_of_another_base_are_refused(llama: Subject, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """OPT has other layers than Llama: the weights cannot be a start there."""
    adapter = trained(llama, tmp_path, llama.spec())
    manager = AdapterManager(request.getfixturevalue("tiny_opt"))

    with pytest.raises(IncompatibleAdapter, match="cannot start from these weights on 'OPTForCausalLM'"):
        manager.add_from("second", adapter, llama.spec(target_modules=["q_proj", "v_proj"]))


def test_a_taken_name_or_an_unknown_target_is_refused(llama: Subject, tmp_path: Path) -> None:
    """As for a fresh adapter."""
    adapter = trained(llama, tmp_path, llama.spec())
    manager = AdapterManager(llama.model)
    manager.add("second", llama.spec())

    with pytest.raises(StateConflict):
        manager.add_from("second", adapter, llama.spec())
    with pytest.raises(UnknownTarget):
        manager.add_from("third", adapter, llama.spec(target_modules=["nowhere"]))
