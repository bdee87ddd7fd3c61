"""`operators.yaml`, read and checked: what TensorRT's ONNX parser takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from foveate.errors import ArtifactError

VERSION = 1
SUBJECTS = ("input", "attribute", "outputs", "never")
INPUT_LIMITS = ("absent", "rank", "types", "constant", "shape", "static", "below")
Version = tuple[int, ...]


@dataclass(frozen=True)
class Check:
    """One limit of an operator: of `subject` (an input, an attribute, ...), which must be as `limit` says.

    where: the input's number or the attribute's name; 0 for the others. kind: one of `INPUT_LIMITS`, or the subject.
    """

    id: str
    kind: str
    where: int | str
    limit: Any
    right: str
    source: str


@dataclass(frozen=True)
class Operator:
    """One row: the types of its data (`data` says of which input; None: of its outputs), its age, its limits."""

    name: str
    supported: bool
    types: tuple[str, ...]
    data: int | None
    since: Version | None
    note: str
    checks: tuple[Check, ...]
    source: str


@dataclass(frozen=True)
class Table:
    """The whole file; `dtypes` maps ONNX's names of element types to the names that rows use."""

    tensorrt: str
    opsets: tuple[int, int]
    sources: Mapping[str, str]
    dtypes: Mapping[str, str]
    operators: Mapping[str, Operator]


def parse_version(text: str) -> Version:
    """`10.15` as (10, 15); ValueError for anything else."""
    parts = text.split(".")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r} is no version such as 10.15")
    return tuple(int(part) for part in parts)


@cache
def operators() -> Table:
    """The table that foveate carries."""
    text = (files(__package__) / "operators.yaml").read_text(encoding="utf-8")
    return parse(text)


def parse(text: str) -> Table:
    """A table from YAML; ArtifactError names the row that has the wrong shape."""
    try:
        content = yaml.safe_load(text)
        return _table(content)
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ArtifactError(f"the table of TensorRT's operators is damaged: {reason}") from None


def _table(content: dict[str, Any]) -> Table:
    if content["version"] != VERSION:
        raise ValueError(f"its version is {content['version']!r}; this foveate reads {VERSION}")
    parse_version(content["tensorrt"])
    known = set(content["dtypes"].values())
    for name, group in content["groups"].items():
        _types(group, {}, known, f"group {name}")
    rows = {
        name: _operator(name, row, content["groups"], known, content["sources"])
        for name, row in content["operators"].items()
    }
    opsets = int(content["opset"]["min"]), int(content["opset"]["max"])
    return Table(content["tensorrt"], opsets, content["sources"], content["dtypes"], rows)


def _operator(
    name: str, row: dict[str, Any], groups: dict[str, list[str]], known: set[str], sources: dict[str, str]
) -> Operator:
    unknown = set(row) - {"supported", "types", "data", "since", "note", "checks", "source"}
    if unknown:
        raise ValueError(f"{name} has the unknown field {min(unknown)!r}")
    supported = row.get("supported", True)
    if supported is not ("types" in row):
        raise ValueError(f"{name} must have types, or supported: false")
    data = row.get("data", 0)
    source = sources[row.get("source", "operators")]
    return Operator(
        name=name,
        supported=supported,
        types=_types(row["types"], groups, known, name) if supported else (),
        data=None if data == "output" else int(data),
        since=parse_version(row["since"]) if "since" in row else None,
        note=str(row.get("note", "")),
        checks=tuple(_check(name, check, known, sources, source) for check in row.get("checks", ())),
        source=source,
    )


def _types(types: Any, groups: dict[str, list[str]], known: set[str], name: str) -> tuple[str, ...]:
    found = groups[types] if isinstance(types, str) else types
    if not isinstance(found, list) or not found or not set(found) <= known:
        raise ValueError(f"{name} has the types {types!r}; there are {', '.join(sorted(known))}")
    return tuple(found)


def _check(name: str, check: dict[str, Any], known: set[str], sources: dict[str, str], source: str) -> Check:
    fields = dict(check)
    key, right = f"{name}.{fields.pop('id')}", str(fields.pop("right"))
    source = sources[fields.pop("source")] if "source" in fields else source
    subject = next((s for s in SUBJECTS if s in fields), "")
    where: int | str = 0
    if subject == "input":
        where, kind = int(fields.pop("input")), next((k for k in INPUT_LIMITS if k in fields), "")
    elif subject == "attribute":
        where, kind = str(fields.pop("attribute")), "allowed"
    else:
        kind = subject
    if set(fields) != {kind}:
        raise ValueError(
            f"{key} must limit one of: {', '.join(SUBJECTS)}; an input in one of: {', '.join(INPUT_LIMITS)}"
        )
    if kind == "types":
        _types(fields["types"], {}, known, key)
    return Check(key, kind, where, fields[kind], right, source)
