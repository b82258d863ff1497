"""How a command line is parsed: the options of every command, and mistakes in one line each.

All options and settings that are wrong are named together. Typer's own classes stop at the first
one, and print it in a box.

Not covered: the options of single commands; what an invalid setting is told with
(`config/explain.py`).
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from switokd.cli.arguments import Verbose
from switokd.errors import SwitokdError, UsageError, nearest
from switokd.runtime.lifecycle import print_error, told
from switokd.runtime.log import LOG_FORMAT, QUIET, set_up

QUIET_HELP = "Print warnings and errors only."
LOG_FORMAT_HELP = (
    "text, or json: what goes to standard error, and what a run prints, as one JSON object a line."
)


def _set_quiet(is_wanted: bool) -> None:
    if is_wanted:
        os.environ[QUIET] = "1"
        set_up()


def _set_log_format(name: str) -> str:
    if name not in ("text", "json"):
        raise typer.BadParameter(f"found {name}; allowed: text, json")
    if name == "json":
        os.environ[LOG_FORMAT] = name
        set_up()
    return name


@cache
def _options_of_all() -> tuple[Any, ...]:
    """Return the options that every command has, as Typer makes them."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def options(
        quiet: Annotated[
            bool,
            typer.Option("--quiet", callback=_set_quiet, expose_value=False, help=QUIET_HELP),
        ] = False,
        verbose: Verbose = False,
        log_format: Annotated[
            str,
            typer.Option(
                "--log-format",
                metavar="text|json",
                callback=_set_log_format,
                expose_value=False,
                help=LOG_FORMAT_HELP,
            ),
        ] = "text",
    ) -> None:
        pass

    return tuple(p for p in typer.main.get_command(app).params if p.name != "help")


