"""The "lorad" attention implementation, over tiny random models of every supported architecture."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from worker import attention
from worker.attention import packed_segments
from worker.base_model import SUPPORTED

VOCAB, WIDTH, WINDOW = 50, 64, 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {
    "head_dim": 16,
    "query_pre_attn_scalar": 13,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
WINDOWED_LAYER = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}
# Where an architecture has a sliding window, a soft cap, grouped heads or its own scaling, it is switched on here.
CONFIGS = {
    "cohere": GROUPED | {"use_qk_norm": True},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": GEMMA,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
    }
    | {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
    "granite": GROUPED | {"attention_multiplier": 0.4, "logits_scaling": 2.0},
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": WINDOW},
    "olmo2": GROUPED,
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "init_std": 0.3},
    "phi": GROUPED | {"qk_layernorm": True},
    "phi3": GROUPED | {"sliding_window": WINDOW},
    "qwen2": GROUPED | WINDOWED_LAYER,
    "qwen3": GROUPED | WINDOWED_LAYER | {"head_dim": 16},
    "stablelm": GROUPED | {"qk_layernorm": True},
    "starcoder2": GROUPED | {"sliding_window": WINDOW, "residual_dropout": 0.0},
}
SLIDING = ["gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "starcoder2"]
LENGTHS = [3, 9, 1, WINDOW, 11]
every_architecture = pytest.mark.parametrize("model_type", sorted(SUPPORTED))
# Float32 sums in another order; the logits are of order 1 to 10.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def make_model() -> Iterator[MakeModel]:
    """Builds a tiny model with the same random weights on every call; leaves torch's random state as it was."""

    def make(model_type: str, implementation: str = attention.NAME, **overrides: object) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **overrides})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).eval()

    with torch.random.fork_rng():
        yield make


def samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (length,), generator=generator) for length in LENGTHS]


def restarting_positions() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


def packed_logits(model: PreTrainedModel, **kwargs: object) -> torch.Tensor:
    flat = torch.cat(samples())[None]
    return model(input_ids=flat, position_ids=restarting_positions(), use_cache=False, **kwargs).logits[0]


def one_by_one_logits(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples()])


def gradients(model: PreTrainedModel, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logits * weights).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_supported_architecture_is_tested_here() -> None:
    """A new entry in SUPPORTED needs a configuration in this file."""
    assert set(CONFIGS) == set(SUPPORTED)


@every_architecture
def test_packed_logits_equal_one_by_one(make_model: MakeModel, model_type: str) -> None:
    """A packed stream gives each token the logits it has in a forward of its own sequence."""
    model = make_model(model_type)

    with torch.no_grad(), packed_segments(LENGTHS):
        packed = packed_logits(model)

    with torch.no_grad():
        torch.testing.assert_close(packed, one_by_one_logits(model), **CLOSE)


@every_architecture
def test_packed_logits_equal_eager_one_by_one(make_model: MakeModel, model_type: str) -> None:
    """The same against Transformers' own eager attention, which shares no code with ours."""
    with torch.no_grad(), packed_segments(LENGTHS):
        packed = packed_logits(make_model(model_type))

    with torch.no_grad():
        torch.testing.assert_close(packed, one_by_one_logits(make_model(model_type, "eager")), **CLOSE)


@every_architecture
def test_packed_gradients_equal_one_by_one(make_model: MakeModel, model_type: str) -> None:
    """A backward pass over the packed stream gives every weight the gradient of the separate sequences."""
    model = make_model(model_type)
    expected = gradients(model, one_by_one_logits(model))

    with packed_segments(LENGTHS):
        logits = packed_logits(model)
    found = gradients(model, logits)

    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5 * scale + 1e-8, msg=lambda m, n=name: n + m)


@every_architecture
def test_unpacked_stream_leaks(make_model: MakeModel, model_type: str) -> None:
    """Without `packed_segments` the same stream attends across its sequences, so the tests above can fail."""
    model = make_model(model_type)

    with torch.no_grad():
        mixed = packed_logits(model, attention_mask=torch.ones(1, sum(LENGTHS), dtype=torch.long))
        separate = one_by_one_logits(model)

    torch.testing.assert_close(mixed[: LENGTHS[0]], separate[: LENGTHS[0]], **CLOSE)
    assert (mixed[LENGTHS[0] :] - separate[LENGTHS[0] :]).abs().max() > 0.05


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_positions_matter(make_model: MakeModel, model_type: str) -> None:
    """Positions that do not restart give other logits: packing alone does not restart them."""
    model = make_model(model_type)
    running_on = torch.arange(sum(LENGTHS))[None] if model_type == "opt" else 2 * restarting_positions()

    with torch.no_grad(), packed_segments(LENGTHS):
        other = model(input_ids=torch.cat(samples())[None], position_ids=running_on, use_cache=False).logits[0]

    with torch.no_grad():
        assert (other - one_by_one_logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("model_type", SLIDING)
def test_window_is_honoured(make_model: MakeModel, model_type: str) -> None:
    """A packed segment longer than the sliding window does not see past it: another window gives other logits."""
    with torch.no_grad(), packed_segments(LENGTHS):
        narrow = packed_logits(make_model(model_type))
        wide = packed_logits(make_model(model_type, sliding_window=32))

    torch.testing.assert_close(narrow[: LENGTHS[0]], wide[: LENGTHS[0]], **CLOSE)
    assert (narrow - wide).abs().max() > 0.01


def test_softcap_is_honoured(make_model: MakeModel) -> None:
    """Gemma 2's soft cap on attention scores changes the logits."""
    with torch.no_grad(), packed_segments(LENGTHS):
        capped = packed_logits(make_model("gemma2"))
        uncapped = packed_logits(make_model("gemma2", attn_logit_softcapping=None))

    assert (capped - uncapped).abs().max() > 0.01


@every_architecture
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_ordinary_forward_equals_eager(make_model: MakeModel, model_type: str, padding: str) -> None:
    """Outside of packing, a batch with or without padding gets the logits that eager attention gives it."""
    ids = torch.stack([torch.cat(samples())[:12], torch.cat(samples())[12:24]])
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 5) if padding == "left" else slice(-5, None)] = 0
    given = {"input_ids": ids, "attention_mask": mask if padding != "none" else None}

    with torch.no_grad():
        found = make_model(model_type)(**given).logits
        expected = make_model(model_type, "eager")(**given).logits

    torch.testing.assert_close(found[mask == 1], expected[mask == 1], **CLOSE)


