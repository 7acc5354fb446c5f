"""What is read of HTML and of manual pages."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from samples.distill.plain import plain_html, plain_manual
from samples.distill.text import read_files

PAGE = """<!DOCTYPE html><html lang="en"><head><title>Not this</title><style>p { color: red }</style></head>
<body><nav><ul><li>menu<nav>deeper</nav></li><li>more menu</li></ul></nav>
<h1>Decay&nbsp;&amp; state</h1>
<p>A state   fades
with <b>every</b> token<br>and stays small.
<pre>for token in tokens:
    state = fade(state) &lt;&lt; token
</pre>
<ul><li>one<li>two</ul><script>var x = "<p>no</p>";</script><footer>nor this</footer></body></html>
"""
WORDS = """Decay & state

A state fades with every token
and stays small.

for token in tokens:
    state = fade(state) << token

one
two"""


def test_the_words_of_a_page() -> None:
    assert plain_html(PAGE) == WORDS


@pytest.mark.parametrize("page", ["", "</nav></pre>", "<nav>never closed", "plain < text & more"])
def test_what_is_hardly_a_page(page: str) -> None:
    assert plain_html(page) == ("plain < text & more" if page.startswith("plain") else "")


def test_pages_in_a_folder_are_read_as_words(tmp_path: Path) -> None:
    (tmp_path / "a.HTML").write_text(PAGE)
    with gzip.open(tmp_path / "b.html.gz", "wt") as file:
        file.write(PAGE)
    (tmp_path / "c.html").write_text("<html><script>only()</script></html>")
    found = read_files([tmp_path])
    assert [Path(one.name).name for one in found] == ["a.HTML", "b.html.gz"]
    assert all(one.text == plain_html(PAGE) for one in found)


def test_the_words_of_a_manual_page() -> None:
    page = r""".TH FADE 1
.SH NAME
fade \- forget
.SH "HOW IT WORKS"
.B fade
\fIstate\fR by \(lqγ\(rq
.\" not this
"""
    assert plain_manual(page) == "NAME\nfade - forget\n\nHOW IT WORKS\nfade\nstate by “γ”"
