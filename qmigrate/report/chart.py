"""Drawings over one axis of time: lanes of phases, and plots of numbers below them.

A drawing is as wide as its place: shapes are placed by shares of it and stretched, while all text is the page's own
and keeps its size.  So it can be read on a telephone as well.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from qmigrate.report.page import escaped
from qmigrate.report.units import duration

__all__ = ["Axis", "Band", "Series", "axis_row", "lane", "plot", "stacked"]

_WIDE: Final = 1000  # units of a drawing; stretched to its place
_HIGH: Final = 100
_TICKS: Final = 5
_SECOND: Final = 1_000_000
_STEPS_S: Final = (15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)


@dataclass(frozen=True)
class Axis:
    """From where to where, in microseconds; ``zero_us`` is where counting begins."""

    begin_us: int
    end_us: int
    zero_us: int = 0

    @property
    def length_us(self) -> int:
        return max(self.end_us - self.begin_us, 1)

    def share(self, at_us: float) -> float:
        """Where that is, from 0 to 1; what lies outside is at an end."""
        return min(max((at_us - self.begin_us) / self.length_us, 0.0), 1.0)

    def ticks(self) -> list[int]:
        """Round times, a few of them."""
        step = _step(self.length_us / _TICKS)
        first = -(-(self.begin_us - self.zero_us) // step) * step
        return list(range(first + self.zero_us, self.end_us + 1, step))


def _step(least: float) -> int:
    """The first round number of microseconds from there on."""
    for step_s in _STEPS_S:
        if 10 * _SECOND < least <= step_s * _SECOND:
            return step_s * _SECOND
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= least:
                return digit * scale
        scale *= 10


@dataclass(frozen=True)
class Band:
    """A part of a lane.  ``kind`` is its class in the style sheet; ``remark`` tells more on hovering."""

    begin_us: int
    end_us: int
    label: str
    kind: str
    remark: str = ""


@dataclass(frozen=True)
class Series:
    """Points (microseconds, value) to be drawn: a ``line``, an ``area``, or ``steps`` that hold until the next.

    None is a gap.
    """

    name: str
    kind: str
    points: Sequence[tuple[int, float | None]]
    shape: str = "line"
    told: str = ""

    @property
    def largest(self) -> float:
        return max((value for _, value in self.points if value is not None), default=0.0)


def percent(share: float) -> str:
    """For a style: ``12.345%``."""
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


# ---- lanes ----


def lane(name: str, bands: Iterable[Band], axis: Axis, *, slim: bool = False) -> str:
    """A row of bands behind its name."""
    drawn = "".join(
        _band(band, axis) for band in bands if band.end_us >= axis.begin_us and band.begin_us <= axis.end_us
    )
    return (
        f'<div class="row lane{" slim" if slim else ""}"><b>{escaped(name)}</b><div class="track">{drawn}</div></div>'
    )


def _band(band: Band, axis: Axis) -> str:
    left, right = axis.share(band.begin_us), axis.share(band.end_us)
    title = f"{band.label} · {duration(band.end_us - band.begin_us)}{band.remark}"
    return (
        f'<div class="band {escaped(band.kind)}" style="left:{percent(left)};width:{percent(right - left)}" '
        f'title="{escaped(title)}"><span>{escaped(band.label)}</span></div>'
    )


def axis_row(axis: Axis) -> str:
    """The times below the drawings."""
    labels = []
    ticks = axis.ticks()
    for at_us in ticks:
        share = axis.share(at_us)
        edge = " first" if share < 0.04 else " last" if share > 0.94 else ""
        said = duration(at_us - axis.zero_us) if at_us != axis.zero_us else "0"
        labels.append(f'<span class="tick{edge}" style="left:{percent(share)}">{escaped(said)}</span>')
    many = " many" if len(ticks) > 4 else ""  # every second is left out where there is little room
    return f'<div class="row times{many}"><b></b><div class="track">{"".join(labels)}</div></div>'


def stacked(rows: Iterable[str], axis: Axis, marks: Iterable[tuple[int, int, str]] = ()) -> str:
    """Drawings above each other, with marks (from, to, class) that go through them all."""
    drawn = "".join(
        f'<i class="mark {escaped(kind)}" style="left:{percent(axis.share(begin))};'
        f'width:{percent(axis.share(end) - axis.share(begin))}"></i>'
        for begin, end, kind in marks
    )
    return f'<div class="stack"><div class="marks" aria-hidden="true">{drawn}</div>{"".join(rows)}</div>'


# ---- plots ----


@dataclass(frozen=True)
class Scale:
    """The upright axis: its end, its lines, and how a value is written."""

    top: float
    lines: Sequence[float] = field(default=())
    spelled: Callable[[float], str] = str

    @classmethod
    def of(cls, largest: float, spelled: Callable[[float], str], *, binary: bool) -> "Scale":
        """Round numbers, in powers of two for lengths in bytes, so that at most four steps reach the largest."""
        step = 1.0
        if binary:
            while 4 * step < largest:
                step *= 2
        else:
            step = float(_step(max(largest / 4, 1)))
        count = max(int(-(-largest // step)), 1)
        return cls(step * count, [step * each for each in range(count + 1)], spelled)


def plot(
    title: str, series: Sequence[Series], axis: Axis, spelled: Callable[[float], str], *, binary: bool = True
) -> str:
    """A drawing of numbers, with its lines and their names.  Nothing where there are no numbers."""
    if not any(value is not None for each in series for _, value in each.points):
        return ""
    scale = Scale.of(max(each.largest for each in series), spelled, binary=binary)
    # Every second line is named where there are many.
    named = scale.lines[:: 2 if len(scale.lines) > 3 else 1]
    labels = "".join(
        f'<span class="value" style="bottom:{percent(each / scale.top)}">{escaped(spelled(each))}</span>'
        for each in named
    )
    rules = "".join(f'<i class="rule" style="bottom:{percent(each / scale.top)}"></i>' for each in scale.lines)
    shapes = "".join(_shape(each, axis, scale) for each in series)
    described = escaped(f"{title}: " + ", ".join(f"{each.name} {each.told}".strip() for each in series))
    return (
        f'<div class="row head"><b></b><h3>{escaped(title)}{_key(series)}</h3></div>'
        f'<div class="row plot"><div class="values">{labels}</div><div class="track">{rules}'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" preserveAspectRatio="none" role="img" aria-label="{described}">'
        f"{shapes}</svg></div></div>"
    )


def _key(series: Sequence[Series]) -> str:
    return "".join(
        f'<span class="key {escaped(each.kind)}"><i></i>{escaped(each.name)} <em>{escaped(each.told)}</em></span>'
        for each in series
    )


def _shape(series: Series, axis: Axis, scale: Scale) -> str:
    paths = []
    for run in _runs(series.points):
        points = _corners(run) if series.shape == "steps" else run
        places = [f"{_WIDE * axis.share(at_us):.2f},{_HIGH * (1 - value / scale.top):.2f}" for at_us, value in points]
        if series.shape == "area" and len(places) > 1:
            first, last = (f"{_WIDE * axis.share(at_us):.2f},{_HIGH}" for at_us in (points[0][0], points[-1][0]))
            paths.append(f'<path class="fill {escaped(series.kind)}" d="M{first}L{" ".join(places)} {last}Z"/>')
        if len(places) == 1:  # a point is a line that ends where it begins, with round ends
            places *= 2
        paths.append(f'<path class="line {escaped(series.kind)}" d="M{" ".join(places)}"/>')
    return "".join(paths)


def _runs(points: Sequence[tuple[int, float | None]]) -> list[list[tuple[int, float]]]:
    """The stretches without gaps."""
    runs: list[list[tuple[int, float]]] = [[]]
    for at_us, value in points:
        if value is not None:
            runs[-1].append((at_us, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _corners(run: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A value holds from its point to the next."""
    corners: list[tuple[int, float]] = []
    for at_us, value in run:
        if corners:
            corners.append((at_us, corners[-1][1]))
        corners.append((at_us, value))
    return corners
