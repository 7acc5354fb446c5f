"""The distillation recipe: its mathematics against independent ones, and whole runs at a toy size."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from samples.distill import losses, own_samples, student, text, tokens, training
from samples.distill.__main__ import main
from samples.distill.card import card
from samples.distill.evaluate import measure
from samples.distill.recurrence import RECURRENCES
from samples.distill.settings import parse
from samples.distill.student import Student
from samples.distill.teacher import Teacher
from support.makers.byte_tokenizer import write_tokenizer
from support.makers.checkpoints import RandomCheckpoint, llama, neox, opt, opt_350m
from support.oracles.official import official_forward
from support.paths import ROOT
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.convert import convert_checkpoint
from dijiang_export.reference.attention import TokenTerms, recurrent
from dijiang_export.reference.model import ReferenceModel

CHUNKED = RECURRENCES["chunked"]
CPU = torch.device("cpu")
VOCAB = 300
FAMILIES: dict[str, RandomCheckpoint] = {
    "gpt_neox": neox(vocab=VOCAB),
    "llama": llama(vocab=VOCAB, kv_heads=2),
    "opt": opt(vocab=VOCAB),
    "opt-350m": opt_350m(vocab=VOCAB, embedding=32),
}


@pytest.fixture(params=FAMILIES)
def vanilla(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FAMILIES[request.param].vanilla().with_tokenizer().save(tmp_path / "vanilla")


@pytest.fixture
def converted(vanilla: Path, tmp_path: Path) -> Path:
    convert_checkpoint(vanilla, tmp_path / "converted")
    return tmp_path / "converted"


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_the_chunked_recurrence_is_the_definition(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    shape = (2, length, 3, 8)
    q, k, v, towards = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    log_decay = -torch.tensor([0.001, 0.3, 4.0], dtype=torch.float64)  # the last would overflow unmasked

    def definition(*inputs: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs[:3])
        each = inputs[3].view(1, 3, 1).expand(2, 3, length)
        terms = TokenTerms(each, torch.ones_like(each), torch.ones_like(each))
        return recurrent(q, k, v, terms, q.new_zeros(2, 3, 8, 8))[0].transpose(1, 2)

    def run(function: Any) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_(True) for x in (q.softmax(-1), k.softmax(-1), v, log_decay)]
        o = function(*leaves)
        return [o, *torch.autograd.grad((o * towards).sum(), leaves, allow_unused=True)]

    for given, wanted in zip(run(CHUNKED), run(definition), strict=True):
        wanted = torch.zeros_like(given) if wanted is None else wanted
        torch.testing.assert_close(given, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("first", [0, 37])
def test_a_student_is_the_reference(converted: Path, first: int) -> None:
    with open_checkpoint(converted) as checkpoint:
        reference = ReferenceModel(checkpoint.spec, dtype=torch.float64)
        reference.load_state_dict(checkpoint.load_state_dict(torch.float64))
    ids = torch.randint(VOCAB, (2, 70), generator=torch.Generator().manual_seed(0))
    start = torch.full((2,), first)
    wanted, _ = reference(ids, start)
    net = Student(converted, CHUNKED).eval()
    with torch.no_grad():
        given = torch.nn.functional.linear(net(ids, start), net.head_weight)
    assert (given - wanted).norm() / wanted.norm() < 1e-5


def test_checkpointing_changes_no_gradient(converted: Path) -> None:
    ids = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        net = Student(converted, CHUNKED, checkpointing=checkpointing).train()
        net(ids, torch.zeros(2, dtype=torch.int64)).square().sum().backward()
        return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys() and any(name.endswith("proj") for name in plain)
    for name, wanted in plain.items():
        torch.testing.assert_close(saved[name], wanted)


@pytest.mark.filterwarnings("ignore")  # the compiler's, of what it does itself
@pytest.mark.parametrize("learn_decay", [False, True])
def test_all_layers_are_one_code_to_the_compiler(
    learn_decay: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up after eight codes of one function: later layers would not be compiled at all."""
    folder = llama(vocab=VOCAB, layers=3).vanilla().with_tokenizer().save(tmp_path / "vanilla")
    convert_checkpoint(folder, tmp_path / "converted")
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="eager", **options))
    torch.compiler.reset()
    counters.clear()
    net = Student(tmp_path / "converted", CHUNKED, learn_decay=learn_decay, compiled=True).train()
    net(torch.zeros(1, 70, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    decays = [layer.attention.log_decay for layer in net.net.layers]
    assert len({id(decay) for decay in decays}) == 3


@pytest.mark.parametrize("learn_decay", [False, True])
def test_what_is_saved_is_what_is_read(converted: Path, tmp_path: Path, learn_decay: bool) -> None:
    net = Student(converted, CHUNKED, learn_decay=learn_decay)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    student.save(net, converted, tmp_path / "saved", torch.float32)
    with open_checkpoint(tmp_path / "saved") as checkpoint:
        assert checkpoint.spec == net.spec
        read = checkpoint.load_state_dict()
    wanted = dict(net.net.named_parameters())
    for index, layer in enumerate(net.net.layers):
        wanted[f"layers.{index}.attention.log_decay"] = layer.attention.log_decay
    for name, value in read.items():
        if name.endswith("log_decay"):  # γ was rounded to float32
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-7)
        else:
            assert torch.equal(value, wanted[name]), name
    before, after = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "saved"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}


