"""Would TensorRT's ONNX parser take this file? Every node is held to the table of operators, before TensorRT is there.

    findings = lint("decoder_prefill.onnx")
    print(to_text(findings))

Subgraphs are looked at too, and local functions where they are called. Weights are not read. A clean file has kept the
limits that the table states; that an engine can be built from it, only TensorRT can say.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from foveate.backends.onnx.nodes import DOMAIN
from foveate.backends.tensorrt.reading import every_node, read, subgraphs, with_shapes, without_functions
from foveate.backends.tensorrt.table import Check, Operator, Table, Version, operators, parse_version
from foveate.backends.tensorrt.values import Scope, Value, attributes
from foveate.errors import BackendError

if TYPE_CHECKING:
    import onnx

STANDARD = ("", "ai.onnx")
Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Finding:
    """A limit that a node breaks: which, how, what would be right, and who says so.

    node: its name, behind the names of nodes whose subgraph it is in; empty for what is wrong with the whole model.
    """

    node: str
    op: str
    rule: str
    problem: str
    right: str
    source: str

    def __str__(self) -> str:
        where = f"{self.op} {self.node!r}: " if self.node else ""
        return f"{where}{self.problem}; it takes {self.right} [{self.rule}: {self.source}]"


def lint(
    model: Source | onnx.ModelProto, tensorrt: str | None = None, largest: Mapping[str, int] | None = None
) -> list[Finding]:
    """What in an ONNX model, or in its file, breaks a row of the table; nothing if all is well.

    tensorrt: the version that is to build it, such as "10.14", where it is older than the table's.
    largest: the largest sizes of symbolic dimensions, so that a limit on what is computed from sizes is checked too.
    Raises ArtifactError for a file that is no ONNX model.
    """
    name = str(model) if isinstance(model, (str, os.PathLike)) else "the model"
    proto = read(model) if isinstance(model, (str, os.PathLike)) else model
    table = operators()
    target = _target(table, tensorrt)
    flat = with_shapes(without_functions(proto, name), name)
    return [*_opsets(flat, table), *_graph(flat.graph, table, target, Scope(flat.graph, largest or {}), "")]


def to_json(findings: Iterable[Finding], model: onnx.ModelProto) -> dict[str, Any]:
    """One model's entry of `lint.json`: how often each operator stands in it, and the findings."""
    counts = Counter(node.op_type for node in every_node(model.graph.node))
    return {"operators": dict(sorted(counts.items())), "findings": [asdict(f) for f in findings]}


def to_text(findings: Iterable[Finding]) -> str:
    """A finding a line."""
    return "\n".join(str(f) for f in findings)


def _target(table: Table, tensorrt: str | None) -> Version:
    newest = parse_version(table.tensorrt)
    try:
        asked = parse_version(tensorrt) if tensorrt else newest
    except ValueError as error:
        raise BackendError(f"tensorrt: {error}") from None
    return min(asked[:2], newest)


def _opsets(model: onnx.ModelProto, table: Table) -> Iterator[Finding]:
    least, most = table.opsets
    for entry in model.opset_import:
        if entry.domain in STANDARD and not least <= entry.version <= most:
            right = f"opset {least} to {most}"
            yield Finding("", "", "opset", f"opset {entry.version}", right, table.sources["operators"])


def _graph(graph: onnx.GraphProto, table: Table, target: Version, scope: Scope, prefix: str) -> Iterator[Finding]:
    known = {*(i.name for i in graph.input), *(t.name for t in graph.initializer)}
    for name in sorted(known):
        yield from _dtype(scope.get(name), name, f"{prefix}{name}", "input", table)
    for number, node in enumerate(graph.node):
        scope.add(node)
        place = prefix + (node.name or f"#{number}")
        for name in filter(None, node.output):
            yield from _dtype(scope.get(name), name, place, node.op_type, table)
        yield from _node(node, place, scope, table, target)
        for attribute, inner in subgraphs(node):
            inside = Scope(inner, scope.largest, scope)
            yield from _graph(inner, table, target, inside, f"{place}/{attribute}/")