@pytest.mark.parametrize("model_type", sorted(SUPPORTED.keys() - {"gemma2"}))
def test_ordinary_forward_is_sdpa_bit_for_bit(make_model: MakeModel, model_type: str) -> None:
    """Outside of packing, it is Transformers' SDPA; Gemma 2 is apart since that refuses a soft cap."""
    ids = torch.cat(samples())[None]

    with torch.no_grad():
        found = make_model(model_type)(input_ids=ids).logits
        expected = make_model(model_type, "sdpa")(input_ids=ids).logits

    assert torch.equal(found, expected)


@every_architecture
def test_cached_decoding_equals_full_forward(make_model: MakeModel, model_type: str) -> None:
    """Prefill, a chunk of several tokens, then token by token over the cache give the logits of one full forward."""
    model = make_model(model_type)
    ids = torch.cat(samples())[None, :14]

    cache, parts = None, []
    with torch.no_grad():
        for start, end in [(0, 6), (6, 9), *((i, i + 1) for i in range(9, 14))]:
            output = model(input_ids=ids[:, start:end], cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)

        torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids=ids).logits, **CLOSE)


@every_architecture
def test_decoding_rows_of_different_length(make_model: MakeModel, model_type: str) -> None:
    """Left-padded rows decode over one cache as each does alone."""
    model = make_model(model_type)
    long, short = torch.cat(samples())[:10], torch.cat(samples())[10:16]
    ids = torch.stack([long, torch.cat([torch.zeros(4, dtype=torch.long), short])])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    with torch.no_grad():
        before = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1])
        last = model(input_ids=ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], cache=before.cache)

        for row, alone in enumerate([long, short]):
            torch.testing.assert_close(last.logits[row, -1], model(input_ids=alone[None]).logits[0, -1], **CLOSE)


def test_packing_ends_with_its_block(make_model: MakeModel) -> None:
    """Leaving a block brings back the packing around it, and after the outermost one there is none, errors or not."""
    model = make_model("llama")
    with torch.no_grad():
        plain = model(input_ids=torch.cat(samples())[None]).logits
        with packed_segments(LENGTHS):
            outer = packed_logits(model)
            with pytest.raises(RuntimeError), packed_segments([5, 5]):
                raise RuntimeError
            again = packed_logits(model)

        assert torch.equal(outer, again)
        assert torch.equal(model(input_ids=torch.cat(samples())[None]).logits, plain)


def test_packing_is_per_thread(make_model: MakeModel) -> None:
    """While one thread is inside `packed_segments`, another's ordinary forward is not packed."""
    model = make_model("llama")
    ids = torch.cat(samples())[None]
    found: list[torch.Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)

    with packed_segments(LENGTHS):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()

    forward()
    assert torch.equal(found[0], found[1])


def test_packed_forward_repeats_bit_for_bit(make_model: MakeModel) -> None:
    """The same stream gives the same logits every time."""
    model = make_model("mistral")
    with torch.no_grad(), packed_segments(LENGTHS):
        assert torch.equal(packed_logits(model), packed_logits(model))


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2"])
def test_mask_over_packed_stream_is_refused(make_model: MakeModel, model_type: str) -> None:
    """A mask beside the segments is an error, not silently ignored."""
    mask = torch.ones(1, sum(LENGTHS), dtype=torch.long)

    with packed_segments(LENGTHS), pytest.raises(ValueError, match="takes no attention mask"):
        packed_logits(make_model(model_type), attention_mask=mask)


@pytest.mark.parametrize("lengths", [[], [3, 0]], ids=str)
def test_empty_segment_is_refused(lengths: list[int]) -> None:
    """Every segment holds at least one token."""
    with pytest.raises(ValueError, match="at least one token"), packed_segments(lengths):
        pass


def test_segments_must_cover_the_stream(make_model: MakeModel) -> None:
    """Segments shorter than the stream are an error that says both lengths."""
    with packed_segments([2, 3]), pytest.raises(ValueError, match="5 tokens; there are 1 rows of 28 queries"):
        packed_logits(make_model("llama"))
