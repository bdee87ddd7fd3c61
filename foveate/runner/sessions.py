"""The graphs of a package on ONNX Runtime, over values that are bound where they lie, so that none is copied."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveate.backends.onnx.runtime import CPU, CUDA, available, first_line, installed, open_file
from foveate.errors import BackendError, InputError
from foveate.runner.prompts import Array

DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
"""ONNX Runtime's types -> numpy's; the latter has no bfloat16."""


@dataclass(frozen=True)
class Value:
    """A tensor as ONNX Runtime holds it; `array` is the same memory, where numpy has made it."""

    held: Any
    array: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.held.shape())

    def read(self) -> Array:
        """Its numbers, copied to the host if they lie elsewhere."""
        return np.asarray(self.held.numpy()) if self.array is None else self.array


@dataclass(frozen=True)
class Device:
    """Where graphs run and the cache lies: `cpu`, or `cuda` and the number of a GPU."""

    name: str = "cpu"
    number: int = 0

    @classmethod
    def named(cls, wanted: str | None) -> Device:
        """`cpu`, `cuda` or `cuda:1`; None: a GPU where ONNX Runtime finds one. Errors say what is wrong."""
        if wanted is None:
            return cls("cuda") if _has_gpu() else cls()
        kind, colon, number = wanted.partition(":")
        if kind not in ("cpu", "cuda") or (colon and not number.isdecimal()):
            raise InputError(f"device {wanted!r} is not known; give 'cpu', 'cuda' or 'cuda:0'")
        if kind == "cuda" and CUDA not in available():
            raise BackendError("this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu, or device='cpu'")
        return cls(kind, int(number or 0))

    @property
    def is_host(self) -> bool:
        """Whether numpy reaches its memory."""
        return self.name == "cpu"

    @property
    def providers(self) -> list[Any]:
        """What ONNX Runtime is asked for."""
        return [CPU] if self.is_host else [(CUDA, {"device_id": self.number}), CPU]

    def put(self, array: Array) -> Value:
        """An array on this device: the same memory on the host, a copy elsewhere."""
        held = installed().OrtValue.ortvalue_from_numpy(array, self.name, self.number)
        return Value(held, array if self.is_host else None)


HOST = Device()


class Session:
    """One graph of a package."""

    def __init__(self, path: Path, device: Device) -> None:
        """Raises ArtifactError for a damaged file, BackendError for what numpy or this machine does not have."""
        self.name, self.device = path.name, device
        self.inner = open_file(path, _threads(), device.providers)
        if not device.is_host and CUDA not in self.inner.get_providers():
            raise BackendError("ONNX Runtime found no GPU that it can use; give device='cpu'")
        self.inputs = {each.name: each for each in self.inner.get_inputs()}
        self.outputs = {each.name: each for each in self.inner.get_outputs()}
        for each in (*self.inputs.values(), *self.outputs.values()):
            if each.type not in DTYPES:
                raise BackendError(
                    f"{each.name} of {path.name} is {each.type}, which numpy does not have: load the package without "
                    "tensors='np'"
                )

    def dtype(self, name: str) -> Any:
        """What numpy calls the type of an input or output."""
        return DTYPES[{**self.inputs, **self.outputs}[name].type]

    def run(self, given: Mapping[str, Array | Value], stay: Collection[str] = ()) -> dict[str, Value]:
        """Outputs by name; those that begin like one of `stay` remain on the device. Inputs it has not are ignored."""
        bound = Binding(self, given, {})
        for name in self.outputs:
            where = self.device if name.startswith(tuple(stay)) else HOST
            bound.inner.bind_output(name, where.name, where.number)
        bound.run()
        return dict(zip(self.outputs, map(Value, bound.inner.get_outputs()), strict=True))


class Binding:
    """A graph and the values it reads and writes, for as many runs as one likes. Arrays are read anew at each run."""

    def __init__(self, session: Session, given: Mapping[str, Array | Value], found: Mapping[str, Value]) -> None:
        missing = sorted(set(session.inputs) - set(given))
        if missing:
            raise BackendError(f"{session.name} takes {', '.join(missing)}, which this foveate does not know")
        self.session, self.inner = session, session.inner.io_binding()
        self.copied: dict[str, Array] = {}
        # Bound memory belongs to numpy, which must not let go of it.
        self.held: list[Any] = [found]
        for name in session.inputs:
            value = given[name]
            if isinstance(value, Value):
                self._bind(name, value)
            elif session.device.is_host:
                self._bind(name, HOST.put(np.ascontiguousarray(value, session.dtype(name))))
            else:
                self.copied[name] = value
        for name, place in found.items():
            self.inner.bind_ortvalue_output(name, place.held)

    def _bind(self, name: str, value: Value) -> None:
        self.held.append(value)
        self.inner.bind_ortvalue_input(name, value.held)

    def run(self) -> None:
        """Run once; BackendError where ONNX Runtime cannot."""
        for name, array in self.copied.items():
            self.inner.bind_cpu_input(name, np.ascontiguousarray(array, self.session.dtype(name)))
        try:
            if self.copied:
                self.inner.synchronize_inputs()
            self.session.inner.run_with_iobinding(self.inner)
        except Exception as error:  # whatever ONNX Runtime raises
            raise BackendError(f"ONNX Runtime cannot run {self.session.name}: {first_line(error)}") from None


def _has_gpu() -> bool:
    """Whether there is GPU memory to be had: ONNX Runtime may be built for GPUs on a machine without one."""
    if CUDA not in available():
        return False
    try:
        installed().OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception:  # whatever ONNX Runtime raises where it finds no driver
        return False
    return True


def _threads() -> int:
    """The cores that this process may use; 0, which ONNX Runtime takes for its own count, where that is all."""
    free = len(os.sched_getaffinity(0))
    return 0 if free == os.cpu_count() else free
