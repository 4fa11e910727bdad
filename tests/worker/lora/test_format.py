"""The files: what is in them, and how strictly they are read and fitted to a base model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from shared.errors import AdapterCorrupt, IncompatibleAdapter
from tests.worker.lora.conftest import Subject, add_trained
from worker.lora import AdapterManager, LoraSpec, read_adapter, write_adapter
from worker.lora.format import AdapterFiles, StoredAdapter

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def stored(llama: Subject, tmp_path: Path) -> Path:
    """A directory with a good adapter for the tiny Llama, which is bare again."""
    manager = AdapterManager(llama.model)
    add_trained(manager, "math", llama.spec())
    manager.save("math", tmp_path / "math", base_model_name="tiny/base")
    manager.remove("math")
    return tmp_path / "math"


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def key(path: str, half: str) -> str:
    return f"base_model.model.{path}.lora_{half}.weight"


def refusal(llama: Subject, directory: Path) -> IncompatibleAdapter:
    """The one error that loading raises; the model must be untouched after it."""
    modules = dict(llama.model.named_modules())
    manager = AdapterManager(llama.model)
    with pytest.raises(IncompatibleAdapter) as caught:
        manager.load("math", directory)
    assert dict(llama.model.named_modules()) == modules
    assert manager.list() == []
    return caught.value


def test_the_directory_holds_three_files(stored: Path) -> None:
    """Tensors, config and model card; nothing else, no subfolder."""
    assert sorted(path.name for path in stored.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_tensor_file_is_pefts(stored: Path) -> None:
    """Keys are prefix, module path and half; tensors are fp32; the metadata says 'pt'."""
    with safetensors.safe_open(stored / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    assert shapes[key(Q0, "A")] == (4, 32)
    assert shapes[key(Q0, "B")] == (32, 4)
    assert len(shapes) == 2 * 2 * 3
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_config_is_pefts(stored: Path) -> None:
    """The fields that PEFT and serving engines read, with the values of this adapter."""
    config = json.loads((stored / "adapter_config.json").read_text())

    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "tiny/base"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)
    assert config["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert config["use_dora"] is False
    assert config["init_lora_weights"] is True
    assert config["fan_in_fan_out"] is False


def test_conv1d_is_declared(tiny_gpt2: PreTrainedModel, tmp_path: Path) -> None:
    """For GPT-2, whose layers store (I, O), fan_in_fan_out is true; A and B stay (R, I) and (O, R)."""
    manager = AdapterManager(tiny_gpt2)
    manager.add("math", LoraSpec(r=4, alpha=4, target_modules=["c_attn"]))
    manager.save("math", tmp_path, base_model_name="gpt2")

    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tuple(tensors[key("transformer.h.0.attn.c_attn", "A")].shape) == (4, 32)
    assert tuple(tensors[key("transformer.h.0.attn.c_attn", "B")].shape) == (96, 4)


def test_the_card_names_the_base_safely(llama: Subject, tmp_path: Path) -> None:
    """A base model name cannot end its YAML line and add fields of its own."""
    manager = AdapterManager(llama.model)
    manager.add("math", llama.spec())
    manager.save("math", tmp_path, base_model_name='x\nlicense: "evil')

    card = (tmp_path / "README.md").read_text()
    assert 'base_model: "x\\nlicense: \\"evil"\nlibrary_name: peft\n' in card
    assert "\nlicense:" not in card


def test_the_same_adapter_gives_the_same_bytes(llama: Subject, stored: Path, tmp_path: Path) -> None:
    """Reading and writing again reproduces every file."""
    adapter = read_adapter(stored)
    write_adapter(tmp_path / "again", adapter, base_model_name=adapter.base_model_name)

    for path in stored.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_reading_keeps_nothing_open(llama: Subject, stored: Path) -> None:
    """What was read stays as it was when the file is overwritten: it is no map of the file."""
    adapter = read_adapter(stored)
    before = adapter.tensors[Q0][1].clone()
    path = stored / "adapter_model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)

    assert torch.equal(adapter.tensors[Q0][1], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_fp32(stored: Path, dtype: torch.dtype) -> None:
    """F16 and BF16 tensors are widened, each value exactly."""
    narrow = {k: v.to(dtype) for k, v in load_file(stored / "adapter_model.safetensors").items()}
    change_tensors(stored, lambda tensors: tensors.update(narrow))

    a, _ = read_adapter(stored).tensors[Q0]
    assert a.dtype == torch.float32
    assert torch.equal(a, narrow[key(Q0, "A")].float())


def test_tensors_of_several_dtypes_are_read_wherever_they_begin(stored: Path) -> None:
    """A file of all three dtypes, whose data begins at no multiple of anything, holds the values that it says."""
    path = stored / "adapter_model.safetensors"
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    mixed = {k: v.to(dtypes[i % 3]) for i, (k, v) in enumerate(load_file(path).items())}
    save_file(mixed, path)
    for pad in range(4):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])

        tensors = read_adapter(stored).tensors
        assert all(torch.equal(tensors[p][i], mixed[key(p, "AB"[i])].float()) for p in tensors for i in (0, 1)), pad


def test_the_digest_is_of_both_files_and_checksums_are_held(stored: Path) -> None:
    """It changes with either file; a file with a recorded checksum must have it, and a good one does."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    recorded = {name: hashlib.sha256((stored / name).read_bytes()).hexdigest() for name in names}
    digests = [AdapterFiles(StoredAdapter(stored, recorded)).digest(), AdapterFiles(StoredAdapter(stored)).digest()]
    for name in names:
        before = (stored / name).read_bytes()
        (stored / name).write_bytes(before + b" ")
        digests.append(AdapterFiles(StoredAdapter(stored)).digest())
        with pytest.raises(AdapterCorrupt, match=name):
            AdapterFiles(StoredAdapter(stored, recorded)).digest()
        (stored / name).write_bytes(before)

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_missing_fields_have_pefts_defaults(llama: Subject, stored: Path) -> None:
    """r and lora_alpha are 8 and dropout 0 where the file does not say."""
    path = stored / "adapter_config.json"
    ranks = dict.fromkeys(llama.targets, 4)
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": llama.targets, "rank_pattern": ranks}))

    spec = read_adapter(stored).spec
    assert (spec.r, spec.alpha, spec.dropout, spec.use_rslora) == (8, 8.0, 0.0, False)


