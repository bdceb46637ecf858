"""`python -m mymodels`: the same as the `mymodels` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
