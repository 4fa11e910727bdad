"""AdapterManager on whole models: what it changes, and what it leaves alone."""

import pytest
import torch
from torch import Tensor, nn

from shared.errors import NotFound, StateConflict, UnknownTarget
from tests.worker.lora.conftest import Subject, add_trained
from worker.lora import AdapterManager, LoRALinear, LoraSpec


def tensors(manager: AdapterManager, name: str) -> dict[str, Tensor]:
    return {path: parameter.detach().clone() for path, parameter in manager.parameters(name).items()}


def test_a_new_adapter_changes_nothing(subject: Subject) -> None:
    """B starts at zero, so the active new adapter gives the base's logits bit for bit."""
    base = subject.logits()
    manager = AdapterManager(subject.model)

    manager.add("math", subject.spec(), seed=0)
    manager.activate("math")

    assert torch.equal(subject.logits(), base)


def test_a_trained_adapter_acts_only_while_active(subject: Subject) -> None:
    """Activated it changes the logits, deactivated they are the base's bit for bit."""
    base = subject.logits()
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", subject.spec())
    assert torch.equal(subject.logits(), base)

    manager.activate("math")
    assert not torch.allclose(subject.logits(), base, atol=1e-2)

    manager.deactivate()
    assert torch.equal(subject.logits(), base)


def test_a_then_b_then_a(subject: Subject) -> None:
    """Switching to another adapter and back gives the first one's logits bit for bit."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "a", subject.spec(), seed=1)
    add_trained(manager, "b", subject.spec(r=2), seed=2)

    manager.activate("a")
    first = subject.logits()
    manager.activate("b")
    other = subject.logits()
    manager.activate("a")

    assert torch.equal(subject.logits(), first)
    assert not torch.allclose(other, first, atol=1e-2)


def test_the_seed_decides_a(subject: Subject) -> None:
    """The same seed gives the same A whatever was added before; another seed another A."""
    manager = AdapterManager(subject.model)
    manager.add("one", subject.spec(), seed=7)
    manager.add("other", subject.spec(), seed=8)
    manager.add("again", subject.spec(), seed=7)
    one, other, again = (tensors(manager, name) for name in ("one", "other", "again"))

    assert all(torch.equal(one[path], again[path]) for path in one)
    assert not any(torch.equal(one[path], other[path]) for path in one if path.endswith("lora_A"))


def test_without_a_seed_adapters_differ(subject: Subject) -> None:
    """Two adapters added without a seed do not share their A."""
    manager = AdapterManager(subject.model)
    manager.add("one", subject.spec())
    manager.add("two", subject.spec())

    one, two = tensors(manager, "one"), tensors(manager, "two")
    assert not any(torch.equal(one[path], two[path]) for path in one if path.endswith("lora_A"))


def test_the_global_generator_is_left_alone(subject: Subject) -> None:
    """Adding an adapter and running it with dropout draws nothing from torch's global generator."""
    before = torch.get_rng_state()
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", subject.spec(dropout=0.5))
    manager.train(True)
    manager.activate("math")
    subject.logits()

    assert torch.equal(torch.get_rng_state(), before)


def test_adding_disturbs_no_other_adapter(subject: Subject) -> None:
    """A second adapter on more modules leaves the first one's tensors, logits and flags as they were."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "a", subject.spec(), seed=1)
    manager.set_trainable("a", False)
    manager.activate("a")
    logits, weights = subject.logits(), tensors(manager, "a")

    add_trained(manager, "b", subject.spec(target_modules="all-linear", r=2), seed=2)

    assert torch.equal(subject.logits(), logits)
    assert all(torch.equal(weights[path], parameter) for path, parameter in manager.parameters("a").items())
    assert not any(parameter.requires_grad for parameter in manager.parameters("a").values())


def test_removing_disturbs_no_other_adapter(subject: Subject) -> None:
    """What is left after removing an adapter computes what it computed before."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "a", subject.spec(), seed=1)
    add_trained(manager, "b", subject.spec(target_modules="all-linear"), seed=2)
    manager.activate("a")
    logits = subject.logits()

    manager.remove("b")

    assert torch.equal(subject.logits(), logits)
    wrapped = [path for path, module in subject.model.named_modules() if isinstance(module, LoRALinear)]
    assert sorted(f"{path}.lora_A" for path in wrapped) == sorted(
        path for path in manager.parameters("a") if path.endswith("A")
    )


