"""Pipelines of passes: their text form, recipe files, and applying them in order."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from foveate.errors import FoveateWarning, PassError
from foveate.ir.collector import collector_paused
from foveate.ir.cost import default_device, prefill_cost
from foveate.ir.decode import derive_decode
from foveate.ir.program import Program
from foveate.ir.rules import verify
from foveate.ir.statistics import Statistics
from foveate.passes import kv, select
from foveate.passes.base import Pass
from foveate.passes.cut_visual import CutVisual
from foveate.passes.drop_visual_heads import DropVisualHeads
from foveate.passes.drop_visual_neurons import DropVisualNeurons
from foveate.passes.neighbor_attention import NeighborAttention

ALL: list[type[Pass]] = [CutVisual, DropVisualHeads, DropVisualNeurons, NeighborAttention]
ALL += [getattr(family, name) for family in (select, kv) for name in family.__all__]
PASSES = {cls.name: cls for cls in sorted(ALL, key=lambda cls: cls.name)}
"""Every pass by name."""

Passes = str | Pass | Sequence[Pass]


@collector_paused()
def apply_pipeline(program: Program, passes: Passes | None, calibration: Statistics | None = None) -> Program:
    """Apply passes to a traced program, in place, in order; the decode graph follows.

    calibration: statistics of the model, for passes that have no `stats` of their own.
    A pass that changes nothing is recorded with its reason and issues a FoveateWarning.
    """
    before, device = prefill_cost(program), default_device(program)
    for each in resolve(passes):
        record = each.apply(program, calibration)
        after = prefill_cost(program)
        effect = {name: (before[name], after[name]) for name in after}
        program.passes.append(dataclasses.replace(record, cost=effect, device=device))
        before = after
        if record.skipped:
            warnings.warn(f"{record.text} changed nothing: {record.skipped}", FoveateWarning, stacklevel=4)
    program.graphs["decode"] = derive_decode(program)
    verify(program)
    return program


def resolve(passes: Passes | None) -> list[Pass]:
    """Passes from what `optimize` takes: passes, pipeline text, `recipe:NAME`, or the path of a YAML file."""
    if passes is None:
        return []
    if isinstance(passes, Pass):
        return [passes]
    if not isinstance(passes, str):
        for each in passes:
            if not isinstance(each, Pass):
                raise PassError(f"{each!r} is not a pass; give passes, or a pipeline as text")
        return list(passes)
    if passes.startswith("recipe:"):
        return read_recipe(passes.removeprefix("recipe:"))
    if passes.endswith((".yaml", ".yml")):
        return _from_yaml(Path(passes))
    return parse_pipeline(passes)


def parse_pipeline(text: str) -> list[Pass]:
    """`name{field=value,...},name,...` as passes; values are YAML. Empty text is no pass.

    Raises PassError saying where the text is wrong.
    """
    found: list[Pass] = []
    position = 0
    while text[position:].strip():
        match = re.compile(r"\s*([A-Za-z][\w-]*)\s*").match(text, position)
        if not match:
            raise PassError(f"pipeline {text!r}, column {position + 1}: expected the name of a pass")
        name, position = match[1], match.end()
        options = ""
        if text[position : position + 1] == "{":
            end = _closing(text, position)
            options, position = text[position + 1 : end], end + 1
        found.append(make_pass(name, _options(text, name, options)))
        rest = re.compile(r"\s*(,?)\s*").match(text, position)
        assert rest  # matches the empty string
        if not rest[1] and rest.end() < len(text):
            raise PassError(f"pipeline {text!r}, column {rest.end() + 1}: expected a comma between passes")
        position = rest.end()
        if rest[1] and position == len(text):
            raise PassError(f"pipeline {text!r} ends in a comma: a pass is missing")
    return found


def pipeline_text(passes: Sequence[Pass]) -> str:
    """Passes as text that `parse_pipeline` reads back."""
    return ",".join(p.text() for p in passes)


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """A pass by name; PassError for an unknown name or option, or a bad value."""
    cls = PASSES.get(name)
    if cls is None:
        raise PassError(f"there is no pass {name!r}; there are: {', '.join(PASSES)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [o for o in options if o not in fields]
    if unknown:
        raise PassError(f"{name} has no option {unknown[0]!r}; it has: {', '.join(fields)}")
    missing = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in options
    ]
    if missing:
        raise PassError(f"{name} needs the option {missing[0]!r}, as in {name}{{{missing[0]}=...}}")
    return cls(**options)


def recipes() -> dict[str, Path]:
    """Recipes that ship with foveate, by name."""
    folder = Path(str(resources.files("foveate.passes") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(name: str) -> list[Pass]:
    """The passes of a recipe that ships with foveate."""
    known = recipes()
    if name not in known:
        raise PassError(f"there is no recipe {name!r}; there are: {', '.join(known) or 'none'}")
    return _from_yaml(known[name])


def recipe_models(name: str) -> list[str]:
    """The models that a shipped recipe was written for; none where it is for any."""
    models = _content(recipes()[name]).get("models", [])
    return [str(model) for model in models]


def _content(path: Path) -> dict[str, Any]:
    """What a recipe file says: a mapping with `passes`, a list, and maybe `models`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PassError(f"recipe file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PassError(f"recipe file {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not isinstance(content.get("passes"), list):
        raise PassError(f"recipe file {path} has no list named `passes`")
    if not isinstance(content.get("models", []), list):
        raise PassError(f"recipe file {path}: `models` must be a list of names")
    return content


def _from_yaml(path: Path) -> list[Pass]:
    """The passes of a recipe file, each a name or {name: {option: value}}."""
    found = []
    for entry in _content(path)["passes"]:
        if isinstance(entry, str):
            found.append(make_pass(entry, {}))
        elif isinstance(entry, dict) and len(entry) == 1:
            ((name, options),) = entry.items()
            if not isinstance(options, dict | None):
                raise PassError(f"recipe file {path}: options of {name} must be a mapping")
            found.append(make_pass(str(name), options or {}))
        else:
            raise PassError(f"recipe file {path}: {entry!r} is neither a name nor one name with its options")
    return found


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise PassError(f"pipeline {text!r}, column {start + 1}: the brace opened here is not closed")


def _options(text: str, name: str, body: str) -> dict[str, Any]:
    """`field=value,...` where values may hold commas inside brackets."""
    pairs = re.split(r",\s*(?=[A-Za-z_]\w*\s*=)", body) if body.strip() else []
    options: dict[str, Any] = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        field = field.strip()
        if not equals or not field.isidentifier():
            raise PassError(f"pipeline {text!r}: {pair.strip()!r} in {name} is not of the form field=value")
        if field in options:
            raise PassError(f"pipeline {text!r}: {name} sets {field} twice")
        try:
            options[field] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise PassError(
                f"pipeline {text!r}: cannot read the value {value.strip()!r} of {field} in {name}"
            ) from None
        if re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value.strip()):
            options[field] = float(value)  # YAML 1.1 takes 1e-3 for text; no one else does
        if options[field] is None:
            raise PassError(f"pipeline {text!r}: {field} of {name} has no value")
    return options
