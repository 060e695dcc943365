r"""Completion of verbs, words, options and their values, for a shell.

    source <(qsl completion bash)        # a line for ~/.bashrc
    source <(qsl completion zsh)         # a line for ~/.zshrc, after compinit
    qsl completion fish | source         # a line for ~/.config/fish/config.fish

The script is made from the options as they are; the lines above make it again in every new shell.
Completing a word starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from qwen_scope_lens.cli.options import add_quiet

MOST_HELP = 70
"""The most characters of an explanation that a shell shows beside a word."""


@dataclass(frozen=True)
class Option:
    """One option; `values` are its choices, or None where it takes no value."""

    names: tuple[str, ...]
    help: str
    values: tuple[str, ...] | None


@dataclass(frozen=True)
class Place:
    """What may follow some words, such as `label list`: further words, or values of `choices`."""

    at: str  # " label list"; empty for `qsl` itself
    words: dict[str, str]  # with their explanations
    choices: tuple[str, ...]  # of an argument without a name
    options: tuple[Option, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(SHELLS))


def run(arguments: argparse.Namespace) -> int:
    print(SHELLS[arguments.shell](list(places())))
    return 0


def places() -> Iterator[Place]:
    """`qsl` itself, every verb, and every word of a verb."""
    from qwen_scope_lens.cli.verbs import VERBS

    top = (Option(("--help",), "all verbs", None), Option(("--version",), "which it is", None))
    yield Place("", VERBS, (), top)
    for verb in VERBS:
        module = import_module(f"qwen_scope_lens.cli.{verb.replace('-', '_')}")
        parser = argparse.ArgumentParser(prog=f"qsl {verb}")
        module.add_arguments(parser)
        add_quiet(parser)
        yield from _places(f" {verb}", parser)


def _places(at: str, parser: argparse.ArgumentParser) -> Iterator[Place]:
    words: dict[str, str] = {}
    choices: tuple[str, ...] = ()
    options, below = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words = {one.dest: _said(one) for one in action._choices_actions}
            below = [(f"{at} {name}", one) for name, one in action.choices.items()]
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            values = None if action.nargs == 0 else tuple(map(str, action.choices or ()))
            names = tuple(name for name in action.option_strings if name.startswith("-"))
            options.append(Option(names, _said(action), values))
        elif action.choices:
            choices = tuple(map(str, action.choices))
    yield Place(at, words, choices, tuple(options))
    for name, one in below:
        yield from _places(name, one)


def _said(action: argparse.Action) -> str:
    return (action.help or "") % vars(action)


# --- one function per shell ----------------------------------------------------------------------
# All three scripts first find the place: they add each word of the line that is known there.


def bash(found: Sequence[Place]) -> str:
    known, closed, valued = _facts(found)
    return f"""\
_qsl() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} at= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$at ${{COMP_WORDS[i]}}" in
            {_either(known)}) at="$at ${{COMP_WORDS[i]}}" ;;
        esac
    done
    local found=
    case "$at ${{COMP_WORDS[COMP_CWORD-1]}}" in
{_cases(closed, '        {key}) found="{value}" ;;')}
        {_either(valued)}) COMPREPLY=(); return ;;
        *) case "$at${{cur:0:1}}" in
{_cases(_options(found), '            {key}) found="{value}" ;;')}
            *) case "$at" in
{_cases(_words(found), '                {key}) found="{value}" ;;')}
            esac ;;
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$found" -- "$cur"))
}}
complete -o default -F _qsl qsl"""


def zsh(found: Sequence[Place]) -> str:
    known, closed, valued = _facts(found)
    return f"""\
#compdef qsl
_qsl() {{
    local at= i
    for ((i = 2; i < CURRENT; i++)); do
        case "$at ${{words[i]}}" in
            ({_either(known)}) at="$at ${{words[i]}}" ;;
        esac
    done
    case "$at ${{words[CURRENT-1]}}" in
{_cases(closed, "        ({key}) compadd -- {value}; return ;;")}
        ({_either(valued)}) _files; return ;;
    esac
    case "$at${{PREFIX[1]}}" in
{_cases(_options(found), "        ({key}) compadd -- {value}; return ;;")}
    esac
    case "$at" in
{_cases(_words(found), "        ({key}) compadd -- {value} ;;")}
        (*) _files ;;
    esac
}}
compdef _qsl qsl"""


def fish(found: Sequence[Place]) -> str:
    known, _, _ = _facts(found)
    lines = [
        "function __qsl_at",
        "    set -l at",
        "    for word in (commandline -opc)[2..-1]",
        '        switch "$at $word"',
        f"            case {' '.join(map(_quoted, known))}",
        '                set at "$at $word"',
        "        end",
        "    end",
        '    test "$at" = "$argv[1]"',
        "end",
    ]
    for place in found:
        here = f"complete -c qsl -n {_quoted(f'__qsl_at {_quoted(place.at)}')}"
        for word, help in (place.words or dict.fromkeys(place.choices, "")).items():
            lines.append(f"{here} -f -a {word}{_help(help)}")
        for option in place.options:
            values = option.values
            takes = "" if values is None else " -r"
            takes = f" -x -a {_quoted(' '.join(values))}" if values else takes
            names = "".join(
                f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}"
                for name in option.names
            )
            lines.append(f"{here}{names}{takes}{_help(option.help)}")
    return "\n".join(lines)


SHELLS: dict[str, Callable[[Sequence[Place]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _facts(found: Sequence[Place]) -> tuple[list[str], dict[str, Sequence[str]], list[str]]:
    """The places that can be reached, the options with choices, and those with any other value."""
    closed: dict[str, Sequence[str]] = {}
    valued = []
    for place in found:
        for option in place.options:
            keys = [f"{place.at} {name}" for name in option.names]
            if option.values:
                closed |= dict.fromkeys(keys, option.values)
            elif option.values is not None:
                valued += keys
    return [place.at for place in found if place.at], closed, valued


def _options(found: Sequence[Place]) -> dict[str, Sequence[str]]:
    """Place, followed by the `-` that an option begins with -> its options."""
    return {
        f"{place.at}-": [name for option in place.options for name in option.names]
        for place in found
    }


def _words(found: Sequence[Place]) -> dict[str, Sequence[str]]:
    return {
        place.at: [*place.words, *place.choices] for place in found if place.words or place.choices
    }


def _either(keys: Sequence[str]) -> str:
    return "|".join(f'"{key}"' for key in keys)


def _cases(table: dict[str, Sequence[str]], line: str) -> str:
    return "\n".join(line.format(key=f'"{key}"', value=" ".join(v)) for key, v in table.items())


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _help(text: str) -> str:
    line = " ".join(text.split())
    return f" -d {_quoted(line[:MOST_HELP])}" if line else ""
