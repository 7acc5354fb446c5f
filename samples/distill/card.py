"""The model card and the learning curve, from nothing but metrics.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dijiang_engines.svg_plot import Axis, Series, picture

CURVE = "curve.svg"


def write_card(metrics: dict[str, Any], folder: Path) -> None:
    """README.md and curve.svg into a checkpoint's folder."""
    (folder / CURVE).write_text(curve(metrics["stages"]), encoding="utf-8")
    (folder / "README.md").write_text(card(metrics), encoding="utf-8")


def curve(stages: list[dict[str, Any]]) -> str:
    """The training losses of all steps over tokens seen, and held-out KL at the end of each, as an SVG."""
    series, before, held_out = [], 0, []
    for stage in stages:
        points = [((before + tokens) / 1e6, loss) for tokens, loss in stage.get("curve", [])]
        if points:
            series.append(Series(f"{stage['name']}: {stage['loss']}", points))
        before += stage.get("tokens", 0)
        for kind, numbers in stage["held_out"].items():
            if kind == "text" and stage.get("kind") not in ("tune", "tune teacher"):
                held_out.append((before / 1e6, numbers["kl"]))
    series.append(Series("held-out text: KL to the teacher, nats", held_out))
    return picture("Learning", series, Axis("million tokens seen"), Axis("loss", log=True, snug=True))


def card(metrics: dict[str, Any]) -> str:
    """The card's text."""
    return TEXT.format(
        name=metrics["name"],
        model=_model(metrics),
        numbers="\n".join(_numbers(metrics["stages"])),
        training="\n".join(_training(metrics["stages"])),
        machine=_machine(metrics),
        data="\n".join(_data(kind, facts) for kind, facts in metrics["data"].items()),
        command=metrics["command"],
        family=metrics["model"]["family"],
    )


TEXT = """---
tags: [dijiang, linear-attention, {family}, distilled]
---
# {name}

{model}

![learning curve](curve.svg)

## Held-out numbers

In float32, windows that stand alone. The teacher's perplexity is of the same tokens. KL is of the teacher to
the student, nats a token; top-1 is how often both hold the same token most likely.

{numbers}

## Training

{training}

{machine} Seconds are of the loop alone, compilation included, evaluation not.

## Data

{data}

## Command

    {command}

How it works: samples/distill of dijiang-export.
"""


def _model(metrics: dict[str, Any]) -> str:
    model, settings = metrics["model"], metrics["settings"]
    decay = "learned, one γ a head" if settings["learn_decay"] else "geometric, as the official code begins"
    return (
        f"A DiJiang model (linear attention; arXiv 2403.19928) distilled from `{model['teacher']}`:\n"
        f"{model['layers']} layers, {model['heads']} heads of {model['head_dim']}, hidden size "
        f"{model['hidden']}, {model['parameters'] / 1e6:.1f} million parameters.\n"
        f"Its state is {model['state_bytes'] / 1e6:.2f} MB a text, however long. Weights are "
        f"{settings['dtype']}; decay is {decay}."
    )


def _machine(metrics: dict[str, Any]) -> str:
    machine = metrics["machine"]
    fla = f" {machine['fla']}" if machine["fla"] else ""
    return (
        f"On {machine['device']}; torch {machine['torch']}, transformers {machine['transformers']}, "
        f"recurrence: {metrics['settings']['recurrence']}{fla}."
    )


def _data(kind: str, facts: dict[str, Any]) -> str:
    return (
        f"- {kind}: {facts['train']:,} tokens to train on, {facts['held_out']:,} held out. {facts['origin']}"
    )


def _numbers(stages: list[dict[str, Any]]) -> list[str]:
    head = "| after | text | tokens | perplexity | teacher's | ratio | KL | top-1 |"
    return [head, "|---" * 8 + "|"] + [
        f"| {stage['name']} | {kind} | {n['tokens']:,} | {n['perplexity']:.2f} | "
        f"{n['teacher_perplexity']:.2f} | {n['ratio']:.3f} | {n['kl']:.3f} | {n['top1']:.1%} |"
        for stage in stages
        for kind, n in stage["held_out"].items()
    ]


def _training(stages: list[dict[str, Any]]) -> list[str]:
    head = "| step | tokens | windows | learning rate | seconds | tokens/s |"
    return [head, "|---" * 6 + "|"] + [
        f"| {stage['name']} | {stage['tokens']:,} | {stage['rows']} × {stage['context']} | "
        f"{stage['peak']:g} | {stage['seconds']:.0f} | {stage['tokens'] / max(stage['seconds'], 1e-9):,.0f} |"
        for stage in stages
        if stage["tokens"]
    ]
