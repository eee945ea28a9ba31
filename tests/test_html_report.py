"""`report.html` in a browser: it loads without a request or an error, filters work, text stays text."""

import base64
import io
import json
import os
import shutil

import pytest
from PIL import Image
from test_gallery import HOSTILE
from test_metrics import make_box, make_record
from test_report import make_run

from mgpo_trl.evaluation import rescore
from mgpo_trl.evaluation.charts import Bar, ChartData, bar_chart
from mgpo_trl.evaluation.metrics import score_record
from mgpo_trl.gallery.pictures import PICTURES_FILE
from mgpo_trl.records import RolloutWriter, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def write_results(directory, records, pictures=True, **run):
    write_run(directory, make_run(n_expected=len(records), **run))
    with RolloutWriter(directory) as writer:
        for record in records:
            writer.write(record)
    if pictures:
        buffer = io.BytesIO()
        Image.effect_noise((320, 240), 60).convert("RGB").save(buffer, "JPEG", quality=72)
        data = base64.b64encode(buffer.getvalue()).decode()
        lines = [json.dumps({"id": record["id"], "overview": data, "crops": [data]}) + "\n" for record in records]
        (directory / PICTURES_FILE).write_text("".join(lines))
    rescore(directory)
    return directory / "report.html"


def make_records(count):
    """Every third right; a third without a usable box; two categories."""
    return [
        make_record(
            f"q{n}", r"\boxed{B}" if n % 3 == 0 else r"\boxed{A}", [make_box("ok" if n % 3 else "no_json")],
            category=["cards", "signs"][n % 2], question=f"Question {n}?",
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        if os.environ.get("MGPO_REQUIRE_BROWSER") == "1":
            pytest.fail("MGPO_REQUIRE_BROWSER=1, and no Chromium is on the path. Install it.")
        pytest.skip("No Chromium on the path: install it to test the pages.")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a file; collects what the page asks for and complains about."""
    pages = []

    def opened(path, **options):
        page = browser.new_page(**options)
        page.set_default_timeout(60_000)
        page.asked, page.complaints = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()


def is_quiet(page, path):
    outside = [url for url in page.asked if url != path.as_uri() and not url.startswith("data:")]
    return not outside and not page.complaints


def test_filters_and_paging(tmp_path, open_page):
    path = write_results(tmp_path, make_records(60))
    page = open_page(path)
    count = page.locator("#count")
    assert count.inner_text() == "60 of 60 rollouts" and page.locator("article").count() == 20
    assert page.locator("article").first.locator("img").count() == 1  # its box was unusable: no crop
    page.select_option("#verdict", "right")
    assert count.inner_text() == "20 of 60 rollouts" and page.locator("article.right").count() == 20
    page.select_option("#status", "ok")
    assert count.inner_text() == "0 of 60 rollouts" and page.locator("article").count() == 0
    page.select_option("#verdict", "wrong")
    page.select_option("#category", "signs")
    assert count.inner_text() == "20 of 60 rollouts"
    assert {"signs" in text for text in page.locator(".meta").all_inner_texts()} == {True}
    page.fill("#search", "question 59")
    assert count.inner_text() == "1 of 60 rollouts" and "Question 59?" in page.locator("article h3").inner_text()
    box = page.locator("article rect.named")
    assert [box.get_attribute(name) for name in ("x", "y", "width", "height")] == ["0", "0", "50", "100"]
    page.fill("#search", "")
    page.select_option("#category", "")
    page.select_option("#verdict", "")
    page.select_option("#status", "")
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    assert page.locator("#place").inner_text() == "page 2 of 3"
    page.click("#next")
    assert page.locator("#next").is_disabled() and page.locator("article").count() == 20
    assert is_quiet(page, path)


def test_the_overlay_covers_the_picture_alone(tmp_path, open_page):
    path = write_results(tmp_path, [make_record(boxes=[make_box()], text="long " * 900 + r"\boxed{B}")])
    for width in (1280, 420):
        page = open_page(path, viewport={"width": width, "height": 900})
        image, overlay = (page.locator(f".view {tag}").bounding_box() for tag in ("img", "svg"))
        assert image == pytest.approx(overlay)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_text_is_text(tmp_path, open_page):
    record = make_record("q0", HOSTILE + "x" * 100_000, [make_box()], question=HOSTILE, category=HOSTILE)
    path = write_results(tmp_path, [record], bad_rows=[{"row": 1, "id": HOSTILE, "field": "image", "reason": HOSTILE}])
    page = open_page(path)
    assert page.evaluate("window.hacked") is None and is_quiet(page, path)
    assert "<img src=x onerror" in page.locator("article h3").inner_text()
    assert '"facts"' not in page.locator("body").inner_text()  # the data of the cards is not shown
    assert page.locator(".turn").nth(1).inner_text().count("x") > 100_000
    assert "1 bad rows" in page.locator(".note").all_inner_texts()[0]


def test_two_thousand_rollouts_stay_usable(tmp_path, open_page):
    path = write_results(tmp_path, make_records(2000))
    page = open_page(path)
    assert page.locator("#count").inner_text() == "2000 of 2000 rollouts"
    page.select_option("#status", "no_json")
    assert page.locator("#count").inner_text() == "667 of 2000 rollouts"
    page.fill("#search", "question 1999")
    assert page.locator("#count").inner_text() == "0 of 2000 rollouts"
    assert is_quiet(page, path)


def test_without_pictures_and_with_direct_answers(tmp_path, open_page):
    path = write_results(tmp_path, [make_record()], pictures=False, num_rounds=1)
    page = open_page(path)
    assert page.locator(".view .none").inner_text() == "no picture"
    assert page.locator(".crops .none").inner_text() == "answered directly"
    assert page.locator("#status").is_hidden()


# without a browser


def test_the_page_holds_tables_charts_and_the_run(tmp_path):
    path = write_results(tmp_path, make_records(6))
    text = path.read_text()
    for wanted in (
        "valid boxes",
        "Strict accuracy by category",
        "Strict accuracy by area",
        "share of the target",
        "f00d",
    ):
        assert wanted in text


def test_chart_data_by_hand():
    """Crops of half and of a hundredth of the image; the target is (0, 0, 50, 50) of 100 x 200."""
    data = ChartData()
    for number, (box, text) in enumerate([((0, 0, 50, 200), r"\boxed{B}"), ((0, 0, 10, 20), r"\boxed{A}")]):
        data.add(str(number), score_record(make_record(text=text, boxes=[make_box(box=box)])))
    assert [(bar.label, bar.value, bar.text) for bar in data.area_bars()] == [
        ("0 to 1 %", 0.0, "0 %, n = 1"), ("30 to 100 %", 1.0, "100 %, n = 1"),
    ]  # fmt: skip
    assert [bar.text for bar in data.coverage_bars()] == ["1"] + ["0"] * 8 + ["1"]
    assert ChartData().area_bars() == ChartData().coverage_bars() == []


def test_bars_are_drawn_to_scale_and_escaped():
    drawn = bar_chart("a & b", [Bar("<i>", 0.5, 0.1, "n = 2"), Bar("all", 1.0, None, "")])
    assert 'width="100.0"' in drawn and 'width="200.0"' in drawn and drawn.count('class="error"') == 1
    assert "&lt;i&gt;" in drawn and "a &amp; b" in drawn and "<i>" not in drawn
