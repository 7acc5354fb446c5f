"""This project's PyTorch reference as a peer: recurrent steps in place; parallel and chunked prefills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dijiang_engines.op_contract import Attributes
from dijiang_export.bench.peers.figures import LeftOut, Prepared
from dijiang_export.bench.peers.settings import PeerSettings
from dijiang_export.bench.peers.tools import block_decoder, captured, compiled, counting_skips, error_of
from dijiang_export.checkpoint.decay import official_gammas
from dijiang_export.reference.attention import DEFAULT_CHUNK, Decay, Form, dijiang_attention
from dijiang_export.reference.model import DTYPES, ReferenceModel

SQUARES = 4
"""Float32 arrays [B, H, L, L] that the parallel form has at a time."""
MEMORY_SHARE = 0.7
"""Of what is free, how much the parallel form may take."""
MOST_CHUNKS = 32
"""The compiled chunked form is unrolled: more chunks than this compile for minutes."""


class Dijiang:
    """The reference model with random weights, run eagerly, compiled, or compiled and captured.

    Args:
        settings: the shape, the type and the sizes.
        device: where.
        mode: "eager", "compiled" or "graph".
    """

    forms: tuple[str, ...] = ("parallel", "chunked")

    def __init__(self, settings: PeerSettings, device: torch.device, mode: str) -> None:
        self.settings, self.device, self.mode = settings, device, mode
        self.model = make_model(settings, device)
        self._rng = torch.Generator(device).manual_seed(0)

    def _tokens(self, batch: int, length: int) -> Tensor:
        vocab = self.settings.shape.vocab
        return torch.randint(vocab, (batch, length), generator=self._rng, device=self.device)

    def prefill(self, form: str, batch: int, length: int) -> Prepared:
        """Read `length` tokens a row from an empty state."""
        self._check(form, batch, length)
        ids, notes = self._tokens(batch, length), list[str]()
        exact = self._read(ids, "chunked")[0].clone()

        if form == "parallel":

            def read(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
                return self._read(tokens, "parallel")

            call = compiled(read, self.mode, self.settings.backend, self.device)
        else:
            call = self._by_layers()
        with counting_skips(self.mode, notes):
            error = error_of(call(ids)[0].clone(), exact)

        def run() -> Any:
            return call(ids)

        return Prepared(
            captured(run, self.device) if self.mode == "graph" else run, lambda: None, error, notes
        )

    def _check(self, form: str, batch: int, length: int) -> None:
        chunks = -(-length // DEFAULT_CHUNK)
        if form == "chunked" and self.mode != "eager" and chunks > MOST_CHUNKS:
            raise LeftOut(
                "the compiled chunked form is unrolled, and this many chunks compile for minutes",
                got=f"{chunks} chunks, at most {MOST_CHUNKS}",
            )
        if form == "parallel" and self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            need = SQUARES * 4 * batch * self.settings.shape.heads * length**2
            if need > MEMORY_SHARE * free:
                raise LeftOut(
                    "the parallel form is quadratic", got=f"{need / 1e9:.0f} GB of {free / 1e9:.0f}"
                )

    def _by_layers(self) -> Callable[[Tensor], tuple[Tensor, list[Tensor]]]:
        """Read in chunks, one layer compiled for all: the whole model unrolled would compile for hours."""
        layer_of = _run_layer
        if self.mode != "eager":
            layer_of = torch.compile(_run_layer, dynamic=False, backend=self.settings.backend)

        def read(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
            batch, length = tokens.shape
            start = torch.zeros(batch, dtype=torch.int32, device=self.device)
            lens = torch.full((batch,), length, dtype=torch.int32, device=self.device)
            hidden, states = self.model.embed_tokens(tokens), []
            inv_freq = self.model.get_buffer("inv_freq")
            for layer, past in zip(self.model.layers, self.model.new_states(batch), strict=True):
                hidden, present = layer_of(layer, hidden, past, start, lens, inv_freq)
                states.append(present)
            return self.model.head(hidden[:, -1:]), states

        return read

    def _read(self, ids: Tensor, form: Form) -> tuple[Tensor, list[Tensor]]:
        return self.model(ids, form=form, all_logits=False)  # type: ignore[no-any-return]

    def decode(self, batch: int, context: int) -> Prepared:
        """Read `context` tokens, check the step after them, then decode."""
        ids = self._tokens(batch, context + 1)
        exact = self._read(ids, "chunked")[0].clone()
        states = self._read(ids[:, :-1], "chunked")[1]
        first = [state.clone() for state in states]
        for state in states:  # a fixed address: what else is written to in place keeps CUDA graphs away
            torch._dynamo.mark_static_address(state)
        token = ids[:, -1:].clone()
        place = torch.full((batch,), context, dtype=torch.int64, device=self.device)

        def reset() -> None:
            token.copy_(ids[:, -1:])
            place.fill_(context)
            for state, before in zip(states, first, strict=True):
                state.copy_(before)

        def one(tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            logits, present = self.model(tokens, positions, None, states, form="recurrent", all_logits=False)
            for state, new in zip(states, present, strict=True):
                state.copy_(new)
            return logits.argmax(-1), logits

        step = compiled(one, self.mode, self.settings.backend, self.device)
        return block_decoder(step, token, place, reset, exact, self.mode, self.device)


def _chunked(*tensors: Tensor, decay: Decay, attributes: Attributes) -> tuple[Tensor, Tensor]:
    return dijiang_attention(*tensors, decay=decay, attributes=attributes, form="chunked")


def _run_layer(
    layer: nn.Module, hidden: Tensor, past: Tensor, start: Tensor, lens: Tensor, inv_freq: Tensor
) -> tuple[Tensor, Tensor]:
    return layer(hidden, past, start, lens, inv_freq, _chunked)  # type: ignore[no-any-return]


def make_model(settings: PeerSettings, device: torch.device) -> ReferenceModel:
    """The reference with random weights that keep activations near one, and the official decay."""
    torch.manual_seed(0)
    model = ReferenceModel(settings.spec(), dtype=DTYPES[settings.dtype], device=str(device)).eval()
    gammas = torch.as_tensor(official_gammas(settings.shape.heads))
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "log_decay":
            parameter.data.copy_(gammas.log())
        elif leaf == "norm_weight":
            parameter.data.fill_(1.0)
        elif leaf == "proj":
            parameter.data.normal_()
    return model
