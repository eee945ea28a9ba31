"""One row: what is accepted, what is refused, and what the refusal says."""

import io
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mgpo_trl.data.schema import COLUMNS, DataError, RowError, check_rows, normalise_row


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (60, 40)).save(path)
    return str(path)


def make_row(photo, **changes):
    row = {"image": photo, "question": "Which card?", "choices": ["red", "blue"], "answer": "blue"}
    return {name: value for name, value in (row | changes).items() if value is not ...}


def normalise(row, **options):
    return normalise_row(row, index=3, source="data.jsonl", **options)


def test_canonical_row(photo):
    row = make_row(photo, id=17, target_boxes=[[1, 2, 30, 20.5]], category="cards", unrelated=object())
    assert normalise(row) == {
        "id": "17",
        "image": {"bytes": None, "path": photo},
        "question": "Which card?",
        "choices": ["red", "blue"],
        "answer": "B",
        "target_boxes": [[1, 2, 30, 20.5]],
        "category": "cards",
        "group": None,
    }


def test_optional_fields_become_none_and_the_id_is_the_position(photo):
    row = normalise(make_row(photo, choices="", answer=" a dog ", target_boxes=[], category=""))
    assert set(row) == set(COLUMNS)
    assert row["id"] == "3"
    assert row["answer"] == "a dog"
    assert row["choices"] is row["target_boxes"] is row["category"] is row["group"] is None


@pytest.mark.parametrize(
    "choices",
    [
        ["red", "blue"],
        ["(A) red", "(B) blue"],
        "(A) red\n(B) blue",
        {"A": "red", "B": "blue"},
        {"A": "red", "B": "blue", "C": None},  # how Arrow stores rows with different keys
        '["red", "blue"]',
        '{"A": "red", "B": "blue"}',
    ],
)
@pytest.mark.parametrize("answer", ["B", "(B)", "blue", 1])
def test_every_layout_of_choices_and_answers(photo, choices, answer):
    row = normalise(make_row(photo, choices=choices, answer=answer))
    assert (row["choices"], row["answer"]) == (["red", "blue"], "B")


def test_free_answers_may_be_numbers(photo):
    assert normalise(make_row(photo, choices=None, answer=7))["answer"] == "7"


@pytest.mark.parametrize("boxes", [[1, 2, 30, 20], [[1, 2, 30, 20]], "[1, 2, 30, 20]", "[[1, 2, 30, 20]]"])
def test_one_target_box_needs_no_list(photo, boxes):
    assert normalise(make_row(photo, target_boxes=boxes))["target_boxes"] == [[1, 2, 30, 20]]


@pytest.mark.parametrize("image", ["path", "bytes", "struct", "pil"])
def test_forms_of_an_image(photo, image):
    with open(photo, "rb") as file:
        data = file.read()
    forms = {"path": photo, "bytes": data, "struct": {"bytes": data, "path": "x.png"}, "pil": Image.open(photo).copy()}
    struct = normalise(make_row(photo, image=forms[image]))["image"]
    opened = Image.open(struct["path"] if struct["bytes"] is None else io.BytesIO(struct["bytes"]))
    assert opened.size == (60, 40)
    assert (struct["bytes"] is None) == (image == "path")


