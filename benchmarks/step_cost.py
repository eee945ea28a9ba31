"""
What one optimisation step costs, by part: the plain path (TRL's generation and loss), ours, and the floor.

    python benchmarks/step_cost.py                 tables for 3B and 7B, and the wall time of the built-in task
    python benchmarks/step_cost.py --json          the same as one JSON object
    python benchmarks/step_cost.py --quick         within a minute: fewer wall-time pairs

How it counts. The real trainer runs one step of the scenario (token lengths of view, crop and turns) on the tiny
model, once plain and once ours, and every call of the vision tower and the language model is recorded with its
shapes. Each recorded call is then replayed on meta tensors with the layers of Qwen2.5-VL-3B and 7B under torch's FLOP
counter, forward and backward. Attention counts as the kernels are called: a causal mask saves nothing there. The
floor is computed from formulas: every distinct image encoded once where the tower is frozen, every distinct prefix
prefilled once, round 2 only its suffix, causal attention at half, the LM head on sampled tokens alone, no padding.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from common import conditions, write_result
from torch.utils.flop_counter import FlopCounterMode

TEXT = {
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2,
           "num_hidden_layers": 36, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
           "num_hidden_layers": 28, "vocab_size": 152064},
}  # fmt: skip
"""Published shapes of the language models."""
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window": 64, "full": 4}
"""The vision tower of both; four of its layers attend to the whole image, the others to windows of 64 patches."""


@dataclass(frozen=True)
class Scenario:
    """Lengths of one step: one group of G rollouts about one image."""

    generations: int = 8
    """Rollouts of the group."""
    image_tokens: int = 1280
    """Tokens of the view, and of each crop."""
    sampled: tuple[int, int] = (60, 200)
    """Sampled tokens of each round."""
    checkpointing: bool = True
    """Whether the backward pass runs every layer forward once more."""


@dataclass(frozen=True)
class Call:
    """One recorded call."""

    part: str
    """Which part of the step it belongs to."""
    kind: str
    """`vision`, `text` or `head`."""
    grad: bool
    """Whether a backward pass follows."""
    shape: tuple
    """vision: patches of each image; text: (rows, new tokens, cached tokens) or the (length, prefix length) of each
    span of a packed row; head: (tokens,)."""


def grid_of(tokens: int) -> tuple[int, int]:
    """Columns and rows of a nearly square image of exactly so many tokens."""
    rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
    return tokens // rows, rows


# recording


def build_trainer(scenario: Scenario, ours: bool, directory: str):
    """The real trainer on the tiny model with LoRA and a frozen tower; every rollout gets a crop of its own."""
    import numpy as np
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image

    from mgpo_trl import MGPOConfig, MGPOTrainer
    from mgpo_trl.builtin.tiny import save_tiny

    path = save_tiny(directory, "refer", 0)
    columns, lines = grid_of(scenario.image_tokens)
    crop = (28 * columns, 28 * lines)
    noise = np.random.default_rng(0).integers(0, 256, (2 * crop[1], 2 * crop[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    row = {"id": "0", "image": image, "question": "What is on the red card?", "choices": ["a", "b"], "answer": "A"}
    pixels = scenario.image_tokens * 28 * 28
    args = MGPOConfig(
        directory, num_generations=scenario.generations, per_device_train_batch_size=scenario.generations, beta=0.01,
        max_pixels=pixels, min_pixels=pixels // 2, round_token_budgets=list(scenario.sampled), report_to="none",
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        encode_once=ours, share_prefix=ours, pack_loss=ours,
    )  # fmt: skip
    trainer = MGPOTrainer(
        str(path), lambda completions, **kwargs: [float(n % 2) for n in range(len(completions))], args,
        train_dataset=Dataset.from_list([row, {**row, "id": "1"}]),
        peft_config=LoraConfig(r=4, target_modules=r"^(?!.*visual).*\.(q_proj|v_proj)$"),
    )  # fmt: skip
    ends = sorted({*trainer.generation_config.suppress_tokens, *trainer.eos_token_ids})
    trainer.generation_config.suppress_tokens = ends  # every turn has exactly its budget of tokens
    trainer.generation_kwargs["suppress_tokens"] = ends
    places = Counter()

    def own_crop(rollout, named):
        places[id(rollout)] = places.get(id(rollout), len(places))
        left = places[id(rollout)]
        return (left, 0, left + crop[0], crop[1])

    trainer.template = replace(trainer.template, crop_policy=own_crop)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, [{**row} for _ in range(scenario.generations)]


@contextmanager
def recording(trainer) -> Iterator[list[Call]]:
    """Collects the calls of the vision tower and the language model while it is open."""
    calls: list[Call] = []
    backbone = trainer._bare_model(trainer.model).base_model

    def text(module, args, kwargs):
        rows, new = kwargs["inputs_embeds"].shape[:2]
        packed = kwargs.get("packed_rows")
        if packed is not None:
            shape = tuple((span.length, span.prefix.length if span.prefix else 0) for span in packed.spans)
        else:
            cache = kwargs.get("past_key_values")
            shape = (rows, new, cache.get_seq_length() if cache is not None else 0)
        calls.append(Call("", "text", torch.is_grad_enabled(), shape))

    def vision(module, args, kwargs):
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        calls.append(Call("", "vision", False, tuple(grids.prod(-1).tolist())))

    hooks = [
        backbone.language_model.register_forward_pre_hook(text, with_kwargs=True),
        backbone.visual.register_forward_pre_hook(vision, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def record_step(scenario: Scenario, ours: bool) -> list[Call]:
    """Every call of one step, with the part that it belongs to."""
    with tempfile.TemporaryDirectory() as directory:
        trainer, rows = build_trainer(scenario, ours, directory)
        with recording(trainer) as calls:
            reference: list[int] = []
            score = trainer._get_per_token_logps_and_entropies
            trainer._get_per_token_logps_and_entropies = lambda *a, **k: reference.append(len(calls)) or score(*a, **k)
            inputs = trainer._prepare_inputs(rows)
            generated, done = reference[0], len(calls)
            trainer._get_per_token_logps_and_entropies = score
            trainer._compute_loss(trainer.model, inputs)
        model_tokens = int((inputs["turn_ids"] > 0).sum())
        expected = scenario.generations * sum(scenario.sampled)
        assert model_tokens == expected, f"{model_tokens} sampled tokens, {expected} expected"
        scored = model_tokens if ours else int(inputs["completion_mask"].sum())
        head = [Call("reference", "head", False, (scored,)), Call("policy", "head", True, (scored,))]
        head.append(Call("generation", "head", False, (expected,)))
        return [*_named(calls, generated, done), *head]


def _named(calls: list[Call], generated: int, done: int) -> Iterator[Call]:
    for number, call in enumerate(calls):
        part = "reference" if generated <= number < done else "policy"
        if number < generated:
            part = "decode" if call.kind == "text" and call.shape[1] == 1 else "prefill"
        yield replace(call, part=part)


# replaying


class Replay:
    """Counts the FLOPs of recorded calls at the shape of a published model, on meta tensors, one layer at a time."""

    def __init__(self, size: str):
        from transformers import Qwen2_5_VLConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        from mgpo_trl.packing import ATTENTION, _attention_forward

        self.shape = TEXT[size]
        config = Qwen2_5_VLConfig(
            text_config={**self.shape, "num_hidden_layers": 1, "rope_parameters": {
                "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}},
        ).get_text_config()  # fmt: skip
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(ATTENTION, _attention_forward)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        config._attn_implementation = ATTENTION
        with torch.device("meta"):
            self.model = Qwen2_5_VLTextModel(config).requires_grad_(False)
        self._seen: dict = {}

    def flops(self, call: Call, checkpointing: bool) -> dict[str, int]:
        """Forward, backward and recomputed FLOPs of a call."""
        if call.kind == "head":
            forward = 2 * call.shape[0] * self.shape["hidden_size"] * self.shape["vocab_size"]
            # The fused head computes its logits again in the backward pass, then the gradient of the hidden states.
            return {"lm head": forward * (3 if call.grad else 1)}
        if call.kind == "vision":
            return {"vision": sum(vision_flops(patches, self.shape["hidden_size"]) for patches in call.shape)}
        forward, backward, _ = self._text(call)
        parts = {call.part if call.part != "policy" else "policy forward": forward}
        if call.grad:
            parts["backward"] = backward
            if checkpointing:
                parts["recompute"] = forward
        return parts

    def _text(self, call: Call) -> tuple[int, int, int]:
        """FLOPs forward and backward, and bytes that the backward pass keeps of one layer."""
        key = (call.shape, call.grad)
        if key not in self._seen:
            layers = self.shape["num_hidden_layers"]
            forward, backward, kept = self._one_layer(call)
            self._seen[key] = (layers * forward, layers * backward, kept)
        return self._seen[key]

    def _one_layer(self, call: Call) -> tuple[int, int, int]:
        from transformers import DynamicCache

        is_packed = isinstance(call.shape[0], tuple)
        rows, new, cached = (1, sum(length for length, _ in call.shape), 0) if is_packed else call.shape
        hidden = torch.empty(rows, new, self.shape["hidden_size"], device="meta", requires_grad=call.grad)
        positions = torch.empty(3, rows, new, dtype=torch.long, device="meta")
        cache = None
        if cached:
            heads = self.shape["num_key_value_heads"]
            size = self.shape["hidden_size"] // self.shape["num_attention_heads"]
            cache = DynamicCache()
            cache.update(*(torch.empty(rows, heads, cached, size, device="meta") for _ in range(2)), 0)
        mask = torch.ones(rows, 1, new, cached + new, dtype=torch.bool, device="meta")
        given = {"packed_rows": packed_of(call.shape)} if is_packed else {"attention_mask": {"full_attention": mask}}
        kept: dict[int, int] = {}

        def keep(tensor):
            kept[id(tensor)] = tensor.nbytes
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, hooks:
            output = self.model(
                inputs_embeds=hidden, position_ids=positions, past_key_values=cache, use_cache=cache is not None,
                **given,
            ).last_hidden_state  # fmt: skip
            forward = counter.get_total_flops()
            if call.grad:
                output.sum().backward()
        return forward, counter.get_total_flops() - forward, sum(kept.values())


def packed_of(shape: tuple):
    """Spans of a packed row with these (length, prefix length): a prompt stands before the completions that see it."""
    from mgpo_trl.packing import PackedRows, Span

    spans, start, prompt = [], 0, None
    for length, prefix in shape:
        span = Span(start, start + length, prompt if prefix else None)
        prompt = prompt if prefix else span
        spans.append(span)
        start += length
    nothing = torch.empty(0, dtype=torch.long, device="meta")
    return PackedRows(tuple(spans), nothing, nothing, nothing, nothing, ())


def vision_flops(patches: int, out: int) -> int:
    """Forward FLOPs of the vision tower for one image, with its windows."""
    h, inner, depth = VISION["hidden_size"], VISION["intermediate_size"], VISION["depth"]
    linear = 2 * patches * (4 * h * h + 3 * h * inner) * depth
    windows = 4 * patches * min(VISION["window"], patches) * h * (depth - VISION["full"])
    whole = 4 * patches * patches * h * VISION["full"]
    merged = patches // 4
    merger = 2 * merged * (4 * h) * (4 * h + out)
    return linear + windows + whole + merger + 2 * patches * 1176 * h


# the floor


def floor(scenario: Scenario, size: str, prompt: int, reply: int) -> dict[str, float]:
    """
    Least FLOPs of the step by part.

    Args:
        scenario ([`Scenario`]): Lengths.
        size (`str`): `"3b"` or `"7b"`.
        prompt (`int`), reply (`int`): Text tokens of the prompt and of the reply, images not counted.
    """
    shape, groups, (first, second) = TEXT[size], scenario.generations, scenario.sampled
    h, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    weights = 2 * (2 * h * h + 2 * h * kv + 3 * h * inner) * layers
    pair = 4 * h * layers  # one query looking at one key
    context = prompt + scenario.image_tokens
    suffix = reply + scenario.image_tokens

    def run(new, cached):
        return weights * new + pair * (new * cached + new * new / 2)

    completion = first + suffix + second
    loss_pass = run(context, 0) + groups * run(completion, context)
    head = 2 * h * shape["vocab_size"] * groups * (first + second)
    return {
        "vision": (1 + groups) * vision_flops(4 * scenario.image_tokens, h),
        "prefill": run(context, 0) + groups * run(suffix, context + first),
        "decode": groups * (run(first, context) + run(second, context + first + suffix)),
        "reference": loss_pass,
        "policy forward": loss_pass,
        # Frozen weights: the gradient of the activations alone, twice the attention.
        "backward": loss_pass + pair * (context**2 / 2 + groups * (completion * context + completion**2 / 2)),
        "recompute": loss_pass if scenario.checkpointing else 0,
        "lm head": head * (1 + 1 + 3),
    }


def total(calls: list[Call], replay: Replay, checkpointing: bool) -> Counter:
    """FLOPs by part."""
    parts: Counter = Counter()
    for call in _grouped(calls):
        call, times = call
        for name, flops in replay.flops(call, checkpointing).items():
            parts[name] += times * flops
    return parts


def _grouped(calls: list[Call]) -> Iterator[tuple[Call, float]]:
    """Decoding steps of one batch differ in the cache alone, linearly: the first and the last stand for all."""
    run: list[Call] = []

    def flush():
        if run:
            yield run[0], len(run) / 2
            yield run[-1], len(run) / 2
            run.clear()

    for call in calls:
        same = (
            run
            and call.part == "decode"
            and call.shape[0] == run[-1].shape[0]
            and call.shape[2] == run[-1].shape[2] + 1
        )
        if call.part == "decode" and (same or not run):
            run.append(call)
            continue
        yield from flush()
        if call.part == "decode":
            run.append(call)
        else:
            yield call, 1
    yield from flush()


def peak_bytes(calls: list[Call], replay: Replay, checkpointing: bool) -> int:
    """Bytes of activations (bf16) that the policy pass keeps: with checkpointing each layer's input, and one layer."""
    (call,) = [call for call in calls if call.kind == "text" and call.grad]
    kept = replay._text(call)[2] // 2  # counted in fp32
    is_packed = isinstance(call.shape[0], tuple)
    tokens = sum(length for length, _ in call.shape) if is_packed else call.shape[0] * call.shape[1]
    layers = replay.shape["num_hidden_layers"]
    return kept + layers * tokens * replay.shape["hidden_size"] * 2 if checkpointing else layers * kept


