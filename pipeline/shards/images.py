"""Checks, decodes and scales single encoded images and label maps.

    bytes ──header──────▶ format and size; nothing is decoded
    bytes ──check───────▶ format and size, once the whole image has been decoded
    bytes ──decode──────▶ pixels
    bytes ──decode_map──▶ the classes of pixels
    bytes ──prepare─────▶ bytes to pack: the same, or a smaller JPEG; prepare_map does the same with a label map

Pixels are counted before anything is decoded. EXIF orientation and colour profiles are ignored, as torchvision and
timm ignore them. Formats that are not named here are never tried, because PIL hands some of them to other programs.
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

from pipeline.shards.image_header import damage, excess, is_cut_short, read_size
from pipeline.shards.index import MAX_BYTES, MAX_PIXELS

MAX_SIDE_PX = 65535
"""The largest height or width, which an index record holds in 16 bits."""
QUALITY = 90
MAX_SCALED_BYTES = 1 << 30
"""The limit for the bytes of an image that packing scales down."""
MAX_SCALED_PIXELS = 1 << 29
"""The limit for the pixels of a JPEG that packing scales down. JPEGs can be decoded at a fraction of their size; a
progressive one of this size takes 3 GB."""
IGNORED = 255
"""The value of pixels of a label map that do not count."""

# MPO is a JPEG with more pictures behind it, as phones write them.
_PACKED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
_TRIED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# The position of the byte of a PNG that says how many bits its values have.
_DEPTH = 24
_BOMB = f"more than {MAX_PIXELS:,} pixels: taken for a decompression bomb; scale it down"


LabelMap = npt.NDArray[np.uint8]
"""[height, width] of class numbers, 0 for no label."""


class BadImageError(ValueError):
    """These bytes cannot be used as an image. The message says why, and the remedy where there is one."""


class Header(NamedTuple):
    extension: str
    """The extension, jpg or png."""
    height: int
    width: int
    """The width in pixels, as stored, like the height."""


def header(data: bytes) -> Header:
    """Returns what the first bytes of a JPEG or PNG say. Raises BadImageError."""
    with _open_checked(data) as image:
        return _check_header(image, data)


def check(data: bytes) -> Header:
    """Decodes the whole image, and returns what `header` returns.

    Raises BadImageError also for a damaged image, and for one that DALI would decode to other values than Pillow.
    """
    with _open_checked(data) as image:
        head = _check_header(image, data)
        _load(image, data)
        return head


def size(data: bytes) -> tuple[int, int]:
    """Returns height and width in pixels of an image of any format that packing takes. Raises BadImageError."""
    stated_size = read_size(data)
    if stated_size:
        return stated_size
    with _open_checked(data) as image:
        return image.height, image.width


def decode(data: bytes) -> Image.Image:
    """Returns a JPEG or PNG as RGB. Raises BadImageError."""
    with _open_checked(data) as image:
        _check_header(image, data)
        return _load(image, data).convert("RGB")


def decode_map(data: bytes) -> LabelMap:
    """Returns the values of a label map, [height, width], palette indices as they are. Raises BadImageError."""
    with _open_checked(data) as image:
        _check_header(image, data)
        is_png = image.format == "PNG"
        depth = data[_DEPTH] if is_png else 8
        # PIL stretches grey values of fewer bits to 0 … 255, and has another mode for values of more bits.
        is_grey = image.mode == "L" and depth == 8
        if not is_png or not (is_grey or image.mode == "P"):
            raise BadImageError(
                f"a label map is a PNG of 8-bit grey values or palette indices, not a {image.format} "
                f"of {depth} bits in PIL's mode {image.mode}"
            )
        return np.array(image)


def as_fed(data: bytes) -> bytes:
    """Returns the image itself where the feed decodes it as Pillow does, and else a PNG of what Pillow decodes.

    Raises BadImageError for an image that is damaged, as far as can be seen without decoding, or that Pillow refuses.
    """
    is_deep = data.startswith(b"\x89PNG") and data[_DEPTH : _DEPTH + 1] == b"\x10"
    if read_size(data) is None or is_deep:
        with _open_checked(data) as image:
            return _encode(_load(image, data).convert("RGB"), "PNG", compress_level=1)
    _check_bytes(data, MAX_BYTES)
    _check_undamaged(data)
    if is_cut_short(data):
        raise BadImageError("damaged: cut short")
    return data


def prepare(
    data: bytes,
    max_side: int | None = None,
    quality: int | None = None,
    bits_stored: int | None = None,
) -> tuple[bytes, Header]:
    """Returns the bytes to pack for an image, and their header. The image is decoded: one that fails would stop a run.

    JPEG and PNG stay as they are unless a side is longer than `max_side` pixels; then the image is scaled down and
    becomes a JPEG of `quality`. Other formats, and kinds that DALI does not decode as Pillow does, become JPEGs where
    either argument is given. With `bits_stored`, 16-bit values are scaled from 0 … 2^bits_stored - 1 to 8 bits, and
    PNGs of such values stay PNGs. Raises BadImageError.
    """
    convert = max_side is not None or quality is not None
    with _open_checked(data, max_side) as image:
        is_too_long = max_side is not None and max(image.size) > max_side
        if is_too_long or (convert and not _is_plain(image, data)):
            return _convert_to_jpeg(
                image,
                data,
                max_side or MAX_SIDE_PX,
                quality or QUALITY,
                bits_stored,
            )
        _check_bytes(data, MAX_BYTES)
        head = _check_header(image, data, remedy="pack with --quality to convert it")
        decoded = _load(image, data, bits_stored)
        if decoded is image or bits_stored is None:
            return data, head
        return _encode(decoded, "PNG"), head


def prepare_map(data: bytes, image: bytes, packed: Header, num_classes: int) -> bytes:
    """Returns the bytes to pack for the label map of `image`, which `prepare` has packed as `packed`.

    The map is checked and resized to the packed image; each pixel takes its nearest neighbour's value. Raises
    BadImageError.
    """
    labels = decode_map(data)
    height, width = size(image)
    if labels.shape != (height, width):
        raise BadImageError(
            f"{labels.shape[1]} × {labels.shape[0]} pixels, but its image has {width} × {height}: they must be equal"
        )
    problem = wrong_labels(labels, num_classes)
    if problem:
        raise BadImageError(problem)
    if labels.shape == (packed.height, packed.width):
        return data
    small = Image.fromarray(labels).resize((packed.width, packed.height), Image.Resampling.NEAREST)
    return _encode(small, "PNG")


def wrong_labels(labels: LabelMap, num_classes: int) -> str | None:
    """Returns what is wrong with the values of a label map, [height, width]; None for a correct one."""
    is_wrong = (labels > num_classes) & (labels != IGNORED)
    if not is_wrong.any():
        return None
    y, x = np.argwhere(is_wrong)[0].tolist()
    return (
        f"the value {labels[y, x]} at x {x}, y {y}; a pixel's value is 0, no label; 1 … {num_classes}, a class; "
        f"or {IGNORED}, to be ignored"
    )


@contextlib.contextmanager
def _open_checked(data: bytes, max_side: int | None = None) -> Iterator[ImageFile]:
    """Yields PIL's image before decoding, which may then be done at a smaller size if `max_side` is given.

    Whatever is raised for the image, inside the block as well, becomes a BadImageError.
    """
    if not data:
        raise BadImageError("empty")
    _check_bytes(data, MAX_SCALED_BYTES if max_side else MAX_BYTES)
    reason = excess(data)
    if reason:
        raise BadImageError(f"{reason}, as no encoder writes: taken for a decompression bomb")
    try:
        with warnings.catch_warnings():
            # PIL warns of odd metadata, and above its own limit for pixels, which is lower than ours.
            warnings.simplefilter("ignore")
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
    # Damaged bytes make decoders raise almost anything.
    except Exception as error:
        raise BadImageError(f"not a readable image: {error}") from error


def _check_bytes(data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise BadImageError(f"more than {limit:,} bytes")


def _open(data: bytes, max_side: int | None) -> ImageFile:
    """Returns PIL's image. A JPEG of too many pixels is set up to be decoded at the size that scaling it needs."""
    height, width = read_size(data) or (0, 0)
    is_large_jpeg = data.startswith(b"\xff\xd8") and MAX_PIXELS < height * width <= MAX_SCALED_PIXELS
    if max_side is None or not is_large_jpeg:
        return Image.open(BytesIO(data), formats=_TRIED)
    # Opened without Image.open, which has a lower limit for pixels.
    image = JpegImageFile(BytesIO(data))
    longest = max(height, width)
    # Three times the result is enough for a good filter.
    side = max(max_side, min(3 * max_side, longest // 2))
    draft_size = (
        max(1, width * side // longest),
        max(1, height * side // longest),
    )
    image.draft(None, draft_size)
    return image


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Returns whether DALI decodes the image as PIL does. PIL also reads files whose layout DALI cannot follow."""
    return image.format in _PACKED and read_size(data) == (image.height, image.width)


def _check_header(image: Image.Image, data: bytes, remedy: str = "convert it, as pack --quality does") -> Header:
    if image.format not in _PACKED:
        raise BadImageError(f"holds {image.format}, not JPEG or PNG: {remedy}")
    if not _is_plain(image, data):
        kind = "not laid out as the format wants"
        if image.mode == "CMYK":
            kind = "in CMYK without Adobe's marker"
        elif image.format == "JPEG":
            kind += ", or lossless"
        raise BadImageError(f"a {image.format} that is {kind}: {remedy}")
    if max(image.size) > MAX_SIDE_PX:
        raise BadImageError(f"{image.width} × {image.height} pixels; no side may exceed {MAX_SIDE_PX}: scale it down")
    return Header(_PACKED[image.format], image.height, image.width)


def _load(image: ImageFile, data: bytes, bits_stored: int | None = None) -> Image.Image:
    """Decodes the whole image and returns it, or an image of 8 bits a value where it has 16. Raises BadImageError."""
    _check_undamaged(data)
    values = _decode_16_bits(image, data)
    if values is not None:
        return Image.fromarray(_scale_to_8_bits(values, bits_stored))
    if image.mode in ("I", "F"):
        raise BadImageError(f"32 bits a pixel (PIL's mode {image.mode}), whose range nobody knows: convert it")
    if image.format == "TIFF" and ";16" in str(image.tile):
        raise BadImageError("a TIFF with 16 bits a colour, of which PIL reads the upper half: convert it to PNG")
    image.load()
    return image


def _check_undamaged(data: bytes) -> None:
    reason = damage(data)
    if reason:
        raise BadImageError(f"damaged: {reason}")


def _decode_16_bits(image: ImageFile, data: bytes) -> npt.NDArray[np.integer] | None:
    """Returns the values of an image of 16 bits a value, [height, width] or [height, width, 3]; None for others."""
    if image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.format != "PNG" or data[_DEPTH] != 16:
        return None
    # PIL reads the upper half of 16-bit colours alone. Imported here, because torch takes seconds to import, and such
    # images are rare.
    import torch
    from torchvision.io import ImageReadMode, decode_png

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_png(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _scale_to_8_bits(values: npt.NDArray[np.integer], bits_stored: int | None) -> npt.NDArray[np.uint8]:
    """Scales 16-bit values, of which `bits_stored` bits are used, to 8 bits. Raises BadImageError for others."""
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
    # A table of all values: fewer divisions than pixels.
    scale = np.rint(np.arange(limit + 1) * 255 / limit)
    return scale.astype(np.uint8)[values]


def _convert_to_jpeg(
    image: ImageFile,
    data: bytes,
    max_side: int,
    quality: int,
    bits_stored: int | None,
) -> tuple[bytes, Header]:
    if image.format == "JPEG":
        _check_undamaged(data)
        # Not decoded yet: `thumbnail` does so at 1/2, 1/4 or 1/8 where that leaves enough for a good filter.
        small = image
    else:
        # Palettes would be scaled without a filter.
        small = _load(image, data, bits_stored).convert("RGB")
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    encoded = _encode(small.convert("RGB"), "JPEG", quality=quality)
    return encoded, Header("jpg", small.height, small.width)


def _encode(image: Image.Image, format: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
