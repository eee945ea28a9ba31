"""Image references: what a row may hold, and whether it can be opened. Nothing is decoded unless asked for."""

import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image

from ..geometry import MAX_ASPECT
from ..images import open_image

CHECKS = {True: "header", False: "none", "header": "header", "full": "full", "none": "none"}
_ORIENTATION = 0x0112
_EXIF_OF_PNG = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}


def image_struct(value: Any) -> dict[str, Any]:
    """
    The image reference `{"bytes", "path"}` for what a row holds: a path, encoded bytes, such a reference, or a
    `PIL.Image.Image`, which is encoded.
    """
    if isinstance(value, (str, os.PathLike)):
        value = {"path": os.fspath(value)}
    elif isinstance(value, (bytes, bytearray)):
        value = {"bytes": bytes(value)}
    elif isinstance(value, Image.Image):
        value = _encoded(value)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"is {type(value).__name__}, where a path, the bytes of a file or an image is expected.")
    data, path = (value or {}).get("bytes"), (value or {}).get("path")
    if data is None and not path:
        raise ValueError("is missing. Give every row a path or the bytes of an image file.")
    return {"bytes": data, "path": path}


def _encoded(image: Image.Image) -> dict[str, Any]:
    from datasets import Image as ImageFeature

    if 0 in image.size:
        raise ValueError(f"has no pixels (its size is {image.width} x {image.height}). Replace the image.")
    return ImageFeature().encode_example(image)


def check_image(image: Mapping[str, Any], level: bool | str = True) -> tuple[int, int] | None:
    """
    Size of the image after EXIF orientation, `None` where `level` asks for no check.

    Args:
        image (`Mapping`): A reference of [`image_struct`].
        level (`bool` or `str`, *optional*, defaults to `True`): `True` or `"header"` reads the header only; a file
        that is
            cut off after it passes. `"full"` decodes the image. `False` or `"none"` opens nothing.

    Raises:
        `ValueError`: the image is missing, unreadable, has no pixels, or is longer than any processor shows.
    """
    if level not in CHECKS:
        raise ValueError(f"`check_images` must be one of {list(CHECKS)}, got {level!r}.")
    if CHECKS[level] == "none":
        return None
    name = f"'{image['path']}'" if image["path"] else "the embedded image"
    _check_present(image, name)
    if CHECKS[level] == "full":
        return _checked_shape(open_image(dict(image), name).size, name)
    try:
        with Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as opened:
            size = _oriented_size(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        size = open_image(dict(image), name).size  # it knows the limit that counts here
    except Exception as error:  # Pillow's plugins raise many types for broken files
        raise ValueError(f"{name} cannot be read as an image ({_said(error)}). Replace the file.") from None
    return _checked_shape(size, name)


def _checked_shape(size: tuple[int, int], name: str) -> tuple[int, int]:
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"{name} has {size[0]} x {size[1]} pixels: more than {MAX_ASPECT} times as long as it is wide, which no "
            "model can be shown. Cut it into parts."
        )
    return size


def _check_present(image: Mapping[str, Any], name: str) -> None:
    if image["bytes"] is None and not os.path.isfile(image["path"]):
        raise ValueError(f"{name} is not a file. Correct the path; relative ones start at the folder of the data.")
    if (os.path.getsize(image["path"]) if image["bytes"] is None else len(image["bytes"])) == 0:
        raise ValueError(f"{name} is empty (0 bytes). Replace the file.")


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":
        return image.size  # Pillow gives this format's size upright
    if image.format == "PNG" and not _EXIF_OF_PNG & image.info.keys():
        return image.size  # `getexif` would decode the whole file to look for a chunk behind the pixels
    return image.size[::-1] if image.getexif().get(_ORIENTATION) in (5, 6, 7, 8) else image.size


def _said(error: Exception) -> str:
    return type(error).__name__ if "BytesIO" in str(error) or not str(error) else str(error)
