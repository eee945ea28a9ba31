"""
Draws `rollout.png` of concepts.md: one rollout of a built-in scene, and which of its tokens the loss covers.

    python docs/draw_rollout.py docs/rollout.png

The scene, the view, the crop, every turn that is not the model's, and the ids are those of the rollout loop. The two
turns of the model are written by hand, right ones. The ground is white in light and dark mode.
"""

import sys

from PIL import Image, ImageDraw, ImageFont

from mgpo_trl.boxes import format_box
from mgpo_trl.builtin.needle import draw_question, make_row
from mgpo_trl.builtin.scenes import MAX_PIXELS, MIN_PIXELS, cell_box
from mgpo_trl.builtin.tiny import build_processor
from mgpo_trl.builtin.tokenizer import answer_text
from mgpo_trl.processing import VisionChat
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.rollout import Rollout, RoundTemplate, Sampled, flatten, run_rounds, start_rollouts

LEVEL, SPLIT, INDEX, SEED = "refer", "heldout", 5, 1
WIDTH, EDGE, GAP, SIDE = 1600, 40, 40, 350
INK, PALE = (31, 35, 40), (101, 109, 118)
FIXED, PLACEHOLDER = (225, 228, 232), (160, 168, 178)
GROUNDING, ANSWER = (147, 197, 253), (134, 239, 172)
BOX = (220, 38, 38)


def font(size: int):
    return ImageFont.load_default(size)


def play() -> Rollout:
    """One rollout of two rounds whose sampled turns are given."""
    _, card = draw_question(LEVEL, SPLIT, INDEX, SEED)
    chat = VisionChat(build_processor(), max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS)
    template = RoundTemplate(PromptTemplate(), chat, "absolute", min_box_side=14)
    texts = [format_box(cell_box(card.cell, 28), (84, 84), "absolute", "card"), answer_text(card.hatch)]
    ends = [[*chat.tokenizer.encode(text), chat.end_of_turn_id] for text in texts]
    rollouts = start_rollouts([make_row(LEVEL, SPLIT, INDEX, SEED)], template, 2)
    run_rounds(rollouts, lambda contexts: [Sampled(ends[contexts[0].round - 1])], template)
    return rollouts[0]


def draw_images(canvas: Image.Image, rollout: Rollout) -> None:
    """Original, view, view with the box, crop; each with what it is."""
    grounding = rollout.turns[0]
    x1, y1, x2, y2 = grounding.box.box_view_px
    scale = SIDE / rollout.view.width
    marked = rollout.view.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    ImageDraw.Draw(marked).rectangle([x1 * scale, y1 * scale, x2 * scale - 1, y2 * scale - 1], outline=BOX, width=6)
    named = ", ".join(map(str, grounding.box_original_px))
    crop = grounding.reply_image
    smooth, plain = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
    columns = [
        (
            "The image",
            rollout.image,
            smooth,
            f"{size_of(rollout.image)} pixels in the file.\nEvery crop is cut from it.",
        ),
        ("The view", rollout.view, plain, f"Fitted into max_pixels: {size_of(rollout.view)},\n9 image tokens."),
        ("The box", marked, plain, f"Round 1: [{x1}, {y1}, {x2}, {y2}] in the view\n= [{named}] in the image."),
        (
            "The crop",
            crop,
            plain,
            f"Cut from the image, fitted into\nthe same budget: {size_of(crop)}.",
        ),
    ]
    for number, (title, image, resample, text) in enumerate(columns):
        shown = image.resize((SIDE, SIDE), resample)
        draw_column(canvas, EDGE + number * (SIDE + GAP), f"{number + 1}  {title}", shown, text.split("\n"))


