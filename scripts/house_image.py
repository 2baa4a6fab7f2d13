"""Draws the rooms of the package as a house: docs/house.svg, from the layers of scripts/rooms.py.

python scripts/house_image.py
"""

import ast
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

import rooms

ROOT = Path(__file__).parent.parent
# Narrow, so that the text is legible on a phone.
WIDTH, MARGIN, GAP = 400, 8, 6
ROOF, LINE, PADDING = 74, 15, 8
# Boxes have their own background and text colour, so that the picture works on light and dark pages.
INK, ROOF_FILL, STROKE = "#16202c", "#f0c9a8", "#7c8aa0"
FILLS = {"commands": "#f6dcc3", "middle": "#d5e3f3", "ground": "#d9e4d2"}
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def purpose(room: str) -> str:
    """First line of a room's docstring, without its full stop."""
    file = ROOT / rooms.PACKAGE / f"{room}.py"
    file = file if file.exists() else ROOT / rooms.PACKAGE / room / "__init__.py"
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return said.partition("\n")[0].rstrip(".").replace("``", "")


def inner_rooms(room: str) -> list[str]:
    """Folders of a room."""
    folder = ROOT / rooms.PACKAGE / room
    return sorted(file.parent.name for file in folder.glob("*/__init__.py"))


def text(
    x: float, y: float, words: str, size: float, *, font: str = SANS, bold: bool = False, middle: bool = False
) -> str:
    """One line of text."""
    style = f'font-family="{font}" font-size="{size}"' + (' font-weight="600"' if bold else "")
    anchor = ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:g}" y="{y:g}" {style} fill="{INK}"{anchor}>{escape(words)}</text>'


def box(y: float, height: float, fill: str) -> str:
    """The walls of a layer."""
    width = WIDTH - 2 * MARGIN
    return f'<rect x="{MARGIN}" y="{y:g}" width="{width}" height="{height:g}" rx="5" fill="{fill}" stroke="{STROKE}"/>'


def storey(y: float, layer: tuple[str, ...], fill: str) -> tuple[list[str], float]:
    """A layer as shapes, and its height: name, purpose and inner rooms of each of its rooms."""
    shapes, line = [], y + PADDING
    for room in layer:
        line += LINE
        shapes.append(text(MARGIN + 10, line - 3, room, 13, font=MONO, bold=True))
        if inner := ", ".join(inner_rooms(room)):
            wrapped = textwrap.wrap(inner, (WIDTH - 60 - 8 * len(room)) // 6)
            for extra, words in enumerate(wrapped):
                line += LINE if extra else 0
                shapes.append(text(MARGIN + 22 + 8 * len(room), line - 3, words, 10.5, font=MONO))
        for words in textwrap.wrap(purpose(room), 58):
            line += LINE - 1
            shapes.append(text(MARGIN + 10, line - 3, words, 11.5))
        line += 3
    height = line - y + PADDING - 4
    return [box(y, height, fill), *shapes], height


def draw() -> str:
    """The picture as SVG."""
    layers = list(reversed(rooms.LAYERS))
    shapes: list[str] = []
    y = ROOF + GAP
    for number, layer in enumerate(layers):
        kind = "commands" if number == 0 else "ground" if number == len(layers) - 1 else "middle"
        drawn, height = storey(y, layer, FILLS[kind])
        shapes += drawn
        y += height + GAP
    roof = (
        f'<path d="M{MARGIN},{ROOF} L{WIDTH / 2:g},4 L{WIDTH - MARGIN},{ROOF} Z" fill="{ROOF_FILL}" stroke="{STROKE}"/>'
    )
    above = [
        roof,
        text(WIDTH / 2, 44, "configs", 11.5, font=MONO, middle=True),
        text(WIDTH / 2, 62, "train.py   eval.py", 12.5, font=MONO, bold=True, middle=True),
    ]
    says = "The rooms of magma_jax, one layer above another. A layer imports those below it, never those above."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" role="img" aria-labelledby="t">',
            f'<title id="t">{says}</title>',
            *above,
            *shapes,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Writes the picture."""
    (ROOT / "docs/house.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
