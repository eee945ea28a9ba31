"""The settings of a conversation, kept in one file beside the weights so that a model is asked as it was trained."""

import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from .boxes import resolve_coordinates
from .processing import VisionChat, parse_pixels
from .prompts import PROTOCOL_VERSION, PromptTemplate
from .records import write_atomically
from .rollout import Chat, RoundTemplate

CONVERSATION_FILE = "conversation.json"


@dataclass(frozen=True)
class Conversation:
    """
    What fixes a conversation besides the model: rounds, budgets, how boxes are read, and the prompts.

    [`~mgpo_trl.MGPOConfig`] has the same fields for training; evaluation and inference read them from the
    checkpoint. Example of the file: `{"num_rounds": 2, "max_pixels": 1003520, ..., "prompts": {"grounding": "..."}}`.
    """

    num_rounds: int = 2
    """Sampled turns of a rollout."""
    max_pixels: int = 1280 * 28 * 28
    """Pixel budget of every image that the model sees."""
    min_pixels: int = 256 * 28 * 28
    """Smaller images are enlarged to at least this many pixels."""
    token_budgets: tuple[int, ...] = (8192, 8192)
    """Most sampled tokens of each round."""
    coordinates: str = "auto"
    """How the model writes boxes."""
    min_box_side: int = 28
    """Each side of a usable box is longer than this many pixels of the view."""
    max_box_aspect: float = 100.0
    """The longer side of a usable box is less than this many times the shorter."""
    zoom_from: str = "crop"
    """With three or more rounds, the image that the next box refers to."""
    prompts: PromptTemplate = PromptTemplate()
    """What the turns say."""

    def template(self, processor, model_type: str, end_ids=None) -> RoundTemplate:
        """
        The fixed parts of the conversation for one model.

        Args:
            processor ([`~transformers.ProcessorMixin`]): Its pixel budget is set to the conversation's.
            model_type (`str`): `config.model_type` of the model; decides the coordinates where they are `"auto"`.
            end_ids (`Iterable[int]`, *optional*): Ids that end a sampled turn besides the EOS token.
        """
        chat = VisionChat(processor, max_pixels=self.max_pixels, min_pixels=self.min_pixels, end_ids=end_ids)
        return self.template_with(chat, model_type)

    def template_with(self, chat: Chat, model_type: str) -> RoundTemplate:
        """The fixed parts of the conversation where something else than a processor makes ids and fits images."""
        return RoundTemplate(
            self.prompts,
            chat,
            resolve_coordinates(self.coordinates, model_type),
            min_box_side=self.min_box_side,
            max_box_aspect=self.max_box_aspect,
            zoom_from=self.zoom_from,
        )

    def with_rounds(self, num_rounds: int) -> "Conversation":
        """The same conversation with another number of rounds; the answer turn keeps its budget."""
        if num_rounds < 1:
            raise ValueError(f"`num_rounds` must be >= 1, got {num_rounds}. Use 1 for a direct answer.")
        boxes, answer = self.token_budgets[:-1] or self.token_budgets, self.token_budgets[-1]
        budgets = [boxes[min(i, len(boxes) - 1)] for i in range(num_rounds - 1)]
        return replace(self, num_rounds=num_rounds, token_budgets=(*budgets, answer))

    def facts(self) -> dict:
        """What every `run.json` says of it, by the names of [`~mgpo_trl.records.run_record`]."""
        return {
            "prompts_fingerprint": self.prompts.fingerprint,
            "max_pixels": self.max_pixels,
            "min_pixels": self.min_pixels,
            "num_rounds": self.num_rounds,
            "protocol_version": PROTOCOL_VERSION,
        }

    def save(self, directory: str | os.PathLike) -> None:
        """Write `conversation.json` into `directory`."""
        record = {**asdict(self), "protocol_version": PROTOCOL_VERSION}
        write_atomically(Path(directory, CONVERSATION_FILE), (json.dumps(record, indent=2) + "\n").encode())

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Conversation | None":
        """
        Read `conversation.json` from a model directory; `None` where it has none.

        Raises:
            ValueError: The file names a setting that this version does not know.
        """
        path = Path(directory, CONVERSATION_FILE)
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        record.pop("protocol_version", None)
        unknown = [*_unknown(record, cls), *_unknown(record["prompts"], PromptTemplate)]
        if unknown:
            raise ValueError(f"'{path}' names unknown settings {unknown}. Update mgpo-trl, or remove them.")
        prompts = PromptTemplate(**record.pop("prompts"))
        return cls(**{**record, "prompts": prompts, "token_budgets": tuple(record["token_budgets"])})

    @classmethod
    def from_config(cls, args, prompts: PromptTemplate) -> "Conversation":
        """The conversation that an [`~mgpo_trl.MGPOConfig`] describes."""
        return cls(
            num_rounds=args.num_rounds,
            max_pixels=parse_pixels(args.max_pixels),
            min_pixels=parse_pixels(args.min_pixels),
            token_budgets=tuple(args.token_budgets),
            coordinates=args.coordinates,
            min_box_side=args.min_box_side,
            max_box_aspect=args.max_box_aspect,
            zoom_from=args.zoom_from,
            prompts=prompts,
        )


def load_conversation(path: str) -> Conversation:
    """
    The conversation saved in a model directory or Hub repository; the default one where there is none.

    Raises:
        ValueError: There is no such directory and no such repository.
    """
    from transformers.utils import cached_file

    if not os.path.isdir(path):
        try:
            found = cached_file(path, CONVERSATION_FILE, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"There is no model '{path}': no directory here, and no repository that the Hub gives out "
                f"({str(error).strip().splitlines()[0]})."
            ) from error
        path = os.path.dirname(found) if found else path
    return Conversation.load(path) or Conversation()


def _unknown(record: dict, kind: type) -> list[str]:
    return sorted(set(record) - {field.name for field in fields(kind)})
