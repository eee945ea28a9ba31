"""`MGPOTrainer`: GRPO over a conversation of fixed rounds, with a crop of the original image between them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from datasets import Image as ImageFeature
from transformers import AutoProcessor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from .adapters import is_adapter, is_vision_frozen, load_trainable, stop_gradients_at_frozen_vision
from .checkpoints import Checkpoints
from .conversation import Conversation
from .hub import prepare_push
from .image_loading import ImageLoader
from .launch_checks import check_launch, check_quantized, warn_of_lost_updates
from .loss_utils import is_clipped, kl_to_reference, pad_turn_ids, relative_weights, sums_by_turn, turn_weights
from .mgpo_config import MGPOConfig
from .model_card import PAPER, pick_rollouts
from .out_of_memory import Load, memory_advice
from .packing import grouped_order, install_packed_attention, reorder
from .processing import SHARED_FAMILIES, check_model_type, check_processor, load_config, vision_token_ids
from .prompts import load_prompts
from .rollout import (
    Context,
    Crops,
    Rollout,
    Sampled,
    flatten,
    read_region,
    run_rounds,
    start_rollouts,
    with_ids,
)
from .rollout_metrics import rollout_sums
from .scoring import RolloutFacts, packed_logps
from .shared_prefix import ImageFeatures, SharedPrefixSampler, unknown_options
from .vllm_rollout import round_generation, sampling_logprobs
from .watching.watcher import RolloutWatcher


class MGPOTrainer(Checkpoints, GRPOTrainer):
    r"""
    Trainer for Multi-turn Grounding-based Policy Optimization (MGPO, [arXiv
    2507.05920](https://arxiv.org/abs/2507.05920)).

    What changes w.r.t. [`~trl.GRPOTrainer`]: generation plays [`MGPOConfig.num_rounds`] rounds, cutting each named
    region from the original image in between, and the loss covers the tokens that the model sampled, round by round.
    Rewards, advantages, loss types, PEFT, DeepSpeed and vLLM are inherited.

    A dataset row has `image` (path, `{"bytes", "path"}` or `PIL.Image.Image`) and `question`, optionally `choices`,
    `answer`, `target_boxes` (original pixels), `category`, `id`; no `prompt` column is needed. Reward functions get
    every column except the raw image, and for each rollout: `image` (the original), `rollouts`
    ([`~mgpo_trl.rollout.Rollout`]), `boxes`, `statuses` and `crops` (one entry for each round before the last).

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or `PeftModel`):
            A vision-language model of the Qwen-VL family, or the directory of a LoRA adapter to train further.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            As in [`~trl.GRPOTrainer`]; [`~mgpo_trl.rewards.accuracy_reward`] is the paper's reward.
        args ([`MGPOConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows as above.
        eval_dataset (*optional*):
            Likewise, or a dictionary of such datasets.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Processor of the model; loaded from the model's directory when not given. Its pixel budget is set to the
            configuration's, so that a saved checkpoint carries it, and its padding to the left.

    Raises:
        ValueError: The launch can not do what it was asked for, the dataset lacks a column, the model is not of a
            supported family, or `tools`, `rollout_func` or `environment_factory` is given.
    """

    _tag_names = ["trl", "mgpo"]
    _name = "MGPO"
    _paper = PAPER

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: MGPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        model_name = model if isinstance(model, str) else model.config._name_or_path
        args = args or MGPOConfig(f"{model_name.split('/')[-1]}-MGPO")
        check_launch(args)
        check_quantized(kwargs.get("quantization_config"), args)
        prepare_push(args)
        if isinstance(model, str) and is_adapter(model):
            model = load_trainable(model, args, quantization=kwargs.pop("quantization_config", None))
            model_name = model.config._name_or_path
        _check_family(model, model_name, args)
        prompts = load_prompts(args.prompts_file)
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                model_name,
                revision=(args.model_init_kwargs or {}).get("revision"),
                padding_side="left",
                trust_remote_code=args.trust_remote_code,
            )
        check_processor(processing_class)
        processing_class.tokenizer.padding_side = "left"  # one round: TRL pads token types with it, beside prompt ids
        _check_arguments(kwargs)
        _check_length(train_dataset, args)
        round_generation(args)(super().__init__)(
            model,
            reward_funcs,
            args=args,
            train_dataset=_undecoded(train_dataset, "train_dataset"),
            eval_dataset=_undecoded(eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            **kwargs,
        )
        warn_of_lost_updates(self.model, args)
        # Asked once: while a reference pass has the adapter disabled, none of its weights requires a gradient.
        self._tower_is_frozen = is_vision_frozen(self.model)
        stop_gradients_at_frozen_vision(self.model)
        self.conversation = Conversation.from_config(args, prompts)
        self.template = self.conversation.template(
            processing_class, self.model.config.model_type, end_ids=self.eos_token_ids
        )
        # A saved model says how it writes boxes, not that this follows from its family.
        self.conversation = replace(self.conversation, coordinates=self.template.coordinates)
        self.chat = self.template.chat
        # TRL builds the tensors of images that join during the rollout only where tools are set. One round adds no
        # image, and TRL would then render the tools into its prompt.
        self.tools = [_crop_tool] if args.num_rounds > 1 else []
        # TRL would zero the attention of a cut completion, image tokens included, and so misplace every later image.
        # Here a cut turn leaves the loss and stays in view of the attention (see `_loss_turn_ids`).
        self.mask_truncated_completions = False
        # The constant normaliser of `dr_grpo` is the most tokens that a rollout can sample.
        self.max_completion_length = sum(args.token_budgets)
        self._loader = ImageLoader(self.chat)
        if args.dataloader_num_workers == 0:  # the loader fetches a batch while the one before it is trained on
            self.data_collator = self._begin_images
        self._rollouts: list[Rollout] = []
        self._pictured: list[Rollout] = []
        self._round = 1
        self._loss_outputs: tuple[torch.Tensor, torch.Tensor] | None = None
        self._facts: RolloutFacts | None = None
        models = [self._bare_model(model) for model in (self.model, self.ref_model) if model is not None]
        # The shared paths hand vision features and packed rows to the model: known for these families, and only where
        # every process holds the whole model.
        self._may_share = self.model.config.model_type in SHARED_FAMILIES and not self.is_sharded
        self._packs = (
            args.pack_loss
            and self._may_share
            and not self.aux_loss_enabled
            and all(map(install_packed_attention, models))
        )
        self._in_hand: tuple[str, list[Load]] | None = None
        self._keep_used_names()
        self._suppress_vision_tokens()
        self._shares_prefix = args.share_prefix and self._can_share_prefix()
        self._features: ImageFeatures | None = None
        self._sampler: SharedPrefixSampler | None = None
        self._keeps_logprobs = False  # those of the sampler are wanted only where they are compared with the loss
        self._crops: Crops | None = None
        self._rewards: torch.Tensor | None = None
        self._watcher: RolloutWatcher | None = None
        if args.log_rollouts_steps:
            weights = list(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
            self._watcher = RolloutWatcher(args, weights, self.callback_handler.callbacks)
            self.add_callback(self._watcher)

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds the whole model."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def _can_share_prefix(self) -> bool:
        """Whether generation may run step by step on this process alone, with options that are known."""
        other = self.use_vllm or self.use_transformers_continuous_batching
        return self._may_share and not other and not unknown_options(self.generation_config)

    def _suppress_vision_tokens(self) -> None:
        """A sampled placeholder would have no image behind it: the position code fails on it."""
        vision_ids = vision_token_ids(self.model.config)
        if self.use_vllm:
            wanted = dict.fromkeys(vision_ids, -100.0)
            extra = self.vllm_generation.generation_kwargs or {}
            self.vllm_generation.generation_kwargs = {**extra, "logit_bias": {**wanted, **extra.get("logit_bias", {})}}
            return
        suppressed = sorted({*vision_ids, *(self.generation_config.suppress_tokens or [])})
        self.generation_config.suppress_tokens = suppressed
        self.generation_kwargs["suppress_tokens"] = suppressed

    def _begin_images(self, rows: list[dict]) -> list[dict]:
        """The data collator: worker threads open the images of these rows while the model is busy with others."""
        if all("image" in row for row in rows):  # a missing column is named when the rows are played
            self._loader.begin(with_ids(rows))
        return rows

    # Generation

    def _prepare_inputs(self, generation_batch):
        """As in TRL, but the rollouts of a group stay together when the batch is shuffled: they share their prompt."""
        if not (self._packs and self.model.training):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            batch = reorder(batch, grouped_order(batch["prompt_keys"]))
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in split_tensor_dict(batch, steps)]
        return self._buffered_inputs[self._step % steps]

    def _generate_and_score_completions(self, inputs):
        _check_columns(inputs[0], "a row")
        opened = self._loader.finish(with_ids(inputs))
        self._rollouts = start_rollouts(inputs, self.template, self.args.num_rounds, opened)
        self._round = 1
        self._crops = Crops(self.chat, self._loader.submit)
        self._features = ImageFeatures(self._bare_model(self.model).base_model, self.chat)
        self._sampler = None
        rows = [
            {
                **{name: value for name, value in row.items() if name not in ("image", "images")},
                "prompt": self._prompt(r),
            }
            for row, r in zip(inputs, self._rollouts, strict=True)
        ]
        with self._features.stand_in(self.processing_class) if self.args.encode_once else nullcontext():
            output = super()._generate_and_score_completions(rows)
        if "pixel_values" not in output:
            raise RuntimeError(
                f"Images were dropped on the way to the loss (samples {[r.id for r in self._rollouts]}). "
                "This TRL treats images of later turns differently; install the version that this package pins."
            )
        device = output["completion_ids"].device
        turn_ids = [self._loss_turn_ids(rollout) for rollout in self._rollouts]
        output["turn_ids"] = pad_turn_ids(turn_ids, output["completion_ids"].size(1), device)
        if self._packs:
            facts = self._facts or self._facts_of_rollouts(output, output["completion_ids"].size(1), device)
            self._facts = None
            output["prompt_keys"], output["image_keys"] = facts.prompts, facts.images
            if facts.features is not None:
                output["image_features"] = facts.features
        weights = self._token_weights(output["turn_ids"])
        output["loads"] = [_load(rollout) for rollout in self._rollouts]
        output["num_items_in_batch"] = self.accelerator.gather(weights.sum()).sum()
        self._log_rollouts("train" if self.model.training else "eval")
        if self.args.card_picture and self.model.training:
            self._pictured = pick_rollouts(self._rollouts)
        self._watch(output["advantages"])
        self._rollouts, self._features, self._sampler, self._crops = [], None, None, None
        return output

    def _prompt(self, rollout: Rollout) -> list[dict]:
        return self.template.prompts.first_messages(rollout.question, rollout.choices, self.args.num_rounds)

    def _tokenize_prompts(self, prompts: list):
        contexts = [Context(rollout.prompt_ids, rollout.images, 1) for rollout in self._rollouts]
        return [c.ids for c in contexts], [c.images for c in contexts], self._multimodal_fields(contexts)

    def _multimodal_fields(self, contexts: Sequence[Context]) -> dict:
        for context, rollout in zip(contexts, self._rollouts, strict=True):
            self.chat.check_image_tokens(context.ids, context.images, rollout.id)
        if self.use_vllm or self._shares_prefix:  # they encode the images themselves
            return {}
        fields = self.chat.encode_images([image for context in contexts for image in context.images])
        return {**fields, "mm_token_type_ids": [self.chat.token_types(context.ids) for context in contexts]}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Each round has its own budget of tokens; everything else is TRL's."""
        self._in_hand = (f"generating round {self._round}", [_load(rollout) for rollout in self._rollouts])
        budget = self.args.token_budgets[self._round - 1]
        if self._shares_prefix:
            return self._generate_shared(prompt_ids, images)
        if self.use_vllm:
            self.vllm_generation.max_completion_length = budget
            self.vllm_generation.samples = [rollout.id for rollout in self._rollouts]
        else:
            self.generation_config.max_new_tokens = budget
            self.generation_kwargs["max_new_tokens"] = budget
        return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)

    def _generate_shared(self, prompt_ids, images) -> tuple[list[list[int]], list[list[float]] | None]:
        contexts = [Context(*one, self._round) for one in zip(prompt_ids, images, strict=True)]
        with (
            profiling_context(self, "shared_prefix.generate"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
        ):
            if self._sampler is None:
                self._sampler = SharedPrefixSampler(
                    model,
                    self.chat,
                    self.generation_config,
                    self.args.token_budgets,
                    self._features,
                    on_end=self._begin_crop,
                    keep_logprobs=self._keeps_logprobs,
                )
            sampled = self._sampler(contexts)
        return [one.ids for one in sampled], [one.logprobs for one in sampled] if self._keeps_logprobs else None

    def _begin_crop(self, place: int, ids: list[int]) -> None:
        """A rollout has named its region while others still sample: a worker thread cuts it."""
        if self._round < self.args.num_rounds:
            rollout = self._rollouts[place]
            *_, shown = read_region(rollout, self.chat.decode(ids), self.template, rollout.turns)
            if shown is not None:
                self._crops.begin(rollout.image, shown)

    def _generate(self, prompts: list):
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images = (
            super()._generate(prompts)
        )
        if not self.tools:
            self._play_rounds(completion_ids, logprobs)
        for name in ("tools/call_frequency", "tools/failure_frequency"):
            self._metrics["train" if self.model.training else "eval"].pop(name, None)
        if logprobs is not None:
            logprobs = [sampling_logprobs(rollout, self._in_loss(rollout)) for rollout in self._rollouts]
        extra_fields = {**extra_fields, **self._reward_fields()}
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields):
        """TRL's place for turns after the first: play the remaining rounds, and hand the crops over as tool images."""
        self._play_rounds(completion_ids, logprobs)
        flat = [flatten(rollout) for rollout in self._rollouts]
        for rollout, one in zip(self._rollouts, flat, strict=True):
            self.chat.check_image_tokens(one.ids, one.images, rollout.id)
        return (
            [[int(turn > 0) for turn in one.turn_ids] for one in flat],
            [self._completion(rollout) for rollout in self._rollouts],
            [one.completion_ids for one in flat],
            logprobs,
            0,
            0,
            [one.images[1:] for one in flat],
        )

    def _play_rounds(self, completion_ids: list[list[int]], logprobs: list[list[float]] | None) -> None:
        """Run the round loop; TRL has already sampled its first round."""
        known = [None] * len(completion_ids) if logprobs is None else logprobs
        first = [Sampled(ids, logps) for ids, logps in zip(completion_ids, known, strict=True)]

        def generate(contexts: list[Context]) -> list[Sampled]:
            self._round = contexts[0].round
            return first if self._round == 1 else self._sample(contexts)

        run_rounds(self._rollouts, generate, self.template, self.args.num_rounds, self._crops)

    def _sample(self, contexts: list[Context]) -> list[Sampled]:
        ids, logprobs = self._generate_single_turn(
            [context.ids for context in contexts],
            [context.images for context in contexts],
            self._multimodal_fields(contexts),
            num_generations=1,
            has_tool_images=True,
        )
        return [Sampled(*one) for one in zip(ids, logprobs or [None] * len(ids), strict=True)]

    def _completion(self, rollout: Rollout) -> list[dict]:
        """The completion as messages of plain text, for reward functions and logs; the last one is the answer."""
        messages: list[dict] = []
        for number, turn in enumerate(rollout.turns, start=1):
            messages.append({"role": "assistant", "content": turn.text})
            if turn.box is not None:
                reply = self.template.reply(rollout, turn, is_last=number == self.args.num_rounds - 1)
                messages.append({"role": "user", "content": reply["content"][-1]["text"]})
        return messages

    def _reward_fields(self) -> dict[str, list]:
        rollouts = self._rollouts
        return {
            "image": [rollout.image for rollout in rollouts],
            "rollouts": rollouts,
            "boxes": [rollout.boxes for rollout in rollouts],
            "statuses": [[box.status.value for box in rollout.boxes] for rollout in rollouts],
            "crops": [rollout.crops for rollout in rollouts],
        }

    # Loss

    def _loss_turn_ids(self, rollout: Rollout) -> list[int]:
        """
        Turn ids of the tokens that the loss covers. With `mask_truncated_completions` a cut turn leaves it, and a cut
        answer takes the whole rollout out: its reward says nothing about any of its tokens.
        """
        turn_ids = flatten(rollout).turn_ids
        if not self.args.mask_truncated_completions:
            return turn_ids
        cut = {number for number, turn in enumerate(rollout.turns, start=1) if turn.truncated}
        if len(rollout.turns) in cut:
            return [0] * len(turn_ids)
        return [0 if number in cut else number for number in turn_ids]

    def _in_loss(self, rollout: Rollout) -> list[bool]:
        """Whether the loss covers a token of the completion with a weight above 0, length C."""
        weights = [0, *(self.args.turn_loss_weights or [1] * self.args.num_rounds)]
        return [weights[number] > 0 for number in self._loss_turn_ids(rollout)]

    def _token_weights(self, turn_ids: torch.Tensor) -> torch.Tensor:
        """Weight of every completion token in the loss, shape (B, C). `dr_grpo` divides by a constant: as they are."""
        weights = self.args.turn_loss_weights
        return turn_weights(turn_ids, weights if self.loss_type == "dr_grpo" else relative_weights(weights))

    def get_high_entropy_mask(self, entropies, mask, threshold):
        """A token counts or does not: TRL would compare entropies that are multiplied by the weight of their turn."""
        return super().get_high_entropy_mask(entropies, (mask > 0).float(), threshold)

    @staticmethod
    def get_gamma_weights(*, mask, **kwargs):
        """A token counts or does not: VESPO's ratio is that of the whole sequence, whatever its turns weigh."""
        return GRPOTrainer.get_gamma_weights(mask=(mask > 0).float(), **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if self._rollouts:  # a pass before the first update, while the batch is made
            self._in_hand = ("scoring the rollouts", [_load(rollout) for rollout in self._rollouts])
        packs = self._packs and (self._facts or self._rollouts)
        score = self._packed_logps if packs else super()._get_per_token_logps_and_entropies
        output = score(*args, **kwargs)
        if kwargs.get("compute_entropy"):
            self._loss_outputs = (output[0].detach(), output[1].detach())
        return output

    def _packed_logps(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **fields
    ):
        """TRL's method on packed rows: same results at sampled tokens, zero elsewhere."""
        if self._facts is None:  # a pass before the first update, called by TRL while the batch is made
            self._facts = self._facts_of_rollouts(fields, logits_to_keep, input_ids.device)
        facts = self._facts
        backbone = self._bare_model(model).base_model
        # With gradients, DDP and DeepSpeed watch what runs inside the forward pass of the whole model.
        watched = torch.is_grad_enabled() and (self.accelerator.num_processes > 1 or self.is_deepspeed_enabled)
        alone = self.args.encode_once and not watched
        starts = torch.tensor([0, *fields["num_images"]]).cumsum(0).tolist()
        patches = torch.nn.functional.pad(fields["image_grid_thw"].prod(-1).cumsum(0), (1, 0)).tolist()
        parts = []
        size = batch_size or len(input_ids)
        for start in range(0, len(input_ids), size):
            end = min(start + size, len(input_ids))
            images = {
                "num_images": fields["num_images"][start:end],
                "image_grid_thw": fields["image_grid_thw"][starts[start] : starts[end]],
                "pixel_values": fields["pixel_values"][patches[starts[start]] : patches[starts[end]]],
                "mm_token_type_ids": fields["mm_token_type_ids"][start:end],
            }
            with self.accelerator.autocast():
                parts.append(
                    packed_logps(
                        model,
                        backbone,
                        facts.rows(start, end, logits_to_keep),
                        input_ids[start:end],
                        attention_mask[start:end],
                        images,
                        alone,
                    )  # fmt: skip
                )
        logps = torch.cat([logps for logps, _ in parts])
        return logps, torch.cat([entropies for _, entropies in parts]) if compute_entropy else None, None

    def _facts_of_rollouts(self, fields: dict, columns: int, device) -> RolloutFacts:
        """Facts of the rollouts that were just generated, for the passes before the first update."""
        turn_ids = pad_turn_ids([flatten(rollout).turn_ids for rollout in self._rollouts], columns, device)
        features = None
        if self.args.encode_once and self._tower_is_frozen:
            with self.accelerator.autocast():
                features = [self._features(rollout.images) for rollout in self._rollouts]
        numbers: dict = {}
        for rollout in self._rollouts:
            numbers.setdefault((tuple(rollout.prompt_ids), id(rollout.view)), len(numbers))
        prompts = [numbers[tuple(rollout.prompt_ids), id(rollout.view)] for rollout in self._rollouts]
        images = [[id(image) for image in rollout.images] for rollout in self._rollouts]
        return RolloutFacts(turn_ids > 0, prompts, images, features)

    def _facts_of_batch(self, inputs) -> RolloutFacts | None:
        """Facts of a (micro-)batch, which travelled with it."""
        if "prompt_keys" not in inputs:
            return None
        features = inputs.get("image_features")
        return RolloutFacts(inputs["turn_ids"] > 0, inputs["prompt_keys"], inputs["image_keys"], features)

    def _bare_model(self, model):
        """The transformers model inside DDP and PEFT."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _compute_loss(self, model, inputs):
        self._in_hand = ("computing the loss", inputs["loads"])
        weights = self._token_weights(inputs["turn_ids"])
        self._facts = self._facts_of_batch(inputs)
        loss = super()._compute_loss(model, {**inputs, "tool_mask": weights})
        self._facts = None
        self._log_turns(inputs)
        return loss

    # Memory

    def training_step(self, *args, **kwargs):
        with self._telling_memory():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        with self._telling_memory():
            return super().prediction_step(*args, **kwargs)

    @contextmanager
    def _telling_memory(self) -> Iterator[None]:
        """An out-of-memory error says what ran, with which sample, and what to lower."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self._in_hand is None:
                raise
            raise torch.OutOfMemoryError(f"{memory_advice(*self._in_hand, self.args)} ({error})") from error
        finally:
            self._in_hand = None

    # Metrics

    def _log_turns(self, inputs) -> None:
        """Entropy, KL and clipped share of each round's tokens, over all processes."""
        logps, entropies = self._loss_outputs
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps if old_logps is None else old_logps
        values = {"entropy": entropies}
        if self.beta != 0.0:
            ratio = torch.exp(logps - old_logps) if self.args.use_bias_correction_kl else 1.0  # as in TRL's own `kl`
            values["kl"] = ratio * kl_to_reference(logps, inputs["ref_per_token_logps"])
        values["clip_ratio"] = is_clipped(
            logps, old_logps, inputs["advantages"].unsqueeze(1), self.epsilon_low, self.epsilon_high
        )
        sums = torch.stack([sums_by_turn(v, inputs["turn_ids"], self.args.num_rounds) for v in values.values()])
        totals = self.accelerator.reduce(sums, reduction="sum")
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, by_turn in zip(values, totals, strict=True):
            for number, (total, count) in enumerate(by_turn.tolist(), start=1):
                metrics[f"turn{number}/{name}"].append(total / count if count else float("nan"))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """As in TRL; what every function gave, (rollouts of all processes, functions), is kept for those who watch."""
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    def _watch(self, advantages: torch.Tensor) -> None:
        """Now and then, hand the rollouts of training over with what they were worth."""
        step = self.state.global_step
        if self._watcher is not None and self.model.training and self._watcher.is_due(step):
            start = self.accelerator.process_index * len(self._rollouts)
            rewards = self._rewards[start : start + len(self._rollouts)]
            self._watcher.watch(step, self._rollouts, rewards.tolist(), advantages.tolist())

    def _log_rollouts(self, mode: str) -> None:
        """Box statuses, crop sizes and turn lengths, averaged over all processes."""
        sums = rollout_sums(self._rollouts, self.args.num_rounds)
        local = torch.tensor(
            [list(pair) for pair in sums.values()], dtype=torch.float32, device=self.accelerator.device
        )
        totals = self.accelerator.reduce(local, reduction="sum").tolist()
        for name, (total, count) in zip(sums, totals, strict=True):
            if count:
                self._metrics[mode][name].append(total / count)

    # Learning rate

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Schedules with a floor read the optimizer's first learning rate, which DeepSpeed's wrapper leaves out."""
        wrapper = getattr(self.optimizer, "optimizer", None)
        if self.is_deepspeed_enabled and wrapper is not None and not hasattr(wrapper, "defaults"):
            wrapper.defaults = wrapper.optimizer.defaults
        return super().create_scheduler(num_training_steps, optimizer)


def _load(rollout: Rollout) -> Load:
    return Load(rollout.id, len(flatten(rollout).ids), tuple(image.size for image in rollout.images))


def _crop_tool() -> None:
    """Stands in TRL's list of tools; the rounds are played by the trainer and it is never called."""


def _check_arguments(arguments: dict) -> None:
    for name in ("tools", "rollout_func", "environment_factory"):
        if arguments.get(name):
            raise ValueError(
                f"`{name}` has no place in `MGPOTrainer`, which plays the rounds itself; got {arguments[name]!r}. "
                "Leave it out, or use TRL's `GRPOTrainer`."
            )


def _check_family(model, model_name: str, args: MGPOConfig) -> None:
    """Before any weights load: a path is judged by its configuration alone."""
    if not isinstance(model, str):
        return check_model_type(model.config.model_type, model_name)
    revision = (args.model_init_kwargs or {}).get("revision")
    load_config(model_name, revision=revision, trust_remote_code=args.trust_remote_code)


def _check_length(dataset, args: MGPOConfig) -> None:
    """TRL drops a generation batch that is not full: with too few rows, training would end without a single step."""
    needed = args.generation_batch_size // args.num_generations
    if hasattr(dataset, "__len__") and len(dataset) < needed:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} rows, but a generation batch holds {needed} different questions "
            f"(`generation_batch_size` {args.generation_batch_size} / `num_generations` {args.num_generations}), so "
            "no step would run. Add rows, or lower `per_device_train_batch_size` or `gradient_accumulation_steps`."
        )


def _undecoded(dataset, name: str):
    """Leave images as bytes or paths: a dataset that decodes them would do so once for every rollout of a group."""
    if isinstance(dataset, dict):
        return type(dataset)({key: _undecoded(value, f"{name}[{key!r}]") for key, value in dataset.items()})
    if dataset is None or dataset.column_names is None:
        return dataset
    _check_columns(dataset.column_names, f"`{name}`")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. Give at least one row.")
    features = dataset.features or {}
    if isinstance(features.get("image"), ImageFeature):
        dataset = dataset.cast_column("image", ImageFeature(decode=False))
    return dataset


def _check_columns(columns, name: str) -> None:
    missing = [column for column in ("image", "question") if column not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column {missing}, only {list(columns)}. Rename your columns to `image` and `question` "
            "(and `choices`, `answer`, `target_boxes` where you have them)."
        )
