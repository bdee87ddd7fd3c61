"""Reference inputs and outputs in the JSON that Polygraphy reads (`--load-inputs`, `--load-outputs`)."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import InputError

Arrays = Mapping[str, NDArray[Any]]


def inputs_json(inputs: Arrays) -> bytes:
    """One set of inputs, by name."""
    return _text([{name: _array(name, value) for name, value in inputs.items()}])


def outputs_json(outputs: Arrays) -> bytes:
    """What a graph answered to the inputs, by name."""
    values = {name: {"values": _array(name, v), "polygraphy_class": "LazyArray"} for name, v in outputs.items()}
    run = {"outputs": values, "runtime": 0.0, "runner_name": "foveate", "polygraphy_class": "IterationResult"}
    return _text({"lst": [["foveate", [run]]], "polygraphy_class": "RunResults"})


def _array(name: str, value: NDArray[Any]) -> dict[str, str]:
    if value.dtype.kind not in "biuf":
        raise InputError(f"the reference {name} is {value.dtype}; numbers are written only")
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return {"array": base64.b64encode(file.getvalue()).decode("ascii"), "polygraphy_class": "ndarray"}


def _text(content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"
