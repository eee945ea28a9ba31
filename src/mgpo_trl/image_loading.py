"""Images of rows, opened and fitted by worker threads: each file once a batch, the next batch ahead of its turn."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from .images import DRAFTABLE, MAX_PIXELS, ImageError, LateImage, open_image, open_late, read_header

THREADS = 2
AHEAD_PIXELS = MAX_PIXELS
"""Most pixels that are held ahead of their batch, so that any image that opens can be: 1.6 GB (Pillow keeps four bytes
for a pixel of RGB), twelve 8K photographs."""
VIEW_DECODING = ("exact", "draft")

Opened = tuple[Image.Image | LateImage, Image.Image]
"""The original image, and its view."""


def image_key(image):
    """Equal for rows that show the same file: its bytes, else its path, else the object."""
    if isinstance(image, dict):
        return image.get("bytes") or image.get("path")
    return image if isinstance(image, (str, bytes)) else id(image)


def open_and_fit(row: dict, chat, view_decoding: str = "exact") -> Opened:
    """
    The original of a row, and its view.

    Args:
        row (`dict`): A canonical row.
        chat ([`~mgpo_trl.processing.VisionChat`]): Fits images to the pixel budget.
        view_decoding (`str`, *optional*, defaults to `"exact"`):
            `"draft"` makes the view from a JPEG decoded at reduced resolution, and decodes the original when a crop is
            cut from it. Faster, not bit-exact.

    Raises:
        ImageError: The image cannot be opened; the message names the row.
        ValueError: It has no size within the pixel budget; the message names the row.
    """
    name = str(row.get("id", "without an id"))
    image = (open_late if view_decoding == "draft" else open_image)(row["image"], name)
    try:
        if isinstance(image, LateImage):
            return image, image.draft(chat.fitted_size(image.size), chat.image_processor.resample)
        return image, chat.fit(image)
    except ImageError:
        raise
    except ValueError as error:
        raise ValueError(f"The image of row {name!r} can not be shown ({image.size} pixels): {error}") from error


class ImageLoader:
    """
    Opens the images of batches in worker threads, a bounded number of pixels ahead. Evaluation reads [`batches`];
    training calls [`begin`] when the next batch is known, and [`finish`] when it is played.

    Args:
        chat ([`~mgpo_trl.processing.VisionChat`]): Fits images to the pixel budget.
        view_decoding (`str`, *optional*, defaults to `"exact"`): See [`open_and_fit`].
        threads (`int`, *optional*, defaults to `2`): Worker threads; 0 opens images where they are needed.
        ahead_pixels (`int`, *optional*): Most pixels opened before their batch is asked for.
    """

    def __init__(self, chat, view_decoding="exact", threads: int = THREADS, ahead_pixels: int = AHEAD_PIXELS):
        self.chat, self.view_decoding, self.threads, self.ahead_pixels = chat, view_decoding, threads, ahead_pixels
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: dict[object, Future] = {}
        self._begun: set = set()

    def batches(self, batches: Iterable[tuple[int, list[dict]]]) -> Iterator[tuple[int, list[dict], dict]]:
        """
        For each (position, rows) also the opened images by [`image_key`]. They are let go before those of the next
        batch are waited for: `opened` is emptied. An image that cannot be opened raises when its batch is reached.
        """
        try:
            iterator = iter(batches)
            following = next(iterator, None)
            while following is not None:
                start, rows = following
                opened = self.finish(rows)
                following = next(iterator, None)
                if following:
                    self.begin(following[1])
                yield start, rows, opened
                opened.clear()
        finally:
            self.close()

    def begin(self, rows: Sequence[dict]) -> None:
        """
        Start on the images of a batch to come, as far as the pixel limit allows. Rows that were begun before, and rows
        without ids or images that are no rows of ours, are left for [`finish`].
        """
        distinct = _distinct(rows)
        if self.threads == 0 or distinct.keys() == self._begun:
            return
        self._begun, self._waiting, pixels = set(distinct), {}, 0
        for key, row in distinct.items():
            pixels += self._held_pixels(row)
            if pixels > self.ahead_pixels:
                break
            self._waiting[key] = self.submit(self._open, row)

    def finish(self, rows: Sequence[dict]) -> dict[object, Opened]:
        """
        Image and view of every row by [`image_key`], each opened once; raises what opening the first bad one raised.
        """
        distinct = _distinct(rows)
        if self.threads == 0:
            return {key: self._open(row) for key, row in distinct.items()}
        waiting, self._waiting = self._waiting, {}
        futures = {key: waiting.get(key) or self.submit(self._open, row) for key, row in distinct.items()}
        return {key: future.result() for key, future in futures.items()}

    def close(self) -> None:
        """End the threads; images that nobody waits for any more are not opened."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def submit(self, work, *args) -> Future:
        """Run a function in the worker threads."""
        self._pool = self._pool or ThreadPoolExecutor(self.threads, thread_name_prefix="images")
        return self._pool.submit(work, *args)

    def _open(self, row: dict) -> Opened:
        return open_and_fit(row, self.chat, self.view_decoding)

    def _held_pixels(self, row: dict) -> int:
        """Pixels that stay in memory once the row's image is open; 0 where opening it will fail and say so."""
        try:
            header = read_header(row["image"], "header")
        except ImageError:
            return 0
        return 0 if self.view_decoding == "draft" and header.format in DRAFTABLE else header.pixels


def _distinct(rows: Sequence[dict]) -> dict:
    """The first row of every image, in order."""
    distinct: dict = {}
    for row in rows:
        distinct.setdefault(image_key(row["image"]), row)
    return distinct
