"""Options of `eval.py`. Imports neither torch nor the model code, so that `--help` answers at once."""

from dataclasses import dataclass, field

from ..boxes import COORDINATES
from ..image_loading import THREADS, VIEW_DECODING
from .extractors import resolve_scoring
from .protocols import PROTOCOLS

AS_TRAINED = "Unset: as the model was trained."


@dataclass
class EvalArguments:
    """
    What to evaluate, on what, and how. Settings of the conversation default to those saved with the model, else to the
    paper's.
    """

    model: str | None = field(
        default=None, metadata={"help": "Model directory, Hub id, or directory of a LoRA adapter."}
    )
    adapter: str | None = field(default=None, metadata={"help": "LoRA adapter to put on `--model`."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "`.jsonl`, `.json` or `.csv` file, image folder with metadata, saved dataset, Parquet, Hub id "
            "`owner/name[:config]`, a published set (`vstar`, `hrbench-4k`, `mme-realworld-lite`, or `vstar:PATH` "
            "for a local copy), or `builtin:needle` / `builtin:refer`."
        },
    )
    split: str | None = field(default=None, metadata={"help": "Split of the dataset, where it has several."})
    columns: str | None = field(
        default=None, metadata={"help": 'Column names as JSON, ours to yours: {"question": "text"}.'}
    )
    output_dir: str = field(default="outputs/eval", metadata={"help": "Where run.json, rollouts and report go."})
    rescore: str | None = field(
        default=None, metadata={"help": "Score the rollouts of this directory again and stop. Needs no model."}
    )
    compare: list[str] | None = field(
        default=None, metadata={"help": "Compare two result directories question by question, and stop."}
    )
    protocol: list[str] | None = field(
        default=None,
        metadata={
            "help": f"How questions are played, one or several of {', '.join(PROTOCOLS)}. With several, round 1 is "
            "sampled once, and the report says what the crop was worth."
        },
    )
    num_samples: int = field(default=1, metadata={"help": "Rollouts of a question, for Avg@k. Needs a temperature."})
    shuffle_choices: int | None = field(
        default=None, metadata={"help": "Seed by which the choices of every question are put in another order."}
    )
    scoring: str = field(
        default="strict",
        metadata={
            "help": "`official` adds the accuracy by the loose extractor of the dataset's authors, `official:NAME` by "
            "a named one (mme-realworld, vstar, hrbench)."
        },
    )
    view_decoding: str = field(
        default="exact",
        metadata={
            "help": "`draft` makes views of JPEGs from fewer pixels: faster, not bit-exact.",
            "choices": list(VIEW_DECODING),
        },
    )
    pictures: int = field(default=2000, metadata={"help": "Rollouts that get small pictures in report.html."})
    image_threads: int = field(default=THREADS, metadata={"help": "Threads that decode images; 0 for none."})
    num_rounds: int | None = field(
        default=None, metadata={"help": f"1 answers directly, 2 is MGPO, more zoom again. {AS_TRAINED}"}
    )
    max_pixels: str | None = field(
        default=None, metadata={"help": f"Pixel budget, as 1003520 or 1280x28x28. {AS_TRAINED}"}
    )
    min_pixels: str | None = field(
        default=None, metadata={"help": f"Smaller images are enlarged to this. {AS_TRAINED}"}
    )
    token_budgets: list[int] | None = field(
        default=None, metadata={"help": f"Most sampled tokens of each round. {AS_TRAINED}"}
    )
    coordinates: str | None = field(
        default=None, metadata={"help": f"How the model writes boxes. {AS_TRAINED}", "choices": list(COORDINATES)}
    )
    min_box_side: int | None = field(
        default=None,
        metadata={"help": f"Each side of a usable box is longer than this many view pixels. {AS_TRAINED}"},
    )
    prompts_file: str | None = field(
        default=None, metadata={"help": f"YAML file that replaces parts of the prompts. {AS_TRAINED}"}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily; above, answers are sampled."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of sampling; without effect when greedy."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling, and of the built-in scenes."})
    batch_size: int = field(default=16, metadata={"help": "Rollouts generated at once."})
    limit: int | None = field(default=None, metadata={"help": "Evaluate the first rows only."})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out bad rows, and list them, instead of stopping at the first."}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights, as in `from_pretrained`."})
    device: str | None = field(default=None, metadata={"help": "Device; the accelerator when there is one."})

    def __post_init__(self):
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError(f"`--compare` takes two result directories, got {self.compare}.")
        if self.rescore is None and self.compare is None:
            for name in ("model", "dataset"):
                if getattr(self, name) is None:
                    raise ValueError(f"`--{name}` is missing. Give it, or `--rescore DIR` to score saved rollouts.")
        for name in ("batch_size", "limit", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` must be >= 1, got {value}.")
        if self.temperature < 0:
            raise ValueError(f"`--temperature` must be >= 0, got {self.temperature}. Use 0 for greedy decoding.")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"`--num_samples {self.num_samples}` needs a `--temperature` above 0: greedy rollouts of one question "
                "are all alike."
            )
        if self.protocol and self.num_rounds == 1 and self.protocol != ["direct"]:
            raise ValueError(f"`--num_rounds 1` is the protocol direct, got {self.protocol}. Leave one out.")
        self.official = resolve_scoring(self.scoring, self.dataset)

    @property
    def decoding(self) -> dict:
        """How answers are decoded, for the record."""
        if self.temperature == 0:
            return {"mode": "greedy"}
        return {"mode": "sampled", "temperature": self.temperature, "top_p": self.top_p}
