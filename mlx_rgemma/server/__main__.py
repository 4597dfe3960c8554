"""``python -m mlx_rgemma.server``."""

import sys

from mlx_rgemma.server import main

if __name__ == "__main__":
    sys.exit(main())
