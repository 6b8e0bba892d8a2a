"""One encoded image: what its header says, whether it decodes, and the same made smaller.

    bytes ──header──▶ format and size, nothing decoded
    bytes ──check───▶ the same, once all of it has been decoded
    bytes ──decode──▶ pixels
    bytes ──decode_map──▶ the classes of pixels
    bytes ──prepare─▶ bytes to pack: the same, or a JPEG no larger than wanted; prepare_map: its map likewise

Pixels are counted before anything is decoded. EXIF orientation and colour profiles are ignored, as torchvision and
timm ignore them. Formats beyond those named here are never tried, because PIL hands some of them to other programs.
"""

import contextlib
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.shards.image_header import damage, excess, read_size
from pipeline.shards.index import MAX_BYTES, MAX_PIXELS

MAX_SIDE_PX = 65535  # what an index record holds
QUALITY = 90
MAX_SCALED_BYTES, MAX_SCALED_PIXELS = 1 << 30, 1 << 29
"""Of an image that packing scales down; the pixels are those of JPEGs alone, which can be decoded at a part of their
size: 3 GB for a progressive one."""
IGNORED = 255
"""In a label map: a pixel that does not count."""

_PACKED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}  # MPO: a JPEG with more pictures behind it, as phones write
_TRIED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_DEPTH = 24  # where a PNG says how many bits its values have
_BOMB = f"more than {MAX_PIXELS:,} pixels: taken for a decompression bomb; scale it down"


class BadImageError(ValueError):
    """These bytes cannot be used as an image. The message says why, and the way out where there is one."""


class Header(NamedTuple):
    extension: str
    """jpg or png."""
    height: int
    width: int
    """In pixels, as stored."""


def header(data: bytes) -> Header:
    """What the first bytes of a JPEG or PNG say. Raises BadImageError."""
    with _opened(data) as image:
        return _header(image, data)


def check(data: bytes) -> Header:
    """What `header` returns, once all of the image has been decoded. Raises BadImageError also for what is damaged and
    what would be fed with other values than Pillow's."""
    with _opened(data) as image:
        head = _header(image, data)
        _load(image, data)
        return head