def test_every_mismatch_is_in_one_error(llama: Subject, stored: Path) -> None:
    """A module that does not exist, a wrong width, a missing and an untargeted one: all are named together."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        for half in "AB":
            tensors[key("model.layers.9.self_attn.q_proj", half)] = tensors[key(Q0, half)].clone()
            tensors[key("model.layers.1.self_attn.o_proj", half)] = torch.ones((4, 32) if half == "A" else (32, 4))
            del tensors[key("model.layers.1.self_attn.v_proj", half)]
        tensors[key(Q0, "A")] = torch.ones(4, 64)

    change_tensors(stored, spoil)
    error = refusal(llama, stored)

    assert "adapter math does not fit 'LlamaForCausalLM': 4 modules -- " in error.message
    assert f"{Q0}.lora_A is (4, 64), the model needs (4, 32)" in error.message
    assert "model.layers.9.self_attn.q_proj: no such linear module" in error.message
    assert "model.layers.1.self_attn.v_proj: lora_A and lora_B are missing" in error.message
    assert "model.layers.1.self_attn.o_proj is not among the target_modules" in error.message
    assert error.param == "adapter_model"


def test_an_adapter_of_another_base_is_refused(tiny_opt: PreTrainedModel, stored: Path) -> None:
    """An adapter trained on Llama does not attach to OPT."""
    with pytest.raises(IncompatibleAdapter, match="no such linear module"):
        AdapterManager(tiny_opt).load("math", stored)


def test_many_mismatches_are_counted(llama: Subject, stored: Path) -> None:
    """Of very many problems the first are shown and the rest are counted."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        for i in range(50):
            for half in "AB":
                tensors[key(f"extra.{i}", half)] = tensors[key(Q0, half)].clone()

    change_tensors(stored, spoil)

    assert ": 50 modules -- " in refusal(llama, stored).message
    assert refusal(llama, stored).message.endswith("; and 42 more")


