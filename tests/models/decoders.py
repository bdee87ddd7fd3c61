"""Checks that every family's decoder graphs must pass, and the prompts for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from foveate.ir.decode import derive_decode
from foveate.ir.join import join
from foveate.ir.program import Program
from foveate.ir.rules import verify
from foveate.ir.split import split, structure
from foveate.ir.tail import keep_last
from foveate.ir.text import parse_graphs
from foveate.models.registry import trace_joint
from tests.models.tiny import HIDDEN, random, run

PIPELINES = (
    "cut-visual{from_layer=1}",
    "drop-visual-heads{keep=2,from_layer=0}",
    "drop-visual-heads{keep=1,from_layer=1}",
    "drop-visual-neurons{keep=0.5}",
    "drop-visual-neurons{keep=0.25,select=magnitude}",
    "fastv{layer=1,keep=0.5}",
    "random-prune{layer=1,keep=0.29,seed=3}",
    "drop-visual-heads{keep=3,from_layer=0},drop-visual-neurons{keep=0.5,select=random},fastv{layer=1,keep=0.5},"
    "cut-visual{from_layer=2}",
)
"""Every pass, alone and together."""


@dataclass(frozen=True)
class Prompt:
    """Embeddings [B, S, D] and positions [..., B, S] of a prompt with one image, whole and in streams.

    start: where the image begins; visual: how many tokens it has; split: inputs of a split prefill graph. deepstack:
    [B, visual, levels, D], what is added to the image's tokens behind the first layers.
    """

    hidden: Tensor
    positions: Tensor
    start: int
    visual: int
    prefix: int
    deepstack: Tensor | None = None

    @property
    def everywhere(self) -> dict[str, Tensor]:
        """What is added to each token: [B, S, levels, D]."""
        if self.deepstack is None:
            return {}
        behind = self.hidden.shape[1] - self.start - self.visual
        return {"deepstack": torch.nn.functional.pad(self.deepstack, (0, 0, 0, 0, self.start, behind))}

    @property
    def given(self) -> dict[str, Any]:
        """The same as a transformers decoder takes it."""
        if self.deepstack is None:
            return {}
        places = torch.arange(self.hidden.shape[1]).expand(len(self.hidden), -1)
        mask = (places >= self.start) & (places < self.start + self.visual)
        levels = [level.flatten(0, 1) for level in self.deepstack.unbind(2)]
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": levels}

    @property
    def split(self) -> dict[str, Any]:
        """Inputs of a split prefill graph."""
        stop = self.start + self.visual
        places = torch.arange(self.hidden.shape[1])
        parts = {"visual": places[self.start : stop], "text": torch.cat([places[: self.start], places[stop:]])}
        inputs: dict[str, Any] = {"prefix": self.prefix}
        for stream, index in parts.items():
            inputs[stream] = self.hidden[:, index]
            inputs[f"{stream}_position_ids"] = self.positions[..., index]
            inputs[f"{stream}_order"] = index.repeat(len(self.hidden), 1)
            inputs |= {f"{stream}_{name}": value[:, index] for name, value in self.everywhere.items()}
        return inputs


def prompt(
    visual: int, prefix: int = 2, text: int = 7, leading: tuple[int, ...] = (), columns: int | None = None
) -> Prompt:
    """A batch of two; a negative prefix promises nothing to the kernels. With columns, image tokens stand in a grid."""
    start = max(prefix, 0) if prefix >= 0 else 3
    count = visual + text
    positions = torch.arange(count).repeat(*leading, 2, 1)
    if columns is not None:
        # As in M-RoPE: one time, rows and columns; the text goes on after the largest of them.
        place = torch.arange(visual)
        stop = start + visual
        positions[0, :, start:stop] = start
        positions[1, :, start:stop] = start + place // columns
        positions[2, :, start:stop] = start + place % columns
        positions[:, :, stop:] = int(positions[:, :, start:stop].max()) + 1 + torch.arange(count - stop)
    return Prompt(random(2, count, HIDDEN), positions, start, visual, prefix)


def traced(source: Any) -> tuple[fx.Graph, Program]:
    """The joint decoder of a model, and its dense program, from one trace."""
    joint, program = trace_joint(source)
    program.graphs["prefill"] = keep_last(program, split(program, joint))
    program.graphs["decode"] = derive_decode(program)
    return joint, program


def near(actual: Any, expected: Tensor) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def reference(source: Any, prompt: Prompt) -> tuple[Tensor, Any]:
    """Logits [B, 1, V] and the cache of the transformers decoder."""
    with torch.no_grad():
        options = {"position_ids": prompt.positions, "use_cache": True, **prompt.given}
        result = source.model.get_decoder()(inputs_embeds=prompt.hidden, **options)
        return source.lm_head(result.last_hidden_state[:, -1:]), result.past_key_values


def check_joint(source: Any, program: Program, joint: fx.Graph, prompt: Prompt) -> None:
    """The joint graph gives the logits and the cache of the model."""
    logits, cache = reference(source, prompt)
    order = torch.arange(prompt.hidden.shape[1]).repeat(2, 1)
    given = {"hidden": prompt.hidden, "position_ids": prompt.positions, "order": order, **prompt.everywhere}
    actual = run(program, joint, given)
    near(actual["out"], logits)
    for entry, layer in zip(actual["kv"], cache.layers, strict=True):
        near(entry[2], layer.keys)
        near(entry[3], layer.values)


def check_split(source: Any, program: Program, prompt: Prompt) -> None:
    """The prefill graph, and its joined form, give the model's logits; so does a decode step for the last token."""
    logits, _ = reference(source, prompt)
    for graph in (program.prefill, join(program, program.prefill)):
        near(run(program, graph, prompt.split)["logits"], logits)
    shorter = replace(prompt, hidden=prompt.hidden[:, :-1], positions=prompt.positions[..., :-1])
    near(step(program, shorter, prompt), logits)


