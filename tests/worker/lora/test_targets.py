"""Target names and presets, on a tiny model of each supported architecture."""

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shared.errors import UnknownTarget
from worker.base_model import SUPPORTED
from worker.lora import AdapterManager, LoraSpec, linear_leaf_names, preset_leaf_names, resolve_targets
from worker.lora.targets import matches, shortest_names

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
OWN_SIZES = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
PRESETS = {  # attention, mlp
    "opt": (["k_proj", "v_proj", "q_proj", "out_proj"], ["fc1", "fc2"]),
    "gpt2": (["c_attn", "attn.c_proj"], ["c_fc", "mlp.c_proj"]),
    "gpt_neox": (["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"]),
    "phi": (["q_proj", "k_proj", "v_proj", "dense"], ["fc1", "fc2"]),
    "phi3": (["o_proj", "qkv_proj"], ["gate_up_proj", "down_proj"]),
    "starcoder2": (QKVO, ["c_fc", "c_proj"]),
} | dict.fromkeys(
    ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "stablelm", "olmo2", "granite", "cohere"],
    (QKVO, GATED),
)


def tiny(model_type: str) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **SIZES | OWN_SIZES.get(model_type, {}))
    return AutoModelForCausalLM.from_config(config)


def test_every_supported_architecture_is_here() -> None:
    """The table below knows every architecture that can be loaded."""
    assert set(PRESETS) >= set(SUPPORTED)


@pytest.mark.parametrize("model_type", PRESETS)
def test_presets(model_type: str) -> None:
    """attention and mlp have the names that the architecture's authors gave; all-linear is these and, in OPT, the
    projections around the blocks. None has the output head."""
    model = tiny(model_type)
    attention, mlp = PRESETS[model_type]
    around = ["project_out", "project_in"] if model_type == "opt" else []

    presets = preset_leaf_names(model)

    assert set(presets["attention"]) == set(attention)
    assert set(presets["mlp"]) == set(mlp)
    assert set(presets["all-linear"]) == {name.rpartition(".")[2] for name in attention + mlp + around}
    assert set(linear_leaf_names(model)) == set(presets["all-linear"])


@pytest.mark.parametrize("model_type", PRESETS)
@pytest.mark.parametrize("preset", ["attention", "mlp", "all-linear"])
def test_preset_names_select_what_the_preset_selects(model_type: str, preset: str) -> None:
    """A preset and the names listed for it resolve to the same modules, two layers of each."""
    model = tiny(model_type)

    paths = resolve_targets(model, preset)

    assert paths == resolve_targets(model, preset_leaf_names(model)[preset])
    first, second = ([path for path in paths if f".{i}." in path] for i in (0, 1))
    assert [path.replace(".0.", ".1.") for path in first] == second != []


@pytest.mark.parametrize(
    ("path", "target", "matched"),
    [
        ("model.layers.0.q_proj", "q_proj", True),
        ("model.layers.0.q_proj", "0.q_proj", True),
        ("model.layers.0.q_proj", "model.layers.0.q_proj", True),
        ("model.layers.0.xq_proj", "q_proj", False),
        ("model.layers.10.q_proj", "0.q_proj", False),
        ("q_proj.inner", "q_proj", False),
        ("model.layers.0.q_proj", "qXproj", False),
        ("model.layers.0.q_proj", ".*", False),
        ("model.layers.0.q_proj", "", False),
    ],
)
def test_names_match_exactly_or_as_dotted_suffix(path: str, target: str, matched: bool) -> None:
    """Never as a substring, never as a regular expression."""
    assert matches(path, target) is matched


def test_suffixes_pick_single_modules(tiny_llama: PreTrainedModel) -> None:
    """A longer suffix picks one layer, and the result is in the model's order, not the request's."""
    assert resolve_targets(tiny_llama, ["1.mlp.down_proj", "0.self_attn.q_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]


@pytest.mark.parametrize("target", ["nowhere", "proj", "self_attn", "embed_tokens", "q_proj.weight", ".*q_proj"])
def test_an_unknown_target_lists_what_there_is(tiny_llama: PreTrainedModel, target: str) -> None:
    """Each target that selects no linear layer is named, with the modules and presets that exist."""
    with pytest.raises(UnknownTarget) as caught:
        resolve_targets(tiny_llama, ["q_proj", target, "also_not"])

    assert f"no linear module matches {target!r}, 'also_not'" in caught.value.message
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in caught.value.message
    assert "attention, mlp, all-linear" in caught.value.message
    assert caught.value.param == "target_modules"


@pytest.mark.parametrize("target_modules", ["everything", "q_proj", [], ""])
def test_no_preset_and_no_names_are_errors(tiny_llama: PreTrainedModel, target_modules: str | list[str]) -> None:
    """A text that is no preset is not taken for a name, and an empty list is not taken for all."""
    with pytest.raises(UnknownTarget, match="Linear modules: q_proj"):
        resolve_targets(tiny_llama, target_modules)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_is_refused(tied: bool) -> None:
    """lm_head is refused by name, tied to the embedding or not."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    )

    with pytest.raises(UnknownTarget, match="'lm_head' is the output head"):
        resolve_targets(model, ["q_proj", "lm_head"])


def test_a_tied_layer_is_refused_without_transformers() -> None:
    """A linear layer that shares an embedding's weight is a head, whatever the model calls it."""
    model = nn.ModuleDict({"words": nn.Embedding(8, 4), "mix": nn.Linear(4, 4), "out": nn.Linear(4, 8, bias=False)})
    model["out"].weight = model["words"].weight

    assert resolve_targets(model, "all-linear") == ["mix"]


def test_an_adapted_model_lists_the_same_modules(tiny_gpt2: PreTrainedModel) -> None:
    """Names and presets are the base model's, also while adapters wrap some of its layers."""
    names, presets = linear_leaf_names(tiny_gpt2), preset_leaf_names(tiny_gpt2)

    AdapterManager(tiny_gpt2).add("math", LoraSpec(r=2, alpha=2, target_modules=["c_attn", "mlp.c_proj"]))

    assert linear_leaf_names(tiny_gpt2) == names
    assert preset_leaf_names(tiny_gpt2) == presets


def test_shortest_names_select_just_the_paths(tiny_gpt2: PreTrainedModel) -> None:
    """Of GPT-2's two kinds of c_proj only the wanted one is selected, by the shortest suffix that can."""
    wanted = ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_fc"]

    names = shortest_names(tiny_gpt2, wanted)

    assert names == ["attn.c_proj", "1.mlp.c_fc"]
    assert resolve_targets(tiny_gpt2, names) == wanted


def test_the_parts_of_attention_and_mlp_are_disjoint(tiny_opt: PreTrainedModel) -> None:
    """No module is in both presets; together with the modules around the blocks they are all-linear."""
    attention, mlp, everything = (set(resolve_targets(tiny_opt, p)) for p in ("attention", "mlp", "all-linear"))

    assert not attention & mlp
    assert attention | mlp == everything
    assert attention
    assert mlp
