"""Small benchmarks in the formats of the published ones, as files on disk."""

import base64
import csv
import io
import json

import datasets
from PIL import Image

SUFFIXES = ("parquet", "saved", "jsonl", "tsv", "arrow")


def jpeg(shade, size=(60, 40)):
    """Bytes of a JPEG whose pixels tell which image it is."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def as_base64(shade, size=(60, 40)):
    return base64.b64encode(jpeg(shade, size)).decode()


def hr_bench_rows(questions=2):
    """Every question four times, each with its options moved on by one."""
    options = ["red", "blue", "green", "white"]
    rows = []
    for question in range(questions):
        for cycle in range(4):
            moved = options[cycle:] + options[:cycle]
            row = {"index": 4 * question + cycle, "question": f"Which colour has umbrella {question}?"}
            row |= {"answer": "ABCD"[moved.index("blue")], "category": ["single", "cross"][question % 2]}
            row |= dict(zip("ABCD", moved, strict=True))
            rows.append(row | {"cycle_category": str(cycle), "image": as_base64(40 * question)})
    return rows


OPTIONS = ["(A) 7", "(B) 1", "(C) 4", "(D) 9", "(E) The image does not feature the number."]


def mme_rows(number=3, first=0, shades=None):
    categories = ["Perception/OCR with Complex Context", "Reasoning/Autonomous_Driving", "Perception/Remote Sensing"]
    return [
        {
            "index": str(first + offset),
            "bytes": as_base64(10 * (shades[offset] if shades else first + offset)),
            "question": f"What is the number on container {first + offset}?",
            "multi-choice options": OPTIONS,
            "answer": "CEA"[offset % 3],
            "category": categories[offset % 3],
            "l2-category": "count",
        }
        for offset in range(number)
    ]


def mgpo_rows(answer="answer", number=3):
    answers = {"answer": "answer", "ground_truth": "ground_truth", "reward_model": "reward_model"}
    return [
        {
            "prompt": f"<image>What is number {index}? Look twice.",
            "question": f"<image>What is number {index}?",
            "choices": "\n".join(OPTIONS),
            "data_source": ["Perception/Remote Sensing", "v_star"][index % 2],
            answers[answer]: {"ground_truth": "C", "style": "rule"} if answer == "reward_model" else "C",
        }
        for index in range(number)
    ]


VSTAR = [
    ("direct_attributes", "sa_1", "What is the material of the glove?", ["cotton", "rubber", "kevlar", "leather"], 1),
    ("direct_attributes", "sa_2", "What is the color of the dustpan?", ["light red", "blue", "red", "white"], 2),
    ("relative_position", "sa_3", "Is the dog left or right of the cat?", ["right", "left"], 1),
]
_SENTENCES = {
    "sa_1": "The material of the glove is {}.", "sa_2": "The color of the dustpan is {}.",
    "sa_3": "The dog is on the {} side of the cat.",
}  # fmt: skip
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def vstar_rows():
    return [
        {
            "image": f"{category}/{name}.jpg",
            "text": "\n".join(
                [question, *(f"({letter}) {text}" for letter, text in zip("ABCD", options, strict=False)), INSTRUCTION]
            ),
            "category": category,
            "label": "ABCD"[right],
            "question_id": number,
        }
        for number, (category, name, question, options, right) in enumerate(VSTAR)
    ]


def write_vstar(folder):
    """A snapshot of the repository: the table, and beside each image its JSON with the right option first."""
    for number, (category, name, question, options, right) in enumerate(VSTAR):
        (folder / category).mkdir(parents=True, exist_ok=True)
        (folder / category / f"{name}.jpg").write_bytes(jpeg(10 * number))
        options = [options[right], *options[:right], *options[right + 1 :]]
        beside = {"question": question, "target_object": ["it"], "bbox": [[5, 6, 20, 10 + number]]}
        beside["options"] = [_SENTENCES[name].format(option) for option in options]
        (folder / category / f"{name}.json").write_text(json.dumps(beside))
    return write(folder / "test_questions", vstar_rows(), "jsonl")


def write(path, rows, kind):
    """Saves rows as Parquet, Arrow, JSON Lines, TSV, or as `save_to_disk` does; `path` has no ending."""
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
        return path
    target = path.with_name(f"{path.name}.{kind}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(target)
    elif kind == "arrow":
        data = datasets.Dataset.from_list(rows)
        with datasets.arrow_writer.ArrowWriter(features=data.features, path=str(target)) as writer:
            writer.write_table(data.data.table)
            writer.finalize()
    elif kind == "jsonl":
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(target, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t", quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    return target


def with_images(rows, column="image", labels=(), shades=None):
    """The rows as a `datasets.Dataset` with an image each; `labels` become class labels."""
    shades = shades or range(0, 10 * len(rows), 10)
    rows = [row | {column: {"bytes": jpeg(shade), "path": None}} for row, shade in zip(rows, shades, strict=True)]
    data = datasets.Dataset.from_list(rows).cast_column(column, datasets.Image())
    for label in labels:
        data = data.class_encode_column(label)
    return data
