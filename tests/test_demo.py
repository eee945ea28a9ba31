"""The page of `mgpo demo` in a browser: upload, ask, move the region, ask again; and what it refuses and asks for."""

import os
import socket
import urllib.request
from importlib.util import find_spec

import pytest
from test_html_report import browser  # noqa: F401

from mgpo_trl import GroundedVQA
from mgpo_trl.answer_picture import mark_region
from mgpo_trl.conversation import Conversation
from mgpo_trl.images import open_image
from mgpo_trl.rollout import Sampled

CONVERSATION = Conversation(max_pixels=84 * 84, min_pixels=56 * 56, token_budgets=(10, 8), min_box_side=14)
NO_GRADIO = "Gradio is not installed: the demo page is not tested"
BOX = ("x1", "y1", "x2", "y2")

if not find_spec("gradio"):
    if os.environ.get("MGPO_REQUIRE_BROWSER") == "1":
        pytest.fail(f"MGPO_REQUIRE_BROWSER=1, and {NO_GRADIO}. Install it.", pytrace=False)
    pytest.skip(NO_GRADIO, allow_module_level=True)

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # as `mgpo demo` does, before the import


@pytest.fixture(scope="module")
def vqa(tiny_dir):
    """The tiny model; it writes a box, then a letter, and keeps the contexts that it was asked to go on with."""
    CONVERSATION.save(tiny_dir)
    vqa = GroundedVQA.from_pretrained(str(tiny_dir), device="cpu")
    (tiny_dir / "conversation.json").unlink()
    turns, chat = {1: '[{"bbox_2d": [10, 10, 40, 50]}]', 2: r"<b>It</b> is \boxed{B}."}, vqa.template.chat
    ids = {number: [*chat.tokenizer(text)["input_ids"], chat.end_of_turn_id] for number, text in turns.items()}
    vqa.asked = []

    def generate(contexts):
        vqa.asked += contexts
        return [Sampled(ids[context.round]) for context in contexts]

    vqa.generate = generate
    return vqa


@pytest.fixture(scope="module")
def served(vqa, tmp_path_factory):
    from mgpo_trl.demo import build_page, example_rows, serve

    page = build_page(vqa, "outputs/<i>run", example_rows("builtin:refer", tmp_path_factory.mktemp("examples")))
    with pytest.MonkeyPatch.context() as patch:
        hosts = looked_up(patch)
        yield serve(page)
        page.close(verbose=False)
    assert set(hosts) <= {"127.0.0.1", "localhost"} and not page.analytics_enabled


def looked_up(patch):
    """Names of hosts that this process looks up, from now on."""
    hosts, getaddrinfo = [], socket.getaddrinfo
    patch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **named: hosts.append(host) or getaddrinfo(host, *rest, **named)
    )
    return hosts


