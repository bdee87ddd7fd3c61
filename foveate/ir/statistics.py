"""What a model does with images, counted over samples: made by `foveate.calibrate`, read by passes and pictures.

The file is safetensors: tensors, and JSON in the metadata. Nothing in it is executed or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveate.errors import ArtifactError, InputError, PassError
from foveate.files import write_whole
from foveate.ir.observe import OBSERVERS, TOKENS, distances_of
from foveate.ir.program import ModelInfo

FORMAT = 1
KEY = "foveate.statistics"
RHO = ("mass", "output")
SHAPE = ("family", "layers", "heads", "kv_heads", "head_dim", "intermediate_size")
"""What a program must share with the model whose statistics it uses."""


@dataclass(frozen=True)
class Statistics:
    """L layers, H query heads, m FFN neurons, D rounded distances; sums are over samples.

    mass, output: fp32 [samples, L, H], how active a head is for the image. mass: attention that all queries pay to
    visual keys, over what they pay to text keys (YOPO's code). output: mean norm of the head's output at visual
    tokens, over that at text tokens (YOPO's paper, which does not say how the vectors become numbers).
    text_to_visual: float64 [L, H], sum of the share of attention that a text token after the image pays to it.
    by_distance: float64 [L, H, D], sum of attention between visual tokens of an image by distance; pairs: float64 [D],
    how many pairs were that far apart. neurons: float64 [L, m], sum of mean |activation| over visual tokens, 0 in
    layers of experts. cut_kl: float64 [L], sum of KL(without || with) of the first output token if text sees text only
    from that layer on. visual: int64 [samples], visual tokens of each; cross, own: fp32 [visual tokens of all samples,
    L], what each receives from the text behind the image and from visual tokens (see `foveate.ops.received_attention`);
    None where that was not asked for. model: what of the model's shape matters. source: where the samples came from.
    """

    model: dict[str, Any]
    mass: Tensor
    output: Tensor
    text_to_visual: Tensor
    by_distance: Tensor
    pairs: Tensor
    neurons: Tensor
    cut_kl: Tensor
    source: dict[str, Any] = field(default_factory=dict)
    visual: Tensor | None = None
    cross: Tensor | None = None
    own: Tensor | None = None

    @classmethod
    def empty(cls, info: ModelInfo, source: dict[str, Any] | None = None, tokens: bool = False) -> Statistics:
        """Of no sample yet; tokens: whether visual tokens are told apart."""
        layers, heads = info.layers, info.heads
        far = distances_of(info)
        shape = {**{name: getattr(info, name) for name in SHAPE}, "grid": list(info.grid), "distances": far}
        sizes = _sizes(shape, 0, 0 if tokens else None)
        sums = {name: torch.zeros(size, dtype=_DTYPES[name]) for name, size in sizes.items()}
        assert sums["mass"].shape == (0, layers, heads)
        return cls(model=shape, **sums, source=source or {})

    @property
    def samples(self) -> int:
        """How many samples were counted."""
        return len(self.mass)

    def extended(self, layers: Sequence[Sequence[Tensor | None]], later: Tensor, visual: Tensor) -> Statistics:
        """With one more batch: the `statistics` output of an observed prefill graph.

        later: int64 [B], text tokens behind the first visual one; visual: int64 [B], visual tokens, which stand first.
        Raises InputError for values that are not finite.
        """
        names = OBSERVERS if self.visual is None else OBSERVERS + TOKENS
        idle = torch.zeros(len(later), self.neurons.shape[1])
        found = [[idle if x is None else x.cpu() for x in layer] for layer in layers]
        values = {name: torch.stack([layer[i].double() for layer in found], 1) for i, name in enumerate(names)}
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                row, layer = (~value.isfinite()).nonzero()[0, :2].tolist()
                raise InputError(
                    f"sample {self.samples + row + 1}: {name} of layer {layer} is not finite; the model overflows "
                    "in its dtype"
                )
        to_prefix, to_visual, to_text = values["mass"].sum(3).unbind(-1)
        at_visual, at_text = values["norms"].unbind(-1)
        smallest = torch.finfo(torch.float32).tiny
        share = values["mass"][..., 1, 1] / later.cpu().clamp(min=1)[:, None, None]
        return replace(
            self,
            mass=torch.cat([self.mass, (to_visual / (to_prefix + to_text)).float()]),
            output=torch.cat([self.output, (at_visual / at_text.clamp(min=smallest)).float()]),
            text_to_visual=_added(self.text_to_visual, share),
            by_distance=_added(self.by_distance, values["by_distance"]),
            pairs=_added(self.pairs, values["pairs"][:, 0]),
            neurons=_added(self.neurons, values["neurons"]),
            cut_kl=_added(self.cut_kl, values["cut_kl"]),
            **self._more_tokens(values, visual.cpu()),
        )

    def _more_tokens(self, values: dict[str, Tensor], visual: Tensor) -> dict[str, Any]:
        """What each visual token of a batch receives, [B, L, n], behind that of those before."""
        if self.visual is None:
            return {}
        more = {"visual": torch.cat([self.visual, visual])}
        for name in TOKENS:
            rows = [row[:, :count].T.float() for row, count in zip(values[name], visual.tolist(), strict=True)]
            more[name] = torch.cat([getattr(self, name), *rows])
        return more

    def activity(self, rho: str = "mass") -> Tensor:
        """Mean over samples of a head's activity: float64 [L, H]."""
        values: Tensor = getattr(self, rho)
        return values.double().mean(0)

    def active(self, alpha: float, vote: float = 0.4, rho: str = "mass") -> Tensor:
        """Whether a head's activity is above alpha in more than `vote` of the samples: bool [L, H]."""
        values: Tensor = getattr(self, rho)
        return (values > alpha).sum(0) > vote * self.samples

    def attention_at(self) -> Tensor:
        """Mean attention weight between two visual tokens by their distance: float64 [L, H, D]; 0 where no pair is."""
        return self.by_distance / self.pairs.clamp(min=1)

    def check(self, info: ModelInfo, who: str) -> None:
        """Raise PassError unless the statistics are of a model of this shape; who: what wants to use them."""
        for name in SHAPE:
            if self.model[name] != getattr(info, name):
                raise PassError(
                    f"{who}: the statistics are of a model with {name}={self.model[name]}, "
                    f"this one has {name}={getattr(info, name)}; calibrate this model"
                )
        if not self.samples:
            raise PassError(f"{who}: the statistics are of no sample")

    def save(self, path: Path) -> None:
        """Write the file so that it is there whole or not at all; ArtifactError where that fails."""
        found = {name: getattr(self, name) for name in _DTYPES}
        tensors = {name: value.contiguous() for name, value in found.items() if value is not None}
        about = {"format": FORMAT, "samples": self.samples, "model": self.model, "source": self.source}
        write_whole(path, safetensors.torch.save(tensors, {KEY: json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote; ArtifactError for one that is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get(KEY, "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
        except (OSError, SafetensorError, ValueError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
            raise ArtifactError(f"statistics {path} cannot be read: {why}") from None
        if not isinstance(about, dict):
            raise ArtifactError(f"{path} holds no statistics; make them with `foveate calibrate`")
        if about.get("format") != FORMAT:
            raise ArtifactError(f"statistics {path} have format {about.get('format')}; this foveate reads {FORMAT}")
        try:
            total = int(tensors["visual"].sum()) if "visual" in tensors else None
            sizes = _sizes(about["model"], about["samples"], total)
            source = dict(about["source"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"statistics {path} are damaged: bad metadata, {error!r}") from None
        for name, size in sizes.items():
            found = tensors.get(name)
            if found is None or tuple(found.shape) != size or found.dtype != _DTYPES[name]:
                what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise ArtifactError(f"statistics {path} are damaged: {name} is {what}, not {list(size)}")
            if not bool(found.isfinite().all()) or (name == "visual" and bool((found < 1).any())):
                what = "not finite" if name != "visual" else "below 1"
                raise ArtifactError(f"statistics {path} are damaged: {name} holds values that are {what}")
        return cls(model=about["model"], source=source, **{name: tensors[name] for name in sizes})


_DTYPES = {
    "mass": torch.float32,
    "output": torch.float32,
    "text_to_visual": torch.float64,
    "by_distance": torch.float64,
    "pairs": torch.float64,
    "neurons": torch.float64,
    "cut_kl": torch.float64,
    "visual": torch.int64,
    "cross": torch.float32,
    "own": torch.float32,
}


def _sizes(model: dict[str, Any], samples: int, total: int | None) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a file; total: visual tokens of all samples, where they are told apart."""
    missing = [name for name in (*SHAPE, "grid", "distances") if name not in model]
    if missing:
        raise KeyError(missing[0])
    layers, heads, far = int(model["layers"]), int(model["heads"]), int(model["distances"])
    sizes: dict[str, tuple[int, ...]] = {
        "mass": (int(samples), layers, heads),
        "output": (int(samples), layers, heads),
        "text_to_visual": (layers, heads),
        "by_distance": (layers, heads, far),
        "pairs": (far,),
        "neurons": (layers, int(model["intermediate_size"])),
        "cut_kl": (layers,),
    }
    if total is not None:
        sizes |= {"visual": (int(samples),), "cross": (total, layers), "own": (total, layers)}
    return sizes


def _added(total: Tensor, rows: Tensor) -> Tensor:
    """Rows added one after another, so that a sum does not depend on where a run was interrupted."""
    for row in rows:
        total = total + row
    return total
