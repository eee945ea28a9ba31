"""Every source gives the same rows; bad sources say what is wrong with them."""

import csv
import json
import subprocess
import sys

import datasets
import pytest
from PIL import Image

from mgpo_trl.data import DataError, RowError, load_rows
from mgpo_trl.images import open_image

QUESTIONS = ["Which card?", "What is on the card?", "Where is the card?"]


def raw_rows():
    return [
        {
            "image": f"images/{index}.png",
            "question": question,
            "choices": ["red", "blue"],
            "answer": "B",
            "target_boxes": [[1, 2, 30, 20 + index]],
            "category": "cards",
            "group": "scene",
            "id": f"q{index}",
        }
        for index, question in enumerate(QUESTIONS)
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(len(QUESTIONS)):
        Image.new("RGB", (60, 40 + index), (index * 50, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


def with_file_name(rows):
    return [{"file_name": row["image"], **{k: v for k, v in row.items() if k != "image"}} for row in rows]


def hf_dataset(folder, kind="image"):
    rows = [row | {"image": str(folder / row["image"])} for row in raw_rows()]
    if kind in ("bytes", "struct"):
        for row in rows:
            with open(row["image"], "rb") as file:
                row["image"] = file.read()
    if kind == "struct":
        rows = [row | {"image": {"bytes": row["image"], "path": None}} for row in rows]
    dataset = datasets.Dataset.from_list(rows)
    return dataset.cast_column("image", datasets.Image()) if kind == "image" else dataset


def as_jsonl(folder):
    return write_jsonl(folder / "data.jsonl", raw_rows())


def as_json(folder):
    (folder / "data.json").write_text(json.dumps(raw_rows()))
    return folder / "data.json"


def as_absolute_jsonl(folder):
    rows = [row | {"image": str(folder / row["image"])} for row in raw_rows()]
    (folder / "elsewhere").mkdir()
    return write_jsonl(folder / "elsewhere" / "data.jsonl", rows)


def as_csv(folder):
    return write_csv(folder / "data.csv", raw_rows())


def as_folder(folder):
    write_jsonl(folder / "metadata.jsonl", with_file_name(raw_rows()))
    return folder


def as_csv_folder(folder):
    write_csv(folder / "metadata.csv", with_file_name(raw_rows()))
    return str(folder)


def as_memory(folder):
    return hf_dataset(folder)


def as_paths(folder):
    return hf_dataset(folder, "paths")


def as_bytes(folder):
    return hf_dataset(folder, "bytes")


def as_struct(folder):
    return hf_dataset(folder, "struct")


def as_saved(folder):
    hf_dataset(folder).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_dict(folder):
    datasets.DatasetDict({"train": hf_dataset(folder)}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_relative_saved(folder):
    datasets.Dataset.from_list(raw_rows()).save_to_disk(folder)
    return folder


def as_parquet(folder):
    hf_dataset(folder).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def as_parquet_folder(folder):
    (folder / "hub").mkdir()
    hf_dataset(folder).to_parquet(folder / "hub" / "train-00000-of-00001.parquet")
    return folder / "hub"


SOURCES = [
    as_jsonl, as_json, as_absolute_jsonl, as_csv, as_folder, as_csv_folder, as_memory, as_paths, as_bytes, as_struct,
    as_saved, as_saved_dict, as_relative_saved, as_parquet, as_parquet_folder,
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", [None, "train"])
def test_every_source_gives_the_same_rows(folder, source, split, monkeypatch):
    spec = source(folder)
    monkeypatch.chdir("/")  # nothing may depend on the working directory
    loaded = load_rows(spec, split=split)
    assert loaded.bad_rows == []
    assert loaded.dataset.features["image"] == datasets.Image(decode=False)
    for index, (row, raw) in enumerate(zip(loaded.dataset, raw_rows(), strict=True)):
        image = row.pop("image")
        raw.pop("image")
        assert row == raw
        assert open_image(image, "x").size == (60, 40 + index)
        assert open_image(image, "x").getpixel((0, 0)) == (index * 50, 0, 0)


def test_every_source_is_listed():
    names = [name for name, value in globals().items() if name.startswith("as_") and callable(value)]
    assert sorted(names) == sorted(source.__name__ for source in SOURCES)


def test_images_are_never_decoded(folder, monkeypatch):
    specs = [as_jsonl(folder), as_memory(folder), as_parquet(folder)]

    def decode(*_):
        raise AssertionError("an image was decoded")

    from PIL import PngImagePlugin

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    for spec in specs:
        assert len(list(load_rows(spec).dataset)) == 3


def test_columns_of_other_names(folder):
    rows = [{"picture": r["image"], "text": r["question"], "options": r["choices"], "label": "A"} for r in raw_rows()]
    columns = {"image": "picture", "question": "text", "choices": "options", "answer": "label"}
    path = write_jsonl(folder / "data.jsonl", rows)
    absolute = [row | {"picture": str(folder / row["picture"])} for row in rows]
    for spec in (path, datasets.Dataset.from_list(absolute)):
        loaded = load_rows(spec, columns=columns).dataset
        assert loaded[1]["question"] == QUESTIONS[1]
        assert loaded[1]["choices"] == ["red", "blue"]
        assert loaded[1]["id"] == "1"


def test_a_mapped_column_beats_one_of_our_name(folder):
    rows = [row | {"answer": "A", "label": "B"} for row in raw_rows()]
    absolute = [row | {"image": str(folder / row["image"])} for row in rows]
    for spec in (write_jsonl(folder / "data.jsonl", rows), datasets.Dataset.from_list(absolute)):
        assert load_rows(spec, columns={"answer": "label"}).dataset["answer"][:] == ["B", "B", "B"]


def test_class_labels_are_read_by_name(folder):
    data = hf_dataset(folder).remove_columns(["choices", "answer"]).add_column("label", [0, 1, 0])
    data = data.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    assert load_rows(data, columns={"answer": "label"}).dataset["answer"][:] == ["cat", "dog", "cat"]


@pytest.mark.parametrize("make", [as_jsonl, as_memory, as_parquet])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"columns": {"answer": "label"}}, "no column `label`.*found in .*question"),
        ({"columns": {"reply": "answer"}}, "maps `reply`, which is none of our columns"),
        ({"extra_columns": ["weight"]}, "no column `weight`.*found in"),
        ({"extra_columns": ["answer"]}, "`extra_columns` names `answer`"),
        ({"columns": {"answer": "category", "id": "category"}}, "`category` twice"),
        ({"split": "test"}, "split"),
        ({"limit": 0}, "`limit` must be at least 1, got 0"),
        ({"check_images": "maybe"}, "`check_images` must be one of .*'maybe'"),
    ],
)
def test_wrong_options(folder, make, options, said):
    with pytest.raises(DataError, match=said):
        load_rows(make(folder), **options)


@pytest.mark.parametrize("name", ["image", "question", "answer"])
def test_a_missing_column_lists_those_found(folder, name):
    rows = [{k: v for k, v in row.items() if k != name} for row in raw_rows()]
    for spec in (write_jsonl(folder / "data.jsonl", rows), datasets.Dataset.from_list(rows)):
        with pytest.raises(DataError, match=f"column `{name}` is missing. Columns found in .*: .*category"):
            load_rows(spec)


LOOKALIKES = [("options", "choices"), ("choises", "choices"), ("bbox", "target_boxes")]


@pytest.mark.parametrize(("theirs", "ours"), LOOKALIKES)
def test_a_column_that_looks_like_ours_is_not_dropped(folder, theirs, ours):
    rows = raw_rows()
    for row in rows:
        row[theirs] = row.pop(ours)
    path = write_jsonl(folder / "data.jsonl", rows)
    with pytest.raises(DataError, match=f"Unknown column `{theirs}`: it looks like our `{ours}`"):
        load_rows(path)
    assert load_rows(path, columns={ours: theirs}).dataset[0][ours]
    assert load_rows(path, extra_columns=[theirs]).dataset[0][ours] is None


@pytest.mark.parametrize("make", [as_jsonl, as_memory])
def test_bad_rows_are_skipped_and_extras_stay_aligned(folder, make):
    (folder / "images" / "1.png").write_bytes(b"broken")
    rows = [row | {"weight": index * 1.5} for index, row in enumerate(raw_rows())]
    spec = write_jsonl(folder / "data.jsonl", rows)
    if make is as_memory:
        rows = [row | {"image": str(folder / row["image"])} for row in rows]
        spec = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    with pytest.raises(RowError, match=r"row 1 .*\(id 'q1'\), field `image`"):
        load_rows(spec)
    loaded = load_rows(spec, skip_bad_rows=True, extra_columns=["weight"])
    assert [(entry["row"], entry["id"], entry["field"]) for entry in loaded.bad_rows] == [(1, "q1", "image")]
    assert [(row["id"], row["weight"]) for row in loaded.dataset] == [("q0", 0.0), ("q2", 3.0)]
    assert [open_image(row["image"], "x").height for row in loaded.dataset] == [40, 42]


def test_extras_of_mixed_types(folder):
    rows = [row | {"weight": weight} for row, weight in zip(raw_rows(), [1, "two", [3]], strict=True)]
    with pytest.raises(DataError, match="Extra column `weight` .* mixes types"):
        load_rows(write_jsonl(folder / "data.jsonl", rows), extra_columns=["weight"])


def test_rows_of_different_shapes(folder):
    rows = raw_rows()
    rows[1] |= {"choices": "(A) red\n(B) blue", "answer": 0, "target_boxes": [1, 2, 3, 4], "id": 5}
    del rows[2]["choices"], rows[2]["target_boxes"], rows[2]["category"]
    loaded = load_rows(write_jsonl(folder / "data.jsonl", rows)).dataset
    assert loaded["answer"][:] == ["B", "A", "B"]
    assert loaded["id"][:] == ["q0", "5", "q2"]
    assert loaded["choices"][:] == [["red", "blue"], ["red", "blue"], None]


@pytest.mark.parametrize("make", SOURCES)
def test_limit(folder, make):
    assert load_rows(make(folder), limit=2).dataset["id"][:] == ["q0", "q1"]


def test_a_limit_beyond_the_rows(folder):
    assert len(load_rows(as_jsonl(folder), limit=9).dataset) == 3


def test_lines_that_are_not_json(folder):
    path = as_jsonl(folder)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'\n{"image": \n[1]\n\xff\xfe\n')
    with pytest.raises(RowError, match="row 3 counted from 0, field `row`: line 5 of the file is not JSON"):
        load_rows(path)
    loaded = load_rows(path, skip_bad_rows=True)
    assert len(loaded.dataset) == 3
    assert [entry["row"] for entry in loaded.bad_rows] == [3, 4, 5]


