"""The facts of a model card, read from the files of a model's directory."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ..adapters import ADAPTER_CONFIG
from ..conversation import Conversation
from ..data.benchmarks import find_benchmark
from ..records import RUN_FILE, read_run, write_atomically
from .picture import PICTURES

STATE_FILE = "trainer_state.json"
RESULT_FILE = "result.json"
REPORT_FILE = "report.json"
EVALUATIONS = "evaluations"
"""Where reports of evaluations elsewhere are copied to."""

PAPER = {
    "title": "High-Resolution Visual Reasoning via Multi-Turn Grounding-Based Reinforcement Learning",
    "id": "2507.05920",
    "citation": """\
@article{huang2025highresolution,
    title   = {{High-Resolution Visual Reasoning via Multi-Turn Grounding-Based Reinforcement Learning}},
    author  = {Xinyu Huang and Yuhao Dong and Weiwei Tian and Bo Li and Rui Feng and Ziwei Liu},
    year    = 2025,
    eprint  = {arXiv:2507.05920},
}""",
}
"""The method's paper, in the form that TRL's trainers give theirs."""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says."""

    name: str
    """Name of the model, the card's heading."""
    repo_id: str
    """What `from_pretrained` is given: a repository, or the directory where there is none."""
    base_model: str | None
    """The model that training started from, a Hub id or a path; `None` where it is not known."""
    is_adapter: bool
    """Whether the directory holds an adapter rather than a whole model."""
    dataset: str | None
    """What it was trained on, as named on the command line."""
    conversation: Conversation | None
    """How it is asked."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """The record of the training run."""
    log: Sequence[Mapping[str, Any]] = ()
    """The training log, one entry each time that it was logged."""
    steps: int | None = None
    """Optimizer steps taken."""
    result: Mapping[str, Any] | None = None
    """What the built-in task leaves: figures before and after training."""
    reports: Sequence[Mapping[str, Any]] = ()
    """Evaluation reports."""
    picture: str | None = None
    """File name of a picture of rollouts in the same directory."""
    license: Mapping[str, str] = field(default_factory=dict)
    """Licence of the base model, as its own card gives it: `license`, `license_name`, `license_link`."""
    tags: Sequence[str] = ()
    """Further tags."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the run, in one level: of the trainer, the script and the model."""
        config = self.run.get("config") or {}
        return {**config.get("model", {}), **config.get("script", {}), **config.get("training", {})}


def read_facts(directory: str | os.PathLike, **known: Any) -> CardFacts:
    """
    What the files in a directory say about its model; arguments as in [`write_card`]. Figures and pictures from before
    the training began are of another model that was saved here, and do not count.
    """
    directory = Path(directory)
    run = read_run(directory) if (directory / RUN_FILE).is_file() else {}
    config = run.get("config") or {}
    state = _json(directory / STATE_FILE) or {}
    adapter = _json(directory / ADAPTER_CONFIG)
    since = _start(run)
    base = (adapter or {}).get("base_model_name_or_path") or config.get("model", {}).get("model_name_or_path")
    facts = {
        "name": directory.absolute().name,
        "repo_id": str(directory),
        "base_model": base,
        "dataset": config.get("script", {}).get("dataset_name"),
        **{key: value for key, value in known.items() if value},
    }
    return CardFacts(
        is_adapter=adapter is not None,
        conversation=Conversation.load(directory),
        run=run,
        log=state.get("log_history") or (),
        steps=state.get("global_step"),
        result=_json(directory / RESULT_FILE, since),
        reports=_reports(directory, since),
        picture=next((name for name in PICTURES if _is_current(directory / name, since)), None),
        **facts,
    )


def _start(run: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(run["time"]).timestamp() if run.get("time") else 0.0


def _is_current(path: Path, since: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= since


def _json(path: Path, since: float = 0.0) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if _is_current(path, since) else None


def _reports(directory: Path, since: float) -> list[dict[str, Any]]:
    """Reports of evaluations in the directory, but those that `result.json` sums up."""
    found = sorted([*directory.glob(f"*/{REPORT_FILE}"), *directory.glob(f"{EVALUATIONS}/*.json")])
    others = [path for path in found if not path.parent.name.startswith("heldout_")]
    return [report for path in others if (report := _json(path, since)) is not None]


def keep_reports(directory: str | os.PathLike, evaluations: Sequence[str | os.PathLike]) -> None:
    """
    Copy the reports of evaluations to a model, where its card finds them now and later.

    Args:
        directory (`str` or `os.PathLike`): Directory of the model.
        evaluations (`Sequence[str]`): Output directories of `eval.py`.

    Raises:
        ValueError: One of them has no `report.json`.
    """
    paths = [Path(evaluation, REPORT_FILE).absolute() for evaluation in evaluations]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"There is no `{REPORT_FILE}` in '{path.parent}'. Give the `--output_dir` of an evaluation."
            )
    for path in paths:
        if path.parent.parent != Path(directory).absolute():  # else it is found where it lies
            name = "-".join(path.parent.parts[-2:])  # two sets may each have a protocol of the same name
            write_atomically(Path(directory, EVALUATIONS, f"{name}.json"), path.read_bytes())


def copy_facts(source: str | os.PathLike, directory: str | os.PathLike) -> None:
    """
    Copy what the card says of a training to a model that was made from its result, such as a merged adapter. Figures
    of evaluations are not copied: rounding has made it another model.

    Args:
        source (`str` or `os.PathLike`): Directory of the trained model.
        directory (`str` or `os.PathLike`): Directory of the model made from it.
    """
    for name in (RUN_FILE, STATE_FILE, *PICTURES):
        if Path(source, name).is_file():
            shutil.copy2(Path(source, name), directory)


def is_hub_id(name: str | None) -> bool:
    """Whether a name is that of a repository rather than of something on this machine."""
    return bool(name) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not os.path.exists(name)


def base_license(base_model: str | None) -> dict[str, str]:
    """The licence that the base model's card on the Hub gives; nothing where it gives none or can not be asked."""
    from huggingface_hub import HfApi

    if not is_hub_id(base_model):
        return {}
    try:
        card = HfApi().model_info(base_model, timeout=10).card_data
    except Exception:  # offline, gone, gated: the card then refers to the base model
        return {}
    names = ("license", "license_name", "license_link")
    return {name: card[name] for name in names if card is not None and isinstance(card.get(name), str)}


def dataset_id(spec: str | None) -> str | None:
    """Hub id of the dataset that `owner/name[:config]` or the name of a published set names."""
    found = find_benchmark(spec or "")
    if found is not None:
        return found[0].hub_id
    name = (spec or "").partition(":")[0]
    on_disk = os.path.exists(name) or Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet")
    return name if is_hub_id(name) and not on_disk else None
