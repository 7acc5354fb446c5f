"""bench peers: others at a model's shape. On a CPU, with tiny shapes; what needs a GPU is skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dijiang_engines.bench.bandwidth import Bandwidth, measure_bandwidth
from dijiang_engines.errors import RunnerError, UsageError
from dijiang_export.bench.peers import measure as bench_peers
from dijiang_export.bench.peers import run as bench_peers_run
from dijiang_export.bench.peers import tools as bench_peers_tools
from dijiang_export.bench.peers.dijiang import Dijiang
from dijiang_export.bench.peers.figures import BLOCK, LeftOut, Prepared, wrong
from dijiang_export.bench.peers.hf import HuggingFace
from dijiang_export.bench.peers.measure import measure_peers, run_peer, step_floor_bytes
from dijiang_export.bench.peers.run import measure
from dijiang_export.bench.peers.settings import PEERS, PeerSettings, neox_spec
from dijiang_export.bench.peers.tools import error_of
from dijiang_export.bench.random_checkpoint import SHAPES, Shape, write_random_checkpoint
from dijiang_export.cli import main

TINY = Shape(layers=2, hidden=64, heads=4, intermediate=96, vocab=260, positions=512)
ONE_LAYER = replace(TINY, layers=1)
"""Where what is asked of the compiler is beside the point: its tracing takes longer with every layer."""
CPU = torch.device("cpu")
# "eager": torch.compile traces as ever, but nothing has to be compiled.
SETTINGS = PeerSettings(
    TINY, "float32", "cpu", batches=(1, 2), contexts=(5, 24), lengths=(16, 70), seconds=0.0, backend="eager"
)
SIZES = ["--layers", "2", "--hidden", "64", "--heads", "4", "--intermediate", "96", "--vocab", "260"]


def collect(name: str, settings: PeerSettings = SETTINGS) -> dict[str, list[Any]]:
    """What a peer says, run in this process, with a small buffer for the memory's rate."""
    said: dict[str, list[Any]] = {}

    def say(**what: Any) -> None:
        for key, value in json.loads(json.dumps(what, allow_nan=False)).items():
            said.setdefault(key, []).append(value)

    def memory_rate(_: torch.device, threads: int) -> Bandwidth:
        return measure_bandwidth(threads, buffer_bytes=1 << 20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_peers_tools, "memory_rate", memory_rate)
        measure(name, settings, say)
    return said


# -- settings ------------------------------------------------------------------------------------------


def test_what_is_asked_of_every_peer() -> None:
    settings = replace(SETTINGS, batches=(1, 4), contexts=(128, 2048), lengths=(512, 2048, 8192))
    assert settings.decodes() == [(1, 128), (1, 2048), (4, 2048)]
    assert settings.prefills() == [(1, 512), (1, 2048), (1, 8192), (4, 512), (4, 2048)]
    assert PeerSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    nothing = replace(SETTINGS, contexts=(), lengths=())
    assert nothing.decodes() == nothing.prefills() == []


def test_the_spec_is_that_of_a_checkpoint_of_the_shape(tmp_path: Path) -> None:
    from dijiang_export.checkpoint.checkpoint import open_checkpoint

    with open_checkpoint(write_random_checkpoint(tmp_path / "c", TINY).parent) as checkpoint:
        assert checkpoint.spec == neox_spec(TINY)


def test_what_softmax_attention_reads_is_what_transformers_has() -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    shape = SHAPES["pythia-410m"]
    config = GPTNeoXConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters()) - shape.vocab * shape.hidden
    assert step_floor_bytes(neox_spec(shape), "float16")["hf"] == {
        "weights": 2 * count, "per_row": 0, "per_token": 2 * 2 * shape.layers * shape.hidden
    }  # fmt: skip


