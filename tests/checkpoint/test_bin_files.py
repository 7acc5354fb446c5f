"""`.bin` files: what torch.save writes is read as torch.load reads it; anything else is refused at once."""

from __future__ import annotations

import io
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.bin_file import read_bin_table
from dijiang_export.checkpoint.pickled_weights import BrokenPickle, read_pickle
from dijiang_export.checkpoint.stored import StoredTensor, WeightFile


def table_of(path: Path) -> dict[str, StoredTensor]:
    return read_bin_table(WeightFile(path))


def refused(path: Path, match: str) -> str:
    """Reading must fail quickly, with a short CheckpointError; returns the message."""
    started = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        table_of(path)
    assert time.process_time() - started < 4  # two seconds and some for a busy machine
    message = str(caught.value)
    assert len(message) < 2000
    return message


def archive(path: Path, description: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A `.bin` with this data.pkl, as torch.save lays it out."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x/data.pkl", description)
        for key, data in (storages or {}).items():
            out.writestr(f"x/data/{key}", data)
    return path


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


# -- hostile descriptions -----------------------------------------------------------------------------------


def called(function: str, arguments: bytes) -> bytes:
    """A pickle of {"a": function(...)}; `arguments` leaves a tuple on the stack."""
    module, _, name = function.rpartition(".")
    return b"\x80\x02}X\x01\0\0\0ac" + f"{module}\n{name}\n".encode() + arguments + b"Rs."


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("builtins.bytearray", b"\x8a\x06" + (6 << 30).to_bytes(6, "little") + b"\x85"),
        ("_codecs.encode", b"X\x02\0\0\0abX\x03\0\0\0hex\x86"),
        ("torch.FloatTensor", b"J\xff\xff\xff\x7f\x85"),
        ("torch.Tensor", b"J\xff\xff\xff\x7f\x85"),
        ("torch.nn.parameter.Parameter", b")"),
        ("torch.device", b"X\x03\0\0\0cpu\x85"),
        ("torch.Size", b")\x85"),
        ("collections.Counter", b")"),
        ("builtins.set", b"]\x85"),
        ("builtins.complex", b"K\x01\x85"),
        ("torch._utils._rebuild_sparse_tensor", b")"),
        ("torch._utils._rebuild_wrapper_subclass", b")"),
        ("torch._utils._rebuild_meta_tensor_no_storage", b")"),
        ("posix.system", b"X\x02\0\0\0ls\x85"),
        ("builtins.eval", b"X\x01\0\0\0" + b"1\x85"),
        ("torch.FloatStorage", b"K\x05\x85"),  # may be named, not called
        ("torch.load", b"X\x01\0\0\0a\x85"),
    ],
)
@pytest.mark.parametrize("by_stack", [False, True])
def test_calls_are_refused_by_name(function: str, arguments: bytes, by_stack: bool, tmp_path: Path) -> None:
    description = called(function, arguments)
    if by_stack:  # STACK_GLOBAL, protocol 4
        module, _, name = (part.encode() for part in function.rpartition("."))
        text = b"".join(b"\x8c" + bytes([len(part)]) + part for part in (module, name)) + b"\x93"
        description = description.replace(b"c" + module + b"\n" + name + b"\n", text)
    message = refused(archive(tmp_path / "w.bin", description), "other than weights, which was not run")
    assert f"a call of {function}" in message


NESTED = 300_000


DOUBLING = b")q\0" + b"h\0\x86q\0" * 40
"""A tuple of the last one twice, forty times over: 2^40 leaves if anybody walks it."""


