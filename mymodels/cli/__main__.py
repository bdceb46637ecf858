"""`python -m mymodels.cli`: the same as the `mymodels` command."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
