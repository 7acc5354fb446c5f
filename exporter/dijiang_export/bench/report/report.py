"""Put records of `bench run` and `bench peers` side by side.

TensorRT and PyTorch seldom share a Python, so each is measured by a process of its own and saved as JSON;
this module reads what they saved, and needs neither. Everything becomes points: a series, a batch, a number
of tokens, and the median seconds there.

    decode    seconds of one token of every row, over the tokens before it
    prefill   seconds of one call, over the tokens of each row

Floors are the bytes that a step must move over the best rate that any of the records measured on the same
hardware: every weight but the embedding once, a recurrent state read and written, a KV cache read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

from dijiang_engines.errors import UsageError
from dijiang_export.bench.bundle import KIND as RUN_KIND
from dijiang_export.bench.peers.measure import KIND as PEERS_KIND
from dijiang_export.bench.report.records import (
    MOST_RECORDS,
    PEERS,
    RUN,
    Record,
    RecordError,
    check,
    read_json,
    rows,
)

KIND = "bench-report"
RULES = {RUN_KIND: RUN, PEERS_KIND: PEERS}

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True)
class Point:
    """One figure."""

    series: str
    phase: Phase
    batch: int
    tokens: int
    seconds: float
    low: float | None = None
    """10th percentile; None where there is only one number."""
    high: float | None = None
    """90th percentile."""


@dataclass(frozen=True)
class LoopRow:
    """The loop of `generate` beside the GPU's own time."""

    series: str
    batch: int
    position: int
    seconds: float
    gpu: float | None
    overhead: float | None
    floor: float | None
    """Seconds that the step's bytes take."""


@dataclass
class Report:
    """Records side by side."""

    records: list[Record]
    points: list[Point] = field(default_factory=list)
    loops: list[LoopRow] = field(default_factory=list)
    memory: list[tuple[str, str, int]] = field(default_factory=list)
    """(series, kind, bytes)."""
    sources: list[str] = field(default_factory=list)
    """A line on each record: model, hardware, versions."""
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    """(series, what, why)."""
    notes: list[str] = field(default_factory=list)
    base: str | None = None
    """The series that others are compared with."""
    _index: dict[tuple[str, str, int, int], Point] = field(default_factory=dict, repr=False)
    _indexed: int = 0

    def series(self, phase: Phase) -> list[str]:
        """Names in the order of the records; floors last."""
        names = list(dict.fromkeys(p.series for p in self.points if p.phase == phase))
        return sorted(names, key=lambda name: name.startswith("floor"))

    def at(self, series: str, phase: Phase, batch: int, tokens: int) -> Point | None:
        """One figure, if it was measured."""
        for point in self.points[self._indexed :]:  # what came since the last call
            self._index.setdefault((point.series, point.phase, point.batch, point.tokens), point)
        self._indexed = len(self.points)
        return self._index.get((series, phase, batch, tokens))

    def ratio(self, point: Point) -> float | None:
        """How many times longer it took than the base at the same place; None for the base itself."""
        base = None if self.base is None else self.base_at(point)
        own = base is None or point.series == base.series or point.series.startswith("floor")
        return None if base is None or own else point.seconds / base.seconds

    def base_at(self, point: Point) -> Point | None:
        """The base's figure at the place of `point`: the loop for steps, the runner's call for prefills."""
        assert self.base is not None
        name = self.base if point.phase == "decode" else self.base.rsplit(", ", 1)[0]
        return self.at(name, point.phase, point.batch, point.tokens)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, the records included, so that the document can be read back as them."""
        return {
            "kind": KIND,
            "base": self.base,
            "sources": self.sources,
            "points": [asdict(p) | {"times_base": self.ratio(p)} for p in self.points],
            "loops": [asdict(row) for row in self.loops],
            "memory": [{"series": s, "kind": k, "bytes": b} for s, k, b in self.memory],
            "left_out": [{"series": s, "what": w, "why": y} for s, w, y in self.left_out],
            "notes": self.notes,
            "records": self.records,
        }


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Read saved documents; a merged one stands for those in it.

    Raises:
        RecordError: a file is missing, or no such document.
        UsageError: there is no file.
    """
    if not paths:
        raise UsageError("there is no record to report on", hint="save one with `bench run --save a.json`")
    records: list[Record] = []
    for path in paths:
        for record in _documents(path):
            if record not in records:
                records.append(record)
    return records


