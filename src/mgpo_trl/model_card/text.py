"""A model card in Markdown: metadata, then one section after the other."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .facts import PAPER, CardFacts, dataset_id, is_hub_id

WRITTEN_BY = "<!-- Written by mgpo-trl. Take this line away to keep your own changes when you push again. -->"
TAGS = ("trl", "mgpo", "grounding")
MOST_LINES = 10
"""Log lines that a figure at the beginning or the end of training is the mean of."""

_OPTIONS = (
    "reward_funcs", "num_rounds", "num_generations", "learning_rate", "lr_scheduler_type", "beta", "loss_type",
    "scale_rewards", "temperature", "turn_loss_weights", "per_device_train_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "num_iterations", "max_steps", "num_train_epochs", "bf16", "seed", "dtype", "use_peft",
    "lora_r", "lora_alpha", "lora_target_modules", "load_in_4bit", "load_in_8bit",
)  # fmt: skip
"""Options that are shown, where they are set."""
_ASKED = 'said = vqa("photo.jpg", "What is the number on the door?", choices=["12", "21", "7"])'
_ASKED_BUILTIN = """\
row = load_builtin("builtin:{level}", limit=1).dataset[0]
said = vqa(row["image"]["bytes"], row["question"], row["choices"])"""
_HIT_RATE = "Hit rate: the share whose crop shows at least half of the target."
_MEASURES = re.compile(
    r"reward|rewards/.*/mean|grounding/(valid_ratio|hit_rate|coverage|crop_area)|turn\d+/(length|entropy|kl)"
)
"""Names of the training log that are shown."""


def format_card(facts: CardFacts) -> str:
    """The card in Markdown, with its metadata above it."""
    sections = [
        ("", _introduction(facts)),
        ("Quick start", _quick_start(facts)),
        ("Results", _results(facts)),
        ("How it is asked", _conversation(facts)),
        ("Training", _training(facts)),
        ("Versions", _versions(facts)),
        ("License", _license(facts)),
        ("Citation", _citation()),
    ]
    lines = ["---", _metadata(facts), "---", "", WRITTEN_BY, "", f"# {facts.name}", ""]
    for heading, text in sections:
        body = list(text)
        if body:
            lines += [*([f"## {heading}", ""] if heading else []), *body, ""]
    return "\n".join(lines).rstrip() + "\n"


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    dataset = dataset_id(facts.dataset)
    data = ModelCardData(
        base_model=facts.base_model if is_hub_id(facts.base_model) else None,
        datasets=[dataset] if dataset else None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys([*TAGS, *(["lora"] if facts.is_adapter else []), *facts.tags])),
        **facts.license,
    )
    return data.to_yaml()


def _introduction(facts: CardFacts) -> Iterator[str]:
    kind = "A LoRA adapter on" if facts.is_adapter else "A vision-language model, trained from"
    paper = f"[{PAPER['title']}](https://huggingface.co/papers/{PAPER['id']}) (arXiv {PAPER['id']})"
    yield f"{kind} {_base_words(facts)} with **MGPO**, multi-turn grounding-based policy optimization: {paper}."
    yield "Training and inference use [TRL](https://github.com/huggingface/trl) and `mgpo-trl`."
    yield from ("", _rounds_words(facts))
    if facts.picture:
        about = "What the model sees, the box it names, the crop that comes back, and its answer"
        yield from ("", f"![{about}]({facts.picture})")


def _base_words(facts: CardFacts) -> str:
    if is_hub_id(facts.base_model):
        return f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    if facts.result is not None:
        return "the small Qwen2.5-VL of the built-in task after its warm start"
    return f"the local model `{Path(facts.base_model).name}`" if facts.base_model else "a base model that is not known"


def _rounds_words(facts: CardFacts) -> str:
    if facts.conversation is not None and facts.conversation.num_rounds == 1:
        return "It answers in one round, without looking closer: the baseline of the method."
    text = (
        "It looks more than once: it names a region of the image, gets that region back, cut from the original at "
        "full resolution, and then answers."
    )
    rewards = facts.options.get("reward_funcs") or []
    if rewards and set(rewards) <= {"accuracy_reward", "flexible_accuracy_reward"}:
        text += " Only right and wrong answers were rewarded, never a box."
    return text


def _quick_start(facts: CardFacts) -> Iterator[str]:
    base, imported, asked = "", (), _ASKED
    if facts.result is not None:
        yield "The model knows the scenes of the built-in task, which the package draws, and nothing else.\n"
        imported = ("from mgpo_trl.builtin.loading import load_builtin",)
        asked = _ASKED_BUILTIN.format(level=facts.result["level"])
    if facts.is_adapter and not is_hub_id(facts.base_model):
        base = ', base_model="path/to/the/base/model"'
        yield "The adapter was trained on a model that is not on the Hub: name your copy of it.\n"
    yield from (
        "With the package `mgpo-trl` installed. Rounds, prompts, pixel caps and box rules come from this repository.",
        "",
        "```python",
        "from mgpo_trl import GroundedVQA",
        *imported,
        "",
        f'vqa = GroundedVQA.from_pretrained("{facts.repo_id}"{base})',
        asked,
        "print(said.answer, said.box)  # the letter, and the region in pixels of the original image",
        "```",
        "",
        "`choices` may be left out; `said.crop` is what the model looked at, `said.turns` what it wrote.",
    )


def _results(facts: CardFacts) -> Iterator[str]:
    if facts.result is not None:
        yield from _builtin_results(facts.result)
    if facts.reports:
        yield ""
        names = ["evaluation", "n", "accuracy (strict)", "hit rate", "valid boxes", "decoding", "max_pixels", "commit"]
        yield from _table(names, [_report_row(report) for report in facts.reports])
        yield "Shares with their standard errors. `strict` counts the letter or text in `\\boxed{}` only."
    if facts.result is not None or facts.reports:
        yield _HIT_RATE


def _builtin_results(result: Mapping[str, Any]) -> Iterator[str]:
    names = {"accuracy": "accuracy", "hit_rate": "hit rate", "valid_ratio": "valid boxes"}
    rows = [
        [label, *(_share(result[part][name], result[part][f"{name}_stderr"]) for part in ("base", "trained"))]
        for name, label in names.items()
    ]
    yield from _table(["", "before training", "after"], rows)
    yield (
        f"Held-out scenes of the built-in task `{result['level']}`, n = {result['n']}, ± standard error, "
        f"{result['decoding']}, seed {result['seed']}."
    )


def _report_row(report: Mapping[str, Any]) -> list[str]:
    stderr, accuracy = report.get("stderr") or {}, report["accuracy"]
    name = ", ".join(f"{report[key]}" for key in ("dataset", "split", "protocol") if report.get(key))
    decoding = report.get("decoding") or "-"
    return [
        name or "-",
        str(report["n"]),
        _share(accuracy["strict"], accuracy["stderr"]["strict"]),
        _share(report.get("hit_rate"), stderr.get("hit_rate")),
        _share(report.get("valid_ratio"), stderr.get("valid_ratio")),
        str(decoding.get("mode") if isinstance(decoding, Mapping) else decoding),
        str(report.get("max_pixels") or "-"),
        f"`{report['commit'][:12]}`" if report.get("commit") else "-",
    ]


def _share(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _conversation(facts: CardFacts) -> Iterator[str]:
    one = facts.conversation
    if one is None:
        return
    rows = [
        ["rounds", str(one.num_rounds)],
        ["pixel budget of every image", f"{one.min_pixels:,} to {one.max_pixels:,}"],
        ["coordinates of boxes", f"`{one.coordinates}`"],
        ["least side of a box", f"more than {one.min_box_side} px of the view"],
        ["tokens of each turn", ", ".join(f"at most {budget}" for budget in one.token_budgets)],
        ["prompts", f"fingerprint `{one.prompts.fingerprint}`"],
    ]
    yield from _table(["setting", "value"], rows)
    yield "All of it, with the prompts' words, is in `conversation.json`."


def _training(facts: CardFacts) -> Iterator[str]:
    words = []
    if facts.dataset:
        dataset = dataset_id(facts.dataset)
        shown = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else f"`{facts.dataset}`"
        words.append(f"Trained on {shown}.")
    if facts.steps:
        words.append(f"Optimizer steps: {facts.steps}.")
    if words:
        yield from (" ".join(words), "")
    if facts.run.get("command"):
        processes = facts.run.get("processes") or 1
        where = f", on {processes} processes" if processes > 1 else ""
        yield from (f"The command{where}:", "", "```bash", _command(facts.run["command"]), "```", "")
    options = _shown_options(facts.options)
    if options:
        yield from _table(["option", "value"], [[f"`{name}`", f"`{_value(options[name])}`"] for name in options])
    yield from _measures(facts.log)


def _shown_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that matter, without those that are not set or that another one overrules."""
    idle = {"num_train_epochs" if (options.get("max_steps") or 0) > 0 else "max_steps"}
    if not options.get("use_peft"):
        idle |= {"lora_r", "lora_alpha", "lora_target_modules"}
    shown = {name: options.get(name) for name in _OPTIONS if name not in idle}
    return {name: value for name, value in shown.items() if value is not None and value is not False}


