"""bench peers --checkpoint: a softmax model from its folder beside a bundle, on a CPU, with tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.checkpoints import llama, neox, of_family, opt

from dijiang_engines.bench.timing import Timing
from dijiang_engines.errors import RunnerError, UsageError
from dijiang_export.bench.peers import measure as bench_peers
from dijiang_export.bench.peers.bundle import BundlePeer
from dijiang_export.bench.peers.figures import BLOCK, LeftOut, deviations
from dijiang_export.bench.peers.hf import ROOM, HuggingFace
from dijiang_export.bench.peers.measure import PeerResult, measure_peers, pooled, run_peer, step_floor_bytes
from dijiang_export.bench.peers.run import measure
from dijiang_export.bench.peers.settings import BUNDLE, GENAI, PeerSettings, read_spec, shape_of
from dijiang_export.cli import main
from dijiang_export.convert import convert_checkpoint
from dijiang_export.export.to_onnx import export_bundle

CPU = torch.device("cpu")
FAMILIES = ["gpt_neox", "llama", "opt"]


def settings_of(folder: Path, **changes: Any) -> PeerSettings:
    shape = shape_of(read_spec(folder))
    base = PeerSettings(
        shape, "float32", "cpu", contexts=(9,), lengths=(12,), seconds=0.0, backend="eager",
        checkpoint=str(folder),
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A LLaMA with grouped keys and values."""
    return llama(kv_heads=2, vocab=260).vanilla().with_tokenizer().save(tmp_path / "teacher")


@pytest.fixture
def bundle(teacher: Path, tmp_path: Path) -> Path:
    convert_checkpoint(teacher, tmp_path / "converted")
    export_bundle(tmp_path / "converted", tmp_path / "a.bundle", dtype="float32", cases="short")
    return tmp_path / "a.bundle"


def collect(name: str, settings: PeerSettings) -> dict[str, list[Any]]:
    said: dict[str, list[Any]] = {}

    def say(**what: Any) -> None:
        for key, value in json.loads(json.dumps(what, allow_nan=False)).items():
            said.setdefault(key, []).append(value)

    measure(name, settings, say)
    return said


