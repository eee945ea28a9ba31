"""Images opened ahead by threads: the same ones, a bounded number of pixels, and errors that name their row."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from mgpo_trl import image_loading
from mgpo_trl.image_loading import ImageLoader, image_key, open_and_fit
from mgpo_trl.images import ImageError, LateImage, crop_original, open_image
from mgpo_trl.processing import VisionChat


@pytest.fixture(scope="module")
def chat(tiny_dir):
    return VisionChat(AutoProcessor.from_pretrained(tiny_dir), max_pixels=112 * 112, min_pixels=56 * 56)


def photo(size=(900, 600), seed=0, orientation=None, kind="JPEG"):
    """A smooth picture with detail, as the bytes of a file."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    waves = 127 + 60 * np.sin(x / 40 + seed) + 60 * np.cos(y / 25)
    image = Image.fromarray(np.stack([waves, waves[::-1], 255 - waves], axis=-1).clip(0, 255).astype("uint8"))
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(buffer, kind, **({"quality": 92, "exif": exif} if kind == "JPEG" else {}))
    return buffer.getvalue()


def row(name, **options):
    return {"id": name, "image": {"bytes": photo(**options), "path": None}}


def batches(*groups):
    return [(number, rows) for number, rows in enumerate(groups)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_batch_gets_its_images(chat, threads):
    first, second, third = (row(f"r{n}", seed=n) for n in range(3))
    groups = batches([first, dict(first), second], [third], [first])
    others = set(threading.enumerate())
    loaded = list(ImageLoader(chat, threads=threads).batches(iter(groups)))
    assert [(start, rows) for start, rows, _ in loaded] == groups
    assert [len(opened) for _, _, opened in loaded] == [2, 1, 1]
    for _, rows, opened in loaded:
        for one in rows:
            image, view = opened[image_key(one["image"])]
            assert image.tobytes() == open_image(one["image"], "x").tobytes()
            assert view.tobytes() == chat.fit(image).tobytes()
    assert not [one for one in set(threading.enumerate()) - others if one.name.startswith("images")]


def test_the_next_batch_is_opened_while_this_one_is_played(chat, monkeypatch):
    opened = []
    monkeypatch.setattr(
        image_loading, "open_and_fit", lambda one, *rest: opened.append(one["id"]) or ("image", "view")
    )
    loader = ImageLoader(chat, threads=1).batches(batches([row("a")], [row("b")], [row("c")]))
    next(loader)
    deadline = time.monotonic() + 20
    while opened != ["a", "b"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert opened == ["a", "b"]  # and not yet c: one batch ahead
    loader.close()


def test_no_more_pixels_ahead_than_allowed(chat, monkeypatch):
    opened = []
    monkeypatch.setattr(
        image_loading, "open_and_fit", lambda one, *rest: opened.append(one["id"]) or ("image", "view")
    )
    following = [row(name, size=(400, 300), seed=n) for n, name in enumerate("bcd")]
    loader = ImageLoader(chat, threads=1, ahead_pixels=250_000).batches(batches([row("a")], following))
    next(loader)
    time.sleep(0.3)
    assert len(opened) == 3  # a, and two of 120,000 pixels
    next(loader)
    assert sorted(opened) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_image_names_its_row_when_its_batch_is_reached(chat, threads):
    bad = {"id": "the bad one", "image": {"bytes": photo()[:2000], "path": None}}
    loader = ImageLoader(chat, threads=threads).batches(batches([row("a")], [bad]))
    next(loader)
    with pytest.raises(ImageError, match="the bad one: the image cannot be decoded"):
        next(loader)


# views from fewer pixels


@pytest.mark.parametrize("orientation", [None, 3, 6, 8])
def test_a_draft_view_is_close_and_its_crop_exact(chat, orientation):
    one = row("a", size=(1800, 1200), orientation=orientation)
    image, view = open_and_fit(one, chat, "draft")
    exact_image, exact_view = open_and_fit(one, chat)
    assert isinstance(image, LateImage) and image.size == exact_image.size and image._decoded is None
    assert view.size == exact_view.size
    difference = np.abs(np.asarray(view, int) - np.asarray(exact_view, int))
    assert 0 < difference.max() and difference.mean() < 1.0
    box = (300, 200, 700, 500)
    assert crop_original(image, box).tobytes() == crop_original(exact_image, box).tobytes()
    assert image.decoded is image.decoded


def test_other_formats_are_decoded_in_full(chat):
    one = row("a", kind="PNG")
    _, view = open_and_fit(one, chat, "draft")
    assert view.tobytes() == open_and_fit(one, chat)[1].tobytes()


def test_draft_errors_name_the_row(chat):
    with pytest.raises(ImageError, match="bad: the image cannot be decoded"):
        open_and_fit({"id": "bad", "image": {"bytes": b"nothing", "path": None}}, chat, "draft")
    with pytest.raises(ImageError, match="gone: there is no image file"):
        open_and_fit({"id": "gone", "image": {"bytes": None, "path": "/nowhere.jpg"}}, chat, "draft")
