"""Keys and values between decoding steps: two pairs a layer, visual ones fixed, text ones growing in place.

Where keys were evicted behind the prefill, a layer has one block of both streams instead: fixed, with the text of the
answer growing behind it, or a `HeavyRecentCache`, which takes in the answer too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.cache.growing import Growing
from foveate.cache.heavy_recent import HeavyRecentCache
from foveate.errors import InputError
from foveate.ops import PAD


class VisualTextCache:
    """The cache of one batch. Generation treats it as it treats a transformers cache.

    Lengths and head counts of the visual part may differ from layer to layer; a layer that does not see the image
    has none. `inputs()` gives the decode graph's inputs by name.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # no layer has linear attention

    def __init__(self) -> None:
        self.fixed: dict[str, Tensor] = {}
        self.text: dict[str, Growing] = {}
        self.evicting: dict[int, HeavyRecentCache] = {}
        self.prefix = -1
        self.seen = 0
        self.next_position: Tensor | None = None
        self._taken: int | None = None
        self.step: Any = None  # what `foveate.steps` captured over these buffers
        self.reordered = False

    def fill(
        self,
        kv: list[Any],
        orders: dict[str, Tensor],
        text_order: Tensor,
        prefix: int,
        seen: int,
        position: Tensor,
        held: dict[str, list[Tensor]] | None = None,
    ) -> None:
        """Take over what a prefill returned; seen: prompt length with image tokens and padding.

        held: layer -> what belongs to a block [k, v, None, None]: the places of its keys [B, Hk, C] and, where steps
        evict too, the rest of what `HeavyRecentCache` takes.
        """
        for layer, (k_visual, v_visual, k_text, v_text) in enumerate(kv):
            if state := (held or {}).get(str(layer)):
                places, *rest = state
                if rest:
                    self.evicting[layer] = HeavyRecentCache(k_visual, v_visual, places, *rest)
                    continue
                self.fixed[f"held_k_{layer}"], self.fixed[f"held_v_{layer}"] = k_visual, v_visual
                # A row has as many keys in every head, so the first one says which slots are filled.
                self.fixed[f"held_order_{layer}"] = places[:, 0].contiguous()
                k_text, v_text, text_order = k_visual[:, :, :0], v_visual[:, :, :0], text_order[:, :0]
            elif k_visual is not None:
                self.fixed[f"visual_k_{layer}"] = k_visual.contiguous()
                self.fixed[f"visual_v_{layer}"] = v_visual.contiguous()
            self.text[f"past_k_{layer}"] = Growing(k_text, 2)
            self.text[f"past_v_{layer}"] = Growing(v_text, 2)
        if not self.evicting:
            self.fixed |= orders
            self.text["past_order"] = Growing(text_order, 1, PAD)
        self.prefix, self.seen, self.next_position, self._taken = prefix, seen, position, None

    def extend(self, kv: list[Any], order: Tensor, scores: list[Tensor] | None = None) -> None:
        """Take over the keys and values of new text tokens [B, Hk, T, e] and their order [B, T].

        scores: of a cache that evicts, what the one new token paid in each layer [B, Hk, P + 1].
        """
        for layer, (_, _, k_text, v_text) in enumerate(kv):
            if scores is not None:
                self.evicting[layer].step(k_text, v_text, scores[layer])
                continue
            self.text[f"past_k_{layer}"].append(k_text)
            self.text[f"past_v_{layer}"].append(v_text)
        if scores is None:
            self.text["past_order"].append(order)
        assert self.next_position is not None  # fill came first
        self.next_position = self.next_position + order.shape[1]
        self._taken = None if self._taken is None else self._taken + order.shape[1]
        self.seen += order.shape[1]

    def inputs(self, whole: bool = False) -> dict[str, Tensor | int]:
        """Cached inputs of the decode graph; `whole` with the room for growth, whose order is `PAD`."""
        text = {name: part.whole() if whole else part.view() for name, part in self.text.items()}
        blocks = {
            f"held_{name}_{layer}": value
            for layer, cache in self.evicting.items()
            for name, value in zip(("k", "v", "order"), cache.inputs(), strict=True)
        }
        return {**self.fixed, **text, **blocks, "prefix": -1 if whole else self.prefix}

    def nbytes(self) -> int:
        """Bytes of the keys and values held (without the room for growth)."""
        parts = [*self.fixed.values(), *(part.view() for part in self.text.values())]
        blocks = sum(cache.nbytes() for cache in self.evicting.values())
        return blocks + sum(p.nbytes for p in parts if p.is_floating_point())

    def taken(self) -> int:
        """Positions that the row which is farthest along has taken; read from the device once, then counted."""
        assert self.next_position is not None  # fill came first
        if self._taken is None:
            self._taken = int(self.next_position.max())
        return self._taken

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, image tokens and padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order, as beam search asks."""
        self.reordered = True
        assert self.next_position is not None  # fill came first
        rows = beam_idx.to(self.next_position.device)
        self.fixed = {name: value.index_select(0, rows) for name, value in self.fixed.items()}
        for part in self.text.values():
            part.select_rows(rows)
        for cache in self.evicting.values():
            cache.select_rows(rows)
        self.next_position, self._taken = self.next_position.index_select(0, rows), None

    def activate_past_recording(self) -> None:
        """Assisted decoding would start here; it needs logits of several tokens at once, which programs do not give."""
        raise InputError("assisted decoding is not supported: an optimized model gives the next token's logits only")

    def __len__(self) -> int:
        return self.seen
