"""Images opened ahead by threads: the same ones, a bounded number of pixels, and errors that name their row."""

import io
import threading
import time
import weakref
from contextlib import closing

import numpy as np
import pytest
from photographs import PHOTOGRAPHS
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
@pytest.mark.parametrize("view_decoding", ["exact", "draft"])
def test_every_batch_gets_its_images_and_they_are_the_same_with_threads(chat, threads, view_decoding):
    first, second, third = (row(f"r{n}", seed=n) for n in range(3))
    groups = batches([first, dict(first), second], [third], [first])
    loader, played = ImageLoader(chat, view_decoding, threads), []
    for start, rows, opened in loader.batches(iter(groups)):
        assert len(opened) == len({image_key(one["image"]) for one in rows})
        played.append((start, rows))
        for one in rows:
            image, view = opened[image_key(one["image"])]
            assert view.tobytes() == open_and_fit(one, chat, view_decoding)[1].tobytes()
            whole = open_image(one["image"], "x")
            assert crop_original(image, (0, 0, *whole.size)).tobytes() == whole.tobytes()
    assert played == groups and not image_threads()


OTHERS = set()
"""Threads of trainers that other tests left behind."""


@pytest.fixture(autouse=True)
def know_other_threads():
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


def image_threads():
    return {thread for thread in set(threading.enumerate()) - OTHERS if thread.name.startswith("images")}


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


def test_drafts_hold_no_originals_and_are_all_opened_ahead(chat):
    following = [row(name, size=(400, 300), seed=n) for n, name in enumerate("bcd")]
    png = row("e", kind="PNG")
    for view_decoding, ahead in (("exact", "b"), ("draft", "bcd")):
        loader = ImageLoader(chat, view_decoding, ahead_pixels=200_000)
        loader.begin([*following, png])
        assert list(loader._waiting) == [image_key(one["image"]) for one in following if one["id"] in ahead]
        loader.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_originals_are_let_go_with_their_batch(chat, monkeypatch, threads):
    """Never more alive than the batch that is played and what may be held ahead of the next."""
    references, most, lock = [], [0], threading.Lock()
    alive = lambda: sum(reference() is not None for reference in references)  # noqa: E731

    def watched(*args):
        image, view = open_and_fit(*args)
        with lock:
            references.append(weakref.ref(image))
            most[0] = max(most[0], alive())
        return image, view

    monkeypatch.setattr(image_loading, "open_and_fit", watched)
    groups = batches(
        *([row(f"{batch}-{n}", size=(300, 200), seed=10 * batch + n) for n in range(4)] for batch in range(5))
    )
    loader = ImageLoader(chat, threads=threads, ahead_pixels=2 * 300 * 200)
    for _, rows, opened in loader.batches(groups):
        assert len(opened) == len(rows) == 4
        time.sleep(0.05)  # the workers get ahead
    assert most[0] == (4 + 2 if threads else 4) and not alive()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_image_names_its_row_when_its_batch_is_reached(chat, threads):
    bad, worse = ({"id": name, "image": {"bytes": photo(seed=n)[:2000], "path": None}} for n, name in enumerate("xy"))
    loader = ImageLoader(chat, threads=threads).batches(
        batches([row("a")], [row("b", seed=3), bad, worse], [row("c")])
    )
    next(loader)
    with pytest.raises(ImageError, match="^x: the image cannot be decoded"):
        next(loader)
    assert not image_threads() and next(loader, None) is None


def test_an_image_that_cannot_be_shown_names_its_row(chat):
    long = {"id": "long", "image": {"bytes": photo(size=(3000, 10)), "path": None}}
    for view_decoding in ("exact", "draft"):
        with pytest.raises(ValueError, match=r"row 'long' can not be shown \(\(3000, 10\) pixels\).*200 times"):
            open_and_fit(long, chat, view_decoding)


def test_an_interrupt_ends_the_threads(chat, monkeypatch):
    """Ctrl-C while a batch is played: what was begun ends, what was only queued is never opened."""
    opened, go_on = [], threading.Event()
    monkeypatch.setattr(
        image_loading, "open_and_fit", lambda one, *rest: opened.append(one["id"]) or go_on.wait(20) or ("i", "v")
    )
    groups = batches([row("a")], [row(name, seed=n) for n, name in enumerate("bcdef")])
    loader = ImageLoader(chat, threads=1)
    threading.Timer(0.2, go_on.set).start()
    with pytest.raises(KeyboardInterrupt), closing(loader.batches(groups)) as played:
        for _ in played:
            go_on.clear()
            threading.Timer(0.3, go_on.set).start()
            raise KeyboardInterrupt
    assert opened[0] == "a" and len(opened) <= 2 and not image_threads()


# views from fewer pixels


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_draft_view_of_a_photograph_is_close_and_its_crop_exact(chat, name):
    """At the photograph's own resolution, where a camera's detail is. Figures of 8K: benchmarks/LOG.md."""
    photograph, buffer = open_image(PHOTOGRAPHS[name]["source"], name), io.BytesIO()
    twice = Image.new("RGB", (2 * photograph.width, 2 * photograph.height))
    for corner in ((0, 0), (photograph.width, 0), (0, photograph.height), photograph.size):
        twice.paste(photograph, corner)
    twice.save(buffer, "JPEG", quality=92)
    one = {"id": name, "image": {"bytes": buffer.getvalue(), "path": None}}
    image, view = open_and_fit(one, chat, "draft")
    exact_image, exact_view = open_and_fit(one, chat)
    assert isinstance(image, LateImage) and image.size == exact_image.size and not image.is_decoded
    difference = np.abs(np.asarray(view, int) - np.asarray(exact_view, int))
    assert 0 < difference.mean() < 1.0 and difference.max() < 24
    box = (100, 50, 400, 290)
    assert crop_original(image, box).tobytes() == crop_original(exact_image, box).tobytes()


def test_other_formats_are_decoded_in_full(chat):
    one = row("a", kind="PNG")
    _, view = open_and_fit(one, chat, "draft")
    assert view.tobytes() == open_and_fit(one, chat)[1].tobytes()


def test_draft_errors_name_the_row(chat):
    with pytest.raises(ImageError, match="bad: the image cannot be decoded"):
        open_and_fit({"id": "bad", "image": {"bytes": b"nothing", "path": None}}, chat, "draft")
    with pytest.raises(ImageError, match="gone: there is no image file"):
        open_and_fit({"id": "gone", "image": {"bytes": None, "path": "/nowhere.jpg"}}, chat, "draft")
