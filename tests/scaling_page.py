"""The tables of `launch/scaling.md`, made by the program: `python -m tests.scaling_page` writes them anew.

A pair of `<!-- scaling PART: ARGUMENTS -->` and `<!-- /scaling -->` encloses the command and what it prints: all of it
for the part `all`, for another the paragraph that begins with this word and the two after it.
"""

import io
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from common.files import write_text
from launch.scaling import main

PAGE = Path(__file__).parents[1] / "launch" / "scaling.md"
MARKER = re.compile(r"(<!-- scaling (\w+): ([^\n]*) -->\n)(?:(?!<!-- ).)*(<!-- /scaling -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with what the program prints between its marks; raises ValueError where one lacks its other half."""
    if len(re.findall("<!-- /?scaling", page)) != 2 * len(MARKER.findall(page)):
        raise ValueError("a scaling mark lacks its other half")
    return MARKER.sub(lambda found: f"{found[1]}{_block(found[2], found[3])}\n{found[4]}", page)


def _block(part: str, arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()):
        assert main(shlex.split(arguments)) == 0
    paragraphs = printed.getvalue().strip().split("\n\n")
    if part != "all":
        (start,) = (i for i, text in enumerate(paragraphs) if text.startswith(part))
        paragraphs = paragraphs[start : start + 3]
    return "\n\n".join([f"    python -m launch scaling {arguments}", *paragraphs])


if __name__ == "__main__":
    write_text(PAGE, filled(PAGE.read_text("utf-8")))
    print(PAGE)
