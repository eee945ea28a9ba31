"""The layouts in which the published sets come, and every way in which one of their rows can be bad."""

import base64
import io
import json

import datasets
import pytest
from benchmark_rows import (
    SUFFIXES,
    as_base64,
    hr_bench_rows,
    jpeg,
    mgpo_rows,
    mme_rows,
    vstar_rows,
    with_images,
    write,
    write_vstar,
)
from PIL import Image

from mgpo_trl import scripts
from mgpo_trl.data import DataError, RowError, load_rows
from mgpo_trl.data.benchmarks import base64_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What is decoded stays in a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(name, path, **options):
    return load_rows(f"{name}:{path}", **options)


def only_bad_row(name, path, said):
    """The one bad row of a set: it stops a load, and is the only one left out where that is allowed."""
    with pytest.raises(RowError, match=said):
        load(name, path, check_images="full")
    loaded = load(name, path, skip_bad_rows=True, check_images="full")
    (bad,) = loaded.bad_rows
    return bad["row"], bad["id"], bad["field"], len(loaded.dataset)


def image_bytes(row):
    if row["image"]["bytes"] is not None:
        return row["image"]["bytes"]
    with open(row["image"]["path"], "rb") as file:
        return file.read()


# base64 tables


@pytest.mark.parametrize("kind", SUFFIXES)
def test_every_table_of_hr_bench_and_mme_realworld(tmp_path, kind):
    rows = load("hrbench-4k", write(tmp_path / "hr_bench_4k", hr_bench_rows(), kind)).dataset
    assert {row["choices"]["ABCD".index(row["answer"])] for row in rows} == {"blue"}
    assert rows["id"][:3] == ["0/0", "1/1", "2/2"] and len(set(rows["group"])) == 2
    assert [image_bytes(row) for row in rows] == [base64.b64decode(row["image"]) for row in hr_bench_rows()]
    rows = load("mme-realworld", write(tmp_path / "train-00000", mme_rows(), kind)).dataset
    assert rows["category"][:] == ["Perception/OCR", "Reasoning/AD", "Perception/RS"]
    assert rows["answer"][:] == ["C", "E", "A"] and rows["id"][:] == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["parquet", "tsv"])
def test_both_sizes_of_hr_bench_in_one_directory(tmp_path, kind):
    write(tmp_path / "hr_bench_4k", hr_bench_rows(1), kind)
    write(tmp_path / "hr_bench_8k", hr_bench_rows(2), kind)
    assert len(load("hrbench-4k", tmp_path).dataset) == 4
    assert len(load("hrbench-8k", tmp_path).dataset) == 8
    (tmp_path / f"hr_bench_4k.{kind}").unlink()
    with pytest.raises(DataError, match="no table with `4k` in its name, only hr_bench_8k"):
        load("hrbench-4k", tmp_path)


def test_a_limit_decodes_no_more_than_its_rows(tmp_path, monkeypatch):
    for number in range(2):
        write(tmp_path / "data" / f"train-0000{number}-of-00002", mme_rows(3, first=3 * number), "parquet")
    decoded = []
    decode = base64_images.decoded_image
    monkeypatch.setattr(base64_images, "decoded_image", lambda text: decoded.append(text) or decode(text))
    assert load("mme-realworld", tmp_path, limit=4).dataset["id"][:] == list("0123")
    assert len(decoded) == 4
    assert load("mme-realworld", tmp_path).dataset["id"][:] == list("012345")


def test_a_limit_holds_no_image_in_memory(tmp_path):
    """Rows are read one at a time, those of a slice too: 400 images of 8K are gigabytes."""
    from mgpo_trl.data.benchmarks import BENCHMARKS, load_benchmark
    from mgpo_trl.data.huggingface import load_huggingface

    sources = [
        load_benchmark(BENCHMARKS["hrbench-4k"], str(write(tmp_path / "x", hr_bench_rows(), "parquet"))),
        load_huggingface(with_images([{"question": "?", "answer": "7"}] * 8)),
    ]
    for source in sources:
        part = source.rows[2:6]
        assert not isinstance(part, list) and len(part) == 4 and len(part[:3]) == 3
        assert part[0] == source.rows[2] and part[1:][0] == source.rows[3] and list(part) == list(source.rows)[2:6]