# wall time


def wall(pairs: int) -> dict:
    """Seconds of a built-in step of the warm-started model, ours over plain, in turn on the same questions."""
    from mgpo_trl import MGPOConfig, MGPOTrainer
    from mgpo_trl.builtin.loading import load_builtin
    from mgpo_trl.builtin.recipe import RECIPES
    from mgpo_trl.builtin.warm_start import warm_start
    from mgpo_trl.rewards import accuracy_reward

    torch.set_num_threads(1)
    path = warm_start("refer", 1).model_dir  # from the cache, where the built-in task was run with this seed
    with tempfile.TemporaryDirectory() as directory:
        rows = load_builtin("builtin:refer", "train", 1).dataset
        trainers = []
        for ours in (False, True):
            switches = {"pack_loss": ours, "share_prefix": ours, "encode_once": ours}
            options = {**RECIPES["refer"].rl_options(), "output_dir": directory, "disable_tqdm": True, **switches}
            trainer = MGPOTrainer(str(path), accuracy_reward, MGPOConfig(**options), train_dataset=rows)
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1
            trainers.append(trainer)
        batches = iter(trainers[0].get_train_dataloader())
        times = [_pair(trainers, next(batches), seed) for seed in range(pairs + 1)][1:]  # the first one warms up
    ratios = [ours / plain for plain, ours in times]
    return {
        "ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "pairs": pairs,
        "plain_seconds": statistics.median(plain for plain, _ in times),
        "ours_seconds": statistics.median(ours for _, ours in times),
    }  # fmt: skip


