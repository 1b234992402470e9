"""Strings from other people's files, where they are printed, put into a command line, or written into a file."""


def printable(text: object, lines: bool = False) -> str:
    """A text as it may be printed: what moves a cursor, hides or reorders text, or no encoding has is escaped.

    Args:
        text: anything that has a str.
        lines: whether line ends may stay, as in a message of several lines.
    """
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in str(text))


def check_printable(name: str, text: str) -> None:
    """Raise ValueError, naming the field, if a text has characters that would change the file it is written into."""
    if not text.isprintable():
        raise ValueError(
            f"{name}={text[:200]!r} has characters that cannot be printed, such as line ends; they would become part "
            "of files and commands for other programs. Give another name."
        )
