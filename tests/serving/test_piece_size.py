"""The length of pieces that a server chooses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.runners.base import Runner
from dijiang_engines.serving import piece_size
from dijiang_engines.serving.serve import ServerOptions, make_service


class Timed:
    """A runner of which only the time counts: `seconds` of a call with so many tokens, a first one twice."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], limit: int | None = None
    ) -> None:
        self.spec = SimpleNamespace(vocab_size=50, max_positions=limit)
        self.seconds, self.now, self.asked = seconds, 0.0, list[int]()
        monkeypatch.setattr(piece_size.time, "perf_counter", lambda: self.now)

    def new_state(self, rows: int) -> None:
        assert rows == 1

    def prefill(self, ids: Any, positions: Any, lens: Any, state: None) -> None:
        (size,) = lens
        assert ids.shape == (1, size) and not positions.any()
        self.now += self.seconds[size] * (1 if size in self.asked else 2)
        self.asked.append(size)


@pytest.mark.parametrize(
    ("seconds", "limit", "expected"),
    [
        ({64: 0.1, 128: 0.2}, None, 64),  # every token costs the same
        ({64: 0.29, 128: 0.35, 256: 0.52, 512: 0.95}, None, 256),  # weights of 8 bits on a CPU
        ({64: 0.002, 128: 0.002, 256: 0.003, 512: 0.004}, None, 512),  # a GPU
        ({64: 0.9, 128: 1.01}, None, 64),  # the others would wait for too long
        ({64: 0.1, 128: 0.1}, 200, 128),  # learned positions end
        ({40: 0.1}, 40, 64),
    ],
)
def test_a_piece_is_as_long_as_it_pays(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], limit: int | None, expected: int
) -> None:
    runner: Any = Timed(monkeypatch, seconds, limit)
    assert piece_size.measured_piece(runner) == expected
    assert sorted(set(runner.asked)) == sorted(seconds)


def test_it_is_measured_unless_it_is_said(
    model: Bundle, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dijiang_engines.serving.serve.measured_piece", lambda _: 128)
    assert make_service(model, runner, ServerOptions()).scheduler.limits.piece == 128
    assert make_service(model, runner, ServerOptions(piece=7)).scheduler.limits.piece == 7
    with pytest.raises(UsageError, match="piece must be at least 1"):
        ServerOptions(piece=0)
