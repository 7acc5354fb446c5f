"""What the server has done, for Prometheus. Names are vLLM's, so that dashboards fit.

Names and meanings: vllm v0.11.0, vllm/v1/metrics/loggers.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dijiang_engines.generation.row import FinishReason

if TYPE_CHECKING:
    from dijiang_engines.serving.scheduler import Scheduler
    from dijiang_engines.serving.shared_prefixes import SharedCounts

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class Timer:
    """The times of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.begun = self._last = time.perf_counter()
        self._any = False

    def tokens(self, count: int) -> None:
        """So many tokens have come at once."""
        now = time.perf_counter()
        if not self._any:
            self._metrics.first_token.observe(now - self.begun)
        elif count:
            self._metrics.between_tokens.observe((now - self._last) / count)
        self._any, self._last = True, now

    def finished(self, reason: FinishReason) -> None:
        """A text has ended."""
        self._metrics.succeeded.labels(finished_reason="length" if reason == "length" else "stop").inc()


class Metrics:
    """Counts and times of one server.

    Args:
        scheduler: counts tokens.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "Time to first token.",
            buckets=_FIRST,
            registry=self._registry,
        )
        self.between_tokens = Histogram(
            "vllm:inter_token_latency_seconds", "Time between tokens of a request.", buckets=_BETWEEN,
            registry=self._registry,
        )  # fmt: skip
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds", "Time of a whole request.", buckets=_WHOLE,
            registry=self._registry,
        )  # fmt: skip
        self.succeeded = Counter(
            "vllm:request_success", "Texts that ended, by reason.", ["finished_reason"],
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Scheduler(scheduler))

    @contextmanager
    def request(self) -> Iterator[Timer]:
        """A request, from its submission to its end."""
        timer = Timer(self)
        try:
            yield timer
        finally:
            self.whole.observe(time.perf_counter() - timer.begun)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Scheduler(Collector):
    """What the scheduler counts, read when somebody asks."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """One metric after the other."""
        scheduler, counts = self._scheduler, self._scheduler.counts
        gauges = {
            "vllm:num_requests_running": ("Texts that are read or generated.", scheduler.running),
            "vllm:num_requests_waiting": ("Requests that wait.", len(scheduler.waiting)),
            "dijiang:prefix_cache_bytes": ("Bytes of kept states.", scheduler.cache.bytes),
            "dijiang:prefix_cache_entries": ("Kept states.", len(scheduler.cache)),
        }
        counters = {
            "vllm:prompt_tokens": ("Tokens of prompts that were read.", counts.prompt_tokens),
            "vllm:generation_tokens": ("Tokens that were generated.", counts.generated_tokens),
            "vllm:prefix_cache_queries": (
                "Tokens of prompts that were looked for.", counts.prompt_tokens + counts.cached_tokens,
            ),
            "vllm:prefix_cache_hits": ("Tokens of prompts whose state was found.", counts.cached_tokens),
            "dijiang:steps": ("Steps of the batch.", counts.steps),
            "dijiang:stepped_rows": ("Texts of all steps together.", counts.stepped_rows),
        }  # fmt: skip
        if scheduler.shared is not None:
            counters |= _shared(scheduler.shared.counts, counts.shared_tokens)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)


def _shared(counts: SharedCounts, tokens: int) -> dict[str, tuple[str, int]]:
    name = "dijiang:shared_prefix"
    return {
        f"{name}_tokens": ("Tokens of prompts whose state another server had read.", tokens),
        f"{name}_hits": ("Searches in the shared store that found a state.", counts.hits),
        f"{name}_misses": ("Searches in the shared store that found none.", counts.misses),
        f"{name}_damaged": ("Values of the shared store that were not what was put.", counts.damaged),
        f"{name}_failures": ("Calls of the shared store that failed or were late.", counts.failures),
        f"{name}_written": ("States that were written to the shared store.", counts.written),
        f"{name}_dropped": ("States that were not.", counts.dropped),
    }
