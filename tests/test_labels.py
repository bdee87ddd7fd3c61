"""Labels, taken apart into what the training graph is asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.labels import NO_LABEL, asked_of, next_labels
from foveate.ops import PAD
from tests.test_streams import IMAGE, INFO, TOKENS, arrange, padded, prompts


@settings(deadline=None, max_examples=150)
@given(rows=prompts, side=st.sampled_from(["left", "right"]), seed=st.integers(0, 999), share=st.floats(0.05, 1))
def test_every_label_is_asked_once_of_the_token_before_it(
    rows: list[list[int]], side: str, seed: int, share: float
) -> None:
    ids, mask = padded(rows, side)
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=generator) < share) & mask.bool()
    labels = torch.randint(1, 50, ids.shape, generator=generator).masked_fill(~chosen, NO_LABEL)
    behind = torch.zeros_like(chosen)
    behind[:, 1:] = mask[:, :-1].bool()
    wanted = {(b, s - 1): int(labels[b, s]) for b, s in (chosen & behind).nonzero().tolist()}
    if not wanted:
        with pytest.raises(InputError, match="every label is -100"):
            next_labels(ids, mask, labels)
        return
    following = next_labels(ids, mask, labels)
    images = int((ids == IMAGE).sum()) // TOKENS
    streams = arrange(INFO, ids, mask, None, images, following != NO_LABEL)
    asked = asked_of(streams, following)
    found = {}
    for row, (columns, said) in enumerate(zip(asked.columns.tolist(), asked.labels.tolist(), strict=True)):
        for column, label in zip(columns, said, strict=True):
            if label != NO_LABEL:
                assert streams.text.order[row, column] != PAD
                assert (row, int(streams.text.index[row, column])) not in found
                found[row, int(streams.text.index[row, column])] = label
    assert found == wanted
    for row in range(len(ids)):
        places = [place for b, place in wanted if b == row] or [int(mask[row].nonzero().max())]
        assert streams.text.index[row, asked.asking[row, 0]] == min(places)


def test_labels_that_do_not_fit_are_refused() -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(InputError, match=r"labels have shape \(1, 2\); input_ids has \(1, 3\)"):
        next_labels(ids, None, ids[:, 1:])
    with pytest.raises(InputError, match="nothing to learn"):
        next_labels(ids, None, torch.tensor([[5, NO_LABEL, NO_LABEL]]))
