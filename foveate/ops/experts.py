"""Feed-forward layers of which each token takes a few parts. `foveate.ops` explains the shapes."""

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
"""What experts may do between their two matmuls, as configurations call it."""

LIBRARY.define("experts(Tensor x, Tensor logits, Tensor gate_up, Tensor down, int chosen, str activation) -> Tensor")
experts = torch.ops.foveate.experts.default
"""A mixture of E experts: x [..., D], logits [..., E], gate_up [E, 2 N, D], down [E, D, N] -> [..., D].

A token goes through the `chosen` experts of its largest logits, each of which is `down(act(gate(x)) * up(x))` with N
neurons, and gets their sum, weighted by the softmax (fp32) over the chosen logits. activation: one of `ACTIVATIONS`.
Tokens do not see each other."""


@fake("experts")
def _experts(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, chosen: int, activation: str) -> Tensor:
    return x.new_empty(x.shape)
