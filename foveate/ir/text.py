"""Programs as text: readable, stable, and enough to build them again.

    graph prefill
    visual = input(float32, batch, visual_tokens, 192) ; -1 visual hidden
    ...
    # layer 3
    l3_visual_linear_1 = aten.linear.default(l3_visual_mul_2, weight("...q_proj.weight")) ; 3 visual
        self_attn.q_proj | split | twin linear_9 | float32[batch, visual_tokens, 192]     (one line)
    return {...}

Arguments are Python literals, names of earlier values, `weight("...")` and `dtype("...")`. Reading evaluates nothing:
lines are parsed with `ast`, ops come from `OPS`, and every shape is computed anew and compared with the text.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.errors import ArtifactError, FoveateError
from foveate.ir.program import NodeInfo, Program, info, outputs
from foveate.ir.rewriter import Rewriter
from foveate.ir.tokens import RULES

aten = torch.ops.aten

_VISION = (
    aten.conv2d.default,
    aten.embedding.default,
    aten.expand.default,
    aten.select.int,
    aten.sym_size.int,
    aten.permute.default,
    aten.add.Scalar,
    aten.mul.Scalar,
    ops.encoder_attention,
    ops.varlen_attention,
    ops.places,
    ops.diverse_scores,
    ops.distinct_scores,
    ops.relevance,
    ops.determinant_scores,
    ops.visionzip,
    ops.prumerge,
    ops.tome,
    ops.join_tokens,
    ops.received,
    ops.column_means,
    ops.segment_means,
    ops.segment_tokens,
    ops.crossget,
    ops.cls_curve,
    aten.detach.default,
    ops.padded_keys,
    aten.log.default,
    aten._upsample_bilinear2d_aa.default,
)
OPS: dict[str, Any] = {str(op): op for op in (*RULES, *_VISION) if op is not operator.getitem}
"""Every op a graph may call, by its name in the text."""

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
}


def program_to_text(program: Program, graph: str | None = None) -> str:
    """All graphs of a program, or the named one."""
    names = program.symbols.names()
    chosen = program.graphs if graph is None else {graph: program.graphs[graph]}
    return "\n".join(_graph_to_text(name, g, names) for name, g in chosen.items())


def _graph_to_text(name: str, graph: fx.Graph, names: dict[Any, str]) -> str:
    lines = [f"graph {name}"]
    layer: int | None = None
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            lines.append(f"return {_literal(outputs(graph), node_text)}")
            continue
        about = info(node)
        if node.op == "call_function" and about.layer != layer:
            layer = about.layer
            lines.append(f"# layer {layer}")
        lines.append(f"{node.name} = {call_text(node, names)} ; {_about(about)} | {value_text(node, names)}")
    return "\n".join(lines) + "\n"


def value_text(node: fx.Node, names: dict[Any, str]) -> str:
    """dtype and shape of a node's value, such as `float32[batch, visual_tokens, 192]`."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(size_text(s, names) for s in value.shape)}]"
    if isinstance(value, tuple):
        return f"{len(value)} values"
    return f"int {size_text(value, names)}"


