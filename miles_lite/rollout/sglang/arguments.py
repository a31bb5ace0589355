"""Options by name -> SGLang's ServerArgs, through SGLang's own command-line parser, which knows the
types and choices that the class itself accepts unseen. Runs in the interpreter that has sglang."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
from collections.abc import Mapping
from typing import Any


def server_args(options: Mapping[str, Any]) -> Any:
    """A ServerArgs, not yet resolved. ValueError for a name or a value it does not take."""
    from sglang.srt.server_args import prepare_server_args  # pyright: ignore[reportMissingImports]

    words = command_line(options)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return prepare_server_args(words)
    except SystemExit:
        told = errors.getvalue().strip().splitlines()
        raise ValueError(told[-1].partition("error: ")[2] if told else "refused") from None


def command_line(options: Mapping[str, Any]) -> list[str]:
    """As words of SGLang's command line; None stands for the default."""
    from sglang.srt.server_args import ServerArgs  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    spelled = {
        flag.lstrip("-").replace("-", "_"): name
        for name, action in actions.items()
        for flag in action.option_strings
    }
    words: list[str] = []
    for name, value in options.items():
        if name not in actions or name in ("help", "config"):
            raise ValueError(_unknown(name, spelled))
        if value is not None:
            words += _words(actions[name], value)
    return words


def _words(action: argparse.Action, value: Any) -> list[str]:
    flag = next(flag for flag in action.option_strings if flag.startswith("--"))
    if isinstance(action, argparse.BooleanOptionalAction):
        positive = [f for f in action.option_strings if not f.startswith("--no-")]
        negative = [f for f in action.option_strings if f.startswith("--no-")]
        return [_checked_bool(action, value, positive[0], negative[0])]
    if action.nargs == 0:  # a flag that can only be set
        word = _checked_bool(action, value, flag, "")
        return [word] if word else []
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        return [flag, *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict | list) else value}"]


def _checked_bool(action: argparse.Action, value: Any, true: str, false: str) -> str:
    if not isinstance(value, bool):
        raise ValueError(f"{action.dest} = {value!r}: wanted true or false")
    return true if value else false


def _unknown(name: str, spelled: Mapping[str, str]) -> str:
    """`spelled`: option by every spelling of it on a command line."""
    close = difflib.get_close_matches(name, spelled, n=1)
    meant = f"; did you mean {spelled[close[0]]}?" if close else ""
    return f"SGLang has no option {name!r}{meant}"