# -- each peer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf-eager", "hf-compiled", "dijiang-eager", "dijiang-compiled"])
def test_a_peer_is_checked_and_timed(name: str) -> None:
    said = collect(name)
    assert "left_out" not in said, said["left_out"]
    assert [(row["batch"], row["context"]) for row in said["decode"]] == [(1, 5), (1, 24), (2, 24)]
    forms = [""] if name.startswith("hf") else ["parallel", "chunked"]
    sizes = [(1, 16), (1, 70), (2, 16)]
    assert [(row["batch"], row["length"], row["form"]) for row in said["prefill"]] == [
        (*size, form) for size in sizes for form in forms
    ]
    for row in said["decode"] + said["prefill"]:
        assert 0 <= row["error"] < 1e-5
        assert 0 < row["timing"]["best"] <= row["timing"]["median"]
        assert row["timing"]["calls"] == bench_peers_run.LEAST
        assert row["notes"] == []
    assert {"torch", "transformers"} <= set(said["versions"][0])
    assert said["bandwidth"][0]["read"] > 1e8


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("kind", [HuggingFace, Dijiang])
def test_decoding_goes_on_from_the_right_place_each_time(kind: Any, mode: str) -> None:
    """The block's last token is what the whole text gives, greedily, after any number of runs."""
    peer = kind(SETTINGS, CPU, mode)
    with torch.no_grad():
        state = peer._rng.get_state()
        prepared = peer.decode(2, 9)
        peer._rng.set_state(state)
        ids = peer._tokens(2, 10)
        for _ in range(BLOCK):
            if kind is HuggingFace:
                logits = peer.model(input_ids=ids, use_cache=False).logits[:, -1:]
            else:
                logits = peer.model(ids, form="parallel", all_logits=False)[0]
            ids = torch.cat([ids, logits.argmax(-1)], 1)
        for _ in range(3):
            prepared.reset()
            assert torch.equal(prepared.run(), ids[:, -1:])


def test_a_static_cache_does_not_recompile_as_it_fills() -> None:
    from torch._dynamo.utils import counters

    peer = HuggingFace(SETTINGS, CPU, "compiled")
    with torch.no_grad():
        prepared = peer.decode(1, 12)
        before = counters["stats"]["unique_graphs"]
        for _ in range(3):
            prepared.reset()
            prepared.run()
        assert counters["stats"]["unique_graphs"] == before == 1


def test_the_chunked_form_compiles_one_layer_for_all() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    peer = Dijiang(replace(SETTINGS, shape=replace(TINY, layers=5)), CPU, "compiled")
    with torch.no_grad():
        assert peer.prefill("chunked", 1, 150).error < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def test_a_prefill_that_would_compile_for_minutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dijiang_export.bench.peers.dijiang.MOST_CHUNKS", 1)
    said = collect("dijiang-compiled", replace(SETTINGS, shape=ONE_LAYER, contexts=(), batches=(1,)))
    assert [(row["form"], row["length"]) for row in said["prefill"]] == [
        ("parallel", 16), ("chunked", 16), ("parallel", 70)
    ]  # fmt: skip
    [left] = said["left_out"]
    assert left["what"] == "prefill (chunked), batch 1, length 70"
    assert "2 chunks, at most 1" in left["why"]


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A static cache that begins one token too late."""

    def late(self: Any, token: Any, place: Any, cache: Any) -> Any:
        logits = self._call(token, place + 1, cache)
        return logits.argmax(-1), logits

    monkeypatch.setattr(HuggingFace, "_step", late)
    said = collect("hf-compiled", replace(SETTINGS, shape=ONE_LAYER, lengths=()))
    assert "decode" not in said
    assert len(said["left_out"]) == 3
    assert all("it computes something else" in left["why"] for left in said["left_out"])


def test_one_failing_figure_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    original = HuggingFace.decode

    def decode(self: HuggingFace, batch: int, context: int) -> Prepared:
        if context == 5:
            raise ValueError("no\nsuch  thing")
        return original(self, batch, context)

    monkeypatch.setattr(HuggingFace, "decode", decode)
    said = collect("hf-eager")
    assert [row["context"] for row in said["decode"]] == [24, 24]
    assert said["left_out"] == [{"what": "steps, batch 1, context 5", "why": "ValueError: no such thing"}]


def test_older_transformers_get_a_cache_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.3 the model's caller says where in a static cache the tokens go."""
    peer = HuggingFace(SETTINGS, CPU, "eager")
    seen: list[Any] = []
    forward = peer.model.forward

    def spy(**arguments: Any) -> Any:
        seen.append(arguments.pop("cache_position", None))
        return forward(**arguments)

    monkeypatch.setattr(peer.model, "forward", spy)
    peer._takes_position = True
    with torch.no_grad():
        prepared = peer.decode(1, 6)
        prepared.reset()
        prepared.run()
    assert [int(place[0]) for place in seen if place is not None] == [6, *range(6, 6 + BLOCK)]


def test_errors_are_in_standard_deviations() -> None:
    exact = torch.tensor([0.0, 2.0, 4.0])
    assert error_of(exact + torch.tensor([0.0, 0.0, 1.0]), exact) == pytest.approx(0.5)
    assert error_of(torch.tensor([0.0, float("nan"), 4.0]), exact) == float("inf")
    assert wrong(float("inf"), "float16")
    assert wrong(float("nan"), "float16")
    assert wrong(0.5, "float16")
    assert not wrong(0.02, "float16")


# -- processes -----------------------------------------------------------------------------------------

QUICK = replace(SETTINGS, batches=(1,), contexts=(8,), lengths=(8,))