def size_text(size: Any, names: Mapping[Any, str]) -> str:
    """A size as a reader would write it: a number, or an expression of the program's names."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    expression = size.node.expr
    text = str(expression)
    for symbol, name in names.items():
        text = text.replace(str(symbol), name) if symbol in expression.free_symbols else text
    # torch's own functions, as a reader would write them.
    text = re.sub(r"ToFloat\((\w+)\)", r"\1", text).replace("ToFloat(", "(")
    return text.replace("FloorToInt(", "floor(").replace("CeilToInt(", "ceil(")


def node_text(node: fx.Node) -> str:
    """How arguments refer to a node: its name, or the weight it reads."""
    return f'weight("{node.target}")' if node.op == "get_attr" else node.name


def call_text(node: fx.Node, names: dict[Any, str], spell: Callable[[fx.Node], str] = node_text) -> str:
    """What a node computes, as in `aten.neg.default(x)`; `spell` says how arguments refer to other nodes."""
    if node.op == "placeholder":
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return f"input(int, {size_text(value, names)})"
        sizes = [size_text(s, names) for s in value.shape]
        return f"input({', '.join([str(value.dtype).removeprefix('torch.'), *sizes])})"
    if node.target is operator.getitem:
        return f"item({_literal(node.args[0], spell)}, {node.args[1]})"
    parts = [_literal(a, spell) for a in node.args] + [f"{k}={_literal(v, spell)}" for k, v in node.kwargs.items()]
    return f"{node.target}({', '.join(parts)})"


def _about(about: NodeInfo) -> str:
    parts = [f"{about.layer} {about.stream} {about.role or '-'}", about.by]
    if about.origin:
        parts.append("from " + " ".join(about.origin))
    if about.twin:
        parts.append(f"twin {about.twin}")
    return " | ".join(parts)


def _literal(value: Any, spell: Callable[[fx.Node], str]) -> str:
    if isinstance(value, fx.Node):
        return spell(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(v, spell) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}": {_literal(v, spell)}' for k, v in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return f'dtype("{str(value).removeprefix("torch.")}")'
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str) and value.isprintable() and '"' not in value and "\\" not in value:
        return f'"{value}"'
    raise FoveateError(f"a graph holds {value!r}, which has no text form")


def parse_graphs(program: Program, text: str) -> dict[str, fx.Graph]:
    """Graphs from text, over the weights and sizes of `program`, which is not changed.

    Raises ArtifactError naming the line that cannot be read, calls an unknown op, or whose shape does not hold.
    """
    graphs: dict[str, fx.Graph] = {}
    reader: _Reader | None = None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line.startswith("graph "):
                name = line.removeprefix("graph ").strip()
                if name in graphs:
                    raise ValueError(f"graph {name} stands twice")
                reader = _Reader(program)
                graphs[name] = reader.edit.graph
            elif line.strip() and not line.startswith("#"):
                if reader is None:
                    raise ValueError("no graph has been opened")
                reader.read(line)
        except Exception as error:  # whatever a hostile line provokes, the line is what is wrong
            raise ArtifactError(f"program text, line {number}: {error}: {line[:80]}") from None
    for name, graph in graphs.items():
        if not any(n.op == "output" for n in graph.nodes):
            raise ArtifactError(f"program text: graph {name} returns nothing")
    return graphs


class _Reader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.edit = Rewriter(program, fx.Graph(), by="text")
        self.nodes: dict[str, fx.Node] = {}
        self.closed = False

    def read(self, line: str) -> None:
        if self.closed:
            raise ValueError("the graph has returned already")
        if line.startswith("return "):
            result = self.value(ast.parse(line.removeprefix("return "), mode="eval").body)
            if not isinstance(result, dict):
                raise ValueError("a graph returns a dictionary")
            self.edit.output(result)
            self.closed = True
            return
        code, _, notes = line.partition(" ; ")
        match ast.parse(code).body:
            case [ast.Assign(targets=[ast.Name(id=name)], value=call)]:
                pass
            case _:
                raise ValueError("not of the form name = op(...)")
        if not isinstance(call, ast.Call) or name in self.nodes:
            raise ValueError("not a call" if name not in self.nodes else f"{name} is made twice")
        *about_parts, shape = notes.split(" | ")
        node = self.call(name, ast.unparse(call.func), call, _parse_about(about_parts))
        found = value_text(node, self.program.symbols.names())
        if found != shape.strip():
            raise ValueError(f"the value is {found}, the text says {shape.strip()}")
        self.nodes[name] = node

    def call(self, name: str, function: str, call: ast.Call, about: NodeInfo) -> fx.Node:
        if function == "input":
            return self.edit.placeholder(name, self.input_value(call), about)
        args = [self.value(a) for a in call.args]
        if function == "item":
            source, place = args
            if not isinstance(source.meta["val"], tuple):
                raise ValueError(f"{source.name} is one value, not several")
            return self.edit.item(source, int(place), about, name=name)
        if function not in OPS:
            raise ValueError(f"{function} is not an op that a program may call")
        kwargs = {str(k.arg): self.value(k.value) for k in call.keywords}
        return self.edit.call(OPS[function], *args, about=about, name=name, **kwargs)

    def input_value(self, call: ast.Call) -> Any:
        kind, *sizes = (ast.unparse(call.args[0]), *map(self.size, call.args[1:]))
        if kind == "int":
            if len(sizes) != 1 or isinstance(sizes[0], int | float):
                raise ValueError("a whole-number input is named after a size")
            return sizes[0]
        device = self.program.weights.device()
        with self.program.symbols.mode:
            return torch.empty(sizes, dtype=_DTYPES[kind], device=device)

    def size(self, expression: ast.expr) -> Any:
        """A number, the name of a size, or made of one: `floor(0.5*visual_tokens)`, `images + 1`, `patches//4`."""
        match expression:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name) if name in self.program.symbols.HINTS:
                return self.program.symbols[name]
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return self.size(left) * self.size(right)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.size(left) + self.size(right)
            case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
                return self.size(left) // self.size(right)
            case ast.Call(func=ast.Name(id="floor"), args=[inner]):
                return math.floor(self.size(inner))
        raise ValueError(f"{ast.unparse(expression)} is not a size")

    def value(self, expression: ast.expr) -> Any:
        """A literal, a value's name, a weight or a dtype; anything else is refused."""
        if isinstance(expression, ast.Constant):
            return expression.value
        if isinstance(expression, ast.UnaryOp) and isinstance(expression.op, ast.USub):
            return -self.value(expression.operand)
        if isinstance(expression, ast.List):
            return [self.value(e) for e in expression.elts]
        if isinstance(expression, ast.Dict):
            keys = [self.value(k) for k in expression.keys if k is not None]
            return dict(zip(keys, map(self.value, expression.values), strict=True))
        if isinstance(expression, ast.Name):
            return self.nodes[expression.id]
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name) and len(expression.args) == 1:
            argument = self.value(expression.args[0])
            if expression.func.id == "weight":
                return self.edit.weight(str(argument))
            if expression.func.id == "dtype":
                return _DTYPES[argument]
        raise ValueError(f"{ast.unparse(expression)} is not a value")


def _parse_about(parts: list[str]) -> NodeInfo:
    first, by, *rest = parts
    layer, stream, role = first.split(" ", 2)
    if stream not in ("visual", "text", "joint", "none"):
        raise ValueError(f"{stream!r} is not a stream")
    options = {key: value for key, _, value in (part.partition(" ") for part in rest)}
    return NodeInfo(
        int(layer),
        "" if role == "-" else role,
        stream,  # type: ignore[arg-type]  # checked above
        by,
        tuple(options.get("from", "").split()),
        options.get("twin", ""),
    )