def test_the_official_code_computes_the_same_of_what_is_saved(tmp_path: Path) -> None:
    folder = neox(vocab=VOCAB).vanilla().save(tmp_path / "v")
    convert_checkpoint(folder, tmp_path / "c")
    net = Student(tmp_path / "c", CHUNKED, learn_decay=True).eval()
    student.save(net, tmp_path / "c", tmp_path / "s", torch.float32)
    ids = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(2))
    config = json.loads((tmp_path / "s/config.json").read_text())
    wanted = official_forward(load_file(tmp_path / "s/model.safetensors"), config, ids)
    with torch.no_grad():
        given = torch.nn.functional.linear(net(ids, torch.zeros(1, dtype=torch.int64)), net.head_weight)
    assert (given - wanted).norm() / wanted.norm() < 1e-4


def test_losses_and_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "ROWS", 7)  # 20 rows: two whole blocks and a part
    generator = torch.Generator().manual_seed(0)
    hidden, weight, seen, other = (
        torch.randn(shape, generator=generator) for shape in ((2, 10, 8), (30, 8), (2, 10, 6), (30, 6))
    )
    targets = torch.randint(30, (2, 10), generator=generator)
    hidden.requires_grad_(True), weight.requires_grad_(True)
    ours, theirs = log_softmax(hidden @ weight.T, -1), log_softmax(seen @ other.T, -1)
    cases = [
        (
            losses.mean_by_rows(losses.divergence, hidden, seen, weight, other),
            kl_div(ours.flatten(0, 1), theirs.flatten(0, 1), log_target=True, reduction="batchmean"),
        ),
        (
            losses.mean_by_rows(losses.surprise, hidden, targets, weight),
            cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten()),
        ),
    ]
    for given, wanted in cases:
        torch.testing.assert_close(given, wanted)
        pairs = (
            torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True) for loss in (given, wanted)
        )
        for one, another in zip(*pairs, strict=True):
            torch.testing.assert_close(one, another)


def test_what_is_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(20, 20, generator=generator) for _ in range(2)]
    windows = torch.randint(20, (5, 9), generator=generator)
    numbers = measure(lambda ids: tables[0][ids], lambda ids: tables[1][ids], windows, rows=2)
    ours, theirs = (log_softmax(table[windows[:, :-1]].double(), -1) for table in tables)
    loss = -ours.gather(-1, windows[:, 1:, None]).mean()
    assert numbers.tokens == 40
    assert numbers.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert numbers.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-6)
    assert numbers.top1 == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))


