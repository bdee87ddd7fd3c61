"""The Python model for Triton answers as the package does, by graphs that ONNX Runtime runs from the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import foveate
from foveate.models.random import random_inputs, random_llava
from foveate.serving.triton.files import FOLDER

pytest.importorskip("tritonclient.grpc", reason="configurations are read by the schema of tritonclient")

from tests.serving.fake_triton import Request, Response, Server, TritonError

PASSES = {
    "dense": "",
    "selection": "fastv{layer=1,keep=0.5}",
    "neighbours and cut": "neighbor-attention{radius=1},drop-visual-heads{keep=2},cut-visual{from_layer=2}",
    "held": "snapkv{capacity=8,window=4}",
    "shortened tower": "visionzip{dominant=5,contextual=3}",
    "tower in two": "cls-curve{layer=1}",
    "grid": "average-pool{factor=2}",
}
PROMPTS: dict[str, dict[str, Any]] = {
    "one": {},
    "left": {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    "right": {"batch": 3, "images_per_row": [1, 2, 1], "padding": "right", "prefix": 0},
    "no image": {"images": 0},
}
NEW = 7


def served(folder: Path, passes: str, **options: Any) -> tuple[Any, Server]:
    model = random_llava(layers=3, kv_heads=2)
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    foveate.export(foveate.optimize(model, passes), output=folder, verify=False, serving="triton")
    return foveate.load(folder), Server(folder / FOLDER)


@pytest.fixture(scope="module")
def selecting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Server]:
    return served(tmp_path_factory.mktemp("served") / "out", PASSES["selection"])


def request(inputs: dict[str, Tensor], new: int = NEW, stays: int | None = None) -> Request:
    given = {name: value.numpy() for name, value in inputs.items()}
    return Request(stays, **given, max_new_tokens=np.array([new], np.int32))


def expected(model: Any, inputs: dict[str, Tensor], new: int = NEW) -> list[list[int]]:
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    answers: list[list[int]] = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


def tokens(responses: list[Response]) -> list[list[int]]:
    for response in responses:
        assert not response.has_error(), response.error().message()  # type: ignore[union-attr]  # there is one
    parts = [response.tensors["token_ids"].as_numpy() for response in responses]
    answers: list[list[int]] = np.concatenate(parts, 1).tolist()
    return answers


def refusal(responses: list[Response]) -> TritonError:
    error = responses[-1].error()
    assert error is not None
    return error


@pytest.mark.slow
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES.keys())
def test_answers_are_those_of_the_package(tmp_path: Path, passes: str) -> None:
    model, server = served(tmp_path / "out", passes)
    for name, sizes in PROMPTS.items():
        inputs = random_inputs(random_llava(layers=3, kv_heads=2), **sizes)
        wanted = expected(model, inputs)
        assert tokens(server.ask("foveate", request(inputs))) == wanted, name
        stream = server.ask("foveate_stream", request(inputs))
        assert len(stream) == NEW and tokens(stream) == wanted, name
    assert set(server.asked) == set(server.configs) - {"foveate", "foveate_stream"}


def test_a_prompt_that_ends_in_an_image(selecting: tuple[Any, Server]) -> None:
    model, server = selecting
    inputs = random_inputs(random_llava(layers=3, kv_heads=2), text_tokens=4)
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, :-1]
    assert int(inputs["input_ids"][0, -1]) == model.program.info.image_token_id
    assert tokens(server.ask("foveate", request(inputs))) == expected(model, inputs)


def test_without_mask_and_length(selecting: tuple[Any, Server]) -> None:
    model, server = selecting
    inputs = random_inputs(random_llava(layers=3, kv_heads=2))
    given = {name: inputs[name].numpy() for name in ("input_ids", "pixel_values")}
    assert tokens(server.ask("foveate", Request(**given))) == expected(model, inputs, 32)


@pytest.mark.slow
def test_rows_end_at_their_own_ends_and_are_padded(tmp_path: Path, selecting: tuple[Any, Server]) -> None:
    inputs = random_inputs(random_llava(layers=3, kv_heads=2), batch=2)
    first, second = expected(selecting[0], inputs)
    end = next(token for token in first[:-2] if token not in second)
    model, server = served(tmp_path / "out", PASSES["selection"], eos_token_id=[end, 1], pad_token_id=0)
    wanted = expected(model, inputs)
    assert wanted[0][-2:] == [0, 0] and wanted[1] == second
    assert tokens(server.ask("foveate", request(inputs))) == wanted
    assert tokens(server.ask("foveate_stream", request(inputs))) == wanted


def test_nothing_is_computed_for_a_client_that_left(selecting: tuple[Any, Server]) -> None:
    model, server = selecting
    inputs = random_inputs(random_llava(layers=3, kv_heads=2))
    for name in ("foveate", "foveate_stream"):
        server.asked.clear()
        answer = tokens(server.ask(name, request(inputs, new=50, stays=2)))
        assert answer == expected(model, inputs, 3)
        assert server.asked.count("decoder_step") == 2


def test_nonsense_is_refused_in_one_line(selecting: tuple[Any, Server]) -> None:
    _, server = selecting
    inputs = random_inputs(random_llava(layers=3, kv_heads=2))
    ids = inputs["input_ids"]
    for changed, reason in (
        ({"input_ids": ids[:, :0], "attention_mask": ids[:, :0]}, "must have one shape"),
        ({"attention_mask": inputs["attention_mask"][:, 1:]}, "must have one shape"),
        ({"attention_mask": torch.zeros_like(ids)}, "a token in every row"),
        ({"input_ids": torch.where(ids == ids[0, 0], 5000, ids)}, "vocabulary, which has 128"),
        ({"input_ids": torch.where(ids == ids[0, 0], -1, ids)}, "vocabulary, which has 128"),
        ({"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}, "16 image tokens, and pixel_values 2 images"),
    ):
        for name in ("foveate", "foveate_stream"):
            error = refusal(server.ask(name, request({**inputs, **changed})))
            assert reason in error.message() and "\n" not in error.message()
            assert error.code == TritonError.INVALID_ARG
    for new in (0, 4096):
        assert "at most 4096" in refusal(server.ask("foveate", request(inputs, new=new))).message()


def test_a_graph_that_fails_ends_the_answer_with_its_reason(
    selecting: tuple[Any, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = selecting
    run = server.run

    def failing(name: str, *rest: Any) -> Response:
        return Response(error=TritonError("out of memory")) if name == "decoder_step" else run(name, *rest)

    monkeypatch.setattr(server, "run", failing)
    inputs = random_inputs(random_llava(layers=3, kv_heads=2))
    for name, count in (("foveate", 1), ("foveate_stream", 2)):
        answers = server.ask(name, request(inputs))
        assert len(answers) == count
        assert refusal(answers).message() == "decoder_step: out of memory"
        assert refusal(answers).code == TritonError.INTERNAL


def test_the_model_needs_numpy_and_nothing_of_foveate() -> None:
    text = (Path(foveate.__file__).parent / "serving" / "triton" / "model.py").read_text()
    imports = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
    names = {line.split()[1].split(".")[0] for line in imports}
    assert names == {"__future__", "json", "collections", "typing", "numpy", "triton_python_backend_utils"}
