"""The parser of configurations and flags: errors on one line, YAML that reads back as it was written."""

from __future__ import annotations

import os
import re
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_dumper, set_loader
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from launch.errors import UsageError, plain
from launch.moved import current


class Parser(LightningArgumentParser):
    """Raises its errors as one line instead of printing usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error, shortened to what the user can act on."""
        parsers = [self, *(choice for action in self._actions for choice in _parsers(action.choices))]
        options = {
            option
            for parser in parsers
            for action in parser._actions
            for option in (action.dest, *action.option_strings)
        }
        raise UsageError(plain(message, options)) from ex

    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Namespace:
        """`instantiate`, by the name under which Lightning calls it."""
        made: Namespace = self.instantiate(cfg, **kwargs)
        return made


def _load(text: str) -> Any:
    """A value of an argument or a configuration, read as YAML.

    A text that names a file or folder stays that name, e.g. `a: b`, `[x]`. Class paths of earlier versions become
    today's.
    """
    value = _yaml(text)
    return text if (value is None or isinstance(value, (dict, list))) and os.path.lexists(text) else current(value)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that jsonargparse reads as a number and PyYAML does not: `1e3`."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _EXPONENT.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


def dump(settings: Any) -> str:
    """Settings as YAML, which reads as the same settings."""
    return str(yaml.dump(settings, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


_EXPONENT = re.compile(r"[-+]?[\d_.]+[eE][-+]?\d+")
_Dumper.add_representer(str, _represent)
_yaml = get_loader("yaml")
set_loader("yaml", _load, (yaml.YAMLError,))
set_dumper("yaml", dump)


def check_stored(stored: dict[str, Any], source: str) -> None:
    """Refuse the settings of a checkpoint that this version of the code does not take.

    Args:
        stored: class_path and init_args of a checkpoint's model.
        source: The checkpoint, as an argument: `ckpt_path=last.ckpt`.

    Raises:
        UsageError: Naming the checkpoint and the setting.
    """
    parser = Parser(prog="isr")
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    try:
        parser.parse_object({"model": stored})
    except UsageError as error:
        text = str(error).partition("; see isr")[0]
        raise UsageError(
            f"{source}: the checkpoint holds a setting that this version does not take, {text}; use the version that "
            "wrote it (the commit is in run.json of its run)"
        ) from error


def _parsers(choices: Any) -> list[LightningArgumentParser]:
    return [choice for choice in choices.values() if isinstance(choice, Parser)] if isinstance(choices, dict) else []
