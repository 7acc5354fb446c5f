"""The small trained model that comes with the package: samples/tiny-stdlib."""

from __future__ import annotations

from pathlib import Path

from dijiang_engines.errors import CheckpointError

SAMPLE_NAME = "tiny-stdlib"


def sample_checkpoint() -> Path:
    """The folder of the shipped sample checkpoint: inside an installed wheel, or in a source checkout.

    Raises:
        CheckpointError: this installation has no sample.
    """
    here = Path(__file__).resolve().parent
    places = [here / "samples" / SAMPLE_NAME, here.parents[1] / "samples" / SAMPLE_NAME]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        "the sample checkpoint is not part of this installation",
        got=", ".join(str(place) for place in places) + " do not exist",
        hint="name a checkpoint folder, or install dijiang-export from its wheel or a clone",
    )
