"""
Continues contexts with a transformers model and computes what they share once.

In one round, contexts that are equal (the prompt of a group; a group whose boxes agree) are prefilled once and their
cache is expanded. From round to round each context keeps its cache: only what was appended since (the reply and the
crop) is new. An image is encoded once, however many contexts show it. Rows that have ended leave the batch.

Only the order of the work differs from `model.generate`: the logits are the same up to rounding, whatever the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .processing import VisionChat
from .rollout import Context, Sampled
from .vision_features import features_as_inputs, features_of

PREFILL_TOKENS = 16_384
"""Most tokens of one prefill call."""
IMAGES_AT_ONCE = 16
"""Most images that the vision tower encodes in one call."""
MOST_PADDING = 1 / 8
"""Share of padding from which a prefill call is split by length."""
COMPACT_BELOW = 3 / 4
"""Share of rows still sampling below which the others leave the batch. Copies of the cache stay below four of it."""

KNOWN_OPTIONS = {
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "suppress_tokens",
    "pad_token_id", "bos_token_id", "eos_token_id", "no_repeat_ngram_size", "disable_compile", "use_cache",
    "transformers_version", "_from_model_config",
}  # fmt: skip
"""What a generation config may set; [`unknown_options`] names the rest."""


@dataclass
class _Cached:
    """What is known of one context after a round: keys and values of its first tokens."""

    ids: list[int]
    """Tokens in the cache."""
    images: int
    """Images among them."""
    next_position: int
    """Position of the token after them: an image takes fewer positions than tokens."""
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    """For each layer keys and values, (heads, tokens, dimension), without padding."""


@dataclass
class _Job:
    """A distinct context to be prefilled."""

    context: Context
    """Its ids and images."""
    cached: _Cached | None
    """Its cache from the round before."""
    positions: torch.Tensor
    """M-RoPE positions (3, tokens) of all its ids."""

    @property
    def start(self) -> int:
        """First token that is not in the cache."""
        return len(self.cached.ids) if self.cached else 0

    @property
    def new(self) -> int:
        """Tokens that are not in the cache."""
        return len(self.context.ids) - self.start


def unknown_options(config: GenerationConfig) -> list[str]:
    """
    Options of a generation config that [`SharedPrefixSampler`] does not know; empty where it can be used. `top_k` is
    among them where it is unset and would matter: `generate` fills in a default of its own.
    """
    harmless = {"no_repeat_ngram_size": (0, None)}
    unset = ["top_k"] if config.do_sample and config.top_k is None else []
    unknown = [
        name
        for name, value in config.to_diff_dict().items()
        if value is not None and (name not in KNOWN_OPTIONS or value not in harmless.get(name, (value,)))
    ]
    return sorted(unset + unknown)


class SharedPrefixSampler:
    """
    Samples turns; one instance serves every round of one batch of rollouts ([`~mgpo_trl.rollout.Generate`]).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, not wrapped, on its device.
        chat ([`VisionChat`]):
            Its processor.
        config ([`~transformers.GenerationConfig`]):
            How to sample; see [`unknown_options`].
        token_budgets (`Sequence[int]`):
            Most sampled tokens of each round.
        features ([`ImageFeatures`]):
            Where vision features come from.
        on_end (`Callable`, *optional*):
            Called with the place and the sampled ids of a context as soon as its turn has ended, while others go on.
    """

    def __init__(
        self,
        model,
        chat: VisionChat,
        config: GenerationConfig,
        token_budgets,
        features: "ImageFeatures",
        on_end: Callable[[int, list[int]], None] | None = None,
        keep_logprobs: bool = False,
    ):
        self.keep_logprobs = keep_logprobs
        self.on_end = on_end or (lambda place, ids: None)
        self.model, self.chat, self.config = model, chat, config
        self.token_budgets, self.features = list(token_budgets), features
        self.backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
        self.process = _logits_processors(config)
        ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
        self.ends = torch.tensor(ends, device=model.device)
        self._cached: list[_Cached | None] = []
        self.keeps = True

    @torch.no_grad()
    def __call__(self, contexts: Sequence[Context]) -> list[Sampled]:
        """Continue every context by one turn. From the second round on they are those of the round before, longer."""
        number = contexts[0].round
        if number == 1 or len(self._cached) != len(contexts):
            self._cached = [None] * len(contexts)
        rows, logits = self._prefill(contexts)
        decoding = _Decoding(self, rows, logits)
        self.keeps = number < len(self.token_budgets)
        decoding.run(self.token_budgets[number - 1])
        if self.keeps:
            self._cached = decoding.cached()
        logprobs = decoding.logprobs if self.keep_logprobs else [None] * len(contexts)
        return [Sampled(*one) for one in zip(decoding.sampled, logprobs, strict=True)]

    def _prefill(self, contexts: Sequence[Context]) -> tuple[list[_Cached], torch.Tensor]:
        """Cache of each context and logits (B, V) of its next token; equal contexts share both."""
        keys = [(tuple(context.ids), tuple(map(id, context.images))) for context in contexts]
        jobs = {key: self._job(contexts[row], row) for row, key in reversed(list(enumerate(keys)))}
        self._cached = []
        done = {}
        for batch in _batches(jobs):
            outputs = self._forward([jobs[key] for key in batch])
            done.update(zip(batch, outputs, strict=True))
        return [done[key][0] for key in keys], torch.stack([done[key][1] for key in keys])

    def _job(self, context: Context, row: int) -> _Job:
        cached = self._cached[row]
        if cached and context.ids[: len(cached.ids)] != cached.ids:
            raise ValueError(
                f"Context {row} of round {context.round} does not continue that of the round before. Use a new "
                "sampler for new rollouts."
            )
        positions, _ = self.backbone.get_rope_index(
            torch.tensor([context.ids]),
            mm_token_type_ids=torch.tensor([self.chat.token_types(context.ids)]),
            image_grid_thw=torch.tensor([self.chat.grid(image) for image in context.images]),
        )
        return _Job(context, cached, positions[:, 0])

    def _forward(self, jobs: list[_Job]) -> list[tuple[_Cached, torch.Tensor]]:
        """Run the new tokens of some contexts on their caches."""
        device = self.model.device
        cache, before = _assemble([job.cached for job in jobs], device)
        length = max(job.new for job in jobs)
        ids = torch.full((len(jobs), length), self.chat.tokenizer.pad_token_id)
        positions = torch.zeros(3, len(jobs), length, dtype=torch.long)
        mask = torch.zeros(len(jobs), length, dtype=torch.long)
        for row, job in enumerate(jobs):
            ids[row, length - job.new :] = torch.tensor(job.context.ids[job.start :])
            positions[:, row, length - job.new :] = job.positions[:, job.start :]
            mask[row, length - job.new :] = 1
        mask = torch.cat([before, mask.to(device)], dim=1)
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **self._images(jobs),
        )
        rows = _take_apart(output.past_key_values, mask.bool())
        return [
            (_Cached(job.context.ids, len(job.context.images), int(job.positions.max()) + 1, layers), logits)
            for job, layers, logits in zip(jobs, rows, output.logits[:, -1], strict=True)
        ]

    def _images(self, jobs: list[_Job]) -> dict:
        new = [image for job in jobs for image in job.context.images[job.cached.images if job.cached else 0 :]]
        return self.features.model_inputs(new) if new else {}


class _Decoding:
    """The sampling of one round: one token a step for every row that has not ended."""

    def __init__(self, sampler: SharedPrefixSampler, rows: list[_Cached], logits: torch.Tensor):
        device = logits.device
        self.sampler, self.rows = sampler, rows
        self.logits = logits
        """(R, V) for the R rows in the batch."""
        self.sampled: list[list[int]] = [[] for _ in rows]
        self.logprobs: list[list[float]] = [[] for _ in rows]
        """Of the sampled tokens, where they are kept. As in the loss, only the temperature changes them."""
        self.numbers = torch.arange(len(rows), device=device)
        """(R,): which row each one of the batch is."""
        self.ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.cache, self.mask = _assemble(rows, device)
        self.ids = _left_pad([row.ids for row in rows], sampler.chat.tokenizer.pad_token_id).to(device)
        self.positions = torch.tensor([row.next_position for row in rows], device=device)
        self._layers: dict[int, list] = {}

    def run(self, budget: int) -> None:
        """Sample until every row has ended or used up its budget. The last sampled token of a row is not cached."""
        for step in range(budget):
            token = self._choose()
            if self.sampler.keep_logprobs:
                self._note_logprobs(token)
            for number, ended, chosen in zip(self.numbers.tolist(), self.ended.tolist(), token.tolist(), strict=True):
                if not ended:
                    self.sampled[number].append(chosen)
            self._end(torch.isin(token, self.sampler.ends) & ~self.ended)
            if step + 1 == budget or bool(self.ended.all()):
                break
            if (~self.ended).float().mean() < COMPACT_BELOW:
                token = token[self._drop_ended()]
            self._feed(token)

    def cached(self) -> list[_Cached]:
        """The cache of every row after the round, for the next one."""
        self._set_aside(torch.ones_like(self.ended))
        return [
            _Cached(row.ids + sampled[:-1], row.images, row.next_position + len(sampled) - 1, self._layers[number])
            for number, (row, sampled) in enumerate(zip(self.rows, self.sampled, strict=True))
        ]

    def _end(self, ending: torch.Tensor) -> None:
        self.ended |= ending
        for number in self.numbers[ending].tolist():
            self.sampler.on_end(number, self.sampled[number])

    def _choose(self) -> torch.Tensor:
        scores = self.sampler.process(self.ids, self.logits.float())
        if not self.sampler.config.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)

    def _note_logprobs(self, token: torch.Tensor) -> None:
        logprobs = (self.logits.float() / (self.sampler.config.temperature or 1.0)).log_softmax(-1)
        chosen = logprobs.gather(1, token.unsqueeze(1)).squeeze(1)
        for number, ended, value in zip(self.numbers.tolist(), self.ended.tolist(), chosen.tolist(), strict=True):
            if not ended:
                self.logprobs[number].append(value)

    def _feed(self, token: torch.Tensor) -> None:
        """Run one token of each row; those that have ended write into a slot that nobody looks at."""
        running = ~self.ended
        self.mask = torch.cat([self.mask, running.long().unsqueeze(1)], dim=1)
        self.ids = torch.cat([self.ids, token.unsqueeze(1)], dim=1)
        output = self.sampler.model(
            input_ids=token.unsqueeze(1),
            attention_mask=self.mask,
            position_ids=self.positions.view(1, -1, 1).expand(3, -1, 1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]
        self.positions = self.positions + 1

    def _drop_ended(self) -> torch.Tensor:
        """Take the rows that have ended out of the batch; returns which stay."""
        self._set_aside(self.ended)
        stay = (~self.ended).nonzero().squeeze(1)
        self.cache.batch_select_indices(stay)
        for name in ("numbers", "ended", "mask", "ids", "positions", "logits"):
            setattr(self, name, getattr(self, name)[stay])
        return stay

    def _set_aside(self, chosen: torch.Tensor) -> None:
        """Copy the cache of some rows, for the next round."""
        if not self.sampler.keeps:
            return
        for row in chosen.nonzero().squeeze(1).tolist():
            slots = self.mask[row].bool()
            self._layers[int(self.numbers[row])] = [
                (layer.keys[row][:, slots], layer.values[row][:, slots]) for layer in self.cache.layers
            ]


class ImageFeatures:
    """
    Pixels and vision features of images, each computed once.

    Args:
        backbone: Has `get_image_features`.
        chat ([`VisionChat`]): Encodes the images.
        batch (`int`, *optional*): Images encoded at once; [`IMAGES_AT_ONCE`] unless given.
    """

    def __init__(self, backbone, chat: VisionChat, batch: int = IMAGES_AT_ONCE):
        self.backbone, self.chat, self.batch = backbone, chat, batch
        self._images: dict[int, Image.Image] = {}  # kept, so that their ids stay their own
        self._pixels: dict[int, dict[str, torch.Tensor]] = {}
        self._features: dict[int, torch.Tensor] = {}

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What the image processor makes of fitted images; see [`VisionChat.encode_images`]."""
        for image in images:
            if id(image) not in self._pixels:
                self._images[id(image)] = image
                self._pixels[id(image)] = self.chat.encode_images([image])
        parts = [self._pixels[id(image)] for image in images]
        return {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values", "image_grid_thw")}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """Features ([`~mgpo_trl.vision_features`]) of each image; equal images (the same object) share one tensor."""
        new = list({id(image): image for image in images if id(image) not in self._features}.values())
        for start in range(0, len(new), self.batch):
            chosen = new[start : start + self.batch]
            tensors = self.pixels(chosen)
            device = self.backbone.device
            output = self.backbone.get_image_features(
                tensors["pixel_values"].to(device), tensors["image_grid_thw"].to(device), return_dict=True
            )
            self._features.update(
                (id(image), features) for image, features in zip(chosen, features_of(output), strict=True)
            )
        return [self._features[id(image)] for image in images]

    @contextmanager
    def stand_in(self, processor) -> Iterator[None]:
        """While open, the processor's image processor takes flat lists of images from here."""
        original = processor.image_processor
        processor.image_processor = _Once(original, self)
        try:
            yield
        finally:
            processor.image_processor = original

    def model_inputs(self, images: Sequence[Image.Image]) -> dict:
        """The keyword arguments that give a model these images."""
        return features_as_inputs(self(images), self.backbone.config.get_text_config().hidden_size)


class _Once:
    """An image processor that gives what is known already, and is the original in everything else."""

    def __init__(self, original, features: ImageFeatures):
        self._original, self._features = original, features

    def __getattr__(self, name: str):
        return getattr(self._original, name)

    def __call__(self, images=None, *args, **kwargs):
        flat = isinstance(images, list) and all(isinstance(image, Image.Image) for image in images)
        if flat and not args and kwargs == {"return_tensors": "pt"}:
            return self._features.pixels(images)
        return self._original(images, *args, **kwargs)


def _logits_processors(config: GenerationConfig) -> LogitsProcessorList:
    """What changes the logits before sampling, in the order of `generate`."""
    processors = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.suppress_tokens:
        processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.do_sample:
        if config.temperature not in (None, 1.0):
            processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            processors.append(TopPLogitsWarper(config.top_p))
        if config.min_p is not None:
            processors.append(MinPLogitsWarper(config.min_p))
    return processors


def _batches(jobs: dict) -> Iterator[list]:
    """Keys of the jobs in batches of similar length, longest first."""
    batch, longest, total = [], 0, 0
    for key in sorted(jobs, key=lambda key: -jobs[key].new):
        new = jobs[key].new
        padded = longest * (len(batch) + 1)
        if batch and (padded > PREFILL_TOKENS or padded - total - new > MOST_PADDING * padded):
            yield batch
            batch, total = [], 0
        longest = new if not batch else longest
        batch.append(key)
        total += new
    yield batch


def _assemble(rows: Sequence[_Cached | None], device) -> tuple[DynamicCache, torch.Tensor]:
    """One left-padded cache of several rows, and its attention mask (rows, tokens)."""
    lengths = [len(row.ids) if row else 0 for row in rows]
    length = max(lengths)
    mask = torch.tensor([[0] * (length - one) + [1] * one for one in lengths], device=device).view(len(rows), length)
    cache = DynamicCache()
    if length == 0:
        return cache, mask
    for number, (keys, _) in enumerate(next(row for row in rows if row).layers):
        parts = [keys.new_zeros(len(rows), keys.size(0), length, keys.size(2)) for _ in range(2)]
        for row, cached in enumerate(rows):
            if cached:
                for part, states in zip(parts, cached.layers[number], strict=True):
                    part[row, :, length - lengths[row] :] = states
        cache.update(*parts, number)
    return cache, mask


def _take_apart(cache: DynamicCache, mask: torch.Tensor) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Keys and values of each row without padding."""
    return [
        [(layer.keys[row][:, slots], layer.values[row][:, slots]) for layer in cache.layers]
        for row, slots in enumerate(mask)
    ]


def _left_pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])
