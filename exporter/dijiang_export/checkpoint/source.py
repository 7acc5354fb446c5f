"""A checkpoint folder of a known family, opened and checked: what reading and converting have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dijiang_engines.errors import CheckpointError
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.config import build_spec, check_tokenizer, read_config
from dijiang_export.checkpoint.families import Family, Parameter, conditions, sizes
from dijiang_export.checkpoint.files import check_kind, tokenizer_files
from dijiang_export.checkpoint.rope_buffers import check_frequencies
from dijiang_export.checkpoint.stored import StoredTensor
from dijiang_export.checkpoint.stored_names import official_names, spellings
from dijiang_export.checkpoint.weights import Weights, open_weights

_CHECK_BLOCK = 1 << 20  # elements looked at at once when searching for NaN: stays in the processor's cache


class Source:
    """A checkpoint folder of a known family, opened: what `Checkpoint` and `convert` have in common.

    Attributes:
        tensors: stored tensors under official names, buffers that are not weights left out.
        spec: with `tied_embeddings` as config.json says, and decay not yet looked at.
        tokenizer_files: the tokenizer's and the generation settings' files that exist.
        notes: what was done to read it that its owner may not expect, sentences for people.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_kind(path)
        self.config, self.family = read_config(path)
        self.spec = build_spec(path, self.config, self.family)
        self.notes: list[str] = check_tokenizer(path, self.spec.vocab_size)
        self.tokenizer_files = tokenizer_files(path)
        self.weights: Weights = open_weights(path)
        try:
            self.tensors, notes = _official_tensors(self.family, self.weights.tensors)
            self.notes += self.weights.notes + notes
            _refuse_pieces(path, self.tensors)
            check_frequencies(self.weights.tensors, self.spec)
            self._drop_tied_copy()
        except BaseException:
            self.weights.close()
            raise

    @property
    def has_dijiang(self) -> bool:
        """True if any parameter is there that only a DiJiang model has."""
        marks = [s for p in self.family.dijiang() for s, _ in p.sources]
        patterns = [re.escape(m).replace(re.escape("{i}"), r"\d+") for m in marks]
        patterns += [re.escape(self.family.attention).replace(re.escape("{i}"), r"\d+") + r"\.D[12]"]
        whole = re.compile("|".join(patterns))
        return any(whole.fullmatch(name) for name in self.tensors)

    def expected(self, *, dijiang: bool) -> dict[str, tuple[int, ...]]:
        """Stored names and shapes that such a model has, in canonical order."""
        spec = self.spec
        out: dict[str, tuple[int, ...]] = {}
        for layer, parameter in walk(self.family, spec, dijiang=dijiang):
            for source, letters in parameter.sources:
                out[source.format(i=layer)] = shape_of(spec, letters)
        if dijiang:
            for layer in range(spec.num_layers):
                for name in self.family.decay_tables(layer):
                    out[name] = (1, spec.num_heads, spec.max_position_embeddings, 1)
        return out

    def check(self, *, dijiang: bool) -> None:
        """Compare names and shapes with what the geometry asks for.

        Raises:
            CheckpointError: names what is missing, misshapen or left over.
        """
        if self.spec.num_layers > len(self.tensors):
            raise CheckpointError(
                f"{self.path} lacks most of the layers that its config.json asks for",
                got=f"{len(self.tensors)} tensors",
                expected=f"{self.spec.num_layers} layers",
            )
        expected = self.expected(dijiang=dijiang)
        missing = [name for name in expected if name not in self.tensors]
        extra = [name for name in self.tensors if name not in expected]
        if missing:
            raise self._lacks(missing, extra)
        for name, shape in expected.items():
            if self.tensors[name].shape != shape:
                raise CheckpointError(
                    f"{name} has the wrong shape",
                    got=list(self.tensors[name].shape),
                    expected=f"{list(shape)} by config.json",
                    hint="the weights and config.json belong to different models",
                )
            _ = self.tensors[name].torch_dtype  # raises if it is not floating point
        if extra:
            raise CheckpointError(
                f"{self.path} holds {_count(extra, 'tensor')} that such a model does not have",
                got=_some(extra),
                hint="config.json belongs to another model, or this is a variant that is not supported",
            )

    def storage_dtype(self) -> str:
        """The type that most bytes are stored in, as delivered."""
        bytes_by_type: Counter[str] = Counter()
        for tensor in self.tensors.values():
            bytes_by_type[dtype_name(tensor.delivered_dtype)] += tensor.nbytes
        return bytes_by_type.most_common(1)[0][0]

    def close(self) -> None:
        """Close the weight files."""
        self.weights.close()

    def _lacks(self, missing: list[str], extra: list[str]) -> CheckpointError:
        head = next(p.sources[0][0] for p in self.family.parameters if p.name == "lm_head.weight")
        hint = "the checkpoint is incomplete, or config.json belongs to another model"
        if missing == [head] and not extra:
            names = ", also called ".join(spellings(self.family, head))
            hint = (
                f"a model without its head ({names}) was saved: save the {self.family.architectures[0]}, "
                'or set "tie_word_embeddings": true if the embeddings are the head too'
            )
        return CheckpointError(
            f"{self.path} lacks {_count(missing, 'tensor')} that its config.json asks for",
            got=f"no {_some(missing)}" + (f"; instead {_some(extra)}" if extra else ""),
            hint=hint,
        )

    def _drop_tied_copy(self) -> None:
        """Forget a stored output projection that is a copy of tied embeddings, as old files have it."""
        if not self.spec.tied_embeddings:
            return
        by_name = {p.name: p.sources[0][0] for p in self.family.parameters}
        head, embedding = by_name["lm_head.weight"], by_name["embed_tokens.weight"]
        if head not in self.tensors or embedding not in self.tensors:
            return
        first, second = self.tensors[embedding], self.tensors[head]
        if not _same(first, second):
            raise CheckpointError(
                f"{head} differs from {embedding}, although config.json ties them",
                hint=f'set "tie_word_embeddings": false to use {head}, or remove it from the weights',
            )
        del self.tensors[head]


