"""Options of the round conversation. Imports no torch, so that `train.py --help` answers at once."""

import math
from dataclasses import dataclass, field

from .boxes import COORDINATES
from .processing import parse_pixels

ZOOM_FROM = ("crop", "original")


@dataclass
class RoundOptions:
    r"""
    What MGPO adds to GRPO: the rounds of the conversation. [`~mgpo_trl.MGPOConfig`] inherits them.

    Parameters:
        max_completion_length (`int`, *optional*, defaults to `8192`):
            Most sampled tokens of a round, unless `round_token_budgets` is set (paper: 8192 for the response).
        num_rounds (`int`, *optional*, defaults to `2`):
            Sampled turns of a rollout. 1 is plain GRPO, 2 is MGPO, more zoom in again before answering.
        max_pixels (`int` or `str`, *optional*, defaults to `"1280x28x28"`):
            Pixel budget of every image that the model sees, as a number or a product. Crops are cut from the original
            file and then fitted into the same budget.
        min_pixels (`int` or `str`, *optional*, defaults to `"256x28x28"`):
            Smaller images and crops are enlarged to at least this many pixels.
        coordinates (`str`, *optional*, defaults to `"auto"`):
            How the model writes boxes: `"absolute"` pixels of the view, `"relative_1000"`, or `"auto"` by model
            family.
        min_box_side (`int`, *optional*, defaults to `28`):
            Each side of a usable box is longer than this many pixels of the view.
        max_box_aspect (`float`, *optional*, defaults to `100`):
            The longer side of a usable box is less than this many times the shorter one.
        zoom_from (`str`, *optional*, defaults to `"crop"`):
            With three or more rounds, the image that the next box refers to: the last `"crop"` or the `"original"`.
        round_token_budgets (`list[int]`, *optional*):
            Most sampled tokens of each round. `None` gives `max_completion_length` to every round. The reply and the
            crop never count.
        turn_loss_weights (`list[float]`, *optional*):
            Weight of each round's tokens in the loss, which stays a weighted mean: `[1, 4]` and `[0.5, 2]` are the
            same, multiples of the smallest. (`dr_grpo` takes no mean and multiplies by the weights as they are.)
            `None` weighs all tokens alike; `[0, 1]` trains the last of two rounds only, exactly as if the other had no
            tokens.
        prompts_file (`str`, *optional*):
            YAML file that replaces parts of the conversation template, see [`~mgpo_trl.prompts.PromptTemplate`].
        card_picture (`bool`, *optional*, defaults to `True`):
            Draw rollouts of the last training batch, images and questions, for the model card.
        encode_once (`bool`, *optional*, defaults to `True`):
            Compute the vision features of each distinct image once for all rollouts, rounds and passes of a step,
            where the vision tower is frozen.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Generation with transformers computes what contexts share once: a group's prompt, and in later rounds
            everything before the reply. Needs a sampler that it knows and no sharded weights; otherwise TRL's
            generation is used. vLLM does this by itself.
        pack_loss (`bool`, *optional*, defaults to `True`):
            Pack the rollouts of a micro-batch into one row for the loss passes: no padding, a group's prompt stands
            there once, and only sampled tokens reach the LM head. Same log-probabilities and gradients. Needs `sdpa`
            attention; otherwise TRL's padded pass is used.
        log_rollouts_steps (`int`, *optional*, defaults to `10`):
            Every so many optimizer steps, rollouts are kept in `rollouts.jsonl` of the output directory, shown on its
            page `rollouts.html`, and sent as pictures to the trackers that `report_to` names. 0 or `None` watches
            nothing. See `docs/watching.md`.
        log_rollouts_groups (`int`, *optional*, defaults to `2`):
            Whole groups (all rollouts of a prompt) that are kept each time.
        log_rollouts_pictures (`int`, *optional*, defaults to `600`):
            Most rollouts on disk with pictures, about 30 KB each. Where they would be more, half of the steps with
            pictures lose them, evenly, and the page says how many rollouts are shown without.
    """

    max_completion_length: int = field(
        default=8192, metadata={"help": "Most sampled tokens of a round, unless `round_token_budgets` is set."}
    )
    num_rounds: int = field(
        default=2, metadata={"help": "Sampled turns of a rollout. 1 is plain GRPO, 2 is MGPO, more zoom in again."}
    )
    # Annotated `str` because the command-line parser takes one type only and would make `int | str` an integer.
    max_pixels: str = field(
        default="1280x28x28", metadata={"help": "Pixel budget of view and crop, as 1003520 or 1280x28x28."}
    )
    min_pixels: str = field(default="256x28x28", metadata={"help": "Smaller images and crops are enlarged to this."})
    coordinates: str = field(
        default="auto", metadata={"help": "How the model writes boxes.", "choices": list(COORDINATES)}
    )
    min_box_side: int = field(
        default=28, metadata={"help": "Each side of a usable box is longer than this many view pixels."}
    )
    max_box_aspect: float = field(
        default=100.0, metadata={"help": "The longer side of a usable box is less than this many times the shorter."}
    )
    zoom_from: str = field(
        default="crop",
        metadata={
            "help": "With three or more rounds, the image that the next box refers to.",
            "choices": list(ZOOM_FROM),
        },
    )
    round_token_budgets: list[int] | None = field(
        default=None, metadata={"help": "Most sampled tokens of each round. Unset: `max_completion_length` for all."}
    )
    turn_loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each round's tokens in the loss. Unset: all alike."}
    )
    prompts_file: str | None = field(
        default=None, metadata={"help": "YAML file that replaces parts of the conversation template."}
    )
    card_picture: bool = field(
        default=True, metadata={"help": "Show a few training rollouts on the model card, with their images."}
    )
    encode_once: bool = field(
        default=True, metadata={"help": "Encode each distinct image once a step where the vision tower is frozen."}
    )
    share_prefix: bool = field(
        default=True, metadata={"help": "Generation computes a group's prompt once and keeps its cache over rounds."}
    )
    pack_loss: bool = field(
        default=True, metadata={"help": "Loss passes without padding, with a group's prompt computed once."}
    )

    log_rollouts_steps: int | None = field(
        default=10, metadata={"help": "Optimizer steps between rollouts that are kept for looking at. 0: none."}
    )
    log_rollouts_groups: int = field(default=2, metadata={"help": "Whole groups that are kept each time."})
    log_rollouts_pictures: int = field(
        default=600, metadata={"help": "Most rollouts on disk with pictures; older steps are thinned out."}
    )

    def check_rounds(self) -> None:
        """
        Turn pixel caps into numbers, and refuse what can not work.

        Raises:
            ValueError: Names the option, the value received, and what to do.
        """
        self.max_pixels = parse_pixels(self.max_pixels)
        self.min_pixels = parse_pixels(self.min_pixels)
        self._check_budgets()
        self._check_boxes()
        self._check_watching()

    @property
    def token_budgets(self) -> list[int]:
        """Most sampled tokens of each round, one for each."""
        return self.round_token_budgets or [self.max_completion_length] * self.num_rounds

    def _check_budgets(self) -> None:
        if not isinstance(self.num_rounds, int):
            raise ValueError(f"`num_rounds` must be a whole number, got {self.num_rounds!r}. The paper uses 2.")
        if self.num_rounds < 1:
            raise ValueError(f"`num_rounds` must be >= 1, got {self.num_rounds}. Use 1 for single-round GRPO.")
        for name in ("round_token_budgets", "turn_loss_weights"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_rounds:
                raise ValueError(
                    f"`{name}` must have one value for each of the {self.num_rounds} rounds, got {values}."
                )
        if not all(isinstance(budget, int) and budget >= 1 for budget in self.token_budgets):
            raise ValueError(
                f"Every round needs a budget of at least one token, got {self.token_budgets}. Raise "
                "`round_token_budgets` (or `max_completion_length`)."
            )
        weights = self.turn_loss_weights
        if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and max(weights) > 0):
            raise ValueError(f"`turn_loss_weights` must be finite, >= 0 and not all zero, got {weights}.")

    def _check_boxes(self) -> None:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"`min_pixels` ({self.min_pixels}) is above `max_pixels` ({self.max_pixels}). Lower it or raise the "
                "cap."
            )
        if self.coordinates not in COORDINATES:
            raise ValueError(f"`coordinates` must be one of {list(COORDINATES)}, got {self.coordinates!r}.")
        if self.zoom_from not in ZOOM_FROM:
            raise ValueError(f"`zoom_from` must be one of {list(ZOOM_FROM)}, got {self.zoom_from!r}.")
        if not self.min_box_side >= 0:
            raise ValueError(f"`min_box_side` must be >= 0, got {self.min_box_side}. The paper uses 28.")
        if not self.max_box_aspect > 1:
            raise ValueError(f"`max_box_aspect` must be above 1, got {self.max_box_aspect}. The paper uses 100.")

    def _check_watching(self) -> None:
        self.log_rollouts_steps = self.log_rollouts_steps or 0
        for name, least in (("log_rollouts_steps", 0), ("log_rollouts_groups", 1), ("log_rollouts_pictures", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`{name}` must be a whole number >= {least}, got {value!r}. To keep no rollouts, set "
                    "`log_rollouts_steps` to 0."
                )
