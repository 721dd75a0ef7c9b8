"""How long requested pages took, on the page: QEMU's own distribution, a bar for each of its buckets."""

from collections.abc import Sequence
from typing import Final

from qmigrate.analysis.latency import Bucket, Latency
from qmigrate.report.chart import percent
from qmigrate.report.page import escaped, facts, section
from qmigrate.report.units import count, duration, plural, share

__all__ = ["histogram", "latency_section"]

_MOST_ROWS: Final = 4


def latency_section(latency: Latency, *, what: str = "by how long the guest waited for the page") -> str:
    """Nothing where nobody measured.  ``what`` says of each request what was measured."""
    if not latency.known:
        return ""
    rows = []
    if latency.blocktime_ms is not None:
        rows.append(("All CPUs waited at once", f"{count(latency.blocktime_ms)} ms"))
    rows += _each_cpu(latency.vcpu_blocktime_ms)
    if latency.mean_ns is not None and latency.count:
        mean = duration(latency.mean_ns / 1000)
        doubt = "" if latency.mean_fits else ", says QEMU, which its own distribution contradicts"
        rows.append(("Mean of a request", f"{mean}{doubt}"))
    if latency.count:
        lead = f"{plural(latency.count, 'request')}, {what}. {_middle(latency)}"
    elif latency.buckets:
        lead = "The guest waited for no page."
    else:
        lead = "How long the guest waited for pages; how long single requests took, this QEMU does not tell."
    return section("Waiting for pages", histogram(latency), facts(rows), lead=lead)


def _each_cpu(waited_ms: Sequence[int]) -> list[tuple[str, str]]:
    """A row each; of many, all in one."""
    if len(waited_ms) > _MOST_ROWS:
        return [(f"CPUs 0 to {len(waited_ms) - 1} waited", " · ".join(map(count, waited_ms)) + " ms")]
    return [(f"CPU {index} waited", f"{count(each)} ms") for index, each in enumerate(waited_ms)]


def _middle(latency: Latency) -> str:
    half, most = latency.percentile(0.5), latency.percentile(0.99)
    if half is None or most is None:
        return ""
    return f"Half of them took {_below(half)}, 99 of 100 {_below(most)}."


def _below(bucket: Bucket) -> str:
    return (
        f"less than {duration(bucket.end_us)}" if bucket.end_us is not None else f"{duration(bucket.begin_us)} or more"
    )


def histogram(latency: Latency) -> str:
    """From the first bucket that holds anything to the last; empty ones between them, too."""
    buckets = _filled(latency.buckets)
    if not buckets:
        return ""
    largest = max(each.count for each in buckets)
    bars = "".join(
        f'<div class="bar"><span>{escaped(_name(each))}</span>'
        f'<div><i style="width:{percent(each.count / largest)}"></i></div>'
        f"<b>{count(each.count)}</b><em>{share(each.count, latency.count)}</em></div>"
        for each in buckets
    )
    return f'<div class="histogram" role="group" aria-label="requests by latency">{bars}</div>'


def _filled(buckets: Sequence[Bucket]) -> Sequence[Bucket]:
    filled = [index for index, each in enumerate(buckets) if each.count]
    return buckets[filled[0] : filled[-1] + 1] if filled else ()


def _name(bucket: Bucket) -> str:
    """``128 – 256 µs``; of the last, which has no limit, ``8.39 s or more``."""
    if bucket.end_us is None:
        return f"{duration(bucket.begin_us)} or more"
    begin, end = duration(bucket.begin_us), duration(bucket.end_us)
    number, _, unit = begin.partition(" ")
    return f"{number} – {end}" if end.endswith(unit) and bucket.begin_us else f"{begin} – {end}"
