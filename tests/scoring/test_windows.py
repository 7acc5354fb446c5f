"""Streams cut into windows: every token is predicted once, with the context that the stride promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dijiang_engines.errors import UsageError
from dijiang_engines.scoring.windows import Window, cut_into_windows, in_groups


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 70)),
    data=st.data(),
)
def test_every_prediction_is_counted_once(counts: list[int], window: int | None, data: st.DataObject) -> None:
    stride = None if window is None else data.draw(st.one_of(st.none(), st.integers(1, window)))
    seen: list[list[int]] = [[] for _ in counts]
    for w in cut_into_windows(counts, window, stride):
        assert 1 <= w.length <= (window or max(counts))
        assert 0 <= w.skip < w.length
        for at in range(w.start + w.skip, w.start + w.length):
            seen[w.stream].append(at)
            context = at - w.start + 1
            if window is not None and at >= window:
                assert context > window - (stride or window)
            elif window is None or at < window:
                assert w.start == 0
    assert seen == [list(range(count)) for count in counts]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (7, [(0, 7, 0)]),
        (8, [(0, 8, 0)]),
        (9, [(0, 8, 0), (8, 1, 0)]),
        (16, [(0, 8, 0), (8, 8, 0)]),
        (19, [(0, 8, 0), (8, 8, 0), (16, 3, 0)]),
    ],
)
def test_windows_without_overlap(count: int, expected: list[tuple[int, int, int]]) -> None:
    assert cut_into_windows([count], 8) == [Window(0, *w) for w in expected]


def test_windows_that_overlap() -> None:
    expected = [(0, 8, 0), (3, 8, 5), (6, 8, 5), (9, 7, 5)]
    assert cut_into_windows([16], 8, 3) == [Window(0, *w) for w in expected]


def test_groups_hold_windows_that_can_be_read_together() -> None:
    windows = cut_into_windows([20, 5, 9], 8, 4)
    groups = in_groups(windows, 3)
    assert sorted((w.stream, w.start) for group in groups for w in group) == sorted(
        (w.stream, w.start) for w in windows
    )
    for group in groups:
        assert len(group) <= 3
        assert len({w.skip for w in group}) == 1
        assert [w.length for w in group] == sorted((w.length for w in group), reverse=True)


@pytest.mark.parametrize(("window", "stride"), [(0, None), (4, 5), (4, 0), (None, 3)])
def test_sizes_without_a_meaning(window: int | None, stride: int | None) -> None:
    with pytest.raises(UsageError):
        cut_into_windows([10], window, stride)