def _pair(trainers, batch, seed: int) -> list[float]:
    times = []
    for trainer in trainers:
        torch.manual_seed(seed)
        started = time.perf_counter()
        trainer._compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()
        times.append(time.perf_counter() - started)
        trainer.model.zero_grad()
        trainer._step += 1
    return times


def text_tokens(calls: list[Call], scenario: Scenario) -> tuple[int, int]:
    """Text tokens of the prompt and of the reply, read off the prefills of the shared path."""
    prefills = [call.shape for call in calls if call.part == "prefill" and call.kind == "text"]
    prompt, later = prefills[0], prefills[1]
    return prompt[1] - scenario.image_tokens, later[1] - scenario.image_tokens - 1  # and the last sampled token


def measure(scenario: Scenario, pairs: int) -> dict:
    """Everything, as one dictionary: the figures at 7B, those at 3B under `at_3b`, and the wall time."""
    recorded = {name: record_step(scenario, name == "ours") for name in ("plain", "ours")}
    prompt, reply = text_tokens(recorded["ours"], scenario)
    sizes = {size: _at(size, recorded, scenario, prompt, reply) for size in ("7b", "3b")}
    result = {**sizes["7b"], "at_3b": sizes["3b"], "lengths": {"prompt_text": prompt, "reply_text": reply}}
    result["wall"] = wall(pairs)
    return result


