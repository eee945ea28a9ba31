"""Images: open any file as upright RGB, fully decoded, and crop from the original's own pixels.

EXIF orientation is applied once, here, and every trace of it is dropped, so that the three coordinate spaces of
[`mgpo_trl.geometry`] agree and nothing downstream can turn the picture again.
"""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

MAX_PIXELS = 400_000_000
"""Largest image that is opened: benchmark photographs of 8K x 8K are ordinary here, Pillow stops at 178 million."""

DRAFTABLE = ("JPEG", "MPO")
"""Formats whose decoder can leave out resolution; a camera's MPO is a JPEG with further pictures behind it."""

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAP_SIDES = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}
_limit_lock = threading.Lock()


class ImageError(ValueError):
    """An image that is missing, unreadable, cut off, empty or too large. The message names it and what to do."""


def open_image(source: str | os.PathLike | bytes | dict | Image.Image, name: str) -> Image.Image:
    """
    Opens an image as upright RGB, decoded to the last pixel.

    EXIF orientation is applied once and dropped. Transparency is laid on white; 16-bit grayscale is scaled, not
    clipped; CMYK, palette, grayscale and other colour spaces are converted. Of an animation the first frame counts.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `dict` or `PIL.Image.Image`):
            A path, the bytes of a file, a dictionary with `bytes` and `path` as 🤗 Datasets stores images (the bytes
            count first), or an open image (left as it is).
        name (`str`):
            What the image is called in an error, such as the row it belongs to.

    Returns:
        `PIL.Image.Image`: a new image in mode RGB, without metadata.

    Raises:
        [`ImageError`]: if the image is missing, unreadable, cut off, empty or larger than `MAX_PIXELS`.
    """
    with _named_errors(name):
        image = _open(source, name)
        image.load()
        upright = _upright(image)
        return _to_rgb(upright, name, is_ours=upright is not source)


class Header(NamedTuple):
    """What the first bytes of an image file say."""

    format: str | None
    """Pillow's name of the format; `None` for an image in memory."""
    pixels: int
    """Width times height."""


def read_header(source: str | os.PathLike | bytes | dict | Image.Image, name: str) -> Header:
    """
    Format and number of pixels of an image, as in [`open_image`]. Decodes nothing, and of a file reads the beginning.

    Raises:
        [`ImageError`]: if the image is missing, unreadable, empty or larger than `MAX_PIXELS`.
    """
    with _named_errors(name):
        file = _file_of(source)
        if isinstance(file, str | os.PathLike) and os.path.isfile(file) and os.path.getsize(file):
            with open(file, "rb") as opened:
                image = _check_size(_read_header(opened), name)
        else:
            image = _open(file, name)
        return Header(image.format, image.width * image.height)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Whatever Pillow raises, as an [`ImageError`] that names the image."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, f"more than {2 * MAX_PIXELS:,}")) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise ImageError(
            f"{name}: the image cannot be decoded ({type(error).__name__}: {error}). It is cut off, damaged or not an "
            "image: replace the file, or leave it out."
        ) from error


class LateImage:
    """
    A JPEG whose pixels are decoded when they are first asked for. Knows its upright size at once; threads may share
    it.

    Args:
        source: As in [`open_image`], but no open image.
        name (`str`): What the image is called in an error.

    Raises:
        [`ImageError`]: the header cannot be read; on first use, the pixels cannot be decoded.
        ValueError: it is no JPEG; [`open_late`] decodes other formats at once.
    """

    def __init__(self, source: str | os.PathLike | bytes | dict, name: str):
        self._source, self._name = source, name
        self._decoded: Image.Image | None = None
        self._lock = threading.Lock()
        with _named_errors(name):
            header = _open(source, name)
            turn = _turn_of(header) if header.format in DRAFTABLE else None
        if header.format not in DRAFTABLE:
            raise ValueError(f"{name}: {header.format} cannot be decoded late. Open it with `open_late`.")
        self._is_turned = turn in _SWAP_SIDES
        self.size: tuple[int, int] = header.size[::-1] if self._is_turned else header.size

    @property
    def width(self) -> int:
        """Upright width in pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Upright height in pixels."""
        return self.size[1]

    @property
    def is_decoded(self) -> bool:
        """Whether the full pixels are in memory."""
        return self._decoded is not None

    @property
    def decoded(self) -> Image.Image:
        """The image with all its pixels, decoded once."""
        with self._lock:
            if self._decoded is None:
                self._decoded = open_image(self._source, self._name)
        return self._decoded

    def draft(self, size: tuple[int, int], resample: int) -> Image.Image:
        """
        The image at `size` (width, height), decoded at a fraction of its resolution: the largest reduction by 2, 4 or
        8 that leaves twice the size on each side. Not bit-exact, unless the JPEG is too small to be reduced.
        """
        stored_size = size[::-1] if self._is_turned else size
        with _named_errors(self._name):
            image = _open(self._source, self._name)
            full_size = image.size
            _, box = image.draft(None, (2 * stored_size[0], 2 * stored_size[1]))
            if image.size == full_size:
                return self.decoded.resize(size, resample)
            image.load()
            turn = _turn_of(image)
            # The last column of a reduced image may stand for less than a whole one; the box says where it ends.
            view = _to_rgb(image, self._name, is_ours=True).resize(stored_size, resample, box)
            return view if turn is None else view.transpose(turn)


