"""A forecast: the dense model beside each recipe, what they gain at several batch sizes, and why not more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.ir.cost import Cost, Forecast
from foveate.ir.cost.devices import Device, device_of
from foveate.ir.program import Program
from foveate.report.figures import ms, percent, size, times

BATCHES = (1, 8, 32)
"""Batch sizes at which gains are told."""

WORTH = 1.05
"""A predicted gain below this is told as none."""


@dataclass(frozen=True)
class Row:
    """One program of a forecast: its passes (none for the dense one), its cost, and its costs at `BATCHES`."""

    name: str
    forecast: Forecast
    cost: Cost
    by_batch: Mapping[int, Cost]


@dataclass(frozen=True)
class ForecastReport:
    """The dense program and each recipe on one device. setting: what the JSON repeats."""

    setting: Mapping[str, Any]
    dense: Row
    recipes: Sequence[Row]

    @property
    def device(self) -> Device:
        """What all of them are forecast for."""
        return self.dense.forecast.device

    @property
    def rows(self) -> list[Row]:
        """All of them, the dense one first."""
        return [self.dense, *self.recipes]

    @property
    def labels(self) -> list[str]:
        """A short name for each row: `dense`, `A`, `B`, ..."""
        return ["dense", *(chr(ord("A") + i) if i < 26 else f"#{i + 1}" for i in range(len(self.recipes)))]

    def speedup(self, row: Row) -> dict[str, float | None]:
        """Dense over this row: FLOPs and time of the prefill graph, time to the first token, time of a step."""
        a, b = self.dense.cost, row.cost
        return {
            "prefill_flops": _ratio(a.prefill.flops, b.prefill.flops),
            "prefill_time": _ratio(a.prefill.time_s, b.prefill.time_s),
            "first_token_time": _ratio(a.first_token_s, b.first_token_s),
            "decode_time": _ratio(a.decode.time_s, b.decode.time_s),
        }

    def gains(self, row: Row) -> dict[int, dict[str, float | None]]:
        """Batch size -> speed-up of the time to the first token and of a decode step."""
        return {
            batch: {
                "first_token_time": _ratio(self.dense.by_batch[batch].first_token_s, spent.first_token_s),
                "decode_time": _ratio(self.dense.by_batch[batch].decode.time_s, spent.decode.time_s),
            }
            for batch, spent in row.by_batch.items()
        }

    def warnings(self) -> list[str]:
        """What a user should know before running this: gains that are none and why, and what does not fit."""
        said = []
        for label, row in zip(self.labels[1:], self.recipes, strict=True):
            gain = self.speedup(row)["first_token_time"]
            if gain is not None and gain < WORTH:
                what = "slower than dense" if gain < 1 else "no gain worth having"
                said.append(
                    f"{label}: predicted {times(gain)} to the first token, {what}: {'; '.join(self.reasons(row))}"
                )
        for label, row in zip(self.labels, self.rows, strict=True):
            if 0 < self.device.memory_bytes < row.cost.peak_bytes:
                said.append(
                    f"{label}: needs {size(row.cost.peak_bytes)} at its peak, "
                    f"{self.device.name} has {size(self.device.memory_bytes)}"
                )
        return said

    def reasons(self, row: Row) -> list[str]:
        """Why a recipe gains little, the largest part of its time first."""
        spent, before = row.cost, self.dense.cost
        whole = spent.first_token_s
        parts = row.forecast.parts(["role"])["prefill"]
        selection = sum(part.work.time_s for part in parts if part.role == "select")
        saved = before.first_token_s - (whole - selection)
        reading = spent.prefill.weight_bytes / self.device.bytes_per_s
        removed = 1 - spent.prefill.flops / before.prefill.flops if before.prefill.flops else 0
        found = []
        if removed < 0.05:
            found.append(f"it removes {percent(max(0.0, removed))} of the prefill FLOPs")
        if spent.vision.time_s > 0.5 * whole:
            found.append(
                f"the vision tower takes {percent(spent.vision.time_s / whole)} of the time and no pass touches it"
            )
        if spent.prefill.bound == "memory" and reading > 0.4 * spent.prefill.time_s:
            found.append(
                f"text tokens read every weight anyway: {ms(reading)} of {ms(spent.prefill.time_s)} ms of the prefill"
            )
        if spent.prefill.bound == "overhead":
            found.append("most of the time is what each op takes besides its work")
        if selection > 0.5 * max(saved, 0):
            found.append(f"selecting costs {ms(selection)} ms, what it saves is {ms(max(saved, 0))} ms")
        return found or ["what it removes is not what the time goes to"]

    def to_json(self) -> dict[str, Any]:
        """`optimized` is the first recipe, or the dense model where none was given."""
        first = self.rows[min(1, len(self.recipes))]
        return {
            **self.setting,
            "dense": self.dense.cost.to_json(),
            "optimized": first.cost.to_json(),
            "speedup": self.speedup(first),
            "recipes": [
                {
                    "passes": row.name,
                    "cost": row.cost.to_json(),
                    "speedup": self.speedup(row),
                    "by_batch": [{"batch": b, **gain} for b, gain in self.gains(row).items()],
                }
                for row in self.recipes
            ],
            "warnings": self.warnings(),
        }


def forecast_row(name: str, program: Program, convention: str, modules: Sequence[int], sizes: Mapping[str, Any]) -> Row:
    """The row of one program; sizes as `foveate.cost` takes them."""
    forecast = Forecast.of(program, **sizes)
    others = {
        batch: Forecast.of(program, **{**sizes, "batch": batch}, joined=forecast.joined).cost() for batch in BATCHES
    }
    return Row(name, forecast, forecast.cost(convention, modules), others)


def forecast_report(
    dense: Program,
    recipes: Mapping[str, Program],
    *,
    setting: Mapping[str, Any],
    device: Device | str,
    convention: str = "actual",
    modules: Sequence[int] = (),
    **sizes: Any,
) -> ForecastReport:
    """Programs (pipeline text -> program) beside the dense one; sizes as `foveate.cost` takes them.

    setting: what the JSON repeats, beside the sizes of a prompt and the number formats.
    """
    machine = device_of(device)
    rows = [
        forecast_row(name, program, convention, modules if name else (), {**sizes, "device": machine})
        for name, program in {"": dense, **recipes}.items()
    ]
    bits = rows[0].forecast.precision
    formats = {"dtype": bits.dtype, "weight_bits": bits.weight_bits, "kv_bits": bits.kv_bits}
    return ForecastReport({**setting, **rows[0].forecast.counted, **formats}, rows[0], rows[1:])


def _ratio(before: float, after: float) -> float | None:
    return before / after if after else None