def _at(size: str, recorded: dict[str, list[Call]], scenario: Scenario, prompt: int, reply: int) -> dict:
    """The figures at one model shape."""
    replay = Replay(size)
    parts = {name: total(calls, replay, scenario.checkpointing) for name, calls in recorded.items()}
    parts["floor"] = floor(scenario, size, prompt, reply)
    sums = {name: float(sum(values.values())) for name, values in parts.items()}
    return {
        "flops": {**sums, "by_part": {name: dict(values) for name, values in parts.items()}},
        "ratio_to_plain": sums["ours"] / sums["plain"],
        "ratio_to_floor": sums["ours"] / sums["floor"],
        "peak_bytes": {name: peak_bytes(calls, replay, scenario.checkpointing) for name, calls in recorded.items()},
    }


def print_tables(result: dict) -> None:
    """The figures for people."""
    for size, figures in (("3B", result["at_3b"]), ("7B", result)):
        flops = figures["flops"]
        print(f"\nQwen2.5-VL-{size}, TFLOP of one step      plain      ours     floor")
        for part in flops["by_part"]["floor"]:
            cells = [flops["by_part"][name].get(part, 0) / 1e12 for name in ("plain", "ours", "floor")]
            print(f"{part:<36}" + "".join(f"{cell:10.1f}" for cell in cells))
        print(f"{'sum':<36}" + "".join(f"{flops[name] / 1e12:10.1f}" for name in ("plain", "ours", "floor")))
        print(f"ours / plain {figures['ratio_to_plain']:.3f}, ours / floor {figures['ratio_to_floor']:.3f}")
        peak = {name: value / 2**30 for name, value in figures["peak_bytes"].items()}
        print(f"activations kept by the policy pass: plain {peak['plain']:.2f} GiB, ours {peak['ours']:.2f} GiB")
    wall = result["wall"]
    print(
        f"\nbuilt-in step, ours / plain: {wall['ratio']:.2f} (median of {wall['pairs']} pairs, {wall['min']:.2f} to "
        f"{wall['max']:.2f}); {wall['plain_seconds']:.2f} s and {wall['ours_seconds']:.2f} s"
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    parser.add_argument("--quick", action="store_true", help="Three wall-time pairs; answers within a minute.")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--image_tokens", type=int, default=1280)
    parser.add_argument("--sampled", type=int, nargs=2, default=[60, 200])
    parser.add_argument("--no_checkpointing", action="store_true")
    options = parser.parse_args()
    sampled, checkpointing = tuple(options.sampled), not options.no_checkpointing
    scenario = Scenario(options.generations, options.image_tokens, sampled, checkpointing)
    result = {**conditions(sys.argv), "scenario": scenario.__dict__, **measure(scenario, 3 if options.quick else 9)}
    path = write_result("step_cost", result)
    if options.json:
        print(json.dumps(result))
        return
    print_tables(result)
    print("wrote", path)


if __name__ == "__main__":
    main()
