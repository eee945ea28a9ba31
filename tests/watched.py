"""What a watched training leaves, made by hand: groups of rollouts with rewards and small pictures."""

import base64
import io

from PIL import Image
from test_metrics import make_box, make_record

from mgpo_trl.watching.files import RolloutLog, rollout_id


def watched_record(step, group=0, sample=0, *, reward=1.0, shown=2, of=2, **changes):
    """A rollout of row `q<group>`: right (B) where it got a reward, with a usable box in every second one."""
    text = r"\boxed{B}" if reward else r"\boxed{A}"
    box = make_box("ok" if sample % 2 == 0 else "no_json")
    training = {
        "step": step, "row": f"q{group}", "group": group, "sample": sample, "groups_shown": shown,
        "groups_of_step": of, "rewards": {"accuracy_reward": reward}, "reward": reward,
        "advantage": None if reward is None else reward - 0.5,
    }  # fmt: skip
    return make_record(
        rollout_id(step, group, sample), text, [box], training=training, question=f"Question {group}?", **changes
    )


def picture_for(record, colour="red"):
    """A small picture of one colour, and a blue crop where there was one."""
    crop = encoded("blue") if record["turns"][0]["box"]["status"] == "ok" else None
    return {"id": record["id"], "overview": encoded(colour), "crops": [crop]}


def encoded(colour, size=(40, 80)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", quality=95)
    return base64.b64encode(buffer.getvalue()).decode()


def write_watched(directory, steps, groups=2, size=3, max_pictures=600, **changes):
    """Files of a training: in every group the first rollout is right."""
    log = RolloutLog(directory, max_pictures)
    for step in steps:
        records = [
            watched_record(step, group, sample, reward=float(sample == 0), of=4, **changes)
            for group in range(groups)
            for sample in range(size)
        ]
        log.add(step, records, [picture_for(record) for record in records])
    return log
