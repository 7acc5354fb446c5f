"""Descriptions in `.bin` files that would run something, need too much, or claim what is not stored."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.bin_files import archive, described, refused, table_of, tensor


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


def test_reading_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "it ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(archive(tmp_path / "w.bin", called("evil_module.x", b")")), "other than weights")
    assert not marker.exists()
    assert "evil_module" not in sys.modules
