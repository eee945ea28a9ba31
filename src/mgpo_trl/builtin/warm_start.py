"""
The supervised warm start of the built-in model: what published models bring along, a weak habit of boxes and answers.

It teaches three skills: see (where is a card), read (what is on a crop), and talk (the two-round dialogue with boxes
that are right only now and then). The result is cached on disk under everything that it depends on.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from mgpo_trl.builtin.batch import Collator, token_losses, weighted_mean
from mgpo_trl.builtin.lessons import Item, Lessons, Sample
from mgpo_trl.builtin.recipe import RECIPES, WarmStartRecipe
from mgpo_trl.builtin.scenes import GRID, HATCHES
from mgpo_trl.builtin.tiny import MAX_PIXELS, MIN_PIXELS, build_tiny, register_processor
from mgpo_trl.processing import VisionChat
from mgpo_trl.prompts import PromptTemplate

_ASIDE = 64
"""Scenes of the training split, behind those that are trained on, that tell when the first stage may end."""
_CHECK_EVERY = 10
_SOURCES = ("scenes", "needle", "tokenizer", "tiny", "lessons", "batch", "warm_start")
_RECORD = "warm_start.json"


@dataclass(frozen=True)
class WarmStart:
    """A warm-started model on disk."""

    model_dir: Path
    """Model and processor, for `from_pretrained`."""
    seconds: float
    """Time that the training took, also when it is read from the cache."""
    from_cache: bool
    """Whether it was there already."""


def warm_start(
    level: str,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    recipe: WarmStartRecipe | None = None,
    template: PromptTemplate | None = None,
) -> WarmStart:
    """
    Train the small model to the point from which reinforcement learning starts, or find it in the cache.

    Args:
        level (`str`): `"needle"` or `"refer"`.
        seed (`int`, *optional*, defaults to `0`): Seed of the weights, the scenes and the order of the samples.
        cache_dir (`str` or `os.PathLike`, *optional*): Where results are kept. Defaults to [`default_cache_dir`].
        recipe ([`WarmStartRecipe`], *optional*): Constants. Defaults to those of the level.
        template ([`PromptTemplate`], *optional*): The conversation. Defaults to the default one.

    Returns:
        [`WarmStart`]: The directory, and how long it took to make.
    """
    register_processor()
    recipe = recipe or RECIPES[level].warm_start
    template = template or PromptTemplate()
    root = Path(cache_dir) if cache_dir else default_cache_dir()
    target = root / f"{level}-seed{seed}-{_fingerprint(level, seed, recipe, template)}"
    if from_cache := target.is_dir():
        return WarmStart(target, _read_seconds(target), from_cache)
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
    try:
        _train_into(unfinished, level, seed, recipe, template)
        _publish(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return WarmStart(target, _read_seconds(target), from_cache)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/mgpo_trl`, by default `~/.cache/mgpo_trl`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgpo_trl"


class _Teacher:
    """One warm start: the model, the samples, and two stages that end when they have done their work."""

    def __init__(self, level: str, seed: int, recipe: WarmStartRecipe, template: PromptTemplate):
        self.level, self.recipe = level, recipe
        self.model, self.processor = build_tiny(level, seed, template)
        chat = VisionChat(self.processor, max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS)
        self.lessons = Lessons(chat, template, level, seed)
        self.collate = Collator(self.model, chat)
        self.items = self.lessons.items(0, recipe.scenes)
        self.aside = self.lessons.items(recipe.scenes, recipe.scenes + _ASIDE)
        self.rng = np.random.default_rng((seed, 7))
        self.reading_loss = math.inf
        self.losses: list[float] = []
        self.bar = tqdm(total=recipe.seeing_steps + recipe.talking_steps, desc=f"warm start ({level})", unit="step")

    def run(self) -> dict:
        """Both stages; returns what the record keeps."""
        self.model.train()
        seeing_steps, exact = self.see()
        self.bar.total = seeing_steps + self.recipe.talking_steps
        self.talk()
        hits = self.exact_boxes()
        self.model.eval()
        self.bar.close()
        return {"seeing_steps": seeing_steps, "exact_boxes": exact, "reading_loss": self.reading_loss, "hits": hits}

    def see(self) -> tuple[int, float]:
        """First stage: boxes and crops, until both are learnt. Returns the steps and the chance of an exact box."""
        optimizer = self._optimizer(self.recipe.lr)
        exact = 0.0
        for step in range(1, self.recipe.seeing_steps + 1):
            _set_lr(optimizer, self.recipe.lr * min(1.0, step / self.recipe.warmup_steps))
            self._step(optimizer, self._seeing_loss())
            if step % _CHECK_EVERY == 0:
                exact = self.exact_boxes()
                self.bar.set_postfix(exact_boxes=f"{exact:.2f}", reading_loss=f"{self.reading_loss:.2f}")
                if exact >= self.recipe.seeing_enough and self.reading_loss < self.recipe.reading_learnt:
                    break
        return step, exact

    def talk(self) -> None:
        """Second stage: whole dialogues, which dilute the skill of the first to a weak habit."""
        optimizer = self._optimizer(self.recipe.talking_lr)
        for step in range(self.recipe.talking_steps):
            progress = step / self.recipe.talking_steps
            _set_lr(optimizer, self.recipe.talking_lr * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2))
            self._talk_once(optimizer)
        self.dilute(optimizer)

    def dilute(self, optimizer: torch.optim.Optimizer) -> None:
        """Go on with uniform cells in place of the card while the habit is stronger than `hit_ceiling`."""
        _set_lr(optimizer, self.recipe.talking_lr * 0.3)
        for _ in range(self.recipe.diluting_steps):
            if self.exact_boxes() <= self.recipe.hit_ceiling:
                break
            self._talk_once(optimizer, target="any")

    def _talk_once(self, optimizer: torch.optim.Optimizer, target: str = "target") -> None:
        batch = self.collate([self._dialogue(item, target) for item in self._draw(self.recipe.talking_batch)])
        self._step(optimizer, weighted_mean(token_losses(self.model, batch), batch["weights"]))

    @torch.no_grad()
    def exact_boxes(self) -> float:
        """Mean probability that a sampled box is exact, on the scenes set aside."""
        batch = self.collate([self.lessons.probe(item) for item in self.aside])
        return torch.exp(-token_losses(self.model, batch).sum(1)).mean().item()

    def _seeing_loss(self) -> torch.Tensor:
        recipe = self.recipe
        crops = recipe.reading_batch if self.reading_loss > recipe.reading_learnt else recipe.reading_batch_later
        views = self.collate([self.lessons.seeing(item) for item in self._draw(recipe.seeing_batch)])
        reading = self.collate([self.lessons.reading(item) for item in self._draw(crops)])
        seen = weighted_mean(token_losses(self.model, views), views["weights"])
        losses = token_losses(self.model, reading)
        self.reading_loss = _running(self.reading_loss, losses.sum(1).mean().item())
        return seen + recipe.reading_weight * weighted_mean(losses, reading["weights"])

    def _dialogue(self, item: Item, target: str = "target") -> Sample:
        recipe, rng = self.recipe, self.rng
        kinds = ("direct", "given", target, "centre", "any")
        shares = (recipe.direct_share, recipe.given_share, recipe.target_share, recipe.centre_share)
        kind = rng.choice(kinds, p=[*shares, 1 - sum(shares)])
        if kind == "direct":
            return self.lessons.direct(item, int(rng.integers(len(HATCHES))))
        if kind == "given":
            return self.lessons.dialogue(item, item.asked.cell, rng, box_weight=0.0)
        cells = {"target": item.asked.cell, "centre": GRID * GRID // 2, "any": int(rng.integers(GRID * GRID))}
        return self.lessons.dialogue(item, cells[kind], rng)

    def _draw(self, n: int) -> list[Item]:
        return [self.items[index] for index in self.rng.integers(len(self.items), size=n)]

    def _optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=self.recipe.weight_decay
        )

    def _step(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(loss.item())
        self.bar.update()


def _train_into(directory: Path, level: str, seed: int, recipe: WarmStartRecipe, template: PromptTemplate) -> None:
    started = time.perf_counter()
    teacher = _Teacher(level, seed, recipe, template)
    facts = teacher.run()
    teacher.model.save_pretrained(directory)
    teacher.processor.save_pretrained(directory)
    facts = {"level": level, "seed": seed, "seconds": time.perf_counter() - started, **facts}
    record = {**facts, "losses": teacher.losses, "recipe": asdict(recipe), "prompts": template.fingerprint}
    (directory / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _publish(unfinished: Path, target: Path) -> None:
    """Rename in one step; where another process was faster, its result stays."""
    try:
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _read_seconds(directory: Path) -> float:
    return json.loads((directory / _RECORD).read_text(encoding="utf-8"))["seconds"]


def _fingerprint(level: str, seed: int, recipe: WarmStartRecipe, template: PromptTemplate) -> str:
    """Of everything that the weights depend on, this package's code for it included."""
    sources = [(Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in _SOURCES]
    versions = [torch.__version__, transformers.__version__]
    text = json.dumps([level, seed, asdict(recipe), template.fingerprint, versions, sources])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _running(mean: float, value: float) -> float:
    return value if math.isinf(mean) else 0.9 * mean + 0.1 * value
