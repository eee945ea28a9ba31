"""
A model class for lmms-eval: `python -m lmms_eval --model mgpo --model_args pretrained=outputs/run --tasks ...`.

It is found through the entry point `lmms_eval.models` as soon as both packages are installed.
"""

import logging

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from ..inference import GroundedVQA
from .questions import Splitter, said

logger = logging.getLogger(__name__)


def manifest() -> ModelManifest:
    """What the entry point registers."""
    return ModelManifest(model_id="mgpo", simple_class_path=f"{__name__}.MGPO")


class MGPO(lmms):
    """
    Plays the two-round conversation for every request, and returns the boxed answer. Decoding is greedy, and the token
    budgets are those that the model was trained with: a task's `generation_kwargs` do not count (16 tokens, the usual
    figure for a letter, leave no room for a box).

    Args:
        pretrained (`str`): Model directory, Hub id, or LoRA adapter.
        base_model (`str`, *optional*): Base of an adapter.
        num_rounds (`int`, *optional*): Another number of rounds than the model was trained with; 1 answers directly.
        batch_size (`int`, *optional*, defaults to `1`): Questions generated at once.
        device (`str`, *optional*): Device, for one process; several take one device each.
        dtype (`str`, *optional*, defaults to `"auto"`): Precision of the weights.
    """

    is_simple = True

    def __init__(
        self, pretrained, base_model=None, num_rounds=None, batch_size=1, device=None, dtype="auto", **unknown
    ):
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval passes it to every model
        if unknown:
            raise ValueError(f"The model mgpo takes no {sorted(unknown)}. Pixel caps and prompts come with the model.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.vqa = GroundedVQA.from_pretrained(
            pretrained,
            base_model,
            num_rounds=None if num_rounds is None else int(num_rounds),
            batch_size=int(batch_size),
            device=str(self.accelerator.device) if self._world_size > 1 else device,
            dtype=dtype,
        )

    @property
    def device(self):
        """Where lmms-eval puts the numbers that its processes exchange."""
        return self.accelerator.device

    def generate_until(self, requests) -> list[str]:
        """Answers in the order of the requests."""
        answers: list[str] = []
        splitter, size = Splitter(), self.vqa.batch_size
        for start in tqdm(range(0, len(requests), size), disable=self.rank != 0, desc="mgpo"):
            questions = [self._question(request, splitter) for request in requests[start : start + size]]
            answers += [said(answer) for answer in self.vqa.batch(questions)]
        logger.warning("mgpo: %s Generation options of the tasks were not used.", splitter.summary)
        return answers

    def _question(self, request, splitter: Splitter):
        context, _, doc_to_visual, doc_id, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(images) != 1:
            raise ValueError(f"The model mgpo looks at one image, and row {doc_id} of {task} has {len(images)}.")
        return splitter.question(images[0], context)

    def loglikelihood(self, requests):
        """Not defined for a conversation of two rounds."""
        raise NotImplementedError(
            "mgpo answers in two rounds and has no log-likelihood of an option. Use a generation task."
        )

    def generate_until_multi_round(self, requests):
        """The rounds of lmms-eval's own loop are not ours."""
        raise NotImplementedError("mgpo plays its own rounds. Use a task of the type generate_until.")