def _run(main: Any, standalone_mode: bool, options: dict[str, Any]) -> Any:
    """Call the `main` of a Typer class; print its errors in one line, and end the process."""
    if not standalone_mode:
        return main(standalone_mode=False, **options)
    try:
        code = main(standalone_mode=False, **options)
    except UsageError as error:
        print_error(told(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if not hasattr(error, "format_message"):  # the base of click's errors, which Typer copies
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            print_error(_describe(error))
        sys.exit(UsageError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


class CliCommand(TyperCommand):
    """A command with the options of all commands; its mistakes are one line each."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        own = {name for parameter in self.params for name in parameter.opts}
        self.params += [p for p in _options_of_all() if not own & {*p.opts}]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options; if several values are wrong, the error names all of them."""
        before = list(args)
        try:
            rest = super().parse_args(ctx, args)
            if empty := self._empty(ctx, before):
                raise UsageError("\n".join(empty))
            return rest
        except Exception as error:
            if hasattr(error, "format_message") and not error.ctx:  # type: ignore[attr-defined]
                error.ctx = ctx  # type: ignore[attr-defined]
            if len(unknown := self._unknown_options(ctx, before)) > 1:
                raise UsageError("\n".join(map(_describe, unknown))) from None
            if type(error).__name__ not in ("BadParameter", "MissingParameter"):
                raise
            raise UsageError("\n".join(self._problems(ctx, before) or [_describe(error)])) from None

    def _unknown_options(self, ctx: Any, args: list[str]) -> list[Any]:
        """Return the error of each option that there is not; the parser stops at the first."""
        found: list[Any] = []
        rest = list(args)
        while True:
            try:
                self.make_parser(ctx).parse_args(args=list(rest))
                return found
            except Exception as error:  # noqa: PERF203 the parser stops at each
                name = getattr(error, "option_name", None)
                places = [i for i, word in enumerate(rest) if name and word.startswith(name)]
                if type(error).__name__ != "NoSuchOption" or not places:
                    return found
                error.ctx = ctx  # type: ignore[attr-defined]
                found.append(error)
                del rest[places[0]]

    def _empty(self, ctx: Any, args: list[str]) -> list[str]:
        """Describe every argument that is an empty word, such as a variable that is not set.

        An empty path would be the current folder.
        """
        found, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        command, problems = ctx.command_path.removeprefix("switokd").strip(), []
        for parameter in self.params:
            value = found.get(parameter.name)
            words = value if isinstance(value, list | tuple) else [value]
            if "" in words and not parameter.opts[0].startswith("-"):
                name = (parameter.metavar or parameter.name.upper()).strip("[].")
                problems.append(
                    f"{command}: {name} is an empty word; see '{ctx.command_path} --help'"
                )
        return problems

    def _problems(self, ctx: Any, args: list[str]) -> list[str]:
        """Describe every value that is wrong, of options and of settings."""
        options, rest, _ = self.make_parser(ctx).parse_args(args=args)
        found, problems = {}, []
        for parameter in self.params:
            try:
                found[parameter.name], rest = parameter.handle_parse_result(ctx, options, rest)
            except Exception as error:  # noqa: PERF203 all problems are told
                if not hasattr(error, "format_message"):
                    raise
                problems.append(_describe(error))
        if isinstance(recipe := found.get("recipe"), str):
            from switokd.config.run_file import load

            try:
                load(recipe, found.get("settings") or [])
            except SwitokdError as error:
                problems += str(error).splitlines()
        return problems

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run the command as a program of its own."""
        more |= dict(zip(("args", "prog_name"), args, strict=False))
        return _run(super().main, standalone_mode, more)


class Group(TyperGroup):
    """The command `switokd`, whose mistakes are one line each."""

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run the program."""
        more |= dict(zip(("args", "prog_name"), args, strict=False))
        return _run(super().main, standalone_mode, more)


def _describe(error: Any) -> str:
    """Return a click error as one sentence, with the command and what to do."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "switokd"
    command = path.removeprefix("switokd").strip()
    where, help_of = f"{command}: " if command else "", f"see '{path} --help'"
    kind = type(error).__name__
    if kind == "NoSuchOption" and re.match(r"-\.?\d", error.option_name):
        found = next((word for word in sys.argv if word.startswith(error.option_name)), "")
        return f"{where}found {found or error.option_name}, a number below 0; {help_of}"
    if kind == "NoSuchOption":
        return f"{where}there is no option {error.option_name}{_meant(error)}; {help_of}"
    if kind == "BadParameter":
        names = getattr(error.param, "opts", None) or [error.param_hint]
        return f"{where}{names[0]}: {error.message}"
    message = " ".join(error.format_message().split()).replace(". Did you mean", "; did you mean")
    message = message.replace(". Choose from:", "; allowed:").replace("', '", "' or '")
    if "unexpected extra argument" in message:
        words = message.partition("(")[2].rpartition("(")[2].rstrip(").")
        return f"{where}{words} is more than the command takes; {help_of}"
    return f"{where}{message[:1].lower()}{message[1:].rstrip('.?')}; {help_of}"


def _meant(error: Any) -> str:
    """Say which option or setting an unknown option stands for, as far as it is known.

    Options and settings look alike to a user: --epochs 5 is schedule.epochs=5.
    """
    name = error.option_name.lstrip("-")
    parameters = error.ctx.command.params if error.ctx else []
    options = [o for p in parameters for o in p.opts if o.startswith("--") and not _is_hidden(p)]
    takes_settings = any(p.name in ("settings", "words") for p in parameters)
    settings = settings_named(name) if takes_settings else []
    if settings and not difflib.get_close_matches(f"--{name}", options, 1, 0.85):
        value = _value_of(error.option_name)
        written = " or ".join(shlex.join([f"{setting}={value}"]) for setting in settings)
        of = " (NAME: a network of the run file)" if ".NAME." in written else ""
        return f"; a setting is written without dashes: {written}{of}"
    return nearest(f"--{name}", options) if len(name) > 2 else ""


def _is_hidden(parameter: Any) -> bool:
    return bool(getattr(parameter, "hidden", False))


def _value_of(option: str) -> str:
    """Return the word that is given with an option, or VALUE."""
    for i, word in enumerate(sys.argv):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and i + 1 < len(sys.argv) and not sys.argv[i + 1].startswith("-"):
            return sys.argv[i + 1]
    return "VALUE"


def settings_named(name: str) -> list[str]:
    """Return the dotted keys of the settings that an option's name stands for, at most three.

    A name with dots is a key. Another one is the last part of keys, or close to it, with dashes
    for underscores.
    """
    from switokd.config.config import known_settings

    wanted = name.replace("-", "_")
    if "." in name:
        return [name]
    keys = list(dict.fromkeys(key for key, field in known_settings()))
    leaves = [key.rpartition(".")[2] for key in keys]
    same = [key for key, leaf in zip(keys, leaves, strict=True) if wanted == leaf]
    if not same:
        (close,) = difflib.get_close_matches(wanted, leaves, 1, 0.75) or [""]
        same = [key for key, leaf in zip(keys, leaves, strict=True) if leaf == close]
    return sorted(same, key=_section_first)[:3]


def _section_first(key: str) -> tuple[int, int]:
    """Sort settings of the run before those of a network, and those before a pair's."""
    return int(key.startswith(("networks.", "pairs.")) + key.startswith("pairs.")), len(key)