def step(program: Program, first: Prompt, whole: Prompt) -> Tensor:
    """Logits of the last token of `whole`, decoded after a prefill of `first`, which is one token shorter."""
    inputs, result = first.split, run(program, program.prefill, first.split)
    new: dict[str, Any] = {
        "text": whole.hidden[:, -1:],
        "text_position_ids": whole.positions[..., -1:],
        "text_order": torch.full((2, 1), whole.hidden.shape[1] - 1),
        "past_order": inputs["text_order"],
        "visual_order": inputs["visual_order"],
        "prefix": -1,
    }
    new |= {f"kept_{layer}": order for layer, order in result["kept"].items()}
    for layer, entry in enumerate(result["kv"]):
        names = [f"{stream}_{letter}_{layer}" for stream in ("visual", "past") for letter in "kv"]
        new |= dict(zip(names, entry, strict=True))
    logits = run(program, program.graphs["decode"], new)["logits"]
    assert isinstance(logits, Tensor)
    return logits


def check_same(a: Program, for_a: Prompt, b: Program, for_b: Prompt) -> None:
    """Two programs give the same logits for the same prompt, and the same number of cached tokens."""
    mine, other = run(a, a.prefill, for_a.split), run(b, b.prefill, for_b.split)
    torch.testing.assert_close(mine["logits"], other["logits"], rtol=1e-4, atol=1e-4)
    for x, y in zip(mine["kv"], other["kv"], strict=True):
        assert [t is None or t.shape for t in x] == [t is None or t.shape for t in y]


def check_forms(program: Program, joint: fx.Graph) -> None:
    """The program is valid, reads back from its text, and joining undoes splitting."""
    verify(program)
    again = program.copy()
    again.graphs = parse_graphs(again, program.to_text())
    verify(again)
    assert again.to_text() == program.to_text()
    assert structure(join(program, split(program, joint), inputs=True)) == structure(joint)
