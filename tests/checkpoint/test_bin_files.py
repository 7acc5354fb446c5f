"""`.bin` files: what torch.save writes is read as torch.load reads it; damaged ones end in a clear error."""

from __future__ import annotations

import random
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bin_files import refused, table_of

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.bin_file import read_bin_table
from dijiang_export.checkpoint.pickled_weights import BrokenPickle, read_pickle
from dijiang_export.checkpoint.stored import WeightFile

# -- equal to torch.load ------------------------------------------------------------------------------------


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(5, 3)
        self.norm = torch.nn.LayerNorm(3)


def many_tensors() -> dict[str, torch.Tensor]:
    """Shapes, types, views, shared storages, parameters with and without state."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=rng)
    parameter = torch.nn.Parameter(torch.randn(3, 2, generator=rng))
    marked = torch.nn.Parameter(torch.randn(4, generator=rng))
    marked.mark = "tensor parallel"  # type: ignore[attr-defined]
    return {
        "float64": torch.randn(4, 5, dtype=torch.float64, generator=rng),
        "float16": torch.randn(7, generator=rng).half(),
        "bfloat16": torch.randn(2, 3, 4, generator=rng).bfloat16(),
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0),
        "empty matrix": torch.empty(3, 0, 2),
        "one": torch.randn(1, 1, 6, 1, generator=rng),
        "rows": base[3:9],
        "columns": base[:, 4:11],
        "transposed": base.T,
        "every third": base[::3, ::2],
        "permuted": torch.randn(3, 4, 5, generator=rng).permute(2, 0, 1),
        "the whole": base,
        "again": base,
        "parameter": parameter,
        "with state": marked,
        "frozen": torch.nn.Parameter(base[0], requires_grad=False),
        "large numbers": torch.randn(300, 300, generator=rng),
        "ünïcode.名": torch.randn(2, generator=rng),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("archived", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("container", ["dict", "OrderedDict", "state_dict"])
def test_equal_to_torch_load(container: str, archived: bool, protocol: int, tmp_path: Path) -> None:
    saved: Any = many_tensors()
    if container == "OrderedDict":
        saved = OrderedDict(saved)
    elif container == "state_dict":
        saved = Module().state_dict()
        assert saved._metadata
    path = tmp_path / "weights.bin"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=archived)
    expected = torch.load(path, weights_only=protocol == 2)  # its restricted reader knows no other protocol
    table = table_of(path)
    assert list(table) == list(expected)
    for name, value in expected.items():
        stored = table[name]
        assert stored.shape == tuple(value.shape)
        assert getattr(torch, stored.dtype) == value.dtype
        if value.numel():
            assert torch.equal(stored.exact(), value), name


@pytest.mark.parametrize("archived", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint8", "int64", "bool", "complex64", "uint16", "uint32", "float8_e4m3fn", "float8_e8m0fnu"],
)
def test_other_types_are_named(dtype: str, archived: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    values = torch.ones(4).to(getattr(torch, dtype))
    torch.save({"a": values, "b": torch.ones(2)}, path, _use_new_zipfile_serialization=archived)
    table = table_of(path)
    assert torch.equal(table["b"].exact(), torch.ones(2))
    with pytest.raises(CheckpointError, match="not stored as floating point") as caught:
        _ = table["a"].torch_dtype
    assert dtype in str(caught.value)


def test_python_2_names_are_read() -> None:
    """Python 2 pickles its strings as bytes, and an OrderedDict as a list of pairs."""
    data = b"\x80\x02ccollections\nOrderedDict\n]](U\x01aK\x05ea\x85R."
    assert read_pickle(data)[0] == {"a": 5}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": w, "epoch": 3, "hyper_parameters": {"lr": 1e-3, "betas": (0.9, 0.95)}},
        lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}},
        lambda w: {"module": w, "ds_version": "0.14", "ds_config": None},
        lambda w: {"model_state_dict": w, "ema_state_dict": w},
        lambda w: {"weights": w},
    ],
)
@pytest.mark.parametrize("archived", [True, False], ids=["zip", "legacy"])
def test_weights_in_dictionaries_of_training_loops(wrap: Any, archived: bool, tmp_path: Path) -> None:
    weights = OrderedDict(a=torch.randn(3), b=torch.randn(2, 2))
    path = tmp_path / "weights.bin"
    torch.save(wrap(weights), path, _use_new_zipfile_serialization=archived)
    file = WeightFile(path)
    table = read_bin_table(file)
    assert list(table) == ["a", "b"]
    assert all(torch.equal(table[name].exact(), value) for name, value in weights.items())
    assert len(file.notes) == 1
    assert "nothing else was read" in file.notes[0]


def test_several_sets_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    for names in (("model", "state_dict"), ("generator", "discriminator")):
        torch.save({name: {"a": torch.ones(2)} for name in names}, path)
        assert repr(names[0]) in refused(path, "holds several sets of tensors")
    torch.save({"epoch": 5, "args": {"lr": 0.1}}, path)
    refused(path, "does not hold just named tensors")


# -- fuzz ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("archived", [True, False], ids=["zip", "legacy"])
def test_flipped_bytes(archived: bool, tmp_path: Path) -> None:
    """Whatever is flipped in a small file: a clear error, or tensors of what the file holds."""
    path = tmp_path / "w.bin"
    saved = {"first": torch.arange(12.0).view(3, 4), "second": torch.nn.Parameter(torch.ones(5).half())}
    torch.save(saved, path, _use_new_zipfile_serialization=archived)
    good = path.read_bytes()
    rng = random.Random(1)
    counts = {"refused": 0, "read": 0}
    for _ in range(600):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 2, 6])):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        if rng.random() < 0.1:
            bad = bad[: rng.randrange(len(bad))]
        path.write_bytes(bad)
        file = WeightFile(path)
        try:
            for name, stored in read_bin_table(file).items():
                assert stored.nbytes <= 100, name
                stored.exact()
            counts["read"] += 1
        except CheckpointError:
            counts["refused"] += 1
        finally:
            file.close()
    assert min(counts.values()) > 30, counts


def test_random_pickles() -> None:
    """Random operations, most of them known ones: never anything but BrokenPickle and ForeignPickle."""
    from dijiang_export.checkpoint.pickled_weights import _OPERATIONS, ForeignPickle

    rng = random.Random(2)
    codes = bytes([*_OPERATIONS, *_OPERATIONS, ord("."), ord("0"), 0, 1, 2, 3])
    for _ in range(20_000):
        data = bytes(rng.choice(codes) for _ in range(rng.randrange(1, 60)))
        with suppress(BrokenPickle, ForeignPickle):
            read_pickle(data)