def test_base64_with_a_head_and_line_breaks(tmp_path):
    rows = mme_rows()
    rows[0]["bytes"] = "data:image/jpeg;base64," + base64.encodebytes(jpeg(0)).decode()
    assert image_bytes(load("mme-realworld", write(tmp_path / "x", rows, "parquet")).dataset[0]) == jpeg(0)


def cut_off():
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 50).convert("RGB").save(whole, "JPEG")
    return base64.b64encode(whole.getvalue()[:-2000]).decode()


BAD_IMAGES = {
    "no base64": ("@@@@" + as_base64(0), "no valid base64"),
    "cut base64": (as_base64(0)[:-3], "no valid base64"),
    "empty": ("", "no valid base64"),
    "no image": (base64.b64encode(b"this is no image").decode(), "cannot be decoded|cannot be read"),
    "cut off image": (cut_off(), "cut off"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
@pytest.mark.parametrize(("name", "column"), [("hrbench-4k", "image"), ("mme-realworld-lite", "bytes")])
def test_a_bad_image_of_a_table(tmp_path, name, column, case):
    value, said = BAD_IMAGES[case]
    rows = hr_bench_rows() if name == "hrbench-4k" else mme_rows()
    rows[1][column] = value
    identity = "1/1" if name == "hrbench-4k" else "1"
    path = write(tmp_path / "x", rows, "parquet")
    assert only_bad_row(name, path, said) == (1, identity, "image", len(rows) - 1)


def test_an_answer_that_is_not_offered(tmp_path):
    rows = mme_rows()
    rows[2]["answer"] = "F"
    path = write(tmp_path / "x", rows, "parquet")
    assert only_bad_row("mme-realworld", path, "'F'") == (2, "2", "answer", 2)


def test_the_hub_is_read_a_few_rows_at_a_time(monkeypatch):
    """A published file has all rows in one row group, which the loader would hold at once."""
    asked = []

    def refuse(*arguments, **options):
        asked.append((*arguments, options))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in ("hrbench-8k", "mgpo-train"):
        with pytest.raises(DataError, match="no network"):
            load_rows(name)
    assert asked[0] == ("DreamMr/HR-Bench", "hrbench_version_split", {"split": "hrbench_8k", "batch_size": 4})
    assert asked[1] == ("xinyu1205/mme_realworld_train_21690", None, {"split": "train"})


# V*


def test_vstar_whose_json_has_sentences(tmp_path):
    write_vstar(tmp_path)
    rows = load("vstar", tmp_path).dataset
    assert rows["answer"][:] == ["B", "C", "B"]  # the JSON has the right option first: all would be A
    assert rows["choices"][1] == ["light red", "blue", "red", "white"]
    assert rows["target_boxes"][:] == [[[5, 6, 25, 16]], [[5, 6, 25, 17]], [[5, 6, 25, 18]]]
    assert [image_bytes(row) for row in rows] == [jpeg(shade) for shade in (0, 10, 20)]


def edit(folder, **changes):
    path = folder / "direct_attributes/sa_2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def another_option_first(folder):
    edit(folder, options=["The color of the dustpan is blue.", "The color of the dustpan is red."])


def json_cut_off(folder):
    (folder / "direct_attributes/sa_2.json").write_text("{")


def json_list(folder):
    (folder / "direct_attributes/sa_2.json").write_text("[]")


def box_of_three_numbers(folder):
    edit(folder, bbox=[[1, 2, 3]])


def box_outside(folder):
    edit(folder, bbox=[[50, 2, 30, 3]])


def no_image(folder):
    (folder / "direct_attributes/sa_2.jpg").unlink()


def image_cut_off(folder):
    path = folder / "direct_attributes/sa_2.jpg"
    path.write_bytes(path.read_bytes()[:-60])


def letters_with_a_gap(folder):
    path = folder / "test_questions.jsonl"
    path.write_text(path.read_text().replace("(C) red", "(X) red"))


def label_not_offered(folder):
    rows = vstar_rows()
    rows[1]["label"] = "E"
    write(folder / "test_questions", rows, "jsonl")


BAD_VSTAR = {
    another_option_first: ("answer", "is 'C' = 'red' by `label`, but the JSON .*'The color of the dustpan is blue.'"),
    json_cut_off: ("target_boxes", "sa_2.json'"),
    json_list: ("target_boxes", "no JSON object"),
    box_of_three_numbers: ("target_boxes", "x, y, width, height"),
    box_outside: ("target_boxes", "reaches outside the image"),
    no_image: ("image", "sa_2.jpg' is not a file"),
    image_cut_off: ("image", "cut off"),
    letters_with_a_gap: ("text", "no lettered options"),
    label_not_offered: ("answer", "'E'"),
}


@pytest.mark.parametrize("damage", BAD_VSTAR)
def test_a_bad_row_of_vstar(tmp_path, damage):
    write_vstar(tmp_path)
    damage(tmp_path)
    field, said = BAD_VSTAR[damage]
    assert only_bad_row("vstar", tmp_path, said) == (1, "direct_attributes/1", field, 2)


@pytest.mark.parametrize("labels", [(), ("category", "label")])
def test_mirror_of_vstar_with_plain_columns_and_class_labels(tmp_path, labels):
    rows = [{name: value for name, value in row.items() if name != "image"} for row in vstar_rows()]
    with_images(rows, labels=labels).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    loaded = load("vstar-lmms", tmp_path).dataset
    assert loaded["answer"][:] == ["B", "C", "B"] and loaded["category"][2] == "relative_position"
    assert loaded["id"][2] == "relative_position/2"


# MGPO


@pytest.mark.parametrize("answer", ["answer", "ground_truth", "reward_model", "JSON text"])
@pytest.mark.parametrize("layout", ["image", "image_path", "both", "path in image"])
def test_every_layout_of_mgpo(tmp_path, answer, layout):
    rows = mgpo_rows("reward_model" if answer == "JSON text" else answer)
    (tmp_path / "images").mkdir()
    for index, row in enumerate(rows):
        (tmp_path / "images" / f"{index}.jpg").write_bytes(jpeg(10 * index))
        row.update({"image_path": f"images/{index}.jpg"} if layout in ("image_path", "both") else {})
        row.update({"image": None} if layout == "both" else {})
        row.update({"image": f"images/{index}.jpg"} if layout == "path in image" else {})
        if answer == "JSON text":
            row["reward_model"] = json.dumps(row["reward_model"])
    if layout == "image":
        with_images(rows).to_parquet(tmp_path / "train-00000.parquet")
    else:
        write(tmp_path / "train-00000", rows, "parquet")
    loaded = load("mgpo-train", tmp_path).dataset
    assert loaded["answer"][:] == ["C"] * 3 and loaded["question"][0] == "What is number 0?"
    assert [image_bytes(row) for row in loaded] == [jpeg(shade) for shade in (0, 10, 20)]


def test_a_file_of_the_authors_is_named(tmp_path):
    rows = [row | {"image_path": "/data/authors/7.jpg"} for row in mgpo_rows()]
    with pytest.raises(RowError, match="row 0 .*field `image`: '/data/authors/7.jpg' is not a file"):
        load("mgpo-train", write(tmp_path / "train", rows, "parquet"))


def test_a_column_of_another_name(tmp_path):
    rows = [{("gold" if name == "answer" else name): value for name, value in row.items()} for row in mme_rows()]
    path = write(tmp_path / "x", rows, "parquet")
    with pytest.raises(DataError, match="has no column `answer`, only .*gold"):
        load("mme-realworld", path)
    assert load("mme-realworld", path, columns={"answer": "gold"}).dataset["answer"][:] == ["C", "E", "A"]
    with pytest.raises(DataError, match="has no column `silver`"):
        load("mme-realworld", path, columns={"answer": "silver"})


# Pixmo

PERCENT = [{"x": 25.0, "y": 50.0}, {"x": 100.0, "y": 0.0}]
PIXELS = [{"x": 15.0, "y": 20.0}, {"x": 60.0, "y": 0.0}]


def pixmo_rows(points, number=3):
    return [
        {"image_url": f"https://example.org/{n}.jpg", "image_sha256": f"{n}" * 64, "points": points, "count": 2,
         "label": "cups"}
        for n in range(number)
    ]  # fmt: skip


def write_pixmo(folder, rows, split):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(len(rows)):
        (folder / "images" / f"{str(index) * 64}.jpg").write_bytes(jpeg(10 * index))
    write(folder / "data" / f"{split}-00000", rows, "parquet")
    return folder


def two_lists(points):
    return {"x": [point["x"] for point in points], "y": [point["y"] for point in points]}


@pytest.mark.parametrize("layout", [list, two_lists])
@pytest.mark.parametrize(
    ("name", "split", "points"), [("pixmo-points", "train", PERCENT), ("pixmo-count", "test", PIXELS)]
)
def test_points_are_pixels_of_the_original(tmp_path, name, split, points, layout):
    rows = load(name, write_pixmo(tmp_path, pixmo_rows(layout(points)), split)).dataset
    assert rows["points"][:] == [[[15.0, 20.0], [60.0, 0.0]]] * 3 and rows["answer"][:] == ["2"] * 3
    assert [image_bytes(row) for row in rows] == [jpeg(0), jpeg(10), jpeg(20)]


def test_pixmo_with_the_images_inside(tmp_path):
    with_images(pixmo_rows(PERCENT)).to_parquet(tmp_path / "train-00000.parquet")
    rows = load("pixmo-points", tmp_path).dataset
    assert rows["points"][:] == [[[15.0, 20.0], [60.0, 0.0]]] * 3 and image_bytes(rows[2]) == jpeg(20)


BAD_PIXMO = {
    "a point outside": ({"points": [{"x": 500.0, "y": 5.0}] * 2}, "points", r"\(500.0, 5.0\) percent, .*outside"),
    "too few points": ({"count": 3}, "points", "holds 2 points, but `count` is 3"),
    "a point without x": ({"points": [{"x": None, "y": 1.0}] * 2}, "points", "Give x and y of every point"),
    "no file": ({"image_sha256": "f" * 64}, "image", f"{'f' * 64}'. Fetch it"),
    "no label": ({"label": ""}, "label", "is empty"),
    "no count": ({"count": None}, "count", "is None"),
}


@pytest.mark.parametrize("case", BAD_PIXMO)
def test_a_bad_row_of_pixmo(tmp_path, case):
    changes, field, said = BAD_PIXMO[case]
    rows = pixmo_rows(PERCENT)
    rows[1] |= changes
    assert only_bad_row("pixmo-points", write_pixmo(tmp_path, rows, "train"), said) == (1, "1", field, 2)


# what the commands open


def parse(tmp_path, *arguments):
    return scripts.parse_training([*arguments, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"])[:2]


def test_training_takes_the_training_split_and_passes_points_and_extra_columns(tmp_path):
    write_pixmo(tmp_path, pixmo_rows(PIXELS), "train")
    write_pixmo(tmp_path, pixmo_rows(None, 1), "test")
    name = f"pixmo-count:{tmp_path}"
    script_args, args = parse(tmp_path, "--dataset_name", name, "--extra_columns", "image_url", "points")
    train, evaluation = scripts.open_training_sets(script_args, args)
    assert evaluation is None and len(train.dataset) == 3
    assert train.dataset[1]["points"] == [[15.0, 20.0], [60.0, 0.0]]
    assert train.dataset[1]["image_url"] == "https://example.org/1.jpg"
    assert len(scripts.open_rows(name).dataset) == 1  # as eval.py opens it
    script_args.extra_columns = ["weight"]
    with pytest.raises(DataError, match="There is no column `weight`"):
        scripts.open_training_sets(script_args, args)


def test_a_split_that_is_not_there_is_not_replaced(tmp_path):
    write_pixmo(tmp_path, pixmo_rows(PIXELS), "train")
    with pytest.raises(DataError, match="no split `test`. It has train"):
        load("pixmo-count", tmp_path)


def test_evaluation_during_training_takes_the_split_of_the_set(tmp_path):
    write_pixmo(tmp_path / "pixmo", pixmo_rows(PIXELS), "train")
    with_images(mgpo_rows()).to_parquet(tmp_path / "mgpo.parquet")
    names = ["--dataset_name", f"pixmo-count:{tmp_path / 'pixmo'}", "--eval_dataset_name"]
    script_args, args = parse(tmp_path, *names, f"mgpo-eval:{tmp_path / 'mgpo.parquet'}", "--eval_strategy", "steps")
    script_args.extra_columns = []
    assert len(scripts.open_training_sets(script_args, args)[1].dataset) == 3
