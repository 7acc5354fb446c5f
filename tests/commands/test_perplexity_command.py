"""`dijiang-export perplexity`: what it prints, and what it refuses, before anything is computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.makers.byte_tokenizer import write_tokenizer
from support.makers.checkpoints import RandomCheckpoint, llama, neox
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle
from tokenizers import Tokenizer as Library

from dijiang_export.cli import main

NAME = "toy.bundle"
TEXTS = ("hello there\n", "né 日本")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a toy bundle and two texts."""
    make_bundle(tmp_path / NAME)
    for name, text in zip(("one.txt", "two.txt"), TEXTS, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *args: str | Path, code: int = 0) -> tuple[str, str]:
    found = main(["perplexity", *map(str, args)])
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    if code:
        assert out == ""
        assert err.startswith("error: ")
    return out, err


def of(capsys: Capture, *args: str | Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run(capsys, *args, "--json")[0])
    return result


def toy_loss(*texts: str, window: int = 64) -> float:
    """What the toy model's NumPy says: token 0, and then the bytes' tokens."""
    model = ToyModel.random(SPEC)
    library = Library.from_file(f"{NAME}/tokenizer.json")
    nats = []
    for text in texts:
        ids = [0, *library.encode(text).ids]
        for start in range(0, len(ids) - 1, window):
            for stop in range(start + 1, min(start + window, len(ids) - 1) + 1):
                state = sum(layer.reshape(-1) for layer in model.states(ids[start:stop]))
                logits = np.tanh(state) @ model.head
                nats.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[stop]])
    return float(np.mean(nats))


def test_json(capsys: Capture) -> None:
    result = of(capsys, NAME, "one.txt", "two.txt", "--threads", "1")
    assert result["loss"] == pytest.approx(toy_loss(*TEXTS), rel=1e-4)
    assert result["perplexity"] == pytest.approx(np.exp(result["loss"]), rel=1e-12)
    counts = [len(Library.from_file(f"{NAME}/tokenizer.json").encode(text).ids) for text in TEXTS]
    assert (result["tokens"], result["bytes"], result["window"]) == (sum(counts), 22, 64)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * sum(counts) / np.log(2) / 22, rel=1e-12)
    assert (result["kind"], result["runner"], result["dtype"]) == ("bundle", "onnxruntime-cpu", "float32")
    assert [(f["file"], f["tokens"]) for f in result["files"]] == list(
        zip(("one.txt", "two.txt"), counts, strict=True)
    )
    assert result["against"] is None


def test_a_table(capsys: Capture) -> None:
    out, err = run(capsys, NAME, "one.txt", "two.txt", "--window", "5")
    assert "toy.bundle: bundle, float32, onnxruntime-cpu; windows of 5 tokens" in out
    assert all(word in out for word in ("one.txt", "two.txt", "total", "perplexity", "bits per byte"))
    assert err == ""
    assert "one.txt" not in run(capsys, NAME, "one.txt")[0]  # one file is the total
    assert "windows of 5 tokens every 3" in run(capsys, NAME, "one.txt", "--window", "5", "--stride", "3")[0]
    assert "state carried" in run(capsys, NAME, "one.txt", "--carry")[0]


def test_windows_and_carried_state(capsys: Capture) -> None:
    windows = of(capsys, NAME, "one.txt", "--window", "5")
    assert windows["loss"] == pytest.approx(toy_loss("hello there\n", window=5), rel=1e-4)
    carried = of(capsys, NAME, "one.txt", "--carry")
    assert carried["loss"] == pytest.approx(toy_loss("hello there\n"), rel=1e-4)
    assert (carried["window"], carried["carry"]) == (None, True)


def test_against_itself(capsys: Capture) -> None:
    result = of(capsys, NAME, "one.txt", "--against", NAME)
    assert result["against"]["kl"] == 0
    assert result["against"]["top1_agreement"] == 1
    assert result["against"]["ratio"] == 1
    assert result["against"]["model"] == NAME
    assert "100.00%" in run(capsys, NAME, "one.txt", "--against", NAME)[0]


def test_the_result_is_saved(capsys: Capture, folder: Path) -> None:
    result = of(capsys, NAME, "one.txt", "--save", "found.json")
    assert json.loads((folder / "found.json").read_text()) == result


def test_an_install_without_pytorch(folder: Path) -> None:
    code = (
        "import sys\nfrom dijiang_export.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "perplexity", NAME, "one.txt", "--against", NAME]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


# -- texts that are refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "bad.txt is empty"),
        (b"ab\0c", "bad.txt is no text: it holds a zero byte\n  got: at offset 2"),
        (b"abc\xff", "bad.txt is not UTF-8\n  got: byte 0xff at offset 3"),
        ("abc".encode("utf-16"), "bad.txt is no text"),
        ("é".encode()[:1], "bad.txt is not UTF-8\n  got: byte 0xc3 at offset 0"),
    ],
)
def test_files_that_are_no_text(capsys: Capture, folder: Path, data: bytes, message: str) -> None:
    (folder / "bad.txt").write_bytes(data)
    assert message in run(capsys, NAME, "one.txt", "bad.txt", code=1)[1]