def generated(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers' own `generate` appends to `ids`, greedily, over an end of text too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=BLOCK, do_sample=False)
    return whole[:, ids.shape[1] :]


# -- each peer computes the folder's model ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eager", "static", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers_generate(family: str, mode: str, tmp_path: Path) -> None:
    folder = of_family(family).vanilla().save(tmp_path / "teacher")
    peer = HuggingFace(settings_of(folder), CPU, mode)
    with torch.no_grad():
        state = peer._rng.get_state()
        prepared = peer.decode(1, 9)
        peer._rng.set_state(state)
        wanted = generated(folder, peer._tokens(1, 10))
        for _ in range(2):
            prepared.reset()
            assert torch.equal(prepared.run(), wanted[:, -1:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "room"), [("hf-eager", 0), ("hf-static", ROOM)])
def test_figures_come_with_memory(family: str, name: str, room: int, tmp_path: Path) -> None:
    folder = of_family(family).vanilla().save(tmp_path / "teacher")
    said = collect(name, settings_of(folder))
    assert "left_out" not in said, said["left_out"]
    [row] = said["decode"]
    spec = read_spec(folder)
    assert row["context_bytes"] == 2 * 4 * spec.num_layers * spec.num_kv_heads * spec.head_dim * (9 + room)
    assert row["read_seconds"] > 0
    assert len(row["seconds"]) == row["timing"]["calls"]
    sizes = row["process_bytes"]
    assert 1e7 < sizes["proportional"] <= sizes["timing"]
    assert sizes["preparing"] > 1e7
    assert [r["length"] for r in said["prefill"]] == [12]


def test_a_bundle_is_a_peer(teacher: Path, bundle: Path) -> None:
    """Its tokens are those of the PyTorch reference, which reads the whole text for each."""
    from dijiang_export.checkpoint.checkpoint import open_checkpoint
    from dijiang_export.reference.model import ReferenceModel

    peer = BundlePeer(settings_of(teacher, bundle=str(bundle), threads=1))
    state = peer._rng.bit_generator.state
    prepared = peer.decode(1, 70)
    peer._rng.bit_generator.state = state
    ids = torch.as_tensor(peer._tokens(1, 71))
    with open_checkpoint(bundle.parent / "converted") as checkpoint:
        model = ReferenceModel(checkpoint.spec, dtype=torch.float64)
        model.load_state_dict(checkpoint.load_state_dict(torch.float64))
    with torch.no_grad():
        for _ in range(BLOCK):
            ids = torch.cat([ids, model(ids, form="parallel", all_logits=False)[0].argmax(-1)], 1)
    for _ in range(2):
        prepared.reset()
        assert prepared.run().tolist() == ids[:, -1:].tolist()
    assert prepared.error < 1e-4
    assert prepared.context_bytes == read_spec(teacher).state_bytes
    assert peer.prefill("", 1, 30).error < 1e-4


def test_a_bundles_process_has_no_pytorch(teacher: Path, bundle: Path) -> None:
    """Its memory is compared: what it does not need must not be loaded."""
    wanted = json.dumps(settings_of(teacher, bundle=str(bundle)).to_json())
    code = (
        "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\n"
        f"sys.argv = ['run', {BUNDLE!r}, {wanted!r}]\n"
        "from dijiang_export.bench.peers.run import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["decode"]["context"] for line in said if "decode" in line] == [9]
    assert not any("left_out" in line for line in said)


def test_genai_computes_what_transformers_does(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    from dijiang_export.bench.peers.genai import GenaiPeer

    with bench_peers._built(settings_of(teacher), [GENAI], 300) as (settings, refused):
        assert refused is None
        peer = GenaiPeer(settings)
        state = peer._rng.bit_generator.state
        prepared = peer.decode(1, 9)
        peer._rng.bit_generator.state = state
        ids = torch.as_tensor(peer._tokens(1, 10))[None]
        wanted = generated(teacher, ids)
        for _ in range(2):
            prepared.reset()
            assert int(prepared.run()) == int(wanted[0, -1])
        assert prepared.error < 1e-4
        assert peer.prefill("", 1, 12).error < 1e-4


# -- positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_at_the_last_context_end_with_the_positions(family: str, tmp_path: Path) -> None:
    folder = of_family(family, positions=64).vanilla().save(tmp_path / "teacher")
    settings = settings_of(folder, contexts=(20, 64), lengths=(64,))
    settings.check()
    assert [settings.start(n) for n in (20, 47, 48, 64)] == [20, 47, 47, 47]
    said = collect("hf-eager", settings)
    assert "left_out" not in said, said["left_out"]
    assert [row["context"] for row in said["decode"]] == [20, 64]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", [{"contexts": (65,)}, {"lengths": (65,)}])
def test_a_context_that_the_model_has_not_is_refused(
    family: str, what: dict[str, Any], tmp_path: Path
) -> None:
    folder = of_family(family, positions=64).vanilla().save(tmp_path / "teacher")
    with pytest.raises(UsageError, match="no context of 65 tokens") as info:
        measure_peers(settings_of(folder, **what), ["hf-eager"])
    assert "at most 64, its max_position_embeddings" in str(info.value)


def test_a_model_without_room_for_a_block_is_refused(tmp_path: Path) -> None:
    folder = opt(positions=BLOCK).vanilla().save(tmp_path / "teacher")
    with pytest.raises(UsageError, match="too few positions"):
        measure_peers(settings_of(folder, contexts=(4,), lengths=()), ["hf-eager"])


# -- what cannot be measured -----------------------------------------------------------------------------


def test_a_dijiang_checkpoint_is_not_a_softmax_model(tmp_path: Path) -> None:
    folder = llama().save(tmp_path / "dijiang")
    with pytest.raises(LeftOut, match="unexpected keys in the checkpoint"):
        HuggingFace(settings_of(folder), CPU, "eager")
    with pytest.raises(RunnerError, match="unexpected keys in the checkpoint"):
        measure_peers(settings_of(folder, lengths=()), ["hf-eager"])


def test_genai_is_optional_and_its_types_are_said(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = settings_of(teacher, dtype="bfloat16")
    with bench_peers._built(half, [GENAI], 60) as (_, refused):
        assert refused == "it is built in float32 for CPUs alone"
    monkeypatch.setattr(bench_peers, "command_for", _without_genai)
    with pytest.raises(RunnerError, match=r"(?s)could not be built.*pip install onnxruntime-genai"):
        measure_peers(settings_of(teacher), [GENAI])


def _without_genai(module: str, *arguments: str) -> list[str]:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; sys.modules['onnxruntime_genai'] = None; "
        f"sys.argv = ['x', *{arguments!r}]; import {module} as m; m.main()"
    )
    return [sys.executable, "-c", code]


def test_a_bundle_of_another_type_or_model_is_left_out(teacher: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(LeftOut, match="not a bundle in bfloat16"):
        BundlePeer(settings_of(teacher, bundle=str(bundle), dtype="bfloat16"))
    with pytest.raises(LeftOut, match="a peer on the CPU"):
        BundlePeer(settings_of(teacher, bundle=str(bundle), device="cuda"))
    other = neox(vocab=300).vanilla().save(tmp_path / "other")
    with pytest.raises(LeftOut, match="another vocabulary"):
        BundlePeer(settings_of(other, bundle=str(bundle)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "TEACHER", "--layers", "3"], "leave out --layers"),
        (["--checkpoint", "TEACHER", "--shape", "pythia-70m"], "leave out --shape"),
        (["--checkpoint", "TEACHER", "--peer", "dijiang-eager"], "a checkpoint has no peer 'dijiang-eager'"),
        (["--checkpoint", "TEACHER", "--peer", BUNDLE], f"a checkpoint has no peer '{BUNDLE}'"),
        (["--checkpoint", "TEACHER", "--context", "129", "--no-prefill"], "no context of 129 tokens"),
        (["--bundle", "TEACHER"], "measured beside a checkpoint"),
    ],
)
def test_wrong_words(
    words: list[str], message: str, teacher: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [str(teacher) if word == "TEACHER" else word for word in words]
    assert main(["bench", "peers", "--device", "cpu", *given]) == 2
    assert message in capfd.readouterr().err


def test_a_folder_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", "--device", "cpu", "--checkpoint", str(tmp_path / "no")]) == 1
    assert "is not a folder" in capfd.readouterr().err


# -- turns, and the command --------------------------------------------------------------------------------


def row_of(seconds: list[float], memory: int, **more: Any) -> dict[str, Any]:
    return {
        "batch": 1, "context": 9, "timing": asdict(Timing.of(seconds)), "seconds": seconds, "error": 0.0,
        "compile_seconds": 1.0, "peak_bytes": None, "notes": [], "read_seconds": 2.0, "context_bytes": 5,
        "process_bytes": {"preparing": memory, "timing": memory, "proportional": None},
    } | more  # fmt: skip


def test_turns_are_pooled() -> None:
    first = PeerResult("x", None, 3.0, decode=[row_of([1.0, 2.0], 10, notes=["a"])])
    again = PeerResult("x", "stopped", 4.0, decode=[
        row_of([6.0], 20, error=0.5, read_seconds=1.5, notes=["a", "b"]), row_of([1.0], 1, context=30)
    ], left_out=[{"what": "w", "why": "y"}])  # fmt: skip
    both = pooled(first, again)
    row, other = both.decode
    assert row["seconds"] == [1.0, 2.0, 6.0]
    assert (row["timing"]["median"], row["timing"]["calls"], row["rounds"]) == (2.0, 3, [1.5, 6.0])
    assert (row["error"], row["read_seconds"], row["notes"]) == (0.5, 1.5, ["a", "b"])
    assert row["process_bytes"] == {"preparing": 20, "timing": 20, "proportional": None}
    assert other["context"] == 30
    assert (both.error, both.seconds, both.left_out) == ("stopped", 7.0, [{"what": "w", "why": "y"}])
    assert pooled(both, first).left_out == both.left_out


def test_the_command_takes_turns_and_its_record_can_be_reported(
    teacher: Path, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "peers.json"
    words = ["bench", "peers", "--device", "cpu", "--checkpoint", str(teacher), "--bundle", str(bundle),
             "--peer", "hf-eager", "--peer", BUNDLE, "--context", "9", "--no-prefill", "--seconds", "0.01",
             "--threads", "1", "--rounds", "2", "--save", str(saved)]  # fmt: skip
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "process while decoding after 9 tokens" in out
    record = json.loads(saved.read_text())
    assert record["model"]["name"] == "teacher"
    assert [len(peer["decode"][0]["rounds"]) for peer in record["peers"]] == [2, 2]
    assert record["floor_bytes"] == step_floor_bytes(read_spec(teacher), "float32")
    assert main(["bench", "report", str(saved), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert {p["series"] for p in report["points"]} == {
        "hf-eager float32", f"{BUNDLE} float32", "floor, DiJiang float32", "floor, softmax attention float32"
    }  # fmt: skip
    kinds = {(m["series"], m["kind"]): m["bytes"] for m in report["memory"]}
    assert kinds[f"{BUNDLE} float32", "cache or state after 9 tokens"] == read_spec(teacher).state_bytes


def test_a_peer_of_a_checkpoint_runs_in_a_process_of_its_own(teacher: Path) -> None:
    result = run_peer(settings_of(teacher), "hf-static", 120)
    assert result.error is None
    assert result.left_out == []
    assert [row["context"] for row in result.decode] == [9]


def test_deviations_are_those_of_pytorch() -> None:
    found, want = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 3.0, 5.0])
    assert deviations(found, want) == pytest.approx(float((found - want).abs().max() / want.std()))
    assert deviations([float("nan")], [1.0]) == float("inf")
