"""Text from an engine folder through TensorRT: the library, without the command line.

dijiang-export build-plugin
dijiang-export build-engine tiny-stdlib.bundle -o tiny-stdlib.engine
python samples/tensorrt_generate.py tiny-stdlib.engine 'def read(path):' --max-tokens 40

The same program as onnxruntime_generate.py but for what is opened: everything after the runner is the same on
every runtime. `open_runner` finds the plugin that `build-plugin` made; an engine folder never brings one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import dijiang_engines as dj


def generate(path: str, prompts: Sequence[str], options: dj.GenerateOptions) -> tuple[list[str], str]:
    """Open an engine folder, continue each prompt, and return the new texts and one line about the speed.

    Args:
        path: an engine folder whose bundle had a tokenizer.
        prompts: at least one, at most as many as the engine's largest batch.
        options: when to stop, and how tokens are chosen.

    Raises:
        DijiangError: with what is wrong and what to do about it.
    """
    engine = dj.open_model(path)
    tokenizer = dj.load_tokenizer(engine)
    if tokenizer is None:
        raise dj.UsageError(
            f"{path} has no tokenizer", hint="give token ids to Generator.start instead of text"
        )
    runner = dj.open_runner(engine, "tensorrt")
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
    parser = argparse.ArgumentParser(description="Text from an engine folder through TensorRT")
    parser.add_argument("engine", help="made by `dijiang-export build-engine`")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token, always")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        sampling = dj.SamplingOptions(temperature=args.temperature, top_p=args.top_p)
        options = dj.GenerateOptions(max_tokens=args.max_tokens, sampling=sampling, seed=args.seed)
        texts, speed = generate(args.engine, args.prompts, options)
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
