"""Names from a stream, made fit to print.

Whoever wrote the stream chose them: they may hold anything, a terminal's control sequences too.
"""

__all__ = ["clean"]


def clean(text: str) -> str:
    """``text`` with everything that can't be printed as ``\\xNN``, a byte each: control characters, bytes that
    are no UTF-8, and characters that are not seen or change how others are.

    Cleaning twice changes nothing more; what names usually are made of stays as QEMU spells it.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    handler = "surrogateescape" if "\udc80" <= char <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", handler))
