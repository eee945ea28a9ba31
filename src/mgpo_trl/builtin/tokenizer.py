r"""
A word-level tokenizer for the built-in task: a whole sentence of the conversation template is one token.

It is an ordinary `PreTrainedTokenizerFast`: it saves, loads and decodes like any other, and decoding an encoded text
gives the text back. Text that is not in its vocabulary, such as a question about somebody's own photograph, becomes
UTF-8 bytes.

    >>> tokenizer = build_tokenizer()
    >>> tokenizer.tokenize("What is on the red card?\nno")
    ['What is on the ', 'red', ' card?', '\n', '<0x6E>', '<0x6F>']
"""

import re
from dataclasses import astuple

from mgpo_trl.boxes import BoxStatus, format_box
from mgpo_trl.builtin.needle import LETTERS
from mgpo_trl.builtin.scenes import COLOURS, HATCHES
from mgpo_trl.prompts import PromptTemplate

PAD, EOS = "<|endoftext|>", "<|im_end|>"
SPECIAL = (PAD, "<|im_start|>", EOS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MAX_COORDINATE = 112
BOX_LABEL = "card"
"""Label of every box in the warm start."""
DETECT, READ = "Where is the card?", "Read the card."
"""Instructions that only the warm start uses."""


def answer_text(hatch: int) -> str:
    r"""
    The answer turn for one hatch.

    >>> answer_text(0)
    'The card shows vertical lines. \\boxed{A}'
    """
    return f"The card shows {HATCHES[hatch]}. \\boxed{{{LETTERS[hatch]}}}"


def build_tokenizer(template: PromptTemplate | None = None):
    """
    Make the tokenizer whose words are the pieces of a conversation template and of the built-in task.

    Args:
        template ([`PromptTemplate`], *optional*): Template whose sentences become tokens. Defaults to the default one.

    Returns:
        `PreTrainedTokenizerFast`: With the special tokens of Qwen2.5-VL; end of turn is `<|im_end|>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = vocabulary_words(template or PromptTemplate())
    vocabulary = [*SPECIAL, *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {word: number for number, word in enumerate(vocabulary)}
    core = Tokenizer(models.BPE(vocab=ids, merges=[], byte_fallback=True, ignore_merges=True))
    longest_first = sorted(words, key=len, reverse=True)
    pattern = Regex("|".join(re.escape(word) for word in longest_first))
    core.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[token for token in SPECIAL if token not in (PAD, EOS)],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def vocabulary_words(template: PromptTemplate) -> list[str]:
    """All words in a fixed order: chat scaffold, template sentences, questions, choices, boxes, answers."""
    scaffold = ["system\n", "user\n", "assistant\n", "\n", "You are a helpful assistant."]
    statuses = [status.value.replace("_", " ") for status in BoxStatus]
    questions = ["What is on the ", *COLOURS, " card?", "What is on the card?", DETECT, READ]
    choices = [*(f"\n({letter}) " for letter in LETTERS), *(f"({letter}) " for letter in LETTERS), *HATCHES]
    box = re.split(r"(?<=[\[ ])\d+", format_box((0, 0, 28, 28), (84, 84), "absolute", BOX_LABEL))
    numbers = [str(number) for number in range(MAX_COORDINATE + 1)]
    answers = [*re.split(f"{HATCHES[0]}|(?<={{)[A-D]", answer_text(0)), *LETTERS]
    parts = [*scaffold, *_sentences(template), *statuses, *questions, *choices, *box, *numbers, *answers]
    return [part for part in dict.fromkeys(parts) if part]


def _sentences(template: PromptTemplate) -> list[str]:
    """The literal text between the placeholders of every part."""
    pieces = (piece for part in astuple(template) for piece in re.split(r"\{(?:question|choices|status)\}", part))
    return [piece for piece in pieces if piece]
