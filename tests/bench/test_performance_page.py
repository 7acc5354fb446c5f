"""docs/performance.md quotes the records of the memory's rate and of the products of few rows, row by row."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from support.paths import ROOT

EVIDENCE = ROOT / "docs/evidence"
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EVIDENCE / name).read_text(encoding="utf-8"))
    return found


def test_the_products_table_is_the_records() -> None:
    """Floors are recomputed here, from bytes and the better rate of plain copies."""
    found = record("linear-times-h100.json")
    rows = []
    for name, each in found.items():
        if not name.endswith(" ms"):
            continue
        floor = 1e3 * each["weight_bytes"] / max(found["rates"])
        step, products = each["step"], each["products"]
        rows.append(
            f"| {name.removesuffix(' rows, ms')} | {floor:.3f} ms | {step:.3f} ms, {floor / step:.0%} | "
            f"{products:.3f} ms, {floor / products:.0%} | {each['first'] + each['second']:.3f} ms | "
            f"{each['cublas']:.3f} ms |"
        )
    assert len(rows) == 6
    assert "\n".join(rows) in PAGE


def test_the_table_of_copies_is_the_records() -> None:
    rates = record("memory-rate-h100.json")["gb_s"]
    kinds = ("stream", "cuda-bindings", "graph", "kernel", "kernel, graph")
    rows = [
        "| " + " | ".join([f"{size} MiB", *(f"{rates[f'{size} MiB, turn 1'][k]:.0f}" for k in kinds)]) + " |"
        for size in (256, 512, 1024, 4096)
    ]
    assert "\n".join(rows) in PAGE
    for size in (512, 1024, 2048, 4096):
        for turn in (1, 2):
            found = rates[f"{size} MiB, turn {turn}"]
            assert 0.175 < 1 - found["graph"] / found["stream"] < 0.195  # "18 to 19% slower"


def test_the_floor_of_the_benchmark_is_that_of_plain_copies() -> None:
    """Both ways of measuring agree, and the rate in the record of products is what they give."""
    plain = record("memory-rate-h100.json")["gb_s"]["1024 MiB, turn 1"]
    assert plain["cuda-bindings"] == pytest.approx(plain["stream"], rel=0.01)
    assert record("linear-times-h100.json")["memory_gb_s"] == pytest.approx(plain["stream"], rel=0.01)


def test_shares_on_the_h200_are_of_its_plain_copy() -> None:
    peers = record("engines-peers-410m-plugin-products-h200.json")
    size = peers["floor_bytes"]["dijiang"]
    rate = peers["bandwidth"]["copy"]
    step = record("engines-410m-float16-plugin-products-h200.json")["times"]["steps"][0]["gpu_us"] / 1e6
    floor = (size["weights"] + size["per_row"]) / rate
    assert f"take {1e3 * floor:.3f} ms at {rate / 1e12:.2f} TB/s" in PAGE
    assert re.search(rf"is {step / floor:.1f} times that, {floor / step:.0%} of the\smemory's rate", PAGE)

    text = (EVIDENCE / "engines-linear-h200.txt").read_text(encoding="utf-8")
    alone = json.loads(re.search(r"^\{\n.*?^\}\n", text, re.MULTILINE | re.DOTALL)[0])  # type: ignore[index]
    for shape, words in (("410m", "35% by its weights"), ("2.8b", "2.28 ms, 60%")):
        times = alone[f"{shape}, 1 rows, ms"]
        plain = times["floor"] * alone["copy_gb_s"] * 1e9 / rate
        assert f"{plain / times['step']:.0%}" in words
        assert words in PAGE


def test_the_table_of_contexts_is_the_record() -> None:
    found = record("decode-context-cpu.json")
    peers = {peer["name"]: {row["context"]: row for row in peer["decode"]} for peer in found["peers"]}
    rows = []
    for context in (128, 2048, 8192):
        cache, state = peers["ort-genai"][context], peers["dijiang-bundle"][context]
        seconds = [row["timing"]["median"] for row in (state, cache)]
        held = [row["context_bytes"] / 1e6 for row in (state, cache)]
        process = [row["process_bytes"]["proportional"] / 1e6 for row in (state, cache)]
        rows.append(
            f"| {context:,} | {1 / seconds[0]:.1f} | {1 / seconds[1]:.1f} | {seconds[1] / seconds[0]:.2f} | "
            f"{held[0]:.1f} MB | {held[1]:.1f} MB | {process[0]:,.0f} MB | {process[1]:,.0f} MB |"
        )
    assert "\n".join(rows) in PAGE
