"""A validation's report as one HTML file that needs nothing else: no network, no script, no font.

Everything that comes from outside (names of cases, models, machines, messages) is escaped. The file's policy
forbids whatever is not in it already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from dijiang_engines.svg_plot import MOST_SERIES, Axis, Series, plot
from dijiang_engines.validation.series import ReplayResult
from dijiang_engines.validation.tolerances import Bounds, Quantity, scale_of
from dijiang_engines.validation.validate import QUANTITIES, STEPPED, Report

MARKER = '<meta name="generator" content="dijiang-export validate">'
"""By which an earlier report is recognised; near the beginning of the file."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_UNITS = {
    "logits": "standard deviations of the case's recorded logits",
    "state": "the head's largest recorded absolute value",
    "padding": "as above, against the runner's own result with other padding",
}


def report_html(report: Report, facts: Sequence[tuple[str, str]]) -> str:
    """The whole document.

    Args:
        report: what `validate` found.
        facts: what was validated, on what, with what, when: names and values, in the order to be shown.
    """
    title = f"Validation: {dict(facts).get('model', 'model')} on {report.runner}"
    sections = [
        _section("What was validated", _facts(facts)),
        _section("Result", _summary(report)),
        _section("Failures", _failures(report)) if not report.passed else "",
        _section("Errors", _plots(report)),
        _section("Drift", _drift(report)),
        _section("All cases and replays", _results(report)),
        _section("Tolerances", _tolerances(report.bounds)),
        *(
            []
            if report.step_bounds is None
            else [_section(f"Tolerances of {', '.join(STEPPED)}", _tolerances(report.step_bounds))]
        ),
    ]
    style = files("dijiang_engines.validation.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARKER}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(sections)}</body>\n</html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of plain text; `numbers`: columns that are aligned to the right."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{_align(i in numbers)}>{escape(value)}</{tag}>" for i, value in enumerate(values)
        )

    body = "\n".join(f"<tr{_mood(row)}>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>\n{body}\n</tbody></table></div>'


def _align(number: bool) -> str:
    return ' class="number"' if number else ""


def _mood(row: Sequence[str]) -> str:
    return ' class="failed"' if row[-1].startswith("FAIL") else ""


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f"<dl>{''.join(rows)}</dl>"


def _summary(report: Report) -> str:
    checks = sum(result.checks for result in report.results)
    failed = sum(result.failed for result in report.results)
    if report.passed:
        verdict = f"{checks:,} checks, all within the tolerances."
    elif not report.results:
        verdict = "Nothing was compared."
    else:
        verdict = f"{failed:,} of {checks:,} checks failed."
    lines = [
        f'<p class="verdict {"pass" if report.passed else "fail"}">'
        f"<b>{'PASS' if report.passed else 'FAIL'}</b> {escape(verdict)}</p>"
    ]
    first = report.first_failure
    if first is not None:
        lines.append(f"<p>First: {escape(first.place)}: {escape(first.comparison.reason)}.</p>")
    worst = []
    for quantity, name in (("logits_error", "logits"), ("state_error", "state")):
        errors = [e for r in report.results if (e := getattr(r, quantity)) is not None]
        if errors:
            kind: Quantity = "logits" if name == "logits" else "state"
            shares = [
                e / report.bounds_of(r.replay).widest(kind).max_error
                for r in report.results
                if (e := getattr(r, quantity)) is not None
            ]
            worst.append(f"{name} {max(errors):.1e}, at most {max(shares):.2g} of the tolerance")
    if worst:
        lines.append(f"<p>Largest errors: {escape('; '.join(worst))}.</p>")
    lines += [f'<p class="note">{escape(sentence)}</p>' for sentence in (*report.coverage, *report.left_out)]
    return "\n".join(lines)


def _failures(report: Report) -> str:
    total = sum(result.failed for result in report.results)
    rows = [
        (
            str(number), check.case, check.replay, check.quantity,
            "-" if check.layer is None else str(check.layer), str(check.row), str(check.tokens),
            check.comparison.reason,
        )
        for number, check in enumerate(report.failures, 1)
    ]  # fmt: skip
    head = ("", "case", "replay", "what", "layer", "row", "after tokens", "why")
    shown = f"<p>The first {len(rows)} of {total:,}, in the order in which they were found.</p>"
    return shown + _table(head, rows, (0, 4, 5, 6))


def _plots(report: Report) -> str:
    by_case = _by_case(report.results)
    logits, state = report.widest.logits.max_error, report.widest.widest("state").max_error
    note = ""
    if len(by_case) > MOST_SERIES:
        note = f'<p class="note">The first {MOST_SERIES} of {len(by_case)} cases are drawn.</p>'
    if any(p.without_number for r in report.results for p in r.per_layer) or any(
        p.logits_without_number or p.state_without_number for r in report.results for p in r.per_position
    ):
        note += '<p class="note">A cross at the top: NaN, infinity or a wrong shape.</p>'
    error = Axis("relative error", log=True)
    tokens = Axis("tokens consumed", log=True)
    return note + "\n".join(
        (
            _figure(
                "Error of the state, by layer",
                "The largest over rows, positions and replays of a case.",
                _layer_series(by_case), Axis("layer", whole=True), error, (state, f"tolerance {state:.2g}"),
            ),
            _figure(
                "Error of the logits, by position",
                "The largest over rows and replays, wherever logits were recorded.",
                _position_series(by_case, "logits"), tokens, error,
                (logits, f"tolerance {logits:.2g}"),
            ),
            _figure(
                "Error of the state, by position",
                "The largest over layers, rows and replays, wherever states were recorded.",
                _position_series(by_case, "state"), tokens, error,
                (state, f"tolerance {state:.2g}"),
            ),
            _figure(
                "Agreement on the next token, by position",
                "Share of the compared logits whose largest entry is the record's (top-1), over rows and "
                "replays. Shown, not judged: two entries may be nearly equal.",
                _top1_series(by_case), tokens, Axis("same token", percent=True), None,
            ),
        )
    )  # fmt: skip


def _figure(
    title: str,
    explanation: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    limit: tuple[float, str] | None,
) -> str:
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(explanation)}</figcaption>"
        f"{plot(title, series, x, y, limit)}</figure>"
    )


