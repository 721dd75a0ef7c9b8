"""Numbers as people read them."""

from typing import Final

__all__ = ["count", "duration", "plural", "share", "size"]

_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size(length: int) -> str:
    """A length in bytes with its binary unit, to one decimal where it is not whole: ``32 MiB``, ``1.4 MiB``."""
    unit = min(max(length.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    scale = 1 << 10 * unit
    if not length % scale:
        return f"{length // scale:,} {'byte' if length == 1 else _UNITS[unit]}"
    if length / scale >= 1023.95 and unit < len(_UNITS) - 1:  # would be rounded to 1,024.0
        unit, scale = unit + 1, scale << 10
    return f"{length / scale:,.1f} {_UNITS[unit]}"


def count(number: int) -> str:
    """With its thousands apart: ``8,192``."""
    return f"{number:,}"


def plural(number: int, noun: str, nouns: str = "") -> str:
    """``1 page``, ``8,192 pages``."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def share(part: int, whole: int) -> str:
    """In percent; 0 % and 100 % are said only where they are exact."""
    if not whole:
        return "-"
    percent = round(100 * part / whole)
    if 0 < part < whole:
        percent = min(max(percent, 1), 99)
    return f"{percent} %"


def duration(microseconds: float) -> str:
    """A time in three digits: ``850 µs``, ``12.3 ms``, ``2.12 s``, ``3 min 5 s``, ``2 h 5 min``, ``15 min``."""
    if microseconds < 0:
        return f"-{duration(-microseconds)}"
    for unit, scale in (("µs", 1), ("ms", 1_000), ("s", 1_000_000)):
        number = float(f"{microseconds / scale:.3g}")
        if number < (60 if unit == "s" else 1_000):
            return f"{number:g} {unit}"
    seconds = round(microseconds / 1e6)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s".removesuffix(" 0 s")
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min".removesuffix(" 0 min")
