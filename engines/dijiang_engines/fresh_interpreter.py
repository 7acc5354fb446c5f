"""A module of this project, run in a Python process of its own.

Used where work must not share its process with ours: a runtime that may crash or hang, a builder that takes
all memory, a measurement that other libraries' threads would disturb. The program is a module like any other,
with a function `main`, so that linters and type checkers see it.

`python -m` would look for modules in the current folder first, where an unpacked download may hold a
`torch.py`; and a path in the environment would be passed on to whatever the process starts. So this file is
run as a script, which takes the search path from its arguments.
"""

from __future__ import annotations

import json
import sys


def command_for(module: str, *arguments: str) -> list[str]:
    """The command line of `module.main()` in a fresh interpreter with the search path of this one.

    Args:
        module: its full name.
        arguments: are in `sys.argv[1:]` there, as after `python -m module`.
    """
    return [sys.executable, __file__, json.dumps(sys.path), module, *arguments]


def main() -> None:
    """What the fresh interpreter runs; what the module's `main` returns is for `sys.exit`."""
    path, module, *arguments = sys.argv[1:]
    sys.path[:] = json.loads(path)
    from importlib import import_module

    program = import_module(module)
    sys.argv = [str(program.__file__), *arguments]
    sys.exit(program.main())


if __name__ == "__main__":
    main()
