"""Names and element types of the graphs' inputs and outputs: ONNX Runtime GenAI's, everywhere.

inputs   input_ids int64 [B, L], positions int64 [B], seq_lens int64 [B],
         past_key_values.{i}.recurrent_state float32 [B, H, d, d]
outputs  logits float32 [B, 1, V] (or [B, L, V]), present.{i}.recurrent_state float32 [B, H, d, d]
"""

from __future__ import annotations

INPUT_IDS = "input_ids"
POSITIONS = "positions"
SEQ_LENS = "seq_lens"
LOGITS = "logits"

BATCH_DIM = "batch"
SEQUENCE_DIM = "sequence"


def past_state(layer: int) -> str:
    """Name of the input that carries layer `layer`'s state."""
    return f"past_key_values.{layer}.recurrent_state"


def present_state(layer: int) -> str:
    """Name of the output that carries layer `layer`'s state."""
    return f"present.{layer}.recurrent_state"
