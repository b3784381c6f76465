"""Reads a config file into a plain mapping: bounded, without aliases or repeated keys, not yet validated."""

from __future__ import annotations

import json
import reprlib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ascend_v4.errors import ConfigError

SHIPPED_CONFIGS = ("flash", "pro", "tiny")
"""Model configs that come with the package and are known by name."""

MAX_CONFIG_BYTES = 1 << 20
"""A config.json of the release is 2 KB; a larger file than this is not one."""


def resolve_config_path(name: str | Path) -> Path:
    """File of a shipped config by its name (flash, pro, tiny), and any other path as it is."""
    if str(name) in SHIPPED_CONFIGS:
        return Path(str(resources.files("ascend_v4.configs") / "model" / f"{name}.yaml"))
    return Path(name)


def read_config_fields(path: str | Path) -> dict[str, Any]:
    """The raw mapping of a config file, not yet validated. Raises ConfigError naming the file."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_CONFIG_BYTES + 1)
        text = raw.decode("utf-8")
    except FileNotFoundError:
        names = ", ".join(SHIPPED_CONFIGS)
        raise ConfigError(
            f"{file} does not exist. Name a config.json, a .yaml, a checkpoint directory or one of {names}."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}.") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{file} has more than {MAX_CONFIG_BYTES} bytes, the bound for a model config.")
    try:
        if file.suffix in (".yaml", ".yml"):
            # a SafeLoader by inheritance: it builds plain values only
            fields = yaml.load(text, Loader=_StrictLoader)
        else:
            fields = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} does not parse: {str(error)[:300]}.") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} holds a {type(fields).__name__}; a model config is a mapping of fields.")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"{key[:80]} is given twice")
        mapping[key] = value
    return mapping


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases, which can make a small file expand without bound, and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not allowed in a model config")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise ValueError(f"a key is given twice in the mapping at line {node.start_mark.line + 1}")
        return mapping


class _ShortRepr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of thousands of digits
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 128 else repr(x)


def shown(value: object) -> str:
    """A value from a file as an error may quote it: whatever it is, a few words."""
    return _ShortRepr().repr(value)
