"""Files of a bundle or an engine: their names, and the table in its manifest of what each must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.safe_files import is_plain_name, sha256_of

MANIFEST = "manifest.json"
"""Of a bundle."""
ENGINE_MANIFEST = "engine.json"
REFERENCE = "reference.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CONFIG = "config.json"
GENAI_CONFIG = "genai_config.json"
GENAI_ADAPTER = "adapter.onnx"

MAX_FILES = 1000


@dataclass(frozen=True)
class FileInfo:
    """What a file must be."""

    sha256: str
    bytes: int


def check_format(
    manifest: dict[str, Any], kind: str, format_: str, versions: Sequence[int], *, source: str, again: str
) -> None:
    """A manifest is of this kind of folder, and of the version that is read here.

    Args:
        manifest: the JSON object.
        kind: "bundle" or "engine", for messages.
        format_: what `format` must be.
        versions: what `format_version` may be.
        source: name of the manifest's file.
        again: what to do about an older version.

    Raises:
        BundleError: it is not.
    """
    found = manifest.get("format")
    if found != format_:
        article = "an" if kind[0] in "aeiou" else "a"
        raise BundleError(f"{source} is not {article} {kind}'s", got=repr(found)[:80], expected=repr(format_))
    number = manifest.get("format_version")
    if number not in versions or isinstance(number, (bool, float)):
        newer = isinstance(number, int) and number > max(versions)
        raise BundleError(
            f"the {kind} has a format version that this program does not know",
            got=repr(number)[:80],
            expected=" or ".join(map(str, versions)),
            hint="update dijiang-export" if newer else again,
        )


def file_table(
    manifest: dict[str, Any], needed: Sequence[str], *, source: str, hint: str
) -> dict[str, FileInfo]:
    """The checked table of files of a bundle's or an engine's manifest: name -> FileInfo.

    Args:
        manifest: the JSON object.
        needed: names that must be in it.
        source: name of the manifest's file, for messages.
        hint: what to do if it is wrong.

    Raises:
        BundleError: a name that could leave the folder, a bad hash or size, or one of `needed` is missing.
    """

    def bad(where: str, expected: str) -> BundleError:
        return BundleError(f"{source} has a bad or missing value for {where}", expected=expected, hint=hint)

    files = manifest.get("files")
    if not isinstance(files, dict) or not 0 < len(files) <= MAX_FILES:
        raise bad("files", f"an object of at most {MAX_FILES} files")
    table = {}
    for name, entry in files.items():
        if not is_plain_name(name) or name in (MANIFEST, ENGINE_MANIFEST):
            raise BundleError(
                "the manifest lists a file name that a bundle cannot have",
                got=repr(name)[:200],
                expected="letters, digits, '.', '_', '-' and '+', and no folders",
            )
        info = _file_info(entry)
        if info is None:
            raise bad(f"files.{name}", "a sha256 of 64 hex digits and a size")
        table[name] = info
    missing = [name for name in needed if name not in table]
    missing += [REFERENCE] if manifest.get("reference") and REFERENCE not in table else []
    if missing:
        raise bad("files", " and ".join(missing))
    return table


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file in `folder` but the manifest, as its tables have them."""
    entries = {}
    for path in sorted(folder.iterdir()):
        if path.name not in (MANIFEST, ENGINE_MANIFEST):
            with path.open("rb") as file:
                entries[path.name] = {"sha256": sha256_of(file), "bytes": path.stat().st_size}
    return entries


def _file_info(entry: Any) -> FileInfo | None:
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    size = entry.get("bytes") if isinstance(entry, dict) else None
    hexadecimal = isinstance(digest, str) and len(digest) == 64 and not set(digest) - set("0123456789abcdef")
    if not hexadecimal or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        return None
    return FileInfo(str(digest), size)
