"""vLLM where it is not installed: an engine that writes what it is told, inside TRL's own code for colocation."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
from trl.generation import vllm_generation

OFFSET = {1: 0.25, 2: -0.125}
"""What the engine's log-probabilities of a round lie below those of the loss pass, for each token."""


class ScriptedEngine:
    """
    In place of `vllm.LLM`. It treats prompts as vLLM 0.30 does: for each image the next placeholder is replaced by as
    many as the image has features, whatever the prompt repeats already.
    """

    def __init__(self, **options):
        self.options = options
        self.max_model_len = options["max_model_len"] or 4096
        self.rounds: list[list[list[int]]] = []
        self.calls: list[tuple[list[dict], SimpleNamespace]] = []
        self.seen: list[list[list[int]]] = []
        self.loaded: list[str] = []
        self.resets: list[str] = []
        self.factor, self.image_token_id = 28, None
        config = SimpleNamespace(max_model_len=self.max_model_len)
        model = SimpleNamespace(load_weights=lambda pairs: self.loaded.extend(name for name, _ in pairs))
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(
            model_config=config,
            model_executor=SimpleNamespace(driver_worker=worker),
            reset_encoder_cache=lambda: self.resets.append("encoder"),
        )

    def reset_prefix_cache(self):
        self.resets.append("prefix")

    def generate(self, prompts, sampling_params, use_tqdm):
        written = self.rounds[len(self.calls)]
        self.calls.append((prompts, sampling_params))
        self.seen.append([self.expanded(prompt) for prompt in prompts])
        offset = OFFSET[len(self.calls)]
        return [self.output(ids, turn, offset) for ids, turn in zip(self.seen[-1], written, strict=True)]

    def expanded(self, prompt) -> list[int]:
        images = prompt["multi_modal_data"]["image"]
        images = images if isinstance(images, list) else [images]
        counts = iter([(image.width // self.factor) * (image.height // self.factor) for image in images])
        ids: list[int] = []
        for one in prompt["prompt_token_ids"]:
            ids += [one] * (next(counts, 1) if one == self.image_token_id else 1)
        return ids

    @staticmethod
    def output(prompt_ids, turn, offset):
        logprobs = [{one: SimpleNamespace(rank=1, logprob=-1.0 - offset)} for one in turn]
        completion = SimpleNamespace(token_ids=turn, logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=prompt_ids, outputs=[completion])


def install(monkeypatch) -> None:
    """Let TRL find the scripted engine; what it sets in the environment is taken back."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", ScriptedEngine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", lambda **options: SimpleNamespace(**options), raising=False)


def score_as(monkeypatch, trainer, value=-1.0):
    """Every token has this log-probability in the passes of the trainer."""

    def logps(model, input_ids, attention_mask, logits_to_keep, **kwargs):
        scores = torch.full((len(input_ids), logits_to_keep), value)
        return scores, None, None

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", logps)