def test_an_adapted_head_is_refused(llama: Subject, stored: Path) -> None:
    """Tensors for lm_head do not fit, also where target_modules name it."""
    change_tensors(
        stored,
        lambda t: t.update({key("lm_head", "A"): torch.ones(4, 32), key("lm_head", "B"): torch.ones(259, 4)}),
    )
    change_config(stored, target_modules=[*llama.targets, "lm_head"])

    assert "lm_head is the output head" in refusal(llama, stored).message


UNSUPPORTED = {
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "exclude_modules": ["v_proj"],
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "megatron_core": "evil",
    "megatron_config": {"a": 1},
    "auto_mapping": {"base_model_class": "Popen", "parent_library": "os"},
    "loraga_config": {"cache_file": "/etc/passwd"},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "init_lora_weights": "pissa",
    "a_field_of_tomorrow": 1,
}


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_what_we_do_not_compute_is_refused_by_name(llama: Subject, stored: Path, field: str, value: object) -> None:
    """Each option that would change what the adapter computes is named, not ignored."""
    change_config(stored, **{field: value})

    error = refusal(llama, stored)
    assert f"'{field}' = " in error.message
    assert error.param == "adapter_config"


NEUTRAL = {
    "init_lora_weights": "gaussian",
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"},
    "a_field_of_tomorrow": None,
    "use_field_of_tomorrow": False,
    "config_of_tomorrow": {},
    "revision": "main",
    "peft_version": "0.99.0",
    "task_type": None,
}


@pytest.mark.parametrize(("field", "value"), NEUTRAL.items(), ids=NEUTRAL)
def test_what_changes_nothing_is_accepted(llama: Subject, stored: Path, field: str, value: object) -> None:
    """Options that are off, and fields that only describe, do not keep a good adapter out."""
    change_config(stored, **{field: value})

    manager = AdapterManager(llama.model)
    manager.load("math", stored)
    assert manager.list() == ["math"]


WRONG = {
    "r": [0, 257, -1, 8.0, "8", True, 10**400],
    "lora_alpha": [0, -1, 1025, "16", True, [16], 10**400],
    "lora_dropout": [0.95, -0.1, 1, "0", True],
    "use_rslora": [1, "true", {}],
    "fan_in_fan_out": [0, "no"],
    "target_modules": [None, [], "", "q_proj", "(a+)+$", ".*", ["q_proj", 1], ["q.*"], ["../x"], {"q_proj": 1}],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": 300}, {"q_proj": 2.0}, {"^q_proj": 4}, {".*q_proj": 4}, [4], "q_proj"],
    "alpha_pattern": [{"q_proj": 0}, {"q_proj": "8"}, {"(a+)+$": 8}, 8],
    "peft_type": [None, "LOHA", "lora", 1],
    "base_model_name_or_path": [1, ["x"]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name(llama: Subject, stored: Path, field: str, value: object) -> None:
    """Types and ranges are checked field by field, and the message names the field."""
    change_config(stored, **{field: value})

    assert field in refusal(llama, stored).message


def test_all_wrong_fields_are_in_one_error(llama: Subject, stored: Path) -> None:
    """The reader does not stop at the first problem."""
    change_config(stored, r=0, use_dora=True, lora_alpha=-1, modules_to_save=["x"])

    message = refusal(llama, stored).message
    assert all(field in message for field in ("r is 0", "use_dora", "lora_alpha is -1", "modules_to_save"))


def test_the_rank_must_be_the_configs(llama: Subject, stored: Path) -> None:
    """An r that is not the tensors' is refused: the scale alpha / r would be wrong without a word."""
    change_config(stored, r=8)

    assert f"{Q0}: lora_A has rank 4, adapter_config.json says 8" in refusal(llama, stored).message
