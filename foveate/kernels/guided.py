"""Choosing visual tokens by the text and by likeness, inside the decoder: scores, and clusters of what goes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.kernels.attention import softmaxed_rows
from foveate.kernels.tokens import top_tokens
from foveate.ops import PAD, cluster_count, rank_width


def raters(visual: Tensor, text: Tensor, visual_order: Tensor, text_order: Tensor) -> Tensor:
    """`foveate::raters`: one matmul for all rows; what is padding or stands before the image weighs nothing."""
    asked = behind_images(visual_order, text_order)
    real = visual_order != PAD
    alike = (visual @ text.transpose(1, 2)).float().masked_fill(~asked[:, None], -math.inf).softmax(2)
    mean = (alike.nan_to_num() * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    count = asked.sum(1, keepdim=True).clamp(min=1)
    return ((mean > mean.sum(1, keepdim=True) / count) & asked).float()


def rater_scores(
    q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], chosen: Tensor, scale: float
) -> Tensor:
    """`foveate::rater_scores`: rows of all text tokens, of which only the raters' count."""
    rows = softmaxed_rows(q, k, q_order, k_order, scale)[..., : k[0].shape[2]].mean(1)
    weights = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
    return (weights[:, None] @ rows.masked_fill(chosen[..., None] == 0, 0)).squeeze(1)


