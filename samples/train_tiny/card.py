"""The model card: every number in it comes from metrics.json, and from what check.py printed.

python samples/train_tiny/card.py METRICS.json FOLDER [CHECK.jsonl]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LABELS = {
    "vanilla": "vanilla: softmax attention",
    "converted": "just converted",
    "fine-tuned": "converted and fine-tuned, float32",
    "fine-tuned float16": "**this checkpoint** (the same, rounded to float16)",
    "fine-tuned 1/16": "comparison: fine-tuned with 1/16 of vanilla's steps",
    "vanilla continued": "comparison: vanilla, trained on for as many steps as the fine-tuning",
    "from scratch": "comparison: DiJiang from random weights, as many steps as the fine-tuning",
}

PARTS = ("all", "library", "tests")

TEMPLATE = """---
license: apache-2.0
language: code
tags: [dijiang, linear-attention, gpt_neox, python]
---
# tiny-stdlib

A DiJiang model (linear attention; arXiv 2403.19928) small enough to ship: {layers} layers, {heads} heads
of {head_dim}, hidden size {hidden}, {vocab} tokens, {parameters:.2f} million parameters (decay tables
included), {size:.1f} MB. It writes text that looks like Python. It was trained to have something real to
export, validate and time; it knows nothing else, and what it writes is not meant to be run.

The layout is the official one of GPT-NeoX DiJiang checkpoints
(`gpt_neox.layers.i.attention.{{query_key_value,dense,W_G,group_norm,proj_matrix,D1,D2}}`).

## How it was made

1. A GPT-NeoX model with softmax attention was trained from random weights.
2. `dijiang-export convert` replaced its attention: P from the DCT and quasi-Monte Carlo weights, the
   gate, the GroupNorm and the decay as the official code initialises them.
3. All weights but `proj_matrix`, `D1` and `D2` were fine-tuned, on windows of {context} tokens; half of them
   started at a random position below {positions} instead of 0.
4. Weights were rounded to float16; `D1` and `D2` stay float32, because `D2` does not fit into float16.

`proj_matrix` is frozen in the official code too. `D1` and `D2` are not: there they are trained, after
which they are tables for {context} positions and say nothing about the next one. Here they keep their
geometric initialisation, so that the model has one decay per head and no last position.

## Data

The source of the Python {python} standard library, `*.py`, without `encodings/`, `pydoc_data/`, generated
`_sysconfigdata*` and files that are not UTF-8: {files} files, {megabytes:.1f} MB, {test_files} of them
CPython's own tests. Split by file, by a hash of the path: {train_files} files ({train_mb:.1f} MB) to train
on, {validation_files} ({validation_mb:.1f} MB) to watch the runs, {held_files} ({held_mb:.1f} MB) held out.
SHA-256 over paths and contents: `{sha256}`.

That source is under the PSF License Agreement (<https://docs.python.org/3/license.html>), with parts under
the licences listed there. The weights are published under this project's licence, Apache-2.0; where the
model repeats a passage of its training text, that text stays under its own licence.

## Held-out text

{held_tokens} tokens in windows of {context}, nothing carried from one window to the next. Bits per byte do
not depend on the tokenizer. Library and tests are the two parts of the held-out files.

| model | perplexity per token | bits per byte | library | tests |
|---|---|---|---|---|
{quality}
{longer}
## Compute

On one {device}, Python {machine_python}, torch {torch}, transformers {transformers}; bfloat16 autocast, with
the mixing of tokens in DiJiang layers in float32 (TF32 products). Seconds are training alone, without
evaluation. FLOPs are estimates: per token, 6 for each weight that multiplies it, plus 12 × layers × hidden ×
(context for softmax attention; chunk + 2 × head size for DiJiang, which trains in chunks of 64).

| run | steps | tokens | peak learning rate | seconds | FLOPs |
|---|---|---|---|---|---|
{compute}

The fine-tuning took {share:.0%} of the vanilla run's steps. Command:

    {command}

## What to expect of it

- Nothing in it stops at position {context}. RoPE comes before the softmax of φ, so that attention sees
  absolute positions: windows that start far into a sequence were part of the fine-tuning for that reason.
- It reproduces the style, names and licence headers of the standard library.
- Its numbers say how well this small model survived conversion, not how well DiJiang converts large ones.
"""


LONGER = """
Windows longer than those it was trained on, state carried through, by `check.py`, which uses another
implementation:

| window | perplexity per token | bits per byte |
|---|---|---|
{rows}
"""


def write_card(metrics: dict[str, Any], folder: Path, check: Path | None = None) -> None:
    """Write README.md for the checkpoint in `folder`; `check` holds check.py's lines about it."""
    config, corpus, stages = metrics["config"], metrics["corpus"], metrics["stages"]
    quality, compute = [], []
    for name, label in LABELS.items():
        if name not in stages:
            continue
        result, cost = stages[name]["held_out"], stages[name]["compute"]
        bits = [f"{result[p]['bits_per_byte']:.3f}" if p in result else "-" for p in PARTS]
        quality.append(f"| {label} | {result['all']['perplexity']:.2f} | {' | '.join(bits)} |")
        if cost:
            compute.append(
                f"| {label} | {cost['steps']} | {cost['tokens'] / 1e6:.1f} million "
                f"| {cost['peak_learning_rate']:g} | {cost['seconds']:.0f} | {cost['flops']:.2e} |"
            )
    longer = ""
    if check is not None:
        lines = [json.loads(line) for line in check.read_text().splitlines()[1:]]
        rows = [
            f"| {line['window']} | {line['held_out']['all']['perplexity']:.2f} "
            f"| {line['held_out']['all']['bits_per_byte']:.3f} |"
            for line in lines
        ]
        longer = LONGER.format(rows="\n".join(rows))
    text = TEMPLATE.format(
        longer=longer,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        positions=metrics["settings"]["positions"],
        parameters=metrics["parameters"] / 1e6,
        size=(folder / "model.safetensors").stat().st_size / 1e6,
        python=corpus["python"],
        files=corpus["files"],
        test_files=corpus["test_files"],
        megabytes=corpus["bytes"] / 1e6,
        train_files=corpus["train"]["files"],
        train_mb=corpus["train"]["bytes"] / 1e6,
        validation_files=corpus["validation"]["files"],
        validation_mb=corpus["validation"]["bytes"] / 1e6,
        held_files=corpus["held-out"]["files"],
        held_mb=corpus["held-out"]["bytes"] / 1e6,
        held_tokens=stages["vanilla"]["held_out"]["all"]["tokens"],
        sha256=corpus["sha256"],
        device=metrics["machine"]["device"],
        machine_python=metrics["machine"]["python"],
        torch=metrics["machine"]["torch"],
        transformers=metrics["machine"]["transformers"],
        share=stages["fine-tuned"]["compute"]["steps"] / stages["vanilla"]["compute"]["steps"],
        command=metrics["command"],
        quality="\n".join(quality),
        compute="\n".join(compute),
    )
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    metrics_file, card_folder, *check_file = map(Path, sys.argv[1:])
    write_card(json.loads(metrics_file.read_text()), card_folder, *check_file)
