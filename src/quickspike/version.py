"""The version, in a file that imports nothing, so that packaging and the CLI can read it without loading torch."""

__version__ = "0.1.0"
