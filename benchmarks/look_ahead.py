"""
What opening images ahead saves: seconds that a model waits for the images of its batches, by threads and look-ahead.

    python benchmarks/look_ahead.py            about three minutes on two cores
    python benchmarks/look_ahead.py --quick    under a minute: fewer batches, one pair

Batches of 8K JPEGs go through the image loader; the model is a pause of a given length, as a GPU leaves the processor
free. Every setting is timed in turn on the same files; ratios are medians of pairs. The most originals alive at once
are counted too: they are what the look-ahead costs.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

from common import conditions, write_result
from image_pipeline import photograph

SIZE = (7680, 4320)
DISTINCT = 4
SETTINGS = {
    "no threads": {"threads": 0},
    "2 threads, nothing ahead": {"ahead_pixels": 0},
    "2 threads, 150 million pixels ahead": {"ahead_pixels": 150_000_000},
    "2 threads, 400 million pixels ahead (default)": {},
    "2 threads, draft views": {"view_decoding": "draft"},
}


def batches_of(files: list[bytes], number: int, size: int) -> list[tuple[int, list[dict]]]:
    """Rows that show the files in turn, each under bytes of its own."""
    rows = [
        {"id": str(n), "image": {"bytes": files[n % len(files)] + str(n).encode(), "path": None}}
        for n in range(number * size)
    ]
    return [(start, rows[start : start + size]) for start in range(0, len(rows), size)]


class Alive:
    """Counts images that have been opened and not let go; the most at any time."""

    def __init__(self):
        self.most, self._references, self._lock = 0, [], threading.Lock()

    def add(self, image) -> None:
        """Count an image that was opened."""
        with self._lock:
            self._references = [reference for reference in self._references if reference() is not None]
            self._references.append(weakref.ref(image))
            self.most = max(self.most, len(self._references))


def seconds(chat, batches: list, pause: float, options: dict) -> tuple[float, int]:
    """Time for all batches, less the pauses, and the most decoded originals alive."""
    from mgpo_trl.image_loading import ImageLoader
    from mgpo_trl.images import LateImage

    alive = Alive()

    class CountingLoader(ImageLoader):
        def _open(self, row):
            image, view = super()._open(row)
            if not isinstance(image, LateImage):
                alive.add(image)
            return image, view

    started = time.perf_counter()
    for _ in CountingLoader(chat, **options).batches(batches):
        time.sleep(pause)
    return time.perf_counter() - started - pause * len(batches), alive.most


def main() -> None:
    """Measure, print a table, write the result file."""
    from transformers import AutoProcessor

    from mgpo_trl.builtin.tiny import save_tiny
    from mgpo_trl.processing import VisionChat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Fewer batches, one pair.")
    parser.add_argument("--pause", type=float, default=5.0, help="Seconds that the model takes for a batch.")
    options = parser.parse_args()
    pairs, number, size = (1, 2, 4) if options.quick else (3, 3, 12)
    pause = 2.0 if options.quick else options.pause
    with tempfile.TemporaryDirectory() as folder:
        processor = AutoProcessor.from_pretrained(save_tiny(Path(folder) / "tiny", "needle", 0))
    chat = VisionChat(processor, max_pixels=1280 * 28 * 28, min_pixels=256 * 28 * 28)
    batches = batches_of([photograph(SIZE, seed) for seed in range(DISTINCT)], number, size)
    waits = {name: [] for name in SETTINGS}
    most = dict.fromkeys(SETTINGS, 0)
    for _ in range(pairs):
        for name, setting in SETTINGS.items():
            wait, alive = seconds(chat, batches, pause, setting)
            waits[name].append(wait / number)
            most[name] = max(most[name], alive)
    baseline = waits["no threads"]
    result = {**conditions(sys.argv), "image": list(SIZE), "batch": size, "batches": number, "pause_s": pause}
    result |= {"pairs": pairs, "settings": {}}
    for name, values in waits.items():
        figures = {
            "wait_s_per_batch": round(statistics.median(values), 3),
            "ratio_to_no_threads": round(statistics.median(a / b for a, b in zip(values, baseline, strict=True)), 3),
            "most_originals_alive": most[name],
        }
        result["settings"][name] = figures
        print(f"{name:<46} {figures['wait_s_per_batch']:6.2f} s a batch, {figures['ratio_to_no_threads']:.2f} of no "
              f"threads, at most {most[name]} originals alive")  # fmt: skip
    print("wrote", write_result("look_ahead", result))


if __name__ == "__main__":
    main()
