"""Run `python -m kfactk`."""

import sys

from kfactk.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
