"""Where graphs run, and what a session and a binding refuse. There is no GPU here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foveate
from foveate.backends.onnx.runtime import CPU, CUDA
from foveate.errors import BackendError, InputError
from foveate.runner import NumpyModel, sessions
from foveate.runner.sessions import HOST, Binding, Device
from tests.runner.conftest import Packaged


@pytest.fixture
def built_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime as built for GPUs, on a machine that has none."""
    monkeypatch.setattr(sessions, "available", lambda: [CUDA, CPU])


def test_devices_by_name(built_for_gpus: None) -> None:
    assert Device.named("cpu") == HOST and HOST.is_host and HOST.providers == [CPU]
    second = Device.named("cuda:1")
    assert second == Device("cuda", 1) and not second.is_host
    assert second.providers == [(CUDA, {"device_id": 1}), CPU]
    for name in ("gpu", "cuda:", "cuda:one", ""):
        with pytest.raises(InputError, match="is not known; give 'cpu', 'cuda' or 'cuda:0'"):
            Device.named(name)


def test_without_a_gpu_the_host_is_taken(built_for_gpus: None, packaged: Packaged) -> None:
    assert foveate.load(packaged(""), tensors="np").device == HOST


def test_a_gpu_that_is_not_there_is_one_error(packaged: Packaged, request: pytest.FixtureRequest) -> None:
    with pytest.raises(BackendError, match="has no CUDA provider: pip install onnxruntime-gpu, or device='cpu'"):
        foveate.load(packaged(""), device="cuda", tensors="np")
    request.getfixturevalue("built_for_gpus")
    with warnings.catch_warnings(), pytest.raises(BackendError, match="found no GPU that it can use"):
        warnings.simplefilter("ignore")
        foveate.load(packaged(""), device="cuda", tensors="np")


def test_arrays_on_the_host_are_shared_and_read_anew(plain: NumpyModel) -> None:
    embed = plain.graphs["embed"]
    ids = np.array([[5, 6]])
    width = embed.outputs["inputs_embeds"].shape[2]
    found = HOST.put(np.zeros((1, 2, width), np.float32))
    bound = Binding(embed, {"input_ids": ids, "unknown": ids}, {"inputs_embeds": found})
    for row in ([5, 6], [7, 5]):
        ids[:] = row
        bound.run()
        expected = embed.run({"input_ids": np.array([row])})["inputs_embeds"].read()
        assert np.array_equal(found.array, expected)


def test_what_onnx_runtime_cannot_run_is_one_error(plain: NumpyModel) -> None:
    embed = plain.graphs["embed"]
    with pytest.raises(BackendError, match=r"embed_tokens\.onnx takes input_ids, which this foveate does not know"):
        embed.run({})
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot run embed_tokens\.onnx"):
        embed.run({"input_ids": np.array([[10**6]])})


def test_types_that_numpy_does_not_have(packaged: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {name: kind for name, kind in sessions.DTYPES.items() if "float" not in name}
    monkeypatch.setattr(sessions, "DTYPES", known)
    path: Path = packaged("") / "embed_tokens.onnx"
    with pytest.raises(BackendError, match=r"inputs_embeds of embed_tokens\.onnx is tensor\(float\), which numpy does"):
        sessions.Session(path, HOST)
