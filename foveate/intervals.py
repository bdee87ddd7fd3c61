"""How far a score of a sample may lie from the score of all such questions: 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964
"""Of a 95% interval."""

RESAMPLES = 2000
"""Of a bootstrap: its ends then move by a few hundredths of the interval's width from seed to seed."""


@dataclass(frozen=True)
class Figure:
    """A score from 0 to 1 and its 95% interval."""

    value: float
    low: float
    high: float


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share, `right` of `n`, which is fair near 0 and 1 too; (0, 1) where n is 0.

    Source: Wilson, JASA 22 (1927), the score interval without correction for continuity.
    """
    if not n:
        return 0.0, 1.0
    p, spread = right / n, Z * Z / n
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    # Rounding must not put the share outside its own interval.
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))


def share(right: int, n: int) -> Figure:
    """`right` of `n` with Wilson's interval; 0 of 0 is 0."""
    return Figure(right / n if n else 0.0, *wilson(right, n))


def ratio(parts: Sequence[float], wholes: Sequence[float] | None = None, seed: int = 0) -> Figure:
    """The sum of parts over the sum of wholes (default: 1 each, so the mean), one of each a question.

    Its interval is a percentile bootstrap over questions, the same for the same seed. Where a sum of wholes is 0 the
    ratio is 0. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    import numpy as np

    above = np.asarray(parts, dtype=float)
    below = np.ones_like(above) if wholes is None else np.asarray(wholes, dtype=float)
    if not len(above):
        return Figure(0.0, 0.0, 1.0)

    def of(rows: np.ndarray) -> float:
        whole = float(below[rows].sum())
        return float(above[rows].sum()) / whole if whole else 0.0

    rng, n = np.random.default_rng(seed), len(above)
    drawn = [of(rng.integers(n, size=n)) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Figure(of(np.arange(n)), float(low), float(high))
