"""The words of manual pages and of HTML, without what they are marked up with."""

from __future__ import annotations

import re
from html.parser import HTMLParser

HTML = (".html", ".htm", ".xhtml")
"""Ends of names of files that are read as HTML."""


def plain_html(source: str) -> str:
    """The words of a page: menus, scripts and styles left out, paragraphs apart, code as it stands."""
    page = _Page()
    page.feed(source)
    page.close()
    return "\n\n".join(page.paragraphs())


class _Page(HTMLParser):
    SKIPPED = ("head", "script", "style", "nav", "header", "footer", "svg", "form", "button", "template")
    BLOCKS = (
        "p", "div", "section", "article", "main", "body", "table", "ul", "ol", "dl", "blockquote", "pre",
        "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    )  # fmt: skip
    LINES = ("br", "li", "tr", "dt", "dd")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._skipped: str | None = None
        self._depth = 0
        self._code = 0
        self._blocks: list[list[str]] = [[]]

    def paragraphs(self) -> list[str]:
        """What was read, without empty ones."""
        joined = ("".join(block) for block in self._blocks)
        return [text.strip("\n").rstrip() for text in joined if text.strip()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped is not None:
            self._depth += tag == self._skipped
            return
        if tag in self.SKIPPED:
            self._skipped, self._depth = tag, 1
        elif tag in self.BLOCKS:
            self._blocks.append([])
            self._code += tag == "pre"
        elif tag in self.LINES:
            self._blocks[-1].append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped is not None:
            self._depth -= tag == self._skipped
            if not self._depth:
                self._skipped = None
        elif tag in self.BLOCKS:
            self._code -= tag == "pre" and self._code > 0
            self._blocks.append([])

    def handle_data(self, data: str) -> None:
        if self._skipped is not None:
            return
        block = self._blocks[-1]
        if not self._code:
            data = re.sub(r"\s+", " ", data)
            data = data if block and not block[-1].endswith(("\n", " ")) else data.lstrip()
        block.append(data)


def plain_manual(source: str) -> str:
    """The words of a manual page: roff's requests and escapes taken off, roughly."""
    out = []
    for line in source.splitlines():
        request = re.match(r"[.']\s*(\w*)\s*(.*)", line)
        if request is None:
            out.append(line)
        elif request[1] in _NEW_PARAGRAPH:
            out += ["", request[2].strip('"')] if request[2] else [""]
        elif request[1] in _WORDS:
            out.append(request[2].replace('"', ""))
    text = re.sub(r"\\f(\[\w*\]|\(\w\w|.)|\\[&|^/,:c%]|\\s[-+]?\d", "", "\n".join(out))
    text = re.sub(r"\\(\(..|\[\w+\]|\*\(..|\*.)", _character, text)
    return re.sub(
        r"\n{3,}", "\n\n", text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ")
    ).strip()


_NEW_PARAGRAPH = ("SH", "SS", "Sh", "Ss", "PP", "P", "LP", "Pp", "TP", "IP", "HP", "sp")
_WORDS = (
    "B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "Nm", "Nd", "Fl", "Ar", "Xr", "It", "Em", "Va", "Dv"
)  # fmt: skip
_CHARACTERS = {
    "(em": "—", "(en": "–", "(aq": "'", "(lq": "“", "(rq": "”", "(bu": "•", "(co": "©",
    '*(L"': '"', '*(R"': '"',
}  # fmt: skip


def _character(match: re.Match[str]) -> str:
    return _CHARACTERS.get(match[1], "")