def _documents(path: Path) -> Iterator[Record]:
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("run"), dict):  # of `bench export --run`
        data = data["run"]
    documents = [data]
    if isinstance(data, dict) and data.get("kind") == KIND:
        documents = data.get("records") or [None]
        rows(lambda _value, _where: None, MOST_RECORDS)(documents, "records")
    for document in documents:
        rule = RULES.get(kind) if isinstance(kind := _kind(document), str) else None
        if rule is None:
            raise RecordError(
                f"{path} is not a record of `bench run` or `bench peers`",
                got=f"kind {kind!r}"[:200],
                hint="save one with `bench run --save FILE` or `bench peers --save FILE`",
            )
        yield check(document, rule, path)


def _kind(document: Any) -> Any:
    if not isinstance(document, dict):
        return None
    return document.get("kind", RUN_KIND if "bench" in document else None)


def make_report(records: Sequence[Record]) -> Report:
    """Turn records into points, in their order."""
    report = Report(list(records))
    rates = _rates(records)
    taken: set[str] = set()
    floors: dict[str, Any] = {}
    for record in records:
        rate = rates.get(_hardware(record))
        if record.get("kind", RUN_KIND) == PEERS_KIND:
            _add_peers(report, record, rate, taken, floors)
        else:
            _add_run(report, record, rate, taken, floors)
    hardware = list(dict.fromkeys(_hardware(record) for record in records))
    if len(hardware) > 1:
        report.notes.append(f"the records come from different hardware: {', '.join(hardware)}")
    for name in hardware:
        rate = rates.get(name)
        text = "not measured, so there are no floors" if rate is None else f"{rate / 1e9:,.0f} GB/s measured"
        report.notes.append(f"memory of {name}: {text}")
    return report


def _hardware(record: Record) -> str:
    if record.get("device", "cpu") == "cpu":
        return str(record["machine"]["cpu"])
    gpu = record.get("gpu") or next(iter(record["machine"]["gpus"]), None)
    return "a GPU" if gpu is None else str(gpu["name"])


def _rates(records: Sequence[Record]) -> dict[str, float]:
    """By hardware, the most bytes a second that a record reached, reading or copying."""
    rates: dict[str, float] = {}
    for record in records:
        found = record["bandwidth"] if record.get("kind") == PEERS_KIND else record["bench"]["bandwidth"]
        if found is not None:
            name = _hardware(record)
            rates[name] = max(rates.get(name, 0.0), found["read"], found["copy"])
    return rates


def _unique(name: str, extra: str, taken: set[str]) -> str:
    """A label that no other record has."""
    candidates = chain((name, f"{name} ({extra})"), (f"{name} ({extra}, {n})" for n in count(2)))
    label = next(c for c in candidates if c not in taken)
    taken.add(label)
    return label


def _point(series: str, phase: Phase, batch: int, tokens: int, timing: dict[str, Any]) -> Point:
    return Point(series, phase, batch, tokens, timing["median"], timing["low"], timing["high"])


def _add_run(
    report: Report, record: Record, rate: float | None, taken: set[str], floors: dict[str, Any]
) -> None:
    found = record["bench"]
    name = _unique(f"{found['runner']} {found['dtype']}", record["model"]["name"], taken)
    report.sources.append(
        f"{name}: {record['model']['name']}, {record['model']['parameters'] / 1e6:.1f} M parameters, "
        f"{_hardware(record)}, {_versions(record['versions'])}, {record['validated']}"
    )
    places: list[tuple[int, int]] = []
    for row in found["steps"]:
        places.append((row["batch"], row["position"]))
    loops = found.get("loops", ())
    for row in loops:
        report.points.append(
            _point(f"{name}, generate", "decode", row["batch"], row["position"], row["timing"])
        )
        places.append((row["batch"], row["position"]))
    for row in found["steps"]:
        report.points.append(_point(f"{name}, step", "decode", row["batch"], row["position"], row["timing"]))
        if row.get("gpu") is not None:
            report.points.append(_point(f"{name}, GPU", "decode", row["batch"], row["position"], row["gpu"]))
    for row in found["prefill"]:
        report.points.append(_point(name, "prefill", row["batch"], row["length"], row["timing"]))
    if report.base is None:
        report.base = f"{name}, {'generate' if loops else 'step'}"
    own = {"weights": found["step_bytes"], "per_row": 2 * found["state_bytes"], "per_token": 0}
    for row in loops:
        floor = None if rate is None else _floor(own, row["batch"], row["position"], rate)
        report.loops.append(
            LoopRow(
                name,
                row["batch"],
                row["position"],
                row["timing"]["median"],
                row["gpu"],
                row["overhead"],
                floor,
            )
        )
    for kind, size in (found.get("memory") or {}).items():
        report.memory.append((name, kind, size))
    _add_floor(report, f"floor, DiJiang {found['dtype']}", record["model"]["name"], own, places, rate, floors)
    report.notes += [f"{name}: {note}" for note in found["notes"]]