def size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels of an image of any format that packing takes. Raises BadImageError."""
    if found := read_size(data):
        return found
    with _opened(data) as image:
        return image.height, image.width


def decode(data: bytes) -> Image.Image:
    """A JPEG or PNG as RGB. Raises BadImageError."""
    with _opened(data) as image:
        _header(image, data)
        return _load(image, data).convert("RGB")


def decode_map(data: bytes) -> npt.NDArray[np.uint8]:
    """The values of a label map, [height, width], palette indices as they are. Raises BadImageError."""
    with _opened(data) as image:
        _header(image, data)
        depth = data[_DEPTH] if image.format == "PNG" else 8
        # PIL spreads grey values of fewer bits over 0 … 255, and has another mode for more.
        if image.format != "PNG" or image.mode not in ("L", "P") or (image.mode == "L" and depth != 8):
            raise BadImageError(
                f"a label map is a PNG of 8-bit grey values or palette indices, not a {image.format} "
                f"of {depth} bits in PIL's mode {image.mode}"
            )
        return np.array(image)


def prepare(
    data: bytes, max_side: int | None = None, quality: int | None = None, bits_stored: int | None = None
) -> tuple[bytes, Header]:
    """What to pack of an image, once it has been decoded: what does not decode today would stop a run tomorrow.

    JPEG and PNG stay as they are unless a side is longer than `max_side` pixels; then the image is scaled down and
    becomes a JPEG of `quality`. Other formats, and kinds that DALI does not decode as Pillow does, become JPEGs where
    either argument is given. With `bits_stored` 16-bit values are scaled from 0 … 2^bits_stored - 1 to 8 bits, and
    PNGs of them stay PNGs. Raises BadImageError.
    """
    convert = max_side is not None or quality is not None
    with _opened(data, max_side) as image:
        too_long = max_side is not None and max(image.size) > max_side
        if too_long or (convert and not _is_plain(image, data)):
            return _jpeg(image, data, max_side or MAX_SIDE_PX, quality or QUALITY, bits_stored)
        _check_bytes(data, MAX_BYTES)
        head = _header(image, data, way_out="pack with --quality to convert it")
        shown = _load(image, data, bits_stored)
        if shown is image or bits_stored is None:
            return data, head
        return _encoded(shown, "PNG"), head


def prepare_map(data: bytes, image: bytes, packed: Header, num_classes: int) -> bytes:
    """What to pack of the label map of `image`, which `prepare` has made `packed`.

    The map is checked, and takes the size of the packed image, each pixel its nearest neighbour's value. Raises
    BadImageError.
    """
    labels = decode_map(data)
    height, width = size(image)
    if labels.shape != (height, width):
        raise BadImageError(
            f"{labels.shape[1]} × {labels.shape[0]} pixels, but its image has {width} × {height}: they must be equal"
        )
    if wrong := wrong_labels(labels, num_classes):
        raise BadImageError(wrong)
    if labels.shape == (packed.height, packed.width):
        return data
    small = Image.fromarray(labels).resize((packed.width, packed.height), Image.Resampling.NEAREST)
    return _encoded(small, "PNG")


def wrong_labels(labels: npt.NDArray[np.uint8], num_classes: int) -> str | None:
    """What is wrong with the values of a label map, [height, width]."""
    wrong = (labels > num_classes) & (labels != IGNORED)
    if not wrong.any():
        return None
    y, x = np.argwhere(wrong)[0].tolist()
    return (
        f"the value {labels[y, x]} at x {x}, y {y}; a pixel's value is 0, no label; 1 … {num_classes}, a class; "
        f"or {IGNORED}, to be ignored"
    )


@contextlib.contextmanager
def _opened(data: bytes, max_side: int | None = None) -> Iterator[ImageFile]:
    """PIL's image before decoding, which is scaled to `max_side` then. Whatever is raised for it, inside the block as
    well, is a BadImageError."""
    if not data:
        raise BadImageError("empty")
    _check_bytes(data, MAX_SCALED_BYTES if max_side else MAX_BYTES)
    if reason := excess(data):
        raise BadImageError(f"{reason}, as no encoder writes: taken for a decompression bomb")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and PIL's own limit on pixels, which is lower than ours
            with _open(data, max_side) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(_BOMB)
                yield image
    except BadImageError:
        raise
    except Image.DecompressionBombError:
        raise BadImageError(_BOMB) from None
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except Exception as error:  # damaged bytes make decoders raise almost anything
        raise BadImageError(f"not a readable image: {error}") from error


def _check_bytes(data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise BadImageError(f"more than {limit:,} bytes")


def _open(data: bytes, max_side: int | None) -> ImageFile:
    """PIL's image. A JPEG of too many pixels to be decoded whole takes the size of the part that scaling it needs."""
    height, width = read_size(data) or (0, 0)
    is_large_jpeg = data.startswith(b"\xff\xd8") and MAX_PIXELS < height * width <= MAX_SCALED_PIXELS
    if max_side is None or not is_large_jpeg:
        return Image.open(BytesIO(data), formats=_TRIED)
    image = JpegImageFile(BytesIO(data))  # Image.open has a limit of its own
    longest = max(height, width)
    side = max(max_side, min(3 * max_side, longest // 2))  # three times the result is enough for a good filter
    image.draft(None, (max(1, width * side // longest), max(1, height * side // longest)))
    return image


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether DALI decodes it as PIL does. PIL reads more: it forgives what DALI cannot follow."""
    return image.format in _PACKED and read_size(data) == (image.height, image.width)


def _header(image: Image.Image, data: bytes, way_out: str = "convert it, as pack --quality does") -> Header:
    if image.format not in _PACKED:
        raise BadImageError(f"holds {image.format}, not JPEG or PNG: {way_out}")
    if not _is_plain(image, data):
        kind = "not laid out as the format wants"
        if image.mode == "CMYK":
            kind = "in CMYK without Adobe's marker"
        elif image.format == "JPEG":
            kind += ", or lossless"
        raise BadImageError(f"a {image.format} that is {kind}: {way_out}")
    if max(image.size) > MAX_SIDE_PX:
        raise BadImageError(f"{image.width} × {image.height} pixels; no side may exceed {MAX_SIDE_PX}: scale it down")
    return Header(_PACKED[image.format], image.height, image.width)


def _load(image: ImageFile, data: bytes, bits_stored: int | None = None) -> Image.Image:
    """All of an image decoded: itself, or an image of 8 bits a value where it has 16. Raises BadImageError."""
    _refuse_damaged(data)
    if (values := _deep_values(image, data)) is not None:
        return Image.fromarray(_scaled(values, bits_stored))
    if image.mode in ("I", "F"):
        raise BadImageError(f"32 bits a pixel (PIL's mode {image.mode}), whose range nobody knows: convert it")
    if image.format == "TIFF" and ";16" in str(image.tile):
        raise BadImageError("a TIFF with 16 bits a colour, of which PIL reads the upper half: convert it to PNG")
    image.load()
    return image


def _refuse_damaged(data: bytes) -> None:
    if reason := damage(data):
        raise BadImageError(f"damaged: {reason}")


def _deep_values(image: ImageFile, data: bytes) -> npt.NDArray[np.integer] | None:
    """The values of an image of 16 bits a value, [height, width] or [height, width, 3]. None for other images."""
    if image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.format != "PNG" or data[_DEPTH] != 16:
        return None
    # PIL reads the upper half of colours' values. This takes seconds to import, and such images are rare.
    import torch
    from torchvision.io import ImageReadMode, decode_png

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_png(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _scaled(values: npt.NDArray[np.integer], bits_stored: int | None) -> npt.NDArray[np.uint8]:
    """From 16 bits, of which `bits_stored` are used, to 8. Raises BadImageError where that cannot be right."""
    top = int(values.max())
    if bits_stored is None and 0 < top < 1 << 15:
        bits = max(top.bit_length(), 8)
        raise BadImageError(
            f"its 16-bit values end at {top:,}, so it would be fed dark: pack with --bits-stored {bits} if {bits} bits "
            "are all that its source has, or 16 if it is dark"
        )
    limit = 2 ** (bits_stored or 16) - 1
    if top > limit:
        raise BadImageError(f"a 16-bit value of {top:,}: --bits-stored {bits_stored} says that they end at {limit:,}")
    scale = np.rint(np.arange(limit + 1) * 255 / limit)
    return scale.astype(np.uint8)[values]


def _jpeg(image: ImageFile, data: bytes, max_side: int, quality: int, bits_stored: int | None) -> tuple[bytes, Header]:
    if image.format == "JPEG":
        _refuse_damaged(data)
        small = image  # which `thumbnail` decodes at 1/2, 1/4 or 1/8 where that leaves enough for a good filter
    else:
        small = _load(image, data, bits_stored).convert("RGB")  # palettes would be scaled without a filter
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return _encoded(small.convert("RGB"), "JPEG", quality=quality), Header("jpg", small.height, small.width)


def _encoded(image: Image.Image, format: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
