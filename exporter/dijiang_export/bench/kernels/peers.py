"""Who is measured beside our kernels, each called as its own documentation says.

    fla            flash-linear-attention's bare recurrence: fused_recurrent_simple_gla for one token,
                   chunk_simple_gla for more; features are given, no RoPE, norm or gate is computed
    fla-phi        the same after an unfused feature map, which torch.compile made
    torch-compile  the whole op: this project's reference in float32 through torch.compile
    copy           a copy that moves as many bytes as the whole op must

flash-linear-attention picks among its kernels' configurations by measuring them at the first call of a kind.
Its choice is forgotten before each cell, so that every cell gets the configuration that is best there.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dijiang_engines.errors import DijiangError
from dijiang_export.bench.kernels.cells import Cell, cell_bytes
from dijiang_export.bench.kernels.inputs import Call, Exact, Layer, exact_core, exact_features, exact_op
from dijiang_export.reference.attention import dijiang_attention

RECOMPILATIONS = 4096
TUNING_WARM_UP_MS, TUNING_MS = 2, 10
"""How long flash-linear-attention measures each configuration. Triton's 25 and 100 ms would take minutes for
all cells; 10 ms are still a hundred calls of most kernels."""
QUADRATIC_BYTES = 24 << 30
"""Most memory that the quadratic form may take."""


class PeerError(DijiangError):
    """A peer that is not installed, or that cannot do what is asked of it."""


def in_short(error: Exception) -> str:
    """What went wrong in another's code, on one line: the first paragraph, without the advice behind it."""
    paragraph = f"{type(error).__name__}: {error}".split("\n\n")[0]
    return " ".join(paragraph.split())[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Another's code runs without its warnings and log lines, which would stand between ours."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class Prepared:
    """A contestant at one cell.

    run(i) enqueues one call on set i and returns what it made. check() makes one call on set 0 outside
    any timing and returns its errors against float64; set 0 is as before afterwards.
    """

    run: Callable[[int], Any]
    check: Callable[[], dict[str, float]]
    note: str | None = None


class Contestant(Protocol):
    """Somebody to measure."""

    name: str

    def prepare(self, cell: Cell, layer: Layer, calls: Sequence[Call]) -> Prepared:
        """Get ready for `cell`: allocate, tune and compile; raise PeerError if it is not for this one."""
        ...


class Fla:
    """flash-linear-attention, bare or after an unfused feature map."""

    def __init__(self, *, features: bool) -> None:
        self.name = "fla-phi" if features else "fla"
        # Read at import: choices kept on disk would outlive the cell that they were made for.
        os.environ["FLA_CACHE_RESULTS"] = "0"
        try:
            from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
        except Exception as error:  # another's package may fail to import in any way
            raise PeerError(
                "flash-linear-attention is not here",
                got=in_short(error),
                hint="pip install flash-linear-attention",
            ) from error
        self._step, self._chunk = fused_recurrent_simple_gla, chunk_simple_gla
        self.tuners = _autotuners()
        self._features: Callable[..., Any] | None = compiled(_two_features) if features else None

    def prepare(self, cell: Cell, layer: Layer, calls: Sequence[Call]) -> Prepared:
        """Tune and, with a feature map, compile for `cell`."""
        for tuner in self.tuners:
            tuner.cache.clear()
        kernel = self._step if cell.phase == "decode" else self._chunk
        features, proj = self._features, layer.proj.to(calls[0].qkv.dtype)
        sets = [call.heads(layer.attributes) for call in calls]
        if features is None:
            phi = [(exact_features(layer, q).to(q.dtype), exact_features(layer, k).to(k.dtype), v)
                   for q, k, v in sets]  # fmt: skip
            sets = phi

        def run(i: int) -> Any:
            q, k, v = sets[i]
            if features is not None:
                q, k = features(q, k, proj)
            return kernel(
                q=q, k=k, v=v, g_gamma=layer.log_decay, scale=1.0,
                initial_state=calls[i].state, output_final_state=True,
            )  # fmt: skip

        def check() -> dict[str, float]:
            q, k, v = sets[0]
            if features is not None:
                q, k = exact_features(layer, q), exact_features(layer, k)
            return exact_core(layer, q, k, v, calls[0].state).errors(*run(0))

        return Prepared(run, check)


class TorchCompile:
    """The reference, compiled: the recurrence for one token, the quadratic form for more."""

    name = "torch-compile"

    def __init__(self) -> None:
        self._op = compiled(dijiang_attention)

    def prepare(self, cell: Cell, layer: Layer, calls: Sequence[Call]) -> Prepared:
        """Compile for `cell`.

        Raises:
            PeerError: the quadratic form would take too much memory.
        """
        scores = 3 * 4 * cell.batch * cell.shape.heads * cell.length**2
        if cell.phase == "prefill" and scores > QUADRATIC_BYTES:
            raise PeerError(
                "the compiled reference is quadratic", got=f"{scores / 1e9:.0f} GB",
                expected=f"at most {QUADRATIC_BYTES / 1e9:.0f} GB",
            )  # fmt: skip
        form = "recurrent" if cell.phase == "decode" else "parallel"

        def run(i: int) -> Any:
            call = calls[i]
            return self._op(
                call.qkv, call.gate, call.state, call.positions, call.seq_lens, layer.proj,
                layer.norm_weight, layer.norm_bias, layer.inv_freq,
                decay=layer.decay, attributes=layer.attributes, form=form,
            )  # fmt: skip

        def check() -> dict[str, float]:
            return exact_op(layer, calls[0]).errors(*run(0))

        return Prepared(run, check, note=f"{form} form")


class Copy:
    """What the memory allows: as many bytes as the op must move, half read and half written."""

    name = "copy"

    def prepare(self, cell: Cell, layer: Layer, calls: Sequence[Call]) -> Prepared:
        """Allocate source and destination for each set."""
        names = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
        half = cell_bytes(cell, names[calls[0].qkv.dtype]).op // 2 // 16 * 16  # type: ignore[arg-type]
        device = calls[0].qkv.device
        draw = torch.Generator(device).manual_seed(2)
        size = (len(calls), half)
        source = torch.randint(256, size, generator=draw, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)

        def run(i: int) -> Any:
            return target[i].copy_(source[i])

        def check() -> dict[str, float]:
            run(0)
            exact = source[0].double()
            return Exact(exact, exact).errors(target[0], target[0])

        return Prepared(run, check)


PEERS: dict[str, Callable[[], Contestant]] = {
    "fla": lambda: Fla(features=False),
    "fla-phi": lambda: Fla(features=True),
    "torch-compile": TorchCompile,
    "copy": Copy,
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile, anew for every shape, however many there are."""
    from torch._dynamo import config

    for limit in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit",
                  "accumulated_cache_size_limit"):  # fmt: skip
        if hasattr(config, limit):  # named differently by PyTorch's versions
            setattr(config, limit, RECOMPILATIONS)
    return torch.compile(function, dynamic=False)


def _two_features(q: Tensor, k: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    return torch.softmax(q @ proj, dim=-1), torch.softmax(k @ proj, dim=-1)


def _autotuners() -> list[Any]:
    """The autotuners behind the two functions, told to be quick; none if fla has changed its modules."""
    from importlib import import_module

    found = []
    kernels = (
        ("fla.ops.common.fused_recurrent", "fused_recurrent_fwd_kernel"),
        ("fla.ops.common.chunk_h", "chunk_fwd_kernel_h"),
        ("fla.ops.common.chunk_o", "chunk_fwd_kernel_o"),
    )
    for module, name in kernels:
        try:
            tuner = getattr(import_module(module), name, None)
        except ImportError:
            continue
        while tuner is not None and not hasattr(tuner, "configs"):  # below the heuristics
            tuner = getattr(tuner, "fn", None)
        if tuner is not None and isinstance(getattr(tuner, "cache", None), dict):
            tuner.do_bench = _quick_bench
            found.append(tuner)
    return found


def _quick_bench(kernel_call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
    from triton.testing import do_bench

    return do_bench(kernel_call, warmup=TUNING_WARM_UP_MS, rep=TUNING_MS, quantiles=quantiles)


@dataclass
class Roster:
    """Who takes part, and why others do not."""

    contestants: list[Contestant] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


def make_roster(names: Sequence[str]) -> Roster:
    """The peers of these names that work here; for the others, the reason in one line."""
    roster = Roster()
    for name in names:
        try:
            roster.contestants.append(PEERS[name]())
        except PeerError as error:
            roster.absent[name] = "; ".join(x for x in (error.what, error.got, error.hint) if x)
    return roster
