"""What came in to a stand-in destination, as a person reads it."""

from collections.abc import Iterator, Mapping
from typing import Final

from qmigrate.analysis.latency import Bucket
from qmigrate.analysis.reception import WAITED, Reception, Waited
from qmigrate.report.names import clean
from qmigrate.report.paper import DIM, Paper, text
from qmigrate.report.units import count, duration, plural, share, size

__all__ = ["WAITED_WORDS", "middle", "progress_words", "write_reception"]

WAITED_WORDS: Final = {
    "touchers": "From touch to read, by touchers",
    "package": "From touch to read, in the package",
    "requests": "From request to placed",
    "preempt": "From request to placed, on the preempt channel",
}
_BAR: Final = 40  # columns
_INDENT: Final = 2


def write_reception(found: Reception, paper: Paper) -> None:
    """How it ended, the numbers, the phases, and how long pages took."""
    paper.line(clean(found.result.message))
    rows = [("received", _received(found)), ("pages", _pages(found.result.numbers))]
    if found.result.is_postcopy:
        rows += [("postcopy", _postcopy(found.result.numbers)), ("touches", _touches(found.result.numbers))]
    if found.phases:
        rows.append(("phases", ", ".join(f"{each.status} {_at(each.begin_us)}" for each in found.phases)))
    paper.facts(rows, indent=_INDENT)
    for where in WAITED:
        if where in found.waited:
            _histogram(WAITED_WORDS[where], found.waited[where], paper)


def progress_words(numbers: Mapping[str, int]) -> str:
    """How far it has come, in a line."""
    parts = [size(numbers.get("received_bytes", 0)), _pages(numbers)]
    if numbers.get("faults"):
        parts.append(f"{count(numbers.get('requested', 0))} requested")
    return ", ".join(parts)


def middle(waited: Waited) -> str:
    """``half took less than 256 µs, 99 of 100 less than 1.02 ms, the longest 983 µs``."""
    half, most = waited.latency.percentile(0.5), waited.latency.percentile(0.99)
    if half is None or most is None:
        return ""
    return f"half took {_below(half)}, 99 of 100 {_below(most)}, the longest {duration(waited.longest_us)}"


def _received(found: Reception) -> str:
    said = size(found.received_bytes)
    if found.bytes_per_s is not None:
        said += f" in {duration(found.receiving_us)}, {size(int(found.bytes_per_s))}/s"
    return said


def _pages(numbers: Mapping[str, int]) -> str:
    return f"{plural(numbers.get('normal', 0), 'page')}, {plural(numbers.get('zero', 0), 'zero page')}"


def _postcopy(numbers: Mapping[str, int]) -> str:
    said = (
        f"{count(numbers.get('discarded', 0))} discarded, {count(numbers.get('requested', 0))} requested, "
        f"{count(numbers.get('duplicates', 0))} that were there already"
    )
    preempt = numbers.get("preempt", 0)
    return said + (f", {count(preempt)} on the preempt channel" if preempt else "")


def _touches(numbers: Mapping[str, int]) -> str:
    return f"{count(numbers.get('touches', 0))}, {count(numbers.get('writes', 0))} of them writes"


def _at(at_us: int) -> str:
    return f"at {duration(at_us)}" if at_us else "at 0"


def _histogram(title: str, waited: Waited, paper: Paper) -> None:
    paper.heading(title, (f"{plural(waited.latency.count, 'page')}, {middle(waited)}", DIM))
    largest = max(bucket.count for bucket in waited.latency.buckets)
    for bucket in _filled(waited):
        number, part = count(bucket.count), share(bucket.count, waited.latency.count)
        bar = "█" * -(-bucket.count * _BAR // largest)
        paper.line(text(f"  {_below(bucket):<20} {number:>9} {part:>6}  {bar}"))


def _filled(waited: Waited) -> Iterator[Bucket]:
    """From the first bucket that holds anything to the last."""
    buckets = waited.latency.buckets
    filled = [index for index, each in enumerate(buckets) if each.count]
    yield from buckets[filled[0] : filled[-1] + 1] if filled else ()


def _below(bucket: Bucket) -> str:
    return f"{duration(bucket.begin_us)} or more" if bucket.end_us is None else f"less than {duration(bucket.end_us)}"
