"""What the pruning papers simulate: a Hugging Face model run with explicit masks.

Nothing is removed here. Keys are hidden by S x S masks, heads and neurons are multiplied by zero, and
every token stays in the sequence. It is slow and simple on purpose: the compiler's rewrites, which do
remove the work, are tested against it. It uses plain transformers and nothing of the compiler.

Sources of the semantics:

- late layers without visual tokens: YOPO, arXiv 2410.06169 (layer drop), with the softmax renormalised
  over the text keys as in VTW, arXiv 2405.05803;
- heads dropped for visual tokens: YOPO (non-active heads), renormalised in the same way, or not, as in its code;
- neurons dropped for visual tokens: YOPO (sparse FFN projection);
- visual tokens that see their neighbours in the image only: YOPO (neighbor-aware visual attention), in which
  the visual block of the mask is overwritten, so that a token may see later ones;
- visual tokens pruned by the last token's attention: FastV, arXiv 2403.06764, and PyramidDrop, arXiv 2410.17247.

Shapes: B rows, S positions, L decoder layers, H query heads, V vocabulary. A token is visual where
`input_ids` is the model's image token, and what stands there is no newline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.oracle.masks import Masks, check, last_place
from tests.oracle.prompts import Tokens, appended, kinds, left_padded, positions
from tests.oracle.run import Run, decoder, installed, layers


@dataclass(frozen=True)
class MaskedOutput:
    """`logits` [B, V] float32, for the token after each row's last attended one; `kept`, for each prune
    of the masks in their order, bool [B, S]: the visual tokens that are left (False on text); `mixes`: its weights."""

    logits: Tensor
    kept: tuple[Tensor, ...]
    mixes: tuple[Tensor | None, ...]


_NOTHING_HIDDEN = Masks()


@torch.no_grad()
def masked_forward(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], masks: Masks = _NOTHING_HIDDEN
) -> MaskedOutput:
    """Run `model` on a batch, padded on either side or not at all, with `masks`.

    `inputs` are what the processor gives. Without `position_ids` a token's position is the number of
    attended tokens before it, as in `generate`. The model is left as it was, also after an error.
    """
    logits, run = _run(model, inputs, masks)
    rows = torch.arange(len(logits), device=logits.device)
    return MaskedOutput(logits[rows, last_place(run.tokens.attended)].float(), tuple(run.kept), tuple(run.mixes))


def masked_loss(model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor, masks: Masks) -> Tensor:
    """The mean cross-entropy of labels [B, S] (-100: none) under `masks`, each predicted by the token before it.

    Gradients flow. Prunes must be given: what "the last text token" is depends on where the prompt ends.
    """
    if any(prune.choose != "given" for prune in masks.prunes):
        raise ValueError('prunes must be "given"')
    logits, _ = _run(model, inputs, masks)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _run(model: PreTrainedModel, inputs: Mapping[str, Tensor], masks: Masks) -> tuple[Tensor, Run]:
    tokens = Tokens.of(model, inputs)
    check(decoder(model).config, masks, tokens.attended, tokens.visual)
    run = Run(masks, tokens)
    arguments = {"attention_mask": tokens.attended.long(), **inputs}
    if "position_ids" not in inputs:
        arguments["position_ids"] = positions(model, inputs, tokens.attended)
    with installed(model, run):
        logits = model(**arguments, use_cache=False).logits
    if run.layers_seen != len(layers(model)):
        raise RuntimeError(f"the model used the oracle's attention {run.layers_seen} times, not once a layer")
    return logits, run


def masked_greedy(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    masks: Masks,
    new_tokens: int,
    hold_choices: bool = True,
) -> Tensor:
    """The next `new_tokens` most likely tokens, int64 [B, new_tokens], without any cache: the whole
    prompt runs again for each token.

    New tokens stand behind the farthest position, as in transformers' own `generate`: with M-RoPE a video's last
    frame may be farther along than the text behind it. With `hold_choices` the visual tokens that were pruned for the
    prompt stay the pruned ones, as they do when decoding from a cache; otherwise each longer prompt chooses anew. No
    end token is heeded.
    """
    if "position_ids" in inputs:
        raise NotImplementedError("position_ids are not extended; leave them out")
    inputs, masks = left_padded(inputs, masks)
    if hold_choices and masks.prunes:
        first = masked_forward(model, inputs, masks)
        held = zip(masks.prunes, first.kept, first.mixes, strict=True)
        prunes = tuple(replace(p, choose="given", given=k, by=None, mix=m) for p, k, m in held)
        masks = replace(masks, prunes=prunes)
    produced: list[Tensor] = []
    grids = hasattr(model.model, "get_rope_index")
    inputs = {**inputs, "position_ids": positions(model, inputs, inputs["attention_mask"])} if grids else inputs
    for _ in range(new_tokens):
        token = masked_forward(model, inputs, masks).logits.argmax(-1)
        if bool(kinds(model, token).any()):
            raise ValueError("the model produced an image token, which would be taken for an image")
        produced.append(token)
        inputs, masks = appended(inputs, masks, token)
    return torch.stack(produced, dim=1) if produced else inputs["input_ids"][:, :0]
