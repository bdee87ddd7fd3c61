"""What stands at the image tokens of a batch of prompts: the one thing that running a model's family has to say.

The image tokens of all rows, row by row, are numbered 0 to P - 1, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NOWHERE = -(2**11)
"""Row and column of a visual token that has no place in its image, such as CLS: far from all that have one."""


@dataclass(frozen=True)
class Layout:
    """Where a batch's image tokens come from, and where they lie in their images.

    feature: int64 [P], which of the tower's tokens, counted through all images. coords: int64 [P, 3], number of the
    image, tile or frame in the batch, row and column. patch: bool [P], False for what a family writes between patches,
    such as the end of a line of them: it travels with the text. Where the tower leaves fewer tokens than the prompt has
    places, origin: int64 [P], the number of the image token that each stands for, -1 for none; gone: bool [P], which
    places nothing is left for. None: each stands for itself, and all are there.

    sizes: int64 [units, 2], rows and columns of each image, tile or frame, where they do not all have tokens in their
    last row and column. features: [n, D], what `feature` counts, where the tower's own tokens are not enough.
    """

    feature: Tensor
    coords: Tensor
    patch: Tensor
    origin: Tensor | None = None
    gone: Tensor | None = None
    sizes: Tensor | None = None
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.feature)
