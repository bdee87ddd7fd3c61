"""LoRA layers of peft on an optimized model's weights: a graph's linear runs with what its module has been given.

    graph                                 runs
    y = linear(x, w[:r, :c], b[:r])       y = linear(x, w[:r, :c], b[:r]) + scaling * (x A[:, :c]^T) B[:r]^T

A pass may let visual tokens use a part of a weight; the same part of the low-rank update goes with it, so adapters see
the pruned model and cost what is left of it. peft itself is not imported: its layers say what they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from foveate.errors import BackendError
from foveate.ir.program import Program, copy_graph
from foveate.ir.weights import aten, linear_part
from foveate.kernels.linear import linear


def adapter_layers(program: Program) -> dict[str, nn.Module]:
    """The adapter layers among the modules that hold weights, by path.

    Raises BackendError for one that is not a plain LoRA layer of a linear.
    """
    found = {}
    for path, module in ((held.path, held.module) for held in program.weights.holders()):
        if type(module) in (nn.Module, nn.Linear):
            continue
        variants: Any = getattr(module, "lora_variant", None)
        if not hasattr(module, "lora_A") or variants or type(getattr(module, "base_layer", None)) is not nn.Linear:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise BackendError(
                f"{path} was replaced by a {kind}{' with a variant' if variants else ''}; an optimized model runs "
                "plain LoRA layers (peft.LoraConfig without DoRA and the like) and no other adapters"
            )
        found[path] = module
    return found


class Adapted(nn.Module):
    """A linear on some rows and columns of a weight, with what a LoRA layer adds there."""

    def __init__(self, layer: Any, rows: slice, columns: slice) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, because the layer's parameters belong to the optimized model
        self.rows, self.columns = rows, columns

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `torch.nn.functional.linear`; x [..., columns] -> [..., rows]."""
        (layer,) = self.layer
        out = linear(x, weight, bias)
        if layer.disable_adapters or layer.merged:
            return out
        for name in layer.active_adapters:
            if name not in layer.lora_A:
                continue
            down, up = layer.lora_A[name].weight[:, self.columns], layer.lora_B[name]
            up_bias = None if up.bias is None else up.bias[self.rows]
            low = linear(layer.lora_dropout[name](x.to(down.dtype)), down)
            out = out + (linear(low, up.weight[self.rows], up_bias) * layer.scaling[name]).to(out.dtype)
        return out


def with_adapters(program: Program, graph: fx.Graph) -> tuple[Any, fx.Graph]:
    """What `fx.GraphModule` takes, (root, graph); the graph is a copy of its own."""
    graph = copy_graph(graph)
    layers = adapter_layers(program)
    if not layers:
        return program.weights, graph
    root: dict[str, Any] = {
        str(n.target): program.weights.get(str(n.target)) for n in graph.nodes if n.op == "get_attr"
    }
    for node in graph.nodes:
        part = linear_part(node) if node.target == aten.linear.default else None
        layer = layers.get(part[0].rpartition(".")[0]) if part else None
        if part and layer:
            node.op, node.target = "call_module", f"adapted_{node.name}"
            root[node.target] = Adapted(layer, *part[1:])
    return root, graph
