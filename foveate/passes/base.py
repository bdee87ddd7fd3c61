"""What a pass is: a frozen dataclass whose fields are its options, checked when made and again against a program."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from foveate.errors import PassError
from foveate.ir.attention import attentions, looks_at_visual
from foveate.ir.program import PassRecord, Program, info, outputs
from foveate.ir.rewriter import Rewriter
from foveate.ir.statistics import Statistics


class Skipped(Exception):  # noqa: N818  not an error: the pass says that it has nothing to do
    """Raised by a pass that has nothing to change; the reason goes into the report and a warning."""


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes.

    A subclass names itself (`name`), says where it comes from (`source`), checks its options in `__post_init__` with
    `require`, and edits a graph in `rewrite`, mostly that of the prefill; the decode graph is derived afterwards.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    graph: ClassVar[str] = "prefill"
    """The graph that the pass edits."""

    @abstractmethod
    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """Edit `edit.graph`, the vision graph or the split prefill graph, and yield notes for the reader.

        Raises PassError where the pass does not fit the program, Skipped where there is nothing to change.
        """

    def apply(self, program: Program, calibration: Statistics | None = None) -> PassRecord:
        """Run the pass on a program, in place, and say what it did; calibration: of the model, for passes that ask."""
        if self.graph == "prefill" and "held" in outputs(program.prefill):
            raise PassError(f"{self.name}: keys are evicted from the cache already; put the pass that does so last")
        edit = Rewriter(program, program.graphs[self.graph], by=self.name, statistics=calibration)
        try:
            notes = tuple(self.rewrite(edit))
        except Skipped as reason:
            return PassRecord(self.text(), skipped=str(reason))
        return PassRecord(self.text(), notes, dict(edit.events))

    def require(self, holds: bool, option: str, allowed: str) -> None:
        """Raise PassError unless an option has an allowed value."""
        if not holds:
            raise PassError(f"{self.name}: {option}={getattr(self, option)!r}; allowed: {allowed}")

    def require_count_or_share(self, option: str, what: str) -> None:
        """Raise PassError unless an option is a whole number, 0 or more, or a share of what there is."""
        value = getattr(self, option)
        fits = (whole(value) and value >= 0) or (isinstance(value, float) and 0 < value < 1)
        self.require(fits, option, f"{what}, 0 or more, or a share of them between 0 and 1, such as 0.5")

    def require_share(self, option: str) -> None:
        """Raise PassError unless an option is a share that leaves something."""
        self.require(number(value := getattr(self, option)) and 0 < value <= 1, option, "above 0, at most 1")

    def require_layers(self, option: str, such: str, some: bool = False) -> None:
        """Raise PassError unless an option holds layers that rise; some: and at least one."""
        value = self.as_tuple(option)
        rising = isinstance(value, tuple) and all(whole(x) and x >= 0 for x in value) and (bool(value) or not some)
        self.require(rising and list(value) == sorted(set(value)), option, f"layer numbers that rise, such as {such}")

    def as_tuple(self, option: str) -> Any:
        """An option's value; a list, which a pipeline's text gives, becomes a tuple."""
        value = getattr(self, option)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(self, option, value)
        return value

    def statistics(self, edit: Rewriter, stats: str | None, why: str) -> Statistics:
        """The statistics in the file `stats`, or those given to the whole pipeline.

        Raises PassError where there are none (why: the option that asks for them) or they are of another model.
        """
        found = Statistics.load(stats) if stats is not None else edit.statistics
        if found is None:
            raise PassError(
                f"{self.name}: {why} needs statistics: make them with `foveate calibrate`, then give stats=FILE, or "
                "calibration= to foveate.optimize"
            )
        found.check(edit.program.info, self.name)
        return found

    def require_layer(self, program: Program, option: str, first: int = 0, end: int = 0) -> int:
        """The layer that an option names; PassError unless it is one of `first` to `layers - 1 + end`."""
        last = program.info.layers - 1 + end
        value = count_of(getattr(self, option), program.info.layers)
        if not first <= value <= last:
            raise PassError(
                f"{self.name}: {option}={value} is not a layer of this model: it has {program.info.layers} layers, "
                f"allowed: {first} to {last}"
            )
        return value

    def text(self) -> str:
        """The pass as it stands in a pipeline: `name{field=value,...}`, fields at their default left out."""
        options = [
            f"{f.name}={_plain(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name


def _plain(value: Any) -> str:
    """A value as YAML's flow style reads it back."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        # YAML 1.1 takes 1e-05 for text; it wants a point before the exponent, and a sign behind it.
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if e else mantissa
    return value if isinstance(value, str) else json.dumps(value)


def number(value: Any) -> bool:
    """Whether an option is a real number (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(value: Any) -> bool:
    """Whether an option is a whole number (a bool is none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def count_of(value: float, available: int) -> int:
    """An option as a number: a share is rounded down, a whole number stands for itself."""
    return math.floor(value * available) if isinstance(value, float) else int(value)


def layers_text(first: int, last: int) -> str:
    """`layer 3`, or `layers 3 to 5`."""
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def first_blind_layer(graph: fx.Graph) -> int:
    """The first layer from which on nothing looks at visual tokens any more."""
    return max((info(n).layer + 1 for n in attentions(graph) if looks_at_visual(n)), default=0)
