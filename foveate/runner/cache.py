"""Keys and values between steps, where the device has them.

    visual.{i}.key, keep.{layer}, ...    fixed: bound to every step as the prefill left them
    past_key_values.{i}.key  [B, Hk, P, e]     the text so far, with room for more; a step writes its tokens behind it

Free room has the order `PAD`, which no query sees, so a step reads whole buffers and nothing is cut out of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from foveate.runner.prompts import PAD, Array, Streams
from foveate.runner.sessions import DTYPES, HOST, Device, Session, Value

GROWTH = 128
"""Room for this many more text tokens is added whenever the text part is full."""

TOKENS = 2
"""The axis of a buffer's tokens."""


class Writer(Protocol):
    """Writes keys and values into buffers, in place."""

    device: Device

    def write(self, buffers: Mapping[str, Value], new: Mapping[str, Value], start: int) -> None:
        """Put `new` [B, Hk, T, e] into the buffer of the same name [B, Hk, P, e], from token `start` on."""


class ArrayWriter:
    """Where numpy reaches the buffers."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def write(self, buffers: Mapping[str, Value], new: Mapping[str, Value], start: int) -> None:
        """See `Writer`."""
        for name, value in new.items():
            room = buffers[name].array
            assert room is not None  # buffers on the host are numpy's
            room[:, :, start : start + value.shape[TOKENS]] = value.read()


class Cache:
    """The cache of one batch. fixed: what steps read as it is. text: buffers by the step's names. order: of `text`.

    seen: tokens so far, with image tokens and padding. next_position: int64 [B, 1], that of the next token.
    """

    def __init__(self, writer: Writer, step: Session, found: Mapping[str, Value], streams: Streams, seen: int) -> None:
        """found: what a prefill returned, of which what `step` takes is kept."""
        self.writer = writer
        self.seen, self.next_position = seen, streams.next_position
        kept: dict[str, Value | Array] = {"visual_order": streams.visual.order}
        self.text: dict[str, Value] = {}
        self.length = 0
        self.steps: Any = None  # what is bound to these buffers, see `foveate.runner.steps`
        start, order = {}, streams.text.order
        for name, value in found.items():
            kind, layer, part = (name + "..").split(".")[:3]
            if kind == "present":
                start[f"past_key_values.{layer}.{part}"] = value
            elif kind == "keep":
                kept[name] = value.read()
            elif kind == "held" and part == "places":
                # A row has as many keys in every head, so the first one says which slots are filled.
                kept[f"held_order_{layer}"] = value.read()[:, 0]
            else:
                kept[name] = value
                if kind == "held":
                    # One block holds the whole prompt; only the answer's text grows behind it.
                    order = order[:, :0]
                    start[f"past_key_values.{layer}.{part}"] = _nothing(value)
        self.fixed = {name: _put(value, writer.device) for name, value in kept.items() if name in step.inputs}
        self.order = np.full((len(order), 0), PAD, np.int64)
        self.extend({name: value for name, value in start.items() if name in step.inputs}, order)

    def inputs(self) -> dict[str, Value | Array]:
        """What a step reads of it."""
        return {**self.fixed, **self.text, "past_order": self.order}

    def reserve(self, tokens: int, like: Mapping[str, Value] | None = None) -> None:
        """Make room for so many more; what was bound to the buffers is then void. like: what the first buffers hold."""
        room = self.length + tokens
        if room <= self.order.shape[1] and like is None:
            return
        room, device, old = room + GROWTH, self.writer.device, self.text
        self.text = {name: device.put(_zeros(value, room)) for name, value in (like or old).items()}
        self.writer.write(self.text, old, 0)
        order = np.full((len(self.order), room), PAD, np.int64)
        order[:, : self.length] = self.order[:, : self.length]
        self.order, self.steps = order, None

    def extend(self, new: Mapping[str, Value], order: Array) -> None:
        """Take over the keys and values [B, Hk, T, e] of tokens with these orders [B, T]."""
        tokens = order.shape[1]
        self.reserve(tokens, None if self.text else new)
        if tokens:
            self.writer.write(self.text, new, self.length)
        self.order[:, self.length : self.length + tokens] = order
        self.length += tokens

    def taken(self) -> int:
        """Positions that the row which is farthest along has taken."""
        return int(self.next_position.max())

    def nbytes(self) -> int:
        """Bytes of the keys and values held, with the room for growth."""
        values = [value.held for value in (*self.fixed.values(), *self.text.values())]
        return sum(held.tensor_size_in_bytes() for held in values if held.data_type() != "tensor(int64)")


def _put(value: Value | Array, device: Device) -> Value:
    return value if isinstance(value, Value) else device.put(np.ascontiguousarray(value))


def _zeros(like: Value, tokens: int) -> Array:
    batch, heads, _, width = like.shape
    return np.zeros((batch, heads, tokens, width), DTYPES[like.held.data_type()])


def _nothing(like: Value) -> Value:
    """The same without tokens."""
    return HOST.put(_zeros(like, 0))
