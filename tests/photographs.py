"""Real photographs that installed packages carry, as files of a camera, with questions, choices and boxes by hand."""

import json
from pathlib import Path

import skimage.data
import sklearn.datasets
from PIL import Image

SKIMAGE = Path(skimage.data.__file__).parent
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
CAMERA = (4032, 3024)
"""A picture of 12 megapixels as most telephones take it."""

PHOTOGRAPHS = {
    "astronaut": {
        "source": SKIMAGE / "astronaut.png",
        "question": "What colour is the round patch on the chest of the astronaut?",
        "choices": ["orange", "green", "violet", "black"],
        "answer": "violet",
        "box": (133, 345, 212, 427),
        "stored": "rotated",
    },
    "coffee": {
        "source": SKIMAGE / "coffee.png",
        "question": "What lies on the saucer beside the cup?",
        "choices": ["a spoon", "a biscuit", "a cube of sugar"],
        "answer": "A",
        "box": (322, 235, 410, 330),
        "stored": "camera",
    },
    "chelsea": {
        "source": SKIMAGE / "chelsea.png",
        "question": "What colour is the nose of the cat?",
        "choices": ["black", "reddish brown"],
        "answer": "B",
        "box": (232, 220, 292, 268),
        "stored": "png",
    },
    "rocket": {
        "source": SKIMAGE / "rocket.jpg",
        "question": "How many masts with lights stand right and left of the rocket?",
        "choices": None,
        "answer": "2",
        "box": None,
        "stored": "jpg",
    },
    "china": {
        "source": SKLEARN / "china.jpg",
        "question": "What stands on the very top of the roof?",
        "choices": ["a flag", "a golden knob", "a cross", "nothing"],
        "answer": "B",
        "box": (196, 27, 217, 58),
        "stored": "rotated",
    },
    "flower": {
        "source": SKLEARN / "flower.jpg",
        "question": "What can be seen at the bottom of the picture?",
        "choices": ["a second flower", "a bee", "a hand"],
        "answer": "A",
        "box": (285, 372, 470, 427),
        "stored": "camera",
    },
}
"""By name: the file, a question, the box of the evidence in its pixels, and how `save_photographs` stores it."""


def save_photographs(folder, image_column="image"):
    """
    Store every photograph in `folder` and return its rows: two as they are, two enlarged to 12 megapixels with the
    EXIF of a camera, and two more that were taken upright, so that the file is rotated and says so (orientation 6).
    """
    rows = []
    for name, photo in PHOTOGRAPHS.items():
        with Image.open(photo["source"]) as image:
            file, size = _store(image.convert("RGB"), folder / name, photo["stored"])
            row = {image_column: file, "question": photo["question"], "answer": photo["answer"], "category": name}
            if photo["choices"] is not None:
                row["choices"] = photo["choices"]
            if photo["box"] is not None:
                scale = [side / old for side, old in zip(size, image.size, strict=True)] * 2
                row["target_boxes"] = [[round(value * s) for value, s in zip(photo["box"], scale, strict=True)]]
        rows.append(row)
    return rows


def as_jsonl(folder):
    """`photos.jsonl` beside a directory of photographs."""
    (folder / "pictures").mkdir(parents=True)
    rows = save_photographs(folder / "pictures")
    lines = [json.dumps({**row, "image": f"pictures/{row['image']}"}) for row in rows]
    (folder / "photos.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "photos.jsonl"


def as_folder(folder):
    """A folder of photographs with `metadata.jsonl`."""
    folder.mkdir(parents=True)
    rows = save_photographs(folder, image_column="file_name")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def upright_size(name):
    """Width and height of a stored photograph as a person sees it."""
    photo = PHOTOGRAPHS[name]
    if photo["stored"] in ("camera", "rotated"):
        return CAMERA if photo["stored"] == "camera" else CAMERA[::-1]
    with Image.open(photo["source"]) as image:
        return image.size


def _store(image, path, how):
    if how in ("png", "jpg"):
        file = path.with_suffix(f".{how}")
        image.save(file)
        return file.name, image.size
    upright = image.resize(CAMERA if how == "camera" else CAMERA[::-1])
    stored = upright if how == "camera" else upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0132] = "Camera maker", "Model 12", "2026:01:01 12:00:00"
    exif[0x0112] = 1 if how == "camera" else 6
    file = path.with_suffix(".jpg")
    stored.save(file, quality=85, exif=exif)
    assert stored.size == CAMERA
    return file.name, upright.size
