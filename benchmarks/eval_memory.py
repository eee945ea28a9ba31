"""
Peak memory of the evaluation loop over 50 and over 800 rows with 8K photographs: it must not grow with the set.

    python benchmarks/eval_memory.py                     50 and 800 rows, base64 in Parquet
    python benchmarks/eval_memory.py --source files      image files named by a JSON Lines file
    python benchmarks/eval_memory.py --rows 20 60        other numbers

The rows go through the real loading path, the image loader, the view, a crop, the record, the small pictures and the
report. Only the model is a script that names a box, so that what is measured is the evaluation and not a model. Each
number of rows runs in a process of its own. Two sources: base64 in Parquet (HR-Bench's format), which `datasets` keeps
in a memory-mapped file whose pages count as resident until the system drops them, and image files. Besides the peak of
resident memory the peak of anonymous memory is sampled, which leaves mapped pages out.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import conditions, peak_mb, write_result
from image_pipeline import photograph

SIZE = (7680, 4320)
DISTINCT = 4
BATCH = 4


def write_files(folder: Path, rows: int) -> str:
    """A JSON Lines file and its images: a few photographs under as many names as there are rows, as hard links."""
    for seed in range(DISTINCT):
        (folder / f"photograph-{seed}.jpg").write_bytes(photograph(SIZE, seed))
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            os.link(folder / f"photograph-{number % DISTINCT}.jpg", folder / f"{number}.jpg")
            row = {"image": f"{number}.jpg", "question": "What?", "choices": ["a", "b"], "answer": "A"}
            file.write(json.dumps(row) + "\n")
    return str(folder / "rows.jsonl")


def write_parquet(folder: Path, rows: int) -> str:
    """HR-Bench rows; a few photographs repeat, under different bytes (a comment is appended to each file)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [photograph(SIZE, seed) for seed in range(DISTINCT)]
    writer = None
    for number in range(rows):
        data = base64.b64encode(files[number % DISTINCT] + str(number).encode()).decode()
        row = {"index": number, "question": "What?", "answer": "A", "category": "single", "A": "a", "B": "b", "C": "c",
               "D": "d", "cycle_category": f"c{number % 4}", "image": data}  # fmt: skip
        table = pa.Table.from_pylist([row])
        writer = writer or pq.ParquetWriter(folder / "rows.parquet", table.schema)
        writer.write_table(table)
    writer.close()
    return f"hrbench-8k:{folder / 'rows.parquet'}"


SOURCES = {"parquet": write_parquet, "files": write_files}


class AnonymousPeak(threading.Thread):
    """Samples the process's anonymous memory twenty times a second and keeps the largest value, in MB."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self._stopped = 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._stopped.wait(0.05):
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) // 1024)

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()
        self.join()


def evaluate(dataset: str, output_dir: str) -> None:
    """The evaluation loop with a scripted generator; prints peak RSS and seconds as JSON."""
    from transformers import AutoProcessor

    from mgpo_trl.builtin.tiny import save_tiny
    from mgpo_trl.conversation import Conversation
    from mgpo_trl.data import load_rows
    from mgpo_trl.evaluation.protocols import resolve_protocols
    from mgpo_trl.evaluation.questions import Questions
    from mgpo_trl.evaluation.report import rescore
    from mgpo_trl.evaluation.runner import Player, play_batches
    from mgpo_trl.gallery import PictureWriter
    from mgpo_trl.image_loading import ImageLoader
    from mgpo_trl.records import RolloutWriter, run_record, write_run
    from mgpo_trl.rollout import Sampled

    directory = save_tiny(Path(output_dir) / "tiny", "needle", 0)
    template = Conversation(max_pixels=1280 * 28 * 28).template(AutoProcessor.from_pretrained(directory), "qwen2_5_vl")
    chat = template.chat
    turns = [chat.tokenizer(text)["input_ids"] for text in ('[{"bbox_2d": [100, 100, 400, 300]}]', "\\boxed{A}")]
    anonymous = AnonymousPeak()
    loaded = load_rows(dataset)
    base = peak_mb()
    started = time.perf_counter()
    questions = Questions(loaded.dataset)
    (protocol,) = resolve_protocols(None, 2)
    write_run(output_dir, run_record({}, prompts_fingerprint="-", max_pixels=chat.max_pixels, min_pixels=0, seed=0))

    def generate(contexts):
        return [Sampled([*turns[contexts[0].round - 1], chat.end_of_turn_id]) for _ in contexts]

    with RolloutWriter(output_dir) as writer, PictureWriter(output_dir, 2000) as pictures:
        player = Player(protocol, template, generate, writer, set(questions.ids), pictures)
        play_batches(questions.batches(BATCH, player.wanted), [player], ImageLoader(chat), len(questions), 0)
    rescore(output_dir)
    anonymous.stop()
    seconds = time.perf_counter() - started
    figures = {"peak_rss_mb": peak_mb(), "peak_anonymous_mb": anonymous.peak, "rss_after_loading_mb": base}
    print(json.dumps({**figures, "seconds": round(seconds, 1)}))


def main() -> None:
    """One process for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50, 800])
    parser.add_argument("--source", choices=list(SOURCES), default="parquet")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        evaluate(*options.one)
        return
    result = {**conditions(sys.argv), "image": list(SIZE), "batch": BATCH, "source": options.source, "rows": {}}
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            dataset = SOURCES[options.source](Path(folder), rows)
            command = [sys.executable, __file__, "--one", dataset, f"{folder}/out"]
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            result["rows"][rows] = json.loads(done.stdout.splitlines()[-1])
        print(rows, "rows:", result["rows"][rows])
    name = "eval_memory" if options.source == "parquet" else f"eval_memory_{options.source}"
    print("wrote", write_result(name, result))


if __name__ == "__main__":
    main()
