"""``qmigrate migrate``: move a guest from one running QEMU to another."""

import argparse
from typing import TYPE_CHECKING, Final, TextIO

from qmigrate.cli.live import add_side, add_telling, drive
from qmigrate.cli.seen import looks_closely
from qmigrate.cli.sizes import size

if TYPE_CHECKING:
    from qmigrate.operations.plan import Hook, Plan
    from qmigrate.operations.policy import Policy

__all__ = ["add_arguments", "positive", "run", "seconds"]

HELP = "move a guest from one running QEMU to another, by precopy or postcopy"
DESCRIPTION = (
    "Migrate a guest between two running QEMUs over QMP. The destination was started with -incoming defer, or "
    "listens already. Ends with 0 when the guest is on the destination as asked, with 2 when it was refused before "
    "the start; else the code says where the guest is: 3 source, 4 destination, 5 paused and recoverable, 6 lost, "
    "7 both or unknown."
)
EXAMPLES = (
    "qmigrate migrate /run/src.qmp /run/dst.qmp --postcopy-if-stuck",
    "qmigrate migrate /run/src.qmp host:4444 --uri tcp:host:4445 --multifd 4",
    "qmigrate migrate /run/src.qmp /run/dst.qmp --postcopy-after-pass 2 --report page.html",
)

AUTO_RECOVERIES: Final = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_side(parser, "SRC", "the QEMU that has the guest")
    add_side(parser, "DST", "the QEMU that takes it")
    parser.add_argument(
        "--uri", help="where the source connects to, e.g. tcp:HOST:PORT or unix:PATH (default: beside DST's socket)"
    )
    parser.add_argument("--listen", metavar="URI", help="where the destination listens, if not at that very URI")
    when = parser.add_argument_group("when to switch to postcopy (the first that comes true; none: never)")
    when.add_argument("--postcopy", action="store_true", help="at once")
    when.add_argument("--postcopy-after-pass", metavar="N", type=positive, help="when N passes over memory are over")
    when.add_argument("--postcopy-after", metavar="SECONDS", type=seconds, help="when it has gone on for so long")
    when.add_argument(
        "--postcopy-if-stuck",
        action="store_true",
        help="when precopy won't end: from one pass to the next what is left does not shrink by a tenth, or the "
        "guest writes as fast as is sent, and what is left takes longer than the allowed downtime",
    )
    when.add_argument("--preempt", action="store_true", help="requested pages on a channel of their own")
    _add_parameters(parser)
    _add_recovery(parser)
    safety = parser.add_argument_group("limits")
    safety.add_argument("--timeout", metavar="SECONDS", type=seconds, help="cancel precopy that takes longer")
    safety.add_argument(
        "--stall-timeout",
        metavar="SECONDS",
        type=seconds,
        default=120.0,
        help="give up when nothing moves for so long (default: 120)",
    )
    safety.add_argument("--force", action="store_true", help="do also what is known to kill a QEMU or its guest")
    add_telling(parser)


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how")
    how.add_argument("--multifd", metavar="N", type=positive, help="send pages on N channels")
    how.add_argument("--compression", metavar="METHOD", help="compress multifd's pages: zlib, zstd, what QEMU has")
    how.add_argument("--xbzrle", action="store_true", help="send differences of pages that were sent before")
    how.add_argument("--bandwidth", metavar="SIZE", type=size, help="bytes a second at most, e.g. 100M")
    how.add_argument("--postcopy-bandwidth", metavar="SIZE", type=size, help="the same in postcopy, but for requests")
    how.add_argument(
        "--downtime-limit", metavar="MS", type=positive, help="milliseconds that precopy may stop the guest"
    )
    how.add_argument("--pause-before-switchover", action="store_true", help="stop there, run the hook, and go on")
    how.add_argument("--before-switchover", metavar="COMMAND", help="the hook, a shell command; if it fails: cancel")
    how.add_argument("--tls-creds", metavar="ID", help="encrypt, with this credentials object on both sides")
    how.add_argument("--tls-creds-destination", metavar="ID", help="what the object is called on the destination")
    how.add_argument("--tls-hostname", metavar="NAME", help="what the destination's certificate must say")
    how.add_argument("--blocktime", action="store_true", help="have the destination measure how long pages took")
    how.add_argument(
        "--capability",
        metavar="[SIDE:]NAME[=on|off]",
        action="append",
        default=[],
        type=_capability,
        help="any capability; SIDE: is source: or destination:",
    )
    how.add_argument(
        "--parameter",
        metavar="[SIDE:]NAME=VALUE",
        action="append",
        default=[],
        type=_parameter,
        help="any parameter",
    )


