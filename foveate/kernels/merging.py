"""Which visual tokens become one, as weights: merged tokens are weights [I, k, n] times tokens [I, n, C]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def visionzip(row: Tensor, metric: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """`foveate::visionzip`: both groups in the order of the image, the dominant one first."""
    images, count = row.shape
    chosen = torch.zeros_like(row, dtype=torch.bool)
    chosen.scatter_(1, row.argsort(dim=1, descending=True, stable=True)[:, :dominant], True)
    rest, best = chosen.int().argsort(dim=1, stable=True).split([count - dominant, dominant], 1)
    step = max(1, rest.shape[1] // max(1, contextual))
    is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=row.device)
    is_target[: step * contextual : step] = True
    targets, joining = rest[:, is_target], rest[:, ~is_target]
    unit = normalize(metric.float(), dim=-1)
    weights = torch.zeros(images, contextual, count, device=row.device)
    if contextual and joining.shape[1]:
        alike = _take(unit, joining) @ _take(unit, targets).transpose(1, 2)
        joined = torch.nn.functional.one_hot(alike.argmax(2), contextual).transpose(1, 2).float()
        mean = joined / joined.sum(2, keepdim=True).clamp(min=1)
        weights.scatter_(2, joining[:, None].expand_as(mean), mean)
    weights.scatter_(2, targets[..., None], 1.0)
    dominant_weights = torch.nn.functional.one_hot(best, count).float()
    return torch.cat([dominant_weights, weights], 1), torch.cat([best, targets], 1)


def prumerge(
    row: Tensor, metric: Tensor, keep: float | None, plus: bool, neighbors: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`foveate::prumerge`: what stays is put in front by sorting, since images keep different numbers of tokens."""
    count = row.shape[1]
    rank = row.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    top = _outliers(row) if keep is None else torch.full_like(rank[:, 0], _by_score(int(keep * count) - 1, plus))
    stays = rank < top[:, None]
    place = torch.arange(count, device=row.device)
    # Kept tokens by their score, those of the uniform sample behind them by their place, then all others.
    key = torch.where(stays, rank, count + place)
    if plus:
        spread = _every(count, top) if keep is None else _evenly(stays, int(keep * count) - 1)
        stays = stays | spread
    key = torch.where(stays, key, 2 * count + rank)
    source = key.argsort(dim=1)
    kept = stays.sum(1)
    width = count if keep is None else int(keep * count) - 1
    unit = normalize(metric.float(), dim=-1)
    alike = unit @ unit.transpose(1, 2)
    alike.diagonal(0, 1, 2).fill_(-torch.inf)
    near = alike.argsort(dim=2, descending=True, stable=True)[..., : min(neighbors, count - 1)]
    weights = torch.zeros_like(alike).scatter_(2, near, row[:, None].expand(-1, count, -1).gather(2, near))
    weights.diagonal(0, 1, 2).fill_(1.0)
    front = source[:, :width]
    weights = weights.gather(1, front[..., None].expand(-1, -1, count))
    # The last token is the sum of those that go; in an image that keeps fewer than others it stands right behind them.
    gone = torch.where(stays, 0.0, row)[:, None]
    weights = torch.cat([weights, gone], 1)
    weights.scatter_(1, kept[:, None, None].expand(-1, 1, count), gone)
    best_gone = (key - 2 * count).where(~stays, 2 * count).argmin(1, keepdim=True)
    source = torch.cat([front, best_gone], 1).scatter(1, kept[:, None], best_gone)
    # Where nothing goes there is no room for their sum, nor need of it.
    room = min(width + 1, count)
    return weights[:, :room].contiguous(), source[:, :room].contiguous(), (kept + 1).clamp(max=count)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _by_score(total: int, plus: bool) -> int:
    """Of so many tokens, how many are chosen by score; the others are a uniform sample."""
    return (total + 1) // 2 if plus else total


def _outliers(row: Tensor) -> Tensor:
    """How many scores of each row lie above the third quartile by more than 1.5 times the distance to the first."""
    low, high = (row.quantile(share, dim=1, keepdim=True) for share in (0.25, 0.75))
    return (row > high + 1.5 * (high - low)).sum(1)


def _every(count: int, top: Tensor) -> Tensor:
    """Every s-th place but the last, three times as dense as the kept tokens would lie; none where none is kept."""
    step = (count // top.clamp(min=1) // 3).clamp(min=1)[:, None]
    place = torch.arange(count, device=top.device)
    return (place % step == 0) & (place < count - 1) & (top > 0)[:, None]


def _evenly(stays: Tensor, total: int) -> Tensor:
    """Places that lie evenly in what does not stay yet, so that `total` stay."""
    count, chosen = stays.shape[1], int(stays[0].sum()) if len(stays) else 0
    rest = stays.int().argsort(dim=1, stable=True)[:, : count - chosen]
    wanted = total - chosen
    index = ((torch.arange(wanted, device=stays.device) * 2 + 1) * rest.shape[1]) // max(1, 2 * wanted)
    return torch.zeros_like(stays).scatter(1, rest[:, index], True)
