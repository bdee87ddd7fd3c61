"""The plan of a training run and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """How long each stage runs and how hard it pulls; the defaults made the bundled weights."""

    seed: int = 0
    threads: int = 2
    batch: int = 16
    tower_steps: int = 900
    tower_rate: float = 2e-3
    row_steps: int = 150
    steps: int = 1000
    rate: float = 6e-4
    single_share: float = 0.1
    report_every: int = 100
    check: int = 64
    measure: int = 1000
    half: bool = True

    def quick(self) -> Plan:
        """A run of seconds that passes through every stage and learns nothing to speak of."""
        return replace(self, batch=2, tower_steps=2, row_steps=1, steps=3, report_every=2, check=2, measure=4)


def rate_at(step: int, steps: int, peak: float, warm: int, decay: float) -> float:
    """Learning rate of 0-based `step`: a linear rise, a plateau at `peak`, a linear fall to zero.

    `warm` is the length of the rise in steps, `decay` that of the fall as a share of all steps. The long
    plateau is on purpose: look-up is found suddenly, and a rate that already falls may miss it.
    """
    if step < warm:
        return peak * (step + 1) / warm
    return peak * min(1.0, (steps - step) / (decay * steps))