def test_a_teacher_writes_what_transformers_generates(vanilla: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest token instead of a drawn one: then the cache is all that can be wrong."""
    monkeypatch.setattr(torch, "multinomial", lambda chances, *_, **__: chances.argmax(-1, keepdim=True))
    teacher = Teacher(vanilla, CPU)
    monkeypatch.setattr(own_samples, "REACH", 5)
    writer = own_samples.Writer(teacher, rows=2, length=12)
    given, again = (writer.write([5], seed="0") for _ in range(2))
    teacher.net.generation_config.eos_token_id = None  # an end of text is a token like any other here
    wanted = teacher.net.generate(torch.tensor([[5]]), do_sample=False, max_new_tokens=11)
    assert given[0].tolist() == given[1].tolist() == again[0].tolist() == wanted[0].tolist()


def text_file(folder: Path, size: int = 12000, name: str = "text.txt") -> Path:
    words = (ROOT / "docs" / "mathematics.md").read_bytes().decode().encode("ascii", "ignore")
    (folder / name).write_bytes((words * (1 + size // len(words)))[:size])
    return folder / name


OPTIONS = (
    "--context=32",
    "--long-context=64",
    "--batch=4",
    "--samples-tokens=2k",
    "--windows=4",
    "--device=cpu",
)
TOKENS = ("--align-tokens=2k", "--distill-tokens=2k", "--long-tokens=1k")


def arguments(teacher: Path, out: Path, *more: str, steps: tuple[str, ...] = TOKENS) -> list[str]:
    words = text_file(teacher.parent)
    held = text_file(teacher.parent, 3000, "held.txt")
    return [
        f"--teacher={teacher}", f"--out={out}", "--text", str(words), "--held-out", str(held),
        "--also", f"other={held}", *OPTIONS, *steps, *more,
    ]  # fmt: skip


def test_a_whole_run(vanilla: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(arguments(vanilla, out, "--tune-tokens=256", "--learn-decay", "--dtype=float32")) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    kl = {stage["name"]: stage["held_out"]["text"]["kl"] for stage in metrics["stages"]}
    assert list(kl) == [
        "converted", "aligned", "distilled", "longer windows", "this checkpoint",
        "tuned on the text", "teacher tuned too",
    ]  # fmt: skip
    assert kl["distilled"] < kl["converted"]
    assert kl["this checkpoint"] == pytest.approx(kl["longer windows"], rel=1e-3)
    with open_checkpoint(out / "dijiang") as checkpoint:
        assert checkpoint.spec.decay == "geometric"
    page = (out / "dijiang" / "README.md").read_text()
    assert page == card(metrics)
    assert f"{metrics['stages'][3]['held_out']['samples']['kl']:.3f}" in page
    assert (out / "dijiang" / "curve.svg").read_text().startswith("<svg")
    for stage in metrics["stages"][1:4]:
        assert [seen for seen, _ in stage["curve"]][-1] == stage["tokens"]


def test_the_tokens_of_an_earlier_run(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    few = ("--align-tokens=256", "--distill-tokens=256", "--long-tokens=0")
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(teacher, first, steps=few)) == 0
    again = [f"--teacher={teacher}", *OPTIONS, *few, f"--tokens-from={first}"]
    assert main([*again, f"--out={second}"]) == 0
    one, another = (json.loads((out / "metrics.json").read_text()) for out in (first, second))
    assert [stage["held_out"] for stage in one["stages"]] == [
        stage["held_out"] for stage in another["stages"]
    ]
    assert "first" in another["data"]["samples"]["origin"]
    refused(capsys, [*again, f"--out={tmp_path / 'c'}", "--text=x"], "--tokens-from takes the place", code=2)
    wrong = [one.replace(str(first), str(tmp_path)) for one in again]
    refused(capsys, [*wrong, f"--out={tmp_path / 'd'}"], "holds no run's tokens", code=2)
    other = {name: ids + 10_000 for name, ids in load_file(first / "tokens.safetensors").items()}
    save_file(other, first / "tokens.safetensors")
    refused(capsys, [*again, f"--out={tmp_path / 'e'}"], "another tokenizer's run", code=2)


@pytest.mark.parametrize("stage", [0, 2, 4])
def test_an_interrupted_run_gives_the_same(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle of a step of the recipe, the last state a few steps old."""
    teacher = FAMILIES["llama"].vanilla().with_tokenizer().save(tmp_path / "v")
    more = ("--tune-tokens=1k", "--save-minutes=0")
    assert main(arguments(teacher, tmp_path / "whole", *more)) == 0

    batch = training.Trainer._batch
    seen: list[int] = []

    def interrupted(self: Any, one: Any, step: int) -> Any:
        if self.at.stage == stage and step == one.steps - 1 and not seen:
            seen.append(step)
            raise KeyboardInterrupt
        return batch(self, one, step)

    monkeypatch.setattr(training.Trainer, "_batch", interrupted)
    assert main(arguments(teacher, tmp_path / "cut", *more)) == 130
    assert "goes on from the last saved state" in capsys.readouterr().err and seen
    assert main(arguments(teacher, tmp_path / "cut", *more)) == 0
    whole, cut = (json.loads((tmp_path / n / "metrics.json").read_text())["stages"] for n in ("whole", "cut"))
    for one, another in zip(whole, cut, strict=True):
        assert one["held_out"] == another["held_out"] and one.get("curve") == another.get("curve")
    weights = [load_file(tmp_path / n / "dijiang" / "model.safetensors") for n in ("whole", "cut")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return FAMILIES["llama"].vanilla().with_tokenizer().save(tmp_path / "v")


def refused(capsys: pytest.CaptureFixture[str], given: list[str], *words: str, code: int = 1) -> None:
    capsys.readouterr()
    assert main(given) == code
    error = capsys.readouterr().err
    for word in ("error:", *words):
        assert word in error
    assert "Traceback" not in error


def test_a_loss_that_is_no_number(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert (
        main(arguments(teacher, out, steps=("--align-tokens=512", "--distill-tokens=0", "--long-tokens=0")))
        == 0
    )
    (out / "dijiang").rename(tmp_path / "gone")
    state = (out / "state.pt").read_bytes()
    settings = json.loads((out / "settings.json").read_text())
    settings |= {"distill_tokens": 2000, "lr": 1e30}
    (out / "settings.json").write_text(json.dumps(settings))
    given = arguments(
        teacher, out, "--lr=1e30", steps=("--align-tokens=512", "--distill-tokens=2k", "--long-tokens=0")
    )
    refused(capsys, given, "of 'distilled' is not finite", "last good state")
    assert (out / "state.pt").read_bytes() == state and not (out / "dijiang").exists()


def test_too_little_memory(teacher: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(training, "mean_by_rows", full)
    refused(capsys, arguments(teacher, tmp_path / "out"), "--batch", "--checkpointing", "20.00 GiB")


def test_a_full_disk(teacher: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed")

    monkeypatch.setattr(torch, "save", full)
    refused(capsys, arguments(teacher, tmp_path / "out"), "state cannot be written", "make room")
    assert not list((tmp_path / "out").glob("state*"))


def test_a_disk_that_is_full_before_any_state(
    teacher: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: IoError(No space left on device)")

    monkeypatch.setattr(tokens, "save_file", full)
    refused(capsys, arguments(teacher, tmp_path / "out"), "No space left", "goes on")
    assert not (tmp_path / "out" / "tokens.safetensors").exists()
    monkeypatch.undo()
    assert main(arguments(teacher, tmp_path / "out")) == 0


def test_documentation_is_read_once_and_as_words(tmp_path: Path, monkeypatch: Any) -> None:
    for folder in ("doc/one", "doc/two", "man/man1", "man/de/man1"):
        (tmp_path / folder).mkdir(parents=True)
    prose = "\n\n".join(
        f"Paragraph {i} says, in some words of its own, what there is to say." for i in range(20000)
    )
    (tmp_path / "doc/one/README").write_text(prose)
    (tmp_path / "doc/two/METADATA").write_text(prose + "\n\nName: two")  # the same again
    (tmp_path / "doc/two/numbers.txt").write_text("1 2 3 4 5\n" * 2000)
    page = '.TH X 1\n.SH NAME\nx \\- a thing\n.SH "SEE ALSO"\n.BR tar (1)\n'
    page += "and \\fBmore\\fR words, so many of them that the paragraph counts as one.\n"
    (tmp_path / "man/man1/x.1.gz").write_bytes(gzip.compress(page.encode()))
    (tmp_path / "man/de/man1/x.1.gz").write_bytes(gzip.compress(page.encode()))
    monkeypatch.setattr(text, "PLACES", (str(tmp_path / "doc"), str(tmp_path / "man")))
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    monkeypatch.setattr(text.sys, "prefix", str(tmp_path / "none"))
    found = {Path(one.name).relative_to(tmp_path).as_posix(): one.text for one in text.documentation()}
    assert set(found) == {"doc/one/README", "man/man1/x.1.gz"}
    assert found["man/man1/x.1.gz"].split("\n\n") == [
        "NAME\nx - a thing",
        "SEE ALSO\ntar (1)\nand more words, so many of them that the paragraph counts as one.",
    ]


def test_the_split_follows_the_content() -> None:
    documents = [text.Document(str(i), f"text {i}") for i in range(2000)]
    held = sum(document.held_out for document in documents)
    assert 50 < held < 110  # one in 25
    assert all(d.held_out == text.Document("elsewhere", d.text).held_out for d in documents)


def test_teachers_that_are_none(tmp_path: Path, capsys: Any) -> None:
    done = FAMILIES["llama"].with_tokenizer().save(tmp_path / "d")
    refused(capsys, arguments(done, tmp_path / "out"), "is a DiJiang model already")
    refused(capsys, arguments(tmp_path / "nothing", tmp_path / "out"), "nothing")
    large = FAMILIES["llama"].vanilla().save(tmp_path / "large")
    write_tokenizer(large, VOCAB, extra_tokens=60)
    refused(capsys, arguments(large, tmp_path / "out2"), "does not fit", "below vocab_size = 300")
    bare = FAMILIES["llama"].vanilla().save(tmp_path / "bare")
    refused(capsys, arguments(bare, tmp_path / "out3"), "has no tokenizer.json", code=2)
    assert not (tmp_path / "out").exists()


def test_folders_of_something_else(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine").mkdir()
    refused(capsys, arguments(teacher, tmp_path / "mine"), "no run of this recipe")
    few = ("--align-tokens=0", "--distill-tokens=128", "--long-tokens=0")
    assert main(arguments(teacher, tmp_path / "out", steps=few)) == 0
    refused(
        capsys,
        arguments(teacher, tmp_path / "out", "--lr=2e-3", steps=few),
        "other settings",
        "lr 0.002",
        code=2,
    )


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b"  \n", "empty"), (b"abc\0def" * 900, "binary"), (b"\xff\xfe" * 900, "UTF-8"),
     (b"a few words", "shorter than one context")],
)  # fmt: skip
def test_text_that_is_none(teacher: Path, tmp_path: Path, capsys: Any, content: bytes, word: str) -> None:
    given = arguments(teacher, tmp_path / "out")
    (teacher.parent / "text.txt").write_bytes(content)
    refused(capsys, given, word)
    assert not (tmp_path / "out" / "tokens.safetensors").exists()


@pytest.mark.parametrize(
    "option",
    ["--batch=0", "--context=1", "--samples-share=1.5", "--align-tokens=-1", "--also=x",
     "--recurrence=fla", "--device=cuda", "--device=toaster", "--separator=<nothing>"],
)  # fmt: skip
def test_options_that_make_no_sense(teacher: Path, tmp_path: Path, capsys: Any, option: str) -> None:
    if option == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    refused(capsys, [*arguments(teacher, tmp_path / "out"), option], code=2)
    assert not (tmp_path / "out" / "tokens.safetensors").exists()


@pytest.mark.parametrize("option", ["--lr-nothing", "--distill-tokens=many", "--mixing=both", "--batch=x"])
def test_options_that_are_none(teacher: Path, tmp_path: Path, capsys: Any, option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*arguments(teacher, tmp_path / "out"), option])
    assert "error:" in capsys.readouterr().err


def test_numbers_of_tokens(tmp_path: Path) -> None:
    settings, _, _ = parse(
        ["--teacher=t", "--out=o", "--distill-tokens=1.5M", "--align-tokens=20k", "--device=cpu"]
    )
    assert (settings.distill_tokens, settings.align_tokens) == (1_500_000, 20_000)
