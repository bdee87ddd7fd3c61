"""An HTML document taken apart, for tests of the page."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "col"}


class Document(HTMLParser):
    """Tags with attributes in order, and the text of each element of interest."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.seen: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)
            self.texts.setdefault(name, []).append("")

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.texts:
            self.texts[self.open[-1]][-1] += data
        if not {"script", "style"} & set(self.open):
            self.seen.append(data)

    @property
    def visible(self) -> str:
        """What a reader sees where no script runs."""
        return " ".join(" ".join(self.seen).split())

    def names(self) -> list[str]:
        return [name for name, _ in self.tags]
