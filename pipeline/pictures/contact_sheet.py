"""Draws a contact sheet: a page of pictures with captions.

pictures, captions ──add, one tile after the other──▶ Sheet ──save──▶ PNG
"""

import functools
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline import files

_GAP_PX = 14
_MARGIN_PX = 28
_TITLE_PX = 64
_LINE_PX = 14
_PAPER = "#ffffff"
_MAT = "#f0f1f3"
_INK = "#1c1f24"
_FAINT = "#7a808a"
# Unlike PIL's own font, this one has the letters of most alphabets.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


class Sheet:
    """A sheet of `count` tiles in rows of `columns`, with `note` below them.

    Each tile has a picture, a caption and `num_details` smaller lines.
    """

    def __init__(
        self,
        title: str,
        about: str,
        *,
        columns: int,
        count: int,
        num_details: int,
        tile_px: int = 150,
        note: str | None = None,
    ):
        self._columns = min(columns, count)
        self._tile_px = tile_px
        self._row_px = tile_px + 22 + _LINE_PX * num_details + 6
        text_width = self._columns * (tile_px + _GAP_PX) - _GAP_PX
        num_rows = -(-count // self._columns)
        height = _MARGIN_PX + _TITLE_PX + num_rows * self._row_px + _MARGIN_PX // 2
        note_top = height
        # The image has to be created at its full size, so the note is wrapped first.
        lines = _wrap(note or "", text_width)
        if lines:
            height += len(lines) * _LINE_PX + _MARGIN_PX
        width = text_width + 2 * _MARGIN_PX
        self._image = Image.new("RGB", (width, height), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        y = note_top
        for line in lines:
            self._draw.text((_MARGIN_PX, y), line, _FAINT, _font(10))
            y += _LINE_PX
        y = _MARGIN_PX - 6
        self._draw.text((_MARGIN_PX, y), title, _INK, _font(22))
        y = _MARGIN_PX + 26
        self._draw.text((_MARGIN_PX, y), about, _FAINT, _font(12))
        self._count = 0

    def add(self, picture: Image.Image | None, caption: str, *details: str) -> None:
        """Draws the next tile. None stands for a damaged picture."""
        size = self._tile_px
        small = _font(12)
        tiny = _font(10)
        row, column = divmod(self._count, self._columns)
        self._count += 1
        x = _MARGIN_PX + column * (size + _GAP_PX)
        y = _MARGIN_PX + _TITLE_PX + row * self._row_px
        right = x + size - 1
        bottom = y + size - 1
        self._draw.rectangle((x, y, right, bottom), _MAT)
        if picture is None:
            middle = x + size // 2, y + size // 2
            self._draw.text(middle, "damaged", _FAINT, small, anchor="mm")
        else:
            picture = ImageOps.contain(picture, (size, size))
            left = x + (size - picture.width) // 2
            top = y + (size - picture.height) // 2
            self._image.paste(picture, (left, top))
        y += size + 4
        self._draw.text((x, y), self._fit(caption, small), _INK, small)
        y += 16
        for text in details:
            self._draw.text((x, y), self._fit(text, tiny), _FAINT, tiny)
            y += _LINE_PX

    def end_row(self) -> None:
        """Leaves the rest of the row empty."""
        self._count += -self._count % self._columns

    def save(self, path: Path) -> None:
        """Writes a PNG. Raises InputError where that is not possible."""
        with files.output(path) as partial:
            self._image.save(partial, "PNG")

    def _fit(self, text: str, font: ImageFont.FreeTypeFont) -> str:
        """Returns the text, shortened to the width of a tile."""
        kept = len(text)
        short = text
        # Cut in the middle, because the ends of keys distinguish them.
        while kept and font.getlength(short) > self._tile_px:
            kept -= 1
            num_last = kept // 2
            num_first = kept - num_last
            short = f"{text[:num_first]}…{text[len(text) - num_last :]}"
        return short


def _wrap(text: str, width_px: int) -> list[str]:
    num_characters = int(width_px / _font(10).getlength("n"))
    lines = []
    for paragraph in text.splitlines():
        lines += textwrap.wrap(paragraph, num_characters)
    return lines


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_FONT, size)
