"""Commands in words."""

from qmigrate.analysis.devices import plain
from qmigrate.format.command import Command, Packaged, Ping, PostcopyAdvise, PostcopyRamDiscard, RecvBitmap
from qmigrate.report.names import clean
from qmigrate.report.units import plural, size

__all__ = ["details"]


def details(command: Command) -> str:
    """What a command says beyond its name; often nothing."""
    match command:
        case Ping(token=token):
            return f"{token:#x}" if token > 9 else str(token)
        case PostcopyAdvise(sizes=sizes):
            if sizes is None:
                return "for dirty bitmaps alone"
            return f"host pages {_page_sizes(sizes.summary)}, target pages {size(sizes.target_page_size)}"
        case PostcopyRamDiscard(block=block, ranges=ranges):
            return f"{clean(block)}  {size(sum(item.length for item in ranges))} in {plural(len(ranges), 'range')}"
        case Packaged(length=length):
            return f"{length:,} bytes"
        case RecvBitmap(block=block):
            return clean(block)
        case _:
            fields = plain(command)
            assert isinstance(fields, dict)
            return "  ".join(f"{name} {clean(str(value))}" for name, value in fields.items())


def _page_sizes(summary: int) -> str:
    """ADVISE's summary has a bit for each host page size that is in use."""
    sizes = [size(1 << bit) for bit in range(summary.bit_length()) if summary >> bit & 1]
    return ", ".join(sizes) if len(sizes) <= 4 else f"{summary:#x}"
