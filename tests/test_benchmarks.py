"""Published sets in exactly their formats, on small rows, through the real loading path."""

import base64
import csv
import io
import json

import datasets
import pytest
from PIL import Image

from mgpo_trl.data import DataError, RowError, load_rows
from mgpo_trl.data.benchmarks import BENCHMARKS, find_benchmark
from mgpo_trl.data.benchmarks.mme_realworld import short_category
from mgpo_trl.data.build_mgpo_train import build, main, split_overlap
from mgpo_trl.images import open_image


def jpeg(colour, size=(64, 48)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def base64_of(data):
    return base64.b64encode(data).decode()


def parquet(path, rows, features=None):
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def saved(path, rows):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path


def tsv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def load(name, path, **options):
    return load_rows(f"{name}:{path}", **options)


# V*

OPTIONS = ["rubber", "cotton", "kevlar", "leather"]
TAIL = "Answer with the option's letter from the given choices directly."


def vstar_text(options):
    return "\n".join(["What is the glove made of?", *(f"({'ABCD'[i]}) {o}" for i, o in enumerate(options)), TAIL])


@pytest.fixture
def vstar(tmp_path):
    """The files of the repository: the right option stands first in the JSON and anywhere in the text."""
    rows = []
    for number, (label, options) in enumerate([("A", OPTIONS), ("C", ["cotton", "kevlar", "rubber", "leather"])]):
        name = f"direct_attributes/sa_{number}.jpg"
        (tmp_path / "direct_attributes").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg((number * 90, 0, 0)))
        facts = {"question": "?", "options": OPTIONS, "target_object": ["glove"], "bbox": [[10, 5, 20, 30]]}
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(facts))
        rows.append({"image": name, "text": vstar_text(options), "category": "direct_attributes", "label": label,
                     "question_id": number})  # fmt: skip
    (tmp_path / "test_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_vstar_takes_the_order_of_the_text_and_boxes_of_the_json(vstar):
    rows = list(load("vstar", vstar).dataset)
    assert [row["answer"] for row in rows] == ["A", "C"]
    assert rows[1]["choices"] == ["cotton", "kevlar", "rubber", "leather"]
    assert {row["choices"]["ABCD".index(row["answer"])] for row in rows} == {"rubber"}
    assert rows[0]["question"] == "What is the glove made of?"
    assert rows[0]["target_boxes"] == [[10, 5, 30, 35]] and rows[0]["category"] == "direct_attributes"
    assert [row["id"] for row in rows] == ["direct_attributes/0", "direct_attributes/1"]
    assert open_image(rows[0]["image"], "0").size == (64, 48)


def test_vstar_names_a_label_that_contradicts_the_json(vstar):
    path = vstar / "test_questions.jsonl"
    path.write_text(path.read_text().replace('"label": "C"', '"label": "A"'))
    with pytest.raises(RowError, match="row 1 .*field `answer`.*'A' = 'cotton'.*'rubber' first"):
        load("vstar", vstar)
    loaded = load("vstar", vstar, skip_bad_rows=True)
    assert len(loaded.dataset) == 1 and loaded.bad_rows[0]["field"] == "answer"


def test_vstar_without_its_questions_or_images(vstar):
    (vstar / "direct_attributes" / "sa_1.jpg").unlink()
    with pytest.raises(RowError, match="sa_1.jpg' is not a file"):
        load("vstar", vstar)
    (vstar / "test_questions.jsonl").unlink()
    with pytest.raises(DataError, match="has no test_questions.jsonl"):
        load("vstar", vstar)


def test_vstar_mirrors(tmp_path):
    image = {"bytes": jpeg("red"), "path": None}
    features = datasets.Features({
        "image": datasets.Image(decode=False), "text": datasets.Value("string"), "category": datasets.Value("string"),
        "label": datasets.Value("string"), "question_id": datasets.Value("string"),
    })  # fmt: skip
    row = {
        "image": image,
        "text": vstar_text(OPTIONS),
        "category": "relative_position",
        "label": "D",
        "question_id": "7",
    }
    (one,) = load("vstar-lmms", parquet(tmp_path / "lmms.parquet", [row], features)).dataset
    assert (one["answer"], one["choices"], one["id"]) == ("D", OPTIONS, "relative_position/7")
    assert one["image"]["bytes"] == image["bytes"]
    row = {"image": image, "category": "relative_position", "question_id": 7, "question": "Left?"}
    row |= {"choices": ["yes", "no"], "answer": 1}
    (one,) = load("vstar-ohjoonhee", saved(tmp_path / "ohjoonhee", [row])).dataset
    assert (one["answer"], one["id"], one["target_boxes"]) == ("B", "relative_position/7", None)


# HR-Bench


def hrbench_rows(images=2):
    rows = []
    for image in range(images):
        for cycle in range(4):
            options = OPTIONS[cycle:] + OPTIONS[:cycle]
            rows.append({
                "index": image * 4 + cycle, "question": "What is it made of?", "answer": "ABCD"[-cycle % 4],
                "category": "single" if image % 2 else "cross", **dict(zip("ABCD", options, strict=True)),
                "cycle_category": f"cycle_{cycle}", "image": base64_of(jpeg((60 * image, 10, 0))),
            })  # fmt: skip
    return rows


@pytest.mark.parametrize("write", [parquet, tsv])
def test_hrbench_groups_the_four_orders_of_an_image(tmp_path, write):
    path = write(tmp_path / ("set.parquet" if write is parquet else "set.tsv"), hrbench_rows())
    rows = list(load("hrbench-4k", path).dataset)
    assert [row["answer"] for row in rows] == list("ADCB") * 2
    assert {row["choices"]["ABCD".index(row["answer"])] for row in rows} == {"rubber"}
    groups = [row["group"] for row in rows]
    assert len(set(groups)) == 2 and groups == [groups[0]] * 4 + [groups[4]] * 4
    assert len({row["id"] for row in rows}) == 8 and rows[0]["category"] == "cross"
    assert rows[0]["image"]["bytes"] == jpeg((0, 10, 0))  # not encoded again


def test_corrupt_base64_and_a_cut_off_picture_are_bad_rows(tmp_path):
    rows = hrbench_rows(1)
    rows[1]["image"] = "%%%"
    rows[2]["image"] = base64_of(jpeg("red", (600, 400))[:300])
    rows[3]["answer"] = "E"
    path = parquet(tmp_path / "set.parquet", rows)
    with pytest.raises(RowError, match="row 1 .*field `image`.*no valid base64"):
        load("hrbench-8k", path)
    loaded = load("hrbench-8k", path, skip_bad_rows=True, check_images="full")
    assert [(bad["row"], bad["field"]) for bad in loaded.bad_rows] == [(1, "image"), (2, "image"), (3, "answer")]
    assert [row["id"] for row in loaded.dataset] == ["0/cycle_0"]


# MME-RealWorld


def mme_rows(indices, colours=None, category="Perception/OCR in the Wild"):
    options = [f"({letter}) {text}" for letter, text in zip("ABCDE", [*OPTIONS, "not there"], strict=True)]
    return [
        {"index": index, "bytes": base64_of(jpeg((colours or {}).get(index, (index, 0, 9)))), "question": "Which?",
         "multi-choice options": options, "answer": "E", "category": category, "l2-category": "sign"}
        for index in indices
    ]  # fmt: skip


def test_mme_realworld(tmp_path):
    (row,) = load("mme-realworld-lite", parquet(tmp_path / "lite.parquet", mme_rows([17]))).dataset
    assert (row["id"], row["answer"], row["category"]) == ("17", "E", "Perception/OCR")
    assert row["choices"] == [*OPTIONS, "not there"]
    assert short_category("Reasoning/Autonomous_Driving") == "Reasoning/AD"
    assert short_category("Reasoning/Something") == "Reasoning/Something" and short_category("v_star") == "v_star"


def test_the_training_set_is_the_full_set_without_lite(tmp_path):
    full = mme_rows([1, 2, 3, 4], {3: (2, 0, 9)})  # 3 shows the image of 2
    paths = [parquet(tmp_path / f"{name}.parquet", rows) for name, rows in (("full", full), ("lite", mme_rows([2])))]
    specs = [f"mme-realworld:{paths[0]}", f"mme-realworld-lite:{paths[1]}"]
    full[1]["question"] = "Another one?"
    parquet(paths[0], full)
    main(["--full", specs[0], "--lite", specs[1], "--output_dir", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert {key: record[key] for key in ("full", "lite", "same_index", "same_image", "kept", "another_question")} == {
        "full": 4, "lite": 1, "same_index": 1, "same_image": 1, "kept": 2, "another_question": 1,
    }  # fmt: skip
    kept = load_rows(str(tmp_path / "out")).dataset
    assert kept["id"] == ["1", "4"] and kept[0]["image"]["bytes"] == jpeg((1, 0, 9))
    with pytest.raises(ValueError, match="is not empty"):
        build(load_rows(specs[0]), load_rows(specs[1]), tmp_path / "out")
    with pytest.raises(ValueError, match="No row of .* is left"):
        build(load_rows(specs[1]), load_rows(specs[1]), tmp_path / "other")


def test_worked_example_of_the_overlap():
    full = [{"id": str(number), "question": "?", "group": group} for number, group in enumerate("abbc", 1)]
    kept, counts = split_overlap(full, [{"id": "2", "question": "?", "group": "b"}])
    assert kept == [0, 3] and (counts["same_index"], counts["same_image"]) == (1, 1)


# MGPO's own sets


def mgpo_row(**changed):
    choices = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", OPTIONS, strict=True))
    row = {"prompt": "<image> Which?", "question": "<image>\nWhich?", "choices": choices, "data_source": "v_star"}
    return {**row, **changed}


def test_mgpo_with_embedded_images_and_with_paths(tmp_path):
    image = {"bytes": jpeg("blue"), "path": None}
    (row,) = load("mgpo-eval", saved(tmp_path / "embedded", [mgpo_row(image=image, answer="B")])).dataset
    assert (row["question"], row["answer"], row["category"], row["choices"]) == ("Which?", "B", "v_star", OPTIONS)
    assert row["image"]["bytes"] == image["bytes"]
    (tmp_path / "paths").mkdir()
    (tmp_path / "paths" / "1.jpg").write_bytes(image["bytes"])
    other = mgpo_row(image_path="1.jpg", reward_model={"ground_truth": "C"}, data_source="Perception/Remote Sensing")
    parquet(tmp_path / "paths" / "train.parquet", [other])
    (row,) = load("mgpo-train", tmp_path / "paths").dataset
    assert (row["answer"], row["category"], row["group"]) == ("C", "Perception/RS", "1.jpg")
    assert row["image"]["path"] == str(tmp_path / "paths" / "1.jpg")


def test_mgpo_without_an_answer_names_the_columns(tmp_path):
    path = saved(tmp_path / "set", [mgpo_row(image={"bytes": jpeg("blue"), "path": None})])
    with pytest.raises(RowError, match="field `answer`.*none of answer, ground_truth, label.*'data_source'"):
        load("mgpo-train", path)


# counting


def test_pixmo_points_are_in_pixels_and_reach_the_reward(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "ab12.jpg").write_bytes(jpeg("green", (200, 100)))
    row = {"image_url": "https://x/y.jpg", "image_sha256": "ab12", "label": "oranges", "count": 2,
           "points": [{"x": 25.0, "y": 50.0}, {"x": 75.0, "y": 40.0}], "collection_method": "counting"}  # fmt: skip
    parquet(tmp_path / "train.parquet", [row])
    (found,) = load("pixmo-points", tmp_path).dataset
    assert (found["question"], found["answer"]) == ("How many oranges are in the image?", "2")
    assert found["points"] == [[50.0, 50.0], [150.0, 40.0]] and found["choices"] is None
    parquet(tmp_path / "train.parquet", [{**row, "points": None}])
    (counted,) = load("pixmo-count", tmp_path, split="train").dataset
    assert counted["answer"] == "2" and counted["points"] is None
    parquet(tmp_path / "train.parquet", [{**row, "image_sha256": "ffff"}])
    with pytest.raises(RowError, match="field `image`.*'ffff'. Fetch it there"):
        load("pixmo-points", tmp_path)


# names


def test_names_paths_and_mistakes(tmp_path):
    assert find_benchmark("vstar:/a/b:c") == (BENCHMARKS["vstar"], "/a/b:c")
    assert find_benchmark("vstar") == (BENCHMARKS["vstar"], None) and find_benchmark("owner/name:config") is None
    with pytest.raises(DataError, match="There is no"):
        load("vstar", tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no column `.*not DreamMr/HR-Bench"):
        load("hrbench-4k", parquet(tmp_path / "other.parquet", [{"question": "?"}]))
    with pytest.raises(DataError, match="cannot be (loaded|fetched)"):  # no network in tests
        load_rows("vstar")
