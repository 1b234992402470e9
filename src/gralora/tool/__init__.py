"""The `gralora` command."""