def _dtype(value: Value, name: str, place: str, op: str, table: Table) -> Iterator[Finding]:
    right, source = f"one of {', '.join(table.dtypes.values())}", table.sources["operators"]
    if not value.is_tensor:
        yield Finding(place, op, "dtype", f"{name} is no tensor", "tensors only", source)
    elif value.dtype and _element(value.dtype) not in table.dtypes:
        yield Finding(place, op, "dtype", f"{name} is {_element(value.dtype)}", right, source)


def _node(node: onnx.NodeProto, place: str, scope: Scope, table: Table, target: Version) -> Iterator[Finding]:
    op = node.op_type
    if attributes(node).get("plugin_namespace") == DOMAIN:
        return  # the package brings the plugin
    if node.domain not in STANDARD:
        problem, right = f"the domain {node.domain} is not ONNX's", "ai.onnx operators, or a plugin of this name"
        yield Finding(place, op, "domain", problem, right, table.sources["operators"])
        return
    row = table.operators.get(op)
    if row is None or not row.supported:
        problem = "not supported" if row else "not in the table"
        yield Finding(
            place,
            op,
            op if row else "unknown",
            problem,
            "the operators that the table lists",
            table.sources["operators"],
        )
        return
    if row.since and target < row.since:
        since = ".".join(map(str, row.since))
        problem = f"TensorRT {'.'.join(map(str, target))} does not know it"
        yield Finding(place, op, f"{op}.since", problem, f"TensorRT {since} or later", table.sources["changelog"])
    yield from _types(node, row, place, scope, table)
    for check in row.checks:
        if broken := _breaks(node, check, scope, table):
            yield Finding(place, op, check.id, broken, check.right, check.source)


def _types(node: onnx.NodeProto, row: Operator, place: str, scope: Scope, table: Table) -> Iterator[Finding]:
    names = list(node.output) if row.data is None else list(node.input[row.data : row.data + 1])
    for name in filter(None, names):
        found = table.dtypes.get(_element(scope.get(name).dtype))
        if found and found not in row.types:
            right = f"one of {', '.join(row.types)}"
            yield Finding(place, row.name, f"{row.name}.types", f"{name} is {found}", right, row.source)


def _breaks(node: onnx.NodeProto, check: Check, scope: Scope, table: Table) -> str | None:
    """How a node breaks a limit; None if it does not, or if too little is known before it runs."""
    if check.kind == "never":
        return "this operator has outputs of a size that values decide"
    if check.kind == "outputs":
        extra = [name for name in node.output[check.limit :] if name]
        return f"it makes {', '.join(extra)} too" if extra else None
    if check.kind == "allowed":
        set_to = attributes(node)
        if check.where not in set_to or set_to[str(check.where)] in check.limit:
            return None
        return f"{check.where} is {set_to[str(check.where)]!r}" if check.limit else f"{check.where} is set"
    name = node.input[int(check.where)] if int(check.where) < len(node.input) else ""
    return _input_breaks(name, scope.get(name), check, table) if name else None


def _input_breaks(name: str, value: Value, check: Check, table: Table) -> str | None:
    match check.kind:
        case "absent":
            return f"{name} is given"
        case "rank":
            rank = None if value.shape is None else len(value.shape)
            return f"{name} has {rank} axes" if rank not in (None, check.limit) else None
        case "types":
            found = table.dtypes.get(_element(value.dtype))
            return f"{name} is {found}" if found and found not in check.limit else None
        case "constant":
            return None if value.constant else f"{name} is no constant"
        case "shape":
            return None if value.shape_like else f"{name} depends on values"
        case "static":
            open_axes = [d for d in value.shape or () if isinstance(d, str)]
            return f"{name} has axes of open length" if open_axes else None
        case _:
            most = None if value.numbers is None else float(value.numbers.max())
            return f"{name} is {most:g}" if most is not None and most >= check.limit else None


def _element(dtype: int) -> str:
    from onnx import TensorProto

    try:
        return str(TensorProto.DataType.Name(dtype))
    except ValueError:
        return f"element type {dtype}"
