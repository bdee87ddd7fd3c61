"""From what a model's processor returns to what its graphs take: the tower runs, and the prompts come apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from foveate.backends.base import Runner
from foveate.errors import InputError
from foveate.ir.program import Program
from foveate.labels import NO_LABEL, next_labels
from foveate.models.registry import FAMILIES
from foveate.ops import PAD
from foveate.positions import check_positions
from foveate.streams import Streams, arrange, check_prompts, reaches, shorten

TEXT = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts: ids, mask and positions as transformers takes them, and what was given for their images.

    given: what the family's processor makes beside (`pixel_values` and so on), and fp32 [images, P] `questions`.
    """

    input_ids: Tensor
    given: Mapping[str, Tensor]
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @classmethod
    def of(cls, program: Program, made: Mapping[str, Any]) -> Prompts:
        """From what a processor made; InputError for what no prompt of this family has."""
        takes = FAMILIES[program.info.family].takes
        there = {name: value for name, value in made.items() if value is not None}
        unknown = sorted(set(there) - {*TEXT, "questions", *takes})
        if unknown:
            raise InputError(
                f"an optimized model does not take {', '.join(unknown)}; it takes input_ids, {', '.join(takes)}, "
                "attention_mask, position_ids, cache (past_key_values), use_cache, labels and questions"
            )
        if wrong := [name for name, value in there.items() if not isinstance(value, Tensor)]:
            raise InputError(
                f"{wrong[0]} is a {type(there[wrong[0]]).__name__}; give a tensor, as the processor returns with "
                "return_tensors='pt'"
            )
        if "input_ids" not in there:
            raise InputError("input_ids is missing: give what the model's processor returns")
        text = {name: there.pop(name) for name in TEXT if name in there}
        return cls(given=there, **text)


@dataclass(frozen=True)
class Prepared:
    """What a prefill or training graph takes, by name, and the prompts in streams.

    following: int64 [B, S], the label that each token should predict, where there are labels.
    """

    inputs: dict[str, Tensor | int]
    streams: Streams
    following: Tensor | None = None


def prepare(
    program: Program,
    run: Mapping[str, Runner],
    prompts: Prompts,
    labels: Tensor | None = None,
    until: int = 0,
) -> Prepared:
    """Run the tower over the images of a batch, and take its prompts apart; InputError where they do not fit.

    until: tokens of prompt and answer that will be run in all, if more than the prompt's. Where positions have an end,
    those are held to it before anything runs; where they close over what the tower lets go, behind the tower.
    """
    about, ids = program.info, prompts.input_ids
    family = FAMILIES[about.family]
    check_prompts(ids, prompts.attention_mask, prompts.position_ids, family.position_axes)
    image = about.visual(ids)
    _check_types(prompts, image)
    real = torch.ones_like(image) if prompts.attention_mask is None else prompts.attention_mask.bool()
    new_tokens = max(until - ids.shape[1], 0) + 1  # the last one is not run
    positions, closes = prompts.position_ids, program.shortens and not family.position_axes
    if about.position_limit is not None and not closes:
        positions = family.positions(about, prompts.given, ids, real) if positions is None else positions
        check_positions(about.position_limit, _taken(real, positions), new_tokens)
    out = _seen(program, run, prompts.given)
    layout = family.layout(about, prompts.given, ids[image], out)
    if positions is None:
        positions = family.positions(about, prompts.given, ids, real)
    mask, positions = shorten(ids, image, layout, prompts.attention_mask, positions)
    if about.position_limit is not None and closes:
        real = torch.ones_like(image) if mask is None else mask.bool()
        check_positions(about.position_limit, _taken(real, positions), new_tokens)
    following = None if labels is None else next_labels(ids, mask, labels)
    asked = None if following is None else following != NO_LABEL
    streams = arrange(ids, image, layout, mask, positions, asked)
    features, deepstack = (None, None) if out is None else (out["out"].flatten(0, -2), out.get("deepstack"))
    if layout.features is not None:
        features = layout.features
    return Prepared(_inputs(program, ids, streams, features, deepstack), streams, following)


def _taken(real: Tensor, positions: Tensor | None) -> list[int]:
    """How many positions each prompt takes. real: bool [B, S], no padding. positions: [..., B, S], or counted."""
    if positions is None:
        found: list[int] = real.sum(1).tolist()
    else:
        found = (torch.where(real, positions, -1).amax(-1).view(-1, len(real)).amax(0) + 1).tolist()
    return found


