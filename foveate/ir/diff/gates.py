"""Gates: statements about a diff that must not hold, such as `prefill.flops>+1%`.

    QUANTITY OP BOUND
    prefill.flops > +1%        B's is more than 1% above A's
    decode.bytes >= -100k      B's is at least A's minus 100,000
    kv_bytes > 200MiB          B's is more than 200 MiB, whatever A's is

A gate fails when its statement is true. Where A's figure is 0, a relative change is 0 if B's is 0 too, else infinite.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from foveate.errors import InputError

GRAMMAR = (
    "QUANTITY OP BOUND; OP is > >= < <=; BOUND is +1% or -5% (change relative to A), +2e9 or -100 (change), or a "
    "number without a sign (B itself), with k M G T KiB MiB GiB after it"
)

_OPS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_GATE = re.compile(
    r"\s*(?P<quantity>[A-Za-z_][\w.]*)\s*(?P<op>>=|<=|>|<)\s*(?P<sign>[+-]?)"
    r"(?P<number>(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,2})?)\s*(?P<unit>%|[kMGT]|[KMG]iB|)\s*"
)


@dataclass(frozen=True)
class Gate:
    """One statement. kind says what the bound is: a share of A's figure (relative), a difference to it (change), or a
    figure of B (value).
    """

    text: str
    quantity: str
    op: str
    bound: Fraction
    kind: str

    @classmethod
    def of(cls, text: str) -> Gate:
        """From its text; InputError shows the grammar."""
        found = _GATE.fullmatch(text)
        if found is None:
            raise InputError(f"the gate {text!r} is not of the form {GRAMMAR}; as in prefill.flops>+1%")
        if found["unit"] == "%" and not found["sign"]:
            raise InputError(f"the gate {text!r}: a percentage is a change and needs a sign, as in +1%")
        bound = Fraction(found["sign"] + found["number"])
        if found["unit"] == "%":
            return cls(text.strip(), found["quantity"], found["op"], bound / 100, "relative")
        kind = "change" if found["sign"] else "value"
        return cls(text.strip(), found["quantity"], found["op"], bound * _UNITS[found["unit"]], kind)

    def check(self, figures: Mapping[str, tuple[float | None, float | None]]) -> GateResult:
        """Whether the gate lets a diff pass; `figures` are A's and B's by quantity.

        Raises InputError for a quantity that is not known, or that a snapshot lacks.
        """
        if self.quantity not in figures:
            raise InputError(
                f"the gate {self.text!r}: there is no quantity {self.quantity!r}; there are: {', '.join(figures)}"
            )
        a, b = figures[self.quantity]
        if b is None or (a is None and self.kind != "value"):
            raise InputError(f"the gate {self.text!r}: {self.quantity} is not in both snapshots")
        before, after = Fraction(a or 0), Fraction(b)
        if self.kind == "relative" and not before and after:
            return GateResult(self, None, not _OPS[self.op](float("inf"), self.bound))
        if self.kind == "relative":
            measured = (after - before) / before if before else Fraction(0)
        else:
            measured = after - before if self.kind == "change" else after
        return GateResult(self, float(measured), not _OPS[self.op](measured, self.bound))


@dataclass(frozen=True)
class GateResult:
    """A gate and what it measured: a share, a difference or a figure, None for an infinite change."""

    gate: Gate
    value: float | None
    ok: bool

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        asked = self.gate
        return {
            "gate": asked.text,
            "quantity": asked.quantity,
            "kind": asked.kind,
            "value": self.value,
            "ok": self.ok,
        }

    @property
    def measured(self) -> str:
        """The value for a reader."""
        if self.value is None:
            return "infinite"
        if self.gate.kind == "relative":
            return f"{100 * self.value:+.4g}%"
        sign = "+" if self.gate.kind == "change" else ""
        return format(self.value, f"{sign},.0f" if self.value.is_integer() else f"{sign}.6g")


def check_gates(gates: Iterable[str], diff: Mapping[str, Any]) -> list[GateResult]:
    """Every gate on the JSON form of a diff, in order. Raises InputError for the first that is not well formed."""
    parsed = [Gate.of(text) for text in gates]
    known = figures(diff)
    return [gate.check(known) for gate in parsed]


def figures(diff: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Quantities that a gate may name: every number of the cost, and how many nodes each graph has."""
    found = {name: (entry["a"], entry["b"]) for name, entry in diff["cost"].items()}
    return {**found, **{f"{name}.nodes": (g["nodes"]["a"], g["nodes"]["b"]) for name, g in diff["graphs"].items()}}
