"""Which tokens of a tower's layer become one, and how many an image keeps there, each token apart."""

import math
from decimal import Decimal

import torch
from torch import Tensor


def tome(
    keys: Tensor, size: Tensor | None, source: Tensor, merge: int, sort: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`foveate::tome`, each token apart."""
    images, _, count, _ = keys.shape
    into, weight = torch.zeros(images, count, dtype=torch.int64), torch.zeros(images, count)
    new_size, places = torch.zeros(images, count - merge), torch.zeros(images, count - merge, dtype=torch.int64)
    for image in range(images):
        metric = torch.nn.functional.normalize(keys[image].detach().float().mean(0), dim=-1)
        own = [1.0] * count if size is None else size[image].tolist()
        even, odd = range(0, count, 2), range(1, count, 2)
        best = {i: max(odd, key=lambda j: (float(metric[i] @ metric[j]), -j)) for i in even if i and odd}
        going = sorted(best, key=lambda i: (-float(metric[i] @ metric[best[i]]), i))[:merge]
        stays = [i for i in even if i not in going] + list(odd)
        if sort:
            stays.sort(key=lambda i: int(source[image, i]))
        for i in range(count):
            into[image, i] = stays.index(best[i] if i in going else i)
            new_size[image, into[image, i]] += own[i]
        for i in range(count):
            weight[image, i] = own[i] / new_size[image, into[image, i]]
        places[image] = source[image, stays]
    return into, weight, new_size, places


def cls_curve(x: Tensor, alpha: float, alpha_mode: str) -> tuple[Tensor, Tensor]:
    """`foveate::cls_curve`, each image apart."""
    images, count = len(x), x.shape[1] - 1
    places, kept = torch.zeros(images, count, dtype=torch.int64), torch.zeros(images, dtype=torch.int64)
    share = Decimal(repr(alpha))
    for image, tokens in enumerate(x.detach().float()):
        likeness = torch.softmax(torch.stack([tokens[0] @ t for t in tokens[1:]]) / math.sqrt(x.shape[2]), 0).tolist()
        ranked = sorted(range(count), key=lambda j: (-likeness[j], j))
        d = [likeness[j] for j in ranked]
        k = count
        if d[0] != d[-1]:
            turn = max(range(1, count), key=lambda i: ((count - i) * (d[0] - d[i - 1]) / (d[0] - d[-1]), -i))
            k = {
                "expand": math.ceil((1 + share) * turn),
                "literal": math.ceil(share * turn),
                "floor_add": turn + math.ceil(share * count),
            }[alpha_mode]
        kept[image] = max(1, min(k, count))
        stay = sorted(ranked[: int(kept[image])])
        places[image] = torch.tensor(stay + [j for j in range(count) if j not in stay])
    return places, kept


def crossget(
    keys: Tensor, importance: Tensor, size: Tensor | None, source: Tensor, merge: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`foveate::crossget`, each token apart."""
    images, _, count, _ = keys.shape
    into, weight = torch.zeros(images, count, dtype=torch.int64), torch.zeros(images, count)
    new_size, places = torch.zeros(images, count - merge), torch.zeros(images, count - merge, dtype=torch.int64)
    free = range(1, count - 1)
    for image in range(images):
        metric = torch.nn.functional.normalize(keys[image].detach().float().mean(0), dim=-1)
        alike = [[float(metric[min(i, j)] @ metric[max(i, j)]) for j in range(count)] for i in range(count)]
        worth = importance[image].tolist()
        own = [1.0] * count if size is None else size[image].tolist()
        top = {i: max((alike[i][j] for j in free if j != i), default=-math.inf) for i in free}
        ranked = sorted(free, key=lambda i: (-top[i], i))
        urge = {
            i: worth[i] - max((alike[i][j] for j in ranked[n + 1 :]), default=-math.inf) for n, i in enumerate(ranked)
        }
        going = sorted(free, key=lambda i: (urge[i], i))[:merge]
        stays = [i for i in range(count) if i not in going]
        partner = {i: max((j for j in stays if j in free), key=lambda j: (alike[i][j], -j)) for i in going}
        scale = [1.0] * count
        for s, d in partner.items():
            total = math.exp(worth[s]) + math.exp(worth[d])
            scale[s] = 2 * math.exp(worth[s]) / total
            scale[d] += 2 * math.exp(worth[d]) / total - 1
        for i in range(count):
            into[image, i] = stays.index(partner.get(i, i))
            new_size[image, into[image, i]] += own[i]
        for i in range(count):
            weight[image, i] = scale[i] * own[i] / new_size[image, into[image, i]]
        places[image] = source[image, stays]
    return into, weight, new_size, places
