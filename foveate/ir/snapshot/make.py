"""Snapshots: a program as a small, stable JSON file to be committed, reviewed and compared.

    {"foveate_snapshot": 1, "versions", "model", "passes", "sizes", "cost", "parts", "kv", "graphs"}

The graphs are written as `foveate.ir.snapshot.graph` says, one node a line, layers with equal nodes once. `cost`
is what `cost_of` says at `sizes`, `parts` the same by layer and stream, `kv` what each layer caches. A snapshot
holds no weights, and nothing that depends on the machine or the time: the same program gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from foveate import __version__
from foveate.errors import InputError
from foveate.ir.cost import Forecast, default_device
from foveate.ir.program import PassRecord, Program, layer_kv
from foveate.ir.snapshot.file import FORMAT, Snapshot, printable
from foveate.ir.snapshot.folding import fold
from foveate.ir.snapshot.graph import graph_data
from foveate.ir.text import value_text

DIGITS = 6
"""Significant digits of figures that are no whole numbers."""


def snapshot(program: Program, *, name: str = "", **sizes: Any) -> Snapshot:
    """A program's snapshot; sizes, device and dtype as `cost_of` takes them, `name` is for the reader.

    The device is the one that reports forecast for, if none is given. Raises InputError for sizes that do not fit.
    """
    if not name.isprintable():
        raise InputError(f"a snapshot's name is one printable line, not {name!r}")
    forecast = Forecast.of(program, **{"device": default_device(program), **sizes})
    cost = forecast.cost()
    return Snapshot(
        {
            "foveate_snapshot": FORMAT,
            "versions": {
                "foveate": __version__,
                "torch": torch.__version__.partition("+")[0],
                "transformers": version("transformers"),
            },
            "model": _model(program, name, cost.parameters),
            "passes": [_record(record) for record in program.passes],
            "sizes": _sizes(forecast, sizes),
            "cost": _rounded(cost.to_json()),
            "parts": _parts(forecast),
            "kv": _kv(program),
            "graphs": {graph: graph_data(program, made) for graph, made in program.graphs.items()},
        }
    )


def _model(program: Program, name: str, parameters: int) -> dict[str, Any]:
    about = program.info
    numbers = ("layers", "heads", "kv_heads", "head_dim", "hidden_size", "intermediate_size")
    return {
        "name": name,
        "family": about.family,
        **{number: getattr(about, number) for number in numbers},
        "grid": list(about.grid),
        "dtype": str(program.dtype).removeprefix("torch."),
        "parameters": parameters,
        "roles": dict(about.roles),
    }


def _record(record: PassRecord) -> dict[str, Any]:
    return {
        "text": printable(record.text),
        "notes": [printable(note) for note in record.notes],
        "edits": dict(record.edits),
        "skipped": None if record.skipped is None else printable(record.skipped),
        "cost": _rounded({k: list(v) for k, v in record.cost.items()}) if record.cost else None,
        "device": record.device,
    }


def _sizes(forecast: Forecast, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the cost was asked for, and what it was counted at."""
    given = {key: value for key, value in asked.items() if value is not None}
    return {**forecast.counted, "dtype": forecast.precision.dtype, **given, "device": forecast.device.name}


def _rounded(value: Any) -> Any:
    """Figures with as many digits as mean something, so that no machine's last bit shows."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS - 1}e}")
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _parts(forecast: Forecast) -> dict[str, list[dict[str, Any]]]:
    """Cost of one layer by stream, for runs of layers that cost the same."""
    result = {}
    for name, parts in forecast.parts(("layer", "stream")).items():
        layers: dict[str, dict[int, Any]] = {}
        for part in parts:
            spent = {k: part.to_json()[k] for k in ("flops", "bytes", "time_s")}
            layers.setdefault(str(part.stream), {})[int(part.layer or 0)] = _rounded(spent)
        rows = [
            {"layers": span, "stream": stream, **spent} for stream, by in layers.items() for span, spent in fold(by)
        ]
        result[name] = sorted(rows, key=lambda row: (row["layers"], row["stream"]))
    return result


def _kv(program: Program) -> list[dict[str, Any]]:
    """What each layer caches: the keys' type and shape, which are the values' too; a block of both streams as text."""
    sizes = program.symbols.names()
    layers = {
        number: {
            "visual": None if layer.visual is None or layer.held else value_text(layer.visual[0], sizes),
            "text": value_text((layer.held or layer.text)[0], sizes),
        }
        for number, layer in enumerate(layer_kv(program.prefill))
    }
    return [{"layers": span, **cached} for span, cached in fold(layers)]
