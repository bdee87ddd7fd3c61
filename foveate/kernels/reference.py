"""The oracle of every kernel: the shortest torch that says what the op means, in float64, S x S tensors allowed."""

import math
from decimal import Decimal

import torch
from torch import Tensor

from foveate.ops import PAD


def probabilities(
    q: Tensor,
    k: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    scale: float,
    reach: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Softmaxed scores float64 [B, H, n, m] of q [B, H, n, e] on k [B, Hk, m, e] under the order rule."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.double().transpose(2, 3) * scale
    visible = k_order[:, None, None, :] <= (q_order if reach is None else reach)[:, None, :, None]
    if window:
        visible &= k_order[:, None, None, :] > q_order[:, None, :, None] - window
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


def attention(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    prefix: int,
    layout: str,
    scale: float,
    reach: list[Tensor] | None = None,
    window: int = 0,
) -> Tensor:
    """`foveate::attention` from the orders alone; `prefix` and `layout` are not looked at."""
    orders = torch.cat(q_order, 1), torch.cat(k_order, 1)
    last = None if reach is None else torch.cat(reach, 1)
    rows = probabilities(torch.cat(q, 2), torch.cat(k, 2), *orders, scale, last, window)
    values = torch.cat(v, 2).double().repeat_interleave(q[0].shape[1] // v[0].shape[1], dim=1)
    return (rows @ values).transpose(1, 2).to(q[0].dtype).contiguous()


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """`foveate::encoder_attention`: softmax over every key."""
    logits = q.double() @ k.double().transpose(2, 3) * scale
    rows = (logits if bias is None else logits + bias.detach()[:, None, None]).softmax(-1)
    return (rows @ v.double()).transpose(1, 2).to(q.dtype)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """`foveate::varlen_attention`: softmax over the keys of the same segment, with a mask over all pairs."""
    places = torch.arange(q.shape[2], device=q.device)
    segment = (places[:, None] >= cu_seqlens[None, 1:]).sum(1)
    scores = q.double() @ k.double().transpose(2, 3) * scale
    rows = scores.masked_fill(segment[:, None] != segment[None, :], -math.inf).softmax(-1)
    return (rows @ v.double()).transpose(1, 2).to(q.dtype).contiguous()


def attention_row(q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], scale: float) -> Tensor:
    """`foveate::attention_row` from the whole softmax."""
    rows = probabilities(q, torch.cat(k, 2), q_order, torch.cat(k_order, 1), scale)
    return rows[..., : k[0].shape[2]].float().contiguous()


def received_attention(
    q: Tensor,
    k: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    behind: bool,
    scale: float,
    coords: Tensor | None = None,
    radius: int = 0,
    metric: str = "chebyshev",
    causal: bool = False,
) -> Tensor:
    """`foveate::received_attention` pair by pair, from all weights."""
    first = k[0].shape[2]
    keys, orders = torch.cat(k, 2).repeat_interleave(q.shape[1] // k[0].shape[1], dim=1), torch.cat(k_order, 1)
    found = torch.zeros(q.shape[0], first, dtype=torch.float64)
    for b in range(q.shape[0]):
        last = max((o for o in k_order[0][b].tolist() if o != PAD), default=PAD)
        asked = [i for i, o in enumerate(q_order[b].tolist()) if o != PAD and (o > last or not behind)]
        for i in asked:
            own = int(q_order[b, i])
            seen = [j for j, o in enumerate(orders[b].tolist()) if o <= own]
            if coords is not None:
                near = [j for j in range(first) if k_order[0][b, j] != PAD and (not causal or k_order[0][b, j] <= own)]
                near = [j for j in near if _beside(coords[b, i], coords[b, j], own, k_order[0][b, j], radius, metric)]
                seen = near + [j for j in seen if j >= first]
            weights = (keys[b][:, seen].double() @ q[b, :, i, :, None].double() * scale).softmax(1)[..., 0]
            for place, j in enumerate(seen):
                if j < first:
                    found[b, j] += weights[:, place].max() / len(asked)
    return found.float()


def _beside(here: Tensor, there: Tensor, own: int, other: Tensor, radius: int, metric: str) -> bool:
    """Whether two tokens of an image lie within `radius`: image, row and column, and order, of both."""
    (image, *a), (same, *b) = here.tolist(), there.tolist()
    far = {
        "chebyshev": max(abs(x - y) for x, y in zip(a, b, strict=True)),
        "euclidean": math.dist(a, b),
        "raster": abs(own - int(other)),
    }
    return bool(image == same and far[metric] <= radius)


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


def attention_statistics(
    q: list[Tensor],
    k: list[Tensor],
    out: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    coords: Tensor,
    distances: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`foveate::attention_statistics` from all weights at once, row by row and pair by pair."""
    batch, heads = q[0].shape[:2]
    mass = torch.zeros(batch, heads, 2, 3, dtype=torch.float64)
    norms = torch.zeros(batch, heads, 2, dtype=torch.float64)
    by_distance = torch.zeros(batch, heads, distances, dtype=torch.float64)
    pairs = torch.zeros(batch, distances, dtype=torch.float64)
    visual, keys = k[0].shape[2], torch.cat(k_order, 1)
    for stream in range(2):
        rows = probabilities(q[stream], torch.cat(k, 2), q_order[stream], keys, scale)
        for b in range(batch):
            real = [i for i, place in enumerate(q_order[stream][b].tolist()) if place != PAD]
            if real:
                norms[b, :, stream] = out[stream][b, real].double().norm(dim=-1).mean(0)
            first = min(k_order[0][b].tolist(), default=PAD)
            for j, place in enumerate(keys[b].tolist()):
                group = 1 if j < visual else 0 if place < first else 2
                if place != PAD:
                    mass[b, :, stream, group] += rows[b, :, real, j].sum(1)
            for i in real if stream == 0 else []:
                for j in range(visual):
                    (image, *here), (other, *there) = coords[b, i].tolist(), coords[b, j].tolist()
                    if image == other and keys[b, j] <= q_order[0][b, i]:
                        far = min(round(math.dist(here, there)), distances - 1)
                        by_distance[b, :, far] += rows[b, :, i, j]
                        pairs[b, far] += 1
    return mass.float(), norms.float(), by_distance.float(), pairs.float()


def activity(x: Tensor, order: Tensor) -> Tensor:
    """`foveate::activity` row by row."""
    means = [row[places != PAD].double().abs().mean(0) for row, places in zip(x, order, strict=True)]
    return torch.stack(means).nan_to_num().float() if means else x.new_zeros(0, x.shape[2]).float()


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """`foveate::divergence` from the probabilities."""
    p, q = (x[:, 0].double().softmax(-1) for x in (logits, other))
    return (p * (p / q).log()).sum(-1).float()


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


def received(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """`foveate::received`, from the whole matrix."""
    logits = q.double() @ k.double().transpose(2, 3) * scale
    matrix = (logits if bias is None else logits + bias[:, None, None]).softmax(-1).mean(1)
    return (matrix[:, :-1].mean(1) + matrix[:, -1]).float()


def column_means(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`foveate::column_means`, from the whole matrix."""
    return (q.double() @ k.double().transpose(2, 3) * scale).softmax(-1).mean((1, 2)).float()


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
