"""Entry point of ``python -m fastlora``."""

from __future__ import annotations

import sys

from fastlora.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