def _check_types(prompts: Prompts, image: Tensor) -> None:
    """Raise InputError where `token_type_ids` mark other tokens than those of images; the ids say it too."""
    types = prompts.given.get("token_type_ids")
    if types is not None and (types.shape != image.shape or not torch.equal(types == 1, image)):
        raise InputError(
            f"token_type_ids has shape {tuple(types.shape)} and marks {int((types == 1).sum())} tokens of images, and "
            f"input_ids, of shape {tuple(image.shape)}, holds {int(image.sum())}: they must be the same"
        )


def _seen(program: Program, run: Mapping[str, Runner], given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What the tower makes of all images of a batch: `out`, `source`, `count`; None if there is none."""
    asked = next((n for n in program.graphs["vision"].nodes if n.name == "questions"), None)
    if asked is None and "questions" in given:
        raise InputError("this model chooses nothing by a question; leave questions out")
    found = FAMILIES[program.info.family].vision_given(program.info, given)
    if found is None:
        return None
    kinds = {n.name: n.meta["val"].dtype for n in program.graphs["vision"].nodes if n.op == "placeholder"}
    inputs: dict[str, Tensor | int] = {name: value.to(kinds[name]) for name, value in found.items()}
    if asked is not None:
        questions, wanted = given.get("questions"), (len(found["pixel_values"]), asked.meta["val"].shape[1])
        if questions is None or tuple(questions.shape) != wanted:
            there = "none" if questions is None else f"{list(questions.shape)}"
            raise InputError(
                f"this model chooses visual tokens by the question: give questions={list(wanted)}, one row an "
                f"image, as foveate.questions makes them; there is {there}"
            )
        inputs["questions"] = questions.to(program.weights.device(), torch.float32)
    out = run["vision"](inputs)
    if "vision_rest" in run:
        left = out["source"][:, : int(out["count"].max())]
        out = run["vision_rest"]({"hidden": out["out"], "places": left, "count": out["count"]})
    return out


def _inputs(
    program: Program, ids: Tensor, streams: Streams, features: Tensor | None, deepstack: Tensor | None
) -> dict[str, Any]:
    text = embed(program, ids.gather(1, streams.text.index))
    visual, text = _placed(streams, features, text)
    inputs = {"visual": visual, "text": text, "prefix": streams.prefix}
    if levels := program.info.deepstack:
        nothing = text.new_zeros(*text.shape[:2], levels, text.shape[2])
        inputs["visual_deepstack"], inputs["text_deepstack"] = _placed(streams, deepstack, nothing)
    inputs |= {"visual_coords": streams.coords, "grids": streams.grids}
    for name, stream in {"visual": streams.visual, "text": streams.text}.items():
        inputs[f"{name}_position_ids"] = stream.position_ids
        inputs[f"{name}_order"] = stream.order
    if any(node.name == "text_reach" for node in program.prefill.nodes):
        reach = streams.order.gather(1, reaches(streams.image))
        for name, stream in {"visual": streams.visual, "text": streams.text}.items():
            inputs[f"{name}_reach"] = reach.gather(1, stream.index).masked_fill(stream.order == PAD, PAD)
    return inputs


def _placed(streams: Streams, made: Tensor | None, text: Tensor) -> tuple[Tensor, Tensor]:
    """What the tower made of tokens [n, ...], in the visual stream [B, Nv, ...] and in the text stream [B, Nt, ...].

    The last visual token of a prompt that ends in an image travels with the text, as does what is no patch.
    """
    if made is None or not made.numel():
        return text.new_zeros(text.shape[0], 0, *text.shape[2:]), text
    moved = streams.image.gather(1, streams.text.index) & (streams.text.order >= 0)
    moved = moved.view(*moved.shape, *[1] * (text.dim() - 2))
    found = made[streams.feature.gather(1, streams.text.index)]
    return made[streams.feature.gather(1, streams.visual.index)], torch.where(moved, found, text)


def embed(program: Program, ids: Tensor) -> Tensor:
    """Embeddings [B, n, D] of tokens [B, n]; of an image token, any that visual embeddings will replace."""
    table = program.weights.get(program.info.paths["embed"])
    # The image token may lie outside the table.
    safe = torch.where(program.info.visual(ids), 0, ids)
    if safe.device.type == "cpu" and safe.numel() and not 0 <= int(safe.min()) <= int(safe.max()) < len(table):
        raise InputError(f"input_ids holds {int(safe.max())}; the vocabulary has {len(table)} tokens, numbered from 0")
    found, scale = embedding(safe, table), program.info.embed_scale
    return found if scale == 1 else found * torch.tensor(scale, dtype=table.dtype, device=table.device)
