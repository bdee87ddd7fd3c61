"""What each pass did to a program and what it gained, as text and as JSON."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from foveate.ir.cost import Cost, cost_of, default_device
from foveate.ir.cost.devices import device_of
from foveate.ir.program import ModelInfo, PassRecord, Program
from foveate.report.figures import LABELS, UNITS, count, ms, size


@dataclass(frozen=True)
class Report:
    """The passes of one program in order, and what the program costs after them."""

    about: ModelInfo
    records: tuple[PassRecord, ...]
    cost: Cost
    sizes: dict[str, Any]

    def to_text(self, width: int = 80) -> str:
        """For people, no line longer than `width` where words allow it."""
        lines = [
            f"{self.about.family}: {self.about.layers} layers, {self.about.heads} heads, "
            f"{self.about.tokens_per_image} visual tokens an image"
        ]
        for number, record in enumerate(self.records, 1):
            lines.append(f"{number}. {record.text}")
            lines += [f"   {line}" for line in _about(record)]
        if not self.records:
            lines.append("no passes: the model does all its work")
        lines.append(f"after all passes: {self._after()}")
        wrapped = [
            textwrap.fill(line, width, subsequent_indent=_indent(line), break_on_hyphens=False, break_long_words=False)
            for line in lines
        ]
        return "\n".join(wrapped)

    def to_json(self) -> dict[str, Any]:
        """passes: one object each; cost: what `foveate.cost` says of the program as it is now."""
        passes = [
            {
                "text": r.text,
                "notes": list(r.notes),
                "edits": dict(r.edits),
                "skipped": r.skipped,
                "cost": r.cost,
                "device": r.device,
            }
            for r in self.records
        ]
        return {
            "family": self.about.family,
            "passes": passes,
            "cost": self.cost.to_json(),
            "sizes": {**self.sizes, "device": self._device},
        }

    def __str__(self) -> str:
        return self.to_text()

    @property
    def _device(self) -> str:
        return device_of(self.sizes["device"]).name

    def _after(self) -> str:
        parts = [f"{name} {count(getattr(self.cost, name).flops)}" for name in ("vision", "prefill", "decode")]
        times = f"predicted on {self._device}: first token"
        return (
            f"FLOPs of {', '.join(parts)} (one token); KV cache {size(self.cost.kv_bytes)}; {times} "
            f"{ms(self.cost.first_token_s)} ms, then {ms(self.cost.decode.time_s)} ms a token"
        )


def report(program: Program, **sizes: Any) -> Report:
    """What the passes did to a program; sizes as `foveate.cost` takes them, the device by default as for passes."""
    sizes = {"device": default_device(program), **sizes}
    return Report(program.info, tuple(program.passes), cost_of(program, **sizes), sizes)


def _about(record: PassRecord) -> list[str]:
    if record.skipped is not None:
        return [f"changed nothing: {record.skipped}"]
    lines = list(record.notes)
    if record.edits:
        lines.append("edits: " + ", ".join(f"{n} {kind}" for kind, n in record.edits.items()))
    cost = record.cost or {}
    effects = [_effect(name, *cost[name]) for name in LABELS if name in cost]
    if effects:
        lines.append("; ".join(effects) + f" on {record.device}" * ("prefill_s" in cost))
    return lines


def _effect(name: str, before: float, after: float) -> str:
    show = UNITS[name]
    change = f" ({100 * (after - before) / before:+.0f}%)" if before else ""
    if before == after:
        return f"{LABELS[name]} {show(before)}, unchanged"
    return f"{LABELS[name]} {show(before)} -> {show(after)}{change}"


def _indent(line: str) -> str:
    return " " * (len(line) - len(line.lstrip()) + 2)
