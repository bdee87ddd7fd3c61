"""Programs as text: stable, complete, and harmless to read."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.errors import ArtifactError, FoveateError
from foveate.ir.program import Program
from foveate.ir.split import structure
from foveate.ir.text import OPS, parse_graphs
from tests.ir.programs import PIPELINES, copied, fresh, pruned

GOLDEN = Path(__file__).parent.parent / "golden"

SNAPSHOTS = {
    "dense": "",
    "all-passes": "drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5},fastv{layer=1,keep=0.5}",
    "cut": "random-prune{layer=1,keep=0.29,seed=3},cut-visual{from_layer=2}",
}
"""File name -> pipeline. The dense one has two layers, the others three."""


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_text_is_the_one_that_was_read_and_kept(name: str) -> None:
    """Set FOVEATE_UPDATE_GOLDEN=1 to write the files anew; read the difference before you keep it."""
    program = pruned(SNAPSHOTS[name], layers=2 if name == "dense" else 3)
    text = program.to_text() if name == "dense" else program.to_text("prefill") + "\n" + program.to_text("decode")
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FOVEATE_UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_text_that_was_read_gives_the_same_text_and_structure(pipeline: str) -> None:
    check_reading(copied(pruned(pipeline)), ["vision", "prefill"])


@pytest.mark.parametrize("pipeline", ["", "cut-visual{from_layer=1}", "fastv{layer=1,keep=0.5}"])
def test_text_of_a_decode_graph_can_be_read(pipeline: str) -> None:
    check_reading(copied(pruned(pipeline)), ["vision", "prefill", "decode"])


def check_reading(program: Program, names: list[str]) -> None:
    program.graphs = {name: program.graphs[name] for name in names}
    text = program.to_text()
    graphs = parse_graphs(program, text)
    assert program.to_text() == text, "reading does not change the program"
    other = copied(program)
    other.graphs = graphs
    assert other.to_text() == text
    assert list(graphs) == names
    for name, graph in graphs.items():
        assert structure(graph) == structure(program.graphs[name])
        assert [n.meta["foveate"] for n in graph.nodes if n.op not in ("get_attr", "output")] == [
            n.meta["foveate"] for n in program.graphs[name].nodes if n.op not in ("get_attr", "output")
        ]


def test_text_can_be_read_by_a_program_of_its_own() -> None:
    """As loading does: other symbols, same names."""
    program = pruned("fastv{layer=1,keep=0.5}")
    stranger = fresh(layers=2)
    stranger = Program(stranger.info, program.weights, type(stranger.symbols)())
    stranger.graphs = parse_graphs(stranger, program.to_text("prefill"))
    assert stranger.to_text() == program.to_text("prefill")


def test_every_op_of_the_text_has_its_own_name() -> None:
    assert len({id(op) for op in OPS.values()}) == len(OPS)
    assert all(str(op) == name for name, op in OPS.items())


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb", object(), torch.device("cpu"), 1j])
def test_what_has_no_text_form_is_an_error_not_a_lie(value: Any) -> None:
    program = fresh()
    node = next(n for n in program.prefill.nodes if n.op == "call_function")
    node.args = (*node.args, value)
    with pytest.raises(FoveateError, match="no text form"):
        program.to_text()


# --- hostile texts --------------------------------------------------------------------------------------

HEAD = "graph prefill\n"
INPUT = "x = input(float32, batch, text_tokens, 32) ; -1 text hidden | split | float32[batch, text_tokens, 32]\n"
NEG = "y = aten.neg.default(x) ; 0 text residual | split | float32[batch, text_tokens, 32]\n"
RETURN = 'return {"out": y}\n'
SHAPE = "float32[batch, text_tokens, 32]"
ABOUT = f" ; 0 text residual | split | {SHAPE}"


def read(text: str) -> None:
    """Read in a program that has been traced before, so that nothing but reading happens here."""
    parse_graphs(fresh(layers=2), text)


@pytest.fixture(autouse=True, scope="module")
def _traced() -> None:
    fresh(layers=2)


def test_the_harmless_text_is_read() -> None:
    read(HEAD + INPUT + NEG + RETURN)


HOSTILE = {
    "unknown op": f"y = aten.cumsum.default(x, 1){ABOUT}",
    "import": f'y = __import__("os"){ABOUT}',
    "call of a call": f'y = __import__("os").system("touch MARKER"){ABOUT}',
    "call in an argument": f'y = aten.add.Tensor(x, __import__("os").system("touch MARKER")){ABOUT}',
    "open in an argument": f'y = aten.add.Tensor(x, open("MARKER", "w")){ABOUT}',
    "attribute": f"y = aten.add.Tensor(x, x.__class__){ABOUT}",
    "attribute of an op": f"y = aten.neg.default.__class__(x){ABOUT}",
    "subscript": f"y = aten.neg.default([x][0]){ABOUT}",
    "lambda": f"y = aten.neg.default((lambda: x)()){ABOUT}",
    "comprehension": f"y = aten.neg.default([x for x in x]){ABOUT}",
    "walrus": f"y = aten.neg.default((z := x)){ABOUT}",
    "format string": 'y = aten.neg.default(f"{x}")' + ABOUT,
    "arithmetic": f"y = aten.add.Tensor(x, 2 ** 99999999){ABOUT}",
    "starred": f"y = aten.neg.default(*[x]){ABOUT}",
    "double starred": "y = aten.neg.default(x, **{'a': 1})" + ABOUT,
    "keyword that does not exist": f"y = aten.neg.default(x, evil=1){ABOUT}",
    "statement": f"import os{ABOUT}",
    "no assignment": f"aten.neg.default(x){ABOUT}",
    "two statements": f'y = aten.neg.default(x); open("MARKER", "w"){ABOUT}',
    "two targets": f"y = z = aten.neg.default(x){ABOUT}",
    "tuple target": f"y, z = aten.neg.default(x){ABOUT}",
    "attribute target": f"x.y = aten.neg.default(x){ABOUT}",
    "no code": f"{ABOUT}",
    "only a semicolon": " ; ",
    "syntax": f"y = aten.neg.default(x{ABOUT}",
    "wrong shape": "y = aten.neg.default(x) ; 0 text residual | split | float32[batch, text_tokens, 31]",
    "wrong dtype": "y = aten.neg.default(x) ; 0 text residual | split | bfloat16[batch, text_tokens, 32]",
    "unknown weight": f'y = aten.mul.Tensor(x, weight("model.missing.weight")){ABOUT}',
    "weight by path": f'y = aten.mul.Tensor(x, weight("../../etc/passwd")){ABOUT}',
    "weight by class": f'y = aten.mul.Tensor(x, weight("__class__")){ABOUT}',
    "weight that is a list": f"y = aten.mul.Tensor(x, weight([1])){ABOUT}",
    "unknown dtype": f'y = aten.to.dtype(x, dtype("object")){ABOUT}',
    "dtype that is a list": f"y = aten.to.dtype(x, dtype([1])){ABOUT}",
    "duplicate name": f"x = aten.neg.default(x){ABOUT}",
    "unknown name": f"y = aten.neg.default(z){ABOUT}",
    "builtin name": f"y = aten.neg.default(print){ABOUT}",
    "no notes": "y = aten.neg.default(x)",
    "empty notes": "y = aten.neg.default(x) ; ",
    "short notes": f"y = aten.neg.default(x) ; 0 text | {SHAPE}",
    "layer that is no number": f"y = aten.neg.default(x) ; zero text residual | split | {SHAPE}",
    "unknown stream": f"y = aten.neg.default(x) ; 0 evil residual | split | {SHAPE}",
    "no arguments": f"y = aten.neg.default(){ABOUT}",
    "wrong arguments": f'y = aten.unsqueeze.default(x, "1"){ABOUT}',
    "axis out of range": f"y = aten.unsqueeze.default(x, 99){ABOUT}",
    "number out of range": f"y = aten.slice.Tensor(x, 1, 0, {10**60}){ABOUT}",
    "number far too long": f"y = aten.slice.Tensor(x, 1, 0, {'9' * 5000}){ABOUT}",
    "complex number": f"y = aten.mul.Tensor(x, 1j){ABOUT}",
    "bytes": f"y = aten.mul.Tensor(x, b'1'){ABOUT}",
    "ellipsis": f"y = aten.mul.Tensor(x, ...){ABOUT}",
    "negated string": f"y = aten.mul.Tensor(x, -'1'){ABOUT}",
    "negated node": f"y = aten.mul.Tensor(x, -x){ABOUT}",
    "dictionary with a list key": "y = aten.mul.Tensor(x, {[1]: 2})" + ABOUT,
    "dictionary unpacked": "y = aten.mul.Tensor(x, {**x})" + ABOUT,
    "item without a place": f"y = item(x){ABOUT}",
    "item of nothing": f"y = item(){ABOUT}",
    "item of a number": f"y = item(5, 0){ABOUT}",
    "item of one value": f"y = item(x, 7){ABOUT}",
    "item out of range": f"y = item(x, 99999){ABOUT}",
    "input without a type": f"y = input(){ABOUT}",
    "input of an unknown type": f"y = input(object, batch){ABOUT}",
    "input of a list type": f"y = input([1], batch){ABOUT}",
    "input without a size": "y = input(int) ; -1 none prefix | split | int prefix",
    "integer input of a number": "y = input(int, 5) ; -1 none prefix | split | int 5",
    "input of an unknown size": f"y = input(float32, evil, 32){ABOUT}",
    "input of a negative size": "y = input(float32, -4) ; 0 text residual | split | float32[-4]",
    "input of a float size": "y = input(float32, 1.5) ; 0 text residual | split | float32[1.5]",
    "input of a list size": "y = input(float32, [2]) ; 0 text residual | split | float32[2]",
    "nested brackets": f"y = aten.neg.default({'[' * 5000}x{']' * 5000}){ABOUT}",
    "nested calls": f"y = {'aten.neg.default(' * 2000}x{')' * 2000}{ABOUT}",
    "nested signs": f"y = aten.mul.Tensor(x, {'-' * 20000}1){ABOUT}",
    "nested attributes": f"y = {'a.' * 20000}b(x){ABOUT}",
    "null byte": f"y = aten.neg.default(x)\0{ABOUT}",
    "attention without streams": f'y = foveate.attention.default([], [], [], [], [], 0, ":", 1.0){ABOUT}',
    "attention of numbers": f'y = foveate.attention.default([1], [1], [1], [1], [1], 0, "t:t", 1.0){ABOUT}',
    "keep that is no number": f'y = foveate.top_tokens.default(x, x, "all"){ABOUT}',
    "keep that is infinite": f"y = foveate.top_tokens.default(x, x, 1e999){ABOUT}",
    "take along a far axis": f"y = foveate.take_tokens.default(x, x, 9){ABOUT}",
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_line_is_refused_by_its_number(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("text was executed")

    for name in ("eval", "exec", "open"):
        monkeypatch.setattr(builtins, name, refuse)
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.chdir(tmp_path)
    text = HEAD + INPUT + line + "\n" + RETURN
    with pytest.raises(ArtifactError, match=r"^program text, line 3: ") as caught:
        read(text)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "MARKER").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (INPUT, "line 1: no graph has been opened"),
        ("hello\n", "line 1: no graph has been opened"),
        (HEAD + INPUT + NEG, "graph prefill returns nothing"),
        (HEAD, "graph prefill returns nothing"),
        (HEAD + INPUT + "return {'out': z}\n", "line 3"),
        (HEAD + INPUT + "return\n", "line 3"),
        (HEAD + INPUT + "return x.y\n", "line 3"),
        (HEAD + INPUT + 'return {"out": __import__("os")}\n', "line 3"),
        (HEAD + INPUT + "return {[1]: x}\n", "line 3"),
        (HEAD + INPUT + "return 5\n", "line 3"),
        (HEAD + INPUT + "return x\n", "line 3"),
        (HEAD + INPUT + "return [x]\n", "line 3"),
        (HEAD + INPUT + NEG + RETURN + RETURN, "line 5"),
        (HEAD + INPUT + RETURN.replace("y", "x") + NEG, "line 4"),
        (HEAD + INPUT + NEG + RETURN + HEAD + INPUT + NEG + RETURN, "line 5"),
    ],
)
def test_a_text_that_is_no_list_of_graphs_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(text)


def test_no_text_gives_no_graphs() -> None:
    assert parse_graphs(fresh(layers=2), "") == {}


PIECES = ["", "x", "y", "[", "]", "(", ")", "{", "}", ",", "=", ";", "|", "-", "1", "99", '"', "'", "*", ".", " ", "#"]
PIECES += ["input", "item", "weight", "dtype", "return ", "graph ", "float32", "batch", "aten.neg.default", "\n", "\t"]
PIECES += ["None", "True", "1.5", "\\", "\u2028", "\x0c", "ﬁ", "text_tokens", "foveate.attention.default", "..."]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_text_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    text = HEAD + INPUT + NEG + RETURN
    for _ in range(data.draw(st.integers(1, 3), "edits")):
        start = data.draw(st.integers(0, len(text)), "start")
        stop = min(len(text), start + data.draw(st.integers(0, 12), "length"))
        text = text[:start] + data.draw(st.sampled_from(PIECES), "piece") + text[stop:]
    try:
        read(text)
    except ArtifactError as error:
        assert str(error).startswith("program text")
