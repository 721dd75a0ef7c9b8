"""What ``check`` and ``extract`` found and did."""

from qmigrate.analysis.check import Checked
from qmigrate.analysis.extract import Extracted
from qmigrate.report.names import clean
from qmigrate.report.paper import BAD, DIM, GOOD, HEAD, ODD, Paper, text
from qmigrate.report.units import plural, size

__all__ = ["write_check", "write_extract"]


def write_check(checked: Checked, name: str, paper: Paper) -> None:
    """The verdict in a line; where it is no, why; then how many bytes were taken over as they are."""
    contents = checked.gathering.contents
    valid = ("valid", GOOD) if checked.valid else ("not valid", BAD)
    same = ("identical when rebuilt", GOOD) if checked.identical else ("not identical when rebuilt", BAD)
    paper.line(text(valid, ", ", same), lead=text((clean(name), HEAD), "  "))
    for error in contents.errors:
        paper.line(clean(str(error)), lead="  ")
    if contents.trailing:
        paper.line(f"{plural(contents.trailing, 'byte')} behind the end of the stream", lead="  ")
    for difference in checked.differences:
        found, rebuilt = difference.found.hex() or "nothing", difference.rebuilt.hex() or "nothing"
        paper.line(f"{difference.record}: found {found}, rebuilt {rebuilt}", lead=f"  {difference.offset:#x}: ")
    paper.line()
    rebuilt_length = checked.length - sum(checked.opaque.values())
    rows = [("rebuilt from values", rebuilt_length), *checked.opaque.items(), ("in all", checked.length)]
    numbers = [f"{length:,}" for _, length in rows]
    widest = max(map(len, numbers))
    for (what, _), number in zip(rows, numbers, strict=True):
        paper.line(text((_remark(what, checked), DIM)), lead=f"  {what:<22}  {number:>{widest}}  ")
    if checked.undecoded:
        paper.line()
        paper.line(text((f"{plural(checked.undecoded, 'device section')} not decoded", ODD)))


def _remark(what: str, checked: Checked) -> str:
    if what == "fields of unknown type":
        return ", ".join(f"{clean(name)} {length:,}" for name, length in checked.opaque_types.items())
    return "bytes" if what == "in all" else ""


def write_extract(extracted: Extracted, paper: Paper) -> None:
    """Each block with its file."""
    if not extracted.files:
        return
    blocks = extracted.gathering.contents.blocks
    paper.line(
        f"{plural(len(extracted.files), 'file')} and blocks.json",
        lead=text((clean(str(extracted.directory)), HEAD), "  "),
    )
    paper.table(
        ["block", "file", "size", "data"],
        [
            [clean(name), clean(file), size(blocks[name].length), size(extracted.bytes_written.get(name, 0))]
            for name, file in extracted.files.items()
        ],
        left=2,
    )
