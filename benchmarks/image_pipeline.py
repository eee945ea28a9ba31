"""
Images a second for decode + view + crop of 8K JPEGs: ours, the reference's way of decoding twice, and draft views.

    python benchmarks/image_pipeline.py            about three minutes on two cores
    python benchmarks/image_pipeline.py --quick    under a minute

Every way is timed in turn on the same files, pair by pair; the ratio is the median of the pairs. The peak of resident
memory is that of a process that takes one file through one way, less what it holds before.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import conditions, peak_mb, write_result
from PIL import Image

from mgpo_trl.images import LateImage, crop_original, open_image

SIZES = {"7680x4320": (7680, 4320), "6144x6144": (6144, 6144)}
VIEW_PIXELS = 1280 * 28 * 28


def photograph(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG with the detail of a photograph: noise at several scales over a gradient."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, (127, 127, 127))
    for scale, weight in ((8, 0.5), (64, 0.3), (2, 0.2)):
        small = rng.integers(0, 256, (size[1] // scale // 4, size[0] // scale // 4, 3), dtype=np.uint8)
        layer = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        image = Image.blend(image, layer, weight)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def view_size(size: tuple[int, int], pixels: int = VIEW_PIXELS) -> tuple[int, int]:
    """The size of a view under a pixel cap (the paper's by default), in multiples of 28."""
    scale = (pixels / (size[0] * size[1])) ** 0.5
    return tuple(int(side * scale) // 28 * 28 for side in size)


def box_of(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A crop of a tenth of each side."""
    return (size[0] // 3, size[1] // 3, size[0] // 3 + size[0] // 10, size[1] // 3 + size[1] // 10)


def ours(data: bytes) -> None:
    """Decode once; the view and the crop come from the same pixels."""
    image = open_image(data, "x")
    image.resize(view_size(image.size), Image.Resampling.BICUBIC)
    crop_original(image, box_of(image.size))


def twice(data: bytes) -> None:
    """Decode for the view, and again for the crop."""
    image = open_image(data, "x")
    image.resize(view_size(image.size), Image.Resampling.BICUBIC)
    again = open_image(data, "x")
    crop_original(again, box_of(again.size))


def draft(data: bytes) -> None:
    """A view from fewer pixels, then the full decode for the crop."""
    image = LateImage(data, "x")
    image.draft(view_size(image.size), Image.Resampling.BICUBIC)
    crop_original(image, box_of(image.size))


def draft_direct(data: bytes) -> None:
    """A view from fewer pixels, and no crop: what a one-round evaluation needs."""
    image = LateImage(data, "x")
    image.draft(view_size(image.size), Image.Resampling.BICUBIC)


WAYS = {"ours": ours, "twice": twice, "draft": draft, "draft, no crop": draft_direct}


def seconds(way, files: list[bytes], threads: int) -> float:
    """Time to take all files through one way."""
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(way, files))
    return time.perf_counter() - started


def measure(files: list[bytes], threads: int, pairs: int) -> dict:
    """Images a second of every way, and the ratio of its time to that of decoding twice."""
    times = {name: [] for name in WAYS}
    for _ in range(pairs):
        for name, way in WAYS.items():
            times[name].append(seconds(way, files, threads))
    return {
        name: {
            "images_per_second": len(files) / statistics.median(values),
            "ratio_to_twice": statistics.median(a / b for a, b in zip(values, times["twice"], strict=True)),
            "ratio_range": [f(a / b for a, b in zip(values, times["twice"], strict=True)) for f in (min, max)],
        }
        for name, values in times.items()
    }


def view_error(data: bytes) -> dict:
    """Difference of a draft view from the exact one, in levels of 255."""
    image = LateImage(data, "x")
    size = view_size(image.size)
    near = np.asarray(image.draft(size, Image.Resampling.BICUBIC), dtype=int)
    exact = np.asarray(open_image(data, "x").resize(size, Image.Resampling.BICUBIC), dtype=int)
    return {"mean": float(np.abs(near - exact).mean()), "max": int(np.abs(near - exact).max())}


def own_peak(way: str, path: str) -> None:
    """Print the MB of resident memory that one file takes on its way, in this process."""
    data = Path(path).read_bytes()
    before = peak_mb()
    WAYS[way](data)
    print(peak_mb() - before)


def peaks(data: bytes) -> dict[str, int]:
    """Peak of resident memory of every way on one file, in MB, each in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(data)
        file.flush()
        command = [sys.executable, __file__, "--one"]
        runs = {way: subprocess.run([*command, way, file.name], capture_output=True, check=True) for way in WAYS}
    return {way: int(done.stdout) for way, done in runs.items()}


def main() -> None:
    """Measure, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="One size, fewer pairs.")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        own_peak(*options.one)
        return
    sizes = dict(list(SIZES.items())[:1]) if options.quick else SIZES
    pairs, count = (2, 2) if options.quick else (5, 4)
    result = {**conditions(sys.argv), "pairs": pairs, "images": count, "sizes": {}}
    for name, size in sizes.items():
        files = [photograph(size, seed) for seed in range(count)]
        entry = {"bytes": [len(file) for file in files], "view_error": view_error(files[0])}
        for threads in (1, 2):
            entry[f"threads_{threads}"] = measure(files, threads, pairs)
            for way, figures in entry[f"threads_{threads}"].items():
                rate, ratio = figures["images_per_second"], figures["ratio_to_twice"]
                print(f"{name}, {threads} threads, {way:<15} {rate:6.2f} images/s, {ratio:.2f} of decoding twice")
        entry["peak_rss_mb"] = peaks(files[0])
        print(f"{name}, peak RSS of one file in MB: {entry['peak_rss_mb']}")
        error = entry["view_error"]
        print(f"{name}, draft view: mean error {error['mean']:.2f}, max {error['max']} of 255")
        result["sizes"][name] = entry
    print("wrote", write_result("image_pipeline", result))


if __name__ == "__main__":
    main()
