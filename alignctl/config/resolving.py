"""Fills in what a composed config refers to, and leaves out what is secret. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, Node, OmegaConf
from omegaconf.resolvers import oc

from alignctl.config.secrets import is_secret, is_secret_variable, left_out, takes_variables


def resolved(config: DictConfig) -> Any:
    """A config with its interpolations resolved. Variables of the environment that are secret by their names, or
    because something secret takes them, stay `${oc.env:NAME}` wherever they are led to."""
    taken: set[str] = set()

    def note(name: str, *default: Any) -> Any:
        taken.add(name)
        return oc.env(name, *default)

    def keep(name: str, *default: Any) -> Any:
        kept = is_secret_variable(name) and (name in os.environ or not default)
        return left_out(name) if kept else oc.env(name, *default)

    try:
        OmegaConf.register_new_resolver("oc.env", note, replace=True)
        for node in _secret_nodes(config):
            with suppress(Exception):  # it is said when all of it is resolved
                node._dereference_node()
        takes_variables(taken)
        OmegaConf.register_new_resolver("oc.env", keep, replace=True)
        return OmegaConf.to_container(config, resolve=True)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _secret_nodes(node: Node | None, key: str = "") -> Iterator[Node]:
    """The values in a config that are a token, a key or a password."""
    if isinstance(node, Container) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
        names = range(len(node)) if isinstance(node, ListConfig) else list(node)
        for name in names:
            yield from _secret_nodes(node._get_node(name), key if isinstance(node, ListConfig) else f"{key}.{name}")
    elif node is not None and is_secret(key):
        yield node
