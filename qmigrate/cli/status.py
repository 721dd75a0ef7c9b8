"""``qmigrate status``: what QEMUs say of themselves and of their migration."""

import argparse
from typing import TYPE_CHECKING, Any, Final, TextIO

from qmigrate.cli.live import SIDE_HELP, add_patience, address

if TYPE_CHECKING:
    from qmigrate.operations.whereabouts import View

__all__ = ["add_arguments", "run"]

HELP = "what QEMUs say of themselves and of their migration; where the guest is"
DESCRIPTION = (
    "Ask running QEMUs. Given the source and the destination of a migration, in this order, it says also where the "
    "guest is. Ends with 0 when all answered, 1 when some did, 2 when none did."
)
EXAMPLES = ("qmigrate status --json /run/src.qmp /run/dst.qmp",)

SOME_ANSWERED: Final = 1
NONE_ANSWERED: Final = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", nargs="*", help=f"{SIDE_HELP} (default: $QMP_SOCKET)")
    parser.add_argument("--json", action="store_true", help="the answers as JSON")
    add_patience(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    import asyncio

    from qmigrate.operations.whereabouts import ask_at, locate

    addresses = args.address or [address(None)]

    async def ask_all() -> "list[View]":
        return list(await asyncio.gather(*(ask_at(each, timeout_s=args.answer_timeout) for each in addresses)))

    views = asyncio.run(ask_all())
    in_order = views[::-1] if len(views) == 2 and views[0].receives and not views[1].receives else views
    guest = locate(*in_order) if len(views) == 2 else None
    if args.json:
        import json

        sides = [{"address": where, **_plain(view)} for where, view in zip(addresses, views, strict=True)]
        place = None if guest is None else {"place": guest.place, "running": guest.running, "sentence": guest.sentence}
        out.write(json.dumps({"sides": sides, "guest": place}, indent=2) + "\n")
    else:
        from qmigrate.report.names import clean

        for where, view in zip(addresses, views, strict=True):
            out.write(clean(f"{where}: {_line(view)}") + "\n")
        if in_order is not views:
            out.write("The first is the destination, the second the source.\n")
        for each in (guest.sentence, guest.advice) if guest is not None else ():
            if each:
                out.write(clean(each) + "\n")
    answered = sum(view.answers for view in views)
    return 0 if answered == len(views) else SOME_ANSWERED if answered else NONE_ANSWERED


def _plain(view: "View") -> dict[str, Any]:
    return {
        "reach": view.reach,
        "run-state": view.run_state,
        "running": view.running,
        "migration": view.info,
        "error": view.error,
    }


def _line(view: "View") -> str:
    from qmigrate.report.units import size

    if not view.answers:
        return str(view)
    parts = [f"{view.run_state}; migration: {view.status}"]
    ram = (view.info or {}).get("ram", {})
    if ram and view.status != "completed":
        parts.append(f"{size(ram.get('remaining', 0))} of {size(ram.get('total', 0))} left")
    if ram.get("postcopy-requests"):
        parts.append(f"{ram['postcopy-requests']} pages requested")
    if view.error:
        parts.append(view.error)
    return ", ".join(parts)
