"""`python -m dijiang_export`."""

import sys

from dijiang_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
