"""What `bench peers` asks of other ways to run a model of the same shape, and who they are.

    hf-eager          transformers' GPT-NeoX with softmax attention and a KV cache that grows
    hf-compiled       the same with a static cache, through torch.compile(mode="reduce-overhead")
    hf-graph          the same, compiled, with each whole call captured in one CUDA graph
    dijiang-eager     this project's PyTorch reference: recurrent steps, parallel and chunked prefills
    dijiang-compiled  the same through torch.compile(mode="reduce-overhead")
    dijiang-graph     the same, compiled, with each whole call captured in one CUDA graph

And who runs one softmax model from its folder, beside a bundle:

    hf-eager          transformers' model of that folder, with a KV cache that grows
    hf-static         the same with a static cache
    hf-compiled       the same with a static cache, through torch.compile
    hf-graph          the same, compiled, with each whole call captured in one CUDA graph
    ort-genai         ONNX Runtime GenAI, on the graph that its own builder makes of the folder
    dijiang-bundle    the bundle, through ONNX Runtime

Needs no PyTorch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.errors import UsageError
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.peers.figures import BLOCK
from dijiang_export.bench.random_checkpoint import Shape

GENAI, BUNDLE = "ort-genai", "dijiang-bundle"
WITHOUT_TORCH = (GENAI, BUNDLE)
PEERS = ("hf-eager", "hf-compiled", "hf-graph", "dijiang-eager", "dijiang-compiled", "dijiang-graph")
MODEL_PEERS = ("hf-eager", "hf-static", "hf-compiled", "hf-graph", GENAI, BUNDLE)
CONTEXTS = (128, 512, 2048, 8192)
LENGTHS = (512, 2048, 8192)
BATCHES = (1,)
SECONDS = 2.0
WORDS = 400
"""Characters of an error that are kept."""
_GROUP_NORM_EPSILON = 1e-5
"""torch.nn.GroupNorm's default, which the official code leaves (modeling_gpt_neox_dijiang.py@3459531:111)."""


@dataclass(frozen=True)
class PeerSettings:
    """What is asked of every peer."""

    shape: Shape
    dtype: str = "float16"
    device: str = "cuda"
    threads: int = 1
    """Of PyTorch's operators on a CPU."""
    batches: tuple[int, ...] = BATCHES
    contexts: tuple[int, ...] = CONTEXTS
    """Tokens before the steps. All are measured with one row, the largest of them also with more."""
    lengths: tuple[int, ...] = LENGTHS
    """Of prefills. All with one row; with more where all rows together have no more tokens than that."""
    seconds: float = SECONDS
    backend: str = "inductor"
    """Of torch.compile."""
    checkpoint: str | None = None
    """Folder of a softmax model that is measured instead of random weights of the shape."""
    bundle: str | None = None
    """Folder of a bundle to measure beside it."""
    genai: str | None = None
    """Where ONNX Runtime GenAI's builder put what it made of the checkpoint."""

    def spec(self) -> ModelSpec:
        """The DiJiang model of the checkpoint's or the shape's sizes, with geometric decay.

        Raises:
            CheckpointError: the checkpoint is not of a family that `convert` takes.
            UsageError: the sizes do not fit each other.
        """
        return neox_spec(self.shape) if self.checkpoint is None else read_spec(Path(self.checkpoint))

    def known(self) -> tuple[str, ...]:
        """Peers that can measure this."""
        if self.checkpoint is None:
            return PEERS
        return MODEL_PEERS if self.bundle is not None else tuple(p for p in MODEL_PEERS if p != BUNDLE)

    def start(self, context: int) -> int:
        """Tokens before a block of steps at `context`: so many, or what lets the block end where a softmax
        model's positions do."""
        if self.checkpoint is None:
            return context
        return min(context, self.shape.positions - BLOCK - 1)

    def check(self) -> None:
        """Raise if the model has no such context.

        Raises:
            UsageError: a context or length lies beyond the positions that a softmax model was made for, or is
                too short to decode at.
            CheckpointError: as `spec`.
        """
        self.spec()
        if self.checkpoint is None:
            return
        longest = max((*self.contexts, *self.lengths), default=0)
        if longest > self.shape.positions:
            raise UsageError(
                f"{self.checkpoint} has no context of {longest} tokens",
                expected=f"at most {self.shape.positions}, its max_position_embeddings",
                hint="choose with --context and --length; a DiJiang bundle alone is measured by `bench run`",
            )
        if self.contexts and self.start(max(self.contexts)) < 1:
            raise UsageError(
                f"{self.checkpoint} has too few positions to decode {BLOCK} tokens",
                got=self.shape.positions,
            )

    def decodes(self) -> list[tuple[int, int]]:
        """(batch, context) of the steps."""
        largest = max(self.contexts, default=0)
        return [(b, n) for b in self.batches for n in self.contexts if b == 1 or n == largest]

    def prefills(self) -> list[tuple[int, int]]:
        """(batch, length) of the prefills."""
        most = max(self.lengths, default=0)
        return [(b, n) for b in self.batches for n in self.lengths if b == 1 or b * n <= most]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PeerSettings:
        """What `to_json` wrote."""
        values = data | {key: tuple(data[key]) for key in ("batches", "contexts", "lengths")}
        return cls(**values | {"shape": Shape(**data["shape"])})


def neox_spec(shape: Shape) -> ModelSpec:
    """The DiJiang model of a shape, with geometric decay.

    Raises:
        UsageError: the sizes do not fit each other.
    """
    if shape.hidden % shape.heads:
        raise UsageError(
            "the hidden size is not a multiple of the heads", got=f"{shape.hidden} and {shape.heads}"
        )
    head_dim = shape.hidden // shape.heads
    return ModelSpec(
        family="gpt_neox", vocab_size=shape.vocab, hidden_size=shape.hidden, num_layers=shape.layers,
        intermediate_size=shape.intermediate, num_heads=shape.heads, num_kv_heads=shape.heads,
        head_dim=head_dim, rotary_dim=int(head_dim * shape.rotary_pct), rope_theta=10000.0, rope_scaling=None,
        norm="layer_norm", norm_epsilon=1e-5, activation="gelu", gated_mlp=False, parallel_residual=True,
        post_norm=False, final_norm=True, attention_bias=True, dense_bias=True, mlp_bias=True,
        position_embeddings=0, position_offset=0, embedding_size=shape.hidden, tied_embeddings=False,
        max_position_embeddings=shape.positions, decay="geometric", decay_rows=0, decay_extended=False,
        group_norm_epsilon=_GROUP_NORM_EPSILON, bos_token_id=0, eos_token_ids=(0,),
    )  # fmt: skip


def read_spec(folder: Path) -> ModelSpec:
    """The DiJiang model of a softmax checkpoint's sizes, from its config.json alone.

    Raises:
        CheckpointError: there is none, or it is not of a family that `convert` takes.
    """
    from dijiang_export.checkpoint.config import build_spec, read_config

    config, family = read_config(folder)
    return build_spec(folder, config, family)


def shape_of(spec: ModelSpec) -> Shape:
    """A model's sizes, for what is drawn at random and for records."""
    return Shape(
        layers=spec.num_layers, hidden=spec.hidden_size, heads=spec.num_heads,
        intermediate=spec.intermediate_size, vocab=spec.vocab_size, positions=spec.max_position_embeddings,
        rotary_pct=spec.rotary_dim / spec.head_dim,
    )  # fmt: skip
