"""What ONNX Runtime GenAI reads of a bundle: genai_config.json, adapter.onnx, and a tokenizer's settings.

genai_config.json: src/config.h of onnxruntime-genai@a0c04eb; what is said of version 0.18.0 was observed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dijiang_engines import io_names
from dijiang_engines.formats.file_table import (
    CONFIG,
    GENAI_ADAPTER,
    GENAI_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
)
from dijiang_engines.formats.manifest import TensorInfo, graph_io
from dijiang_engines.spec import ModelSpec, is_positive
from dijiang_export.checkpoint.files import read_json
from dijiang_export.graph import write
from dijiang_export.graph.genai_adapter import POSITION_IDS, adapter_io, write_adapter

NO_LIMIT = 2**31 - 1
"""Tokens of a text: what GenAI's numbers hold."""

_BPE = {
    "PreTrainedTokenizer", "CLIPTokenizer", "WhisperTokenizer", "GemmaTokenizer", "LlamaTokenizer",
    "Phi3Tokenizer", "CodeLlamaTokenizer", "CodeGenTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer",
    "BaichuanTokenizer", "GPTNeoXTokenizer", "TokenizersBackend",
}  # fmt: skip
_UNIGRAM = {"T5Tokenizer", "ChatGLMTokenizer", "XLMRobertaTokenizer"}
"""Classes, without "Fast", that GenAI's tokenizer knows (operators/tokenizer/tokenizer_jsconfig.hpp of
onnxruntime-extensions, and as observed). Where there is none, and of _UNIGRAM, it asks tokenizer.json."""


def write_genai(spec: ModelSpec, folder: Path) -> None:
    """Write GenAI's files into a bundle that has all others but the manifest.

    Args:
        spec: the model.
        folder: the bundle's, with config.json, and perhaps generation_config.json and a tokenizer.

    Raises:
        CheckpointError: a JSON file of the checkpoint cannot be read.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    pad = pad_token_id(spec, read_json(folder / CONFIG) | generation)
    write_adapter(spec, pad, folder)
    write.check(folder / GENAI_ADAPTER, "standard")
    config = {"model": _model(spec, pad), "search": search_defaults(spec, generation)}
    (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if (folder / TOKENIZER).exists():
        _make_loadable(folder)


def pad_token_id(spec: ModelSpec, config: dict[str, Any]) -> int:
    """The checkpoint's, or as everywhere the first token that ends texts; 0 if there is none."""
    given = config.get("pad_token_id")
    if type(given) is int and 0 <= given < spec.vocab_size:
        return given
    return spec.eos_token_ids[0] if spec.eos_token_ids else 0


def search_defaults(spec: ModelSpec, generation: dict[str, Any]) -> dict[str, Any]:
    """How GenAI chooses tokens unless it is told otherwise: generation_config.json's word, where GenAI takes
    the value, and as many tokens as the model was trained with."""
    taken: dict[str, Any] = {}
    for name, most in (("temperature", 1e6), ("top_p", 1.0), ("repetition_penalty", 1e6)):
        value = generation.get(name)
        if is_positive(value) and value <= most:  # type: ignore[operator]
            taken[name] = value
    if type(top_k := generation.get("top_k")) is int and top_k >= 0:
        taken["top_k"] = min(top_k, spec.vocab_size)
    return {
        "do_sample": generation.get("do_sample") is True,
        **taken,
        "num_beams": 1,
        "max_length": min(spec.max_position_embeddings, spec.max_positions or NO_LIMIT),
    }


def _model(spec: ModelSpec, pad: int) -> dict[str, Any]:
    tokens = {} if spec.bos_token_id is None else {"bos_token_id": spec.bos_token_id}
    return {
        "type": "decoder-pipeline",
        **tokens,
        "eos_token_id": list(spec.eos_token_ids),
        "pad_token_id": pad,
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_positions or NO_LIMIT,
        "decoder": {
            # 0: as many threads as ONNX Runtime finds right. GenAI takes half of the logical processors.
            "session_options": {"log_id": "onnxruntime-genai", "intra_op_num_threads": 0},
            "hidden_size": spec.hidden_size,
            "num_attention_heads": spec.num_heads,
            "num_hidden_layers": spec.num_layers,
            "num_key_value_heads": 1,  # of the cache that is refused to beams
            "head_size": 1,
            "inputs": {
                "input_ids": io_names.INPUT_IDS,
                "position_ids": POSITION_IDS,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": io_names.LOGITS,
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
            "pipeline": _pipeline(spec),
        },
    }


def _pipeline(spec: ModelSpec) -> list[dict[str, Any]]:
    """A call of more than one token, of all rows together, is a prompt to GenAI."""

    def stage(file: str, io: tuple[tuple[TensorInfo, ...], ...], **when: bool) -> dict[str, Any]:
        inputs, outputs = ([info.name for info in side] for side in io)
        name = file.removesuffix(".onnx")
        return {name: {"filename": file, "inputs": inputs, "outputs": outputs, **when}}

    graph = graph_io(spec, step=True, all_logits=False)
    return [
        stage(GENAI_ADAPTER, adapter_io(spec)),
        stage("prefill.onnx", graph, run_on_token_gen=False),
        stage("step.onnx", graph, run_on_prompt=False),
    ]


def _make_loadable(folder: Path) -> None:
    """See to it that GenAI's tokenizer opens tokenizer.json: it asks tokenizer_config.json for a class."""
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path) if path.exists() else {}
    kind = read_json(folder / TOKENIZER).get("model")
    kind = kind.get("type") if isinstance(kind, dict) else None
    given = settings.get("tokenizer_class")
    known = _UNIGRAM if kind == "Unigram" else _BPE | _UNIGRAM
    if path.exists() and (given is None or (isinstance(given, str) and given.removesuffix("Fast") in known)):
        return
    settings.pop("tokenizer_class", None)
    if kind != "Unigram":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
