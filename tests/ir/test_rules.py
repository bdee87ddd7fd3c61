"""For every rule a program that breaks it, and the verifier that says where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from foveate import ops
from foveate.errors import VerifyError
from foveate.ir import rules
from foveate.ir.program import NodeInfo, Program, info, outputs
from foveate.ir.rewriter import Rewriter, nodes_of
from foveate.ir.rules import RULES, verify
from tests.ir.programs import PIPELINES, fresh, pruned

aten = torch.ops.aten
Break = Callable[[Program], str]
"""Breaks a program and says which part of the message must be there."""


def first(program: Program, target: Any, graph: str = "prefill") -> fx.Node:
    return nodes_of(program.graphs[graph], op=target)[0]


def follow(program: Program, target: Any, *args: Any) -> fx.Node:
    """Put a new op behind the text stream's first linear, so that the rest of the graph reads it."""
    source = nodes_of(program.prefill, op=aten.linear.default, stream="text")[0]
    edit = Rewriter(program, program.prefill, by="test")
    with edit.after(source):
        new = edit.call(target, source, *args, about=info(source))
    edit.replace(source, new)
    return new


def unknown_op(program: Program) -> str:
    new = follow(program, aten.cumsum.default, 2)
    return f"prefill graph, node {new.name}: calls aten.cumsum.default"


def method_call(program: Program) -> str:
    source = first(program, aten.linear.default)
    with program.prefill.inserting_after(source):
        new = program.prefill.call_method("relu", (source,))
    new.meta.update(source.meta)
    source.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return f"prefill graph, node {new.name}: a `call_method` node"


def unknown_op_in_vision(program: Program) -> str:
    source = first(program, aten.linear.default, "vision")
    edit = Rewriter(program, program.graphs["vision"], by="test")
    with edit.after(source):
        new = edit.call(aten.flip.default, source, [1], about=info(source))
    edit.replace(source, new)
    return f"vision graph, node {new.name}: calls aten.flip.default"


def python_function(program: Program) -> str:
    node = first(program, aten.linear.default, "decode")
    node.target = eval_like
    return f"decode graph, node {node.name}: calls"


def eval_like(*args: Any) -> Any:
    raise AssertionError("a verifier runs nothing")


def no_info(program: Program) -> str:
    node = first(program, aten.linear.default)
    del node.meta["foveate"]
    return f"prefill graph, node {node.name}: has no NodeInfo"


def no_shape(program: Program) -> str:
    node = first(program, aten.linear.default, "decode")
    del node.meta["val"]
    return f"decode graph, node {node.name}: has no shape"


def missing_weight(program: Program) -> str:
    name = "lm_head.weight"
    del program.weights.names[name]
    node = next(n for n in program.prefill.nodes if n.op == "get_attr" and n.target == name)
    return f"prefill graph, node {node.name}: reads the weight {name}"


def dead_node(program: Program) -> str:
    edit = Rewriter(program, program.prefill, by="test")
    source = first(program, aten.linear.default)
    with edit.after(source):
        new = edit.call(aten.neg.default, source, about=info(source))
    return f"prefill graph, node {new.name}: computes what nothing uses"


def dead_weight(program: Program) -> str:
    new = Rewriter(program, program.graphs["decode"], by="test").weight("model.vision_tower.pre_layrnorm.weight")
    return f"decode graph, node {new.name}: computes what nothing uses"


def mixed_tokens(program: Program) -> str:
    new = follow(program, aten.softmax.int, 1)
    return rf"prefill graph, node .*node {new.name}: aten.softmax.int mixes tokens"


def wrong_layout(program: Program) -> str:
    node = first(program, ops.attention)
    node.args = (*node.args[:6], "vt:vt", node.args[7])
    return f"prefill graph, node {node.name}: has 1 query and 2 key streams for the layout 'vt:vt'"


def missing_values(program: Program) -> str:
    node = first(program, ops.attention, "decode")
    node.args = (*node.args[:2], node.args[2][:-1], *node.args[3:])
    return f"decode graph, node {node.name}: .*streams for the layout"


def heads_that_do_not_divide(program: Program) -> str:
    node = first(program, ops.attention)
    edit = Rewriter(program, program.prefill, by="test")
    with edit.before(node):
        keys = [edit.call(aten.slice.Tensor, k, 1, 0, 3, about=info(node)) for k in node.args[1]]
    node.args = (node.args[0], keys, *node.args[2:])
    return f"prefill graph, node {node.name}: has 4 query heads for 3 key heads"


def value_heads_that_do_not_divide(program: Program) -> str:
    node = first(program, ops.attention)
    edit = Rewriter(program, program.prefill, by="test")
    with edit.before(node):
        values = [edit.call(aten.slice.Tensor, v, 1, 0, 3, about=info(node)) for v in node.args[2]]
    node.args = (*node.args[:2], values, *node.args[3:])
    return f"prefill graph, node {node.name}: "