def open_late(source: str | os.PathLike | bytes | dict | Image.Image, name: str) -> LateImage | Image.Image:
    """A JPEG as a [`LateImage`], any other image as [`open_image`] gives it: it has no reduced form to show first."""
    is_file = not isinstance(source, Image.Image)
    late = is_file and read_header(source, name).format in DRAFTABLE
    return LateImage(source, name) if late else open_image(source, name)


def crop_original(image: Image.Image | LateImage, box_original_px: tuple[int, int, int, int]) -> Image.Image:
    """
    Cuts a box out of the original image: its own pixels, not resized.

    Args:
        image (`PIL.Image.Image` or [`LateImage`]):
            The original, as [`open_image`] returns it, or one that is decoded now.
        box_original_px (`tuple[int, int, int, int]`):
            (x1, y1, x2, y2), inside the image and not empty.

    Returns:
        `PIL.Image.Image`: of size (x2 - x1, y2 - y1).

    Raises:
        `ValueError`: if the box is empty or reaches outside the image, where Pillow would paint black.
    """
    x1, y1, x2, y2 = box_original_px
    if not (0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height):
        raise ValueError(
            f"`box_original_px` must lie inside the image of size {image.size} and not be empty, got "
            f"{tuple(box_original_px)}. Map boxes with `mgpo_trl.geometry.view_to_original`, which clips them."
        )
    if isinstance(image, LateImage):
        image = image.decoded
    with _pixel_limit():
        return image.crop((x1, y1, x2, y2))


def _open(source, name: str) -> Image.Image:
    """The image with its header read and its size checked, not decoded yet."""
    source = _file_of(source)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, bytes | bytearray | memoryview):
        image = _read_header(io.BytesIO(_not_empty(bytes(source), name)))
    elif isinstance(source, str | os.PathLike):
        image = _read_header(io.BytesIO(_not_empty(_read_file(Path(source), name), name)))
    else:
        raise ImageError(
            f"{name}: an image must be a path, bytes, a dictionary with `bytes` or `path`, or a PIL image, got "
            f"{type(source).__name__}. Fix the row's image field."
        )
    return _check_size(image, name)


def _file_of(source):
    """The bytes or the path that a dictionary of 🤗 Datasets holds; anything else as it is."""
    if not isinstance(source, dict):
        return source
    return source["bytes"] if source.get("bytes") is not None else source.get("path")


def _read_file(path: Path, name: str) -> bytes:
    if not path.is_file():
        raise ImageError(f"{name}: there is no image file at {path}. Fix the path, or leave it out.")
    return path.read_bytes()


def _not_empty(data: bytes, name: str) -> bytes:
    if not data:
        raise ImageError(f"{name}: the image file has zero bytes. Replace the file, or leave it out.")
    return data


def _read_header(file: BinaryIO) -> Image.Image:
    with _pixel_limit():
        return Image.open(file)


@contextmanager
def _pixel_limit() -> Iterator[None]:
    """Pillow's own limit on pixels, raised to `MAX_PIXELS` for a moment (it is a global of Pillow, hence the lock)."""
    with _limit_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_size(image: Image.Image, name: str) -> Image.Image:
    if image.width < 1 or image.height < 1:
        raise ImageError(f"{name}: the image has no pixels (size {image.size}). Replace it, or leave it out.")
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(_too_large(name, f"{image.width * image.height:,}"))
    return image


def _too_large(name: str, pixels: str) -> str:
    return f"{name}: the image has {pixels} pixels, over the limit of {MAX_PIXELS:,}. Make it smaller or leave it out."


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn_of(image)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, name: str, is_ours: bool) -> Image.Image:
    """The image in mode RGB, without metadata. Where `is_ours`, nobody else holds it and its pixels may be kept."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_8_bit(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # `convert` copies what is RGB already; `_new` puts a plain image around the same pixels (130 MB of an 8K picture).
    image = image._new(image.im) if image.mode == "RGB" and is_ours else image.convert("RGB")
    image.info = {}
    return image


def _scale_to_8_bit(image: Image.Image, name: str) -> Image.Image:
    low, high = image.getextrema()
    if image.mode == "F" or low < 0 or high > 65535:
        raise ImageError(
            f"{name}: pixels of mode {image.mode} from {low} to {high} have no agreed brightness. Save the image with "
            "8 or 16 bits a channel."
        )
    scaled = image.point(lambda value: value / 256)
    scaled.info = {}
    return scaled.convert("L")
