"""Machines as a roofline sees them, from data: those that ship with foveate, and a user's own YAML files."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from foveate.errors import InputError

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4}
"""Number formats that a forecast knows, and how wide they are."""

_WIDER = {"int4": "int8", "int8": "float16", "float8": "bfloat16", "bfloat16": "float16", "float16": "float32"}
"""Where a device has no rate for a format: the format that such numbers are computed in."""


@dataclass(frozen=True)
class Device:
    """A machine: peak rates by number format in FLOP/s, memory bandwidth in byte/s.

    memory_bytes: what fits, 0 if unknown. op_s: seconds that each op takes besides its work. attention: share of the
    rate that attention reaches. fused: whether chains of elementwise ops run as one kernel. kind: the type of torch's
    device, `cpu` or `cuda`: kernels differ.
    """

    name: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    memory_bytes: float = 0
    op_s: float = 0
    attention: float = 1
    fused: bool = False
    about: str = ""
    kind: str = "cpu"

    def rate(self, dtype: str) -> float:
        """FLOP/s in a number format, or in the next wider one that the device has."""
        while dtype not in self.flops_per_s:
            if dtype not in _WIDER:
                return max(self.flops_per_s.values())
            dtype = _WIDER[dtype]
        return self.flops_per_s[dtype]

    def to_yaml(self) -> str:
        """As a device file."""
        data = {f: v for f, v in asdict(self).items() if f != "name"}
        return yaml.safe_dump({self.name: {**data, "flops_per_s": dict(self.flops_per_s)}}, sort_keys=False)


@functools.cache
def devices() -> dict[str, Device]:
    """The devices that ship with foveate, by name."""
    text = (resources.files("foveate.ir.cost") / "devices.yaml").read_text(encoding="utf-8")
    return _parse(text, "devices.yaml")


def device_of(device: Device | str) -> Device:
    """A device by name or from a YAML file with one device; InputError says what is wrong with it."""
    if isinstance(device, Device):
        return device
    if device in devices():
        return devices()[device]
    if not device.endswith((".yaml", ".yml")):
        raise InputError(f"device {device!r} is not known; there are: {', '.join(devices())}; or give a .yaml file")
    try:
        text = Path(device).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"device file {device} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    found = _parse(text, device)
    if len(found) != 1:
        raise InputError(f"device file {device} must hold one device, it holds {len(found)}")
    return next(iter(found.values()))


def _parse(text: str, where: str) -> dict[str, Device]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"device file {where} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise InputError(f"device file {where} must be a mapping from a device's name to its figures")
    return {str(name): _device(str(name), entry, where) for name, entry in content.items()}


def _device(name: str, entry: Any, where: str) -> Device:
    known = [f.name for f in fields(Device) if f.name != "name"]
    place = f"device file {where}, {name}"
    if not isinstance(entry, dict):
        raise InputError(f"{place}: must be a mapping with {', '.join(known)}")
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise InputError(f"{place}: {unknown[0]!r} is not one of {', '.join(known)}")
    entry = _number(entry)
    rates = entry.get("flops_per_s")
    if not isinstance(rates, dict) or not rates or not set(rates) <= set(BITS):
        raise InputError(f"{place}: flops_per_s must map number formats ({', '.join(BITS)}) to FLOP/s")
    for label, value, least in [
        *((f"flops_per_s of {dtype}", rate, 1.0) for dtype, rate in rates.items()),
        ("bytes_per_s", entry.get("bytes_per_s"), 1.0),
        ("memory_bytes", entry.get("memory_bytes", 0), 0.0),
        ("op_s", entry.get("op_s", 0), 0.0),
        ("attention", entry.get("attention", 1), 1e-6),
    ]:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < math.inf:
            raise InputError(f"{place}: {label} must be a number of at least {least:g}, it is {value!r}")
    if not isinstance(entry.get("fused", False), bool) or not isinstance(entry.get("about", ""), str):
        raise InputError(f"{place}: fused must be true or false, about must be text")
    if entry.get("kind", "cpu") not in ("cpu", "cuda"):
        raise InputError(f"{place}: kind must be cpu or cuda, it is {entry['kind']!r}")
    return Device(name=name, **{**entry, "flops_per_s": {str(k): float(v) for k, v in rates.items()}})


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e12 for text; no one else does. Anything but such text, or a mapping of it, stays as it is."""
    if isinstance(value, dict):
        return {key: _number(each) for key, each in value.items()}
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
