"""What makes a shell complete qmigrate's commands: generated from the parser, by shtab."""

import argparse
import re
from typing import Any, Final

__all__ = ["SHELLS", "PrintCompletion", "completion"]

SHELLS: Final = ("bash", "zsh", "fish")

# What an argument's metavar stands for, where a shell can complete it.
_COMPLETES: Final = {
    "FILE": "file",
    "A": "file",
    "B": "file",
    "STREAM": "file",
    "DIR": "directory",
    "SRC": "file",
    "DST": "file",
    "ADDRESS": "file",
}


class PrintCompletion(argparse.Action):
    """``--print-completion SHELL``: prints it and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, _namespace: argparse.Namespace, values: Any, _option: str | None = None
    ) -> None:
        print(completion(parser, values))
        parser.exit()


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for ``shell``, one of ``SHELLS``.  The parser is changed, and good for nothing else after it."""
    import shtab

    _prepare(parser)
    script = shtab.complete(parser, shell)
    if shell == "zsh":
        # shtab (1.13) has zsh complete the first FILE of several, and no more; * means each that is left.
        script = re.sub(r'^( *)"\(\*\)::?', r'\1"*:', script, flags=re.MULTILINE)
        # An argument that it can't complete must have an action all the same, or options are not completed either.
        script = re.sub(r'^( *":.*:)"$', r'\1( )"', script, flags=re.MULTILINE)
    return script


def _prepare(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                command.description = None  # too long beside a command's name: shells show its help
                _prepare(command)
        elif isinstance(action.metavar, str):
            if action.metavar in _COMPLETES:
                action.complete = _COMPLETES[action.metavar]  # type: ignore[attr-defined]
            # Colons and brackets are grammar to zsh, and shtab hands them on as they are.
            action.metavar = re.sub(r"\W+", " ", action.metavar).strip()