def test_removing_the_last_adapter_restores_the_model(subject: Subject) -> None:
    """The very module objects, the state dict with its keys and tensors, and the logits are as before."""
    modules, state = dict(subject.model.named_modules()), subject.model.state_dict()
    base = subject.logits()
    manager = AdapterManager(subject.model)
    add_trained(manager, "a", subject.spec(), seed=1)
    add_trained(manager, "b", subject.spec(target_modules="all-linear"), seed=2)
    assert list(subject.model.state_dict()) != list(state)
    manager.activate("a")

    manager.remove("a")
    manager.remove("b")

    restored = dict(subject.model.named_modules())
    assert list(restored) == list(modules)
    assert all(restored[path] is module for path, module in modules.items())
    assert list(subject.model.state_dict()) == list(state)
    assert torch.equal(subject.logits(), base)


@pytest.mark.parametrize("name", ["math.v2", "math_dv2", "math%2Ev2", "keys", "train", "weight", "q_proj", "ünï cödé"])
def test_any_text_may_be_a_name(llama: Subject, name: str) -> None:
    """Dots, names of module attributes and of modules are fine, and do not run into each other."""
    manager = AdapterManager(llama.model)
    for other in ("math.v2", "math_dv2", "math%2Ev2"):
        if other != name:
            manager.add(other, llama.spec())
    base = llama.logits()

    add_trained(manager, name, llama.spec())
    manager.activate(name)
    assert not torch.allclose(llama.logits(), base, atol=1e-2)

    manager.remove(name)
    assert name not in manager
    assert torch.equal(llama.logits(), base)


def test_list_and_contains(llama: Subject) -> None:
    """The manager names what is attached, in order."""
    manager = AdapterManager(llama.model)
    manager.add("b", llama.spec())
    manager.add("a", llama.spec())

    assert manager.list() == ["b", "a"]
    assert "a" in manager
    assert "c" not in manager


def test_a_taken_name_is_refused(llama: Subject) -> None:
    """Adding under a name in use raises and leaves the adapter that has it."""
    manager = AdapterManager(llama.model)
    add_trained(manager, "math", llama.spec())
    before = tensors(manager, "math")

    with pytest.raises(StateConflict, match="'math' is attached already"):
        manager.add("math", llama.spec(r=2))

    assert all(torch.equal(before[path], parameter) for path, parameter in manager.parameters("math").items())


def test_a_refused_adapter_leaves_nothing(llama: Subject) -> None:
    """After an unknown target the model has its old modules, flags and no name."""
    modules = dict(llama.model.named_modules())
    manager = AdapterManager(llama.model)

    with pytest.raises(UnknownTarget):
        manager.add("math", llama.spec(target_modules=["q_proj", "nowhere"]))

    assert manager.list() == []
    assert dict(llama.model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in llama.model.parameters())


def test_a_second_manager_is_refused(llama: Subject) -> None:
    """Two managers on one model would overrule each other's routing."""
    AdapterManager(llama.model).add("math", llama.spec())

    with pytest.raises(StateConflict, match="another AdapterManager"):
        AdapterManager(llama.model).add("prose", llama.spec())


def test_unknown_names_raise(llama: Subject) -> None:
    """Each operation on a name that is not attached says so."""
    manager = AdapterManager(llama.model)

    for operation in (manager.remove, manager.parameters, manager.snapshot, manager.spec):
        with pytest.raises(NotFound, match="'math' is not attached; there are none"):
            operation("math")


def test_parameters_are_named_and_fp32(subject: Subject) -> None:
    """Keys are module path and half, the order is the model's, each is fp32 also over a bfloat16 base."""
    subject.model.to(torch.bfloat16)
    manager = AdapterManager(subject.model)
    paths = manager.add("math", subject.spec())

    assert list(manager.parameters("math")) == [f"{path}.lora_{half}" for path in paths for half in "AB"]
    assert {parameter.dtype for parameter in manager.parameters("math").values()} == {torch.float32}
    manager.activate("math")
    assert subject.logits().dtype == torch.bfloat16


def test_a_snapshot_is_a_copy(subject: Subject) -> None:
    """What training does later does not reach a snapshot, and a snapshot can be attached again."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", subject.spec())
    manager.activate("math")
    before, snapshot = subject.logits(), manager.snapshot("math")
    with torch.no_grad():
        for parameter in manager.parameters("math").values():
            parameter.zero_()

    manager.load_tensors("again", snapshot)
    manager.activate("again")

    assert torch.equal(subject.logits(), before)


def test_a_model_without_transformers() -> None:
    """The manager works on any torch model, here two layers in a row."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.ones(3, 4)
    base = model(x)
    manager = AdapterManager(model)

    assert manager.add("math", LoraSpec(r=2, alpha=4, target_modules="all-linear"), seed=0) == ["0", "2"]
    with torch.no_grad():
        manager.parameters("math")["2.lora_B"].fill_(1.0)
    with manager.routed_rows(["math", None, "math"]):
        mixed = model(x)

    assert torch.equal(mixed[1], base[1])
    assert not torch.allclose(mixed[0], base[0])
