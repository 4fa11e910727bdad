"""A decoder layer of Llama's kind as the few operations that it is, for a model that generates on a CPU."""

# Shapes: T tokens of a step, I hidden features, H query heads, G key-value heads, D head width, F the MLP's width.

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.attention import cached_rows, current_rows
from worker.kernels import norms, swiglu
from worker.lora.sites import Site

log = logging.getLogger("lorad.inference")

Norm = Callable[[Tensor], Tensor]

_PARTS: Final = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
FAR_POSITIONS: Final = (0, 1 << 15, 1 << 22)
"""Where the tokens of a trial stand: some layers do more to tokens that stand far from the start than turn them."""
_PROJECTIONS: Final = {"q_proj", "k_proj", "v_proj", "o_proj"}


@dataclass(frozen=True)
class Heads:
    """How a layer attends: what it tells the attention interface, seen when its own forward was tried."""

    num_query: int
    num_key: int
    width: int
    scaling: float | None
    window: int | None
    softcap: float | None


class RotarySigns:
    """sin with its first half negated, made by the first layer of a step and used by all."""

    def __init__(self) -> None:
        self._sin: Tensor | None = None
        self._signed = torch.empty(0)

    def of(self, sin_1TD: Tensor) -> Tensor:
        """(T, 1, D)."""
        if sin_1TD is not self._sin:
            first, second = sin_1TD[0].chunk(2, dim=-1)
            self._signed = torch.cat((-first, second), dim=-1)[:, None]
            self._sin = sin_1TD
        return self._signed


