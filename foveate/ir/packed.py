"""Selecting visual tokens where images of any size stand in one packed sequence.

    before                                   after
    tower -> out [N, D]                      tower -> out [N, D]
                                             stays = the best of each image, bool [N]

Positions of M-RoPE say where in its image a token stands, so they stay. The tower computes all tokens; the decoder is
given those that stay.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.program import NodeInfo, args_of, info, outputs
from foveate.ir.rewriter import Rewriter

BOUNDS = "cu_seqlens"
"""The input that says where images begin and end; attention that is given other bounds sees windows."""


def keep_in_segments(edit: Rewriter, name: str, by: str, share: float, keep: float, how: str) -> Iterator[str]:
    """Choose floor(keep * n) of each image's or frame's n tokens, by a rule of `foveate::segment_tokens`.

    Raises PassError where tokens were chosen before, and for a rule that looks at attention where no layer sees images.
    """
    about, found = edit.program.info, outputs(edit.graph)
    if "stays" in found:
        raise PassError(f"{name}: {info(found['stays']).by} already selects in the vision tower; use one of the two")
    nodes = list(edit.graph.nodes)
    bounds = next(n for n in nodes if n.op == "placeholder" and n.name == BOUNDS)
    why = NodeInfo(info(found["out"]).layer, "select", "none", name)
    with edit.before(edit.graph.output_node()):
        row: fx.Node | None = None
        if by in ("row", "distinct"):
            whole = [n for n in nodes if n.target == ops.varlen_attention and args_of(n)[3] is bounds]
            if not whole:
                raise PassError(f"{name}: no layer of the vision tower sees a whole image, so none tells what matters")
            query, key, _, _, scale = args_of(whole[-1])
            row = edit.call(ops.segment_means, query, key, bounds, scale, about=why)
        given = (bounds, about.patches_per_token, keep, share)
        stays = edit.call(ops.segment_tokens, by, found["out"], row, *given, about=why)
    edit.output({**found, "stays": stays})
    edit.refresh()
    left = f"{edit.program.tokens_left} of {about.tokens_per_image}"
    yield f"of the vision tower's tokens {left} of a nominal image, or as large a share, go to the decoder, {how}"
