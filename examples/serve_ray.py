"""Serve an exported package over HTTP with Ray Serve: batches, streams, a health check.

    pip install "foveate[onnx]" "ray[serve]"
    foveate export MODEL -p P -o OUT
    python examples/serve_ray.py OUT --port 8000

    POST /generate   {"prompt": "what is this?", "image": BASE64, "max_new_tokens": 32, "stream": false}
    GET  /health     200 while batches succeed, 503 after one that failed

Requests that arrive together are one padded batch: they share a prefill and its steps, and a row leaves when its answer
ends or its client is gone. Answers are greedy. Nonsense is a 400 with one line that says what would be right.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import click
import ray
import torch
from PIL import Image, ImageOps
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from torch.nn.functional import pad
from transformers import AutoProcessor

import foveate
from foveate.errors import InputError
from foveate.examples import Example, batch_inputs

FIELDS = {"prompt": str, "image": str, "max_new_tokens": int, "stream": bool}
MOST_PIXELS = 50_000_000


@dataclass(eq=False)
class Asked:
    """One request. inputs: its row; tokens: its answer so far; end: why it ended; gone: nobody waits any more."""

    inputs: dict[str, Any]
    new_tokens: int
    stream: bool
    tokens: list[int] = field(default_factory=list)
    end: str = ""
    batch: int = 0
    gone: bool = False


@serve.deployment(max_ongoing_requests=64)
class Answers:
    """Answers from the package in `folder`."""

    def __init__(self, folder: str) -> None:
        self.model = foveate.load(folder)
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        ends = self.model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.running = 0
        self.failure = ""

    async def __call__(self, request: Request) -> Response:
        """Route a request."""
        route = request.method, request.url.path
        if route == ("GET", "/health"):
            body = {"status": "failing" if self.failure else "ok", "running": self.running, "error": self.failure}
            return JSONResponse(body, 503 if self.failure else 200)
        if route != ("POST", "/generate"):
            return JSONResponse({"error": "there are POST /generate and GET /health"}, 404)
        try:
            asked = await asyncio.to_thread(self.read, await request.body())
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)
        if asked.stream:
            return StreamingResponse(self.events(asked), media_type="text/event-stream")
        async for _ in self.pieces(asked):
            pass
        return JSONResponse(self.whole(asked))

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises again and again."""
        if self.failure:
            raise RuntimeError(self.failure)

    def read(self, body: bytes) -> Asked:
        """The request in a body; InputError where it cannot be answered."""
        try:
            given = json.loads(body)
        except ValueError:
            raise InputError("the body is not JSON") from None
        if not isinstance(given, dict) or given.keys() - FIELDS.keys():
            raise InputError(f"the body must be an object with fields out of {', '.join(FIELDS)}")
        for name, value in given.items():
            if type(value) is not FIELDS[name]:
                raise InputError(f"{name} must be of type {FIELDS[name].__name__}")
        prompt, new_tokens = given.get("prompt", ""), given.get("max_new_tokens", 32)
        if not prompt.strip() or new_tokens < 1:
            raise InputError(
                "prompt is empty; ask something" if new_tokens > 0 else "max_new_tokens must be at least 1"
            )
        images = [open_image(given["image"])] if "image" in given else []
        example = Example(self.around(prompt, len(images)), images, question=prompt)
        inputs = batch_inputs(self.model, self.processor, [example], new_tokens)
        return Asked(inputs, new_tokens, given.get("stream", False))

    def around(self, question: str, images: int) -> str:
        """The whole prompt, by the chat template; as it is where it places its images itself."""
        mark = self.processor.image_token
        if mark not in question and self.processor.chat_template:
            parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
            message = {"role": "user", "content": parts}
            return str(self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
        if question.count(mark) != images:
            raise InputError(f"prompt holds {question.count(mark)} {mark}, and there are {images} images")
        return question

    async def events(self, asked: Asked) -> AsyncIterator[str]:
        """An answer as server-sent events: each piece of text, then what is said of the whole."""
        async for text in self.pieces(asked):
            yield f"data: {json.dumps({'text': text})}\n\n"
        yield f"data: {json.dumps({**self.whole(asked), 'done': True})}\n\n"

    async def pieces(self, asked: Asked) -> AsyncIterator[str]:
        """The text that each new token adds, as soon as its characters are whole."""
        told = ""
        try:
            async for token in self.tokens(asked):
                asked.tokens.append(token)
                text = self.whole(asked)["text"]
                if text != told and text.startswith(told) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield text[len(told) :]
                    told = text
                if asked.end:
                    return
        finally:  # the client left, or there is nothing more to wait for
            asked.gone = True

    def whole(self, asked: Asked) -> dict[str, Any]:
        """What is said of an answer; batch: how many requests shared its prefill."""
        text = self.processor.decode(asked.tokens, skip_special_tokens=True)
        return {"text": text, "tokens": len(asked.tokens), "finish_reason": asked.end, "batch": asked.batch}

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01, max_concurrent_batches=4)
    async def tokens(self, batch: list[Asked]) -> AsyncIterator[list[Any]]:
        """The next token of each request, step by step; StopIteration for those that have left."""
        rows = list(range(len(batch)))
        self.running += len(rows)
        try:
            out = await asyncio.to_thread(self.run, **joined([asked.inputs for asked in batch]))
            while rows:
                chosen = dict(zip(rows, out.logits[:, -1].argmax(-1).tolist(), strict=True))
                for row, token in chosen.items():
                    asked = batch[row]
                    asked.batch, asked.new_tokens = len(batch), asked.new_tokens - 1
                    asked.end = "stop" if token in self.ends else "" if asked.new_tokens else "length"
                yield [chosen.get(row, StopIteration) for row in range(len(batch))]
                stay = [place for place, row in enumerate(rows) if not (batch[row].end or batch[row].gone)]
                self.running -= len(rows) - len(stay)
                rows = [rows[place] for place in stay]
                if rows:
                    out.cache.reorder_cache(torch.tensor(stay))
                    ids = torch.tensor([[chosen[row]] for row in rows])
                    out = await asyncio.to_thread(self.run, input_ids=ids, cache=out.cache)
            self.failure = ""
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.running -= len(rows)

    @torch.inference_mode()
    def run(self, **inputs: Any) -> Any:
        """One prefill or step."""
        return self.model(**inputs)


def open_image(text: str) -> Image.Image:
    """An image in base64 as RGB, turned upright; InputError for anything else."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
        if image.width * image.height <= MOST_PIXELS:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception:  # Pillow's readers raise many kinds on damaged files
        raise InputError("image is no image file in base64, or it is damaged") from None
    raise InputError(f"image has {image.width} x {image.height} pixels; at most {MOST_PIXELS} are opened")


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Single rows as one batch, padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    found: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            ragged = name in ("input_ids", "attention_mask")
            found.setdefault(name, []).append(pad(value, (width - value.shape[1], 0)) if ragged else value)
    return {name: torch.cat(values) for name, values in found.items()}


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True, help="Of ONNX Runtime.")
def main(folder: Path, host: str, port: int, threads: int) -> None:
    """Serve the package in FOLDER until interrupted."""
    if not (folder / "decoder_step.onnx").is_file():
        raise click.ClickException(f"{folder} is no package: make one with `foveate export MODEL -o {folder}`")
    ray.init(num_cpus=threads, include_dashboard=False)
    serve.start(http_options={"host": host, "port": port})
    serve.run(Answers.options(ray_actor_options={"num_cpus": threads}).bind(str(folder.resolve())), blocking=True)


if __name__ == "__main__":
    main()
