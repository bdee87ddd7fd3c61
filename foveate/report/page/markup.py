"""Building HTML from data that is not to be trusted: every string is text until `tag` has made it an element."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from typing import Any


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Iterable["Child"] | None

_VOID = frozenset({"br", "col", "meta", "rect", "line"})


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element with children; strings that are no `Html` are escaped.

    Names of attributes: `class_` is class, `data_x` is data-x. True writes the bare name; None and False write nothing.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>" if name in ("br", "col", "meta") else f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after another, escaped where they are not markup."""
    return Html("".join(map(_child, children)))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return str(child)
    return html.escape(child) if isinstance(child, str) else join(child)


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    name = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'


def plain(text: Any) -> str:
    """Text as it is to be seen: control characters, text direction marks and broken surrogates by their number.

    An unseen character could show a reviewer another order of words than the file has.
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if c == "\n" or _seen(c) else _number(c) for c in text)


def _seen(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _number(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def cleaned(value: Any) -> Any:
    """Plain data with all its strings made `plain`."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(key): cleaned(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(entry) for entry in value]
    return value
