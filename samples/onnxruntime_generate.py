"""Text from a bundle through ONNX Runtime: the library, without the command line.

python samples/onnxruntime_generate.py tiny-stdlib.bundle 'def read(path):' --device cuda
python samples/onnxruntime_generate.py tiny-stdlib.bundle 'import os' 'class A:' --temperature 0.8

Several prompts run as one batch. Prompts may differ in length, and each gives what it would give alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import dijiang_engines as dj


def generate(
    path: str, prompts: Sequence[str], options: dj.GenerateOptions, device: str = "cpu"
) -> tuple[list[str], str]:
    """Open a bundle, continue each prompt, and return the new texts and one line about the speed.

    Args:
        path: a bundle folder that was exported with its tokenizer.
        prompts: at least one; not empty unless the model has a beginning-of-text token.
        options: when to stop, and how tokens are chosen.
        device: "cpu", "cuda", or "auto": CUDA where it is there.

    Raises:
        DijiangError: with what is wrong and what to do about it.
    """
    bundle = dj.open_model(path)
    tokenizer = dj.load_tokenizer(bundle)
    if tokenizer is None:
        raise dj.UsageError(
            f"{path} has no tokenizer", hint="give token ids to Generator.start instead of text"
        )
    runner = dj.open_runner(bundle, device)
    generation = dj.Generator(runner, tokenizer).start(prompts, options)
    for event in generation:  # one event per token; with one row, text can be shown as it comes
        if len(prompts) == 1:
            print(event.text, end="", flush=True)
    texts = [completion.text for completion in generation.completions]
    stats = generation.stats
    return texts, (
        f"{runner.name}: {stats.prompt_tokens} prompt tokens at {stats.prefill_rate:.0f}/s, "
        f"{stats.generated_tokens} new ones at {stats.decode_rate:.0f}/s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, generate, print."""
    parser = argparse.ArgumentParser(description="Text from a bundle through ONNX Runtime")
    parser.add_argument("bundle", help="made by `dijiang-export to-onnx`")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token, always")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        sampling = dj.SamplingOptions(temperature=args.temperature, top_p=args.top_p)
        options = dj.GenerateOptions(max_tokens=args.max_tokens, sampling=sampling, seed=args.seed)
        texts, speed = generate(args.bundle, args.prompts, options, args.device)
    except dj.DijiangError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if len(texts) == 1:
        print()
    else:
        for prompt, text in zip(args.prompts, texts, strict=True):
            print(f"== {prompt}\n{text}")
    print(speed, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
