"""`RoundGeneration`: TRL's vLLM backend, made to sample every round from the very tokens that are trained on.

vLLM is left to TRL wherever TRL is right: engines, servers, sampling, gathering, weights. This module holds what a
conversation with an image in every round needs beside it.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import groupby, zip_longest

from accelerate.utils import gather_object
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

from .adapters import is_quantized
from .launch_checks import QUANTISED_FOR_VLLM
from .rollout import Rollout
from .vllm_server import PatientClient


class RoundGeneration(vllm_generation.VLLMGeneration):
    r"""
    What changes w.r.t. [`~trl.generation.vllm_generation.VLLMGeneration`]:

    - A colocated engine is built with the pixel budget of the run, so that it fits no image a second time, and without
      room for videos.
    - A colocated engine gets one placeholder for an image. It repeats placeholders itself, also those of a prompt in
      which they are repeated already, and so TRL's prompts grow on the way.
    - The ids that vLLM samples from are compared with those that are trained on, in every round.
    - Image features that vLLM keeps are dropped with the weights that computed them; TRL drops the prefixes only.
    - A server is waited for, and a server that was started again is noticed, see
      [`~mgpo_trl.vllm_server.PatientClient`].

    Args:
        engine_options (`dict`):
            Options of a colocated engine, see [`engine_options`].
        model, *args, **kwargs:
            As in TRL.

    Raises:
        ValueError: The model is quantised, or vLLM sees another prompt than is trained on; the message names the
        sample.
    """

    def __init__(self, engine_options: dict, model, *args, **kwargs):
        if is_quantized(model):
            raise ValueError(QUANTISED_FOR_VLLM)
        self.engine_options = engine_options
        self.samples: list[str] = []
        """Ids of the samples of this process, in the order of the prompts; the trainer sets them."""
        self._asked: Iterator[str] = iter(())
        super().__init__(model, *args, **kwargs)

    def _init_vllm(self):
        ours = {"VLLMClient": PatientClient}
        if hasattr(vllm_generation, "LLM"):  # not where vLLM is missing, which TRL says
            ours["LLM"] = partial(vllm_generation.LLM, **self.engine_options)
        with _replaced(vllm_generation, **ours):
            super()._init_vllm()

    @cached_property
    def longest(self) -> int:
        """Most tokens of a conversation that vLLM takes; in server mode the main process knows it."""
        if self.mode == "colocate":
            return self.llm.llm_engine.model_config.max_model_len
        return self.vllm_client.get_server_info()["model_config"]["max_model_len"]

    def sync_weights(self):
        super().sync_weights()
        if self.mode == "colocate":
            self.llm.llm_engine.reset_encoder_cache()
        elif self.accelerator.is_main_process:
            self.vllm_client.reset_encoder_cache()

    def generate(self, prompts, images, num_generations, profiler=None):
        if self.mode == "server":  # the main process asks for all, each different prompt once
            self._asked = iter(gather_object(self.samples)[::num_generations])
            return super().generate(prompts, images, num_generations, profiler)
        for name, ids in zip(self.samples, prompts, strict=True):
            check_length(name, ids, self.longest)
        image_token_id = self.processing_class.image_token_id
        short = [single_placeholders(ids, image_token_id) for ids in prompts]
        seen, *output = super().generate(short, images, num_generations, profiler)
        for name, ours, theirs in zip(self.samples, prompts, seen, strict=True):
            check_prompt(name, ours, theirs, image_token_id, self._budget)
        return prompts, *output

    def _place_features(self, features, prompt_ids):
        """
        Server: TRL moves the features of a prompt's images to its placeholders. The server takes both as they are, so
        what is left to compare is the number of features of each image.
        """
        name = next(self._asked)
        check_length(name, prompt_ids, self.longest)
        if features is not None:
            theirs = [place["length"] for place in features["mm_placeholders"]["image"]]
            check_images(name, runs_of(prompt_ids, self.processing_class.image_token_id), theirs, self._budget)
        return super()._place_features(features, prompt_ids)

    @property
    def _budget(self) -> str:
        return json.dumps(self.engine_options["mm_processor_kwargs"])


@contextmanager
def round_generation(args):
    """
    Within it, or in a function that it decorates, TRL's trainer builds [`RoundGeneration`] in place of its own class,
    for which it has no option.

    Args:
        args ([`~mgpo_trl.MGPOConfig`]): Arguments of the trainer.
    """
    with _replaced(grpo_trainer, VLLMGeneration=partial(RoundGeneration, engine_options(args))):
        yield


def engine_options(args) -> dict:
    """
    Options of a colocated engine that TRL does not set: an image for each round, fitted as ours are, and no video, for
    whose longest one vLLM would set memory aside.

    Args:
        args ([`~mgpo_trl.MGPOConfig`]): Pixel budget and number of rounds.
    """
    return {
        "mm_processor_kwargs": {"size": {"shortest_edge": args.min_pixels, "longest_edge": args.max_pixels}},
        "limit_mm_per_prompt": {"image": args.num_rounds, "video": 0},
    }


def single_placeholders(ids: Sequence[int], image_token_id: int) -> list[int]:
    """
    The prompt with one placeholder for each image.

    Worked example with placeholder 9: `[1, 9, 9, 2, 9, 3]` gives `[1, 9, 2, 9, 3]`.
    """
    short: list[int] = []
    for one, run in groupby(ids):
        short += [one] if one == image_token_id else run
    return short


def runs_of(ids: Sequence[int], image_token_id: int) -> list[int]:
    """Lengths of the runs of placeholders, one for each image: `[1, 9, 9, 2, 9, 3]` gives `[2, 1]`."""
    return [len(list(run)) for one, run in groupby(ids) if one == image_token_id]


def check_prompt(name: str, ours: Sequence[int], theirs: Sequence[int], image_token_id: int, budget: str) -> None:
    """
    Compare the prompt that is trained on with the one that vLLM sampled from.

    Args:
        name (`str`): Id of the sample.
        ours (`Sequence[int]`), theirs (`Sequence[int]`): The two prompts, placeholders repeated.
        image_token_id (`int`): Id of the placeholder.
        budget (`str`): The pixel budget as vLLM takes it, for the message.

    Raises:
        ValueError: They differ; the message names the sample and the first difference.
    """
    if list(ours) == list(theirs):
        return
    check_images(name, runs_of(ours, image_token_id), runs_of(theirs, image_token_id), budget)
    pairs = enumerate(zip_longest(ours, theirs))
    place, (mine, other) = next(one for one in pairs if one[1][0] != one[1][1])
    raise ValueError(
        f"vLLM sampled sample {name!r} from another prompt than is trained on: {len(theirs)} tokens instead of "
        f"{len(ours)}, at position {place} id {other} instead of {mine}. Use the versions of vLLM and TRL that this "
        "package pins."
    )


def check_images(name: str, ours: Sequence[int], theirs: Sequence[int], budget: str) -> None:
    """
    Compare the number of placeholders of each image of a sample with that of the features that vLLM made of it.

    Raises:
        ValueError: They differ; the message names the sample.
    """
    if list(ours) != list(theirs):
        raise ValueError(
            f"vLLM has {list(theirs)} features for the images of sample {name!r}, which have {list(ours)} "
            "placeholders in its prompt: its processor fits images to another pixel budget. A server is told that of "
            f"this run with `--mm-processor-kwargs '{budget}'`; a colocated engine has it, so look for another "
            "version of vLLM than the pinned one."
        )


def check_length(name: str, ids: Sequence[int], longest: int) -> None:
    """
    Refuse a prompt that leaves no room for a single token.

    Raises:
        ValueError: The message names the sample.
    """
    if len(ids) >= longest:
        raise ValueError(
            f"The conversation of sample {name!r} has {len(ids)} tokens before its next turn, and vLLM takes "
            f"{longest} in all. Raise `vllm_max_model_length` (a server's `--max-model-len`), or lower `max_pixels` "
            "or `round_token_budgets`."
        )


def sampling_logprobs(rollout: Rollout, counts: Sequence[bool]) -> list[float]:
    """
    Log-probabilities under the sampler of a rollout's completion, NaN where a token has no part in the loss: replies,
    images, cut turns, turns of weight 0. TRL leaves NaN out of ratios, of whole sequences too, and out of metrics.

    Args:
        rollout ([`~mgpo_trl.rollout.Rollout`]): A rollout after its last round.
        counts (`Sequence[bool]`): For each completion token whether it is in the loss, length C.

    Returns:
        `list[float]`: Length C.
    """
    flat: list[float] = []
    for turn in rollout.turns:
        flat += [*turn.logprobs, *[math.nan] * len(turn.reply_ids)]
    return [logprob if kept else math.nan for logprob, kept in zip(flat, counts, strict=True)]


@contextmanager
def _replaced(module, **values):
    """A module whose names mean something else for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