def test_a_peer_runs_in_a_process_of_its_own() -> None:
    result = run_peer(QUICK, "dijiang-eager", 120)
    assert result.error is None
    assert [row["context"] for row in result.decode] == [8]
    assert [row["form"] for row in result.prefill] == ["parallel", "chunked"]
    assert result.seconds > 0
    assert result.bandwidth is not None and result.bandwidth["read"] > 1e8


def test_a_peer_that_takes_too_long_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"versions": {"torch": "1"}}, {"begin": "steps, batch 1, context 8"}, {"decode": {"batch": 1}}]
    write = "".join(f"print({json.dumps(json.dumps(line))}, flush=True); " for line in lines)
    _pretend(monkeypatch, f"import time; {write}time.sleep(60)")
    result = run_peer(QUICK, "hf-eager", 3)
    assert result.error == "stopped after 3 s, during steps, batch 1, context 8"
    assert result.decode == [{"batch": 1}]
    assert result.versions == {"torch": "1"}
    assert 3 <= result.seconds < 30


def test_a_peer_that_dies_is_reported_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, words = 'print(\'{"begin": "x"}\', flush=True)', "sys.stderr.write('first\\nlast words\\n')"
    _pretend(monkeypatch, f"import os, sys; {begin}; {words}; sys.stderr.flush(); os._exit(7)")
    result = run_peer(QUICK, "hf-eager", 60)
    assert result.error == "exit code 7, during x: first last words"


def _pretend(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the peer's interpreter run `code` instead."""
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", code], **options)

    monkeypatch.setattr(bench_peers.subprocess, "Popen", popen)


def test_graphs_need_a_gpu_and_a_missing_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = collect("hf-graph")
    assert said["left_out"] == [{"what": "everything", "why": "CUDA graphs need a CUDA device"}]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LeftOut, match="no CUDA device"):
        collect("hf-eager", replace(SETTINGS, device="cuda"))


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(RunnerError, match="no peer could be measured") as info:
        measure_peers(QUICK, ["hf-graph"], limit=120)
    assert "CUDA graphs need a CUDA device" in str(info.value)
    with pytest.raises(UsageError, match="no peer 'x'"):
        measure_peers(QUICK, ["x"])
    with pytest.raises(UsageError, match="not a multiple"):
        measure_peers(replace(QUICK, shape=replace(TINY, heads=3)), ["hf-eager"])


# -- the command ---------------------------------------------------------------------------------------


def test_the_command_measures_saves_and_can_be_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "peers.json"
    words = ["bench", "peers", *SIZES, "--dtype", "float32", "--device", "cpu", "--peer", "hf-eager",
             "--peer", "hf-graph", "--context", "8", "--length", "8", "--seconds", "0.01", "--threads", "1",
             "--backend", "eager", "--save", str(saved)]  # fmt: skip
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert "hf-eager float32" in out
    assert "CUDA graphs need a CUDA device" in out
    assert "hf-eager: 2 figures" in err
    record = json.loads(saved.read_text())
    assert (record["kind"], record["device"]) == ("bench-peers", "cpu")
    assert record["plan"]["shape"]["layers"] == 2
    assert record["command"] and record["machine"]["cpu"]
    assert main(["bench", "report", str(saved), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    series = {p["series"] for p in report["points"]}
    assert series == {"hf-eager float32", "floor, softmax attention float32"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "pythia-0b"], "there is no shape"),
        (["--peer", "vllm"], "there is no peer"),
        (["--no-prefill", "--no-decode"], "nothing to measure"),
        (["--heads", "7"], "not a multiple"),
    ],
)
def test_wrong_words(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", "--device", "cpu", *words]) == 2
    assert message in capfd.readouterr().err


def test_the_settings_need_no_torch() -> None:
    code = (
        "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "import dijiang_export.bench.peers.measure, dijiang_export.bench.bundle\n"
        "import dijiang_export.commands.bench.run\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_compiler_is_really_asked() -> None:
    settings = replace(QUICK, shape=ONE_LAYER, lengths=(), backend="inductor")  # C++ compilers are slow
    result = run_peer(settings, "dijiang-compiled", 300)
    assert result.error is None
    assert result.left_out == []
    assert result.decode


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", PEERS)
def test_a_gpu_measures(name: str) -> None:
    """CUDA graphs, whoever makes them: what no CPU can show."""
    settings = replace(QUICK, device="cuda", dtype="float16", backend="inductor", batches=(1, 2))
    result = run_peer(settings, name, 300)
    assert result.error is None
    assert result.left_out == []
    assert not [note for row in result.decode for note in row["notes"]]
    assert result.gpu is not None and result.decode[0]["peak_bytes"] > 0
