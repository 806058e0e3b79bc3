"""What must not be written to disk or shown: tokens and keys. Torch-free, pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alignctl.config.schema import PATHS

MASK = "***"
_PATH_KEYS = {"run_dir", "start", "output", "command"} | {key for keys in PATHS.values() for key in keys}
_SECRET_KEY = re.compile(r"(^|[._])(hub_token|access_token|auth_token|api_key|apikey|password|passwd|secret)$", re.I)
# Tokens of the Hub, GitHub, OpenAI-like services and AWS, wherever they appear.
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{16})\b"
)


def is_secret(key: str) -> bool:
    """Whether the value under a dotted key is a token, a key or a password."""
    return _SECRET_KEY.search(key) is not None


def looks_secret(value: Any) -> bool:
    """Whether a text holds what looks like a token of a known service."""
    return isinstance(value, str) and _SECRET_VALUE.search(value) is not None


def mask(value: Any, key: str = "") -> Any:
    """Copies a config with every secret replaced by `***`. Paths stay as they are: a worker has to find them."""
    if isinstance(value, Mapping):
        return {name: mask(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask(item, key) for item in value]
    if value is not None and is_secret(key):
        return MASK
    if key.rpartition(".")[2] in _PATH_KEYS:
        return value
    return _SECRET_VALUE.sub(MASK, value) if isinstance(value, str) else value


def mask_override(text: str) -> str:
    """An override as it was typed, its value masked where it is a secret."""
    key, separator, value = text.partition("=")
    return f"{key}={MASK}" if separator and is_secret(key.lstrip("+~")) else _SECRET_VALUE.sub(MASK, text)
