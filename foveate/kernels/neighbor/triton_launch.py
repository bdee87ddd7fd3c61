"""Neighbour attention on GPUs, forward and backward: what each Triton kernel is launched with.

Importing this module does not import Triton, building a launch does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.kernels.neighbor.tables import grid_rows, image_table, run_table, text_end, tile_table
from foveate.kernels.neighbor.triton_configs import Config, backward_configs, forward_config, text_run
from foveate.kernels.neighbor.triton_problem import Launch, Problem, stream
from foveate.kernels.neighbor.triton_support import capability


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor | None,
    text_v: Tensor | None,
    grids: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, n, H, e] and, fp32 [B, H, n], the logarithm of each row's sum of exponentials; see `Problem`.

    Both are 0 where a token is padding.
    """
    problem = Problem(q, k, v, text_k, text_v, grid_rows(grids), radius, metric, causal, scale)
    batch, heads, tokens, size = q.shape
    o = q.new_empty(batch, tokens, heads, size)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    forward_launch(problem, o, lse, forward_config(problem.packed, radius, q.element_size())).run()
    problem.clear_padding(o.transpose(1, 2), lse)
    return o, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor | None,
    text_v: Tensor | None,
    o: Tensor,
    lse: Tensor,
    grids: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, text_k and text_v from d_out [B, n, H, e]; 0 where a token is padding or unseen."""
    problem = Problem(q, k, v, text_k, text_v, grid_rows(grids), radius, metric, causal, scale)
    delta = torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    configs = backward_configs(capability(q.device), problem.packed, q.element_size())
    dq_launch(problem, d_out, o, lse, delta, dq, configs.dq).run()
    dkv_launch(problem, d_out, lse, delta, dk, dv, configs.dkv).run()
    problem.clear_padding(dq, dk, dv)
    if text_k is None or text_v is None:
        return dq, dk, dv, None, None
    d_text = torch.zeros_like(text_k), torch.zeros_like(text_v)
    seen = text_end(problem.grids)
    run = text_run(sum(h * w for _, _, h, w, _, _ in problem.grids), k.shape[1])
    _, of_batch = run_table(problem.grids, run, q.device)
    launch, shares = text_launch(problem, d_out, lse, delta, run, configs.text)
    launch.run()
    for row, runs in of_batch.items():
        for whole, part in zip(d_text, shares):
            whole[row, :, :seen] = part[runs, :, :seen].sum(0)
    return dq, dk, dv, *d_text


def forward_launch(problem: Problem, o: Tensor, lse: Tensor, config: Config) -> Launch:
    """Fills o [B, n, H, e] and lse [B, H, n]."""
    from foveate.kernels.neighbor.triton_forward import neighbor_forward

    arguments = {"o": stream(o.transpose(1, 2)), "lse": stream(lse[..., None])}
    return _query_launch(neighbor_forward, problem, arguments, problem.scale * math.log2(math.e), config)


def dq_launch(
    problem: Problem, d_out: Tensor, o: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, config: Config
) -> Launch:
    """Fills delta [B, H, n] and dq."""
    from foveate.kernels.neighbor.triton_backward import neighbor_dq

    arguments = {"o": stream(o.transpose(1, 2)), "dq": stream(dq), **_incoming(d_out, lse, delta)}
    return _query_launch(neighbor_dq, problem, arguments, problem.scale, config)


def dkv_launch(
    problem: Problem, d_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, config: Config
) -> Launch:
    """Fills dk and dv of the visual keys."""
    from foveate.kernels.neighbor.triton_backward import neighbor_dkv

    arguments = {
        "q": stream(problem.q),
        "k": stream(problem.k),
        "v": stream(problem.v),
        "dk": stream(dk),
        "dv": stream(dv),
        **_incoming(d_out, lse, delta),
        "scale": problem.scale,
    }
    return _patch_launch(neighbor_dkv, problem, arguments, {}, config)


def text_launch(
    problem: Problem, d_out: Tensor, lse: Tensor, delta: Tensor, run: int, config: Config
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """Fills the shares of the text's dk and dv, each fp32 [runs, Hk, text keys seen or more, e]."""
    from foveate.kernels.neighbor.triton_backward import text_dkv

    assert problem.text_k is not None and problem.text_v is not None
    device, heads, size = problem.q.device, problem.k.shape[1], problem.q.shape[3]
    runs, _ = run_table(problem.grids, run, device)
    blocks = -(-text_end(problem.grids) // config.rows)
    shape = (len(runs), heads, blocks * config.rows, size)
    shares = (problem.q.new_empty(shape, dtype=torch.float32), problem.q.new_empty(shape, dtype=torch.float32))
    arguments = {
        "q": stream(problem.q),
        "text_k": stream(problem.text_k),
        "text_v": stream(problem.text_v),
        "part_k": stream(shares[0]),
        "part_v": stream(shares[1]),
        **_incoming(d_out, lse, delta),
        "images": image_table(problem.grids, device),
        "runs": runs,
        "scale": problem.scale,
    }
    constants = {**problem.constants(config), "keys_block": config.rows}
    return Launch(text_dkv, (len(runs), blocks, heads), arguments, constants, config), shares


def _incoming(d_out: Tensor, lse: Tensor, delta: Tensor) -> dict[str, Any]:
    return {"d_out": stream(d_out.transpose(1, 2)), "lse": stream(lse[..., None]), "delta": stream(delta[..., None])}


def _query_launch(kernel: Any, problem: Problem, arguments: dict[str, Any], scale: float, config: Config) -> Launch:
    """A kernel whose programs own a patch of queries each; the visual keys stand in for text that is not there."""
    arguments = {
        "q": stream(problem.q),
        "k": stream(problem.k),
        "v": stream(problem.v),
        "text_k": stream(problem.k if problem.text_k is None else problem.text_k),
        "text_v": stream(problem.v if problem.text_v is None else problem.text_v),
        **arguments,
        "scale": scale,
    }
    text = problem.text_k is not None and text_end(problem.grids) > 0
    return _patch_launch(kernel, problem, arguments, {"packed": problem.packed, "text": text}, config)


def _patch_launch(
    kernel: Any, problem: Problem, arguments: dict[str, Any], constants: dict[str, Any], config: Config
) -> Launch:
    """A kernel whose programs own a patch of tokens each."""
    tiles = tile_table(problem.grids, config.rows, config.cols, problem.q.device)
    images = image_table(problem.grids, problem.q.device)
    arguments = {**arguments, "images": images, "tiles": tiles, "radius": problem.reach()}
    constants = {**constants, **problem.constants(config), **problem.geometry(config)}
    return Launch(kernel, (len(tiles), problem.k.shape[1]), arguments, constants, config)
