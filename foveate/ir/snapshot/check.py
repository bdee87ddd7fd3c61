"""What a snapshot file may hold, key by key: a file that anyone may have written is checked before it is used.

A check takes a value and its key, and gives the value as it is to be used or raises `WrongError`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_BYTES = 16 << 20
MAX_LAYERS = 4096
MAX_NODES = 20_000
"""Of one section: far more than a layer of any model has, and few enough to compare."""

NODE = ("name", "call", "stream", "role", "by", "value")
"""What the six texts of a node are."""

REPEATED = {NODE.index(name) for name in ("stream", "role", "by")}
SAME = "~"
"""In a file, in place of one of the `REPEATED` texts: the same as that of the node before."""

MAX_UNFOLDED = 200_000
"""Of one graph, each layer counted."""

STREAMS = ("visual", "text", "joint", "none")

Check = Callable[[Any, str], Any]


class WrongError(ValueError):
    """A key does not hold what it must."""

    def __init__(self, key: str, wanted: str) -> None:
        super().__init__(f"{key or 'the whole'} must be {wanted}")


def text(value: Any, key: str) -> str:
    """One printable line."""
    if not isinstance(value, str) or not value.isprintable():
        raise WrongError(key, "one line of printable text")
    return value


def whole(value: Any, key: str) -> int:
    """A whole number that is not negative."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise WrongError(key, "a whole number, 0 or more")
    return value


def number(value: Any, key: str) -> float:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise WrongError(key, "a number, 0 or more")
    return value if isinstance(value, float) else whole(value, key)


def either(*checks: Check, wanted: str) -> Check:
    """The first check that holds."""

    def check(value: Any, key: str) -> Any:
        for each in checks:
            try:
                return each(value, key)
            except WrongError:
                continue
        raise WrongError(key, wanted)

    return check


def nothing(value: Any, key: str) -> None:
    """null."""
    if value is not None:
        raise WrongError(key, "null")


def each(item: Check, most: int = MAX_BYTES, least: int = 0) -> Check:
    """A list."""

    def check(value: Any, key: str) -> list[Any]:
        if not isinstance(value, list):
            raise WrongError(key, "a list")
        if not least <= len(value) <= most:
            raise WrongError(key, f"a list of {least} to {most} entries")
        return [item(v, f"{key}[{place}]") for place, v in enumerate(value)]

    return check


