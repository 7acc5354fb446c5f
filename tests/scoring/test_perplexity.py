"""Perplexity through every path against independent sums: cross entropy in float64 over the logits of
transformers' own models and of the official formula."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import socket
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fakes.runner import ToyRunner
from support.makers.byte_tokenizer import write_tokenizer
from support.makers.checkpoints import RandomCheckpoint, llama, neox, opt, opt_350m
from support.makers.engine_folders import Exported, Open
from support.makers.toy_bundle import SPEC, ToyModel
from support.oracles.official import official_forward
from support.paths import ROOT
from tokenizers import Tokenizer as Library
from transformers import AutoModelForCausalLM

import dijiang_engines as dj
from dijiang_engines.errors import CheckpointError, PositionError, RunnerError, TextError, UsageError
from dijiang_engines.scoring import readers
from dijiang_engines.scoring.perplexity import Cutting, Perplexity, perplexity
from dijiang_engines.scoring.readers import RunnerReader
from dijiang_engines.scoring.texts import Joining, Text, read_text
from dijiang_engines.shipped_sample import sample_checkpoint
from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_export.scoring.checkpoints import read_checkpoint

VOCAB = 260
TEXTS = [
    "The first of several texts, which is the longest of them all by far: " + "ab cd " * 9,
    "x",
    "naïve: 日本 🐍\n\nand a third\n",
    "exactly",
]
LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""ids [1, L] -> logits [L, V] in float64."""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder, VOCAB)
    return Tokenizer(folder / "tokenizer.json")


@torch.no_grad()
def expected(
    texts: Sequence[str], tokenizer: Tokenizer, logits_of: LogitsOf, other: LogitsOf | None = None,
    *, window: int, stride: int | None = None, begin: bool = True,
) -> SimpleNamespace:  # fmt: skip
    """The sums written out with PyTorch's functions: each text begins with token 0, each window by itself."""
    nats, others, kl, agree = [], [], [], []
    for text in texts:
        ids = torch.tensor([0] * begin + tokenizer.encode(text))
        inputs, targets = ids[:-1], ids[1:]
        done = 0
        for start in range(0, len(inputs), stride or window):
            stop = min(start + window, len(inputs))
            if stop <= done:
                break
            rows = slice(done - start, stop - start)
            logits = logits_of(inputs[None, start:stop])[rows]
            nats.append(torch.nn.functional.cross_entropy(logits, targets[done:stop], reduction="none"))
            if other is not None:
                second = other(inputs[None, start:stop])[rows]
                others.append(torch.nn.functional.cross_entropy(second, targets[done:stop], reduction="none"))
                log_q, log_p = logits.log_softmax(-1), second.log_softmax(-1)
                kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
                agree.append((logits.argmax(-1) == second.argmax(-1)).double())
            done = stop
    loss = torch.cat(nats).mean().item()
    means = [torch.cat(x).mean().item() if x else None for x in (others, kl, agree)]
    return SimpleNamespace(
        tokens=sum(map(len, nats)), loss=loss, perplexity=math.exp(loss),
        other_loss=means[0], kl=means[1], top1=means[2],
    )  # fmt: skip


def transformers_logits(folder: Path) -> LogitsOf:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float64).eval()
    return lambda ids: model(ids).logits[0]


def official_logits(folder: Path) -> LogitsOf:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    return lambda ids: official_forward(tensors, config, ids, float32_rope=False)[0]


VANILLA = {
    "gpt_neox": neox(vocab=VOCAB),
    "llama": llama(vocab=VOCAB, heads=4, kv_heads=2).with_config(tie_word_embeddings=True),
    "opt": opt(vocab=VOCAB),
    "opt-350m": opt_350m(embedding=32, vocab=VOCAB),
    "bin": neox(vocab=VOCAB).in_files("bin"),
}


