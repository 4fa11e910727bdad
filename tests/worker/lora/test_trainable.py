"""What training through the manager reaches: gradients, freezing, counts and dropout."""

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from tests.worker.lora.conftest import Subject, add_trained
from worker.lora import AdapterManager, LoraSpec
from worker.lora.layer import LoRALinear


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


def test_dropout_of_a_segment_depends_on_its_seed_only(subject: Subject) -> None:
    """A segment with a seed drops the same wherever it stands and whatever was drawn before; another seed, others."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "math", subject.spec(dropout=0.5))
    manager.train(True)
    layer = next(m for m in subject.model.modules() if isinstance(m, LoRALinear))
    x_TI = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3))
    other_TI = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(4))

    def through(parts: list[tuple[Tensor, int]]) -> list[Tensor]:
        lengths = [len(part) for part, _ in parts]
        route = manager.routed_segments([("math", n) for n in lengths], seeds=[seed for _, seed in parts])
        with route, torch.no_grad():
            return list(layer(torch.cat([part for part, _ in parts])).split(lengths))

    alone, behind, reseeded = through([(x_TI, 7)])[0], through([(other_TI, 8), (x_TI, 7)])[1], through([(x_TI, 9)])[0]

    torch.testing.assert_close(behind, alone)
    assert not torch.allclose(reseeded, alone)


def test_layers_of_an_adapter_drop_differently(subject: Subject) -> None:
    """One seed for a whole forward does not give every layer the same mask."""
    manager = AdapterManager(subject.model)
    manager.add("math", subject.spec(dropout=0.5), seed=0)
    manager.train(True)
    masks = [
        module.update("math").kept((6, 16), torch.device("cpu"), [(6, 1)])
        for module in subject.model.modules()
        if isinstance(module, LoRALinear)
    ]

    assert len({tuple(mask.flatten().tolist()) for mask in masks if mask is not None}) == len(masks) > 1


def test_the_seed_decides_dropout(subject: Subject) -> None:
    """Without seeds for segments, two adapters of one seed drop the same, and one of another seed does not."""
    masks = []
    for seed in (5, 5, 6):
        manager = AdapterManager(subject.model)
        manager.add("math", subject.spec(dropout=0.5), seed=seed)
        manager.train(True)
        layer = next(m for m in subject.model.modules() if isinstance(m, LoRALinear))
        masks.append(layer.update("math").kept((20, 20), torch.device("cpu")))
        manager.remove("math")

    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


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
