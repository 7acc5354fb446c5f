"""Saved sessions: going on is exact, and nothing but a session of this model is accepted."""

from __future__ import annotations

import hashlib
import json
import os
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file
from support.makers.toy_bundle import ToyModel, make_bundle

from dijiang_engines.errors import OutputError, PositionError, SessionError, UsageError
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.formats.temporary_names import machine
from dijiang_engines.generation.generator import GenerateOptions, Generator, SamplingOptions
from dijiang_engines.generation.session import Session, load_session, save_session
from dijiang_engines.runners import open_runner
from dijiang_engines.tokenizer.tokenizer import Tokenizer

Toy = tuple[Path, ToyModel]


@pytest.fixture
def bundle(toy: Toy) -> Bundle:
    return open_bundle(toy[0])


@pytest.fixture
def generator(bundle: Bundle) -> Generator:
    assert bundle.tokenizer_path is not None
    return Generator(open_runner(bundle, "cpu", threads=1), Tokenizer(bundle.tokenizer_path))


def tokens(generator: Generator, *args: Any, **kwargs: Any) -> list[list[int]]:
    generation = generator.start(*args, **kwargs)
    for _ in generation:
        pass
    return [completion.token_ids for completion in generation.completions]


def options(count: int, **changes: Any) -> GenerateOptions:
    sampling = SamplingOptions(1.5, top_k=50, repetition_penalty=1.2)
    return replace(GenerateOptions(count, sampling, seed=5, ignore_eos=True), **changes)


@pytest.mark.parametrize("first", [0, 1, 4])
def test_going_on_is_exact(generator: Generator, bundle: Bundle, tmp_path: Path, first: int) -> None:
    """Two parts with a file and another runner between them are the same, token for token, as one run."""
    prompts = [[5, 6, 7], [8]]
    whole = tokens(generator, prompts, options(10))
    generation = generator.start(prompts, options(first))
    save_session(tmp_path / "s", generation.session(), bundle)
    begun = [completion.token_ids for completion in generation.completions]
    assert [len(ids) for ids in begun] == [first, first]
    again = Generator(open_runner(bundle, "cpu", threads=1), generator.tokenizer)
    rest = tokens(again, [], options(10 - first), session=load_session(tmp_path / "s", bundle))
    assert [a + b for a, b in zip(begun, rest, strict=True)] == whole


def test_a_session_goes_on_with_new_text(generator: Generator, bundle: Bundle, tmp_path: Path) -> None:
    whole = tokens(generator, ["hello world"], options(6))
    read = generator.start(["hello"], options(0))
    assert list(read) == []
    assert (read.completions[0].token_ids, read.completions[0].text) == ([], "")
    save_session(tmp_path / "s", read.session(), bundle)
    assert tokens(generator, [" world"], options(6), session=load_session(tmp_path / "s", bundle)) == whole


def test_what_is_saved(generator: Generator, bundle: Bundle, toy: Toy, tmp_path: Path) -> None:
    generation = generator.start([[5, 6, 7], [8]], options(3))
    save_session(tmp_path / "s", generation.session(), bundle)
    session = load_session(tmp_path / "s", bundle)
    assert session.batch == 2
    assert session.positions.tolist() == [5, 3]  # the last token has not been read
    assert [len(ids) for ids in session.token_ids] == [6, 4]
    assert session.token_ids[0][:3] == [5, 6, 7]
    for row in range(2):
        states = toy[1].states(session.token_ids[row][:-1])
        for layer, state in zip(session.layers, states, strict=True):
            np.testing.assert_allclose(layer[row], state, rtol=1e-4, atol=1e-4)


def test_a_session_may_replace_itself(generator: Generator, bundle: Bundle, tmp_path: Path) -> None:
    save_session(tmp_path / "s", generator.start([[5]], options(2)).session(), bundle)
    session = load_session(tmp_path / "s", bundle)
    save_session(tmp_path / "s", generator.start([], options(2), session=session).session(), bundle)
    assert len(load_session(tmp_path / "s", bundle).token_ids[0]) == 5
    assert set(os.listdir(tmp_path)) == {"s", "toy.bundle"}


def test_prompts_must_fit_the_session(generator: Generator) -> None:
    session = generator.start([[5], [6]], options(1)).session()
    with pytest.raises(UsageError, match="number of prompts"):
        generator.start(["only one"], session=session)


def test_positions_count_on(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", decay="tables", decay_rows=10, tokenizer=False)
    generator = Generator(open_runner(open_bundle(tmp_path / "b"), "cpu", threads=1))
    session = generator.start([[5] * 6], options(2)).session()
    with pytest.raises(PositionError, match="last position"):
        generator.start([[5] * 3], options(1), session=session)
    assert len(tokens(generator, [], options(3), session=session)[0]) == 3


# -- refusals --------------------------------------------------------------------------------------------


def saved(generator: Generator, bundle: Bundle, path: Path) -> dict[str, np.ndarray]:
    save_session(path, generator.start([[5, 6], [7]], options(2)).session(), bundle)
    return load_file(path)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"rope_theta": 5.0}], ids=["weights", "spec"])
