"""`python convert.py`: the command `mlx_rgemma.convert`, without installing the package."""

import sys

from mlx_rgemma.convert import main

if __name__ == "__main__":
    sys.exit(main())
