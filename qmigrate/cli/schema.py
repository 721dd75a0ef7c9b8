"""``qmigrate schema``: descriptions of devices, kept to decode streams that have none."""

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TextIO

from qmigrate.cli.asked import answering
from qmigrate.cli.input import tell_damaged
from qmigrate.cli.tell import BAD_STREAM, FAILURES, NOTHING_DONE, failed, input_name, tell
from qmigrate.errors import NoStreamError

if TYPE_CHECKING:
    from qmigrate.capture.schemas import Schema, SchemaCache

__all__ = ["add_arguments", "run"]

HELP = "make, list and show device schemas, by which streams without a description are decoded"
DESCRIPTION = (
    "A postcopy stream does not describe its devices, so another capture of such a machine must, or a QEMU that is "
    "started for it. What is made here is kept in the user's cache folder, and dissect, check and diff use it by "
    "themselves where it fits."
)
EXAMPLES = (
    "qmigrate schema make precopy.mig",
    "qmigrate schema make -- qemu-system-x86_64 -machine q35 -m 4G -device virtio-net-pci",
    "qmigrate schema list",
)

TIMEOUT_S: Final = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(usage_error=parser.error)
    actions = parser.add_subparsers(
        title="actions", metavar="ACTION", dest="action", required=True, parser_class=_with_command(type(parser))
    )
    make = _add(actions, "make", "from streams that have a description, or from the machine of a command line")
    make.add_argument("files", metavar="STREAM", nargs="*", help="a precopy stream; - is standard input")
    make.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=TIMEOUT_S,
        help=f"of a command line: how long its machine may take (default: {TIMEOUT_S:g})",
    )
    make.epilog = (
        "-- COMMAND…: start this QEMU, stopped, and migrate it to nowhere. Its guest never runs. Give it devices as "
        "the real machine has them, but disks of its own."
    )
    _add(actions, "list", "all that are kept")
    show = _add(actions, "show", "what one is for, and the sections that it decodes")
    show.add_argument("id", metavar="ID", help="as list prints it, or its beginning")