def walk(family: Family, spec: ModelSpec, *, dijiang: bool) -> Iterator[tuple[int, Parameter]]:
    """(layer, parameter) of everything such a model has, decay tables apart; layer 0 outside layers."""
    holds = conditions(spec)
    parameters = [p for p in (*family.parameters, *(family.dijiang() if dijiang else ())) if holds[p.when]]
    for parameter in parameters:
        if not parameter.name.startswith("layers."):
            yield 0, parameter
    for layer in range(spec.num_layers):
        for parameter in parameters:
            if parameter.name.startswith("layers."):
                yield layer, parameter


def shape_of(spec: ModelSpec, letters: str) -> tuple[int, ...]:
    """The shape that a family's table writes in letters, such as "I h"."""
    values = sizes(spec)
    return tuple(values[letter] for letter in letters.split())


def _official_tensors(
    family: Family, stored: dict[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors that are weights, under the names that the official code gives them; and notes."""
    names, notes = official_names(family, stored)
    ignored = re.compile("|".join(family.ignored)) if family.ignored else None
    out: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        official = names[name]
        if ignored is not None and ignored.fullmatch(official):
            continue
        if official in out and not _same(out[official], tensor):
            raise CheckpointError(
                f"{official} is stored twice, with different values",
                got=f"{out[official].name} and {name}",
                hint="remove the one that the model does not use",
            )
        out.setdefault(official, tensor)
    return out, notes


def _refuse_pieces(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Refuse, by their names, weights that other tools left in pieces.

    Raises:
        CheckpointError: they are shards of DeepSpeed's, or adapters that were not merged.
    """
    empty = [name for name, tensor in tensors.items() if tensor.shape == (0,)]
    if empty:
        raise CheckpointError(
            f"{path} holds empty tensors: DeepSpeed ZeRO-3 had the weights in pieces, and saved none here",
            got=f"shape [0] of {_some(empty)}",
            hint="run `python zero_to_fp32.py . merged` in the folder with DeepSpeed's global_step*, and use "
            "what that makes; or save with stage3_gather_16bit_weights_on_model_save",
        )
    adapters = [
        name for name in tensors if re.search(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save)\b", name)
    ]
    if adapters:
        raise CheckpointError(
            f"{path} holds PEFT adapters that are not merged into the weights",
            got=_some(adapters),
            hint="merge them first: save what model.merge_and_unload() returns",
        )


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise CheckpointError if `values` [n, ...] of the stored tensor `name` hold NaN or infinity.

    Looks at the bits: shifted left by one, the sign is gone and every number whose exponent is all ones is
    at least as large as infinity. Several times as fast as isfinite on half-precision types.
    """
    flat = values.reshape(-1)
    if flat.dtype == torch.float64:
        finite = bool(torch.isfinite(flat).all())
    else:
        wide = flat.element_size() == 4
        bits = flat.view(torch.int32 if wide else torch.int16).numpy().view(np.uint32 if wide else np.uint16)
        infinity = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}[flat.dtype]
        finite = all(
            int((bits[at : at + _CHECK_BLOCK] << 1).max()) < infinity << 1
            for at in range(0, len(bits), _CHECK_BLOCK)
        )
    if not finite:
        at = int((~torch.isfinite(flat)).nonzero()[0])
        raise CheckpointError(
            f"{name} holds weights that are not numbers",
            got=f"{float(flat[at])}",
            expected="finite weights",
            hint="training diverged, or a conversion to half precision overflowed",
        )


def _same(first: StoredTensor, second: StoredTensor) -> bool:
    """Are two tensors equal in value? Those at one place are, unread."""
    if first.shape != second.shape:
        return False
    places = [(t.file, t.offset, t.dtype, t.strides) for t in (first, second)]
    if places[0] == places[1] or 0 in first.shape:
        return True
    if not first.shape:
        return torch.equal(first.exact(), second.exact())
    step = max(1, (8 << 20) * first.shape[0] // first.nbytes)
    for start in range(0, first.shape[0], step):
        count = min(step, first.shape[0] - start)
        a = torch.empty((count, *first.shape[1:]), dtype=torch.float32)
        b = torch.empty_like(a)
        first.read_rows(a, start)
        second.read_rows(b, start)
        if not torch.equal(a, b):
            return False
    return True


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 -> "float16"."""
    return str(dtype).removeprefix("torch.")


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:200] for name in names[:limit]) + more
