"""Random queries, keys and orders for the attention ops, in every layout that graphs use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.ops import PAD

SIZE = 8
SCALE = 0.4
LAYOUTS = ("vt:vt", "t:t", "v:vt", "t:vt", "t:vtt", "s:s")
HEADS = ((4, 4), (4, 2), (4, 1), (6, 2))

Call = dict[str, Any]


def in_sequence(visual: int, text: int, prefix: int, batch: int = 2) -> dict[str, Tensor]:
    """Orders of a prompt whose image stands after `prefix` text tokens; `s` is the whole prompt."""
    places = torch.arange(visual + text)
    orders = {
        "v": places[prefix : prefix + visual],
        "t": torch.cat([places[:prefix], places[prefix + visual :]]),
        "s": places,
    }
    return {name: order.repeat(batch, 1) for name, order in orders.items()}


def scattered(visual: int, text: int, generator: torch.Generator, batch: int = 3) -> dict[str, Tensor]:
    """Orders that promise nothing: tokens anywhere and in any order, each row padded by another amount."""
    rows: dict[str, list[Tensor]] = {"v": [], "t": [], "s": []}
    for row in range(batch):
        places = torch.randperm(visual + text + 5, generator=generator)[: visual + text]
        pads = torch.rand(visual + text, generator=generator) < 0.3 * row
        pads[-1:] = False
        places = places.masked_fill(pads, PAD)
        for name, part in (("v", places[:visual]), ("t", places[visual:]), ("s", places)):
            rows[name].append(part)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def call(
    layout: str,
    orders: dict[str, Tensor],
    heads: tuple[int, int],
    prefix: int,
    *,
    queries: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """Arguments of `foveate::attention`. `queries`: only the last ones of a text stream ask.

    In `t:vtt` the text keys are cut in two, the cache and what is new; only what is new asks.
    """
    generator = torch.Generator().manual_seed(seed)
    asked, _, looked = layout.partition(":")
    streams = [(name, orders[name]) for name in looked]
    if looked.endswith("tt"):
        new = min(queries or 2, orders["t"].shape[1])
        past = orders["t"].shape[1] - new
        streams = [("v", orders["v"]), ("t", orders["t"][:, :past]), ("t", orders["t"][:, past:])]
        q_order = [orders["t"][:, past:]]
    else:
        q_order = [orders[name] if queries is None else orders[name][:, -queries:] for name in asked]
    k_order = [order for _, order in streams]
    batch = k_order[0].shape[0]

    def random(count: int, number: int) -> Tensor:
        return torch.randn(batch, count, number, SIZE, generator=generator).to(dtype)

    return {
        "q": [random(heads[0], x.shape[1]) for x in q_order],
        "k": [random(heads[1], x.shape[1]) for x in k_order],
        "v": [random(heads[1], x.shape[1]) for x in k_order],
        "q_order": q_order,
        "k_order": k_order,
        "prefix": prefix,
        "layout": layout,
        "scale": SCALE,
    }


def real(arguments: Call) -> Tensor:
    """Which queries are no padding: bool [B, n]."""
    return torch.cat(arguments["q_order"], 1) != PAD


def plain(arguments: Call) -> tuple[Any, ...]:
    """Keyword arguments in the order of the op's schema."""
    return tuple(arguments.values())
