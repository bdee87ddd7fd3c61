"""`foveate.load`: what was saved or exported, as a model over torch tensors or over numpy arrays.

Imports torch only for the former.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.model import OptimizedModel
    from foveate.runner import NumpyModel


@overload
def load(
    path: str | Path, backend: str | None = None, device: str | None = None, tensors: Literal["pt"] = "pt"
) -> OptimizedModel: ...


@overload
def load(
    path: str | Path, backend: str | None = None, device: str | None = None, *, tensors: Literal["np"]
) -> NumpyModel: ...


def load(
    path: str | Path, backend: str | None = None, device: str | None = None, tensors: Literal["pt", "np"] = "pt"
) -> OptimizedModel | NumpyModel:
    """Load what `OptimizedModel.save_pretrained` or `export` wrote; ArtifactError for a damaged or foreign folder.

    backend: what runs it; None for what it was written for: `eager`, or `onnx` where it was exported. tensors: `np`
    runs an exported package over numpy arrays, which needs neither torch nor transformers; answers are greedy or
    sampled, and BackendError says what cannot be run. device: None for `cpu`; over numpy, for a GPU if ONNX Runtime has
    one.
    """
    if tensors == "np":
        if backend not in (None, "onnx"):
            raise InputError(f"tensors='np' is run by the onnx backend, not by {backend!r}")
        from foveate.runner import open_package

        return open_package(Path(path), device)
    if tensors != "pt":
        raise InputError(f"tensors must be 'pt' or 'np', not {tensors!r}")
    from foveate.artifact import load as load_artifact

    return load_artifact(Path(path), backend, device or "cpu")