def test_files_that_cannot_be_read(capsys: Capture, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "large").touch()
    os.truncate(folder / "large", 300 << 20)
    (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, message in (
        ("nowhere", "nowhere is missing"), ("pipe", "a pipe"), (NAME, "a folder"), ("large", "is too large"),
        ("pointer", "Git LFS pointer"),
    ):  # fmt: skip
        assert message in run(capsys, NAME, name, code=1)[1]


def test_a_text_of_one_token(capsys: Capture, folder: Path) -> None:
    (folder / "short").write_text("a")
    assert of(capsys, NAME, "short")["tokens"] == 1
    assert "short is too short" in run(capsys, NAME, "short", "--no-begin", code=1)[1]


def test_a_tokenizer_that_does_not_fit(capsys: Capture, folder: Path) -> None:
    (folder / "other").mkdir()
    write_tokenizer(folder / "other", 260)
    library = Library.from_file(str(folder / "other/tokenizer.json"))
    library.add_special_tokens([f"<{i}>" for i in range(9)])
    library.save(str(folder / "other/tokenizer.json"))
    (folder / "special").write_text("abc<8>")
    _, err = run(capsys, NAME, "special", "--tokenizer", "other/tokenizer.json", code=1)
    assert "special holds a token that the model does not have" in err
    assert "'<8>'" in err
    assert of(capsys, NAME, "one.txt", "--tokenizer", "other/tokenizer.json")["tokens"] == 12


# -- models that cannot be compared -------------------------------------------------------------------------


def test_another_tokenizer(capsys: Capture, folder: Path) -> None:
    make_bundle(folder / "other.bundle")
    library = Library.from_file("other.bundle/tokenizer.json")
    library.add_tokens(["hell"])
    changed = folder / "changed.json"
    library.save(str(changed))
    replace_tokenizer(folder / "other.bundle", changed.read_bytes())
    _, err = run(capsys, NAME, "one.txt", "--against", "other.bundle", code=2)
    assert "tokenizers differ" in err
    assert "one.txt" in err
    assert of(capsys, NAME, "two.txt", "--against", "other.bundle")["against"]["kl"] == 0


def replace_tokenizer(bundle: Path, data: bytes) -> None:
    import hashlib

    (bundle / "tokenizer.json").write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "args",
    [
        ("--dtype", "float64"), ("--device", "cpu"), ("--carry", "--window", "5"),
        ("--stride", "5", "--carry"), ("--window", "5", "--stride", "6"), ("--begin", "a", "--no-begin"),
        ("--begin", "nosuch"), ("--separator", "a", "--begin", "a"), ("--against-runner", "cpu"),
        ("--limit", "0"),
        ("--window", "0"), ("--batch", "0"), ("--runner", "tensorrt"), ("--runner", "nosuch"), (),
    ],
)  # fmt: skip
def test_wrong_usage(capsys: Capture, args: tuple[str, ...]) -> None:
    files = ("one.txt",) if args else ()
    run(capsys, NAME, *files, *args, code=2)


# -- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    return neox(vocab=260).with_tokenizer().save(folder / "dijiang")


def test_checkpoints(capsys: Capture, folder: Path, checkpoint: Path) -> None:
    vanilla = neox(vocab=260).vanilla().with_tokenizer().save(folder / "vanilla")
    result = of(capsys, checkpoint, "one.txt", "--against", vanilla, "--dtype", "float64")
    assert (result["kind"], result["runner"], result["dtype"]) == ("DiJiang checkpoint", "pytorch", "float64")
    assert result["against"]["kind"] == "vanilla checkpoint"
    assert result["against"]["kl"] > 0
    back = of(capsys, vanilla, "one.txt", "--against", checkpoint, "--dtype", "float64")
    assert back["loss"] == pytest.approx(result["against"]["other_loss"], rel=1e-12)
    assert back["against"]["ratio"] == pytest.approx(1 / result["against"]["ratio"], rel=1e-12)


def test_what_is_not_for_checkpoints(capsys: Capture, folder: Path, checkpoint: Path) -> None:
    vanilla = neox(vocab=260).vanilla().with_tokenizer().save(folder / "vanilla")
    assert "no state" in run(capsys, vanilla, "one.txt", "--carry", code=2)[1]
    assert "no state" in run(capsys, checkpoint, "one.txt", "--against", vanilla, "--carry", code=2)[1]
    for option in (("--runner", "cpu"), ("--prepack", "none"), ("--spinning", "off"), ("--device", "tpu")):
        run(capsys, checkpoint, "one.txt", *option, code=2)
    assert "finds no such GPU" in run(capsys, checkpoint, "one.txt", "--device", "cuda:99", code=2)[1]


def test_checkpoints_that_are_none(capsys: Capture, folder: Path) -> None:
    bare: RandomCheckpoint = llama(vocab=260)
    assert "has no tokenizer" in run(capsys, bare.save(folder / "bare"), "one.txt", code=1)[1]
    broken = bare.save(folder / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    run(capsys, broken, "one.txt", code=1)
    run(capsys, folder / "nowhere", "one.txt", code=1)


def test_another_vocabulary(capsys: Capture, folder: Path, checkpoint: Path) -> None:
    other = neox(vocab=264).with_tokenizer().save(folder / "larger")
    _, err = run(capsys, checkpoint, "one.txt", "--against", other, code=2)
    assert "different vocabularies" in err
    assert "260 and 264" in err