def test_csv_cells_beyond_the_header(folder):
    path = as_csv(folder)
    path.write_text(path.read_text() + "images/0.png,A cell, and its comma,,B,,,,\n")
    with pytest.raises(RowError, match="row 3 .*more cells than the header"):
        load_rows(path)


EMPTY = [("d.jsonl", ""), ("d.jsonl", "\n \n"), ("d.json", "[]"), ("d.csv", "image\n")]
UNREADABLE = [("d.json", b"{}"), ("d.json", b"[1"), ("d.jsonl", b"x\n"), ("d.csv", b"\xff"), ("d.jsonl", b"[" * 10**6)]


@pytest.mark.parametrize(("name", "content"), EMPTY)
def test_empty_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} has no rows"):
        load_rows(tmp_path / name)


def test_empty_dataset(folder):
    with pytest.raises(DataError, match="in memory has no rows"):
        load_rows(hf_dataset(folder).select([]))


@pytest.mark.parametrize(("name", "content"), UNREADABLE)
def test_unreadable_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        load_rows(tmp_path / name)


def test_sources_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="There is no '.*gone.jsonl'.*metadata.jsonl"):
        load_rows(tmp_path / "gone.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="not a data set.*holds notes.txt"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match="not a data set.*notes.txt"):
        load_rows(tmp_path / "notes.txt")


def test_hub_ids(folder, monkeypatch):
    asked = []

    def load_dataset(name, config=None, *, split=None):
        asked.append((name, config, split))
        if name == "owner/gone":
            raise ConnectionError("no route\nto host")
        return hf_dataset(folder) if split else datasets.DatasetDict({"test": hf_dataset(folder)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("owner/name:part", split="test[:3]").dataset) == 3
    assert load_rows("owner/name").source == "owner/name"
    assert asked == [("owner/name", "part", "test[:3]"), ("owner/name", None, None)]
    with pytest.raises(DataError, match=r"'owner/gone' cannot be loaded \(ConnectionError: no route\)"):
        load_rows("owner/gone")


def test_splits(folder):
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "images").symlink_to(folder / "images")
        rows = [row | {"id": f"{split}-{row['id']}"} for row in with_file_name(raw_rows())]
        write_jsonl(folder / split / "metadata.jsonl", rows)
    both = datasets.DatasetDict({"train": hf_dataset(folder), "test": hf_dataset(folder).select([0])})
    assert load_rows(folder, split="test").dataset["id"][0] == "test-q0"
    assert len(load_rows(both, split="test").dataset) == 1
    for spec in (folder, both):
        with pytest.raises(DataError, match="has the splits test, train. Say which one"):
            load_rows(spec)
        with pytest.raises(DataError, match="no split `dev`. It has test, train"):
            load_rows(spec, split="dev")


@pytest.mark.parametrize(("column", "said"), [([1, 2, 3], "holds Value"), ([["a.png"]] * 3, "holds List")])
def test_columns_that_hold_no_images(folder, column, said):
    data = hf_dataset(folder).remove_columns("image").add_column("image", column)
    with pytest.raises(DataError, match=f"column `image` of the data set in memory {said}"):
        load_rows(data)


def test_loading_imports_no_torch(folder):
    code = "import sys; from mgpo_trl.data import load_rows; load_rows(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(as_jsonl(folder))]).returncode == 0
