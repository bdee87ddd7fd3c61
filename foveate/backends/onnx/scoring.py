"""How queries weigh keys: ONNX's `Attention` where an opset has it, and the steps that it stands for.

    Attention(q, k, v, mask)   =   softmax(scale * q k', hidden where the mask is False) v        scores are in fp32

Heads that share a key head are rows of one matmul, and keys may come in streams, which are not put together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto
from torch import fx

from foveate.backends.onnx.aten import dtype_of
from foveate.backends.onnx.emit import Emitter
from foveate.backends.onnx.opsets import FUSED
from foveate.ir.rewriter import shape

LOWEST = float(torch.finfo(torch.float32).min)
"""Hides a score in such a way that a query which sees nothing gives a number, as `Attention` does."""


@dataclass(frozen=True)
class Scoring:
    """So many heads of queries score the keys of so many, times a scale, in a dtype."""

    heads: int
    kv_heads: int
    scale: float
    dtype: torch.dtype

    @classmethod
    def of(cls, q: fx.Node, k: fx.Node, scale: float) -> Scoring:
        """Of queries [B, H, n, e] to keys [B, Hk, m, e]."""
        heads, kv_heads = (int(shape(n)[1]) for n in (q, k))
        return cls(heads, kv_heads, float(scale), dtype_of(q))

    def attend(self, emit: Emitter, q: str, k: str, v: str, seen: str | None = None, added: str | None = None) -> str:
        """Attention [B, H, n, e]; seen: bool [B, n, m]; or what is added to scores, [B, 1 or H, n, m]."""
        if emit.opset < FUSED:
            return self.mixed(emit, self.rows(emit, q, [k], seen, added, LOWEST), [v], q)
        precision = {} if self.dtype == torch.float32 else {"softmax_precision": TensorProto.FLOAT}
        mask = [emit.unsqueeze(seen, 1)] if seen is not None else [] if added is None else [added]
        return str(emit.op("Attention", q, k, v, *mask, scale=self.scale, **precision))

    def rows(
        self,
        emit: Emitter,
        q: str,
        k: Sequence[str],
        seen: str | None = None,
        added: str | None = None,
        hidden: float = -math.inf,
    ) -> str:
        """Softmaxed rows fp32 [B, H, n, all keys]; seen and added: see `attend`; hidden: a score that is not seen."""
        grouped = self._grouped(emit, q)
        products = [emit.op("MatMul", grouped, emit.op("Transpose", stream, perm=[0, 1, 3, 2])) for stream in k]
        row = self._apart(emit, emit.concat([self._cast(emit, x, torch.float32) for x in products], 3), q)
        row = str(emit.op("Mul", row, emit.constant(self.scale)))
        if added is not None:
            row = str(emit.op("Add", row, self._cast(emit, added, torch.float32)))
        if seen is not None:
            row = str(emit.op("Where", emit.unsqueeze(seen, 1), row, emit.constant(hidden)))
        return str(emit.op("Softmax", row, axis=3))

    def mixed(self, emit: Emitter, rows: str, v: Sequence[str], q: str) -> str:
        """Values weighed by rows: [B, H, n, e]; one matmul a stream of keys, and n the queries of q."""
        lengths = [emit.length(stream, 2) for stream in v]
        parts = emit.op("Split", rows, emit.concat(lengths, 0), outputs=len(v), axis=3) if len(v) > 1 else (rows,)
        out = ""
        for part, stream in zip(parts, v, strict=True):
            product = emit.op("MatMul", self._grouped(emit, self._cast(emit, part, self.dtype)), stream)
            out = str(emit.op("Add", out, product)) if out else str(product)
        return self._apart(emit, out, q)

    def _cast(self, emit: Emitter, value: str, dtype: torch.dtype) -> str:
        """Between the model's dtype and fp32, where they differ."""
        return value if self.dtype == torch.float32 else emit.cast(value, dtype)

    def _grouped(self, emit: Emitter, rows: str) -> str:
        """[B, H, n, x] as [B, Hk, H / Hk * n, x]: the queries of one key head are rows of one matmul."""
        if self.heads == self.kv_heads:
            return rows
        count = emit.op("Mul", emit.length(rows, 2), emit.constant([self.heads // self.kv_heads]))
        return emit.reshape(rows, emit.length(rows, 0), self.kv_heads, count, emit.length(rows, 3))

    def _apart(self, emit: Emitter, grouped: str, like: str) -> str:
        """The inverse of `_grouped`; `like` has as many rows a head."""
        if self.heads == self.kv_heads:
            return grouped
        return emit.reshape(grouped, emit.length(grouped, 0), self.heads, emit.length(like, 2), emit.length(grouped, 3))


def softmaxed(emit: Emitter, q: fx.Node, k: Sequence[fx.Node], seen: str, scale: float) -> str:
    """Softmaxed rows fp32 [B, H, n, all keys]; seen bool [B, n, all keys]; a query that sees nothing has NaNs."""
    return Scoring.of(q, k[0], scale).rows(emit, emit.value(q), [emit.value(n) for n in k], seen)
