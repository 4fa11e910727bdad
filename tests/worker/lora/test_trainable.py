"""What training through the manager reaches: gradients, freezing, counts and dropout."""

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from tests.worker.lora.conftest import Subject, add_trained
from worker.lora import AdapterManager, LoraSpec


def test_the_base_is_frozen_and_thawed_as_it_was(subject: Subject) -> None:
    """Every base parameter is frozen while an adapter is attached; then each requires gradients as before."""
    parameters = dict(subject.model.named_parameters())
    for i, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(i % 2 == 0)
    manager = AdapterManager(subject.model)

    manager.add("math", subject.spec())
    assert not any(parameter.requires_grad for parameter in parameters.values())
    manager.remove("math")

    assert [parameter.requires_grad for parameter in parameters.values()] == [
        i % 2 == 0 for i in range(len(parameters))
    ]


def test_gradients_reach_only_trainable_adapters(subject: Subject) -> None:
    """In a batch of a trainable and a frozen adapter and the base, only the trainable A and B get gradients."""
    manager = AdapterManager(subject.model)
    for i, name in enumerate(("learns", "stays")):
        add_trained(manager, name, subject.spec(), seed=i)
    manager.set_trainable("stays", False)

    with manager.routed_rows(["learns", "stays", None]):
        subject.model(subject.ids_BT, use_cache=False).logits.square().mean().backward()

    given = {id(parameter) for parameter in subject.model.parameters() if parameter.grad is not None}
    assert given == {id(parameter) for parameter in manager.parameters("learns").values()}
    assert all(parameter.grad.abs().sum() > 0 for parameter in manager.parameters("learns").values())


def test_mixed_gradients_equal_solo_gradients(subject: Subject) -> None:
    """An adapter's gradients in a mixed batch are those of its row alone, up to rounding."""
    manager = AdapterManager(subject.model)
    for i, name in enumerate(("a", "b")):
        add_trained(manager, name, subject.spec(), seed=i)

    def gradients(names: list[str | None], rows: list[int]) -> tuple[Tensor, ...]:
        with manager.routed_rows(names):
            loss = subject.model(subject.ids_BT[rows], use_cache=False).logits.log_softmax(-1)[..., 3].sum()
        return torch.autograd.grad(loss, list(manager.parameters("a").values()))

    for mixed, solo in zip(gradients(["b", "a", None], [0, 1, 2]), gradients(["a"], [1]), strict=True):
        torch.testing.assert_close(mixed, solo, rtol=1e-4, atol=1e-5)


def test_training_changes_no_base_weight(subject: Subject) -> None:
    """Optimizer steps over all of the model's trainable parameters lower the loss and leave the base bit-equal."""
    manager = AdapterManager(subject.model)
    before = {name: parameter.detach().clone() for name, parameter in subject.model.named_parameters()}
    originals = dict(subject.model.named_parameters())
    manager.add("math", subject.spec(), seed=0)
    manager.activate("math")
    optimizer = torch.optim.AdamW([p for p in subject.model.parameters() if p.requires_grad], lr=0.01)

    losses = []
    for _ in range(10):
        loss = subject.model(subject.ids_BT, labels=subject.ids_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(parameter, before[name]) for name, parameter in originals.items())


def test_opt_125m_has_the_known_counts() -> None:
    """OPT-125M with r = 8 on q_proj and v_proj: 125,534,208 parameters, 294,912 of them (0.23 %) trainable."""
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig())
    model.to_empty(device="cpu")
    model.tie_weights()
    manager = AdapterManager(model)

    manager.add("math", LoraSpec(r=8, alpha=16, target_modules=["q_proj", "v_proj"]))

    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == 125_534_208
    assert manager.num_trainable() == 294_912 == 12 * 2 * 2 * 8 * 768
    assert f"{100 * manager.num_trainable() / total:.2f}" == "0.23"


def test_dropout_resumes_exactly(subject: Subject) -> None:
    """With the dropout state put back, training mode repeats the same logits bit for bit; without, it does not."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", subject.spec(dropout=0.5))
    manager.activate("math")
    manager.train(True)
    state = manager.dropout_state("math")
    first = subject.logits()
    assert not torch.equal(subject.logits(), first)

    manager.set_dropout_state("math", state)

    assert torch.equal(subject.logits(), first)


def test_the_seed_decides_dropout(subject: Subject) -> None:
    """Two adapters of one seed start at the same dropout state, and it is not the one A was drawn from."""
    manager = AdapterManager(subject.model)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        manager.add(name, subject.spec(dropout=0.5), seed=seed)

    assert torch.equal(manager.dropout_state("a"), manager.dropout_state("b"))
    assert not torch.equal(manager.dropout_state("a"), manager.dropout_state("c"))
    assert not torch.equal(manager.dropout_state("a"), torch.Generator().manual_seed(5).get_state())


def test_train_leaves_the_base_in_eval_mode(subject: Subject) -> None:
    """Switching the adapters' dropout on does not switch the base model's own dropout on."""
    manager = AdapterManager(subject.model)
    manager.add("math", subject.spec(dropout=0.5))
    manager.train(True)
    own = [m for m in subject.model.modules() if isinstance(m, nn.Dropout | nn.LayerNorm)]

    assert not subject.model.training
    assert not any(module.training for module in own)


def test_a_loaded_adapter_is_not_trainable(subject: Subject) -> None:
    """Attaching weights to serve them asks for no gradients; set_trainable does."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", subject.spec())
    snapshot, size = manager.snapshot("math"), manager.num_trainable()
    manager.remove("math")

    manager.load_tensors("math", snapshot)
    assert manager.num_trainable() == 0
    manager.set_trainable("math", True)
    assert manager.num_trainable() == size > 0