def _add_recovery(parser: argparse.ArgumentParser) -> None:
    recovery = parser.add_argument_group("when the connection breaks in postcopy")
    recovery.add_argument(
        "--auto-recover",
        metavar="N",
        nargs="?",
        type=_attempts,
        const=AUTO_RECOVERIES,
        default=0,
        help=f"bring it back, N times at most ({AUTO_RECOVERIES} if not said)",
    )
    recovery.add_argument("--recover-uri", metavar="URI", help="where the source connects to then (default: as before)")
    recovery.add_argument("--recover-listen", metavar="URI", help="where the destination listens then")


def run(args: argparse.Namespace, out: TextIO) -> int:
    from qmigrate.operations.drive import Driver

    plan = _plan(args)
    return drive(args, out, Driver.migrate, lambda source, destination, tell: Driver(source, destination, plan, tell))


def _plan(args: argparse.Namespace) -> "Plan":
    from qmigrate.operations.plan import Plan

    return Plan(
        uri=args.uri,
        listen=args.listen,
        postcopy=_policies(args),
        preempt=args.preempt,
        multifd=args.multifd,
        compression=args.compression,
        xbzrle=args.xbzrle,
        blocktime=args.blocktime,
        bandwidth=args.bandwidth,
        postcopy_bandwidth=args.postcopy_bandwidth,
        downtime_limit_ms=args.downtime_limit,
        tls_creds=args.tls_creds,
        destination_tls_creds=args.tls_creds_destination,
        tls_hostname=args.tls_hostname,
        capabilities=dict(args.capability),
        parameters=dict(args.parameter),
        pause_before_switchover=args.pause_before_switchover,
        before_switchover=_hook(args.before_switchover) if args.before_switchover else None,
        recoveries=args.auto_recover,
        recover_uri=args.recover_uri,
        recover_listen=args.recover_listen,
        force=args.force,
        closely=looks_closely(args),
        answer_timeout_s=args.answer_timeout,
        stall_timeout_s=args.stall_timeout,
        timeout_s=args.timeout,
    )


def _policies(args: argparse.Namespace) -> "list[Policy]":
    from qmigrate.operations.policy import AfterPass, AfterSeconds, AtOnce, IfStuck

    policies: list[Policy] = []
    if args.postcopy:
        policies.append(AtOnce())
    if args.postcopy_after_pass is not None:
        policies.append(AfterPass(args.postcopy_after_pass))
    if args.postcopy_after is not None:
        policies.append(AfterSeconds(args.postcopy_after))
    if args.postcopy_if_stuck:
        policies.append(IfStuck())
    return policies


def _hook(command: str) -> "Hook":
    async def hook() -> None:
        import asyncio

        process = await asyncio.create_subprocess_shell(command, stdin=asyncio.subprocess.DEVNULL)
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if status:
            raise RuntimeError(f"{command!r} ended with {status}")

    return hook


def positive(argument: str) -> int:
    """A number above 0."""
    if not (argument.isascii() and argument.isdigit() and int(argument) > 0):
        raise argparse.ArgumentTypeError(f"{argument!r} is no number above 0")
    return int(argument)


def _attempts(argument: str) -> int:
    if not (argument.isascii() and argument.isdigit()):
        raise argparse.ArgumentTypeError(f"{argument!r} is no number of attempts (addresses go before --auto-recover)")
    return int(argument)


def seconds(argument: str) -> float:
    """A number of seconds, with a fraction or none."""
    try:
        number = float(argument)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{argument!r} is no number of seconds")
    return number


def _capability(argument: str) -> tuple[str, bool]:
    name, _, state = argument.partition("=")
    if not name or state not in ("", "on", "off"):
        raise argparse.ArgumentTypeError(f"{argument!r}: expected NAME, NAME=on or NAME=off")
    return name, state != "off"


def _parameter(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{argument!r}: expected NAME=VALUE")
    return name, value
