"""The man page, from the parser.

Written here rather than by a library: argparse-manpage (4.8) reflows usage and examples into paragraphs.
"""

import argparse
import re
from collections.abc import Iterator

__all__ = ["commands_of", "man_page"]

EXIT_STATUS = (
    ("0", "Done; the answer is yes."),
    ("1", "The answer is no, or the stream is damaged or ends too soon. What was good is given."),
    ("2", "Nothing could be done: wrong usage, not found, not permitted, no stream in it."),
    ("130", "Interrupted; 143 and 129 by SIGTERM and SIGHUP."),
)
EXIT_STATUS_LIVE = "Commands that drive live QEMUs say by 3 to 7 where the guest is: see migrate."
SIGNALS = (
    ("SIGUSR1", "Reading commands answer on standard error how much is read, and what is being read."),
    (
        "SIGINT, SIGTERM, SIGHUP",
        "End a reading command, which removes files that are half written. For others see migrate.",
    ),
)
ENVIRONMENT = (
    ("NO_COLOR", "If set, no colours. There are none anyway where standard output is no terminal."),
    ("QMP_SOCKET", "The QMP address of the QEMU, for commands that can do without one on the command line."),
    (
        "QMIGRATE_CACHE",
        "Where schemas and indexes are kept, in folders below it; else qmigrate in XDG_CACHE_HOME or ~/.cache.",
    ),
    ("TMPDIR", "Where diff puts the RAM of both inputs meanwhile, and schema a stream."),
)


def man_page(parser: argparse.ArgumentParser, version: str) -> str:
    """The whole page in roff, man(7)'s macros."""
    return "\n".join(_page(parser, version)) + "\n"


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Each command's parser by its name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _page(parser: argparse.ArgumentParser, version: str) -> Iterator[str]:
    commands = commands_of(parser)
    # No date: the same source makes the same page.
    yield f'.TH QMIGRATE 1 "" "qmigrate {_plain(version)}" "User Commands"'
    yield ".SH NAME"
    yield r"qmigrate \- opens up QEMU live migration"
    yield ".SH SYNOPSIS"
    for name, command in commands.items():
        yield from _synopsis(name, command)
    yield ".SH DESCRIPTION"
    yield _text(parser.description or "")
    yield ".SH OPTIONS"
    yield from _options(parser, parser._optionals)
    yield ".SH COMMANDS"
    for name, command in commands.items():
        yield f'.SS "qmigrate {_plain(name)}"'
        yield _text(command.description or "")
        yield from _arguments(command)
    yield ".SH EXIT STATUS"
    yield from _items(EXIT_STATUS)
    yield ".PP"
    yield _text(EXIT_STATUS_LIVE)
    yield ".SH SIGNALS"
    yield from _items(SIGNALS)
    yield ".SH ENVIRONMENT"
    yield from _items(ENVIRONMENT)
    yield ".SH EXAMPLES"
    for command in commands.values():
        for example in _examples(command):
            yield ".EX"
            yield _line(example)
            yield ".EE"


def _synopsis(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    """What must be given; the rest is an ellipsis."""
    yield f'.SY "qmigrate {_plain(name)}"'
    if any(action.option_strings for action in command._actions):
        yield r".RI [ options ]"
    for action in command._actions:
        if action.option_strings and action.required:
            yield f"{_bold(action.option_strings[-1])} {_values(action)}"
    for action in command._actions:
        if not action.option_strings:
            yield _values(action)
    yield ".YS"


def _arguments(command: argparse.ArgumentParser) -> Iterator[str]:
    for group in command._action_groups:
        if not any(_is_shown(action) for action in group._group_actions):
            continue
        if group not in (command._positionals, command._optionals):
            yield ".PP"
            yield _text(f"{(group.title or '').capitalize()}:")
        yield from _options(command, group)


def _options(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> Iterator[str]:
    formatter = argparse.HelpFormatter(parser.prog)
    for action in group._group_actions:
        if not _is_shown(action):
            continue
        yield ".TP"
        if action.option_strings:
            values = f" {_values(action)}" if action.nargs != 0 else ""
            yield ", ".join(f"{_bold(option)}{values}" for option in action.option_strings)
        else:
            yield _values(action)
        yield _text(formatter._expand_help(action) if action.help else "")


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(
        action, argparse._SubParsersAction | argparse._HelpAction
    )


def _values(action: argparse.Action) -> str:
    """What follows an option, or stands for an argument: italic, optional ones in brackets."""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    value = rf"\fI{_plain(metavar)}\fR"
    match action.nargs:
        case "+":
            return f"{value} ..."
        case "*":
            return f"[{value} ...]"
        case "?":
            return f"[{value}]"
        case _:
            return value


def _examples(command: argparse.ArgumentParser) -> list[str]:
    """Of the epilog, the lines below its heading."""
    return [line.strip() for line in (command.epilog or "").splitlines()[1:]]


def _items(items: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for name, text in items:
        yield ".TP"
        yield _bold(name)
        yield _text(text)


def _bold(text: str) -> str:
    return rf"\fB{_plain(text)}\fR"


def _text(text: str) -> str:
    """A paragraph, a sentence a line, as roff wants it."""
    return "\n".join(_line(sentence) for sentence in re.split(r"(?<=[.!?:]) +(?=[A-Z-])", " ".join(text.split())))


def _line(text: str) -> str:
    """Words that begin with a dot or a quote would be taken for a macro."""
    plain = _plain(text)
    return rf"\&{plain}" if plain[:1] in (".", "'") else plain


def _plain(text: str) -> str:
    r"""A hyphen as - is typed, and no \ that means something."""
    return text.replace("\\", r"\e").replace("-", r"\-").replace("–", r"\(en").replace("…", "...").replace("×", r"\(mu")