def _by_case(results: Sequence[ReplayResult]) -> dict[str, list[ReplayResult]]:
    cases: dict[str, list[ReplayResult]] = {}
    for result in results:
        cases.setdefault(result.case, []).append(result)
    return cases


def _layer_series(by_case: dict[str, list[ReplayResult]]) -> list[Series]:
    return [
        Series(
            case, _largest((p.layer, p.state_error, p.without_number) for r in results for p in r.per_layer)
        )
        for case, results in by_case.items()
    ]


def _position_series(by_case: dict[str, list[ReplayResult]], quantity: str) -> list[Series]:
    return [
        Series(case, _largest(point for result in results for point in _errors(result, quantity)))
        for case, results in by_case.items()
    ]


def _errors(result: ReplayResult, quantity: str) -> list[tuple[int, float | None, int]]:
    """Of one replay, for `_largest`: tokens, error of logits or state, how many had no number."""
    if quantity == "logits":
        return [(p.tokens, p.logits_error, p.logits_without_number) for p in result.per_position]
    return [(p.tokens, p.state_error, p.state_without_number) for p in result.per_position]


def _largest(points: Iterable[tuple[int, float | None, int]]) -> list[tuple[float, float | None]]:
    """The largest error at each place; None where anything had no number, which is worse than any number."""
    found: dict[float, float | None] = {}
    for place, error, without_number in points:
        if without_number:
            found[place] = None
        elif error is not None and found.get(place, 0.0) is not None:
            found[place] = max(error, found.get(place) or 0.0)
    return sorted(found.items(), key=lambda item: item[0])


def _top1_series(by_case: dict[str, list[ReplayResult]]) -> list[Series]:
    series = []
    for case, results in by_case.items():
        shares: dict[float, list[float]] = {}
        for point in (p for r in results for p in r.per_position):
            if point.top1 is not None:
                shares.setdefault(point.tokens, []).append(point.top1)
        series.append(Series(case, [(place, sum(s) / len(s)) for place, s in sorted(shares.items())]))
    return series


def _drift(report: Report) -> str:
    found = report.drift
    if not found:
        return (
            "<p>No case is long enough to tell whether errors grow with the position: "
            "a bundle that was exported with <code>--cases full</code> records one.</p>"
        )
    items = "".join(f"<li>{escape(one.sentence)}.</li>" for one in found)
    long = {(one.case, one.replay) for one in found}
    results = [r for r in report.results if (r.case, r.replay) in long]
    series = []
    for r in results:
        name = f"{r.case}, {r.replay}"
        series.append(Series(f"{name}: logits", _largest(_errors(r, "logits"))))
        series.append(Series(f"{name}: states", _largest(_errors(r, "state"))))
    figure = _figure(
        "Errors over one long sequence",
        "Each replay by itself.",
        series, Axis("tokens consumed"), Axis("relative error", log=True), None,
    )  # fmt: skip
    return f"<ul>{items}</ul>{figure}"


def _results(report: Report) -> str:
    head = (
        "case", "replay", "checks", "logits", "states", "padding", "1 - cosine", "top-1", "KL", "seconds",
        "result",
    )  # fmt: skip
    rows = [
        (
            r.case, r.replay, f"{r.checks:,}", _number(r.logits_error), _number(r.state_error),
            _number(r.padding_error), _number(None if r.cosine is None else max(1 - r.cosine, 0.0)),
            "-" if r.top1 is None else f"{100 * r.top1:.1f}%", _number(r.kl), f"{r.seconds:.2f}",
            "pass" if r.passed else f"FAIL ({r.failed:,})",
        )
        for r in report.results
    ]  # fmt: skip
    return _table(head, rows, range(2, 10))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _tolerances(bounds: Bounds) -> str:
    rows = []
    for quantity in QUANTITIES:
        t = bounds.widest(quantity)
        rows.append(
            (
                quantity, f"{t.max_error:.2g}", _UNITS[quantity],
                "-" if t.min_cosine is None else f"{1 - t.min_cosine:.1g}",
                "-" if t.max_kl is None else f"{t.max_kl:.1g}", t.reason,
            )
        )  # fmt: skip
    head = ("quantity", "largest error", "in units of", "1 - cosine at most", "KL at most", "why")
    note = "<p>A finished row's state must stay the same bit for bit, and every logit must be finite.</p>"
    return f"<p>{escape(bounds.sentence)}</p>" + _table(head, rows, (1, 3, 4)) + note + _layers(bounds)


def _layers(bounds: Bounds) -> str:
    """What was measured of each layer, where it decides anything."""
    if bounds.cost is None:
        return ""
    last = len(bounds.cost.layers) - 1
    why = f"<p>The factor: {escape(scale_of(bounds.row).reason)}.</p>"
    if bounds.state(last).max_error == bounds.state(0).max_error:
        return why
    allowed = [(float(i), bounds.state(i).max_error) for i in range(last + 1)]
    measured = [(float(i), cost.error) for i, cost in enumerate(bounds.cost.layers)]
    return why + _figure(
        "Tolerance of the state, by layer",
        "What rounding was measured to cost, and what is allowed.",
        [Series("measured", measured), Series("allowed", allowed)],
        Axis("layer", whole=True), Axis("relative error", log=True), None,
    )  # fmt: skip
