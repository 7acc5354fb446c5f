"""Record what PyTorch's reference model continues prompts with: `python greedy.py CHECKPOINT OUT.json`.

Greedy, 256 tokens, float32, the recurrent form, ids without a token left out: what tests/gpu/engine.py
compares an engine's text with. Needs PyTorch and the sample's tokenizer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_export.bench.reference import _load

PROMPTS = ("def main():", "import os\n", "class Reader:\n    def", "    return", "if __name__ == ")
TOKENS = 256


def main() -> int:
    """Generate and write."""
    checkpoint = Path(sys.argv[1])
    model = _load(checkpoint)
    tokenizer = Tokenizer(checkpoint / "tokenizer.json")
    allowed = torch.from_numpy(tokenizer.token_mask(model.spec.vocab_size))
    found = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt)
            states = model.new_states(1)
            new: list[int] = []
            margin = float("inf")
            feed = ids
            position = 0
            while len(new) < TOKENS:
                for token in feed:
                    logits, states = model(
                        torch.tensor([[token]]), torch.tensor([position]), None, states,
                        form="recurrent", all_logits=False,
                    )  # fmt: skip
                    position += 1
                scores = logits[0, -1].masked_fill(~allowed, -torch.inf)
                best = scores.topk(2)
                margin = min(margin, float(best.values[0] - best.values[1]))
                new.append(int(best.indices[0]))
                feed = new[-1:]
            found.append({"prompt": prompt, "tokens": new, "least_margin": margin})
    Path(sys.argv[2]).write_text(json.dumps(found))
    for entry in found:
        print(f"{entry['prompt']!r}: least margin {entry['least_margin']:.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
