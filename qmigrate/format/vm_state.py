"""Device state as values: named, typed fields, in the order of their bytes.

migration/vmstate.c
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from qmigrate.format._record import Record
from qmigrate.format.vmdesc import FieldDescription

__all__ = ["Field", "Subsection", "Value", "VmState", "as_tuple"]

Value: TypeAlias = "int | bool | bytes | None | Record | VmState | tuple[Value, ...]"


@dataclass(frozen=True, slots=True, repr=False)
class Field:
    """One entry of the description with its value: a tuple where the entry is an array, list or tree.

    ``offset`` is in the stream, ``length`` in bytes.  ``opaque`` says why the value is plain bytes.
    """

    description: FieldDescription
    offset: int
    length: int
    value: Value
    opaque: str | None = None

    @property
    def name(self) -> str:
        """As the description spells it."""
        return self.description.name

    @property
    def type(self) -> str:
        """The name of QEMU's encoder."""
        return self.description.type

    def __repr__(self) -> str:
        return f"<Field {self.name} {self.type} at {self.offset:#x}: {self.value!r}>"


@dataclass(frozen=True, slots=True, repr=False)
class VmState:
    """The fields of one vmsd, in the order of their bytes, then its subsections."""

    vmsd_name: str
    fields: tuple[Field, ...]
    subsections: tuple["Subsection", ...] = ()

    def __repr__(self) -> str:
        return f"<VmState {self.vmsd_name}: {len(self.fields)} fields, {len(self.subsections)} subsections>"

    def leaves(self) -> Iterator[Field]:
        """Each field that is no struct, at any depth."""
        for field in self.fields:
            structs = [element for element in as_tuple(field.value) if isinstance(element, VmState)]
            if structs:
                for inner in structs:
                    yield from inner.leaves()
            else:
                yield field
        for subsection in self.subsections:
            yield from subsection.state.leaves()


@dataclass(frozen=True, slots=True)
class Subsection:
    """An optional piece of a vmsd; ``version`` is the one on the wire."""

    name: str
    version: int
    offset: int
    state: VmState


def as_tuple(value: Value) -> tuple[Value, ...]:
    """The elements of an array; of anything else it alone."""
    return value if isinstance(value, tuple) else (value,)