@pytest.mark.parametrize(
    ("name", "window", "stride"),
    [("gpt_neox", 16, None), ("gpt_neox", 1, None), *((name, 128, None) for name in VANILLA)]
    + [(name, 16, 5) for name in VANILLA if name != "bin"],
)
def test_vanilla_checkpoints(
    name: str, window: int, stride: int | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = VANILLA[name].vanilla().save(tmp_path / "vanilla")
    loaded = read_checkpoint(folder, dtype="float64")
    assert (loaded.kind, loaded.reader.name) == ("vanilla", "transformers")
    found = perplexity(
        loaded.reader, TEXTS, tokenizer, cutting=Cutting(window, stride), bos=loaded.spec.bos_token_id
    )
    want = expected(TEXTS, tokenizer, transformers_logits(folder), window=window, stride=stride)
    assert found.total.tokens == want.tokens == sum(len(t.encode()) for t in TEXTS)
    assert found.total.bytes == want.tokens
    assert found.total.loss == pytest.approx(want.loss, rel=1e-12)
    assert found.total.perplexity == pytest.approx(want.perplexity, rel=1e-11)
    assert found.total.bits_per_byte == pytest.approx(want.loss / math.log(2), rel=1e-12)
    assert [score.name for score in found.texts] == [f"text {i}" for i in range(1, 5)]


def test_a_vanilla_checkpoint_carries_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reader = read_checkpoint(neox(vocab=VOCAB).vanilla().save(tmp_path / "v")).reader
    with pytest.raises(UsageError, match="has no state that could be carried"):
        perplexity(reader, TEXTS, tokenizer, cutting=Cutting(carry=True), bos=0)


def test_nothing_of_a_vanilla_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.json names code, which lies beside it; and nobody is asked for anything."""
    folder = neox(vocab=VOCAB).vanilla().save(tmp_path / "v")
    (folder / "modeling_gpt_neox_dijiang.py").write_text("raise SystemExit('run')\n")
    assert "auto_map" in json.loads((folder / "config.json").read_text())

    def connect(*_: Any) -> None:
        raise SystemExit("asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    assert read_checkpoint(folder).kind == "vanilla"


@pytest.mark.parametrize(
    "says", [{"hidden_dropout": "much"}, {"initializer_range": []}, {"pad_token_id": "x"}]
)
def test_configurations_that_transformers_refuses(tmp_path: Path, says: dict[str, Any]) -> None:
    folder = neox(vocab=VOCAB).vanilla().config_says(**says).save(tmp_path / "v")
    with pytest.raises(CheckpointError, match="transformers makes no model"):
        read_checkpoint(folder)


DIJIANG = {
    "gpt_neox": neox(vocab=VOCAB),
    "llama-gqa": llama(vocab=VOCAB, heads=4, kv_heads=2),
    "opt": opt(vocab=VOCAB),
    "tables": neox(vocab=VOCAB).with_trained_decay(),
}
TOLERANCES = {"float64": 1e-9, "float32": 2e-6, "bfloat16": 3e-2, "float16": 4e-3}
"""Relative, of the loss. The oracle multiplies the stored tables, the reference has one γ a head."""


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", DIJIANG)
def test_dijiang_checkpoints(name: str, dtype: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = DIJIANG[name].save(tmp_path / "dijiang")
    loaded = read_checkpoint(folder, dtype=dtype)
    found = perplexity(loaded.reader, TEXTS, tokenizer, cutting=Cutting(30, 20), bos=0)
    want = expected(TEXTS, tokenizer, official_logits(folder), window=30, stride=20)
    assert found.total.tokens == want.tokens
    # float64: the stored tables hold γ to float32, which is all that the two differ by
    assert found.total.loss == pytest.approx(want.loss, rel=max(TOLERANCES[dtype], 2e-7))


@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize(
    "cutting",
    [Cutting(128), Cutting(16), Cutting(16, 5), Cutting(16, batch=3), Cutting(carry=True)],
    ids=["whole", "windows", "stride", "batch", "carry"],
)
def test_bundles(exported: Exported, tokenizer: Tokenizer, logits: str, cutting: Cutting) -> None:
    """ONNX Runtime, through the step graph and through the prefill graph."""
    bundle, _ = exported(neox(vocab=VOCAB), logits=logits)
    runner = dj.open_runner(dj.open_model(bundle), "cpu", threads=1)
    found = perplexity(runner, TEXTS, tokenizer, cutting=cutting)
    window = cutting.window or 128  # longer than any of the texts
    want = expected(
        TEXTS, tokenizer, official_logits(bundle.parent / "checkpoint"), window=window, stride=cutting.stride
    )
    assert found.total.tokens == want.tokens
    assert found.total.loss == pytest.approx(want.loss, rel=2e-6)
    assert found.window == cutting.window


def test_a_float16_bundle(exported: Exported, tokenizer: Tokenizer) -> None:
    bundle, _ = exported(neox(vocab=VOCAB), dtype="float16")
    runner = dj.open_runner(dj.open_model(bundle), "cpu", threads=1)
    found = perplexity(runner, TEXTS, tokenizer)
    want = expected(TEXTS, tokenizer, official_logits(bundle.parent / "checkpoint"), window=128)
    assert found.window == 128  # the model's context
    assert found.total.loss == pytest.approx(want.loss, rel=TOLERANCES["float16"])
    assert found.total.loss != pytest.approx(want.loss, rel=1e-8)


@pytest.mark.parametrize("logits", ["last", "all"])
def test_small_blocks_and_rows_that_end(
    exported: Exported, tokenizer: Tokenizer, logits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bounds memory changes nothing: pieces of few tokens, and rows that leave as they end."""
    bundle, _ = exported(neox(vocab=VOCAB), logits=logits)
    runner = dj.open_runner(dj.open_model(bundle), "cpu", threads=1)
    whole = perplexity(runner, TEXTS, tokenizer, cutting=Cutting(carry=True))
    batches: list[int] = []
    import_state = type(runner).import_state
    monkeypatch.setattr(
        type(runner), "import_state",
        lambda self, layers: batches.append(len(layers[0])) or import_state(self, layers),
    )  # fmt: skip
    monkeypatch.setattr(readers, "LOGITS_BYTES", 4 * VOCAB * 4 * 3)
    monkeypatch.setattr(readers, "PREFILL_TOKENS", 7)
    cut = perplexity(runner, TEXTS, tokenizer, cutting=Cutting(carry=True, batch=4))
    assert batches == [2, 1]
    assert cut.total.loss == pytest.approx(whole.total.loss, rel=1e-6)
    for a, b in zip(cut.texts, whole.texts, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
    strided = [perplexity(runner, TEXTS, tokenizer, cutting=Cutting(16, 4, batch=b)) for b in (None, 2)]
    assert strided[0].total.loss == pytest.approx(strided[1].total.loss, rel=1e-6)


ADDED = re.compile(r"\.(W_G|proj_matrix|D1|D2|group_norm\.(weight|bias))$")


def test_against_another_model(exported: Exported, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A bundle against transformers' model of the weights that it has but for its attention: KL, agreement
    and both perplexities."""
    bundle, _ = exported(neox(vocab=VOCAB))
    runner = dj.open_runner(dj.open_model(bundle), "cpu", threads=1)
    folder = bundle.parent / "checkpoint"
    student = official_logits(folder)
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if not ADDED.search(k)}
    assert len(kept) < len(load_file(folder / "model.safetensors"))
    save_file(kept, teacher / "model.safetensors")
    other = read_checkpoint(teacher, dtype="float64").reader
    for this, second in ((runner, other), (other, RunnerReader(runner))):
        found = perplexity(this, TEXTS, tokenizer, cutting=Cutting(24, 24), against=second, bos=0)
        logits = [student, transformers_logits(teacher)][:: 1 if this is runner else -1]
        want = expected(TEXTS, tokenizer, *logits, window=24)
        assert found.total.loss == pytest.approx(want.loss, rel=2e-6)
        assert found.total.other_loss == pytest.approx(want.other_loss, rel=2e-6)
        assert found.total.kl == pytest.approx(want.kl, rel=1e-5)
        assert want.kl > 0.1
        assert found.total.top1_agreement == pytest.approx(want.top1, abs=1e-12)
        assert 0 < want.top1 < 1
        assert found.total.ratio == pytest.approx(math.exp(want.loss - want.other_loss), rel=1e-5)
        assert found.total.other_perplexity == pytest.approx(math.exp(want.other_loss), rel=1e-5)


def test_a_model_against_itself(exported: Exported, tokenizer: Tokenizer) -> None:
    bundle, _ = exported(neox(vocab=VOCAB))
    runner = dj.open_runner(dj.open_model(bundle), "cpu", threads=1)
    other = read_checkpoint(bundle.parent / "checkpoint", dtype="float64").reader
    found = perplexity(runner, TEXTS, tokenizer, against=other).total
    assert found.kl is not None
    assert 0 <= found.kl < 1e-10
    assert found.top1_agreement == 1
    assert found.ratio == pytest.approx(1, abs=1e-5)


def test_other_vocabularies_are_refused(exported: Exported, tmp_path: Path, tokenizer: Tokenizer) -> None:
    bundle, _ = exported(neox(vocab=VOCAB))
    runner = dj.open_runner(dj.open_model(bundle), "cpu", threads=1)
    other = read_checkpoint(neox(vocab=VOCAB + 4).vanilla().save(tmp_path / "v")).reader
    with pytest.raises(UsageError, match="different vocabularies"):
        perplexity(runner, TEXTS, tokenizer, against=other)


# -- the sample, and how its own numbers were made ---------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [root / name for name in ("bisect.py", "keyword.py", "json/scanner.py")]


def test_the_samples_own_evaluation(
    sample_bundle: Path, library: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """samples/train_tiny/evaluate.py on the same files: one stream with separators, in windows."""
    monkeypatch.syspath_prepend(str(ROOT / "samples/train_tiny"))
    evaluate = runpy.run_path(str(ROOT / "samples/train_tiny/evaluate.py"))
    folder = sample_checkpoint()
    documents = [SimpleNamespace(text=p.read_text(), is_test=False, size=p.stat().st_size) for p in library]
    tokens = evaluate["encode"](documents, Library.from_file(str(folder / "tokenizer.json")))
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")

    class Official(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=official_forward(tensors, config, ids, dtype=torch.float32))

    want = evaluate["held_out"](Official(), tokens, 256)["all"]
    model = dj.open_model(sample_bundle)
    tokenizer = dj.load_tokenizer(model)
    assert tokenizer is not None
    options: dict[str, Any] = {"joining": Joining(separator="<|endoftext|>"), "cutting": Cutting(256)}
    texts = [read_text(path) for path in library]
    for reader in (
        dj.open_runner(model, "cpu", threads=1),
        read_checkpoint(folder).reader,
        read_checkpoint(folder, dtype="float64").reader,
    ):
        found = perplexity(reader, texts, tokenizer, **options)
        assert (found.total.tokens, found.total.bytes) == (want["tokens"], want["bytes"])
        assert found.total.loss == pytest.approx(want["loss"], rel=2e-5)
        assert found.total.bits_per_byte == pytest.approx(want["bits_per_byte"], rel=2e-5)
        assert sum(score.tokens for score in found.texts) == found.total.tokens
        assert [score.bytes for score in found.texts] == [path.stat().st_size for path in library]


def test_a_program_needs_one_import(sample_bundle: Path) -> None:
    model = dj.open_model(sample_bundle)
    tokenizer = dj.load_tokenizer(model)
    assert tokenizer is not None
    found: Perplexity = dj.perplexity(dj.open_runner(model, "cpu", threads=1), ["import os\n"], tokenizer)
    assert found.total.bytes == 10
    assert 1 < found.total.perplexity < 200


# -- what stands around texts, limits, bytes -----------------------------------------------------------------


@pytest.fixture
def toy() -> ToyRunner:
    """A fake: it proves what is asked of a runner, and no numbers."""
    return ToyRunner(ToyModel.random(SPEC))


def sizes(found: Perplexity) -> list[tuple[int, int]]:
    return [(score.tokens, score.bytes) for score in found.texts]


def test_what_stands_around_texts(toy: ToyRunner, tokenizer: Tokenizer) -> None:
    texts = ["abc", "né"]
    assert sizes(perplexity(toy, texts, tokenizer)) == [(3, 3), (3, 3)]
    assert sizes(perplexity(toy, texts, tokenizer, joining=Joining(bare=True))) == [(2, 2), (2, 2)]
    joined = perplexity(toy, texts, tokenizer, joining=Joining(separator="<|endoftext|>"))
    assert sizes(joined) == [(4, 3), (4, 3)]
    begun = perplexity(toy, texts, tokenizer, joining=Joining(begin="a"))
    assert sizes(begun) == [(3, 3), (3, 3)]
    assert begun.total.loss != perplexity(toy, texts, tokenizer).total.loss


def test_a_tokenizers_own_beginning_is_not_doubled(
    toy: ToyRunner, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    write_tokenizer(tmp_path, VOCAB)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    own = perplexity(toy, ["abc"], Tokenizer(tmp_path / "tokenizer.json"))
    assert own.total == perplexity(toy, ["abc"], tokenizer).total


def test_a_limit_cuts_texts_and_their_bytes(toy: ToyRunner, tokenizer: Tokenizer) -> None:
    texts = ["abc", "né日", "never"]
    assert sizes(perplexity(toy, texts, tokenizer, limit=3)) == [(3, 3)]
    assert sizes(perplexity(toy, texts, tokenizer, limit=4)) == [(3, 3), (1, 1)]
    assert sizes(perplexity(toy, texts, tokenizer, limit=7)) == [(3, 3), (4, 6)]  # a part of 日 counts whole
    assert sizes(perplexity(toy, texts, tokenizer, limit=99)) == [(3, 3), (6, 6), (5, 5)]
    joined = Joining(separator="<|endoftext|>")
    assert sizes(perplexity(toy, texts, tokenizer, joining=joined, limit=5)) == [(4, 3), (1, 1)]
    with pytest.raises(UsageError, match="at least one"):
        perplexity(toy, texts, tokenizer, limit=0)


@pytest.mark.parametrize("name", ["normalizer", "metaspace"])
def test_bytes_are_of_the_text_and_not_of_its_tokens(name: str, toy: ToyRunner, tmp_path: Path) -> None:
    """Tokenizers that change a text or drop spaces: all of its bytes count for some token."""
    from tokenizers import models, normalizers, pre_tokenizers

    words = {"<unk>": 0, "ab": 1, "cd": 2, "▁ab": 3, "▁cd": 4}
    library = Library(models.WordLevel(words, unk_token="<unk>"))
    if name == "normalizer":
        library.normalizer = normalizers.Lowercase()
        library.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    text = "AB  cd ab \n" if name == "normalizer" else "ab cd ab"
    assert sizes(perplexity(toy, [text], tokenizer)) == [(3, len(text))]
    assert sizes(perplexity(toy, [text], tokenizer, limit=2)) == [(2, text.index("cd") + 2)]


def test_a_window_that_is_exactly_filled(toy: ToyRunner, tokenizer: Tokenizer) -> None:
    """One window; one more token makes a second one, which knows nothing of the first."""
    one = perplexity(toy, ["abcdefgh"], tokenizer, cutting=Cutting(8)).total
    wide = perplexity(toy, ["abcdefgh"], tokenizer, cutting=Cutting(9)).total
    assert one == wide
    nine = perplexity(toy, ["abcdefghi"], tokenizer, cutting=Cutting(8)).total
    alone = perplexity(toy, ["hi"], tokenizer, joining=Joining(bare=True)).total
    assert nine.loss * 9 == pytest.approx(one.loss * 8 + alone.loss, rel=1e-9)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("every", [False, True])
def test_logits_that_are_no_numbers(tokenizer: Tokenizer, value: float, every: bool) -> None:
    toy = ToyRunner(ToyModel.random(SPEC), all_logits=every)
    calls = 0

    def tamper(_name: str, arrays: dict) -> None:
        nonlocal calls
        calls += 1
        if every:
            arrays["logits"][1, 5, 17] = value
        elif calls == 6:
            arrays["logits"][1, 0, 17] = value

    toy.tamper = tamper
    texts = [Text("first.txt", "abcdefgh"), Text("second.txt", "ABCDEFGH")]
    with pytest.raises(RunnerError, match=r"no number .* in second\.txt") as caught:
        perplexity(toy, texts, tokenizer)
    assert caught.value.got == "toy, after token 5 of the text"


def test_padding_may_hold_anything(tokenizer: Tokenizer) -> None:
    toy = ToyRunner(ToyModel.random(SPEC), all_logits=True)
    texts = ["abcdefgh", "abc"]
    want = perplexity(toy, texts, tokenizer)

    def tamper(_name: str, arrays: dict) -> None:
        for row, count in enumerate(arrays["seq_lens"]):
            arrays["logits"][row, int(count) :] = np.nan

    toy.tamper = tamper
    assert perplexity(toy, texts, tokenizer).total == want.total


@pytest.mark.parametrize("options", [
    {"cutting": Cutting(8, carry=True)}, {"cutting": Cutting(stride=8, carry=True)},
    {"cutting": Cutting(8, 9)}, {"cutting": Cutting(0)}, {"cutting": Cutting(batch=0)},
    {"joining": Joining("a", bare=True)}, {"joining": Joining("a", separator="a")},
    {"joining": Joining("nosuch")}, {"joining": Joining(separator="nosuch")},
])  # fmt: skip
def test_options_without_a_meaning(toy: ToyRunner, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        perplexity(toy, TEXTS, tokenizer, **options)
    assert toy.calls == []


def test_no_text_at_all(toy: ToyRunner, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError):
        perplexity(toy, [], tokenizer)
    with pytest.raises(TextError, match="gives no token"):
        perplexity(toy, [""], tokenizer)
    with pytest.raises(TextError, match="too short"):
        perplexity(toy, ["a"], tokenizer, joining=Joining(bare=True))


def test_more_than_a_models_positions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model: RandomCheckpoint = opt(vocab=VOCAB, positions=32)
    readers_of = [
        read_checkpoint(model.save(tmp_path / "dijiang")).reader,
        read_checkpoint(model.vanilla().save(tmp_path / "vanilla")).reader,
    ]
    for reader in readers_of:
        assert perplexity(reader, TEXTS, tokenizer, bos=0).window == 32
        with pytest.raises(PositionError, match="text 1 would be read past the last position"):
            perplexity(reader, TEXTS, tokenizer, cutting=Cutting(33), bos=0)
        assert perplexity(reader, ["short"], tokenizer, cutting=Cutting(33)).total.tokens == 4
    with pytest.raises(PositionError) as caught:
        perplexity(readers_of[0], TEXTS, tokenizer, cutting=Cutting(carry=True), bos=0)
    assert "--window 32" in str(caught.value)


def test_an_engine_of_few_rows(tokenizer: Tokenizer) -> None:
    """A fake: no more rows are asked for than the runner takes, and a batch that is too large is refused."""
    toy = ToyRunner(ToyModel.random(SPEC))
    want = perplexity(toy, TEXTS, tokenizer, cutting=Cutting(8))
    limited = ToyRunner(ToyModel.random(SPEC))
    limited.max_batch = 2  # type: ignore[attr-defined]
    found = perplexity(limited, TEXTS, tokenizer, cutting=Cutting(8))
    assert found.total.loss == pytest.approx(want.total.loss, rel=1e-12)
    with pytest.raises(RunnerError, match="was not built for so many sequences"):
        perplexity(limited, TEXTS, tokenizer, cutting=Cutting(8, batch=3))


def test_memory_that_is_short(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake: how PyTorch says so is its own; that the message names the options is ours."""
    model = neox(vocab=VOCAB)
    for number, one in enumerate((model, model.vanilla())):
        reader: Any = read_checkpoint(one.save(tmp_path / str(number))).reader

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

        monkeypatch.setattr(reader.model, "forward", fail)
        monkeypatch.setattr(getattr(reader.model, "base_model", reader.model), "forward", fail)
        with pytest.raises(RunnerError, match="out of memory") as caught:
            perplexity(reader, TEXTS, tokenizer, bos=0)
        assert "--batch 1" in str(caught.value)


@pytest.mark.parametrize("layout", ["one", "two"])
@pytest.mark.parametrize("cutting", [Cutting(8), Cutting(8, 3), Cutting(carry=True)], ids=str)
def test_an_engine(opened: Open, tmp_path: Path, cutting: Cutting, layout: str) -> None:
    """On a fake machine: which calls are made. That the plan and the kernels are right, only a GPU shows."""
    runner, oracle = opened("8.6.0", layout=layout)
    write_tokenizer(tmp_path, 256)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    texts = ["a text of some length", "short", "yet another one"]
    got, want = (
        perplexity(r, texts, tokenizer, cutting=cutting, joining=Joining(bare=True)).total
        for r in (runner, oracle)
    )
    assert got.tokens == want.tokens == sum(len(text) - 1 for text in texts)
    assert got.loss == pytest.approx(want.loss, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_checkpoints_on_the_gpu(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = llama(vocab=VOCAB, heads=4, kv_heads=2)
    for number, one in enumerate((model, model.vanilla())):
        folder = one.save(tmp_path / str(number))
        got, want = (
            perplexity(
                read_checkpoint(folder, dtype="float64", device=device).reader, TEXTS, tokenizer,
                cutting=Cutting(16, 5), bos=0,
            ).total
            for device in ("cuda", "cpu")
        )  # fmt: skip
        assert got.loss == pytest.approx(want.loss, rel=1e-9)
