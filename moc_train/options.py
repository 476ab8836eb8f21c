"""From a YAML file and command-line words to a checked `TrainConfig`.

    pretrain.py --config job.yaml --corpus a.txt b.jsonl training.steps=100 model.experts=8

The words win over the file.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

from moc_train.config import ConfigError, TrainConfig

__all__ = ["as_mapping", "bind", "parse_arguments"]


def parse_arguments(words: Sequence[str]) -> TrainConfig:
    """Return the configuration that these command-line words describe; raise ConfigError for what cannot be used."""
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description="Train a mixture-of-experts language model with DeepSpeed.",
        epilog="Settings are written section.key=value, for instance training.steps=100; they win over the file.",
    )
    parser.add_argument("--config", type=Path, help="YAML file with any of the settings")
    parser.add_argument("--corpus", nargs="+", metavar="PATH", help=".txt or .jsonl files, any fsspec URL: data.corpus")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # given by launchers
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(list(words))

    settings = _read_yaml(options.config) if options.config else {}
    corpus = list(options.corpus or [])
    overrides = list(options.settings)
    # `--corpus a.txt training.steps=5` is read as two paths: a word that names a section is a setting.
    overrides += [word for word in corpus if _is_setting(word)]
    corpus = [word for word in corpus if not _is_setting(word)]
    if corpus:
        settings = _merge(settings, "data.corpus", corpus)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"settings are written section.key=value, given {word}")
        settings = _merge(settings, key, _parse_value(key, value))
    config: TrainConfig = bind(TrainConfig, settings)
    if options.print_config:
        print(yaml.safe_dump(as_mapping(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def bind(kind: type, values: object, path: str = "") -> Any:
    """Return the dataclass `kind` filled from a mapping; unknown keys and wrong types are refused by name."""
    where = path or "the configuration"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a mapping of settings, given {values!r}")
    types_by_key = typing.get_type_hints(kind)
    allowed = [item.name for item in dataclasses.fields(kind)]
    for key in values:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"unknown key {_join(path, key)}{hint}, allowed are {', '.join(allowed)}")
    arguments = {key: _convert(types_by_key[key], value, _join(path, key)) for key, value in values.items()}
    return kind(**arguments)


def as_mapping(config: "DataclassInstance") -> dict[str, Any]:
    """Return the configuration as plain values, as it would stand in a YAML file."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result[item.name] = as_mapping(value)
        else:
            result[item.name] = list(value) if isinstance(value, tuple) else value
    return result


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_setting(word: str) -> bool:
    head = word.partition("=")[0]
    return "=" in word and head.partition(".")[0] in {item.name for item in dataclasses.fields(TrainConfig)}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"--config cannot be read path={path} reason={e.strerror}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"--config is not YAML path={path}: {' '.join(str(e).split())}") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"--config must hold a mapping of settings path={path}")
    return values


def _parse_value(key: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{key} must be a YAML value, given {text}") from e


def _merge(settings: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    if not dot:
        return {**settings, head: value}
    inner = settings.get(head) or {}
    if not isinstance(inner, dict):
        raise ConfigError(f"{head} must be a mapping of settings, given {inner!r}")
    return {**settings, head: _merge(inner, rest, value)}


def _convert(kind: Any, value: object, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return bind(kind, {} if value is None else value, path)
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for choice in choices:
        found, converted = _try_convert(choice, value)
        if found:
            return converted
    names = " or ".join(_type_name(choice) for choice in choices)
    raise ConfigError(f"{path} must be {names}, given {value!r}")


def _try_convert(kind: Any, value: object) -> tuple[bool, Any]:
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        if isinstance(value, list | tuple) and all(_try_convert(element, item)[0] for item in value):
            return True, tuple(_try_convert(element, item)[1] for item in value)
        return False, None
    if kind is types.NoneType:
        return value is None, None
    if isinstance(value, bool) and kind is not bool:
        return False, None
    if kind is float:
        if isinstance(value, int | float):
            return True, float(value)
        # YAML 1.1 reads 1e-3 as text, because its floats need a dot.
        if isinstance(value, str):
            try:
                return True, float(value)
            except ValueError:
                return False, None
        return False, None
    return isinstance(value, kind), value


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {_type_name(typing.get_args(kind)[0])}"
    return "null" if kind is types.NoneType else str(kind.__name__)
