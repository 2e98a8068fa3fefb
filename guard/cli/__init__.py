"""The command line: ``guard COMMAND``."""

from guard.cli.main import fail, main

__all__ = ["fail", "main"]
