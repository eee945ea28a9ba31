"""
Make the MGPO training set: MME-RealWorld without what MME-RealWorld-Lite evaluates on.

    python -m mgpo_trl.data.build_mgpo_train --output_dir data/mgpo_train
    python -m mgpo_trl.data.build_mgpo_train --full mme-realworld:FULL --lite mme-realworld-lite:LITE --output_dir OUT

The published training set names images by paths on its authors' disks. This one embeds them, so that it can be moved,
and it removes two kinds of overlap, each counted in `overlap.json`: rows with the index of a Lite row, and rows that
show an image of Lite under another index (by a digest of its bytes). The result is a directory for `--dataset_name`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .loading import LoadedRows, load_rows

logger = logging.getLogger(__name__)


def split_overlap(full: Sequence[dict], lite: Sequence[dict]) -> tuple[list[int], dict[str, int]]:
    """
    Which rows of the full set are not in Lite.

    Worked example: full rows (id, group) 1 a, 2 b, 3 b, 4 c against the Lite row 2 b leave rows 1 and 4: row 2 has the
    index of a Lite row, row 3 shows its image.

    Args:
        full (`Sequence[dict]`), lite (`Sequence[dict]`):
            Rows with `id`, `question`, and `group`, the digest of the image.

    Returns:
        `tuple`: positions of the rows that stay, and the counts `full`, `lite`, `same_index`, `same_image`, `kept`.
        `another_question` counts the rows with the index of a Lite row but another question: above 0, the two sets are
        not numbered alike, and `same_index` says nothing.
    """
    ids, images = {row["id"]: row["question"] for row in lite}, {row["group"] for row in lite} - {None}
    same_index = {number for number, row in enumerate(full) if row["id"] in ids}
    same_image = {number for number, row in enumerate(full) if row["group"] in images} - same_index
    kept = [number for number in range(len(full)) if number not in same_index and number not in same_image]
    counts = {
        "full": len(full),
        "lite": len(lite),
        "same_index": len(same_index),
        "same_image": len(same_image),
        "another_question": sum(full[number]["question"] != ids[full[number]["id"]] for number in same_index),
        "kept": len(kept),
    }
    return kept, counts


def build(full: LoadedRows, lite: LoadedRows, output_dir: str | Path) -> dict[str, Any]:
    """
    Write the training set with embedded images, and `overlap.json` beside it.

    Args:
        full ([`LoadedRows`]), lite ([`LoadedRows`]): The two sets.
        output_dir (`str` or `Path`): Made if absent; must not hold anything.

    Returns:
        `dict`: What `overlap.json` holds.

    Raises:
        ValueError: The directory holds something, or nothing would be left.
    """
    from ..records import write_json

    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"'{output_dir}' is not empty. Give a new directory.")
    keys = ["id", "question", "group"]
    kept, counts = split_overlap(list(full.dataset.select_columns(keys)), list(lite.dataset.select_columns(keys)))
    if not kept:
        raise ValueError(
            f"No row of {full.source} is left: {counts}. Check that `--full` and `--lite` are not the same."
        )
    full.dataset.select(kept).save_to_disk(str(output_dir), max_shard_size="500MB")
    record = {
        **counts,
        "sources": {"full": full.source, "lite": lite.source},
        "bad_rows": {"full": full.bad_rows, "lite": lite.bad_rows},
    }
    write_json(output_dir / "overlap.json", record)
    return record


def main(arguments: list[str]) -> None:
    """Parse, load both sets, write the difference."""
    parser = argparse.ArgumentParser(prog="python -m mgpo_trl.data.build_mgpo_train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--full", default="mme-realworld", help="MME-RealWorld, or `mme-realworld:PATH`.")
    parser.add_argument("--lite", default="mme-realworld-lite", help="MME-RealWorld-Lite, or with `:PATH`.")
    parser.add_argument("--output_dir", required=True, help="A new directory.")
    parser.add_argument("--skip_bad_rows", action="store_true", help="Leave bad rows out, and list them.")
    options = parser.parse_args(arguments)
    sets = [load_rows(spec, skip_bad_rows=options.skip_bad_rows) for spec in (options.full, options.lite)]
    record = build(*sets, options.output_dir)
    removed = f"{record['same_index']} by index and {record['same_image']} by image"
    logger.info("%d of %d rows kept; removed %s.", record["kept"], record["full"], removed)
    if record["another_question"]:
        logger.warning(
            "%d rows removed by index have another question in Lite: the two sets are not numbered alike, and only "
            "what was removed by image is known to overlap.",
            record["another_question"],
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