def _add_peers(
    report: Report, record: Record, rate: float | None, taken: set[str], floors: dict[str, Any]
) -> None:
    dtype, model = record["plan"]["dtype"], record["model"]["name"]
    told = False
    for peer in record["peers"]:
        name = _unique(f"{peer['name']} {dtype}", model, taken)
        if not told and peer["versions"]:
            report.sources.append(f"peers: {model}, {_hardware(record)}, {_versions(peer['versions'])}")
            told = True
        for row in peer["decode"]:
            report.points.append(_point(name, "decode", row["batch"], row["context"], row["timing"]))
        for row in peer["prefill"]:
            form = f", {row['form']}" if row["form"] else ""
            report.points.append(
                _point(f"{name}{form}", "prefill", row["batch"], row["length"], row["timing"])
            )
        peaks = [row["peak_bytes"] for row in peer["decode"] if row["peak_bytes"] is not None]
        if peaks:
            report.memory.append((name, "most while decoding", max(peaks)))
        report.memory += [(name, kind, size) for kind, size in _process_memory(peer)]
        report.left_out += [(name, left["what"], left["why"]) for left in peer["left_out"]]
        if peer["error"] is not None:
            report.left_out.append((name, "the rest", peer["error"]))
        notes = dict.fromkeys(note for row in (*peer["decode"], *peer["prefill"]) for note in row["notes"])
        report.notes += [f"{name}: {note}" for note in notes]
    for family, title in (("dijiang", "DiJiang"), ("hf", "softmax attention")):
        peers = [
            peer for peer in record["peers"] if peer["name"].startswith("dijiang") == (family == "dijiang")
        ]
        places = [(row["batch"], row["context"]) for peer in peers for row in peer["decode"]]
        size = record["floor_bytes"][family]
        _add_floor(report, f"floor, {title} {dtype}", "peers", size, places, rate, floors)


def _process_memory(peer: Record) -> Iterator[tuple[str, int]]:
    """Of one row: the process's resident memory while it decodes, and what of it holds the context."""
    for row in peer["decode"]:
        if row["batch"] == 1:
            found = row.get("process_bytes") or {}
            process = found.get("proportional") or found.get("timing")
            for kind, size in (
                ("process while decoding", process),
                ("cache or state", row.get("context_bytes")),
            ):
                if size is not None and row["peak_bytes"] is None:
                    yield f"{kind} after {row['context']:,} tokens", size


def _floor(size: dict[str, int], batch: int, tokens: int, rate: float) -> float:
    return (size["weights"] + batch * (size["per_row"] + tokens * size["per_token"])) / rate


def _add_floor(
    report: Report,
    name: str,
    model: str,
    size: dict[str, int],
    places: Sequence[tuple[int, int]],
    rate: float | None,
    floors: dict[str, Any],
) -> None:
    """Floors at `places`; records of one size and one rate share a series, others get `model` behind it."""
    if rate is None:
        return
    if floors.setdefault(name, (size, rate)) != (size, rate):
        name = f"{name} ({model})"
        if floors.setdefault(name, (size, rate)) != (size, rate):
            return
    for batch, tokens in dict.fromkeys(places):
        if report.at(name, "decode", batch, tokens) is None:
            report.points.append(Point(name, "decode", batch, tokens, _floor(size, batch, tokens, rate)))


def _versions(versions: dict[str, str]) -> str:
    shown = ("tensorrt", "onnxruntime-gpu", "onnxruntime", "openvino", "torch", "transformers")
    return ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)
