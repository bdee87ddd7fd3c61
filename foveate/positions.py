"""How many positions a model has, where there is an end to them, and what is said beyond it. Needs no torch.

Dynamic rotary scaling changes all frequencies once a position lies beyond `max_position_embeddings`; up to there they
are fixed, as graphs have them. So what would go beyond is refused before it runs, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Sequence

from foveate.errors import InputError

WHY = "(max_position_embeddings): beyond, its dynamic rotary scaling changes frequencies that are fixed in graphs"
KEPT = "visual tokens that passes drop in the decoder keep their positions, so dropping more there does not help"


def check_positions(limit: int | None, taken: Sequence[int], new_tokens: int = 1) -> None:
    """Raise InputError where a prompt, or the longest answer to it, would go beyond `limit` positions (None: no end).

    taken: positions of each prompt of a batch. new_tokens: of the answer; the last one is never run, so it takes none.
    """
    if limit is None or max(taken) + new_tokens - 1 <= limit:
        return
    most = max(taken)
    row = f"the prompt in row {taken.index(most)} of input_ids takes {most} positions"
    if most > limit:
        raise InputError(f"{row}; this model has {limit} {WHY}. Give a prompt of at most {limit}; {KEPT}")
    raise InputError(
        f"{row}, and {new_tokens} new tokens would make it {most + new_tokens - 1}; this model has {limit} {WHY}. Give "
        f"a shorter prompt, or max_new_tokens of at most {limit - most + 1}; {KEPT}"
    )


def check_step(limit: int | None, taken: int, tokens: int) -> None:
    """Raise InputError where so many tokens, behind a cache that has taken positions, would go beyond `limit`."""
    if limit is None or taken + tokens <= limit:
        return
    raise InputError(
        f"the cache has taken {taken} positions, and {tokens} more token{'s' * (tokens != 1)} would make it "
        f"{taken + tokens}; this model has {limit} {WHY}. Decode at most {max(limit - taken, 0)} more, or begin with a "
        f"shorter prompt; {KEPT}"
    )