@pytest.fixture
def page(browser, served):  # noqa: F811
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(60_000)
    page.outside, page.complaints = [], []
    inside = (served, "data:", "blob:")
    page.on("request", lambda one: None if one.url.startswith(inside) else page.outside.append(one.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(served)
    page.wait_for_selector("#ask")
    yield page
    assert not page.outside and not page.complaints
    page.close()


@pytest.fixture
def scene(rows, tmp_path):
    path = tmp_path / "scene.png"
    path.write_bytes(rows[0]["image"]["bytes"])
    return path


def fill(page, scene, question="What is there?", choices="one\n two \n"):
    page.set_input_files("#image input[type=file]", scene)
    page.wait_for_selector("#image img")
    page.fill("#question textarea, #question input", question)
    page.fill("#choices textarea", choices)


def numbers(page):
    return [page.input_value(f"#{name} input") for name in BOX]


def wait_for_numbers(page, *wanted):
    for name, value in zip(BOX, wanted, strict=True):
        page.wait_for_function(f"document.querySelector('#{name} input').value === '{value}'")


def text_of(page, name):
    return page.input_value(f"#{name} textarea, #{name} input")


def picture_of(page, name):
    """The picture that the page shows, decoded from what the browser loaded."""
    source = page.get_attribute(f"#{name} img", "src")
    return open_image(page.request.get(source).body(), name)


def click_view(page, x, y):
    """Click the view at a place given as shares of its width and height."""
    bounds = page.locator("#view img").bounding_box()
    page.mouse.click(bounds["x"] + x * bounds["width"], bounds["y"] + y * bounds["height"])


def test_ask_see_move_the_region_and_ask_again(page, vqa, scene, rows):
    original = open_image(rows[0]["image"], "a")
    fill(page, scene)
    page.click("#ask")
    wait_for_numbers(page, 40, 40, 160, 200)
    assert (text_of(page, "answer"), text_of(page, "status")) == ("(B) two", "ok")
    assert [text_of(page, f"round-{n}") for n in (1, 2)] == [
        '[{"bbox_2d": [10, 10, 40, 50]}]', r"<b>It</b> is \boxed{B}.",
    ]  # fmt: skip
    assert picture_of(page, "crop").tobytes() == enlarged_crop(vqa, original, (40, 40, 160, 200)).tobytes()
    assert picture_of(page, "view").tobytes() == marked(vqa, original, (40, 40, 160, 200)).tobytes()

    click_view(page, 0.25, 0.5)
    page.wait_for_function("document.querySelector('#x2 input').value === ''")
    click_view(page, 0.5, 0.75)
    page.wait_for_function("document.querySelector('#x2 input').value !== ''")
    box = [int(number) for number in numbers(page)]
    assert box == pytest.approx([84, 168, 168, 252], abs=3)
    page.fill("#x1 input", "31")  # the rest by hand
    page.fill("#y1 input", "17")
    page.click("#again")
    page.wait_for_function("document.querySelector('#status textarea, #status input').value === 'by hand'")
    box = (31, 17, *box[2:])
    assert picture_of(page, "crop").tobytes() == enlarged_crop(vqa, original, box).tobytes()
    assert picture_of(page, "view").tobytes() == marked(vqa, original, box).tobytes()
    assert numbers(page) == [str(number) for number in box]
    assert vqa.asked[-1].images[1].tobytes() == vqa.template.chat.fit(original.crop(box)).tobytes()
    keep_screenshot(page)


def enlarged_crop(vqa, original, box):
    crop = vqa.template.chat.fit(original.crop(box))
    return mark_region(crop, crop.size, None)


def marked(vqa, original, box):
    return mark_region(vqa.template.chat.fit(original), original.size, box)


def keep_screenshot(page):
    """For people: MGPO_SCREENSHOTS names a directory."""
    if directory := os.environ.get("MGPO_SCREENSHOTS"):
        page.screenshot(path=os.path.join(directory, "demo.png"), full_page=True)


def test_refusals_are_messages_and_leave_the_page_as_it_is(page, vqa, scene):
    fill(page, scene)
    page.click("#ask")
    wait_for_numbers(page, 40, 40, 160, 200)
    page.fill("#x2 input", "99999")
    page.click("#again")
    message = page.locator("[data-testid=toast-body]").last
    page.wait_for_selector("[data-testid=toast-body]")
    assert "The region (40, 40, 99999, 200) is not inside the image of (336, 336) pixels" in message.inner_text()
    assert text_of(page, "answer") == "(B) two" and page.locator("#crop img").count() == 1
    page.fill("#y2 input", "")
    page.click("#again")
    page.get_by_text("The region has not all four numbers").wait_for()
    page.fill("#choices textarea", "<b>one</b>")
    page.click("#ask")
    page.get_by_text("`choices` must hold 2 to 26 texts, got 1").wait_for()
    page.fill("#question textarea, #question input", " ")
    page.click("#ask")
    page.get_by_text("There is no question. Type one first.").wait_for()
    assert page.get_by_text("Traceback").count() == 0


def test_a_file_that_is_no_image_is_refused(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    page.fill("#question textarea, #question input", "What?")
    page.click("#ask")
    page.get_by_text("There is no image. Upload one first.").wait_for()
    page.set_input_files("#image input[type=file]", broken)
    page.wait_for_selector("#image img", state="attached")
    page.click("#ask")
    page.get_by_text("The image: the image cannot be decoded").wait_for()


def test_an_example_fills_the_fields(page):
    page.get_by_text("What is on the").first.click()
    page.wait_for_selector("#image img")
    page.wait_for_function("document.querySelector('#question textarea, #question input').value.startsWith('What is')")
    assert text_of(page, "choices").splitlines()[0] == "vertical lines"
    assert "outputs/<i>run" in page.locator("p").all_inner_texts()  # a name is text


def test_the_browser_is_told_to_stay_inside(page, served):
    policy = page.request.get(served).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    page.evaluate("fetch('http://example.invalid/').catch(error => window.refused = true)")
    page.wait_for_function("window.refused")
    page.outside.clear()


# without a browser


def test_the_page_of_direct_answers_has_no_region(vqa):
    from mgpo_trl.demo import Handlers, build_page

    direct = GroundedVQA.__new__(GroundedVQA)
    direct.__dict__.update(vqa.__dict__, conversation=CONVERSATION.with_rounds(1))
    labels = {block.label for block in build_page(direct, "x").blocks.values() if hasattr(block, "label")}
    assert "Round 1" in labels and "Round 2" not in labels
    assert Handlers(direct).redraw(None, 1, 2, 3, 4) == {"__type__": "update"}


def test_the_region_between_two_clicks_is_rounded_outwards(rows):
    from mgpo_trl.demo import Shown

    shown = Shown(open_image(rows[0]["image"], "a").resize((84, 84)), (336, 336))  # shown at 504x504
    assert shown.region((252, 126), (125, 250)) == (83, 84, 169, 168)
    assert shown.region((503, 503), (503, 503)) == (335, 335, 336, 336)


def test_a_taken_port_is_an_error(vqa, served):
    from mgpo_trl.demo import build_page, serve

    with pytest.raises(OSError, match="port"):
        serve(build_page(vqa, "x"), port=int(served.rstrip("/").rpartition(":")[2]))


def test_the_command_serves_until_it_is_ended(tiny_dir, monkeypatch, capsys):
    import gradio

    from mgpo_trl.cli import main

    found = []

    def ended(page):
        found.append(urllib.request.urlopen(page.local_url).read().decode())
        page.close(verbose=False)

    monkeypatch.setattr(gradio.Blocks, "block_thread", ended)
    assert main(["demo", str(tiny_dir), "--device", "cpu", "--num_rounds", "1"]) == 0
    assert capsys.readouterr().out.startswith("http://127.0.0.1:") and "What is on the" in found[0]
    assert main(["demo", "./nowhere", "--examples", "./no.jsonl"]) == 1
    assert "no.jsonl" in capsys.readouterr().err  # before the model is loaded
