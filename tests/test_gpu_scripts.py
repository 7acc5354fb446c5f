"""tests/gpu/ort_cuda.py as far as a CPU goes, so that it works when a GPU is at hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent / "gpu"


def run(*arguments: str | Path) -> tuple[int, list[str]]:
    """Exit status and the lines that report a check."""
    command = [
        sys.executable,
        str(SCRIPTS / "ort_cuda.py"),
        *map(str, arguments),
        "--runner",
        "onnxruntime-cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    assert lines, done.stdout + done.stderr
    return done.returncode, lines


def test_every_check_and_every_lowering(tmp_path: Path) -> None:
    from dijiang_engines.shipped_sample import sample_checkpoint
    from dijiang_export.export.to_onnx import export_bundle

    bundle = export_bundle(sample_checkpoint(), tmp_path / "b", variants=("ort", "capture")).path
    code, lines = run(
        bundle,
        "--save",
        tmp_path / "r.json",
        "--seconds",
        "0.01",
        "--lengths",
        "20",
        "90",
        "--skip",
        "greedy",
    )
    assert (code, [line for line in lines if line.startswith("FAIL")]) == (0, [])
    record = json.loads((tmp_path / "r.json").read_text())
    assert set(record["checks"]) >= {
        *(f"recorded_cases,_{name}" for name in ("standard", "ort", "ort-step", "capture")),
        "step_times", "prefill_times", "loop_times", "no_growth", "prefill_in_pieces,_ort", "threads",
        "many_states", "runners_side_by_side", "batches_side_by_side", "resetting_rows", "placement",
    }  # fmt: skip
    steps = record["times"]["steps"]
    assert {row["variant"] for row in steps} == {"standard", "ort", "capture"}
    assert {(row["batch"], row["position"]) for row in steps} >= {
        (1, 100),
        (1, 100_000),
        (4, 100),
        (8, 100_000),
    }
    assert min(row["wall_us"] for row in steps) > 0
    prefills = {(row["variant"], row["length"]) for row in record["times"]["prefill"]}
    assert prefills == {(name, length) for name in ("standard", "ort") for length in (20, 90)}


def test_a_wrong_text_fails(sample_bundle: Path, tmp_path: Path) -> None:
    greedy = tmp_path / "greedy.json"
    greedy.write_text(json.dumps([{"prompt": "import os", "tokens": [0] * 256}]))
    code, lines = run(sample_bundle, "--greedy", greedy, "--only", "greedy", "resetting")
    assert code == 1
    assert [line.split(":")[0] for line in lines] == ["FAIL greedy text, standard", "ok   resetting rows"]
    assert "0 of 256 tokens" in lines[0]
