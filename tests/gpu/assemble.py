"""Make a bundle complete without tracing: `python assemble.py SKELETON MODEL OUT`.

SKELETON is a bundle, exported elsewhere, of which weights.data and reference.safetensors may be missing, so
that gigabytes need not be copied to a GPU machine. MODEL is the checkpoint that it was exported from, or the
name of a Pythia shape: then weights are made again from the same random numbers. They must have the
manifest's hash. If the cases are missing they are recorded anew ("short" ones), and the manifest is told.
Needs PyTorch, NumPy, SciPy, safetensors and onnx-ir.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from dijiang_engines.formats.file_table import MANIFEST, REFERENCE
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.formats.safe_files import sha256_of
from dijiang_export.bench.random_checkpoint import SHAPES, write_random_checkpoint
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.export.cases import Cases
from dijiang_export.export.record import record_cases
from dijiang_export.export.to_onnx import DTYPES
from dijiang_export.graph import weights
from dijiang_export.reference.rope import inverse_frequencies


def main() -> int:
    """Assemble; 1 if the weights are not those of the skeleton."""
    skeleton, model, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    start = time.perf_counter()
    manifest = json.loads((skeleton / MANIFEST).read_text())
    dtype = DTYPES[manifest["dtype"]]
    target.mkdir(parents=True)
    for path in skeleton.iterdir():
        if path.name != WEIGHTS:
            shutil.copyfile(path, target / path.name)
    cases: Cases = "none" if manifest["reference"] is None or (target / REFERENCE).exists() else "short"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source = Path(model)
        if model in SHAPES:
            source = Path(folder)
            write_random_checkpoint(source, SHAPES[model])
        with open_checkpoint(source) as checkpoint:
            layout = weights.layout_of(checkpoint.spec, dtype)
            extra = {"inv_freq": inverse_frequencies(checkpoint.spec)}
            weights.write(target / WEIGHTS, layout, checkpoint, extra, on_bytes=lambda _: None)
            print(f"weights after {time.perf_counter() - start:.1f} s", flush=True)
            record_cases(checkpoint, dtype, target / REFERENCE, cases)
    with (target / WEIGHTS).open("rb") as file:
        found = sha256_of(file)
    if found != manifest["files"][WEIGHTS]["sha256"]:
        print(f"FAIL: weights.data has SHA-256 {found}, not the skeleton's", file=sys.stderr)
        return 1
    if cases != "none":
        with (target / REFERENCE).open("rb") as file:
            entry = {"sha256": sha256_of(file), "bytes": (target / REFERENCE).stat().st_size}
        manifest["files"][REFERENCE] = entry
        (target / MANIFEST).write_text(json.dumps(manifest, indent=1))
    print(f"{target}: assembled in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
