"""The table has the shape it says, and every row a source."""

from __future__ import annotations

import onnx
import pytest

from foveate.backends.tensorrt.table import operators, parse, parse_version
from foveate.errors import ArtifactError

HEAD = """
version: 1
tensorrt: "10.15"
opset: {min: 9, max: 24}
sources: {operators: a}
dtypes: {FLOAT: FP32}
groups: {float: [FP32]}
operators:
"""


def test_every_row_has_a_source_and_known_types() -> None:
    table = operators()
    assert table.tensorrt == "10.15"
    assert table.opsets == (9, 24)
    assert len(table.operators) == 200
    for row in table.operators.values():
        assert row.source
        assert bool(row.types) == row.supported
        assert all(check.source and check.right for check in row.checks)
    assert set(table.dtypes) <= set(onnx.TensorProto.DataType.keys())


def test_rows_name_inputs_and_attributes_that_onnx_has() -> None:
    for row in operators().operators.values():
        if not onnx.defs.has(row.name):
            assert not row.checks
            continue
        schema = onnx.defs.get_schema(row.name)
        for check in row.checks:
            if check.kind == "allowed":
                assert check.where in schema.attributes, check.id
            elif isinstance(check.where, int):
                assert check.where < max(schema.max_input, 1), check.id


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("  A: {types: [FP32], colour: red}", "unknown field 'colour'"),
        ("  A: {}", "types, or supported: false"),
        ("  A: {types: [FP99]}", "FP99"),
        ("  A: {types: float, checks: [{id: a, right: b}]}", "must limit one of"),
        ("  A: {types: float, checks: [{id: a, right: b, input: 0, rank: 1, below: 2}]}", "must limit one of"),
        ("  A: {types: float, checks: [{id: a, right: b, input: 0, types: [INT7]}]}", "INT7"),
        ("  A: {types: float, since: soon}", "no version"),
        ("  A: {types: float, source: nowhere}", "nowhere"),
        ("  A: [", "damaged"),
        ("  - A", "damaged"),
    ],
)
def test_a_table_of_another_shape_is_refused(rows: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        parse(HEAD + rows)


def test_a_newer_table_says_so() -> None:
    with pytest.raises(ArtifactError, match="version is 2"):
        parse(HEAD.replace("version: 1", "version: 2") + "  A: {types: float}")


def test_versions_compare_by_number() -> None:
    assert parse_version("10.9") < parse_version("10.15")
