"""Command-line options made from a stage's dataclass, and the dataclass made from what was given."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click

from synthfast.config import make_config, number, read_toml, to_toml
from synthfast.errors import UsageError

Config = TypeVar("Config")


class _Float(click.ParamType):
    """A number; also a fraction such as 8/255."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return number(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def config_options(cls: type) -> Callable[[Callable], Callable]:
    """A decorator: one option a field of ``cls``, plus --config and --print-config.

    The command's function is called with the dataclass made from them (see :func:`config_from`).
    """
    hints = typing.get_type_hints(cls)

    def decorate(function: Callable) -> Callable:
        def command(config: str | None, print_config: bool, **given: Any) -> Any:
            values = {name: value for name, value in given.items() if value is not None and value != ()}
            settings = config_from(cls, config, values)
            if print_config:
                click.echo(to_toml(settings), nl=False)
                return None
            return function(settings)

        command.__doc__, command.__name__ = function.__doc__, function.__name__
        wrapped: Callable = click.option(
            "--print-config", is_flag=True, help="Print the settings as TOML, for --config, and stop."
        )(command)
        wrapped = click.option(
            "--config", metavar="FILE", help="TOML file with settings; options given here go first."
        )(wrapped)
        for item in reversed(dataclasses.fields(cls)):
            wrapped = _option(item, hints[item.name])(wrapped)
        return wrapped

    return decorate


def config_from(cls: type[Config], path: str | None, given: dict[str, Any]) -> Config:
    """The dataclass from a TOML file (or none) and the options that were given, which go first."""
    values = {} if path is None else read_toml(path)
    try:
        return make_config(cls, {**values, **given})
    except UsageError:
        if path is not None:
            make_config(cls, values, path)  # a mistake in the file is reported as the file's
        raise


def _option(item: dataclasses.Field, hint: Any) -> Callable[[Callable], Callable]:
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(alternative for alternative in alternatives if alternative is not type(None))
    flag = "--" + item.name.replace("_", "-")
    if item.metadata.get("positional"):
        return click.argument(item.name, nargs=-1, metavar=item.metadata.get("metavar"))
    text, default = item.metadata["help"], item.default
    if isinstance(default, bool):
        text = f"{text}  [default: {'on' if default else 'off'}]"
    elif default is not None and default != ():
        text = f"{text}  [default: {default}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", default=None, help=text)
    if typing.get_origin(kind) is tuple:
        of_numbers = typing.get_args(kind)[0] is float
        return click.option(
            flag,
            multiple=True,
            type=_Float() if of_numbers else click.STRING,
            help=text,
            metavar=item.metadata.get("metavar"),
        )
    choices = item.metadata.get("choices")
    click_type = click.Choice(choices) if choices else {int: click.INT, float: _Float(), str: click.STRING}[kind]
    names = [item.metadata["short"], flag] if "short" in item.metadata else [flag]
    return click.option(
        *names, item.name, type=click_type, default=None, help=text, metavar=item.metadata.get("metavar")
    )
