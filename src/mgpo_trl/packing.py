"""Rollouts in one row without padding: what a group shares stands there once, and every completion sees it.

A group of rollouts has one prompt P (with the view of its image) and completions that differ. Packed::

    rollouts   P P P A A A      P P P B B
    ids        P P P A A A B B                      positions as if each rollout stood alone
    sees       A sees P and A, B sees P and B, P sees P

The first token of every completion is predicted from the last token of the shared prompt, so one position can have
several labels: [`PackedRows.sources`] lists, for each scored token, the position that predicts it. Only those
positions reach the LM head.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

ATTENTION = "mgpo_packed"
"""Name of the attention implementation: `sdpa`, which also understands a [`PackedRows`] beside the mask."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of the packed row that see themselves, causally, and one earlier span."""

    start: int
    """First token."""
    end: int
    """One past the last token."""
    prefix: "Span | None" = None
    """The shared prompt that stands before them; `None` for a prompt."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class PackedRows:
    """B rollouts as one row of T tokens."""

    spans: tuple[Span, ...]
    """Prompts and completions in the order of the row."""
    token_rows: torch.Tensor
    """Shape (T,): the rollout that each packed token is taken from."""
    token_columns: torch.Tensor
    """Shape (T,): its column in the padded (B, P+C) ids."""
    sources: torch.Tensor
    """Shape (S,): for each scored token the packed position that predicts it."""
    scored: torch.Tensor
    """Shape (B, C), bool: the scored tokens; S of them, in the order of `sources`."""
    image_owners: tuple[tuple[int, int], ...]
    """(rollout, number of the image in it) for each image in the row, in the order of its placeholders."""

    def gather(self, padded: torch.Tensor) -> torch.Tensor:
        """Values (..., B, P+C) of the padded batch at the packed tokens, (..., 1, T)."""
        return padded[..., self.token_rows, self.token_columns].unsqueeze(-2)

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """Values (1, S) of the scored tokens in their places, (B, C), zero elsewhere. Differentiable."""
        return values.new_zeros(self.scored.shape).masked_scatter(self.scored, values)


def pack_rows(
    attention_mask: torch.Tensor,
    scored: torch.Tensor,
    prompts: Sequence[Hashable],
    prompt_images: Sequence[int],
    num_images: Sequence[int],
) -> PackedRows:
    """
    Plan a packed row for a padded batch.

    Args:
        attention_mask (`torch.Tensor`):
            Shape (B, P+C), 0 at padding: prompts are padded on the left, completions on the right.
        scored (`torch.Tensor`):
            Shape (B, C), bool: the completion tokens whose log-probability is wanted.
        prompts (`Sequence[Hashable]`):
            Equal for rollouts whose prompts, images included, are the same: they are packed as one group.
        prompt_images (`Sequence[int]`), num_images (`Sequence[int]`):
            For each rollout the images in its prompt, and in all of it.

    Returns:
        [`PackedRows`]
    """
    columns = scored.size(1)
    prompt_columns = attention_mask.size(1) - columns
    groups: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    prompt_lengths = attention_mask[:, :prompt_columns].sum(1).tolist()
    completion_lengths = attention_mask[:, prompt_columns:].sum(1).tolist()
    spans, parts, owners, starts = [], [], [], {}
    end = 0
    for rows in groups.values():
        first = rows[0]
        prefix = Span(end, end := end + prompt_lengths[first])
        spans.append(prefix)
        parts.append((first, prompt_columns - prompt_lengths[first], prompt_columns))
        owners += [(first, number) for number in range(prompt_images[first])]
        for row in rows:
            starts[row] = (end, prefix.end - 1)
            spans.append(Span(end, end := end + completion_lengths[row], prefix))
            parts.append((row, prompt_columns, prompt_columns + completion_lengths[row]))
            owners += [(row, number) for number in range(prompt_images[row], num_images[row])]
    device = attention_mask.device
    return PackedRows(
        spans=tuple(spans),
        token_rows=torch.cat([torch.full((stop - start,), row) for row, start, stop in parts]).to(device),
        token_columns=torch.cat([torch.arange(start, stop) for _, start, stop in parts]).to(device),
        sources=_sources(scored, starts),
        scored=scored,
        image_owners=tuple(owners),
    )


def grouped_order(prompts: Sequence[Hashable]) -> torch.Tensor:
    """
    A random order of rollouts in which those of one group stay together, so that micro-batches share prompts.

    Args:
        prompts (`Sequence[Hashable]`): Equal for rollouts of one group.

    Returns:
        `torch.Tensor`: Shape (B,), a permutation; groups in random order, their members too.
    """
    groups: dict[Hashable, list[int]] = {}
    for row in torch.randperm(len(prompts)).tolist():
        groups.setdefault(prompts[row], []).append(row)
    return torch.tensor([row for rows in groups.values() for row in rows])


def reorder(batch: dict, order: torch.Tensor) -> dict:
    """The batch with its rows (of tensors, and of lists) in another order; scalars and `None` stay."""
    rows = order.tolist()

    def reordered(value):
        if value is None or (isinstance(value, torch.Tensor) and value.ndim == 0):
            return value
        return value[order.to(value.device)] if isinstance(value, torch.Tensor) else [value[row] for row in rows]

    return {name: reordered(value) for name, value in batch.items()}


def _sources(scored: torch.Tensor, starts: dict[int, tuple[int, int]]) -> torch.Tensor:
    """Packed position before each scored token: its neighbour, or the last token of the prompt."""
    rows, columns = scored.nonzero(as_tuple=True)
    begin = torch.tensor([starts[row][0] for row in range(len(starts))], device=scored.device)
    last_of_prompt = torch.tensor([starts[row][1] for row in range(len(starts))], device=scored.device)
    return torch.where(columns == 0, last_of_prompt[rows], begin[rows] + columns - 1)


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedRows, scaling: float, dropout: float
) -> torch.Tensor:
    """
    Attention of a packed row; completions of one group and one length are computed together.

    Args:
        query (`torch.Tensor`), key (`torch.Tensor`), value (`torch.Tensor`):
            Shape (1, H, T, D), keys and values with as many heads as the queries.
        packed ([`PackedRows`]):
            Which tokens see which.
        scaling (`float`), dropout (`float`):
            As in [`~torch.nn.functional.scaled_dot_product_attention`].

    Returns:
        `torch.Tensor`: Shape (1, H, T, D).
    """
    # Split once: the backward of a split writes its gradient once, that of a slice a whole row for every slice.
    pieces = [states.split([span.length for span in packed.spans], dim=2) for states in (query, key, value)]
    numbers_of = {id(span): number for number, span in enumerate(packed.spans)}
    outputs: list[torch.Tensor | None] = [None] * len(packed.spans)
    for numbers in _alike(packed.spans):
        span = packed.spans[numbers[0]]
        own = [torch.cat([piece[number] for number in numbers]) for piece in pieces]
        mask = None
        if span.prefix is not None:
            prefix = numbers_of[id(span.prefix)]
            shared = [piece[prefix].expand(len(numbers), -1, -1, -1) for piece in pieces[1:]]
            own[1:] = [torch.cat(pair, dim=2) for pair in zip(shared, own[1:], strict=True)]
            mask = _lower_right(span.length, span.prefix.length, query.device)
        attended = scaled_dot_product_attention(
            *own, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
        for number, one in zip(numbers, attended.split(1), strict=True):
            outputs[number] = one
    return torch.cat(outputs, dim=2)


def _alike(spans: Sequence[Span]) -> list[list[int]]:
    """Numbers of the spans that have the same prefix and length; spans without tokens alone."""
    alike: dict[tuple, list[int]] = {}
    for number, span in enumerate(spans):
        key = (number,) if span.prefix is None else (span.prefix.start, span.length)
        alike.setdefault(key, []).append(number)
    return list(alike.values())


def _lower_right(length: int, prefix: int, device: torch.device) -> torch.Tensor:
    """Shape (length, prefix + length), bool: everything in the prefix, and the past within the span."""
    return torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)


def install_packed_attention(model) -> bool:
    """
    Let a model take `packed_rows` ([`PackedRows`]), a keyword that its text layers attend by; its backbone then
    returns the hidden states of [`PackedRows.sources`] alone. Without it, the model works as before.

    Args:
        model ([`~transformers.PreTrainedModel`]): A vision-language model, before PEFT or DDP wrap it.

    Returns:
        `bool`: Whether the model can do it: its text layers use `sdpa` and full attention throughout.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    text = model.config.get_text_config()
    if text._attn_implementation == ATTENTION:
        return True
    if text._attn_implementation != "sdpa" or set(getattr(text, "layer_types", ["full_attention"])) != {
        "full_attention"
    }:
        return False
    AttentionInterface.register(ATTENTION, _attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    text._attn_implementation = ATTENTION
    model.base_model.register_forward_hook(_keep_sources, with_kwargs=True)
    return True


def _attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    packed_rows: PackedRows | None = None,
    **kwargs,
):
    """An attention function of transformers: (1, H, T, D) in, (1, T, H, D) and no weights out."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if packed_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    output = packed_attention(query, key, value, packed_rows, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def _keep_sources(backbone, args, kwargs, output):
    packed = kwargs.get("packed_rows")
    if packed is not None:
        output.last_hidden_state = output.last_hidden_state[:, packed.sources]
    return output
