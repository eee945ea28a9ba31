"""`rollouts.html` in a browser: steps turn, groups stand together, filters work, text stays text."""

from PIL import Image
from test_gallery import HOSTILE
from test_html_report import browser, is_quiet, open_page  # noqa: F401
from watched import watched_record, write_watched

from mgpo_trl.watching import CURVES_FILE, write_training_page
from mgpo_trl.watching.files import RolloutLog


def test_steps_groups_and_filters(tmp_path, open_page):  # noqa: F811
    write_watched(tmp_path, [0, 10, 20], groups=2, size=4)
    Image.new("RGB", (60, 30), "white").save(tmp_path / CURVES_FILE)
    path = write_training_page(tmp_path)
    page = open_page(path)
    assert page.locator("#place").inner_text() == "step 0, page 1 of 3" and page.locator("#previous").is_disabled()
    assert page.locator("section.group").count() == 2 and page.locator("article").count() == 8
    assert page.locator("section.group h3").all_inner_texts() == ["Question 0?", "Question 1?"]
    assert page.locator("article h3").count() == 0  # the question stands once, over its group
    first = page.locator("article").first
    assert "reward 1.00 · advantage +0.50" in first.inner_text() and "right: says B" in first.inner_text()
    assert first.locator("rect.named").count() == 1 and first.locator("img").count() == 2
    assert page.evaluate("document.querySelector('img.picture').naturalWidth") == 60
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    page.click("#next")
    assert page.locator("#place").inner_text() == "step 20, page 3 of 3" and page.locator("#next").is_disabled()
    assert {"step 20" in text for text in page.locator("section.group > .meta").all_inner_texts()} == {True}
    page.click("#previous")
    page.select_option("#step", "10")
    assert page.locator("#count").inner_text() == "8 of 24 rollouts"
    assert page.locator("#place").inner_text() == "step 10, page 1 of 1"
    page.select_option("#verdict", "right")
    assert page.locator("#count").inner_text() == "2 of 24 rollouts" and page.locator("section.group").count() == 2
    page.select_option("#step", "")
    page.select_option("#status", "no_json")
    assert (
        page.locator("#count").inner_text() == "0 of 24 rollouts"
        and page.locator("#place").inner_text() == "page 1 of 1"
    )
    page.select_option("#verdict", "wrong")
    assert page.locator("#count").inner_text() == "12 of 24 rollouts"
    page.fill("#search", "row q1")
    assert page.locator("#count").inner_text() == "6 of 24 rollouts"
    page.fill("#search", "step-20/group-1/sample-3")
    assert page.locator("#count").inner_text() == "1 of 24 rollouts"
    assert page.locator("#step option").all_inner_texts() == ["all", "0", "10", "20"]
    assert is_quiet(page, path)


def test_a_long_step_takes_several_pages_and_tears_no_group(tmp_path, open_page):  # noqa: F811
    write_watched(tmp_path, [0, 5], groups=5, size=20, max_pictures=0)
    page = open_page(write_training_page(tmp_path))
    assert page.locator("#place").inner_text() == "step 0, page 1 of 4"
    counts = []
    for _ in range(4):
        counts.append((page.locator("section.group").count(), page.locator("article").count()))
        if page.locator("#next").is_enabled():
            page.click("#next")
    assert counts == [(3, 60), (2, 40)] * 2
    assert page.locator(".view .none").first.inner_text() == "no picture"


def test_narrow_screens_and_hostile_text(tmp_path, open_page):  # noqa: F811
    record = watched_record(0, of=2, category=HOSTILE, answer=None)
    record["training"]["row"] = HOSTILE
    record["turns"][0]["text"] = HOSTILE + "x" * 5000
    RolloutLog(tmp_path, 10).add(0, [record], [])
    path = write_training_page(tmp_path)
    for width in (1280, 400):
        page = open_page(path, viewport={"width": width, "height": 900})
        assert page.evaluate("window.hacked") is None and is_quiet(page, path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "<img src=x onerror" in page.locator("section.group > .meta").inner_text()
    assert page.locator("article.unjudged .verdict").inner_text() == "not judged: says B"
    page.select_option("#verdict", "wrong")
    assert page.locator("#count").inner_text() == "0 of 1 rollouts"
