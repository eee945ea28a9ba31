"""What a forward and backward pass keeps alive, found by running the model's own layers on torch's meta device.

Meta tensors have shapes and no values, so a 7B model at full length costs no memory and a second of time. Attention
is replaced by a function that keeps what a fused kernel keeps: queries, keys, values, the output and one number for
each query, and never a matrix of all pairs.
"""

import copy
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

PROBE = "mgpo_memory_probe"


class LiveBytes(TorchDispatchMode):
    """
    Bytes of the tensors that operations inside the block make and somebody still holds.

    Args:
        known (`Iterable[torch.Tensor]`): Tensors that are there already, such as weights: their views are not counted.
    """

    def __init__(self, known=()):
        super().__init__()
        self.current = self.peak = 0
        self._alive = {}
        self._known = [tensor.untyped_storage() for tensor in known]
        self._known_keys = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return output

    def _add(self, storage) -> None:
        key = storage._cdata
        if key in self._known_keys or key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self.current += size
        self.peak = max(self.peak, self.current)

    def _remove(self, key: int, size: int) -> None:
        self._alive.pop(key, None)
        self.current -= size


class _FusedAttention(torch.autograd.Function):
    """Shapes: query (B, heads, S, D), key and value (B, heads, T, D); like the fused kernels, without their result."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _probe_attention(module, query, key, value, attention_mask, **kwargs):
    """As transformers calls an attention; a padded batch gets its keys repeated to the number of query heads."""
    groups = query.size(1) // key.size(1)
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    output = _FusedAttention.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


def attend_through_probe(model) -> None:
    """Replace the attention of a model on the meta device."""
    AttentionInterface.register(PROBE, _probe_attention)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = PROBE


@dataclass(frozen=True)
class Pass:
    """Bytes of one pass through a stack of layers."""

    held: int
    """Alive when the forward pass is done: what the backward pass needs."""
    peak: int
    """Most that is alive at any time."""


def language_pass(config, prepare, batch: int, tokens: int, train: bool) -> Pass:
    """
    The language layers for `batch` rows of `tokens` tokens.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the model.
        prepare (`Callable`): Makes a model on the meta device from a configuration, adapters and all.
        batch (`int`): Rows.
        tokens (`int`): Tokens of a row.
        train (`bool`): Whether a backward pass follows.
    """

    def run(model):
        text = model.model.language_model
        hidden = torch.empty(batch, tokens, text.config.hidden_size, dtype=_dtype(text), device="meta")
        positions = torch.zeros(3, batch, tokens, dtype=torch.long, device="meta")

        def forward(states):
            return text(inputs_embeds=states, position_ids=positions, use_cache=False).last_hidden_state

        return _measure(model, forward, hidden, train)

    return _for_all_layers(config, "text_config", "num_hidden_layers", prepare, run)


def vision_pass(config, prepare, patches: int, train: bool) -> Pass:
    """The vision tower for images of `patches` patches in all; arguments as in [`language_pass`]."""

    def run(model):
        tower = model.model.visual
        width = tower.config.hidden_size // tower.config.num_heads
        hidden = torch.empty(patches, tower.config.hidden_size, dtype=_dtype(tower), device="meta")
        turns = tuple(torch.empty(patches, width, device="meta") for _ in range(2))  # cosines and sines
        bounds = torch.tensor([0, patches])

        def forward(states):
            for block in tower.blocks:
                states = block(states, cu_seqlens=bounds, position_embeddings=turns)
            return tower.merger(states)

        return _measure(model, forward, hidden, train)

    return _for_all_layers(config, "vision_config", "depth", prepare, run)


def _for_all_layers(config, part: str, name: str, prepare, run) -> Pass:
    """Run two and three layers: every further one adds what the third added (the first ones also hold the input)."""
    two, three = (run(prepare(_with_layers(config, part, name, number))) for number in (2, 3))
    more = getattr(getattr(config, part), name) - 3
    return Pass(three.held + more * (three.held - two.held), three.peak + more * (three.peak - two.peak))


def _with_layers(config, part: str, name: str, number: int):
    """A copy of the configuration with few layers, in both halves of the model."""
    small = copy.deepcopy(config)
    small.text_config.num_hidden_layers = small.vision_config.depth = 1
    setattr(getattr(small, part), name, number)
    return small


def _measure(model, forward, inputs: torch.Tensor, train: bool) -> Pass:
    model.train(train)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live, nullcontext() if train else torch.no_grad():
        live._add(inputs.untyped_storage())
        output = forward(inputs.requires_grad_(train))
        held = live.current
        if train:  # gradients of weights are counted elsewhere
            torch.autograd.grad(output, inputs, torch.empty_like(output))
    return Pass(held, live.peak)


def _dtype(module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
