"""The round loop on hand-written ids: a chat of a dozen integers, no tensors, no tokenizer."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from mgpo_trl.boxes import BoxStatus, format_box
from mgpo_trl.images import crop_original
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.rollout import Crops, Rollout, RoundTemplate, Sampled, Turn, flatten, run_rounds

USER, HEAD, IMAGE, REPLY, END, OTHER_END = 1, 2, 3, 4, 5, 6
TALK, ANSWER = 20, 21  # sampled words
BOX = 30  # the first of the boxes
ORIGINAL_SIZE, VIEW_SIZE = (336, 224), (84, 56)  # four original pixels for one of the view; 6 image tokens

BOXES = {  # one sampled id for each way that a box can end
    BOX: ("ok", format_box((0, 10, 42, 50), VIEW_SIZE, "absolute")),
    31: ("no_json", "somewhere on the left"),
    32: ("no_box", '{"point": [1, 2]}'),
    33: ("not_numbers", '{"bbox_2d": ["a", 1, 2, 3]}'),
    34: ("out_of_view", '{"bbox_2d": [0, 0, 85, 56]}'),
    35: ("empty", '{"bbox_2d": [50, 10, 50, 40]}'),
    36: ("too_small", '{"bbox_2d": [0, 0, 28, 56]}'),
    37: ("too_narrow", '{"bbox_2d": [0, 0, 84, 29]}'),  # only with max_aspect 2
    38: ("ok", format_box((20, 0, 60, 56), VIEW_SIZE, "absolute")),
    39: ("ok", format_box((7, 14, 56, 49), VIEW_SIZE, "absolute")),
}
SLIVER = 50  # a box of one row of the view
WORDS = {TALK: "it says", ANSWER: " \\boxed{A}", **{token: text for token, (_, text) in BOXES.items()}}
WORDS[SLIVER] = format_box((0, 0, 84, 1), VIEW_SIZE, "absolute")
CLOSED, CUT = [BOX, END], [BOX, TALK]


class FakeChat:
    """Every image is shown at 84x56 (six tokens) or 56x84; a reply is REPLY, image tokens, HEAD."""

    end_of_turn_id = END

    def __init__(self):
        self.fitted, self.messages = [], []

    def fit(self, image):
        self.fitted.append(image)
        return image.resize(VIEW_SIZE if image.width >= image.height else VIEW_SIZE[::-1])

    def prompt_ids(self, messages, images):
        self.messages.append(messages[-1])
        return [USER, *[IMAGE] * 6 * len(images), HEAD]

    def reply_ids(self, message, image):
        self.messages.append(message)
        return [REPLY, *[IMAGE] * 6, HEAD]

    def decode(self, ids):
        return "".join(WORDS.get(token, "") for token in ids)

    def ends_turn(self, token_id):
        return token_id in (END, OTHER_END)


PROMPT_IDS = [USER, *[IMAGE] * 6, HEAD]
REPLY_IDS = [REPLY, *[IMAGE] * 6, HEAD]


def make_template(**options):
    return RoundTemplate(PromptTemplate(), FakeChat(), "absolute", **options)


def make_image(size=ORIGINAL_SIZE):
    """Every pixel tells where it is: red holds x // 2, green holds y."""
    image = Image.new("RGB", size)
    image.putdata([(x // 2 % 256, y % 256, 0) for y in range(size[1]) for x in range(size[0])])
    return image


ROW = {"id": "row-7", "question": "What?", "choices": ["red", "blue"], "answer": "A", "target_boxes": [[0, 0, 9, 9]]}


def play(*turns_by_rollout, template=None, images=None):
    """Play one rollout for each list of sampled turns; returns (rollouts, contexts of each round, template)."""
    template = template or make_template()
    num_rounds = len(turns_by_rollout[0])
    images = images or [make_image()] * len(turns_by_rollout)
    views = {key: template.chat.fit(image) for key, image in {id(image): image for image in images}.items()}
    rollouts = [template.start(ROW, image, views[id(image)], num_rounds) for image in images]
    seen = []

    def generate(contexts):
        seen.append(contexts)
        return [Sampled(list(turns[len(seen) - 1])) for turns in turns_by_rollout]

    assert run_rounds(rollouts, generate, template, num_rounds) is rollouts
    return rollouts, seen, template


# flatten


def test_the_worked_example_of_flatten():
    """P P P | G G G E R R I I I R R A A A, as in the docstring."""
    view, crop = Image.new("RGB", (84, 56)), Image.new("RGB", (84, 28))
    grounding = Turn(
        [11, 12, 13], "", truncated=True, reply_ids=[END, 7, 8, IMAGE, IMAGE, IMAGE, 9, 10], reply_image=crop
    )
    answer = Turn([14, 15, 16], "", truncated=False)
    rollout = Rollout("a", "Q?", view, view, [1, 2, 3], turns=[grounding, answer])
    flat = flatten(rollout)
    assert flat.ids == [1, 2, 3, 11, 12, 13, END, 7, 8, IMAGE, IMAGE, IMAGE, 9, 10, 14, 15, 16]
    assert flat.turn_ids == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2]
    assert flat.completion_ids == flat.ids[3:]
    assert flat.images[0] is view and flat.images[1] is crop and len(flat.images) == 2


def test_flatten_before_the_first_turn_has_no_completion():
    rollout = make_template().start(ROW, make_image(), make_image(VIEW_SIZE), 2)
    assert flatten(rollout).ids == PROMPT_IDS and flatten(rollout).turn_ids == flatten(rollout).completion_ids == []


# turn masks


def test_one_round_is_the_prompt_and_one_turn():
    (rollout,), seen, template = play([[TALK, ANSWER, END]])
    flat = flatten(rollout)
    assert flat.ids == [*PROMPT_IDS, TALK, ANSWER, END] and flat.turn_ids == [1, 1, 1]
    assert rollout.boxes == rollout.crops == [] and rollout.images == [rollout.view]
    assert rollout.turns[0].box is None and rollout.turns[0].reply_ids == []
    assert len(seen) == 1 and "(A) red" in template.chat.messages[0]["content"][-1]["text"]


def test_two_rounds_with_a_valid_box():
    (rollout,), seen, template = play([CLOSED, [TALK, ANSWER, END]])
    flat = flatten(rollout)
    assert flat.ids == [*PROMPT_IDS, BOX, END, *REPLY_IDS, TALK, ANSWER, END]
    assert flat.turn_ids == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2]
    assert [context.round for contexts in seen for context in contexts] == [1, 2]
    assert seen[0][0].ids == PROMPT_IDS and seen[1][0].ids == [*PROMPT_IDS, BOX, END, *REPLY_IDS]
    assert seen[0][0].images == [rollout.view] and seen[1][0].images == [rollout.view, rollout.turns[0].reply_image]
    grounding, reply = (message["content"][-1]["text"] for message in template.chat.messages)
    assert "(A) red" not in grounding and "(A) red" in reply and reply.startswith(PromptTemplate().crop_reply)


def test_three_rounds():
    (rollout,), seen, template = play([CLOSED, [TALK, 38, END], [ANSWER, END]])
    flat = flatten(rollout)
    assert flat.ids == [*PROMPT_IDS, BOX, END, *REPLY_IDS, TALK, 38, END, *REPLY_IDS, ANSWER, END]
    assert flat.turn_ids == [1, 1, *[0] * 8, 2, 2, 2, *[0] * 8, 3, 3]
    assert len(flat.images) == len(seen[2][0].images) == 3 and len(rollout.boxes) == len(rollout.crops) == 2
    texts = [message["content"][-1]["text"] for message in template.chat.messages]
    assert ["\\boxed" in text for text in texts] == ["(A) red" in text for text in texts] == [False, False, True]
    assert "this last image" in texts[1]


@pytest.mark.parametrize("token", [token for token, (status, _) in BOXES.items() if status != "ok"])
def test_an_unusable_box_gets_the_whole_image_and_its_status(token):
    status = BOXES[token][0]
    (rollout,), _, template = play([[TALK, token, END], [ANSWER, END]], template=make_template(max_box_aspect=2))
    flat = flatten(rollout)
    assert flat.ids == [*PROMPT_IDS, TALK, token, END, *REPLY_IDS, ANSWER, END]
    assert flat.turn_ids == [1, 1, 1, *[0] * 8, 2, 2]
    turn = rollout.turns[0]
    assert turn.box.status.value == status and turn.box_original_px is None
    assert (
        turn.reply_image is rollout.view and rollout.images == [rollout.view, rollout.view] and rollout.crops == [None]
    )
    assert f"({status.replace('_', ' ')})" in template.chat.messages[-1]["content"][-1]["text"]


def test_the_smallest_side_of_a_usable_box_is_a_setting():
    (rollout,), _, _ = play([[36, END], [ANSWER, END]], template=make_template(min_box_side=27))
    assert rollout.boxes[0].ok and rollout.turns[0].box_original_px == (0, 0, 112, 224)


def test_a_crop_that_no_processor_shows_is_too_narrow():
    """The box is 84 x 1 pixels of the view; the crop is 300 x 1 of one original and 150 x 1 of the other."""
    template = make_template(min_box_side=0)
    turns = [[SLIVER, END], [ANSWER, END]]
    images = [make_image((300, 56)), make_image((150, 56))]
    (long, short), _, _ = play(turns, turns, template=template, images=images)
    assert long.boxes[0].status is BoxStatus.TOO_NARROW and long.boxes[0].box_text == (0, 0, 84, 1)
    assert long.boxes[0].box_view_px is None and long.turns[0].box_original_px is None
    assert long.turns[0].reply_image is long.view and long.crops == [None]
    assert short.boxes[0].ok and short.turns[0].box_original_px == (0, 0, 150, 1)


def test_every_status_is_tested():
    assert {status for status, _ in BOXES.values()} == {status.value for status in BoxStatus}


def test_a_cut_grounding_turn_is_closed_by_us_and_its_box_still_counts():
    (rollout,), _, _ = play([CUT, [ANSWER, END]])
    flat = flatten(rollout)
    assert flat.ids == [*PROMPT_IDS, BOX, TALK, END, *REPLY_IDS, ANSWER, END]
    assert flat.turn_ids == [1, 1, 0, *[0] * 8, 2, 2]
    assert [turn.truncated for turn in rollout.turns] == [True, False] and rollout.boxes[0].ok


def test_a_cut_answer_is_left_as_it_is():
    (rollout,), _, _ = play([CLOSED, [ANSWER, TALK]])
    flat = flatten(rollout)
    assert flat.ids == [*PROMPT_IDS, BOX, END, *REPLY_IDS, ANSWER, TALK]
    assert flat.turn_ids == [1, 1, *[0] * 8, 2, 2]
    assert [turn.truncated for turn in rollout.turns] == [False, True]


def test_a_turn_ended_by_another_token_gets_the_end_of_turn_that_the_template_needs():
    (rollout,), _, _ = play([[BOX, OTHER_END], [ANSWER, OTHER_END]])
    flat = flatten(rollout)
    assert flat.ids == [*PROMPT_IDS, BOX, OTHER_END, END, *REPLY_IDS, ANSWER, OTHER_END]
    assert flat.turn_ids == [1, 1, 0, *[0] * 8, 2, 2]
    assert not any(turn.truncated for turn in rollout.turns)


def test_a_turn_without_a_single_token():
    (rollout,), _, _ = play([[], []])
    flat = flatten(rollout)
    assert flat.ids == [*PROMPT_IDS, END, *REPLY_IDS] and flat.turn_ids == [0] * 9
    assert all(turn.truncated for turn in rollout.turns) and rollout.boxes[0].status is BoxStatus.NO_JSON


def test_a_batch_keeps_its_order():
    turns = [[CLOSED, [ANSWER, END]], [[31, END], [TALK, END]], [CUT, [ANSWER]]]
    rollouts, _, _ = play(*turns)
    assert [[turn.ids for turn in rollout.turns] for rollout in rollouts] == turns
    assert [rollout.boxes[0].ok for rollout in rollouts] == [True, False, True]


def test_sampled_ids_stay_as_sampled():
    """Ids that decode to nothing, special tokens and an end in the middle are neither dropped nor re-encoded."""
    sampled = [[9999, END, BOX, HEAD, END], [IMAGE, 9999, OTHER_END, ANSWER]]
    (rollout,), _, _ = play(sampled)
    flat = flatten(rollout)
    assert [turn.ids for turn in rollout.turns] == sampled
    for number, ids in enumerate(sampled, start=1):
        pairs = zip(flat.completion_ids, flat.turn_ids, strict=True)
        assert [token for token, turn in pairs if turn == number] == ids


def test_log_probabilities_travel_with_their_ids():
    template = make_template()
    image = make_image()
    rollouts = [template.start(ROW, image, template.chat.fit(image), 2)]
    run_rounds(rollouts, lambda contexts: [Sampled(list(CLOSED), [-1.0, -2.0])], template, 2)
    assert [turn.logprobs for turn in rollouts[0].turns] == [[-1.0, -2.0]] * 2


@pytest.mark.parametrize(
    "number, message", [(1, "returned 1 samples for 2 contexts in round 1"), (3, "returned 3 samples")]
)
def test_a_generator_that_returns_the_wrong_number(number, message):
    template = make_template()
    image = make_image()
    rollouts = [template.start(ROW, image, template.chat.fit(image), 2) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        run_rounds(rollouts, lambda contexts: [Sampled(CLOSED)] * number, template, 2)


# crops


def test_the_crop_is_cut_from_the_original_pixels():
    (rollout,), _, template = play([CLOSED, [ANSWER, END]])
    assert rollout.turns[0].box_original_px == (0, 40, 168, 200)
    crop = template.chat.fitted[-1]
    assert (
        crop.size == (168, 160) and crop.getpixel((0, 0)) == (0, 40, 0) and crop.getpixel((167, 159)) == (83, 199, 0)
    )
    assert rollout.crops == [rollout.turns[0].reply_image] and rollout.crops[0].size == VIEW_SIZE


def test_a_group_shares_view_and_crop():
    other = make_image()
    image = make_image()
    turns = [[CLOSED, [ANSWER, END]], [CUT, [ANSWER, END]], [[38, END], [ANSWER, END]], [CLOSED, [ANSWER, END]]]
    rollouts, _, template = play(*turns, images=[image, image, image, other])
    crops = [rollout.crops[0] for rollout in rollouts]
    assert crops[0] is crops[1] and len({id(crop) for crop in crops}) == 3
    assert all(rollout.image is image and rollout.view is rollouts[0].view for rollout in rollouts[:3])
    assert len(template.chat.fitted) == 2 + 3  # two views, three crops


@pytest.mark.parametrize("busy", [False, True])
def test_crops_are_cut_by_threads_and_never_wait_behind_other_work(busy):
    """Two rollouts wait for each other inside their crops; where the only thread is busy, the caller makes its own."""
    go_on, makers, together = threading.Event(), [], threading.Barrier(2)

    class Watched(FakeChat):
        def fit(self, image):
            makers.append(threading.current_thread().name)
            if not busy:
                together.wait(20)
            return super().fit(image)

    template = make_template()
    images = [make_image(), make_image()]
    rollouts = [template.start(ROW, image, image.resize(VIEW_SIZE), 2) for image in images]
    with ThreadPoolExecutor(1 if busy else 2, thread_name_prefix="worker") as pool:
        pool.submit(go_on.wait, 20 if busy else 0)
        crops = Crops(Watched(), pool.submit)
        run_rounds(rollouts, lambda contexts: [Sampled(CLOSED)] * 2, template, 2, crops)
        go_on.set()
    assert len(makers) == 2 and (set(makers) == {threading.current_thread().name} if busy else len(set(makers)) == 2)
    expected = [crop_original(image, rollouts[0].turns[0].shown_px).resize(VIEW_SIZE) for image in images]
    assert [rollout.crops[0].tobytes() for rollout in rollouts] == [crop.tobytes() for crop in expected]


SECOND_BOX = (7, 14, 56, 49)  # of the fitted crop 84x56, which shows (0, 40, 168, 200) of the original


def test_zoom_from_the_crop_maps_the_second_box_through_the_first():
    (rollout,), _, template = play([CLOSED, [39, END], [ANSWER, END]], template=make_template(zoom_from="crop"))
    # x: 7 * 168 / 84 = 14, 56 * 2 = 112; y: 40 + 14 * 160 / 56 = 80, 40 + 49 * 160 / 56 = 180
    assert rollout.turns[1].box_original_px == (14, 80, 112, 180)
    assert template.chat.fitted[-1].getpixel((0, 0)) == (7, 80, 0)
    assert "this last image" in template.chat.messages[1]["content"][-1]["text"]


def test_zoom_from_the_original_maps_it_from_the_first_view():
    (rollout,), _, template = play([CLOSED, [39, END], [ANSWER, END]], template=make_template(zoom_from="original"))
    assert rollout.turns[1].box_original_px == (28, 56, 224, 196)
    assert template.chat.fitted[-1].getpixel((0, 0)) == (14, 56, 0)
    assert "the first image" in template.chat.messages[1]["content"][-1]["text"]


def test_zoom_from_the_crop_after_an_unusable_box_refers_to_the_whole_image():
    (rollout,), _, _ = play([[31, END], [39, END], [ANSWER, END]], template=make_template(zoom_from="crop"))
    assert rollout.turns[0].box_original_px is None and rollout.turns[1].box_original_px == (28, 56, 224, 196)


def test_four_rounds_zoom_in_again_and_again():
    (rollout,), _, _ = play([CLOSED, [39, END], [39, END], [ANSWER, END]], template=make_template(zoom_from="crop"))
    # the second crop is 98x100 of the original, fitted to 56x84: y = 80 + 14 * 100 / 84 outwards, x = 14 + 7 * 98 / 56
    assert rollout.turns[1].reply_image.size == (56, 84)
    assert rollout.turns[2].box_original_px == (14 + 12, 80 + 16, 14 + 98, 80 + 59)


# records


def test_the_record_of_a_rollout_is_json_with_every_turn():
    rollouts, _, _ = play([CUT, [ANSWER, END]], [[31, END], [ANSWER, END]])
    good, bad = (json.loads(json.dumps(rollout.to_record(), allow_nan=False)) for rollout in rollouts)
    assert (good["id"], good["question"], good["answer"]) == ("row-7", "What?", "A")
    assert good["choices"] == ["red", "blue"] and good["target_boxes"] == [[0, 0, 9, 9]] and good["category"] is None
    assert (good["image"]["size"], good["view_size"], good["num_rounds"]) == ([336, 224], [84, 56], 2)
    assert good["turns"] == [
        {
            "round": 1,
            "text": BOXES[BOX][1] + "it says",
            "num_tokens": 2,
            "truncated": True,
            "box": {
                "status": "ok",
                "box_text": [0, 10, 42, 50],
                "box_view_px": [0, 10, 42, 50],
                "box_original_px": [0, 40, 168, 200],
                "crop_size": [168, 160],
                "shown_px": [0, 40, 168, 200],
            },
        },
        {"round": 2, "text": " \\boxed{A}", "num_tokens": 2, "truncated": False, "box": None},
    ]
    assert bad["turns"][0]["box"]["status"] == "no_json"
    assert bad["turns"][0]["box"]["box_original_px"] is bad["turns"][0]["box"]["crop_size"] is None
