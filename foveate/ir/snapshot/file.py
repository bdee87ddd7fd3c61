"""Snapshot files: how they are written, to the byte, and how they are read, whoever wrote them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import ArtifactError
from foveate.ir.snapshot.check import MAX_BYTES, SNAPSHOT, WrongError, shortened

FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """A program as plain data: `data` is what the file holds, with its keys in the file's order."""

    data: dict[str, Any]

    def to_text(self) -> str:
        """The file, to the byte."""
        graphs = {name: _short(graph) for name, graph in self.data["graphs"].items()}
        return _written({**self.data, "graphs": graphs}, "") + "\n"

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(self.data["model"]["name"])

    @property
    def passes(self) -> list[str]:
        """Texts of the passes that changed something."""
        return [record["text"] for record in self.data["passes"] if record["skipped"] is None]


def printable(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def read_snapshot(source: str | Path) -> Snapshot:
    """A snapshot from a path, or from the text of a file (text starts with a brace).

    Raises ArtifactError that names the file and the key for what is no snapshot, damaged, or of another format.
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return _parse(source, "snapshot")
    path = Path(source).expanduser()
    try:
        if not path.is_file():
            raise ArtifactError(f"{path} is no file; a snapshot is a JSON file written by `foveate snapshot`")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_BYTES >> 20} MiB, so it is no snapshot")
        return _parse(content.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise ArtifactError(f"{path} is no text, so it is no snapshot") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parse(text: str, where: str) -> Snapshot:
    if len(text) > MAX_BYTES:
        raise ArtifactError(f"{where} is larger than {MAX_BYTES >> 20} MiB, so it is no snapshot")
    try:
        content = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{where} is not whole JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(f"{where} cannot be read as JSON: {reason}") from None
    if not isinstance(content, dict) or "foveate_snapshot" not in content:
        raise ArtifactError(f"{where} is no snapshot: it has no key foveate_snapshot")
    found = content["foveate_snapshot"]
    if isinstance(found, int) and found > FORMAT:
        raise ArtifactError(f"{where} was made by a newer foveate: its format is {found}, this one reads {FORMAT}")
    if found != FORMAT or isinstance(found, bool):
        raise ArtifactError(f"{where}: foveate_snapshot must be {FORMAT}, it is {str(found)[:20]}")
    try:
        return Snapshot(SNAPSHOT(content, ""))
    except WrongError as error:
        raise ArtifactError(f"{where} is no valid snapshot: {error}") from None
    except RecursionError:
        raise ArtifactError(f"{where} cannot be read: it is nested too deeply") from None


def _short(graph: dict[str, Any]) -> dict[str, Any]:
    """A graph whose nodes do not repeat what the node before says."""
    sections = [{**section, "nodes": shortened(section["nodes"])} for section in graph["sections"]]
    return {**graph, "inputs": shortened(graph["inputs"]), "sections": sections}


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")


def _written(value: Any, indent: str) -> str:
    """JSON with one line for what is flat, so that a line of a text diff is one node, or the figures of one part."""
    if _flat(value):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    deeper = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(k, ensure_ascii=False)}: {_written(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(deeper + part for part in parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _written(v, deeper) for v in value) + f"\n{indent}]"


def _flat(value: Any) -> bool:
    """Plain values, lists of them, and mappings to either."""
    if isinstance(value, dict):
        return all(not isinstance(v, dict) and _flat(v) for v in value.values())
    return not isinstance(value, list) or not any(isinstance(v, (list, dict)) for v in value)
