"""Ranges of dimensions become shapes of inputs, and ranges that do not fit are refused by name."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import helper

from foveate.backends.tensorrt.profiles import Shapes, profiles, to_json
from foveate.errors import ArtifactError, InputError
from tests.backends.tensorrt.models import FLOAT, INT64, model

ADD = [helper.make_node("Identity", ["x"], ["y"])]
PREFILL = model(ADD, {"x": (FLOAT, ["batch", "visual_tokens", 8]), "p": (INT64, ["batch", "text_tokens"])})
STEP = model(ADD, {"x": (FLOAT, ["batch", 1, 8]), "fixed": (FLOAT, [2, 3])})
GRAPHS = {"prefill": PREFILL, "step": STEP}
RANGES = {"batch": (1, 1, 8), "visual_tokens": (0, 576, 2304), "text_tokens": (1, 64, 512)}


def test_every_input_with_symbolic_dimensions_has_three_shapes() -> None:
    made = profiles(GRAPHS, RANGES)
    assert made["prefill"]["x"] == Shapes((1, 0, 8), (1, 576, 8), (8, 2304, 8))
    assert made["prefill"]["p"] == Shapes((1, 1), (1, 64), (8, 512))
    assert made["step"] == {"x": Shapes((1, 1, 8), (1, 1, 8), (8, 1, 8))}


def test_as_json() -> None:
    content = to_json(profiles(GRAPHS, RANGES), RANGES)
    assert content["ranges"]["batch"] == [1, 1, 8]
    assert content["graphs"]["step"]["x"] == {"min": (1, 1, 8), "opt": (1, 1, 8), "max": (8, 1, 8)}


@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1, 8),
        (1, 9, 8),
        (-1, 1, 8),
        (0, 0, 0),
        (1, 8),
        (1, 2, 3, 4),
        (1, 2.5, 3),
        (True, 1, 1),
        "123",
        5,
        (1, 1, 2**31),
    ],
)
def test_ranges_that_are_none_are_refused(sizes: Any) -> None:
    with pytest.raises(InputError, match="batch must have three sizes, least <= likeliest <= largest"):
        profiles(GRAPHS, {**RANGES, "batch": sizes})


def test_a_dimension_without_a_range_is_named() -> None:
    with pytest.raises(InputError, match="missing for text_tokens; the graphs have the dimensions batch, text_tokens"):
        profiles(GRAPHS, {name: RANGES[name] for name in ("batch", "visual_tokens")})


def test_an_unknown_name_is_refused_with_the_list_of_what_there_is() -> None:
    with pytest.raises(
        InputError, match="no graph has a dimension 'tokens'; there are: batch, text_tokens, visual_tok"
    ):
        profiles(GRAPHS, {**RANGES, "tokens": (1, 1, 1)})


def test_an_axis_without_size_and_name_is_refused() -> None:
    nameless = model(ADD, {"x": (FLOAT, ["batch", 8])})
    nameless.graph.input[0].type.tensor_type.shape.dim.append(onnx.TensorShapeProto.Dimension())
    with pytest.raises(ArtifactError, match="axis 2 of the input x has neither size nor name"):
        profiles({"graph": nameless}, {"batch": (1, 1, 1)})
