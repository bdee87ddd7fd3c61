"""The next token from logits: the likeliest, or one that is drawn."""

from __future__ import annotations

import numpy as np

from foveate.runner.prompts import Array
from foveate.runner.settings import Settings


class Chooser:
    """Picks next tokens by settings; samples come from one generator, so that a seed gives the same answer again."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.random = np.random.default_rng(settings.seed) if settings.do_sample else None

    def __call__(self, logits: Array) -> Array:
        """Tokens int64 [B] from logits [B, V]."""
        if self.random is None:
            return np.asarray(logits.argmax(1))
        upto = probabilities(logits, self.settings).cumsum(1)
        # A share of the sum, which is 1 but for rounding: so the first token beyond it is one that may be drawn.
        return np.asarray((upto > self.random.random((len(upto), 1)) * upto[:, -1:]).argmax(1))


def probabilities(logits: Array, settings: Settings) -> Array:
    """What is drawn from, fp64 [B, V]: the best `top_k`, then the fewest of them that make `top_p`, as transformers."""
    scores = logits.astype(np.float64) / settings.temperature
    if 0 < settings.top_k < scores.shape[1]:
        least = np.partition(scores, -settings.top_k, axis=1)[:, -settings.top_k, None]
        scores = np.where(scores < least, -np.inf, scores)
    if settings.top_p < 1:
        rising = scores.argsort(axis=1, kind="stable")
        shares = np.take_along_axis(_softmax(scores), rising, 1)
        out = shares.cumsum(1) <= 1 - settings.top_p
        out[:, -1] = False
        np.put_along_axis(scores, rising, np.where(out, -np.inf, np.take_along_axis(scores, rising, 1)), 1)
    return _softmax(scores)


def _softmax(scores: Array) -> Array:
    raised = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True))
