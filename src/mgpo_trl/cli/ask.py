"""`mgpo ask`: one question about one image."""

import argparse
import json
import sys
from pathlib import Path

from .loading import add_model_arguments, load_model, named_model
from .terminal import printable, show_inline

SUMMARY = "Ask a model about an image: prints answer, box and both turns, and writes a picture."
DEFAULT_PICTURE = "answer.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mgpo ask`."""
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("question", help="the question, without its choices")
    parser.add_argument("--model", metavar="DIR", help="model, Hub id or adapter (default: $MGPO_MODEL)")
    parser.add_argument("--choices", nargs="+", metavar="TEXT", help="texts of the choices; without, a free answer")
    parser.add_argument(
        "--box", nargs=4, type=int, metavar=("X1", "Y1", "X2", "Y2"), help="a region by hand, in original pixels"
    )
    parser.add_argument(
        "--out", metavar="FILE", help=f"where the picture goes (default: {DEFAULT_PICTURE}, or a free name like it)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--no_inline", action="store_true", help="do not show the picture in the terminal")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Ask, write the picture, print. What can be checked without the model is checked before it is loaded."""
    from ..answers import parse_choices
    from ..images import open_image

    model, image = named_model(args.model), open_image(args.image, args.image)
    choices, out = args.choices and parse_choices(args.choices), _picture_path(args.out, args.image)
    said = load_model(model, args)(image, args.question, choices, None if args.box is None else tuple(args.box))
    picture = said.picture()
    picture.save(out)
    if args.json:
        print(json.dumps(_record(said, out)))
        return
    print(_summary(said, out))
    if not args.no_inline:
        show_inline(picture, sys.stdout)


def _picture_path(out: str | None, image: str) -> Path:
    """Where the picture goes: the file that was named, else the first free one of `answer.png`, `answer-2.png`, ..."""
    from PIL import Image

    if out is None:
        free, number = Path(DEFAULT_PICTURE), 1
        while free.exists():
            number += 1
            free = Path(DEFAULT_PICTURE).with_stem(f"{Path(DEFAULT_PICTURE).stem}-{number}")
        return free
    path, kinds = Path(out), Image.registered_extensions()
    if kinds.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"`--out` must end in .png, .jpg or the like, got '{out}'.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no directory '{path.parent}' to write '{out}' into. Make it, or name another.")
    if path.exists() and path.samefile(image):
        raise ValueError(f"`--out` is the image itself, '{out}'. Name another file.")
    return path


def _summary(said, out: Path) -> str:
    width, height = said.rollout.image.size
    box = "none" if said.box is None else f"{said.box} of {width}x{height} pixels"
    lines = [("Answer", said.words), ("Status", said.status or "answered directly"), ("Box", box)]
    lines += [(f"Round {number}", text) for number, text in enumerate(said.turns, start=1)]
    lines.append(("Picture", str(out)))
    return "\n".join(f"{name:<9}{_indented(printable(text))}" for name, text in lines)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n" + " " * 9)


def _record(said, out: Path) -> dict:
    return {
        "question": said.rollout.question,
        "choices": said.rollout.choices,
        "answer": said.answer,
        "status": said.status,
        "box": said.box,
        "image_size": said.rollout.image.size,
        "turns": said.turns,
        "picture": str(out),
    }
