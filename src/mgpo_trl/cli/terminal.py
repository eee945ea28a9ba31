"""Text and pictures in a terminal: pictures only where the terminal says that it can, control characters never."""

import base64
import io
import os
from collections.abc import Mapping
from typing import TextIO

from PIL import Image

KITTY_CHUNK = 4096
"""Most characters of one escape sequence of the kitty protocol."""
ITERM2_PROGRAMS = ("iTerm.app", "WezTerm")
KITTY_PROGRAMS = ("ghostty",)


def printable(text: str) -> str:
    """What a model wrote, without control characters: a terminal would obey them."""
    return "".join(one if one in "\n\t" or one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def picture_protocol(environment: Mapping[str, str]) -> str | None:
    """
    Which protocol for pictures the terminal speaks, by its environment variables.

    Returns:
        `str`: `"iterm2"` or `"kitty"`; `None` where neither is sure, as inside tmux or screen, which pass none on.
    """
    term = environment.get("TERM", "")
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        return None
    program = environment.get("TERM_PROGRAM")
    if environment.get("KITTY_WINDOW_ID") or term == "xterm-kitty" or program in KITTY_PROGRAMS:
        return "kitty"
    return "iterm2" if program in ITERM2_PROGRAMS or environment.get("LC_TERMINAL") == "iTerm2" else None


def show_inline(picture: Image.Image, stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Show a picture where a stream leads to a terminal that can; returns whether it did. A pipe gets nothing."""
    protocol = picture_protocol(environment) if stream.isatty() else None
    if protocol is None:
        return False
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    stream.write({"iterm2": iterm2_sequence, "kitty": kitty_sequence}[protocol](buffer.getvalue()) + "\n")
    stream.flush()
    return True


def iterm2_sequence(png: bytes) -> str:
    """The escape sequence of iTerm2 for an inline file."""
    data = base64.b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};preserveAspectRatio=1:{data}\a"


def kitty_sequence(png: bytes) -> str:
    """The escape sequences of the kitty graphics protocol: the file in chunks, `m=0` on the last."""
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + KITTY_CHUNK] for start in range(0, len(data), KITTY_CHUNK)]
    keys = ["a=T,f=100,", *[""] * (len(chunks) - 1)]
    return "".join(
        f"\x1b_G{key}m={int(number < len(chunks))};{chunk}\x1b\\"
        for number, (key, chunk) in enumerate(zip(keys, chunks, strict=True), start=1)
    )