def size_of(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def draw_column(canvas: Image.Image, left: int, title: str, image: Image.Image, lines: list[str]) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.text((left, EDGE - 10), title, fill=INK, font=font(30))
    top = EDGE + 36
    canvas.paste(image, (left, top))
    for line in lines:
        draw.text((left, top + SIDE + 8), line, fill=PALE, font=font(21))
        top += 28
    if left + SIDE + GAP < WIDTH - EDGE:
        middle = EDGE + 36 + SIDE // 2
        end = left + SIDE + GAP - 6
        draw.line([left + SIDE + 5, middle, end - 8, middle], fill=INK, width=4)
        draw.polygon([(end, middle), (end - 14, middle - 10), (end - 14, middle + 10)], fill=INK)


def draw_turns(canvas: Image.Image, top: int, rollout: Rollout) -> int:
    """The four turns, shortened, and the reward; returns where they end."""
    choices = "  ".join(f"({letter}) {text}" for letter, text in zip("ABCD", rollout.choices, strict=True))
    box = rollout.turns[0].text.replace("\n", " ")
    turns = [
        (
            FIXED,
            "we ask",
            f"[view]  {rollout.question}  Do not answer yet. Find the part ... as JSON.   (no choices yet)",
        ),
        (GROUNDING, "round 1", box),
        (FIXED, "we reply", f"[crop]  This is the region that you chose ...  {choices}"),
        (ANSWER, "round 2", rollout.turns[1].text),
    ]
    draw = ImageDraw.Draw(canvas)
    for colour, who, text in turns:
        draw.rounded_rectangle([EDGE, top, WIDTH - EDGE, top + 50], 10, fill=colour)
        draw.text((EDGE + 18, top + 11), who, fill=INK, font=font(24))
        draw.text((EDGE + 150, top + 12), text, fill=INK, font=font(23))
        top += 60
    draw.text((WIDTH - EDGE - 18, top - 35), "the letter is right: reward 1", fill=INK, font=font(24), anchor="rm")
    return top


def draw_tokens(canvas: Image.Image, top: int, rollout: Rollout) -> None:
    """One cell a token: blue and green ones are sampled and have a loss, grey ones are ours and have none."""
    flat = flatten(rollout)
    image_id = max(set(flat.ids), key=flat.ids.count)  # the placeholder is the most frequent id
    turn_ids = [0] * len(rollout.prompt_ids) + flat.turn_ids
    cell = (WIDTH - 2 * EDGE) / len(turn_ids)
    draw = ImageDraw.Draw(canvas)
    draw.text(
        (EDGE, top),
        f"The {len(turn_ids)} tokens of the rollout, with their turn ids. The loss covers the coloured ones.",
        fill=INK,
        font=font(26),
    )
    for number, (token, turn) in enumerate(zip(flat.ids, turn_ids, strict=True)):
        left = EDGE + number * cell
        colour = PLACEHOLDER if token == image_id else (FIXED, GROUNDING, ANSWER)[turn]
        draw.rectangle([left, top + 46, left + cell - 3, top + 92], fill=colour)
        draw.text((left + cell / 2 - 1, top + 69), str(turn), fill=INK, font=font(17), anchor="mm")
    draw_spans(draw, top + 100, cell, rollout)


def draw_spans(draw: ImageDraw.ImageDraw, top: int, cell: float, rollout: Rollout) -> None:
    """What the tokens are, below them."""
    grounding, answer = rollout.turns
    spans = [
        ("prompt (dark: the view)", len(rollout.prompt_ids)),
        ("round 1", len(grounding.ids)),
        ("reply (dark: the crop)", len(grounding.reply_ids)),
        ("round 2", len(answer.ids)),
    ]
    left = float(EDGE)
    for name, length in spans:
        right = left + length * cell
        draw.line([left, top + 4, right - 5, top + 4], fill=INK, width=3)
        draw.text(((left + right) / 2, top + 24), name, fill=INK, font=font(21), anchor="mm")
        left = right


def main(path: str) -> None:
    rollout = play()
    images_end = EDGE + 36 + SIDE + 80
    canvas = Image.new("RGB", (WIDTH, images_end + 4 * 60 + 200), "white")
    draw_images(canvas, rollout)
    bottom = draw_turns(canvas, images_end, rollout)
    draw_tokens(canvas, bottom + 24, rollout)
    canvas.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
