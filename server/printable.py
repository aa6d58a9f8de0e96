"""Text of clients, apps and other machines, made fit to be shown: it must not steer a terminal, a log or a table."""

_LONGEST = 2000


def printable(text: str, longest: int = _LONGEST) -> str:
    r"""Return text in which every character that is not printable is written as its escape, such as `\x1b`.

    These are control characters, which move a terminal's cursor, change its title or begin a new line of a log, and
    formats that reorder what is read. Text beyond the longest ends in an ellipsis.
    """
    cut = text if len(text) <= longest else f"{text[: longest - 1]}…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
