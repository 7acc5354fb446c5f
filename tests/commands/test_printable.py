"""What reaches a terminal: no control characters from anywhere, no novels, and JSON that stays JSON."""

from __future__ import annotations

import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dijiang_engines.errors import BundleError, DijiangError
from dijiang_engines.printable import MOST, json_text, printable
from dijiang_export.commands.common import Output

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \r\x08 \x9b2J \u202eevil\u2066 \u2028 \udcff \x7f"
SHOWN = r"\x1b[31mred\x1b]0;title\x07 \x0d\x08 \x9b2J \u202eevil\u2066 \u2028 \udcff \x7f"


def is_fit(text: str) -> bool:
    """No control but line ends and tabs, no half pairs, nothing that turns writing round."""
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return not any(
        (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t")
        or unicodedata.bidirectional(c) in bidi
        for c in text
    )


def test_controls_are_shown_as_escapes() -> None:
    assert printable(HOSTILE) == SHOWN
    plain = "γ über 日本語 👩‍👩‍👧 a\tb\nc"
    assert printable(plain) == plain


@given(st.text(st.characters(), max_size=50))
def test_any_text_becomes_fit(text: str) -> None:
    assert is_fit(printable(text))
    for encoding in ("utf-8", "UTF8", "ascii", "latin-1", None):
        dumped = json_text({"a": text}, encoding=encoding)
        assert is_fit(dumped)
        assert json.loads(dumped) == {"a": text}
        if encoding in ("ascii", None):
            assert dumped.isascii()


def test_every_part_of_an_error_is_cleaned_and_bounded() -> None:
    error = BundleError(HOSTILE, got=HOSTILE * 10_000, expected=[HOSTILE], hint=HOSTILE)
    assert is_fit(str(error))
    assert len(str(error)) < 5 * MOST * 6
    assert (error.what, error.hint) == (SHOWN, SHOWN)
    assert error.got is not None and error.got.endswith(" more characters)")
    assert len(str(BundleError("x" * 10**7, got="x" * 10**7, expected="x" * 10**7, hint="x" * 10**7))) < 9000


def test_an_error_cannot_be_forged_by_line_breaks() -> None:
    error = DijiangError("bad name\nhint: run evil", got="a\nerror: b", hint="two\nlines")
    starts = [line.split(":")[0] for line in str(error).splitlines() if not line.startswith(" ")]
    assert starts == ["bad name", "hint", "lines"]


def test_a_number_that_python_does_not_print() -> None:
    assert "too long to show" in str(DijiangError("x", got=1 << 100_000, expected=[1 << 100_000]))


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[red]x[/red] [link=http://evil]y[/link] [/] :smile: \x1b[31m \u202e \x9b"
    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    table.add_row(Text(name, style="green"))
    Output().print_rich(table, Text(f"note: {name}"))
    out = capsys.readouterr().out
    assert is_fit(out)
    assert out.count("[red]x[/red] [link=http://evil]y[/link] [/] :smile: \\x1b[31m \\u202e \\x9b") == 6


def test_colours_of_our_own_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from dijiang_export.commands.common import _Printable

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=80)
    console.print(_Printable(Text("fine\x1b", style="green")))
    assert file.getvalue() == "\x1b[32mfine\\x1b\x1b[0m\n"


def test_logs(capsys: pytest.CaptureFixture[str]) -> None:
    Output().log(HOSTILE)
    assert capsys.readouterr().err == SHOWN + "\n"