def mapping(item: Check, least: Mapping[str, Check] | None = None) -> Check:
    """An object with any keys, among them those of `least`."""
    named = least or {}

    def check(value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise WrongError(key, "an object")
        for name in named:
            if name not in value:
                raise WrongError(f"{key}.{name}".lstrip("."), "there")
        start = f"{key}." if key else ""
        return {text(k, f"a key of {key}"): named.get(k, item)(v, f"{start}{k}") for k, v in value.items()}

    return check


def record(**fields: Check) -> Check:
    """An object with exactly these keys; others, which a later foveate may add, are left out."""

    def check(value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise WrongError(key, "an object")
        start = f"{key}." if key else ""
        missing = [name for name in fields if name not in value]
        if missing:
            raise WrongError(f"{start}{missing[0]}", "there")
        return {name: field(value[name], f"{start}{name}") for name, field in fields.items()}

    return check


def span(value: Any, key: str) -> list[int]:
    """First and last layer."""
    whole_pair = isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
    if not whole_pair or not -1 <= value[0] <= value[1] < MAX_LAYERS:
        raise WrongError(key, f"the first and the last layer, -1 to {MAX_LAYERS - 1}")
    return list(value)


def shortened(found: list[list[str]]) -> list[list[str]]:
    """Nodes with `SAME` wherever a stream, role or pass is that of the node before."""
    before = [[""] * len(NODE), *found[:-1]]
    return [[SAME if i in REPEATED and n[i] == b[i] else n[i] for i in range(len(NODE))] for b, n in zip(before, found)]


def _spelled_out(value: Any) -> Any:
    """The way back; what is no list of nodes stays as it is, for `node` to refuse."""
    if not isinstance(value, list):
        return value
    found: list[Any] = []
    for entry in value:
        if found and isinstance(entry, list) and len(entry) == len(NODE) and isinstance(found[-1], list):
            entry = [b if i in REPEATED and n == SAME else n for i, (b, n) in enumerate(zip(found[-1], entry))]
        found.append(entry)
    return found


def node(value: Any, key: str) -> list[str]:
    """The texts of `NODE`."""
    if not isinstance(value, list) or len(value) != len(NODE):
        raise WrongError(key, f"a list of {', '.join(NODE)}")
    name, call, stream, *rest = [text(v, f"{key}.{field}") for v, field in zip(value, NODE)]
    if not re.fullmatch(r"[A-Za-z_]\w*(\{l\})?", name):
        raise WrongError(f"{key}.name", "a name")
    if not re.fullmatch(r"[\w.]+\(.*\)", call):
        raise WrongError(f"{key}.call", "a call, as in aten.neg.default(x)")
    if SAME in rest:
        raise WrongError(key, f"without {SAME} where no node stands before")
    if stream not in STREAMS:
        raise WrongError(f"{key}.stream", f"one of {', '.join(STREAMS)}")
    return list(value)


def nodes(value: Any, key: str) -> list[list[str]]:
    """Nodes with names of their own; `SAME` is spelled out."""
    found: list[list[str]] = each(node, MAX_NODES)(_spelled_out(value), key)
    if len({n[0] for n in found}) < len(found):
        raise WrongError(key, "nodes with different names")
    return found


def ordered(item: Check) -> Check:
    """A list of entries by layers, each layer in one at most, in order."""

    def check(value: Any, key: str) -> list[Any]:
        entries: list[Any] = each(item, MAX_LAYERS + 1)(value, key)
        for place, (one, other) in enumerate(itertools.pairwise(entries), 1):
            if other["layers"][0] <= one["layers"][1]:
                raise WrongError(f"{key}[{place}].layers", "behind the layers of the entry before it")
        return entries

    return check


def result(value: Any, key: str, depth: int = 0) -> Any:
    """What a graph returns: names, null, and lists and objects of them."""
    if value is None or isinstance(value, str):
        return value if value is None else text(value, key)
    if depth > 4 or not isinstance(value, (list, dict)):
        raise WrongError(key, "the name of a value, null, or a list or object of them")
    if isinstance(value, dict):
        return {text(k, f"a key of {key}"): result(v, f"{key}.{k}", depth + 1) for k, v in value.items()}
    return [result(v, f"{key}[{place}]", depth + 1) for place, v in enumerate(value)]


plain = either(number, text, nothing, each(number, 64), wanted="a number or a line of text")
figures = mapping(
    either(number, text, wanted="a number or a line of text"), dict.fromkeys(("flops", "bytes", "time_s"), number)
)
graph_names = re.compile(r"[a-z_]\w{0,30}")
cached = either(text, nothing, wanted="text or null")
kv_rows = ordered(record(layers=span, values=each(cached, 64)))


def returns(value: Any, key: str) -> dict[str, Any]:
    """What a graph returns, keys and values by layers."""
    found: dict[str, Any] = mapping(result)(
        {k: v for k, v in value.items() if k != "kv"} if isinstance(value, dict) else value, key
    )
    return {**found, "kv": kv_rows(value["kv"], f"{key}.kv")} if "kv" in value else found


def graph(value: Any, key: str) -> dict[str, Any]:
    """One graph; how many nodes it has in all is bounded, however few lines say so."""
    found: dict[str, Any] = record(inputs=nodes, sections=ordered(record(layers=span, nodes=nodes)), returns=returns)(
        value, key
    )
    if sum((s["layers"][1] - s["layers"][0] + 1) * len(s["nodes"]) for s in found["sections"]) > MAX_UNFOLDED:
        raise WrongError(f"{key}.sections", f"at most {MAX_UNFOLDED} nodes, all layers counted")
    return found


def by_graph(item: Check) -> Check:
    """An object with an entry for graphs by name."""

    def check(value: Any, key: str) -> dict[str, Any]:
        found: dict[str, Any] = mapping(item)(value, key)
        wrong = [name for name in found if not graph_names.fullmatch(name)]
        if wrong:
            raise WrongError(f"{key}.{wrong[0]}", "the name of a graph")
        return found

    return check


SNAPSHOT = record(
    foveate_snapshot=whole,
    versions=mapping(text, dict.fromkeys(("foveate", "torch", "transformers"), text)),
    model=record(
        name=text, family=text,
        layers=whole, heads=whole, kv_heads=whole, head_dim=whole, hidden_size=whole, intermediate_size=whole,
        grid=each(whole, 2, 2), dtype=text, parameters=whole, roles=mapping(text),
    ),
    passes=each(
        record(
            text=text, notes=each(text), edits=mapping(whole), skipped=cached,
            cost=either(nothing, mapping(each(number, 2, 2)), wanted="null or figures before and after"),
            device=text,
        ),
        10_000,
    ),
    sizes=mapping(plain),
    cost=mapping(either(number, text, figures, wanted="a number or the figures of a graph"),
                 {"vision": figures, "prefill": figures, "decode": figures, "kv_bytes": number, "peak_bytes": number}),
    parts=by_graph(each(record(layers=span, stream=text, flops=number, bytes=number, time_s=number), 4 * MAX_LAYERS)),
    kv=ordered(record(layers=span, visual=cached, text=cached)),
    graphs=by_graph(graph),
)  # fmt: skip
"""A snapshot, format 1."""
