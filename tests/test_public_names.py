"""The public names are a contract; this file changes only when the contract does."""

import dataclasses
import inspect

import pytest

import foveate
import foveate.passes


def test_public_names():
    assert foveate.__all__ == [
        "OptimizedModel",
        "__version__",
        "cost",
        "diff",
        "export",
        "load",
        "optimize",
        "questions",
        "trace",
    ]
    assert dir(foveate) == sorted(foveate.__all__)
    for name in foveate.__all__:
        assert getattr(foveate, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = foveate.nonsense


def test_signatures():
    assert list(inspect.signature(foveate.optimize).parameters) == [
        "model",
        "passes",
        "calibration",
        "backend",
        "traced",
    ]
    assert list(inspect.signature(foveate.load).parameters) == ["path", "backend", "device", "tensors"]
    assert list(inspect.signature(foveate.trace).parameters) == ["model"]


def test_passes_and_their_options():
    options = {
        name: {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        for name, cls in foveate.passes.PASSES.items()
    }
    assert options == {
        "cut-visual": {"from_layer": None, "last": None, "eta": 0.003, "floor": 5, "stats": None},
        "drop-visual-heads": {
            "keep": None,
            "mask": None,
            "from_layer": 2,
            "scores": None,
            "alpha": None,
            "vote": 0.4,
            "rho": "mass",
            "average": False,
            "stats": None,
            "renorm": True,
        },
        "drop-visual-neurons": {
            "keep": 0.5,
            "select": "prefix",
            "seed": 0,
            "from_layer": 0,
            "multiple_of": None,
            "stats": None,
        },
        "average-pool": {"factor": 2},
        "cls-curve": {"layer": 3, "alpha": 0.075, "alpha_mode": "expand"},
        "crossget": {"merge": 13, "vectors": None, "hand_on": False},
        "cdpruner": {"keep": 0.25, "clip": "", "theta": None},
        "divprune": {"keep": 0.25},
        "fastervlm": {"keep": 0.25},
        "dart": {"layer": 2, "keep": 0.5, "pivots": 4},
        "sparsevlm": {
            "layers": (2, 6, 15),
            "budget": 192,
            "keeps": None,
            "recycle": True,
            "counts": "code",
            "scale": None,
        },
        "fitprune": {"budget": 0.4, "schedule": None, "stats": None},
        "prumerge": {"keep": None, "plus": False, "neighbors": 32},
        "resize": {"grid": 12},
        "tome": {"merge": 16, "schedule": "constant", "proportional": True, "sort": True},
        "vispruner": {"keep": 0.25, "important": 0.5},
        "visionzip": {"dominant": 54, "contextual": 10},
        "fastv": {"layer": 2, "keep": 0.5},
        "grid-prune": {"layer": 2, "keep": 0.5},
        "dynamicvit": {"layers": (), "modules": None, "keep": 0.7},
        "smarttrim": {"layers": (), "modules": None, "keep": 0.3},
        "lvpruning": {"layers": (1, 8, 16), "modules": None, "ratio": 0.5, "step": 0.2},
        "pyramiddrop": {"layers": (), "keep": 0.5},
        "neighbor-attention": {"metric": "chebyshev", "causal": False, "see_prefix": True, "layers": None},
        "random-prune": {"layer": 2, "keep": 0.5, "seed": 0},
        "heavy-recent": {"heavy": 0.5, "recent": 0.5},
        "snapkv": {"capacity": 2048, "window": 32, "kernel": 5, "pooling": "avg"},
    }
    for cls in foveate.passes.PASSES.values():
        assert cls.__name__ in foveate.passes.__all__
        assert cls.source and cls.__doc__
