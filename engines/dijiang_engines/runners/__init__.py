"""Runtimes behind one protocol, `base.Runner`; `open_runner` loads a bundle or an engine into one of them.

A runtime is a folder here and a line in `registry.TABLE`:

    runner.py     the class behind `base.Runner` (and, where it can, the protocols after it): what a call does
    a loader      what is loaded from the model's folder, and how it is run (onnxruntime/sessions.py,
                  tensorrt/contexts.py)
    its state     what a batch of sequences keeps on the device (onnxruntime/state.py, tensorrt/contexts.py)
    its options   what may be given, and what is in force (onnxruntime/config.py)

Calls are checked by `checks`, for every runner alike; a state has an `owner`, the runner that made it. The
runtime's own package is imported in functions: it may be absent. A runner that can choose tokens on its
device offers `decoding.Decodes` as well.
"""

from dijiang_engines.runners.base import Runner
from dijiang_engines.runners.registry import RUNNERS, open_runner

__all__ = ["RUNNERS", "Runner", "open_runner"]
