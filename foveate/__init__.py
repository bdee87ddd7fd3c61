"""foveate: a graph compiler that really removes the visual work of a multimodal LLM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.api import cost, diff, export, optimize, trace
    from foveate.clip import questions
    from foveate.loading import load
    from foveate.model import OptimizedModel

__version__ = "0.1.0"
__all__ = ["OptimizedModel", "__version__", "cost", "diff", "export", "load", "optimize", "questions", "trace"]

_HOME = {
    "optimize": "foveate.api",
    "load": "foveate.loading",
    "trace": "foveate.api",
    "cost": "foveate.api",
    "diff": "foveate.api",
    "OptimizedModel": "foveate.model",
    "export": "foveate.api",
    "questions": "foveate.clip",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `foveate --help` and `import foveate` do not wait for torch.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