BAD = {
    "no image": ({"image": ...}, "image", "is missing"),
    "image of another type": ({"image": 5}, "image", "int"),
    "missing image file": ({"image": "/nowhere/x.png"}, "image", "'/nowhere/x.png' is not a file"),
    "no question": ({"question": "  "}, "question", "missing or empty"),
    "no answer": ({"answer": ...}, "answer", "missing or empty (None)"),
    "empty answer": ({"answer": ""}, "answer", "missing or empty"),
    "NaN answer": ({"answer": float("nan")}, "answer", "missing or empty"),
    "answer of another type": ({"answer": ["B"]}, "answer", "['B']"),
    "boolean answer": ({"answer": True}, "answer", "True"),
    "answer not offered": ({"answer": "green"}, "answer", "green"),
    "letter not offered": ({"answer": "C"}, "answer", "'C'"),
    "index not offered": ({"answer": 2}, "answer", "2"),
    "one choice": ({"choices": ["red"]}, "choices", "red"),
    "empty choice": ({"choices": ["red", ""]}, "choices", "red"),
    "choices of another type": ({"choices": 7}, "choices", "7"),
    "box outside": ({"target_boxes": [[1, 2, 61, 20]]}, "target_boxes", "60 x 40"),
    "negative box": ({"target_boxes": [[-1, 2, 6, 20]]}, "target_boxes", "[-1, 2, 6, 20]"),
    "inverted box": ({"target_boxes": [[30, 2, 1, 20]]}, "target_boxes", "[30, 2, 1, 20]"),
    "empty box": ({"target_boxes": [[3, 2, 3, 20]]}, "target_boxes", "[3, 2, 3, 20]"),
    "three numbers": ({"target_boxes": [[3, 2, 3]]}, "target_boxes", "[3, 2, 3]"),
    "text in a box": ({"target_boxes": [["1", 2, 3, 4]]}, "target_boxes", "'1'"),
    "NaN in a box": ({"target_boxes": [[float("nan"), 2, 3, 4]]}, "target_boxes", "nan"),
    "huge integer in a box": ({"target_boxes": [[1, 2, 10**400, 4]]}, "target_boxes", "1000"),
    "boxes of another type": ({"target_boxes": {"x": 1}}, "target_boxes", "{'x': 1}"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_names_source_row_field_and_value(photo, case):
    changes, field, said = BAD[case]
    with pytest.raises(RowError) as caught:
        normalise(make_row(photo, id="q3", **changes))
    message = str(caught.value)
    assert message.startswith(f"data.jsonl, row 3 counted from 0 (id 'q3'), field `{field}`: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes"),
        (b"not an image", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read"),
        (b"P6 0 40 255\n", "cannot be read"),  # a header that promises no pixels
    ],
)
def test_unreadable_images(tmp_path, content, said):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    for image in (str(path), {"bytes": content, "path": str(path)}):
        with pytest.raises(RowError, match=f"field `image`: .*broken.png.*{said}"):
            normalise(make_row(image))
    assert normalise(make_row(str(path)), check_images=False)["image"]["path"] == str(path)


def test_a_truncated_image_is_found_by_the_full_check_only(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((400, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    assert normalise(make_row(str(path)))["id"] == "3"
    with pytest.raises(RowError, match="cut.jpg"):
        normalise(make_row(str(path)), check_images="full")


@pytest.mark.parametrize("level", [True, "full"])
def test_an_image_that_no_model_can_be_shown(tmp_path, level):
    Image.new("RGB", (2010, 10)).save(tmp_path / "strip.png")
    with pytest.raises(RowError, match="strip.png' has 2010 x 10 pixels: more than 200 times as long.*Cut it"):
        normalise(make_row(str(tmp_path / "strip.png")), check_images=level)
    Image.new("RGB", (10, 2000)).save(tmp_path / "strip.png")
    assert normalise(make_row(str(tmp_path / "strip.png")), check_images=level)["id"] == "3"


def test_an_image_of_no_pixels():
    with pytest.raises(RowError, match="field `image`: has no pixels .*0 x 40"):
        normalise(make_row(Image.new("RGB", (0, 40))))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp", "mpo", "avif"])
@pytest.mark.parametrize("check", ["header", "full"])
def test_target_boxes_are_checked_against_the_upright_image(tmp_path, suffix, check):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    assert normalise(make_row(str(path), target_boxes=[0, 0, 40, 60]), check_images=check)
    with pytest.raises(RowError, match="40 x 60"):
        normalise(make_row(str(path), target_boxes=[0, 0, 60, 40]), check_images=check)


def test_an_unknown_check_is_refused(photo):
    with pytest.raises(ValueError, match="`check_images` must be one of .*'sometimes'"):
        normalise(make_row(photo), check_images="sometimes")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=6))
def test_any_value_of_any_field_is_a_row_or_a_row_error(value):
    for name in COLUMNS:
        row = {"image": "x.png", "question": "q", "answer": "a", name: value}
        try:
            canonical = normalise_row(row, index=0, check_images=False)
        except RowError as error:
            assert error.field in COLUMNS
        else:
            assert isinstance(canonical["answer"], str) and canonical["answer"]


def bad_rows(photo):
    return [make_row(photo), make_row(photo, answer=...), make_row("/nowhere/x.png"), make_row(photo, id="z")]


def test_the_first_bad_row_stops(photo):
    with pytest.raises(RowError, match="row 1 counted from 0 .*field `answer`"):
        check_rows(bad_rows(photo))


def test_bad_rows_are_skipped_and_listed(photo):
    good, bad = check_rows(bad_rows(photo), skip_bad_rows=True)
    assert [row["id"] for row in good] == ["0", "z"]
    assert [(entry["row"], entry["id"], entry["field"]) for entry in bad] == [(1, "1", "answer"), (2, "2", "image")]
    assert all(set(entry) == {"row", "id", "field", "reason"} and entry["reason"] for entry in bad)


def test_duplicate_ids(photo):
    rows = [make_row(photo, id="a"), make_row(photo, id="b"), make_row(photo, id="a")]
    with pytest.raises(RowError, match=r"row 2 .*\(id 'a'\), field `id`: is the id of row 0 already"):
        check_rows(rows)
    good, bad = check_rows(rows, skip_bad_rows=True)
    assert [row["id"] for row in good] == ["a", "b"]
    assert [entry["row"] for entry in bad] == [2]


def test_nothing_to_use(photo):
    with pytest.raises(DataError, match="empty.jsonl has no rows"):
        check_rows([], source="empty.jsonl")
    with pytest.raises(DataError, match="All 2 rows of .* are bad; the first, row 0, field `answer`"):
        check_rows([make_row(photo, answer=None)] * 2, skip_bad_rows=True)


def test_order_is_kept_over_many_threads(photo):
    rows = [make_row(photo, answer=None if i % 7 == 3 else "A") for i in range(500)]
    good, bad = check_rows(rows, skip_bad_rows=True)
    assert [int(row["id"]) for row in good] == [i for i in range(500) if i % 7 != 3]
    assert [entry["row"] for entry in bad] == [i for i in range(500) if i % 7 == 3]


def test_progress_only_for_many_rows(photo, capsys):
    row = make_row(photo)
    check_rows([row] * 1000, check_images=False, skip_bad_rows=True)
    assert "Checking rows" not in capsys.readouterr().err
    check_rows([row | {"id": str(i)} for i in range(1001)], check_images=False)
    assert "1001/1001" in capsys.readouterr().err


def test_importing_the_data_package_imports_no_torch():
    code = "import sys, mgpo_trl.data; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
