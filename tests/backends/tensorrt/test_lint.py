"""What TensorRT would refuse is found, by the row that says so; what it takes is left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from foveate.backends.tensorrt.lint import lint, to_json, to_text
from foveate.backends.tensorrt.table import operators
from foveate.errors import ArtifactError, BackendError
from tests.backends.tensorrt.models import BOOL, DOUBLE, FLOAT, INT64, QKV, decoder, model

node = helper.make_node
X = {"x": (FLOAT, ["batch", 3, 4, 5])}
ROWS = {"x": (FLOAT, ["batch", "tokens"])}
INDEX = {"i": (INT64, [])}
I1 = {"i": (INT64, [1])}


def adapted(path: Path) -> onnx.ModelProto:
    from foveate.backends.tensorrt.adapt import adapted as adapt
    from foveate.backends.tensorrt.reading import read

    copy = adapt(read(path))
    assert copy is not None
    return copy


def test_a_decoder_is_clean_once_it_is_adapted(tmp_path: Path) -> None:
    decoder(tmp_path / "d.onnx")
    assert [f.rule for f in lint(tmp_path / "d.onnx")] == ["Attention.softmax-precision"]
    assert lint(adapted(tmp_path / "d.onnx")) == []


def attention(outputs: tuple[str, ...] = ("y",), inputs: tuple[str, ...] = ("q", "k", "v"), **attributes: Any) -> Any:
    return node("Attention", list(inputs), list(outputs), "n", **attributes)


# Rule, and a graph that breaks it and nothing else.
BROKEN: dict[str, onnx.ModelProto] = {
    "Attention.rank-q": model([attention(q_num_heads=2, kv_num_heads=2)], {**QKV, "q": (FLOAT, ["batch", 5, 8])}),
    "Attention.rank-k": model([attention(q_num_heads=2, kv_num_heads=2)], {**QKV, "k": (FLOAT, ["batch", 5, 8])}),
    "Attention.rank-v": model([attention(q_num_heads=2, kv_num_heads=2)], {**QKV, "v": (FLOAT, ["batch", 5, 8])}),
    "Attention.rank-mask": model([attention(inputs=("q", "k", "v", "m"))], {**QKV, "m": (BOOL, ["tokens", "tokens"])}),
    "Attention.past-key": model([attention(inputs=("q", "k", "v", "", "k"))], QKV),
    "Attention.past-value": model([attention(inputs=("q", "k", "v", "", "", "v"))], QKV),
    "Attention.nonpad": model(
        [attention(inputs=("q", "k", "v", "", "", "", "l"))], {**QKV, "l": (INT64, ["batch"])}, opset=24
    ),
    "Attention.outputs": model([attention(("y", "present"))], QKV, ("y", "present")),
    "Attention.softcap": model([attention(softcap=30.0)], QKV),
    "Attention.qk-mode": model([attention(qk_matmul_output_mode=1)], QKV),
    "Attention.softmax-precision": model([attention(softmax_precision=1)], QKV),
    "CumSum.axis": model([node("CumSum", ["x", "i"], ["y"], "n")], {**X, **INDEX}),
    "Dropout.training": model(
        [node("Dropout", ["x", "r", "t"], ["y"], "n")], {**X, "t": (BOOL, [])}, constants={"r": np.float32(0)}
    ),
    "EyeLike.static": model([node("EyeLike", ["x"], ["y"], "n")], ROWS),
    "GridSample.rank": model(
        [node("GridSample", ["x", "g"], ["y"], "n")], {"x": (FLOAT, [1, 1, 2, 2, 2]), "g": (FLOAT, [1, 2, 2, 2, 3])}
    ),
    "LayerNormalization.outputs": model(
        [node("LayerNormalization", ["x", "s"], ["y", "mean"], "n")],
        X,
        ("y", "mean"),
        {"s": np.ones(5, np.float32)},
    ),
    "MaxPool.outputs": model([node("MaxPool", ["x"], ["y", "i"], "n", kernel_shape=[1, 1])], X, ("y", "i")),
    "NonZero.data-dependent": model([node("NonZero", ["x"], ["y"], "n")], X),
    "OneHot.depth": model(
        [node("OneHot", ["i", "d", "v"], ["y"], "n")],
        {**I1, "d": (INT64, [])},
        constants={"v": np.array([0, 1], np.float32)},
    ),
    "Pad.axes": model([node("Pad", ["x", "p", "", "i"], ["y"], "n")], {**X, **I1}, constants={"p": np.array([0, 1])}),
    "ReduceSum.axes": model([node("ReduceSum", ["x", "i"], ["y"], "n")], {**X, **I1}),
    "ReduceMax.axes": model([node("ReduceMax", ["x", "i"], ["y"], "n")], {**X, **I1}),
    "RotaryEmbedding.positions": model(
        [node("RotaryEmbedding", ["q", "c", "c", "p"], ["y"], "n")],
        {"q": (FLOAT, ["batch", 2, "tokens", 4]), "c": (FLOAT, [9, 2]), "p": (TensorProto.INT32, ["batch", "tokens"])},
    ),
    "ScatterND.reduction": model(
        [node("ScatterND", ["x", "i", "u"], ["y"], "n", reduction="add")],
        {"x": (FLOAT, [4]), "i": (INT64, [2, 1]), "u": (FLOAT, [2])},
    ),
    "Squeeze.axes": model([node("Squeeze", ["x", "i"], ["y"], "n")], {**X, **I1}),
    "Unsqueeze.axes": model([node("Unsqueeze", ["x", "i"], ["y"], "n")], {**X, **I1}),
    "TensorScatter.rank-cache": model(
        [node("TensorScatter", ["x", "u"], ["y"], "n")],
        {"x": (FLOAT, [1, 8, 4]), "u": (FLOAT, [1, 1, 2, 4])},
        opset=24,
    ),
    "TensorScatter.rank-update": model(
        [node("TensorScatter", ["x", "u"], ["y"], "n")],
        {"x": (FLOAT, [1, 1, 8, 4]), "u": (FLOAT, [1, 2, 4])},
        opset=24,
    ),
    "TensorScatter.axis": model([node("TensorScatter", ["x", "x"], ["y"], "n", axis=1)], X, opset=24),
    "TensorScatter.mode": model([node("TensorScatter", ["x", "x"], ["y"], "n", mode="circular")], X, opset=24),
    "TopK.sorted": model([node("TopK", ["x", "k"], ["y", "i"], "n", sorted=0)], ROWS, ("y", "i"), {"k": np.array([5])}),
    "TopK.k": model([node("TopK", ["x", "k"], ["y", "i"], "n")], ROWS, ("y", "i"), {"k": np.array([3840])}),
    "TopK.k-shape": model(
        [node("ArgMax", ["x"], ["m"], "m", axis=0, keepdims=0), node("TopK", ["x", "m"], ["y", "i"], "n")],
        {"x": (FLOAT, ["tokens", 1])},
        ("y", "i"),
    ),
    "Constant.string": model([node("Constant", [], ["y"], "n", value_string="no")], {}),
    "Constant.strings": model([node("Constant", [], ["y"], "n", value_strings=["no"])], {}),
    "Constant.sparse": model(
        [
            node(
                "Constant",
                [],
                ["y"],
                "n",
                sparse_value=helper.make_sparse_tensor(
                    helper.make_tensor("v", FLOAT, [1], [1.0]), helper.make_tensor("i", INT64, [1], [0]), [3]
                ),
            )
        ],
        {},
    ),
    "dtype": model([node("Add", ["x", "x"], ["y"], "n")], {"x": (TensorProto.UINT32, ["batch"])}),
    "Clip.types": model([node("Clip", ["x"], ["y"], "n")], {"x": (INT64, ["batch"])}),
    "Unique": model([node("Unique", ["x"], ["y"], "n")], ROWS),
    "unknown": model([node("Swish", ["x"], ["y"], "n")], ROWS, opset=24),
    "domain": model([node("neighbor_attention", ["x"], ["y"], "n", domain="foveate")], ROWS, domains=["foveate"]),
    "opset": model([node("Add", ["x", "x"], ["y"], "n")], ROWS, opset=25),
}
RESIZE = {"antialias": 1, "mode": "cubic", "coordinate_transformation_mode": "half_pixel_symmetric"}
RESIZE |= {"keep_aspect_ratio_policy": "not_larger"}
NAMES = {"coordinate_transformation_mode": "coordinates", "keep_aspect_ratio_policy": "aspect"}
for attribute, value in RESIZE.items():
    BROKEN[f"Resize.{NAMES.get(attribute, attribute)}"] = model(
        [node("Resize", ["x", "", "", "s"], ["y"], "n", **{attribute: value})],
        {"x": (FLOAT, [1, 1, 4, 4])},
        constants={"s": np.array([1, 1, 8, 8])},
    )
LSTM = {"x": (FLOAT, [3, 1, 2]), "w": (FLOAT, [1, 16, 2]), "r": (FLOAT, [1, 16, 4])}
for attribute, rule in {"input_forget": "input-forget", "layout": "layout"}.items():
    BROKEN[f"LSTM.{rule}"] = model([node("LSTM", ["x", "w", "r"], ["y"], "n", hidden_size=4, **{attribute: 1})], LSTM)
for position, (rule, dims) in enumerate({"step": [], "window": [4]}.items(), start=1):
    names = ["x", "c", "c"]
    names[position] = "o"
    BROKEN[f"STFT.{rule}"] = model(
        [node("STFT", names, ["y"], "n")],
        {"x": (FLOAT, [1, 16, 1]), "o": (FLOAT if dims else INT64, dims)},
        constants={"c": np.ones(4, np.float32) if not dims else np.array(2)},
    )


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_finds_what_breaks_it_and_names_its_row(rule: str) -> None:
    found = lint(BROKEN[rule])
    text = {"dtype"} if "string" in rule else set()
    assert {f.rule for f in found} == {rule} | text, to_text(found)
    assert all(f.source.startswith(("onnx/onnx-tensorrt", "foveate:")) and f.right for f in found)
    if rule != "opset":
        assert "n" in {f.node for f in found}


def test_every_checked_row_has_a_graph_here_that_breaks_it() -> None:
    rules = {check.id for row in operators().operators.values() for check in row.checks}
    same = {f"{op}.axes" for op in operators().operators if op.startswith("Reduce")}
    assert rules - same - {"Resize.nearest"} <= set(BROKEN)


def test_double_is_found_wherever_it_stands() -> None:
    nodes = [node("Constant", [], ["c"], "c", value_float=1.0), node("Cast", ["x"], ["y"], "cast", to=DOUBLE)]
    found = lint(model(nodes, ROWS, constants={"w": np.float64(1)}))
    assert {(f.node, f.rule) for f in found} == {("w", "dtype"), ("cast", "dtype")}
    assert "DOUBLE" in to_text(found)


def test_whole_numbers_of_64_bits_are_taken() -> None:
    assert lint(model([node("Gather", ["x", "i"], ["y"])], {"x": (INT64, ["n"]), "i": (INT64, ["m"])})) == []


def test_k_may_come_from_shapes_and_constants() -> None:
    nodes = [
        node("Shape", ["x"], ["s"], start=1),
        node("Constant", [], ["two"], value_ints=[2]),
        node("Div", ["s", "two"], ["k"]),
        node("TopK", ["x", "k"], ["y", "i"]),
    ]
    assert lint(model(nodes, ROWS, ("y", "i"))) == []
    assert lint(model(nodes[3:], {**ROWS, "k": (INT64, [1])}, ("y", "i"))) == []


@pytest.mark.parametrize(("tokens", "rules"), [(7679, []), (7680, ["TopK.k"])])
def test_k_from_shapes_is_held_to_the_limit_at_the_largest_sizes(tokens: int, rules: list[str]) -> None:
    """Half the tokens, floor(0.5 * n), at least one: as exporters write it."""
    nodes = [
        node("Shape", ["x"], ["s"], start=1, end=2),
        node("Squeeze", ["s"], ["n"]),
        node("Cast", ["n"], ["f"], to=FLOAT),
        node("Mul", ["f", "half"], ["h"]),
        node("Floor", ["h"], ["g"]),
        node("Cast", ["g"], ["w"], to=INT64),
        node("Max", ["w", "one"], ["m"]),
        node("Reshape", ["m", "one"], ["k"]),
        node("TopK", ["x", "k"], ["y", "i"], "n"),
    ]
    constants = {"half": np.float32(0.5), "one": np.array([1])}
    made = model(nodes, ROWS, ("y", "i"), constants)
    assert [f.rule for f in lint(made, largest={"tokens": tokens})] == rules
    assert lint(made) == []


def test_numbers_are_computed_of_few_numbers_only() -> None:
    nodes = [
        node("Concat", ["c"] * 40, ["a"], axis=0),
        node("Concat", ["a"] * 40, ["b"], axis=0),
        node("ReduceMax", ["b"], ["k"]),
        node("TopK", ["x", "k"], ["y", "i"]),
    ]
    assert lint(model(nodes, ROWS, ("y", "i"), {"c": np.array([5000])})) == []


def test_constants_are_seen_through_what_keeps_their_numbers() -> None:
    nodes = [
        node("Constant", [], ["c"], value_int=4000),
        node("Reshape", ["c", "one"], ["k"]),
        node("TopK", ["x", "k"], ["y", "i"], "n"),
    ]
    found = lint(model(nodes, ROWS, ("y", "i"), {"one": np.array([1])}))
    assert [(f.rule, f.problem) for f in found] == [("TopK.k", "k is 4000")]


def test_subgraphs_are_looked_at_and_see_the_constants_around_them() -> None:
    branches = {
        name: helper.make_graph(
            [node("TopK", ["x", "k"], [f"{name}_y", f"{name}_i"], "inner")],
            name,
            [],
            [onnx.ValueInfoProto(name=f"{name}_y")],
        )
        for name in ("then_branch", "else_branch")
    }
    outer = node("If", ["c"], ["y"], "choice", **branches)
    found = lint(model([outer], {**ROWS, "c": (BOOL, [])}, constants={"k": np.array([5000])}))
    assert {f.node for f in found} == {"choice/then_branch/inner", "choice/else_branch/inner"}
    assert {f.rule for f in found} == {"TopK.k"}
    assert lint(model([outer], {**ROWS, "c": (BOOL, [])}, constants={"k": np.array([5])})) == []


def function(name: str, body: list[onnx.NodeProto], inputs: list[str], outputs: list[str]) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, inputs, outputs, body, opsets)


def test_local_functions_are_looked_at_where_they_are_called() -> None:
    pick = function("pick", [node("TopK", ["x", "k"], ["y", "i"], "inner")], ["x", "k"], ["y"])
    call = node("pick", ["x", "k"], ["y"], "call", domain="local")
    for k, rules in ((5, []), (5000, ["TopK.k"])):
        made = model([call], ROWS, constants={"k": np.array([k])}, functions=[pick], domains=["local"])
        found = lint(made)
        assert [f.rule for f in found] == rules
        assert all("inner" in f.node for f in found)


def test_functions_without_an_end_are_refused() -> None:
    loop = function("loop", [node("loop", ["x"], ["y"], domain="local")], ["x"], ["y"])
    made = model([node("loop", ["x"], ["y"], domain="local")], ROWS, functions=[loop], domains=["local"])
    with pytest.raises(ArtifactError, match="loop calls itself"):
        lint(made)
    calls = [
        function(f"f{i}", [node(f"f{i + 1}", ["x"], [y], domain="local") for y in ("y", "z")], ["x"], ["y"])
        for i in range(40)
    ]
    calls.append(function("f40", [node("Abs", ["x"], ["y"])], ["x"], ["y"]))
    made = model([node("f0", ["x"], ["y"], domain="local")], ROWS, functions=calls, domains=["local"])
    with pytest.raises(ArtifactError, match="more than 1000000 nodes"):
        lint(made)


def test_an_older_target_knows_fewer_operators() -> None:
    made = model([attention()], QKV)
    assert lint(made, "10.14") == lint(made, "11.0") == []
    assert [f.rule for f in lint(made, "10.13.3")] == ["Attention.since"]
    norm = model([node("RMSNormalization", ["x", "s"], ["y"])], X, constants={"s": np.ones(5, np.float32)})
    assert [f.rule for f in lint(norm, "10.14")] == ["RMSNormalization.since"]
    with pytest.raises(BackendError, match="no version"):
        lint(made, "newest")


def test_findings_as_text_and_json() -> None:
    made = BROKEN["TopK.k"]
    (found,) = lint(made)
    assert str(found) == (
        "TopK 'n': k is 3840; it takes K below 3840; prune in two steps, or a tile at a time, for more "
        "[TopK.k: onnx/onnx-tensorrt docs/operators.md as of TensorRT 10.15]"
    )
    entry = to_json([found], made)
    assert entry["operators"] == {"TopK": 1}
    assert entry["findings"][0]["rule"] == "TopK.k"


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 64, b"#!/bin/sh\necho no\n", b"\x80\x04\x95pickle", b'{"a": 1}', b"\x3a\x05hello"]
)
def test_a_file_that_is_no_model_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is no ONNX model"):
        lint(path)


def test_damaged_files_never_give_a_traceback(tmp_path: Path) -> None:
    decoder(tmp_path / "d.onnx")
    whole = (tmp_path / "d.onnx").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    for _ in range(200):
        content = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for at in rng.integers(0, len(content), 3):
            content[at] = rng.integers(0, 256)
        path.write_bytes(content)
        try:
            lint(path, largest={"batch": 8, "visual_tokens": 2304})
        except ArtifactError as error:
            assert "\n" not in str(error)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    decoder(tmp_path / "d.onnx")
    content = (tmp_path / "d.onnx").read_bytes().replace(b"attention", b"attenti\xff\xfe")
    (tmp_path / "d.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="no Unicode text"):
        lint(tmp_path / "d.onnx")


def test_what_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(ArtifactError, match="is not a file"):
            lint(path)


def test_weights_are_not_read(tmp_path: Path) -> None:
    decoder(tmp_path / "d.onnx", weights="/etc/hostname")
    (tmp_path / "model.safetensors").unlink()
    assert [f.rule for f in lint(tmp_path / "d.onnx")] == ["Attention.softmax-precision"]


def test_without_onnx_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match="needs onnx: pip install"):
        lint(tmp_path / "x.onnx")
