"""
How far cheaper views are from exact ones: JPEG draft decoding at several margins, and Pillow's `reducing_gap`.

    python benchmarks/view_error.py            about three minutes on two cores
    python benchmarks/view_error.py --quick    under a minute: fewer pictures

Pictures of 7680x4320: photographs that scikit-image and scikit-learn carry, tiled at their own resolution (the detail
of a camera's pixels) and enlarged, small print, and patterns made to be hard: noise, lines one pixel wide, rings.
Views are those of 640 and 1280 image tokens; from 4096 tokens on, twice the view's size asks for more than half of 8K,
and the draft is the whole picture. Differences are in levels of 255. Needs the `dev` extra for the photographs.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from common import conditions, write_result
from image_pipeline import view_size
from PIL import Image, ImageDraw, ImageFont

from mgpo_trl.images import open_image

SIZE = (7680, 4320)
CAPS = {"640x28x28": 640 * 28 * 28, "1280x28x28": 1280 * 28 * 28}
BICUBIC = Image.Resampling.BICUBIC
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "china.jpg", "flower.jpg")
ENLARGED = ("china.jpg", "coffee.png")


def photographs() -> dict[str, Image.Image]:
    """The photographs of the installed packages, by file name."""
    import skimage.data
    import sklearn.datasets

    folders = [Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"]
    found = {name: next(path for folder in folders if (path := folder / name).is_file()) for name in PHOTOGRAPHS}
    return {name: open_image(path, name) for name, path in found.items()}


def tiled(image: Image.Image) -> Image.Image:
    """The image side by side with itself, not resized."""
    canvas = Image.new("RGB", SIZE)
    for left in range(0, SIZE[0], image.width):
        for top in range(0, SIZE[1], image.height):
            canvas.paste(image, (left, top))
    return canvas


def small_print() -> Image.Image:
    """Lines of black text on white, 24 pixels high: about four pixels in a view."""
    canvas = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(24)
    for top in range(0, SIZE[1], 30):
        draw.text((0, top), f"Line {top}: the quick brown fox jumps over the lazy dog. " * 12, fill="black", font=font)
    return canvas


def pattern(name: str) -> Image.Image:
    """White noise, lines one pixel wide, or rings that get finer outwards."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]].astype(np.float32)
    values = {
        "noise": lambda: np.random.default_rng(0).integers(0, 256, SIZE[::-1]),
        "lines": lambda: (x % 2) * 255,
        "rings": lambda: 127 + 127 * np.cos((x * x + y * y) * (np.pi / 2 / SIZE[0])),
    }[name]()
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def pictures(quick: bool):
    """(name, picture), one at a time."""
    found = photographs()
    for name, image in list(found.items())[:: 6 if quick else 1]:
        yield f"{name}, tiled", tiled(image)
    for name in ENLARGED[:: 2 if quick else 1]:
        yield f"{name}, enlarged", found[name].resize(SIZE, BICUBIC)
    yield "small print", small_print()
    for name in ("noise", "lines", "rings")[:: 3 if quick else 1]:
        yield name, pattern(name)


def drafted(data: bytes, size: tuple[int, int], margin: int) -> Image.Image:
    """The view from the smallest draft that is at least `margin` times its size on each side."""
    image = Image.open(io.BytesIO(data))
    _, box = image.draft(None, (margin * size[0], margin * size[1]))
    return image.convert("RGB").resize(size, BICUBIC, box)


def reduced(data: bytes, size: tuple[int, int], gap: float) -> Image.Image:
    """The view by Pillow's two-step resizing of the whole picture."""
    return open_image(data, "picture").resize(size, BICUBIC, reducing_gap=gap)


WAYS = {
    "draft, margin 1": lambda data, size: drafted(data, size, 1),
    "draft, margin 2 (ours)": lambda data, size: drafted(data, size, 2),
    "draft, margin 4": lambda data, size: drafted(data, size, 4),
    "reducing_gap 2": lambda data, size: reduced(data, size, 2),
    "reducing_gap 3": lambda data, size: reduced(data, size, 3),
}


def timed(way, *arguments):
    """Result and seconds of a call."""
    started = time.perf_counter()
    result = way(*arguments)
    return result, time.perf_counter() - started


def differences(data: bytes, size: tuple[int, int]) -> dict[str, dict]:
    """Error of every way on one file, and its time as a ratio to the exact view's, in one run."""
    exact, seconds = timed(lambda: open_image(data, "picture").resize(size, BICUBIC))
    exact = np.asarray(exact, int)
    figures = {}
    for name, way in WAYS.items():
        view, took = timed(way, data, size)
        error = np.abs(np.asarray(view, int) - exact)
        figures[name] = {
            "mean": round(float(error.mean()), 3),
            "p99": float(np.percentile(error, 99)),
            "max": int(error.max()),
            "time_ratio": round(took / seconds, 3),
        }
    return figures


def encoded(image: Image.Image) -> bytes:
    """The picture as a JPEG of a camera's quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def print_table(cap: str, rows: dict[str, dict]) -> None:
    """Mean, 99th percentile and maximum of every picture and way, and the median time."""
    print(f"\n{cap}: mean / p99 / max of 255")
    print(f"{'':<24}" + "".join(f"{way:>24}" for way in WAYS))
    for name, figures in rows.items():
        cells = (f"{one['mean']:.2f} / {one['p99']:.0f} / {one['max']}" for one in figures.values())
        print(f"{name:<24}" + "".join(f"{cell:>24}" for cell in cells))
    medians = (statistics.median(figures[way]["time_ratio"] for figures in rows.values()) for way in WAYS)
    print(f"{'time / exact (median)':<24}" + "".join(f"{median:>24.2f}" for median in medians))


def main() -> None:
    """Measure, print a table for each cap, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Fewer pictures.")
    options = parser.parse_args()
    errors: dict[str, dict] = {cap: {} for cap in CAPS}
    for name, image in pictures(options.quick):
        data = encoded(image)
        for cap, pixels in CAPS.items():
            errors[cap][name] = differences(data, view_size(SIZE, pixels))
    for cap, rows in errors.items():
        print_table(cap, rows)
    result = {**conditions(sys.argv), "image": list(SIZE), "jpeg_quality": 92, "errors": errors}
    print("\nwrote", write_result("view_error", result))


if __name__ == "__main__":
    main()
