"""`mgpo view`: the page of a result directory, written where it is missing or old, in the browser."""

import argparse
import shlex
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SUMMARY = "Open the gallery of an evaluation or a training in the browser."


@dataclass(frozen=True)
class Kind:
    """A kind of directory that has a page."""

    name: str
    """What it is called in messages."""
    matches: Callable[[Path], bool]
    """Whether a directory is of this kind."""
    page: Callable[[Path], Path]
    """Writes the page where that is needed, and returns its path."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `mgpo view`."""
    parser.add_argument("directory", metavar="DIR", help="output directory of `eval.py` or `train.py`")
    parser.add_argument("--no_browser", action="store_true", help="print the path of the page and stop")


def run(args: argparse.Namespace) -> None:
    """Find or write the page, print its path, and open it."""
    directory = Path(args.directory)
    page = page_of(directory).resolve()
    print(page)
    for other in _below(directory):
        print(f"Below it, too: mgpo view {shlex.quote(str(other))}", file=sys.stderr)
    if not args.no_browser and not webbrowser.open(page.as_uri()):
        raise ValueError("No browser was found. Open the file above by hand, or pass `--no_browser`.")


def page_of(directory: Path) -> Path:
    """
    The page of a directory.

    Raises:
        ValueError: It is no directory, or of no kind that has a page; directories below that have one are named.
    """
    if not directory.is_dir():
        raise ValueError(f"There is no directory '{directory}'. Give one that `eval.py` or `train.py` wrote.")
    kind = _kind_of(directory)
    if kind is not None:
        return kind.page(directory)
    below = [str(path) for path in _below(directory)]
    advice = f"Give one of {below}." if below else "Give a directory with run.json and rollouts.jsonl."
    raise ValueError(f"'{directory}' holds no result of {' or '.join(kind.name for kind in KINDS)}. {advice}")


def _below(directory: Path) -> list[Path]:
    """Directories in a directory that have a page."""
    return sorted(path for path in directory.iterdir() if path.is_dir() and _kind_of(path))


def _kind_of(directory: Path) -> Kind | None:
    return next((kind for kind in KINDS if kind.matches(directory)), None)


def _is_evaluation(directory: Path) -> bool:
    """Whether `run.json` says how many rollouts are expected, which only an evaluation knows."""
    from ..records import RUN_FILE, read_run

    return (directory / RUN_FILE).is_file() and "n_expected" in read_run(directory)


def _evaluation_page(directory: Path) -> Path:
    """`report.html`; written from the records where it is missing or older than they are. Needs no model."""
    from ..evaluation.html_report import REPORT_HTML
    from ..evaluation.report import rescore
    from ..gallery import PICTURES_FILE
    from ..records import ROLLOUTS_FILE

    page = directory / REPORT_HTML
    sources = [directory / name for name in (ROLLOUTS_FILE, PICTURES_FILE)]
    if not page.is_file() or any(one.is_file() and one.stat().st_mtime > page.stat().st_mtime for one in sources):
        rescore(directory)
    return page


def _is_training(directory: Path) -> bool:
    """Whether its rollouts say what the training made of them."""
    from ..records import ROLLOUTS_FILE, read_rollouts

    return (directory / ROLLOUTS_FILE).is_file() and "training" in next(iter(read_rollouts(directory)), {})


def _training_page(directory: Path) -> Path:
    """`rollouts.html`, written anew: a training that was killed had no time for its last steps."""
    from ..watching import write_training_page

    return write_training_page(directory)


KINDS: tuple[Kind, ...] = (
    Kind("an evaluation", _is_evaluation, _evaluation_page),
    Kind("a training", _is_training, _training_page),
)
"""Every kind of directory that has a page; the first that matches counts."""
