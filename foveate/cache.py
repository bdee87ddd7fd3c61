"""Keys and values between decoding steps: two pairs a layer, visual ones fixed, text ones growing in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.errors import InputError
from foveate.ops import PAD

GROWTH = 128
"""Room for this many more text tokens is added whenever the text part is full."""


class Growing:
    """A tensor [B, ..., tokens at `dim`, ...] that grows without copying itself at every step; free room is `empty`."""

    def __init__(self, start: Tensor, dim: int, empty: int = 0) -> None:
        self.dim = dim
        self.empty = empty
        self.length = 0
        self.buffer = start.narrow(dim, 0, 0)
        self.append(start)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more."""
        end = self.length + tokens
        if end > self.buffer.shape[self.dim]:
            shape = list(self.buffer.shape)
            shape[self.dim] = end + GROWTH
            buffer = self.buffer.new_full(shape, self.empty)
            buffer.narrow(self.dim, 0, self.length).copy_(self.view())
            self.buffer = buffer

    def append(self, new: Tensor) -> None:
        """Write `new` behind what is there."""
        self.reserve(new.shape[self.dim])
        self.buffer.narrow(self.dim, self.length, new.shape[self.dim]).copy_(new)
        self.length += new.shape[self.dim]

    def view(self) -> Tensor:
        """What has been written."""
        return self.buffer.narrow(self.dim, 0, self.length)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (beam search)."""
        self.buffer = self.buffer.index_select(0, rows)


class VisualTextCache:
    """The cache of one batch. Generation treats it as it treats a transformers cache.

    Lengths and head counts of the visual part may differ from layer to layer; a layer that does not see the image
    has none. `inputs()` gives the decode graph's inputs by name.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        self.fixed: dict[str, Tensor] = {}
        self.text: dict[str, Growing] = {}
        self.prefix = -1
        self.seen = 0
        self.next_position: Tensor | None = None
        self.step: Any = None  # what `foveate.steps` captured over these buffers
        self.reordered = False

    def fill(
        self, kv: list[Any], orders: dict[str, Tensor], text_order: Tensor, prefix: int, seen: int, position: Tensor
    ) -> None:
        """Take over what a prefill returned; seen: prompt length with image tokens and padding."""
        for layer, (k_visual, v_visual, k_text, v_text) in enumerate(kv):
            self.text[f"past_k_{layer}"] = Growing(k_text, 2)
            self.text[f"past_v_{layer}"] = Growing(v_text, 2)
            if k_visual is not None:
                self.fixed[f"visual_k_{layer}"] = k_visual.contiguous()
                self.fixed[f"visual_v_{layer}"] = v_visual.contiguous()
        self.fixed |= orders
        self.text["past_order"] = Growing(text_order, 1, PAD)
        self.prefix, self.seen, self.next_position = prefix, seen, position

    def extend(self, kv: list[Any], order: Tensor) -> None:
        """Take over the keys and values of new text tokens [B, Hk, T, e] and their order [B, T]."""
        for layer, (_, _, k_text, v_text) in enumerate(kv):
            self.text[f"past_k_{layer}"].append(k_text)
            self.text[f"past_v_{layer}"].append(v_text)
        self.text["past_order"].append(order)
        assert self.next_position is not None  # fill came first
        self.next_position = self.next_position + order.shape[1]
        self.seen += order.shape[1]

    def inputs(self, whole: bool = False) -> dict[str, Tensor | int]:
        """Cached inputs of the decode graph; `whole` with the room for growth, whose order is `PAD`."""
        text = {name: part.buffer if whole else part.view() for name, part in self.text.items()}
        return {**self.fixed, **text, "prefix": -1 if whole else self.prefix}

    def nbytes(self) -> int:
        """Bytes of the keys and values held (without the room for growth)."""
        parts = [*self.fixed.values(), *(part.view() for part in self.text.values())]
        return sum(p.nbytes for p in parts if p.is_floating_point())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, image tokens and padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order, as beam search asks."""
        self.reordered = True
        rows = beam_idx.to(self.text["past_order"].buffer.device)
        self.fixed = {name: value.index_select(0, rows) for name, value in self.fixed.items()}
        for part in self.text.values():
            part.select_rows(rows)
        if self.next_position is not None:
            self.next_position = self.next_position.index_select(0, rows)

    def activate_past_recording(self) -> None:
        """Assisted decoding would start here; it needs logits of several tokens at once, which programs do not give."""
        raise InputError("assisted decoding is not supported: an optimized model gives the next token's logits only")

    def __len__(self) -> int:
        return self.seen
