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
    model, data, settings = metrics["model"], metrics["data"], metrics["settings"]
    decay = "learned, one γ a head" if settings["learn_decay"] else "geometric, as the official code begins"
    lines = [
        "---",
        f"tags: [dijiang, linear-attention, {model['family']}, distilled]",
        "---",
        f"# {metrics['name']}",
        "",
        f"A DiJiang model (linear attention; arXiv 2403.19928) distilled from `{model['teacher']}`: {model['layers']} "
        f"layers, {model['heads']} heads of {model['head_dim']}, hidden size {model['hidden']}, "
        f"{model['parameters'] / 1e6:.1f} million parameters. Its state is {model['state_bytes'] / 1e6:.2f} MB a text, "
        f"however long. Weights are {settings['dtype']}; decay is {decay}.",
        "",
        "![learning curve](curve.svg)",
        "",
        "## Held-out numbers",
        "",
        "In float32, windows that stand alone. The teacher's perplexity is of the same tokens; KL is of the teacher "
        "to the student, nats a token; top-1 is how often both hold the same token most likely.",
        "",
        *_numbers(metrics["stages"]),
        "",
        "## Training",
        "",
        *_training(metrics["stages"]),
        "",
        f"On {metrics['machine']['device']}; torch {metrics['machine']['torch']}, transformers "
        f"{metrics['machine']['transformers']}, recurrence: {settings['recurrence']}"
        f"{metrics['machine']['fla'] and ' ' + metrics['machine']['fla']}. Seconds are of the loop alone, compilation "
        "included, evaluation not.",
        "",
        "## Data",
        "",
        *[
            f"- {kind}: {facts['train']:,} tokens to train on, {facts['held_out']:,} held out. {facts['origin']}"
            for kind, facts in data.items()
        ],
        "",
        "## Command",
        "",
        f"    {metrics['command']}",
        "",
        "How it works: samples/distill of dijiang-export.",
        "",
    ]
    return "\n".join(lines)


def _numbers(stages: list[dict[str, Any]]) -> list[str]:
    out = [
        "| after | text | tokens | perplexity | teacher's | ratio | KL | top-1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage in stages:
        for kind, n in stage["held_out"].items():
            out.append(
                f"| {stage['name']} | {kind} | {n['tokens']:,} | {n['perplexity']:.2f} | {n['teacher_perplexity']:.2f} | "
                f"{n['ratio']:.3f} | {n['kl']:.3f} | {n['top1']:.1%} |"
            )
    return out


def _training(stages: list[dict[str, Any]]) -> list[str]:
    out = ["| step | tokens | windows | learning rate | seconds | tokens/s |", "|---|---|---|---|---|---|"]
    for stage in stages:
        if stage.get("tokens"):
            out.append(
                f"| {stage['name']} | {stage['tokens'] / 1e6:.1f} million | {stage['rows']} × {stage['context']} | "
                f"{stage['peak']:g} | {stage['seconds']:.0f} | {stage['tokens'] / stage['seconds']:,.0f} |"
            )
    return out
