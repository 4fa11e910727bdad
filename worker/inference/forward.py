"""Forward passes over the rows that are being generated: a prompt into a new row, or one token onto every row."""

# Shapes: B rows, L positions of the longest row, T prompt tokens, V vocabulary.

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from worker.base_model import BaseModel
from worker.inference.cache import SlotCache
from worker.lora.manager import AdapterManager

_WINDOWED: Final = "sliding_attention"


class RowForward:
    """The model, its adapters and its key-value cache, as rows of tokens in and next-token logits out.

    Row i is slot i of the cache. Logits are float32 on the model's device. A forward that raises leaves its rows
    unusable but the others as they were: remove them. One thread at a time.
    """

    def __init__(self, base: BaseModel, manager: AdapterManager, *, max_rows: int) -> None:
        self._model = cast(Any, base.model)
        self._manager = manager
        self._device = base.device
        config = self._model.config.get_text_config()
        self._windows = _windows(config)
        self._cache = SlotCache(config.num_hidden_layers, max_rows=max_rows, max_positions=base.context_length)

    @property
    def num_rows(self) -> int:
        return len(self._cache.lengths)

    @property
    def cache_bytes(self) -> int:
        return self._cache.size_bytes

    @torch.inference_mode()
    def prefill(self, prompt_ids: Sequence[int], adapter: str | None) -> Tensor:
        """Add a row that holds a prompt, read through `adapter` or the bare base; the logits after it, (V,).

        If it raises, the row has not been added.
        """
        slot = self._cache.add_row()
        try:
            self._cache.begin_prefill(slot, len(prompt_ids))
            ids_1T = torch.tensor([list(prompt_ids)], device=self._device)
            positions_1T = torch.arange(len(prompt_ids), device=self._device)[None]
            with self._manager.routed_rows([adapter]):
                return self._logits(ids_1T, positions_1T, None)[0]
        except BaseException:
            self._cache.remove_row(slot)
            raise

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], adapters: Sequence[str | None]) -> Tensor:
        """Append one token to every row, each through its own adapter; the logits after it, (B, V)."""
        assert len(token_ids) == len(adapters) == self.num_rows
        positions_B = self._cache.begin_decode(self._device)
        ids_B1 = torch.tensor(token_ids, device=self._device)[:, None]
        with self._manager.routed_rows(adapters):
            return self._logits(ids_B1, positions_B[:, None], self._masks(positions_B))

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        self._cache.remove_row(row)

    def _logits(self, ids: Tensor, positions: Tensor, mask: object) -> Tensor:
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=self._cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        return logits.float()

    def _masks(self, positions_B: Tensor) -> Tensor | dict[str, Tensor]:
        """Boolean (B, 1, 1, L) masks, True where the new token of a row may look; by layer type if the model has such.

        A row's token at position p sees positions 0 to p, with a window w only p - w + 1 to p.
        """
        keys_L = torch.arange(max(self._cache.lengths), device=self._device)
        behind_BL = positions_B[:, None] - keys_L[None, :]

        def visible(window: int | None) -> Tensor:
            seen_BL = behind_BL >= 0
            if window is not None:
                seen_BL &= behind_BL < window
            return seen_BL[:, None, None, :]

        if isinstance(self._windows, dict):
            return {layer_type: visible(window) for layer_type, window in self._windows.items()}
        return visible(self._windows)


def _windows(config: Any) -> dict[str, int | None] | int | None:
    """The sliding window by layer type where the model's layers differ, else the one of all its layers (or None)."""
    if hasattr(config, "layer_types"):
        kinds = dict.fromkeys(config.layer_types)
        return {kind: config.sliding_window if kind == _WINDOWED else None for kind in kinds}
    window: int | None = getattr(config, "sliding_window", None)
    return window
