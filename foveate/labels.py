"""From labels to what the training graph takes: which text tokens are asked for their next token, and what it is.

Labels are those of transformers: int64 [B, S], aligned with `input_ids`, -100 where nothing is to be learnt; the token
before a label predicts it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.errors import InputError
from foveate.ops import PAD
from foveate.streams import Streams

NO_LABEL = -100
"""The label that losses ignore."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a batch; see `foveate.ir.train.derive_train` for columns and asking.

    labels: int64 [B, k], what the tokens in `columns` should predict; -100 where a row asks less than others.
    """

    columns: Tensor
    asking: Tensor
    labels: Tensor


def next_labels(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
    """Each token's label, int64 [B, S]: that of the next token that is no padding; -100 for padding and for the last.

    Raises InputError where labels do not fit, or there are none.
    """
    if labels.shape != input_ids.shape:
        raise InputError(f"labels have shape {tuple(labels.shape)}; input_ids has {tuple(input_ids.shape)}")
    following = pad(labels[:, 1:], (0, 1), value=NO_LABEL)
    if attention_mask is not None:
        # Nothing is predicted from padding, and padding predicts nothing; it may stand between tokens, where an image
        # has become shorter.
        real, length = attention_mask.bool(), labels.shape[1]
        places = torch.arange(length, device=labels.device).masked_fill(~real, length)
        behind = pad(places[:, 1:], (0, 1), value=length).flip(1).cummin(1).values.flip(1)
        following = pad(labels, (0, 1), value=NO_LABEL).gather(1, behind).masked_fill(~real, NO_LABEL)
    if bool((following == NO_LABEL).all()):
        raise InputError(f"every label is {NO_LABEL}: there is nothing to learn from this batch")
    return following


def asked_of(streams: Streams, following: Tensor) -> Asked:
    """The columns of the text stream that have a label to predict.

    `asking` is the first of them in each row, the last token of the prompt before the first answer; in a row without
    labels the last text token, as when it is continued.
    """
    text = streams.text
    labels = following.gather(1, text.index).masked_fill(text.order == PAD, NO_LABEL)
    asked = labels != NO_LABEL
    columns = (~asked).int().argsort(dim=1, stable=True)[:, : int(asked.sum(1).max())]
    last = torch.full_like(columns[:, :1], asked.shape[1] - 1)
    asking = torch.where(asked.any(1, keepdim=True), columns[:, :1], last)
    return Asked(columns, asking, labels.gather(1, columns))
