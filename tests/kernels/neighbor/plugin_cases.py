"""Runs the plugin's kernel in Triton's interpreter against a dense oracle; prints the largest errors as JSON.

A script of its own, since the interpreter is chosen by an environment variable before kernels are first imported.
"""

from __future__ import annotations

import json

import torch

from foveate.kernels.neighbor.plugin import PluginKernel
from foveate.kernels.neighbor.tables import grid_rows, image_table
from foveate.kernels.neighbor.triton_support import available
from tests.kernels.neighbor.triton_cases import SCALE, Case, gap, inputs, oracle

CPU = torch.device("cpu")

ONE = ((0, 0, 5, 7, 0, 0),)
TWO = ((0, 0, 5, 7, 0, 3), (0, 35, 5, 7, 2, 6))
BATCH = ((0, 0, 6, 9, 0, 0), (1, 0, 6, 9, 3, 8))
TWO_EACH = ((0, 0, 3, 4, 0, 2), (0, 12, 3, 4, 0, 5), (1, 0, 3, 4, 4, 7), (1, 12, 3, 4, 4, 9))

CASES = {
    "one image": Case(ONE),
    "one image, both ways, patches of fp32": Case(ONE, causal=False, patches=4),
    "two images a prompt": Case(TWO, text=6),
    "two images a prompt, seven heads, euclidean": Case(TWO, text=6, group=7, heads=2, metric="euclidean"),
    "two prompts": Case(BATCH, text=9, radius=5),
    "two prompts, without text, both ways": Case(BATCH, group=2, heads=2, causal=False, radius=1),
    "two prompts of two images": Case(TWO_EACH, text=11, group=3, heads=2),
    "two prompts of two images, euclidean, both ways": Case(
        TWO_EACH, text=11, group=2, metric="euclidean", causal=False, patches=4
    ),
    "radius beyond the image": Case(TWO, text=6, radius=10**6, size=24),
    "text longer than a block": Case(((0, 0, 1, 3, 1, 75),), text=77, causal=False),
    "padding behind the images": Case(BATCH, text=9, padding=2),
}


def kernel(case: Case) -> PluginKernel:
    """The kernel of a case; its patches follow from the type, whatever the tensors' own is."""
    return PluginKernel(
        heads=case.heads * case.group,
        key_heads=case.heads,
        size=case.size,
        height=case.images[0][2],
        width=case.images[0][3],
        radius=case.radius,
        euclidean=case.metric == "euclidean",
        causal=case.causal,
        text=case.text is not None,
        dtype="float32" if case.patches == 4 else "bfloat16",
        scale=SCALE,
    )


def error(case: Case) -> float:
    """Infinite, too, where the kernel wrote behind the images."""
    from foveate.kernels.neighbor.triton_plugin import plugin_forward

    streams, grids = inputs(case)
    q, k, v, *text = (x.contiguous() for x in streams)
    text_k, text_v = text or (k, v)
    batch, heads, tokens, size = q.shape
    images = image_table(grid_rows(grids), CPU)
    o = torch.full((batch, tokens, heads, size), torch.nan)
    own = kernel(case)
    grid = (len(images) * own.tiles, case.heads)
    plugin_forward[grid](q, k, v, text_k, text_v, images, tokens, text_k.shape[2], o, **own.constants)
    end = tokens - case.padding
    expected = oracle(case, [x.double() for x in streams], grids)[0]
    return gap(o[:, :end], expected[:, :end]) if o[:, end:].isnan().all() else float("inf")


def main() -> None:
    torch.set_num_threads(1)
    assert available(CPU), "TRITON_INTERPRET=1 must be set"
    print(json.dumps({name: error(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