def _add(actions: Any, name: str, said: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=said, description=said[0].upper() + said[1:] + ".")
    parser.add_argument("--json", action="store_true", help="as JSON")
    for option, word in (("-q", "--quiet"), ("-v", "--verbose")):  # as the command itself has them
        parser.add_argument(option, word, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _with_command(base: type[argparse.ArgumentParser]) -> type[argparse.ArgumentParser]:
    """A parser that leaves what stands behind ``--`` alone: it is ``command_line``, options and all."""

    class Parser(base):  # type: ignore[valid-type, misc]
        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            words: Sequence[str] = list(args or ())
            at = words.index("--") if "--" in words else len(words)
            found, rest = super().parse_known_args(words[:at], namespace)
            if rest and at == len(words) and self.prog.endswith(" make"):
                self.error(f"unrecognized arguments: {' '.join(rest)} (a QEMU's command line stands behind --)")
            found.command_line = words[at + 1 :]
            return found, rest

    return Parser


def _seconds(argument: str) -> float:
    try:
        seconds = float(argument)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{argument!r} is no number of seconds")
    return seconds


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.capture.schemas import SchemaCache, cache_folder

    with answering():
        return _run(args, SchemaCache(cache_folder(), tell_damaged), out)


def _run(args: argparse.Namespace, cache: "SchemaCache", out: TextIO) -> int:
    if args.action != "make" and args.command_line:
        args.usage_error("only make takes a command line")
    match args.action:
        case "make":
            return _make(args, cache, out)
        case "list":
            return _list(args, cache, out)
        case _:
            return _show(args, cache, out)


# -- make


def _make(args: argparse.Namespace, cache: "SchemaCache", out: TextIO) -> int:
    if bool(args.files) == bool(args.command_line):
        args.usage_error("make takes STREAMs, or -- and a command line")
    if args.command_line:
        return _made(args, cache, _from_command(args), out)
    worst = 0
    for file in args.files:
        worst = max(worst, _from_stream(args, cache, file, out))
    return worst


def _from_stream(args: argparse.Namespace, cache: "SchemaCache", file: str, out: TextIO) -> int:
    from qmigrate.capture.migration import Migration
    from qmigrate.capture.schemas import SchemaError, read_schema

    name = input_name(file)
    try:
        with Migration(file) as migration:
            schema = read_schema(migration, made_from=name)
    except SchemaError as exc:
        tell(name, str(exc))
        return BAD_STREAM
    except NoStreamError as exc:
        is_program = os.path.isfile(file) and os.access(file, os.X_OK)  # noqa: PTH113 - it may be any text
        return failed(exc, name, out) if not is_program else _no_stream_but_a_program(name)
    except FAILURES as failure:
        return failed(failure, name, out)
    return _made(args, cache, schema, out)


def _no_stream_but_a_program(name: str) -> int:
    tell(name, "no migration stream but a program: a QEMU's command line stands behind --")
    return NOTHING_DONE


def _from_command(args: argparse.Namespace) -> "Schema":
    import asyncio

    return asyncio.run(_interruptible(args))


async def _interruptible(args: argparse.Namespace) -> "Schema":
    """Whoever ends it, Ctrl-C or not: no QEMU and no folder is left."""
    import asyncio
    import signal

    from qmigrate.operations.schema import make_schema

    task = asyncio.ensure_future(make_schema(args.command_line, timeout_s=args.timeout))
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _made(args: argparse.Namespace, cache: "SchemaCache", schema: "Schema", out: TextIO) -> int:
    path = cache.add(schema)
    if args.json:
        from qmigrate.report.json import write_json_line

        write_json_line({**_described(schema), "path": str(path)}, out)
    else:
        _write_all([schema], out)
    out.flush()
    return 0


# -- list and show


def _list(args: argparse.Namespace, cache: "SchemaCache", out: TextIO) -> int:
    schemas = cache.schemas()
    if args.json:
        from qmigrate.report.json import write_json

        write_json([_described(schema) for schema in schemas], out)
    elif schemas:
        _write_all(schemas, out)
    else:
        tell(f"there are no schemas in {cache.folder}")
    return 0


def _write_all(schemas: "Sequence[Schema]", out: TextIO) -> None:
    from qmigrate.report.names import clean
    from qmigrate.report.paper import Paper

    rows = [
        [
            schema.id,
            clean(schema.machine_type or "-"),
            clean(schema.qemu or "-"),
            _date(schema.made_at),
            str(len(schema.sections)),
            clean(schema.said_from),
        ]
        for schema in schemas
    ]
    Paper(out).table(["id", "machine", "QEMU", "made at", "sections", "made from"], rows, left=6, indent=0)


def _show(args: argparse.Namespace, cache: "SchemaCache", out: TextIO) -> int:
    schema = cache.named(args.id)
    if args.json:
        from qmigrate.report.json import write_json

        sections = [
            {"name": name, "instance_id": instance, "version_id": version}
            for name, instance, version in schema.sections
        ]
        write_json({**_described(schema), "devices": sections}, out)
        return 0
    from qmigrate.report.names import clean
    from qmigrate.report.paper import Paper

    paper = Paper(out)
    paper.facts(
        [
            ("Schema", schema.id),
            ("Machine", clean(schema.machine_type or "not said")),
            ("QEMU", clean(schema.qemu or "not known")),
            ("Made at", _date(schema.made_at)),
            ("Made from", clean(schema.made_from)),
        ]
    )
    paper.line()
    rows = [[clean(f"{name}/{instance}"), str(version)] for name, instance, version in schema.sections]
    paper.table(["section", "version"], rows)
    return 0


def _described(schema: "Schema") -> dict[str, Any]:
    return {
        "id": schema.id,
        "machine_type": schema.machine_type,
        "qemu": schema.qemu,
        "made_at": schema.made_at,
        "made_from": schema.made_from,
        "sections": len(schema.sections),
    }


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # a file may claim any time
        return "-"
