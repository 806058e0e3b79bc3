"""How text is laid out: in a terminal broken between words, and with colours; elsewhere as it is. Torch-free."""

from __future__ import annotations

import shutil
import sys
import textwrap

from rich.console import Console
from rich.text import Text

from alignctl.errors import AlignctlError

# Plain colours, without bold: with NO_COLOR nothing is left of them.
_COLOURS = {"error": "red", "hint": "cyan", "stopped": "yellow", "interrupted": "yellow"}
_WHOLE = {"break_on_hyphens": False, "break_long_words": False}  # words
_LEAST = 30  # characters that are left for the second of two columns


def say(console: Console, text: str, style: str = "", styled: int = 0) -> None:
    """Prints text. A word that is longer than one, as a path may be, is left whole, so that it can be copied.

    Args:
        style: Of the first `styled` characters.
    """
    lines = visible(text).splitlines() or [""]
    if console.is_terminal:
        parts = (textwrap.wrap(line, console.width, subsequent_indent="  ", **_WHOLE) or [""] for line in lines)
        lines = [line for part in parts for line in part]
    for number, line in enumerate(lines):
        shown = Text(line)
        if style and number == 0:
            shown.stylize(style, 0, styled)
        console.print(shown, soft_wrap=True)


def say_error(error: AlignctlError) -> None:
    """Prints an error with its hints to standard error."""
    console = Console(stderr=True, highlight=False)
    for line in str(error).splitlines():
        word = line.partition(":")[0]
        say(console, line, _COLOURS.get(word, ""), len(word) + 1)


def say_notice(text: str) -> None:
    """Prints what people should know to standard error, after the word `notice`."""
    say(Console(stderr=True, highlight=False), f"notice: {text}")


_SHOWN = {code: f"^{chr(code ^ 64)}" for code in (*range(32), 127) if chr(code) not in "\n\t"} | {
    code: f"\\x{code:02x}" for code in range(128, 160)
}


def visible(text: str) -> str:
    """Text that others wrote, for a terminal: what would move its cursor or speak to it is written out, as `^[`."""
    return text.translate(_SHOWN)


def columns() -> int | None:
    """Of the terminal that standard output is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def two_columns(first: str, second: str, width: int) -> str:
    """A name of `width` characters and what is said of it, which in a terminal goes on below itself."""
    line, wide = f"{first:<{width}}  {second}", columns()
    if wide is None or len(line) <= wide:
        return line
    if wide >= width + 2 + _LEAST:
        return textwrap.fill(line, wide, subsequent_indent=" " * (width + 2), **_WHOLE)
    below = textwrap.wrap(second, max(wide, _LEAST), initial_indent="  ", subsequent_indent="  ", **_WHOLE)
    return "\n".join([first, *below])