BOMBS: dict[str, tuple[bytes, str]] = {
    "deep tuple as a key": (b"}" + b")" + b"\x85" * NESTED + b"K\x01s.", "neither text nor a number"),
    "deep tuple as a value": (b"}K\x01)" + b"\x85" * NESTED + b"s.", "does not hold just named tensors"),
    "deep lists": (b"]" * NESTED + b"a" * (NESTED - 1) + b".", "does not hold named tensors"),
    "doubling tuples as a key": (b"}" + DOUBLING + b"K\x01s.", "neither text nor a number"),
    "doubling tuples as a value": (
        b"}X\x01\0\0\0a" + DOUBLING + b"s.",
        "does not hold just named tensors",
    ),
    "doubling tuples as a storage": (DOUBLING + b"Q.", "corrupt"),
    "doubling tuples as arguments": (
        b"ctorch._utils\n_rebuild_tensor_v2\n" + DOUBLING + b"R.",
        "corrupt",
    ),
    "a list in itself": (b"]q\0h\0ah\0a.", "does not hold named tensors"),
    "a dictionary in itself": (b"}q\0X\x05\0\0\0modelh\0s.", "does not hold just named tensors"),
    "a huge name": (b"}X" + struct.pack("<I", 15 << 20) + b"a" * (15 << 20) + b"K\x01s.", "15728640 char"),
    "a huge text": (b"X" + struct.pack("<I", 15 << 20) + "é".encode() * (7 << 20), "corrupt"),
    "a text beyond the end": (b"X\xff\xff\xff\xffabc", "corrupt"),
    "a huge long": (b"\x8b" + struct.pack("<i", 15 << 20) + b"\xff" * (15 << 20) + b".", "operation 0x8b"),
    "decimal digits": (b"I" + b"9" * (15 << 20) + b"\n.", "operation 0x49"),
    "a frame": (b"\x95" + b"\xff" * 8 + b"}.", ""),
    "many dictionaries": (b"}" * (15 << 20) + b".", "operations"),
    "many marks": (b"(" * (15 << 20) + b".", "marks"),
    "many references": (b"}q\0" + b"h\0" * (7 << 20) + b".", "operations"),
    "many big dictionaries": (
        b"}q\0(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200_000)) + b"u0}("
        + b"".join(b"X\x04\0\0\0" + f"{i:04d}".encode() + b"h\0" for i in range(10_000)) + b"u.", "0x30"),
    "entries that are the same": (
        b"}(X\x01\0\0\0a}q\0(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200_000)) + b"u"
        + b"".join(b"X\x04\0\0\0" + f"{i:04d}".encode() + b"h\0" for i in range(10_000)) + b"u.",
        "does not hold just named tensors"),
    "a line without end": (b"c" + b"a" * (15 << 20), "a name without an end"),
    "an unknown protocol": (b"\x80\x07}.", "protocol 7"),
    "an instance": (b"(i__main__\nX\n.", "operation 0x69"),
    "extensions": (b"\x82\x01.", "operation 0x82"),
    "an empty pickle": (b"", "corrupt"),
    "a lone stop": (b".", "corrupt"),
    "a state for text": (b"X\x01\0\0\0a}b.", "a state for something"),
    "the same pairs again and again": (
        b"ccollections\nOrderedDict\nq\0]q\x01("
        + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(100_000))
        + b"e\x85q\x02" + b"h\0h\x02R" * 400_000 + b".", "more than 200000 pairs"),
    "pairs that are none": (b"ccollections\nOrderedDict\n]K\x01a\x85R.", "other than pairs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("archived", [True, False], ids=["zip", "legacy"])
def test_bombs(name: str, archived: bool, tmp_path: Path) -> None:
    body, match = BOMBS[name]
    path = tmp_path / "w.bin"
    if archived:
        archive(path, b"\x80\x02" + body)
    else:
        sizes = pickle.dumps({"little_endian": True}, 2)
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + sizes
        path.write_bytes(head + b"\x80\x02" + body + pickle.dumps([], 2))
    refused(path, match) if match else table_of(path)


MEMORY = """
import resource, sys
from pathlib import Path
from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.bin_file import read_bin_table
from dijiang_export.checkpoint.safetensors_file import read_safetensors_table
from dijiang_export.checkpoint.stored import WeightFile
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        file = WeightFile(Path(name))
        (read_safetensors_table if name.endswith(".safetensors") else read_bin_table)(file)
        raise SystemExit(f"{name} was read")
    except CheckpointError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_need_little_memory(tmp_path: Path) -> None:
    paths = []
    for i, (body, match) in enumerate(BOMBS.values()):
        if match:
            paths.append(str(archive(tmp_path / f"{i}.bin", b"\x80\x02" + body)))
    lists = b'{"a":[' + b"[]," * 2_700_000 + b"[]]}"
    (tmp_path / "lists.safetensors").write_bytes(struct.pack("<Q", len(lists)) + lists)
    paths.append(str(tmp_path / "lists.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) < 400  # MiB


def test_a_pickle_beyond_the_bound(tmp_path: Path) -> None:
    refused(archive(tmp_path / "w.bin", b"\x80\x02" + b"N" * (17 << 20)), "a description of 17825794 bytes")


def tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    count: int,
    offset: int = 0,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """The description of a tensor, as torch.save writes it."""

    out = io.BytesIO()
    out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
    out.write(pickle.dumps("storage", 2)[2:-1])
    out.write(b"ctorch\n" + kind.encode() + b"\n")
    for value in (key, "cpu", count):
        out.write(pickle.dumps(value, 2)[2:-1])
    out.write(b"tQ")
    for rest in (offset, shape, strides, False, None):
        out.write(pickle.dumps(rest, 2)[2:-1])
    out.write(b"tR")
    return out.getvalue()


def described(*tensors: bytes) -> bytes:
    items = b"".join(b"X\x02\0\0\0" + f"t{i}".encode() + data for i, data in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


def test_the_maker_of_descriptions_is_right(tmp_path: Path) -> None:
    data = struct.pack("<6f", *range(6))
    path = archive(tmp_path / "w.bin", described(tensor((2, 3), (3, 1), count=6)), {"0": data})
    assert torch.equal(table_of(path)["t0"].exact(), torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(
    ("description", "match"),
    [
        (tensor((1 << 30,), (0,), count=4), "claims more than is stored"),
        (tensor((4, 5), (1, 0), count=4), "claims more than is stored"),
        (tensor((3, 2), (1, 1), count=4), "claims more than is stored"),
        (tensor((5,), (1,), count=4), "would end at byte"),
        (tensor((4,), (1,), count=4, offset=1), "would end at byte"),
        (tensor((4,), (1,), count=5), "would end at byte"),
        (tensor((2, 2), (2**62, 1), count=4), "would end at byte"),
        (tensor((2,) * 65, (0,) * 65, count=4), "without storage, shape or strides"),
        (tensor((2**63,), (0,), count=4), "without storage, shape or strides"),
        (tensor((-1,), (1,), count=4), "without storage, shape or strides"),
        (tensor((2, 2), (1,), count=4), "without storage, shape or strides"),
        (tensor((4,), (1,), count=-4), "a storage without type"),
        (tensor((4,), (1,), count=4, key="1"), "a storage that the file does not hold"),
        (tensor((4,), (1,), count=4, key="../x"), "a storage that the file does not hold"),
        (tensor((4,), (1,), count=4, kind="QInt8Storage"), "a call of torch.QInt8Storage"),
    ],
)  # fmt: skip
def test_what_is_stored_bounds_what_is_claimed(description: bytes, match: str, tmp_path: Path) -> None:
    refused(archive(tmp_path / "w.bin", described(description), {"0": bytes(16)}), match)


def test_expanded_tensors_of_torch_save_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    torch.save({"a": torch.zeros(1).expand(1 << 30)}, path)
    assert path.stat().st_size < 2000
    assert "make it contiguous" in refused(path, "claims more than is stored")


def test_many_tensors_of_one_storage(tmp_path: Path) -> None:
    """Tied weights share a storage; a thousand tensors that do are a bomb."""
    storage = {"0": bytes(1 << 20)}
    one = tensor((1 << 18,), (1,), count=1 << 18)
    assert len(table_of(archive(tmp_path / "w.bin", described(*[one] * 3), storage))) == 3
    many = b"".join(b"X\x04\0\0\0" + f"{i:04d}".encode() + one for i in range(1000))
    refused(
        archive(tmp_path / "w.bin", b"\x80\x02}(" + many + b"u.", storage), "describes more than it holds"
    )


def test_lazily_conjugated_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    torch.save({"a": torch.ones(3, dtype=torch.complex64).conj()}, path)
    refused(path, "conjugated or negated")


# -- hostile archives ---------------------------------------------------------------------------------------


def good_archive(path: Path) -> bytes:
    torch.save({"a": torch.arange(100.0), "b": torch.ones(50)}, path)
    return path.read_bytes()


def edit_directory(data: bytes, edit: Callable[[bytearray], None]) -> bytes:
    """The file with its central directory edited; the end's sizes stay right only if its length does."""
    at = data.index(b"PK\x01\x02")
    part = bytearray(data[at:])
    edit(part)
    return data[:at] + bytes(part)


def set_at(offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda part: struct.pack_into(form, part, offset, value)


@pytest.mark.parametrize(
    "edit",
    [
        set_at(8, "<H", 1),  # encrypted
        set_at(20, "<I", 5),  # compressed size
        set_at(24, "<I", 5),
        set_at(28, "<H", 60000),  # lengths of name, extra, comment
        set_at(30, "<H", 60000),
        set_at(32, "<H", 60000),
        set_at(42, "<I", 5),  # where the record begins
        set_at(42, "<I", 2**32 - 1),
        set_at(0, "<I", 0),
        lambda part: part.__setitem__(slice(46, 50), b"evil"),
    ],
)
def test_directories_that_contradict_the_records(edit: Callable[[bytearray], None], tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(edit_directory(good_archive(path), edit))
    refused(path, "corrupt or truncated")


def test_records_that_overlap(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.bin", described(), {"0": bytes(16), "1": bytes(16)})
    data = path.read_bytes()
    last = data.rindex(b"PK\x01\x02")
    first = data.index(b"x/data/0") - 30
    path.write_bytes(data[: last + 42] + struct.pack("<I", first) + data[last + 46 :])
    refused(path, "begins inside another")


def test_two_records_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    archive(path, described(), {"0": b"", "1": b""})
    path.write_bytes(path.read_bytes().replace(b"x/data/1", b"x/data/0"))
    refused(path, "the same name")


def test_a_directory_of_millions(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    data = good_archive(path)
    end = data.rindex(b"PK\x05\x06")
    locator = data.rindex(b"PK\x06\x07")
    wide = data.rindex(b"PK\x06\x06")
    assert wide < locator < end
    path.write_bytes(data[: wide + 24] + struct.pack("<2Q", 2**40, 2**40) + data[wide + 40 :])
    refused(path, "a directory of 1099511627776 records")
    # and one that is really there, in a sparse file
    with open(path, "wb") as out:
        out.write(b"PK\x03\x04")
        out.truncate(5 << 30)
        out.seek(5 << 30)
        out.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 50000, 50000, 4 << 30, 4))
        out.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, 5 << 30, 1))
        out.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))
    refused(path, "a directory of 50000 records and 4294967296 bytes")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_bombs(method: int, tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr("x/data.pkl", bytes(50 << 20))
    refused(path, "is compressed")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_and_tar(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    torch.jit.script(Module().inner).save(path)
    assert "code/__torch__" in refused(path, "is compressed")
    path.write_bytes(b"storages" + bytes(248) + b"ustar\x0000" + bytes(1000))
    refused(path, "corrupt or truncated")


def test_no_description(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as out:
        out.writestr("x/other", b"")
    refused(tmp_path / "w.bin", r"0 descriptions \(data.pkl\)")


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


def test_reading_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "it ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(archive(tmp_path / "w.bin", called("evil_module.x", b")")), "other than weights")
    assert not marker.exists()
    assert "evil_module" not in sys.modules