class LeanLayer:
    """The forward of one decoder layer:  h = x + o(attention(rotary(q, k), v)),  y = h + down(silu(gate) * up).

    q, k and v come out of one product and are turned where they lie; each sum is part of the product before it. Equal
    to the layer's own forward within rounding, which is done less often. Transformers' own runs what is not a
    generation step.
    """

    def __init__(self, layer: nn.Module, sites: Mapping[nn.Module, Site], heads: Heads, signs: RotarySigns) -> None:
        attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        self._own = layer.forward
        self._signs = signs
        self.index, self.heads, self.norms = int(cast(Any, attention).layer_idx), heads, _norms_of(layer)
        self._before_attention, self._before_mlp = (_norm(part) for part in self.norms)
        self.qkv = sites[attention.get_submodule("q_proj")]
        self.output = sites[attention.get_submodule("o_proj")]
        self.gate_up = sites[mlp.get_submodule("gate_proj")]
        self.down = sites[mlp.get_submodule("down_proj")]

    def __call__(self, hidden_states: Tensor, *args: Any, cache: Any = None,
                 position_embeddings: tuple[Tensor, Tensor] | None = None, **options: Any) -> Tensor:  # fmt: skip
        rows = current_rows()
        if rows is None or position_embeddings is None:
            own: Tensor = self._own(
                hidden_states, *args, cache=cache, position_embeddings=position_embeddings, **options
            )
            return own
        heads, x_TI = self.heads, hidden_states[0]
        num_tokens = x_TI.shape[0]
        cos_1TD, sin_1TD = position_embeddings

        qkv_THD = self.qkv.compute(self._before_attention(x_TI)).view(num_tokens, -1, heads.width)
        num_turned = heads.num_query + heads.num_key
        turned_THD = qkv_THD[:, :num_turned]
        # q cos + rotate_half(q) sin: the halves change places, and the first gets its sign from the sine.
        swapped_THD = turned_THD.roll(heads.width // 2, -1)
        turned_THD.mul_(cos_1TD[0, :, None]).addcmul_(swapped_THD, self._signs.of(sin_1TD))
        keys, values = cache.put(self.index, qkv_THD[:, heads.num_query : num_turned], qkv_THD[:, num_turned:])
        seen_1THD = rows(
            qkv_THD[:, : heads.num_query].transpose(0, 1)[None], keys, values,
            scaling=heads.scaling, window=heads.window, softcap=heads.softcap,
        )  # fmt: skip
        h_TI = self.output.onto(seen_1THD.reshape(num_tokens, -1), x_TI)

        gate_TF, up_TF = self.gate_up.compute(self._before_mlp(h_TI)).chunk(2, dim=-1)
        return self.down.onto(functional.silu(gate_TF).mul_(up_TF), h_TI)[None]


def make_lean(model: nn.Module, sites: Iterable[Site]) -> list[nn.Module]:
    """Give those decoder layers of a model that are of Llama's kind, as a trial shows, this forward; which they are.

    Call it while the sites are installed. `vars(layer).pop("forward")` puts a layer back.
    """
    site_of: dict[nn.Module, Site] = {layer: site for site in sites for layer in site.layers}
    signs, changed = RotarySigns(), []
    for layer in model.modules():
        heads = _heads_of(layer, site_of)
        if heads is not None:
            vars(layer)["forward"] = LeanLayer(layer, site_of, heads, signs)
            changed.append(layer)
    return changed


def _norms_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer.get_submodule("input_layernorm"), layer.get_submodule("post_attention_layernorm")


def _norm(module: nn.Module) -> Norm:
    return norms.fused_forward(module) or module.forward


def _heads_of(layer: nn.Module, sites: Mapping[nn.Module, Site]) -> Heads | None:
    """How a layer of Llama's kind attends; None for any other."""
    if not _is_built_like_llama(layer, sites):
        return None
    own, lean = _Trial(layer), _Trial(layer)
    try:
        own.run(layer)
        lean.run(LeanLayer(layer, sites, own.heads, RotarySigns()))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        # It wants something else than layers of this kind are given.
        log.info("%s keeps its own forward: %s", type(layer).__name__, error)
        return None
    return own.heads if own.agrees_with(lean) else None


def _is_built_like_llama(layer: nn.Module, sites: Mapping[nn.Module, Site]) -> bool:
    if {name for name, _ in layer.named_children()} != _PARTS:
        return False
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    if {name for name, _ in attention.named_children()} != _PROJECTIONS or not hasattr(attention, "head_dim"):
        return False
    if not all(map(norms.is_rms_norm, _norms_of(layer))) or not swiglu.is_gated_mlp(mlp):
        return False
    joint = [[attention.get_submodule(f"{name}_proj") for name in "qkv"]]
    joint += [[mlp.get_submodule(f"{name}_proj") for name in ("gate", "up")]]
    joint += [[attention.get_submodule("o_proj")], [mlp.get_submodule("down_proj")]]
    return all(tuple(own) == sites[own[0]].layers if own[0] in sites else False for own in joint)


class _Trial:
    """A cache and an attention that note what a layer gives them, and its output after the same input each time."""

    heads: Heads

    def __init__(self, layer: nn.Module) -> None:
        attention = layer.get_submodule("self_attn")
        q, k = (attention.get_parameter(f"{name}_proj.weight") for name in "qk")
        self._width = int(cast(Any, attention).head_dim)
        self._num_query, self._num_key = len(q) // self._width, len(k) // self._width
        self._like = q
        self._noted: list[Tensor] = []

    @torch.inference_mode()
    def run(self, forward: Callable[..., Tensor]) -> None:
        draws = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draws).to(self._like)

        # What attention adds is larger than the input, so that a factor on it shows.
        x_1TI, cos_1TD, sin_1TD = (
            0.1 * drawn(1, 3, self._like.shape[1]),
            drawn(1, 3, self._width),
            drawn(1, 3, self._width),
        )
        self._attended_1THD = drawn(1, 3, self._num_query, self._width)
        with cached_rows(cast(Any, self)):
            y = forward(
                x_1TI, attention_mask=None, position_ids=torch.tensor([FAR_POSITIONS]), cache=self, use_cache=True,
                position_embeddings=(cos_1TD, sin_1TD),
            )  # fmt: skip
        self._noted.append(y)

    def agrees_with(self, other: "_Trial") -> bool:
        tolerance = max(4 * torch.finfo(self._like.dtype).eps, 1e-5)
        if len(self._noted) != len(other._noted):
            return False
        pairs = zip(self._noted, other._noted, strict=True)
        return all((one - two).norm() <= tolerance * one.norm() for one, two in pairs)

    def update(self, keys_1GTD: Tensor, values_1GTD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._noted += [keys_1GTD, values_1GTD]
        return keys_1GTD, values_1GTD

    def put(self, _layer: int, keys_TGD: Tensor, values_TGD: Tensor) -> tuple[Tensor, Tensor]:
        return self.update(keys_TGD.transpose(0, 1)[None], values_TGD.transpose(0, 1)[None])

    def __call__(self, query_1HTD: Tensor, _keys: Tensor, _values: Tensor, *, scaling: float | None,
                 window: int | None, softcap: float | None) -> Tensor:  # fmt: skip
        self._noted.append(query_1HTD)
        self.heads = Heads(self._num_query, self._num_key, self._width, scaling, window, softcap)
        return self._attended_1THD
