"""The tokenizer that came with a model."""

from __future__ import annotations

from dijiang_engines.formats.file_table import TOKENIZER
from dijiang_engines.formats.open import Model
from dijiang_engines.tokenizer.tokenizer import Tokenizer


def load_tokenizer(model: Model) -> Tokenizer | None:
    """The tokenizer that was opened with the model; None if the checkpoint came without one.

    Raises:
        BundleError: it is not a tokenizer, or was replaced since.
    """
    if model.tokenizer_path is None:
        return None
    with model.opened.unchanged(TOKENIZER) as root:
        return Tokenizer(root / TOKENIZER)
