"""Runs the Triton kernels in Triton's interpreter against a dense oracle; prints the largest errors as JSON.

A script of its own, since the interpreter is chosen by an environment variable before kernels are first imported.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from foveate.kernels.neighbor import triton_launch
from foveate.kernels.neighbor.triton_support import available, supports


@dataclass(frozen=True)
class Case:
    """Inputs of one call; `images` holds one tuple an image as `foveate.ops.neighbor_attention` says."""

    images: tuple[tuple[int, int, int, int, int, int], ...]
    group: int = 1
    heads: int = 1
    size: int = 16
    radius: int = 2
    metric: str = "chebyshev"
    causal: bool = True
    text: int | None = None
    padding: int = 0
    dtype: str = "float32"
    patches: int = 2
    """The kernels' patches are those for elements of so many bytes."""


ONE = (0, 0, 5, 7, 0, 0)
RAGGED = ((0, 0, 5, 7, 0, 3), (0, 35, 3, 4, 2, 6), (1, 0, 6, 6, 1, 4), (1, 36, 1, 3, 0, 5))

FORWARD = {
    "one image": Case((ONE,)),
    "both ways": Case((ONE,), causal=False),
    "euclidean": Case((ONE,), metric="euclidean", radius=2),
    "euclidean, both ways, radius 5": Case(((0, 0, 9, 11, 0, 0),), metric="euclidean", radius=5, causal=False),
    "euclidean, radius 1": Case((ONE,), metric="euclidean", radius=1, causal=False),
    "radius 1, both ways": Case((ONE,), radius=1, causal=False),
    "radius 5": Case(((0, 0, 13, 10, 0, 0),), radius=5),
    "radius 0": Case((ONE,), radius=0),
    "radius beyond the image": Case(((0, 0, 9, 10, 0, 0),), radius=10**6, causal=False),
    "euclidean radius beyond the image": Case(((0, 0, 9, 10, 0, 0),), radius=10**6, metric="euclidean"),
    "three heads a key head": Case((ONE,), group=3, heads=2),
    "seven heads a key head": Case((ONE,), group=7, heads=2, radius=1),
    "seven heads, text, both ways": Case(((0, 0, 6, 9, 0, 4),), group=7, text=4, causal=False, radius=5),
    "sixteen heads a key head": Case(((0, 0, 5, 3, 0, 4),), group=16, text=4),
    "one token": Case(((0, 0, 1, 1, 0, 0),)),
    "one token and text": Case(((0, 0, 1, 1, 0, 2),), text=2),
    "one row": Case(((0, 0, 1, 19, 0, 3),), text=3, radius=5),
    "one column": Case(((0, 0, 19, 1, 0, 3),), text=3, radius=1, causal=False),
    "long text": Case(((0, 0, 3, 5, 1, 75),), text=77),
    "text not from its start": Case(((0, 0, 4, 4, 3, 5),), text=9),
    "a text stream without a token": Case((ONE,), text=0),
    "text nobody sees": Case((ONE,), text=9),
    "ragged": Case(RAGGED, text=6, padding=2),
    "ragged, three heads, both ways": Case(RAGGED, group=3, text=6, padding=2, causal=False),
    "a batch row without an image": Case(((2, 0, 4, 4, 0, 2),), text=2),
    "no image": Case((), padding=3),
    "patches of fp32": Case(RAGGED, group=3, text=6, patches=4),
    "head size 24": Case((ONE,), size=24, text=3),
    # Not bfloat16: the interpreter multiplies its bit patterns as integers.
    "float16": Case(RAGGED, group=3, text=6, dtype="float16"),
}


def drawn(count: int) -> dict[str, Case]:
    """So many cases drawn at random, always the same."""
    draw = random.Random(0)
    cases = {}
    for number in range(count):
        batch, text, images = draw.randint(1, 2), draw.choice([0, 5, 40]), []
        for row in range(batch):
            first = 0
            for _ in range(draw.randint(1, 2)):
                height, width, start = draw.randint(1, 9), draw.randint(1, 9), draw.randint(0, text)
                images.append((row, first, height, width, start, draw.randint(start, text)))
                first += height * width
        cases[f"drawn {number}"] = Case(
            images=tuple(images),
            group=draw.choice([1, 2, 3, 5]),
            radius=draw.choice([1, 2, 3, 5]),
            metric=draw.choice(["chebyshev", "euclidean"]),
            causal=draw.random() < 0.5,
            text=text,
            padding=draw.randint(0, 2),
        )
    return cases


FORWARD |= drawn(12)


def inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """q, k, v and, if there is a text stream, its k and v, as views of token-major memory; grids [images, 6]."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.tensor(case.images, dtype=torch.int64).reshape(len(case.images), 6)
    batch = int(grids[:, 0].max()) + 1 if len(grids) else 1
    tokens = max([first + h * w for _, first, h, w, _, _ in case.images], default=0) + case.padding

    def stream(count: int, heads: int) -> Tensor:
        x = torch.randn(batch, count, heads, case.size, generator=generator, dtype=torch.float64)
        return x.to(getattr(torch, case.dtype)).transpose(1, 2)

    sizes = [(tokens, case.heads * case.group), *[(tokens, case.heads)] * 2, *[(case.text, case.heads)] * 2]
    return [stream(*size) for size in sizes if size[0] is not None], grids


def oracle(case: Case, streams: list[Tensor], grids: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, n, H, e] and log-sum-exp [B, H, n] with one dense mask an image; 0 where a token is padding."""
    q, k, v, *text = streams
    o, lse = 0 * q, q.new_zeros(q.shape[:3])
    for row, first, height, width, start, stop in grids.tolist():
        token = torch.arange(height * width)
        down, across = (x[:, None] - x[None, :] for x in (token // width, token % width))
        apart = torch.maximum(down.abs(), across.abs()) if case.metric == "chebyshev" else (down**2 + across**2) ** 0.5
        seen = (apart <= case.radius) & ((token[:, None] >= token[None, :]) | (not case.causal))
        part = slice(first, first + height * width)
        keys, values = k[row, :, part], v[row, :, part]
        if text:
            keys, values = (torch.cat([t[row, :, start:stop], x], 1) for t, x in zip(text, (keys, values)))
            seen = torch.cat([torch.ones(len(token), stop - start, dtype=torch.bool), seen], 1)
        keys, values = (x.repeat_interleave(case.group, 0) for x in (keys, values))
        scores = (q[row, :, part] @ keys.mT * SCALE).masked_fill(~seen, -torch.inf)
        o[row, :, part] = scores.softmax(-1) @ values
        lse[row, :, part] = scores.logsumexp(-1)
    return o.transpose(1, 2), lse


SCALE = 0.3


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest difference; infinite where the kernel gave something that is not a number."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected).abs()
    return float(torch.nan_to_num(difference, nan=torch.inf).max()) if difference.numel() else 0.0


@contextmanager
def patched(case: Case) -> Iterator[None]:
    """Patches as the case says, and runs of text gradients so short that small images have several."""
    sizes, back = triton_launch.forward_config, triton_launch.backward_configs
    with (
        mock.patch.object(triton_launch, "forward_config", lambda *args: sizes(*args[:-1], case.patches)),
        mock.patch.object(triton_launch, "backward_configs", lambda *args: back(*args[:-1], case.patches)),
        mock.patch.object(triton_launch, "text_run", lambda *_: 16),
    ):
        yield


def forward_errors(case: Case) -> dict[str, float]:
    streams, grids = inputs(case)
    text_k, text_v = streams[3:] or (None, None)
    assert supports(streams[0], streams[1], text_k, grids, case.metric) is None
    o, lse = triton_launch.forward(*streams[:3], text_k, text_v, grids, case.radius, case.metric, case.causal, SCALE)
    assert o.dtype == streams[0].dtype and lse.dtype == torch.float32 and o.is_contiguous()
    expected = oracle(case, [x.double() for x in streams], grids)
    return {"o": gap(o, expected[0]), "lse": gap(lse, expected[1])}


BACKWARD = [
    "one image",
    "both ways",
    "euclidean, both ways, radius 5",
    "radius 0",
    "radius beyond the image",
    "three heads a key head",
    "seven heads, text, both ways",
    "sixteen heads a key head",
    "one token and text",
    "one row",
    "one column",
    "long text",
    "a text stream without a token",
    "text nobody sees",
    "ragged",
    "ragged, three heads, both ways",
    "a batch row without an image",
    "no image",
    "patches of fp32",
    "head size 24",
    *drawn(6),
]


def backward_errors(case: Case) -> dict[str, float]:
    streams, grids = inputs(case)
    text_k, text_v = streams[3:] or (None, None)
    options = (grids, case.radius, case.metric, case.causal, SCALE)
    o, lse = triton_launch.forward(*streams[:3], text_k, text_v, *options)
    d_out = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    actual = triton_launch.backward(d_out, *streams[:3], text_k, text_v, o, lse, *options)
    leaves = [x.double().requires_grad_() for x in streams]
    oracle(case, leaves, grids)[0].backward(d_out.double())
    names = ["q", "k", "v", "text k", "text v"]
    return {n: gap(a, torch.zeros_like(x) if x.grad is None else x.grad) for n, a, x in zip(names, actual, leaves)}


def main() -> None:
    torch.set_num_threads(1)
    assert available(torch.device("cpu")), "TRITON_INTERPRET=1 must be set"
    errors: dict[str, dict[str, dict[str, float]]] = {"forward": {}, "backward": {}}
    for name, case in FORWARD.items():
        with patched(case):
            errors["forward"][name] = forward_errors(case)
            if name in BACKWARD:
                errors["backward"][name] = backward_errors(case)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
