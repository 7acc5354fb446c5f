"""PyTorch's side of `bench`: the reference model's recurrent steps and prefills, in a process of its own.

A process of its own because two runtimes' thread pools in one process slow each other down. The steps use
the recurrent form, the prefills the parallel form (the official code's) and the chunked one, all of
`dijiang_export.reference`, in float32 eager mode under inference_mode.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dijiang_engines.bench.runner import NEAR, WARM_UP_STEPS
from dijiang_engines.bench.timing import Effort, Timing, until_done
from dijiang_engines.errors import DijiangError, RunnerError
from dijiang_engines.fresh_interpreter import command_for

if TYPE_CHECKING:
    from dijiang_export.reference.model import ReferenceModel

FORMS = ("parallel", "chunked")


def measure_in_subprocess(
    checkpoint: Path, *, threads: int, lengths: Sequence[int], effort: Effort
) -> dict[str, Any]:
    """Run `measure` in a fresh interpreter with `threads` threads.

    Raises:
        RunnerError: it failed.
    """
    wanted = json.dumps({"threads": threads, "lengths": list(lengths), "effort": asdict(effort)})
    command = command_for("dijiang_export.bench.reference", str(checkpoint), wanted)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RunnerError(
            "measuring the PyTorch reference failed",
            got=f"exit code {done.returncode}",
            hint="its message is above; leave out --checkpoint to measure the bundle alone",
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(checkpoint: Path, *, threads: int, lengths: Sequence[int], effort: Effort) -> dict[str, Any]:
    """Measure the reference model of a checkpoint, float32, one sequence, in this process.

    Args:
        checkpoint: a DiJiang checkpoint folder.
        threads: of PyTorch's operators.
        lengths: of prefills.
        effort: how long to measure each figure.

    Returns:
        {"torch", "threads", "load_seconds", "step": Timing, "prefill": [{"form", "length", "timing"}]}.
    """
    import torch

    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = _load(checkpoint)
    loaded = time.perf_counter() - start
    rng = torch.Generator().manual_seed(0)
    limit = model.spec.max_positions

    def tokens(count: int) -> Any:
        return torch.randint(0, model.spec.vocab_size, (1, count), generator=rng)

    with torch.inference_mode():
        states = model.new_states(1)
        ids = [tokens(1) for _ in range(64)]
        first = min(NEAR, (limit or NEAR + 9) - 9)
        done = 0

        def step() -> None:
            nonlocal done, states
            position = torch.tensor([first + (done % 8 if limit is not None else done)])
            _, states = model(ids[done % 64], position, None, states, form="recurrent", all_logits=False)
            done += 1

        step_timing = _time(step, effort, WARM_UP_STEPS)
        prefill = []
        for length in lengths:
            if limit is not None and length > limit:
                continue
            prompt = tokens(length)
            for form in FORMS:

                def run(prompt: Any = prompt, form: Any = form) -> None:
                    model(prompt, form=form, all_logits=False)

                timing = asdict(_time(run, effort, 1))
                prefill.append({"form": form, "length": length, "timing": timing})
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_seconds": loaded,
        "step": asdict(step_timing),
        "prefill": prefill,
    }


def _load(checkpoint: Path) -> ReferenceModel:
    import torch

    from dijiang_export.checkpoint.checkpoint import open_checkpoint
    from dijiang_export.reference.model import ReferenceModel

    with open_checkpoint(checkpoint) as opened:
        model = ReferenceModel(opened.spec, dtype=torch.float32)
        model.load_state_dict(opened.load_state_dict(torch.float32))
    return model.eval()


def _time(call: Callable[[], None], effort: Effort, warm_up: int) -> Timing:
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in until_done(effort):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def main() -> None:
    """Measure the checkpoint that the first argument names as the second, in JSON, says; print JSON."""
    checkpoint, wanted = sys.argv[1], json.loads(sys.argv[2])
    effort = Effort(**wanted["effort"])
    try:
        result = measure(
            Path(checkpoint), threads=wanted["threads"], lengths=wanted["lengths"], effort=effort
        )
    except DijiangError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
