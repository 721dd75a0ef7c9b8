"""Fields cut out of recorded streams; ``data/README.md`` says how each was made."""

import gzip
from pathlib import Path

_DATA = Path(__file__).parent / "data"


def recorded(name: str) -> bytes:
    """The bytes of one field."""
    return gzip.decompress((_DATA / f"{name}.gz").read_bytes())
