"""Train a small GPT-NeoX on the Python library's source, convert it to DiJiang, fine-tune it.

    python samples/train_tiny/train.py --out tiny            # minutes on a GPU, hours on a CPU

OUT gets vanilla/, converted/, dijiang/ (float16, what is shipped), metrics.json and a model card.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import model as models
import safetensors
import tokenizers
import torch
import transformers
from card import write_card
from evaluate import Tokens, encode, held_out
from tokenizer import save_tokenizer, train_tokenizer
from torch.nn.functional import cross_entropy

from dijiang_export.convert import convert_checkpoint


@dataclass(frozen=True)
class Run:
    """What every stage shares."""

    train: Tokens
    validation: Tokens
    held_out: Tokens
    context: int
    batch: int
    device: torch.device
    seed: int


def fit(
    run: Run, net: Any, name: str, steps: int, peak: float, stream: int, positions: int = 1
) -> dict[str, Any]:
    """AdamW on random windows of the training stream, linear warm-up, cosine to a tenth of `peak`.

    `stream` numbers the stage's own sequence of windows. Half of each batch starts at position 0, half at
    a random position below `positions`. Returns the stage's compute and its curve.
    """
    net.to(run.device).train()
    decayed = [p for p in net.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in net.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=run.device.type == "cuda",
    )
    warmup = min(200, max(1, steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(run.seed * 1000 + stream)
    ids = run.train.ids.to(run.device)
    offsets = torch.arange(run.context + 1, device=run.device)
    every = max(1, steps // 8)
    curve, running, seconds = [], torch.zeros((), device=run.device), 0.0
    started = _clock(run.device)
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - run.context, (run.batch, 1), generator=generator).to(run.device)
        window = ids[starts + offsets]
        first = torch.randint(positions, (run.batch, 1), generator=generator)
        first[: run.batch // 2] = 0
        places = first.to(run.device) + offsets[:-1]
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
            logits = net(window[:, :-1], position_ids=places, use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decayed + others, 1.0)
        optimizer.step()
        schedule.step()
        running += loss.detach()
        if step % every == 0 or step == steps:
            seconds += _clock(run.device) - started
            since = step - (curve[-1]["step"] if curve else 0)
            point = {
                "step": step,
                "train_loss": running.item() / since,
                "validation_loss": held_out(net, run.validation, run.context)["all"]["loss"],
                "seconds": round(seconds, 2),
            }
            curve.append(point)
            print(
                f"{name:>18} step {step:5d}/{steps}  train {point['train_loss']:.4f}  "
                f"validation {point['validation_loss']:.4f}  {seconds:6.1f} s",
                flush=True,
            )
            running.zero_()
            net.train()
            started = _clock(run.device)
    tokens = steps * run.batch * run.context
    return {
        "steps": steps,
        "tokens": tokens,
        "peak_learning_rate": peak,
        "seconds": round(seconds, 2),
        "flops": float(models.flops_per_token(net, run.context) * tokens),
        "curve": curve,
    }


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults are the shipped sample's settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--stdlib", type=Path, help="library folder (default: this Python's own)")
    parser.add_argument("--python-version", help="the library's version, if --stdlib is another Python's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8, help="hidden / heads must be a multiple of 16")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500, help="of the vanilla model")
    parser.add_argument("--finetune-steps", type=int, default=1200, help="after conversion")
    parser.add_argument("--positions", type=int, default=65536, help="of windows, when training DiJiang")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--finetune-lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-controls", action="store_true", help="skip the three comparison runs")
    args = parser.parse_args(arguments)
    if args.hidden % args.heads or args.hidden // args.heads % 16:
        parser.error(f"--hidden / --heads must be a multiple of 16, got {args.hidden} / {args.heads}")
    if args.out.exists():
        parser.error(f"{args.out} exists")
    return args


class Results:
    """The stages' compute and held-out numbers, in the order in which they ran."""

    def __init__(self, run: Run, facts: dict[str, Any], out: Path) -> None:
        self.run, self.facts, self.out = run, facts, out
        self.stages: dict[str, dict[str, Any]] = {}

    def add(self, name: str, net: Any, compute: dict[str, Any] | None = None) -> None:
        """Evaluate `net` on the held-out files and keep the result under `name`."""
        result = held_out(net.to(self.run.device), self.run.held_out, self.run.context)
        self.stages[name] = {"compute": compute, "held_out": result}
        print(
            f"{name:>18} held-out perplexity {result['all']['perplexity']:.3f}, "
            f"{result['all']['bits_per_byte']:.4f} bits per byte",
            flush=True,
        )

    def write(self) -> None:
        """Write metrics.json and the card with what there is so far."""
        metrics = self.facts | {"stages": self.stages}
        (self.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        write_card(metrics, self.out / "dijiang")


def run_controls(run: Run, results: Results, args: argparse.Namespace) -> None:
    """What the fine-tuned numbers should be compared with: less of it, no conversion, no vanilla run."""
    converted = models.load(args.out / "converted", dijiang=True)
    initial = {k: v.clone() for k, v in converted.state_dict().items() if models.is_dijiang_parameter(k)}
    compute = fit(
        run, converted, "fine-tuned 1/16", max(1, args.steps // 16), args.finetune_lr, 2, args.positions
    )
    results.add("fine-tuned 1/16", converted, compute)
    results.write()

    vanilla = models.load(args.out / "vanilla", dijiang=False)
    compute = fit(run, vanilla, "vanilla continued", args.finetune_steps, args.finetune_lr, stream=1)
    results.add("vanilla continued", vanilla, compute)
    results.write()

    torch.manual_seed(args.seed)
    config = json.loads((args.out / "converted" / "config.json").read_text())
    scratch = models.build(config, dijiang=True)
    scratch.load_state_dict(initial, strict=False)
    compute = fit(run, scratch, "from scratch", args.finetune_steps, args.lr, 1, args.positions)
    results.add("from scratch", scratch, compute)
    results.write()


def describe(args: argparse.Namespace, arguments: list[str] | None) -> dict[str, Any]:
    """The command, its settings, and what it ran on."""
    return {
        "command": " ".join(["python", "samples/train_tiny/train.py", *(arguments or sys.argv[1:])]),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Run all stages and write everything below --out."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # training only; held-out numbers use full float32
    documents = corpus.read_corpus(args.stdlib)
    texts = {s: [d for d in documents if d.split == s] for s in ("train", "validation", "held-out")}
    tokenizer = train_tokenizer((d.text for d in texts["train"]), args.vocab)
    run = Run(
        *(encode(texts[s], tokenizer) for s in ("train", "validation", "held-out")),
        context=args.context,
        batch=args.batch,
        device=torch.device(args.device),
        seed=args.seed,
    )
    facts = corpus.describe(documents, args.python_version)
    facts["tokens"] = {"train": len(run.train.ids), "held-out": len(run.held_out.ids)}
    print(f"corpus: {json.dumps(facts)}", flush=True)
    config = models.neox_config(
        vocab=tokenizer.get_vocab_size(),
        hidden=args.hidden,
        heads=args.heads,
        layers=args.layers,
        intermediate=args.intermediate,
        context=args.context,
    )
    results = Results(run, describe(args, arguments) | {"corpus": facts, "config": config}, args.out)

    net = models.build(config, dijiang=False)
    compute = fit(run, net, "vanilla", args.steps, args.lr, stream=0)
    results.add("vanilla", net, compute)
    models.save(net, args.out / "vanilla", config)
    save_tokenizer(tokenizer, args.out / "vanilla", args.context)

    convert_checkpoint(args.out / "vanilla", args.out / "converted", seed=args.seed)
    net = models.load(args.out / "converted", dijiang=True)
    results.add("converted", net)

    compute = fit(run, net, "fine-tuned", args.finetune_steps, args.finetune_lr, 1, args.positions)
    results.add("fine-tuned", net, compute)
    results.facts["parameters"] = sum(p.numel() for p in net.parameters())
    shipped = args.out / "dijiang"
    converted_config = json.loads((args.out / "converted" / "config.json").read_text())
    models.save(net, shipped, converted_config, torch.float16)
    save_tokenizer(tokenizer, shipped, args.context)
    results.add("fine-tuned float16", models.load(shipped, dijiang=True))

    results.write()
    if not args.no_controls:
        run_controls(run, results, args)


if __name__ == "__main__":
    main()
