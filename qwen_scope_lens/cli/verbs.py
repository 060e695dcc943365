"""`qsl VERB ...`: finds the verb's module, and turns errors into one line and an exit code.

A verb is a module with `add_arguments(parser)` and `run(arguments) -> exit code`; its docstring is
its help. Only the verb that was asked for is imported, and a verb imports torch in `run` only, so
every `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from qwen_scope_lens.errors import ScopeError

__all__ = ["VERBS", "main", "run_alone"]

SECTIONS = {
    "first steps": {
        "demo": "a tour on a toy model, offline",
        "completion": "words and options on the Tab key, for bash, zsh and fish",
        "mini": "sample files for the toy models, as the examples use them",
    },
    "SAEs": {
        "list": "the groups of SAEs that have a name",
        "show": "one group: shapes, sizes, memory, hook, notice",
        "convert": "between the published layout and SAELens's",
        "verify": "does this SAE belong to these activations?",
    },
    "features of a corpus": {
        "extract": "a corpus through model and SAEs, into a feature store",
        "store": "a feature store: info, check, sql, merge",
        "stats": "every feature of a store: how often, how strongly, with which others",
        "find": "from a concept to features: labels, examples, causes",
        "discover": "from a labelled corpus or pairs to tested hypotheses",
        "rank": "which features tell one group of documents from another",
        "label": "packs of what features mean: list, show, merge, check, import, score",
    },
    "looking": {
        "read": "which features fire on a text, per token and as a whole",
        "dash": "every feature on a page: a static site, or Neuronpedia's format",
        "app": "read, compare and steer in a browser",
        "serve": "an OpenAI-compatible server that steers, monitors and records",
        "mcp": "the same for a language-model agent, over the Model Context Protocol",
        "lens": "Jacobian lenses, for what features make a model say: fit, show, check",
        "graph": "which features, through all layers, made the model say that",
        "compare": "features across SAEs, layers and models: match, drift, transfer",
    },
    "steering": {
        "plan": "the same edit on the best features of a ranking",
        "steer": "generate with features amplified, set, capped or removed",
        "sweep": "effect of an edit against its strength, with control and picture",
        "calibrate": "typical activations, the unit of strengths",
        "blame": "from a bad reply to the features behind it",
        "export": "a plan for llama.cpp (GGUF) or as plain vectors",
        "lm-eval": "standard benchmarks of a steered model",
    },
    "applications": {
        "bench": "what benchmarks measure: redundancy, overlap, subsets",
        "classify": "documents by rules over features, beside probes",
        "synth": "find features that data never activates, write data that does",
        "train": "SASFT and rare negatives on TRL, their features and metrics",
        "reproduce": "the paper's experiments as recipes: one command each, one page at the end",
    },
}
VERBS = {verb: what for section in SECTIONS.values() for verb, what in section.items()}

GO_ON = ("bench", "classify", "extract", "lens", "reproduce", "sweep", "synth", "train")
"""Verbs that keep what is finished of a long job, and go on from it."""

OLD_NAMES = {"lm_eval": "lm-eval"}

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
MOST_SAID = 6000
"""The most characters of an error's message that are printed."""

AddArguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of `qsl`."""
    return _unless_closed(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(words: list[str]) -> int:
    if any("\0" in word for word in words):
        print("qsl: an argument has a NUL character in it", file=sys.stderr)
        return EXIT_USAGE
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(), flush=True)
        return 0
    if words[0] in ("-V", "--version"):
        from qwen_scope_lens.version import __version__

        print(f"qwen-scope-lens {__version__}")
        return 0
    verb = words.pop(0)
    if verb in OLD_NAMES:
        print(f"qsl: {verb} is now called {OLD_NAMES[verb]}", file=sys.stderr)
    verb = OLD_NAMES.get(verb, verb)
    if verb not in VERBS:
        print(f"qsl: no verb {verb!r:.60}\n\n{_overview()}", file=sys.stderr)
        return EXIT_USAGE
    try:
        module = import_module(f"qwen_scope_lens.cli.{verb.replace('-', '_')}")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return _run(f"qsl {verb}", module.__doc__, module.add_arguments, module.run, words)


def run_alone(doc: str | None, add_arguments: AddArguments, run: Run) -> int:
    """The entry point of a module that runs with `python -m` or as a script."""
    return _unless_closed(lambda: _run(None, doc, add_arguments, run, sys.argv[1:]))


def _unless_closed(work: Callable[[], int]) -> int:
    """`qsl list | head -1`: when the reader of the output has gone, the verb ends quietly."""
    try:
        try:
            return work()
        except SystemExit:  # argparse, after `--help`
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        _discard_output()
        return EXIT_ERROR


def _discard_output() -> None:
    """Else Python tries to write the rest once more, at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(
    prog: str | None, doc: str | None, add_arguments: AddArguments, run: Run, words: Sequence[str]
) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)

    from qwen_scope_lens.cli.inputs import check_inputs, refuse_empty_paths
    from qwen_scope_lens.cli.options import (
        add_quiet,
        old_spellings,
        remark,
    )
    from qwen_scope_lens.cli.terminal import plain, shown_safely, silenced

    add_quiet(parser)
    refuse_empty_paths(parser)
    arguments = parser.parse_args(words)
    arguments.quiet = getattr(arguments, "quiet", False)
    try:
        with shown_safely(), silenced(arguments.quiet):
            for line in old_spellings(parser, arguments, words):
                remark(f"{parser.prog}: {line}")
            check_inputs(parser, arguments)
            code = run(arguments)
            sys.stdout.flush()
            return code
    except ScopeError as error:
        print(plain(f"{parser.prog}: {_in_short(str(error))}"), file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        goes_on = str(prog).removeprefix("qsl ") in GO_ON
        kept = "what was finished is kept, and the same command again goes on" if goes_on else ""
        print(f"{parser.prog}: interrupted{'; ' if kept else ''}{kept}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:  # stdout on a full disk, a file that may not be read, ...
        print(plain(f"{parser.prog}: the system refused: {str(error)[:500]}"), file=sys.stderr)
        if error.errno == errno.ENOSPC:
            _discard_output()
        return EXIT_ERROR
    except MemoryError as error:
        print(f"{parser.prog}: out of memory {plain(error)}", file=sys.stderr)
        return EXIT_ERROR


def _in_short(message: str) -> str:
    """The message; the middle of a very long one is left out."""
    if len(message) <= MOST_SAID:
        return message
    half = MOST_SAID // 2
    return f"{message[:half]} [.. {len(message):,} characters ..] {message[-half:]}"


def _overview() -> str:
    verbs = "\n\n".join(
        "\n".join([f"{section}:", *(f"  {name:10} {what}" for name, what in verbs.items())])
        for section, verbs in SECTIONS.items()
    )
    return (
        "usage: qsl VERB ...\n\n"
        "Tools for Qwen-Scope, the sparse autoencoders of Qwen3 and Qwen3.5.\n\n"
        f"{verbs}\n\n"
        "`qsl VERB --help` explains one. Its examples run one after the other, in the order of this"
        " list,\nin a folder where `qsl mini texts` was run before.\n"
        "Weights are looked for in $QWEN_SCOPE_HOME, then on the hub."
    )
