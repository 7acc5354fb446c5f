"""What bundles and engines share is one thing: the same facts, words and checks from both."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from support.fakes.runner import toy_case, write_reference
from support.makers.engine_folders import edit_manifest, facts, write_engine
from support.makers.toy_bundle import SPEC, ToyModel, write_manifest
from support.paths import ROOT

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.engine import EngineFolder, write_engine_manifest
from dijiang_engines.formats.folder import Model, spec_sha256
from dijiang_engines.formats.open import open_model
from dijiang_engines.formats.reference_cases import Reference

CASES = ["first", "second"]
PACKAGES = [ROOT / "engines/dijiang_engines", ROOT / "exporter/dijiang_export"]


@pytest.fixture(params=["bundle", "engine"])
def folder(request: pytest.FixtureRequest, toy: tuple[Path, ToyModel], tmp_path: Path) -> Path:
    """A bundle, then an engine, with two recorded cases."""
    bundle, model = toy
    cases = {name: toy_case(model, [5, 3, 7], [0, 2, 9], seed) for seed, name in enumerate(CASES)}
    if request.param == "bundle":
        write_reference(bundle / "reference.safetensors", cases)
        write_manifest(bundle, SPEC, reference={"file": "reference.safetensors", "cases": CASES})
        return bundle
    engine = write_engine(tmp_path / "toy.engine")
    write_reference(engine / "reference.safetensors", cases)
    write_engine_manifest(engine, facts() | {"reference": {"cases": CASES}})
    return engine


def test_both_are_models(folder: Path) -> None:
    model = open_model(folder)
    assert isinstance(model, Model) and isinstance(model, (Bundle, EngineFolder))
    assert (model.name, model.spec, model.dtype, model.all_logits) == ("toy", SPEC, "float32", False)
    assert model.identity.spec_sha256 == spec_sha256(SPEC)
    assert model.config_path == folder / "config.json"
    assert model.reference_path == folder / "reference.safetensors"
    assert list(model.reference().cases) == model.cases == CASES
    assert model.opened.files is model.files


def test_verify_looks_at_every_file(folder: Path) -> None:
    seen: list[int] = []
    model = open_model(folder, verify=False)
    model.verify(seen.append)
    assert sum(seen) == sum(info.bytes for info in model.files.values())
    large = folder / ("weights.data" if isinstance(model, Bundle) else "model.plan")
    large.write_bytes(bytes([large.read_bytes()[0] ^ 1]) + large.read_bytes()[1:])
    with pytest.raises(BundleError):
        open_model(folder, verify=False).verify()


def test_other_cases_than_it_says(folder: Path) -> None:
    bundle = (folder / "manifest.json").exists()
    manifest = "the manifest" if bundle else "engine.json"
    if bundle:
        write_manifest(folder, SPEC, reference={"file": "reference.safetensors", "cases": CASES[:1]})
    else:
        edit_manifest(folder, ("reference", "cases"), CASES[:1])
    with pytest.raises(BundleError, match=f"other cases than {manifest} says") as caught:
        open_model(folder).reference()
    assert ("copy the bundle again" if bundle else "build-engine") in str(caught.value.hint)


def test_no_cases(tmp_path: Path, toy: tuple[Path, ToyModel]) -> None:
    for path, kind, hint in (
        (toy[0], "bundle", "again with `--cases"),
        (write_engine(tmp_path / "e"), "engine", "build again"),
    ):
        with pytest.raises(BundleError, match=f"the {kind} .* holds no recorded cases") as caught:
            open_model(path).reference()
        assert hint in str(caught.value.hint)


def test_some_rows_of_a_case(toy: tuple[Path, ToyModel], tmp_path: Path) -> None:
    write_reference(tmp_path / "reference.safetensors", {"all": toy_case(toy[1], [3, 7, 5], [0, 2, 9])})
    case = Reference(tmp_path / "reference.safetensors", SPEC).cases["all"]
    assert case.batch > 1
    for start in range(case.batch):
        part = case.rows(start, case.batch)
        longest = int(case.seq_lens[start:].max())
        assert np.array_equal(part.input_ids, case.input_ids[start:, :longest])
        assert np.array_equal(part.seq_lens, case.seq_lens[start:])
        assert np.array_equal(part.logits(), case.logits()[start:])
        for layer in range(SPEC.num_layers):
            assert np.array_equal(part.state(layer), case.state(layer)[start:])
            assert np.array_equal(part.state(layer, 0), case.state(layer)[start])
        assert np.array_equal(part.rows(part.batch - 1, part.batch).logits(0), case.logits(case.batch - 1))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_nobody_replaces_a_private_attribute_from_outside(package: Path) -> None:
    """Neither by assignment, nor through dataclasses.replace or setattr."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found += [f"{path.name}:{node.lineno} {name}" for name in replaced(node)]
    assert found == []


def replaced(node: ast.AST) -> list[str]:
    """Private attributes of other objects than `self` and `cls` that a statement or a call sets."""
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        targets = [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
        attributes = [target for target in targets if isinstance(target, ast.Attribute)]
        return [ast.unparse(a) for a in attributes if is_private(a.attr) and owner(a) not in ("self", "cls")]
    if not isinstance(node, ast.Call):
        return []
    called, first = ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""
    if called in ("replace", "dataclasses.replace") and first != "self":
        return [f"{k.arg}=" for k in node.keywords if k.arg is not None and is_private(k.arg)]
    if called in ("setattr", "object.__setattr__") and first != "self" and len(node.args) > 1:
        name = node.args[1]
        return [str(name.value)] if isinstance(name, ast.Constant) and is_private(str(name.value)) else []
    return []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def owner(attribute: ast.Attribute) -> str | None:
    return attribute.value.id if isinstance(attribute.value, ast.Name) else None


@pytest.mark.parametrize(
    "text",
    ["other._x = 1", "a, other._x = 1, 2", "self.other._x += 1", "replace(case, _file=1)",
     "dataclasses.replace(a.b, _x=1)", "setattr(other, '_x', 1)"],
)  # fmt: skip
def test_that_check_finds_what_it_should(text: str) -> None:
    assert any(replaced(node) for node in ast.walk(ast.parse(text)))
