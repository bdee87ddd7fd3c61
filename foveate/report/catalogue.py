"""All passes and recipes, described by their own dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from foveate.passes.base import Pass
from foveate.passes.pipeline import PASSES, recipes


def catalogue() -> dict[str, Any]:
    """Every pass with name, options, source and summary, and the names of the recipes; fit for JSON."""
    return {"passes": [_describe(cls) for cls in PASSES.values()], "recipes": list(recipes())}


def _describe(cls: type[Pass]) -> dict[str, Any]:
    doc = inspect.getdoc(cls) or ""
    return {
        "name": cls.name,
        "options": [_option(f) for f in dataclasses.fields(cls)],
        "source": cls.source,
        "summary": " ".join(doc.split("\n\n")[0].split()),
        "description": doc,
    }


def _option(option: dataclasses.Field[Any]) -> dict[str, Any]:
    required = option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
    return {
        "name": option.name,
        "type": str(option.type),
        "required": required,
        "default": None if required else option.default,
    }
