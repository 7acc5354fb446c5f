"""Names of tensors as files have them -> the official ones.

Training tools wrap modules, and so leave marks in the names that state_dict() gives: `module.` (DataParallel,
DDP, DeepSpeed), `_orig_mod.` (torch.compile), `_fsdp_wrapped_module.` (FSDP), `base_model.model.` (PEFT), an
attribute's name (Lightning). Marks are left out, wherever they stand; a prefix is if all names begin with it
and the family's names follow. What happens to the names is said in notes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from dijiang_export.checkpoint.families import Family

_MARKS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module")
"""Of torch.compile, FSDP, activation checkpointing, Lightning Fabric and data parallel modules. No official
name has such a part."""
_MARK = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_MARKS)})\.")
_LOOKED_AT = 2000  # names that are looked at to find a prefix
_LONGEST_PREFIX = 8  # parts


def official_names(family: Family, stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The official name of each stored one, and notes on what was done.

    A name that the family does not know stays as it is. Two stored names may get the same official one.
    """
    names = list(stored)
    notes: list[str] = []
    bare = {name: _MARK.sub("", name) for name in names}
    marks = sorted({mark.rstrip(".") for name in names for mark in _MARK.findall(name)})
    if marks:
        notes.append(f"names of weights: left out {', '.join(marks)}, which training tools add")
    known = _known(family)
    prefix = _shared_prefix(family, known, list(bare.values()))
    if prefix:
        notes.append(f"names of weights: left out the prefix {prefix!r}, which all have")
    out: dict[str, str] = {}
    lacking: set[str] = set()
    for name, short in bare.items():
        rest = short.removeprefix(prefix)
        official, base = _resolve(family, known, rest)
        out[name] = official or short
        if base:
            lacking.add(base)
    if lacking:
        missing = ", ".join(repr(base) for base in sorted(lacking))
        notes.append(f"names of weights: added the prefix {missing}, as they are those of a base model")
    return out, notes


def spellings(family: Family, official: str) -> list[str]:
    """The names that a file may have for an official one, the official one first."""
    return [official] + [
        old + official.removeprefix(new) for old, new in family.renamed if official.startswith(new)
    ]


def _known(family: Family) -> re.Pattern[str]:
    """What matches the family's official names, buffers included."""
    names = [name for p in (*family.parameters, *family.dijiang()) for name, _ in p.sources]
    names += [re.sub(r"\b0\b", "{i}", name) for name in family.decay_tables(0)]
    patterns = [re.escape(name).replace(re.escape("{i}"), r"\d+") for name in names]
    return re.compile("|".join((*patterns, *family.ignored)))


def _resolve(family: Family, known: re.Pattern[str], name: str) -> tuple[str | None, str]:
    """The official name, None if there is none; and the base model's prefix, if that had to be added."""
    for old, new in (("", ""), *family.renamed):
        renamed = new + name.removeprefix(old)
        if name.startswith(old) and known.fullmatch(renamed):
            return renamed, ""
    for base in family.bases:
        if known.fullmatch(base + name):
            return base + name, base
    return None, ""


def _shared_prefix(family: Family, known: re.Pattern[str], names: list[str]) -> str:
    """The prefix that all names have and behind which most of them are known; "" = none.

    Of several the shortest: "model." of model.embed_tokens is LLaMA's own and no wrapper's.
    """
    first = names[:_LOOKED_AT]
    if all(_resolve(family, known, name)[0] is not None for name in first):
        return ""
    found: Counter[str] = Counter()
    for name in first:
        parts = name.split(".")[: _LONGEST_PREFIX + 1]
        for count in range(len(parts)):
            prefix = "".join(f"{part}." for part in parts[:count])
            if _resolve(family, known, name.removeprefix(prefix))[0] is not None:
                found[prefix] += 1
    shared = [prefix for prefix in found if all(name.startswith(prefix) for name in names)]
    return max(shared, key=lambda prefix: (found[prefix], -len(prefix)), default="")