def too_few_layers(program: Program) -> str:
    result = outputs(program.prefill)
    program.prefill.output_node().args = ({**result, "kv": result["kv"][:-1]},)
    Rewriter(program, program.prefill, by="test").sweep()
    return "prefill graph, node output: returns 2 layers of keys and values, not 3"


def keys_unlike_values(program: Program) -> str:
    entries = [list(e) for e in outputs(program.prefill)["kv"]]
    entries[0][3] = entries[0][1]
    program.prefill.output_node().args = ({**outputs(program.prefill), "kv": entries},)
    return f"prefill graph, node {entries[0][2].name}: keys .* do not have the same shape"


def flat_keys(program: Program) -> str:
    """Keys and values that agree with each other and are no [B, heads, tokens, size]."""
    edit = Rewriter(program, program.prefill, by="test")
    entries = [list(e) for e in outputs(program.prefill)["kv"]]
    last = program.prefill.output_node()
    with edit.before(last):
        for place in (2, 3):
            entries[0][place] = edit.call(aten.flatten.using_ints, entries[0][place], 2, 3, about=info(last))
    last.args = ({**outputs(program.prefill), "kv": entries},)
    return f"prefill graph, node {entries[0][2].name}: "


def no_keys_output(program: Program) -> str:
    result = outputs(program.prefill)
    program.prefill.output_node().args = ({"logits": result["logits"], "kept": {}},)
    Rewriter(program, program.prefill, by="test").sweep()
    return "prefill graph, node output: "


def no_logits_output(program: Program) -> str:
    result = outputs(program.prefill)
    program.prefill.output_node().args = ({"kv": result["kv"], "kept": {}},)
    Rewriter(program, program.prefill, by="test").sweep()
    return "prefill graph, node output: "


def logits_of_all_tokens(program: Program) -> str:
    node = next(n for n in program.prefill.nodes if n.op == "placeholder" and n.name == "text")
    program.prefill.output_node().args = ({**outputs(program.prefill), "logits": node},)
    Rewriter(program, program.prefill, by="test").sweep()
    return "prefill graph, node text: logits are .*not \\[batch, 1, vocabulary\\]"


def whole_number_logits(program: Program) -> str:
    edit = Rewriter(program, program.prefill, by="test")
    result = outputs(program.prefill)
    last = program.prefill.output_node()
    with edit.before(last):
        new = edit.call(aten.to.dtype, result["logits"], torch.int64, about=info(last))
    last.args = ({**result, "logits": new},)
    return f"prefill graph, node {new.name}: logits are torch.int64"


def used_before_it_is_made(program: Program) -> str:
    nodes = nodes_of(program.prefill, op=aten.linear.default)
    nodes[0].args = (nodes[-1], *nodes[0].args[1:])
    return "prefill graph"


BROKEN: dict[str, tuple[Break, ...]] = {
    "interface": (no_keys_output, no_logits_output),
    "made_before_use": (used_before_it_is_made,),
    "known_ops": (unknown_op, method_call, unknown_op_in_vision, python_function),
    "described": (no_info, no_shape),
    "weights_exist": (missing_weight,),
    "nothing_dead": (dead_node, dead_weight),
    "tokens_apart": (mixed_tokens,),
    "attention_fits": (wrong_layout, missing_values, heads_that_do_not_divide, value_heads_that_do_not_divide),
    "kv_complete": (too_few_layers, keys_unlike_values, flat_keys),
    "returns_logits": (logits_of_all_tokens, whole_number_logits),
}


@pytest.mark.parametrize(("rule", "change"), [(r, c) for r, changes in BROKEN.items() for c in changes])
def test_a_broken_program_is_refused_by_its_rule(rule: str, change: Break) -> None:
    program = fresh("cut-visual{from_layer=2}", kv_heads=4)
    verify(program)
    message = change(program)
    with pytest.raises(VerifyError) as caught:
        verify(program)
    assert caught.match(message)
    assert caught.match(rf"\(rule {rule}\)$")


def test_every_rule_has_a_program_that_breaks_it() -> None:
    assert set(BROKEN) == {rule.__name__ for rule in RULES}


def test_every_rule_has_a_sentence_that_says_what_holds() -> None:
    assert all(rule.__doc__ and rule.__doc__.strip().endswith(".") for rule in rules.RULES)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_programs_after_pipelines_break_no_rule(pipeline: str) -> None:
    verify(pruned(pipeline))


def test_a_node_without_a_reason_is_named_even_when_it_is_an_input() -> None:
    program = fresh()
    node = next(n for n in program.prefill.nodes if n.op == "placeholder")
    node.meta["foveate"] = "visual"
    with pytest.raises(VerifyError, match=f"node {node.name}: has no NodeInfo"):
        verify(program)
    assert not isinstance(node.meta["foveate"], NodeInfo)
