"""The page of rollouts: streamed, self-contained, and harmless whatever a model wrote. Pictures survive a kill."""

import json
import re

import pytest
from PIL import Image
from test_metrics import make_box, make_record

from mgpo_trl.gallery import (
    PictureReader,
    PictureWriter,
    Section,
    card_of,
    decode,
    picture_of,
    pictures_of,
    write_page,
)
from mgpo_trl.gallery.pictures import PICTURES_FILE
from mgpo_trl.rollout import Rollout, Turn

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">\u2028\ud800&amp;'


def rollout(identity="q0", crop=None, size=(1000, 500)):
    image = Image.new("RGB", size, "red")
    turns = [Turn([1], "box", False), Turn([2], r"\boxed{B}", False)]
    turns[0].box, turns[0].shown_px = type("Box", (), {"ok": crop is not None})(), crop
    turns[0].reply_image = image.crop(crop) if crop else image
    return Rollout(identity, "q", image, image, [0], turns=turns)


def test_pictures_are_small_and_found_again_after_a_kill(tmp_path):
    with PictureWriter(tmp_path, limit=2) as writer:
        for identity, crop in (("a", (0, 0, 400, 100)), ("b", None), ("c", None)):
            writer.add(rollout(identity, crop))
            writer.add(rollout(identity, crop))
    with open(tmp_path / PICTURES_FILE, "ab") as file:
        file.write(b'{"id": "d", "overv')  # killed here
    pictures = PictureReader(tmp_path)
    assert pictures("a")["id"] == "a" and pictures("b")["crops"] == [None]
    assert "a" in pictures and "c" not in pictures
    assert pictures("c") is None and pictures("d") is None  # over the limit, and half a line
    assert len(pictures("a")["overview"]) < 5000
    assert picture_of(rollout("a", (0, 0, 400, 100))) == pictures("a")
    with PictureWriter(tmp_path, limit=3) as writer:
        writer.add(rollout("c"))
    assert PictureReader(tmp_path)("c")["id"] == "c"


def test_a_group_shares_its_pictures():
    """Two rollouts of one view: the same bytes for it, a crop for the one that has one."""
    one, other = rollout("a", (0, 0, 400, 100)), rollout("b")
    other.view = one.view
    pictures = pictures_of([one, other])
    assert pictures == [picture_of(one), picture_of(other)]
    assert pictures[0]["overview"] is pictures[1]["overview"] and pictures[1]["crops"] == [None]
    assert decode(pictures[0]["crops"][0]).size == (320, 80)


def test_no_pictures_where_none_are_wanted(tmp_path):
    with PictureWriter(tmp_path, limit=0) as writer:
        writer.add(rollout())
    assert not list(tmp_path.iterdir()) and PictureReader(tmp_path)("q0") is None


def test_a_card_holds_what_the_record_says():
    record = make_record("q1", r"so \boxed{A}", [make_box()], category=None)
    record["turns"][0]["box"]["shown_px"] = [1, 2, 3, 4]
    card = card_of(record, {"reward": "0.0"})
    assert (card.said, card.right, card.status, card.category) == ("A", False, "ok", "")
    assert (card.boxes, card.shown, card.turns) == ([[0, 0, 50, 100]], [[1, 2, 3, 4]], ["look", r"so \boxed{A}"])
    direct = card_of(make_record(text=r"\boxed{B}"))
    assert (direct.right, direct.status, direct.boxes) == (True, "", [])
    unknown = card_of(make_record(answer=None), step=20, group="one")
    assert (unknown.right, unknown.said, unknown.step, unknown.group) == (None, "B", 20, "one")


def test_nothing_that_a_model_wrote_leaves_its_script_element(tmp_path):
    cards = [(card_of(make_record("q", HOSTILE, question=HOSTILE, category=HOSTILE)), None)]
    write_page(tmp_path / "page.html", HOSTILE, [Section(HOSTILE, "<p>body</p>")], cards)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2 and "onerror" in page
    assert not re.search(r"<img[^>]*onerror", page)
    data = re.search(r'<script type="application/json" class="card">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in data and "\u2028" not in data
    assert json.loads(data)["turns"][0].startswith("</script><script>")
    assert "https:" not in page.replace("http://www.w3.org/2000/svg", "") and "http:" in page


def test_a_failed_page_leaves_the_old_one(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")

    def cards():
        yield card_of(make_record()), None
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_page(path, "t", [], cards())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
