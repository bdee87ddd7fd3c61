"""Decoding steps over one cache: all they read and write is bound once, so that a step moves only what is new."""

from __future__ import annotations

import numpy as np

from foveate.runner.cache import Cache
from foveate.runner.prompts import Array
from foveate.runner.sessions import DTYPES, HOST, Binding, Session, Value


class Steps:
    """Steps of so many tokens a row, over a cache's buffers as they are now."""

    def __init__(self, embed: Session, step: Session, cache: Cache, tokens: int) -> None:
        batch, device = len(cache.order), cache.writer.device
        self.tokens = tokens
        self.ids, self.position_ids, self.order = (np.zeros((batch, tokens), np.int64) for _ in range(3))

        def room(session: Session, name: str) -> Array:
            _, *sizes = session.outputs[name].shape
            whole = [size if isinstance(size, int) else tokens for size in sizes]
            return np.zeros((batch, *whole), DTYPES[session.outputs[name].type])

        embeds = device.put(room(embed, "inputs_embeds"))
        self.logits = room(step, "logits")
        self.new = {
            name.replace("new", "past_key_values", 1): device.put(room(step, name))
            for name in step.outputs
            if name.startswith("new.")
        }
        found: dict[str, Value] = {name.replace("past_key_values", "new", 1): value for name, value in self.new.items()}
        found["logits"] = HOST.put(self.logits)
        self.embed = Binding(embed, {"input_ids": self.ids}, {"inputs_embeds": embeds})
        given: dict[str, Array | Value] = {
            "inputs_embeds": embeds,
            "position_ids": self.position_ids,
            "order": self.order,
        }
        self.step = Binding(step, {**cache.inputs(), **given}, found)

    def __call__(self, ids: Array, cache: Cache) -> Array:
        """Logits [B, 1, V] behind new tokens [B, T], whose keys and values the cache then has."""
        steps = np.arange(self.tokens)
        self.ids[:] = ids
        self.order[:] = cache.seen + steps
        self.position_ids[:] = cache.next_position + steps
        self.embed.run()
        self.step.run()
        cache.extend(self.new, self.order)
        cache.seen += self.tokens
        cache.next_position = cache.next_position + self.tokens
        return self.logits.copy()


def stepped(embed: Session, step: Session, cache: Cache, ids: Array) -> Array:
    """The logits [B, 1, V] behind tokens [B, T] that the cache has not seen; it takes them in."""
    cache.reserve(ids.shape[1])
    if not isinstance(cache.steps, Steps) or cache.steps.tokens != ids.shape[1]:
        cache.steps = Steps(embed, step, cache, ids.shape[1])
    return cache.steps(ids, cache)