def test_another_model_is_refused(
    generator: Generator, bundle: Bundle, tmp_path: Path, changes: dict[str, Any]
) -> None:
    saved(generator, bundle, tmp_path / "s")
    make_bundle(tmp_path / "other", **changes)
    with pytest.raises(SessionError, match="another model"):
        load_session(tmp_path / "s", open_bundle(tmp_path / "other"))


def test_the_same_model_with_other_graphs_is_accepted(
    generator: Generator, bundle: Bundle, tmp_path: Path
) -> None:
    saved(generator, bundle, tmp_path / "s")
    make_bundle(tmp_path / "other", logits="all")
    assert load_session(tmp_path / "s", open_bundle(tmp_path / "other")).batch == 2


def test_missing_and_foreign_files(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no session file"):
        load_session(tmp_path / "none", bundle)
    for content in (b"", b"text", b"\xff" * 100):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(SessionError, match="not a session file"):
            load_session(tmp_path / "s", bundle)
    save_file({"x": np.zeros(1)}, tmp_path / "s")
    with pytest.raises(SessionError, match="not a session file"):
        load_session(tmp_path / "s", bundle)
    save_file({"x": np.zeros(1)}, tmp_path / "s", metadata={"format": "another"})
    with pytest.raises(SessionError, match="of a version"):
        load_session(tmp_path / "s", bundle)
    with pytest.raises(SessionError, match="not an ordinary file"):
        load_session(tmp_path, bundle)


def test_truncated(generator: Generator, bundle: Bundle, tmp_path: Path) -> None:
    saved(generator, bundle, tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    for keep in (len(data) - 1, len(data) // 2, 20, 7, 0):
        (tmp_path / "s").write_bytes(data[:keep])
        with pytest.raises(SessionError, match="is damaged" if keep > 1000 else "not a session file"):
            load_session(tmp_path / "s", bundle)
    (tmp_path / "s").write_bytes(data + b"x")
    with pytest.raises(SessionError, match="is damaged"):
        load_session(tmp_path / "s", bundle)


def write_signed(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """A session file with a right hash, made as its description says and not by the code under test."""
    data = save(tensors, metadata=metadata | {"sha256": "0" * 64})
    digest = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest))


def test_every_changed_byte_is_noticed(generator: Generator, bundle: Bundle, tmp_path: Path) -> None:
    """Header, digits of the hash, padding, states, tokens: each byte in turn, by one bit and by many."""
    saved(generator, bundle, tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    load_session(tmp_path / "s", bundle)
    assert len(data) > 1000
    accepted = []
    for place in range(len(data)):
        for change in (1 << place % 8, 0xFF):
            changed = bytearray(data)
            changed[place] ^= change
            (tmp_path / "s").write_bytes(changed)
            try:
                load_session(tmp_path / "s", bundle)
            except SessionError:
                continue
            accepted.append((place, change))
    assert accepted == []


def test_a_file_without_the_hash_is_refused(generator: Generator, bundle: Bundle, tmp_path: Path) -> None:
    """Version 1 had none; nor does calling oneself version 1 get a file around it."""
    tensors = saved(generator, bundle, tmp_path / "s")
    with safe_open(str(tmp_path / "s"), framework="numpy") as file:
        metadata = file.metadata()
    write_signed(tmp_path / "s", tensors, metadata)
    load_session(tmp_path / "s", bundle)
    write_signed(tmp_path / "s", tensors, metadata | {"version": "1"})
    with pytest.raises(SessionError, match="of a version") as caught:
        load_session(tmp_path / "s", bundle)
    assert "save the session again" in str(caught.value)
    del metadata["sha256"]
    save_file(tensors, tmp_path / "s", metadata=metadata)
    with pytest.raises(SessionError, match="SHA-256"):
        load_session(tmp_path / "s", bundle)


HUGE = 6 << 30


@pytest.mark.parametrize("kind", ["rows", "tokens", "another tensor", "a header", "more than memory"])
def test_sparse_files_are_refused_before_they_are_read(
    bundle: Bundle, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take no disk, and say what they like."""
    rows = HUGE // 4 // bundle.spec.num_layers // int(np.prod(bundle.spec.state_shape))
    batch = {"rows": rows, "more than memory": 4000}.get(kind, 1)
    tokens = HUGE // 8 if kind == "tokens" else batch
    shapes: dict[str, tuple[str, list[int]]] = {
        f"state.{i}": ("F32", [batch, *bundle.spec.state_shape]) for i in range(bundle.spec.num_layers)
    }
    shapes |= {name: ("I64", [batch]) for name in ("positions", "lengths", "held")}
    shapes["token_ids"] = ("I64", [tokens])
    if kind == "another tensor":
        shapes["more"] = ("F32", [HUGE // 4])
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "dijiang-session", "version": "2", "sha256": "0" * 64, "model": "x",
            "spec_sha256": bundle.identity.spec_sha256, "weights_sha256": bundle.identity.weights_sha256,
        }
    }  # fmt: skip
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * {"F32": 4, "I64": 8}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "s", "wb") as file:
        file.write((HUGE if kind == "a header" else len(text)).to_bytes(8, "little") + text)
        file.truncate(max(8 + len(text) + end, HUGE if kind == "a header" else 0))
    monkeypatch.setattr("dijiang_engines.machine.available_memory", lambda: 3_000_000)
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(SessionError) as caught:
            load_session(tmp_path / "s", bundle)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 1
    assert ("GB of memory" in str(caught.value)) == (kind == "more than memory")


def test_what_could_not_be_loaded_is_not_saved(bundle: Bundle, tmp_path: Path) -> None:
    shape = (4097, *bundle.spec.state_shape)
    layers = [np.zeros(shape, np.float32)] * bundle.spec.num_layers
    session = Session(layers, np.zeros(4097, np.int64), [[1]] * 4097)
    with pytest.raises(OutputError, match="too large to save"):
        save_session(tmp_path / "s", session, bundle)


def test_pipes_are_refused_and_links_are_followed(
    generator: Generator, bundle: Bundle, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SessionError, match="not an ordinary file"):
        load_session(tmp_path / "pipe", bundle)
    with pytest.raises(OutputError, match="not a session file"):
        save_session(tmp_path / "pipe", session_of(generator), bundle)
    saved(generator, bundle, tmp_path / "s")
    (tmp_path / "link").symlink_to("s")
    assert load_session(tmp_path / "link", bundle).batch == 2
    save_session(tmp_path / "link", session_of(generator), bundle)
    assert (tmp_path / "link").is_symlink()
    assert load_session(tmp_path / "s", bundle).batch == 1


def test_a_killed_save_is_cleaned_up_after(generator: Generator, bundle: Bundle, tmp_path: Path) -> None:
    left = tmp_path / f".s.dijiang-tmp-{machine()}-{os.getpid()}-1-0"  # of a process that is gone
    left.write_bytes(b"half")
    save_session(tmp_path / "s", session_of(generator), bundle)
    assert set(os.listdir(tmp_path)) == {"s", "toy.bundle"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("positions", np.array([9, 0]), "do not fit"),
        ("positions", np.array([-1, 0]), "do not fit"),
        ("positions", np.array([4, 2]), "do not fit"),  # no token left to read
        ("positions", np.zeros(0, np.int64), "damaged"),
        ("positions", np.zeros(2, np.int32), "damaged"),
        ("lengths", np.array([4, 2**62]), "damaged"),
        ("lengths", np.array([4, 7]), "token_ids"),
        ("token_ids", np.full(7, 260), "token id"),
        ("held", np.array([0, -1]), "held is negative"),
        ("state.1", np.zeros((2, 2, 4, 5), np.float32), "state.1"),
        ("state.1", np.full((2, 2, 4, 4), np.nan, np.float32), "not finite"),
        ("state.1", None, "no tensor 'state.1'"),
    ],
)
def test_damaged_values(
    generator: Generator, bundle: Bundle, tmp_path: Path, name: str, value: np.ndarray | None, words: str
) -> None:
    tensors = saved(generator, bundle, tmp_path / "s")
    with safe_open(str(tmp_path / "s"), framework="numpy") as file:
        metadata = file.metadata()
    if value is None:
        del tensors[name]
    else:
        assert name in tensors
        tensors[name] = value
    write_signed(tmp_path / "s", tensors, metadata)
    with pytest.raises(SessionError) as caught:
        load_session(tmp_path / "s", bundle)
    assert words in str(caught.value)


def session_of(generator: Generator) -> Session:
    return generator.start([[5]], options(1)).session()


def test_places_that_cannot_be_written(generator: Generator, bundle: Bundle, tmp_path: Path) -> None:
    session = session_of(generator)
    with pytest.raises(OutputError, match="no folder"):
        save_session(tmp_path / "none" / "s", session, bundle)
    with pytest.raises(OutputError, match="not a session file"):
        save_session(tmp_path, session, bundle)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="not a session file"):
        save_session(tmp_path / "letter.txt", session, bundle)
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_session(
    generator: Generator, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    saved(generator, bundle, tmp_path / "s")
    before = (tmp_path / "s").read_bytes()

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OutputError, match="no space left to write") as caught:
        save_session(tmp_path / "s", session_of(generator), bundle)
    assert "No space left" in str(caught.value)
    assert (tmp_path / "s").read_bytes() == before
    assert set(os.listdir(tmp_path)) == {"s", "toy.bundle"}
