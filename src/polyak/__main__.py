"""``python -m polyak``: the command line."""

import sys

from polyak.cli import main

# The demo's worker processes import this module again.
if __name__ == "__main__":
    sys.exit(main())
