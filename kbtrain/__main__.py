"""``python -m kbtrain``: see ``kbtrain.cli``."""

import sys

from kbtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