def _command(command: str | Sequence[str]) -> str:
    """The command line; the file behind `python -m` is named by its module."""
    if isinstance(command, str):
        return command
    program, *words = command
    parts = Path(program).with_suffix("").parts
    if parts and parts[-1] == "__main__" and "mgpo_trl" in parts:
        inside = parts[len(parts) - 1 - parts[::-1].index("mgpo_trl") : -1]
        return shlex.join(["python", "-m", ".".join(inside), *words])
    return shlex.join([*(["python"] if program.endswith(".py") else []), Path(program).name, *words])


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _measures(log: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The training log at its two ends."""
    lines = [entry for entry in log if "reward" in entry]
    names = [name for name in (lines[-1] if lines else ()) if _MEASURES.fullmatch(name)]
    if not names:
        return
    some = max(1, min(MOST_LINES, len(lines) // 2))
    ends = {f"first {some} of {len(lines)} log lines": lines[:some], f"last {some}": lines[-some:]}
    rows = [[f"`{name}`", *(_mean([entry.get(name) for entry in end]) for end in ends.values())] for name in names]
    yield from _table(["while training", *ends], sorted(rows))
    yield "Means over sampled training rollouts, ± standard error over log lines; not a test of the model."


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None and value == value]
    if not known:
        return "-"
    spread = f" ± {stdev(known) / len(known) ** 0.5:.3f}" if len(known) > 1 else ""
    return f"{mean(known):.3f}{spread}"


def _versions(facts: CardFacts) -> Iterator[str]:
    versions = {"python": facts.run.get("python"), **(facts.run.get("versions") or {})}
    if known := [f"{name} {version}" for name, version in versions.items() if version]:
        yield ", ".join(known) + (f"; commit `{facts.run['commit'][:12]}`." if facts.run.get("commit") else ".")


def _license(facts: CardFacts) -> Iterator[str]:
    if facts.license:
        name = facts.license.get("license_name") or facts.license["license"]
        link = facts.license.get("license_link")
        yield f"That of the base model: {f'[{name}]({link})' if link else name}."
    elif is_hub_id(facts.base_model):
        yield f"See that of the base model, [{facts.base_model}](https://huggingface.co/{facts.base_model})."


def _citation() -> Iterator[str]:
    yield from ("The method:", "", "```bibtex", PAPER["citation"], "```")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""
