"""`examples/serve_ray.py` under a real Ray on loopback, asked over HTTP."""

from __future__ import annotations

import asyncio
import base64
import http.client
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.models.digits import samples
from tests.small_digits import small_digits

pytest.importorskip("ray.serve", reason="the example serves with Ray: pip install 'ray[serve]'")
pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_ray.py"
START_S = 180
NEW = 8


class Client:
    """Asks the server on a port of loopback."""

    def __init__(self, port: int) -> None:
        self.port = port

    def open(self, method: str, path: str, body: Any = None) -> tuple[http.client.HTTPConnection, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
        return connection, connection.getresponse()

    def json(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection, response = self.open(method, path, body)
        with closing(connection):
            return response.status, json.loads(response.read())

    def answer(self, **body: Any) -> Any:
        status, said = self.json("POST", "/generate", body)
        assert status == 200, said
        return said

    def health(self) -> Any:
        return self.json("GET", "/health")[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "out"
    model, processor = small_digits()
    foveate.export(foveate.optimize(model, "fastv{layer=1,keep=0.5}"), output=folder, verify=False)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")  # Ray keeps a token there
    command = [sys.executable, str(EXAMPLE), str(package), "--port", str(port), "--threads", "1"]
    path = os.pathsep.join([str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH", "")])
    log = home / "log"
    with log.open("w") as file:
        environment = {**os.environ, "HOME": str(home), "PYTHONPATH": path}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    found = Client(port)
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            try:
                if found.health()["status"] == "ok":
                    break
            except (OSError, ValueError):
                time.sleep(0.5)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def prompts() -> list[dict[str, Any]]:
    """Requests with images and without, of unequal lengths."""
    found: list[dict[str, Any]] = []
    for sample in samples(n=4, seed=1):
        file = io.BytesIO()
        sample.image.save(file, "PNG")
        found.append({"prompt": sample.question, "image": base64.b64encode(file.getvalue()).decode()})
    return [*found, {"prompt": "read row 2 ."}, {"prompt": "how many 3 are there ?"}]


def test_answers_are_those_of_the_package(package: Path, client: Client) -> None:
    model, processor = foveate.load(package), small_digits()[1]
    for sample, request in zip(samples(n=4, seed=1), prompts(), strict=False):
        inputs = processor(text=sample.prompt, images=sample.image, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = client.answer(**request, max_new_tokens=NEW)
        assert said["text"] == processor.decode(ids, skip_special_tokens=True)
        assert said["tokens"] == len(ids)


def test_concurrent_requests_share_batches_and_get_the_answers_of_single_ones(client: Client) -> None:
    requests = [{**each, "max_new_tokens": NEW + n} for n, each in enumerate(prompts())]
    single = [client.answer(**each) for each in requests]
    assert [each["batch"] for each in single] == [1] * len(requests)
    assert len({each["text"] for each in single}) > 2
    with ThreadPoolExecutor(len(requests)) as pool:
        together = [future.result() for future in [pool.submit(client.answer, **each) for each in requests]]
    assert max(each["batch"] for each in together) > 1
    for alone, shared in zip(single, together, strict=True):
        assert {**alone, "batch": 0} == {**shared, "batch": 0}


def test_a_stream_is_the_answer_in_pieces(client: Client) -> None:
    request = {**prompts()[4], "max_new_tokens": NEW}
    connection, response = client.open("POST", "/generate", {**request, "stream": True})
    with closing(connection):
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(each.removeprefix("data: ")) for each in response.read().decode().split("\n\n") if each]
    *pieces, last = events
    assert len(pieces) > 2 and last.pop("done")
    assert "".join(each["text"] for each in pieces) == last["text"]
    assert last == client.answer(**request)


def test_a_client_that_leaves_midway_frees_its_row(client: Client) -> None:
    connection, response = client.open("POST", "/generate", {**prompts()[0], "max_new_tokens": 800, "stream": True})
    start = time.monotonic()
    for _ in range(10):
        assert response.readline().startswith(b"data: ") and response.readline() == b"\n"
    whole = (time.monotonic() - start) / 10 * 800
    assert client.health()["running"] == 1
    response.close()
    connection.close()
    left = time.monotonic()
    while client.health()["running"]:
        assert time.monotonic() - left < whole / 2, "it went on for nobody"
        time.sleep(0.05)
    assert client.health() == {"status": "ok", "running": 0, "error": ""}
    assert client.answer(**prompts()[0], max_new_tokens=2)["tokens"] == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff not json", "the body is not JSON"),
        ([1], "the body must be an object"),
        ({"promt": "x"}, "fields out of prompt, image"),
        ({}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": 3}, "prompt must be of type str"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens must be of type int"),
        ({"prompt": "x", "max_new_tokens": 5000}, "may grow by 5000, this model takes 1024"),
        ({"prompt": "which " * 2000}, "this model takes 1024"),
        ({"prompt": "x", "image": "!"}, "image is no image file"),
        ({"prompt": "x", "image": base64.b64encode(b"GIF89a").decode()}, "image is no image file"),
        ({"prompt": "x", "image": prompts()[0]["image"][:200]}, "image is no image file"),
        ({"prompt": "<image> x"}, "prompt holds 1 <image>, and there are 0 images"),
    ],
)
def test_nonsense_is_a_400_with_one_line(client: Client, body: Any, reason: str) -> None:
    status, said = client.json("POST", "/generate", body)
    assert status == 400 and reason in said["error"] and "\n" not in said["error"]
    assert client.health()["status"] == "ok"


def test_other_routes_are_a_404(client: Client) -> None:
    assert client.json("GET", "/generate")[0] == 404


def test_a_batch_that_fails_shows_in_health(package: Path) -> None:
    spec = importlib.util.spec_from_file_location("serve_ray", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_ray"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    answers = module.Answers.func_or_class(str(package))
    batched = type(answers).tokens.__wrapped__
    works = answers.run

    async def ask() -> tuple[int, int]:
        """Tokens of a batch of one, and the status of /health behind it."""
        asked, steps = answers.read(b'{"prompt": "read row 2 .", "max_new_tokens": 3}'), 0
        try:
            async for _ in batched(answers, [asked]):
                steps += 1
        except RuntimeError as error:
            assert str(error) == "out of memory"
        scope = {"type": "http", "method": "GET", "path": "/health", "headers": [], "query_string": b""}
        return steps, (await answers(module.Request(scope))).status_code

    def fail(**inputs: Any) -> None:
        raise RuntimeError("out of memory")

    assert asyncio.run(ask()) == (3, 200)
    answers.run = fail
    assert asyncio.run(ask()) == (0, 503)
    with pytest.raises(RuntimeError, match="out of memory"):
        answers.check_health()
    answers.run = works
    assert asyncio.run(ask()) == (3, 200) and answers.running == 0
    answers.check_health()
