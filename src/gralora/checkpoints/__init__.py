"""Adapters on disk: read, convert, export, merge, load and inspect them, in every format that GraLoRA is saved in."""
