"""alignctl: a config-driven command line for aligning language models."""

__version__ = "0.2.0"
