"""Trained modules of a selection, apart from the model that they were trained for: made by `foveate train`.

The file is safetensors: tensors named `<layer>.<part>`, and JSON in the metadata. Nothing in it is executed or
unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveate.errors import ArtifactError, PassError
from foveate.files import write_whole
from foveate.ir.program import ModelInfo

MODULE = "module"
"""Role of the nodes that a module consists of."""

FORMAT = 1
KEY = "foveate.modules"
MODEL = ("family", "layers", "hidden_size")
"""What a program must share with the model whose modules it uses."""

Shapes = dict[str, tuple[int, ...]]
"""Part of a module -> shape of its weight."""


@dataclass(frozen=True)
class Modules:
    """kind: the pass that they are for. model: its shape, as `MODEL` names it. before: layers, rising, that each have
    a module before them. tensors: `<layer>.<part>` -> weight. trained: how, for the reader."""

    kind: str
    model: dict[str, Any]
    before: tuple[int, ...]
    tensors: dict[str, Tensor]
    trained: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(
        cls, kind: str, info: ModelInfo, before: tuple[int, ...], shapes: Shapes, seed: int, dtype: torch.dtype
    ) -> Modules:
        """Untrained ones: matrices that keep the size of what they read, norms that change nothing, no biases."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in before:
            for part, shape in shapes.items():
                if len(shape) > 1:
                    value = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
                else:
                    value = torch.full(shape, float(part.endswith("weight")))
                tensors[f"{layer}.{part}"] = value.to(dtype)
        return cls(kind, shape_of(info), before, tensors)

    def check(self, kind: str, info: ModelInfo, before: tuple[int, ...], shapes: Shapes, where: str) -> None:
        """Raise PassError unless these are modules of that kind, for that model, before those layers."""
        if self.kind != kind:
            raise PassError(f"{kind}: {where} holds modules of {self.kind}; give those of {kind}")
        for name in MODEL:
            if self.model[name] != getattr(info, name):
                raise PassError(
                    f"{kind}: {where} was trained for a model with {name}={self.model[name]}, this one has "
                    f"{name}={getattr(info, name)}; train modules for this model"
                )
        if self.before != before:
            raise PassError(f"{kind}: {where} has modules before layers {list(self.before)}, not {list(before)}")
        wanted = {f"{layer}.{part}": shape for layer in before for part, shape in shapes.items()}
        for name in sorted(wanted.keys() | self.tensors.keys()):
            found = tuple(self.tensors[name].shape) if name in self.tensors else "missing"
            if found != wanted.get(name):
                raise PassError(f"{kind}: {where}: {name} is {found}, not {wanted.get(name, 'part of a module')}")

    def save(self, path: str | Path) -> None:
        """Write the file so that it is there whole or not at all; ArtifactError where that fails."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        about = {"format": FORMAT, "kind": self.kind, "model": self.model, "before": list(self.before)}
        about["trained"] = self.trained
        write_whole(Path(path), safetensors.torch.save(tensors, {KEY: json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> Modules:
        """Read a file that `save` wrote; ArtifactError for one that is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get(KEY, "null"))
                # A copy, because safetensors does not align what it reads.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  no dictionary
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
            raise ArtifactError(f"modules {path} cannot be read: {why}") from None
        if not isinstance(about, dict):
            raise ArtifactError(f"{path} holds no modules; make them with `foveate train --part modules`")
        if about.get("format") != FORMAT:
            raise ArtifactError(f"modules {path} have format {about.get('format')!r}; this foveate reads {FORMAT}")
        try:
            model = {name: about["model"][name] for name in MODEL}
            before = tuple(int(layer) for layer in about["before"])
            trained = dict(about.get("trained") or {})
            kind = str(about["kind"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"modules {path} are damaged: bad metadata, {error!r}") from None
        for name, value in tensors.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise ArtifactError(f"modules {path} are damaged: {name} holds values that are no finite numbers")
        return cls(kind, model, before, tensors, trained)


def shape_of(info: ModelInfo) -> dict[str, Any]:
    """What of a model its modules depend on."""
    return {name: getattr(info, name) for name in MODEL}
