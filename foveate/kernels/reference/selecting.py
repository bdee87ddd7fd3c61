"""Which visual tokens stay, by Python's own loops and sorts."""

import math

import torch
from torch import Tensor

from foveate.ops import PAD


def top_tokens(scores: Tensor, order: Tensor, keep: float, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`foveate::top_tokens` row by row, by Python's own sort."""
    whole = order if whole is None else whole
    slots = math.floor(keep * whole.shape[1])
    index = torch.zeros(scores.shape[0], slots, dtype=torch.int64)
    kept_order = torch.full_like(index, PAD)
    for row in range(scores.shape[0]):
        alive = [j for j in range(scores.shape[1]) if order[row, j] != PAD]
        ranked = sorted(alive, key=lambda j: (-scores[row, j].item(), j))
        kept = sorted(ranked[: math.floor(keep * int((whole[row] != PAD).sum()))])
        index[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        kept_order[row, : len(kept)] = order[row, kept]
    return index, kept_order


def grid_scores(coords: Tensor) -> Tensor:
    """`foveate::grid_scores` token by token, from the digits of its row and column."""
    scores = torch.empty(coords.shape[:2], dtype=torch.float32)
    for row, tokens in enumerate(coords.tolist()):
        for token, (_, y, x) in enumerate(tokens):
            digits = [(y >> bit & 1, x >> bit & 1) for bit in range(12)]
            order = "".join(str([(0, 0), (1, 1), (0, 1), (1, 0)].index(digit)) for digit in digits)
            scores[row, token] = -int(order, 4)
    return scores


def diverse_scores(x: Tensor, keep: float) -> Tensor:
    """`foveate::diverse_scores` from all distances, one pick after another."""
    scores = torch.zeros(x.shape[:2])
    for row, tokens in enumerate(x):
        unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
        far = torch.minimum(1 - unit @ unit.T, (1 - unit @ unit.T).T)
        picked: list[int] = []
        for number in range(math.ceil(keep * len(tokens))):
            others = picked or list(range(len(tokens)))
            near = [min([far[j, i].item() for i in others if i != j] or [math.inf]) for j in range(len(tokens))]
            best = max((j for j in range(len(tokens)) if j not in picked), key=lambda j: (near[j], -j))
            picked.append(best)
            scores[row, best] = 1 - number / len(tokens)
    return scores


def relevance(x: Tensor, question: Tensor) -> Tensor:
    """`foveate::relevance` token by token."""
    found = torch.zeros(x.shape[:2])
    for image, tokens in enumerate(x.double()):
        values = [-float(token @ question[image].double() / token.norm()) for token in tokens]
        for place, value in enumerate(values):
            found[image, place] = (value - min(values) + 1e-6) / (max(values) - min(values) + 1e-6)
    return found


def determinant_scores(x: Tensor, relevance: Tensor | None, keep: float, theta: float | None = None) -> Tensor:
    """`foveate::determinant_scores` from determinants in float64, each pick by trying all others."""
    scores = torch.zeros(x.shape[:2])
    for image, tokens in enumerate(x.double()):
        r = torch.ones(len(tokens), dtype=torch.float64) if relevance is None else relevance[image].double()
        r = r if theta is None else torch.exp(theta * r / (2 * (1 - theta)))
        unit = tokens / tokens.norm(dim=1, keepdim=True)
        similar = unit @ unit.T
        picked: list[int] = []
        new: list[int] = []
        for number in range(math.ceil(keep * len(tokens))):
            gains = {}
            for j in (j for j in range(len(tokens)) if j not in picked):
                # Relevance multiplies a determinant by its square, so the share that is new has none in it.
                volumes = [float(torch.linalg.det(similar[group][:, group])) for group in ([*new, j], new) if group]
                share = volumes[0] / volumes[1] if new else 1.0
                gains[j] = float(r[j] ** 2) * share if share >= 1e-5 else 0.0
            best = max(gains, key=lambda j: (gains[j], -j))
            new += [best] if gains[best] > 0 else []
            picked.append(best)
            scores[image, best] = 1 - number / len(tokens)
    return scores


def distinct_scores(row: Tensor, x: Tensor, keep: float, important: float) -> Tensor:
    """`foveate::distinct_scores` with lists."""
    scores = torch.zeros(row.shape)
    for image, attention in enumerate(row.tolist()):
        unit = torch.nn.functional.normalize(x[image].float(), dim=-1)
        total = math.floor(keep * len(attention))
        first = math.floor(important * total)
        ranked = sorted(range(len(attention)), key=lambda j: (-attention[j], j))
        rest = ranked[first:]
        while len(rest) > total - first > 0:
            even, odd = rest[::2], rest[1::2]
            alike = [max(float(unit[i] @ unit[j]) for j in odd) for i in even]
            by_likeness = sorted(range(len(even)), key=lambda place: (-alike[place], place))
            going = min(8, len(rest) - (total - first), len(even))
            rest = [even[place] for place in by_likeness[going:]] + odd
        scores[image, ranked[:first] + (rest if total > first else [])] = 1
    return scores


def visionzip(row: Tensor, metric: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """`foveate::visionzip`, each token apart."""
    weights = torch.zeros(len(row), dominant + contextual, row.shape[1])
    source = torch.zeros(len(row), dominant + contextual, dtype=torch.int64)
    for image, attention in enumerate(row.tolist()):
        unit = torch.nn.functional.normalize(metric[image].detach().float(), dim=-1)
        ranked = sorted(range(len(attention)), key=lambda j: (-attention[j], j))
        best, rest = sorted(ranked[:dominant]), sorted(ranked[dominant:])
        targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
        joined: dict[int, list[int]] = {target: [] for target in targets}
        for token in (t for t in rest if t not in joined and targets):
            joined[max(targets, key=lambda t: (float(unit[token] @ unit[t]), -t))].append(token)
        for number, token in enumerate(best + targets):
            weights[image, number, token], source[image, number] = 1, token
            for other in joined.get(token, []) if number >= dominant else []:
                weights[image, number, other] = 1 / len(joined[token])
    return weights, source


def prumerge(
    row: Tensor, metric: Tensor, keep: float | None, plus: bool, neighbors: int
) -> list[tuple[Tensor, list[int]]]:
    """`foveate::prumerge`: for each image weights [its tokens, n] and the places that they stand for."""
    found = []
    for image, attention in enumerate(row.tolist()):
        count = len(attention)
        unit = torch.nn.functional.normalize(metric[image].detach().float(), dim=-1)
        ranked = sorted(range(count), key=lambda j: (-attention[j], j))
        if keep is None:
            ordered = sorted(attention)
            low, high = (_percentile(ordered, share) for share in (0.25, 0.75))
            top = sum(a > high + 1.5 * (high - low) for a in attention)
            spread = list(range(0, count - 1, max(1, count // top // 3))) if plus and top else []
        else:
            wanted = math.floor(keep * count) - 1
            top = math.ceil(wanted / 2) if plus else wanted
            rest = sorted(ranked[top:])
            spread = [rest[(2 * i + 1) * len(rest) // (2 * (wanted - top))] for i in range(wanted - top)]
        kept = ranked[:top] + [j for j in spread if j not in ranked[:top]]
        weights = torch.zeros(len(kept) + 1, count)
        for number, token in enumerate(kept):
            others = [j for j in range(count) if j != token]
            near = sorted(others, key=lambda j: (-float(unit[token] @ unit[j]), j))[:neighbors]
            weights[number, near] = row[image, near]
            weights[number, token] = 1
        gone = [j for j in ranked if j not in kept]
        weights[-1, gone] = row[image, gone]
        found.append((weights, kept + gone[:1]) if gone else (weights[:-1], kept))
    return found


def _percentile(ordered: list[float], share: float) -> float:
    """Of rising values, between two of them linearly."""
    place = share * (len(ordered) - 1)
    low = ordered[math.floor(place)]
    return low + (ordered[math.ceil(place)] - low) * (place - math.floor(place))