def recycle_tokens(
    scores: Tensor, order: Tensor, x: Tensor, whole: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`foveate::recycle_tokens`: rows one by one, since each has its own number of clusters."""
    slots = math.floor(keep * whole.shape[1])
    best, best_order = top_tokens(scores, order, keep, whole)
    stay = [row[real != PAD] for row, real in zip(best, best_order, strict=True)]
    return _recycled(scores, order, x, stay, slots + cluster_count(scores.shape[1] - slots), True)


def rater_rank(
    q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], chosen: Tensor, scale: float
) -> Tensor:
    """`foveate::rater_rank`: rows of other tokens, and padded keys, are zero and do not count."""
    rows = softmaxed_rows(q, k, q_order, k_order, scale)[..., : k[0].shape[2]].mean(1)
    rows = rows.masked_fill(chosen[..., None] == 0, 0).double()
    sides = torch.stack([chosen.sum(1).long(), (k_order[0] != PAD).sum(1)])
    rank: Tensor = torch.linalg.matrix_rank(rows, rtol=sides.amax(0).double() * torch.finfo(torch.float32).eps)
    return rank


def rank_tokens(
    scores: Tensor, order: Tensor, x: Tensor, rank: Tensor, text_order: Tensor, scale: float, recycle: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`foveate::rank_tokens`."""
    stay = []
    for row, real in enumerate(order != PAD):
        places = real.nonzero()[:, 0]
        count = len(places) - math.floor(scale * (len(places) - int(rank[row])))
        best = scores[row, places].argsort(descending=True, stable=True)[:count]
        stay.append(places[best].sort().values)
    width = rank_width(order.shape[1], text_order.shape[1], scale, recycle)
    return _recycled(scores, order, x, stay, width, recycle)


def _recycled(
    scores: Tensor, order: Tensor, x: Tensor, stays: list[Tensor], width: int, recycle: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the tokens at rising places that stay, and clusters of others."""
    count = scores.shape[1]
    index = torch.zeros(len(scores), width, dtype=torch.int64, device=x.device)
    kept_order = torch.full_like(index, PAD)
    weights = torch.zeros(len(scores), width, count, dtype=torch.float32, device=x.device)
    for row, stay in enumerate(stays):
        gone = torch.ones_like(order[row], dtype=torch.bool).index_fill(0, stay, False) & (order[row] != PAD)
        groups = _clusters(scores[row], x[row], gone & recycle)
        chosen = torch.cat([stay, groups.centres]).sort().values
        index[row, : len(chosen)] = chosen
        kept_order[row, : len(chosen)] = order[row, chosen]
        weights[row, torch.searchsorted(chosen, stay), stay] = 1
        slot = torch.searchsorted(chosen, groups.centres)[groups.cluster]
        weights[row, slot, groups.members] = 1 / groups.sizes[groups.cluster].float()
    return index, kept_order, weights


def merge_tokens(x: Tensor, weights: Tensor) -> Tensor:
    """`foveate::merge_tokens`."""
    return weights.to(x.dtype) @ x


def dart_scores(
    keys: Tensor,
    x: Tensor,
    order: Tensor,
    text_keys: Tensor,
    text: Tensor,
    text_order: Tensor,
    keep: float,
    pivots: int,
) -> Tensor:
    """`foveate::dart_scores`: rows one by one; each pick takes its tokens off the list."""
    scores = torch.zeros(order.shape, dtype=torch.float32, device=x.device)
    asked = behind_images(order, text_order)
    for row in range(len(order)):
        real, words = ((o != PAD).nonzero()[:, 0] for o in (order[row], torch.where(asked[row], text_order[row], PAD)))
        total = math.floor(keep * len(real))
        own = _largest(keys[row], real, min(pivots, total))
        unit, unit_text = (normalize(each[row].float(), dim=-1) for each in (x, text))
        asking = torch.cat([unit[own], unit_text[_largest(text_keys[row], words, pivots)]])
        left = torch.zeros_like(order[row], dtype=torch.bool).index_fill(0, real, True).index_fill(0, own, False)
        picks, wanted = [own], total - len(own)
        for number, pivot in enumerate(asking):
            share = wanted // len(asking) + (number < wanted % len(asking))
            alike = (unit @ pivot).masked_fill(~left, math.inf)
            new = alike.argsort(stable=True)[:share]
            left[new] = False
            picks.append(new)
        chosen = torch.cat(picks)
        scores[row, chosen] = 1 - torch.arange(len(chosen), device=x.device) / max(1, order.shape[1])
    return scores


def behind_images(visual_order: Tensor, text_order: Tensor) -> Tensor:
    """The text tokens behind a row's last visual token: bool [B, m]; none in a row without an image."""
    last = visual_order.masked_fill(visual_order == PAD, -1).amax(1, keepdim=True) if visual_order.shape[1] else None
    if last is None:
        return torch.zeros_like(text_order, dtype=torch.bool)
    return (text_order > last) & (text_order != PAD) & (last >= 0)


def _largest(keys: Tensor, places: Tensor, count: int) -> Tensor:
    """Of tokens at some places those with the largest keys [Hk, n, e] by the sum of absolute values."""
    size = keys[:, places].float().abs().sum((0, 2))
    return places[size.argsort(descending=True, stable=True)[:count]]


class _Clusters:
    """centres [C], members [n], the number of each member's cluster [n] and their sizes [C]."""

    def __init__(self, centres: Tensor, members: Tensor, cluster: Tensor) -> None:
        self.centres, self.members, self.cluster = centres, members, cluster
        self.sizes = torch.bincount(cluster, minlength=len(centres))


def _clusters(scores: Tensor, x: Tensor, gone: Tensor) -> _Clusters:
    """The best of the tokens that go, grouped around density peaks."""
    places = gone.nonzero()[:, 0]
    if not len(places):
        return _Clusters(places, places, places)
    clusters = cluster_count(len(places))
    taken = scores[places].argsort(descending=True, stable=True)[: len(places) * 3 // 10 + 1]
    members = places[taken].sort().values
    points = x[members].float()
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])
    near = distance.sort(dim=1).values[:, :clusters]
    density = (-near.square().mean(1)).exp()
    number = torch.arange(len(members), device=x.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (number < number[:, None]))
    peak = distance.masked_fill(~denser, distance.max()).amin(1)
    centres = (peak * density).argsort(descending=True, stable=True)[:clusters].sort().values
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = torch.arange(len(centres), device=x.device)
    return _Clusters(members[centres], members, cluster)
