"""A page of pictures with captions, for people to look at."""

import functools
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.errors import InputError

_GAP_PX, _MARGIN_PX, _TITLE_PX, _LINE_PX = 14, 28, 64, 14
_PAPER, _MAT, _INK, _FAINT = "#ffffff", "#f0f1f3", "#1c1f24", "#7a808a"
# Unlike PIL's own font it has the letters of most alphabets.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


class Sheet:
    """`count` tiles in rows of `columns`, each a picture, a caption and `num_details` smaller lines; `note` below."""

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
        self._columns, self._tile_px = min(columns, count), tile_px
        self._row_px = tile_px + 22 + _LINE_PX * num_details + 6
        width = 2 * _MARGIN_PX + self._columns * (tile_px + _GAP_PX) - _GAP_PX
        height = _MARGIN_PX + _TITLE_PX + -(-count // self._columns) * self._row_px + _MARGIN_PX // 2
        characters = int((width - 2 * _MARGIN_PX) / _font(10).getlength("n"))
        lines = [line for part in (note or "").splitlines() for line in textwrap.wrap(part, characters)]
        note_px = len(lines) * _LINE_PX + (_MARGIN_PX if lines else 0)
        self._image = Image.new("RGB", (width, height + note_px), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        for number, line in enumerate(lines):
            self._draw.text((_MARGIN_PX, height + _LINE_PX * number), line, _FAINT, _font(10))
        self._draw.text((_MARGIN_PX, _MARGIN_PX - 6), title, _INK, _font(22))
        self._draw.text((_MARGIN_PX, _MARGIN_PX + 26), about, _FAINT, _font(12))
        self._count = 0

    def add(self, picture: Image.Image | None, caption: str, *details: str) -> None:
        """The next tile. None stands for a picture that cannot be had."""
        size, small, tiny = self._tile_px, _font(12), _font(10)
        x = _MARGIN_PX + self._count % self._columns * (size + _GAP_PX)
        y = _MARGIN_PX + _TITLE_PX + self._count // self._columns * self._row_px
        self._count += 1
        self._draw.rectangle((x, y, x + size - 1, y + size - 1), _MAT)
        if picture is None:
            self._draw.text((x + size // 2, y + size // 2), "damaged", _FAINT, small, anchor="mm")
        else:
            picture = ImageOps.contain(picture, (size, size))
            self._image.paste(picture, (x + (size - picture.width) // 2, y + (size - picture.height) // 2))
        self._draw.text((x, y + size + 4), self._fit(caption, small), _INK, small)
        for line, text in enumerate(details):
            self._draw.text((x, y + size + 20 + _LINE_PX * line), self._fit(text, tiny), _FAINT, tiny)

    def end_row(self) -> None:
        """Leave the rest of the row empty."""
        self._count += -self._count % self._columns

    def save(self, path: Path) -> None:
        """Write a PNG. Raises InputError where that is not possible."""
        try:
            self._image.save(path, "PNG")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}; name another file with --out") from error

    def _fit(self, text: str, font: ImageFont.FreeTypeFont) -> str:
        """The text, cut in the middle to the width of a tile: the ends of keys tell them apart."""
        kept, short = len(text), text
        while kept and font.getlength(short) > self._tile_px:
            kept -= 1
            short = f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
        return short


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_FONT, size)
