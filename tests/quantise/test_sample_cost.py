"""What quantisation costs the trained sample, on held-out text: docs/quantisation.md's table, in small.

The model reads the stored weights in PyTorch; that runtimes compute the same is tests/export's.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.paths import ROOT

from dijiang_engines.formats.quantised.manifest import QuantisationCost
from dijiang_engines.progress import silent
from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dijiang_export.export.calibration import calibrate, read_calibration_text
from dijiang_export.export.dequantised import DequantisedCheckpoint
from dijiang_export.export.quantisation_cost import MeasuredText, measure_cost
from dijiang_export.graph import weights
from dijiang_export.quantise.recipe import choose_recipe
from dijiang_export.reference.rope import inverse_frequencies

SAMPLE = ROOT / "samples/tiny-stdlib"
WINDOWS, TOKENS = 32, 128


@pytest.fixture(scope="module")
def split() -> dict[str, list[str]]:
    """Texts of the standard library by split, the training's few."""
    sys.path.insert(0, str(ROOT / "samples/train_tiny"))
    try:
        from corpus import read_corpus
    finally:
        sys.path.pop(0)
    documents = read_corpus()
    train = [d.text for d in documents if d.split == "train"]
    return {"held-out": [d.text for d in documents if d.split == "held-out"], "train": train[::20]}


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    with open_checkpoint(SAMPLE) as opened:
        yield opened


@pytest.fixture(scope="module")
def held_out(split: dict[str, list[str]]) -> MeasuredText:
    """Windows spread over all held-out files: one file alone may be of another kind."""
    tokenizer = Tokenizer(SAMPLE / "tokenizer.json")
    places = np.linspace(0, len(split["held-out"]) - 1, 3 * WINDOWS).astype(int)
    windows = []
    for index in itertools.islice(dict.fromkeys(places.tolist()), 3 * WINDOWS):
        ids = tokenizer.encode(split["held-out"][index][:20_000])
        if len(ids) > TOKENS and len(windows) < WINDOWS:
            windows.append(ids[: TOKENS + 1])
    return MeasuredText(np.array(windows), "held-out files")


def cost(
    checkpoint: Checkpoint, kind: str, folder: Path, text: MeasuredText, calibration: Path | None = None
) -> QuantisationCost:
    """Quantised as an export does it, without its graphs."""
    recipe = choose_recipe(checkpoint.spec, kind)  # type: ignore[arg-type]
    layout = weights.layout_of(checkpoint.spec, torch.float32, recipe)
    extra = {"inv_freq": inverse_frequencies(checkpoint.spec)}
    weights.write(folder / "weights.data", layout, checkpoint, extra, recipe, on_bytes=lambda _: None)
    stored = DequantisedCheckpoint(checkpoint, recipe, layout, folder / "weights.data")
    if calibration is not None:
        given = read_calibration_text(calibration, checkpoint)
        calibrate(checkpoint, stored, torch.float32, given, silent)
    return measure_cost(checkpoint, stored, torch.float32, text, silent)


def test_the_sample_s_cost_on_held_out_text(
    checkpoint: Checkpoint, held_out: MeasuredText, split: dict[str, list[str]], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(split["train"])[:30_000])
    found = {}
    for name, kind, given in (("int8", "int8", None), ("int4", "int4", None), ("calibrated", "int4", text)):
        (tmp_path / name).mkdir()
        found[name] = cost(checkpoint, kind, tmp_path / name, held_out, given)
        print(name, found[name].sentence)
    assert found["int8"].tokens == WINDOWS * TOKENS >= 4000
    for name, kl, ratio in (("int8", 6e-4, 1.002), ("int4", 0.04, 1.022), ("calibrated", 0.025, 1.013)):
        assert found[name].kl <= kl
        # Losses of a token differ by sqrt(2 KL) or so: the ratio of so few tokens is that uncertain.
        uncertain = 3 * math.sqrt(2 * found[name].kl / found[name].tokens)
        assert found[name].perplexity <= (ratio + uncertain) * found[name].perplexity_float
