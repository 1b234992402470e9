"""The `gralora` command as a module, for `python -m gralora.tool.cli`; its program is `gralora_command`."""

import sys

from gralora_command import COMMANDS, INTERRUPTED, USER_ERROR, USER_ERRORS, load, main, make_parser

__all__ = ["COMMANDS", "INTERRUPTED", "USER_ERROR", "USER_ERRORS", "load", "main", "make_parser"]

if __name__ == "__main__":
    sys.exit(main())
