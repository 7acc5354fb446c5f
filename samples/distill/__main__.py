"""`python -m samples.distill --teacher FOLDER --out FOLDER`: see README.md."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # for caches that grow

from safetensors import SafetensorError

from dijiang_engines.errors import DijiangError

from .recipe import Recipe
from .settings import parse


def main(arguments: list[str] | None = None) -> int:
    """Run, or go on; the exit status."""
    try:
        settings, out, minutes = parse(arguments)
        Recipe(settings, out, sys.argv[1:] if arguments is None else arguments).run(minutes)
    except DijiangError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, SafetensorError) as error:
        print(f"error: a file cannot be read or written\n  got: {error}", file=sys.stderr)
        print("hint: make room; the same command goes on from the last saved state", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
