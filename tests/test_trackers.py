"""Groups in the trackers themselves, offline: TensorBoard, Trackio and, where it is installed, Weights & Biases."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import trackio
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from watched import picture_for, watched_record

from mgpo_trl.viewer import CELL, GAP, RIGHT, ROW, TARGET, WRONG
from mgpo_trl.watching.trackers import Group, draw_group, send_groups, trackers_of


def make_group(step=10, group=0, size=3, **changes):
    """The first rollout is right, every second one has a usable box."""
    records = [watched_record(step, group, n, reward=float(n == 0), **changes) for n in range(size)]
    return Group(records, [picture_for(record) for record in records])


@pytest.fixture
def tensorboard_callback(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    callback = TensorBoardCallback(SummaryWriter(log_dir=str(tmp_path / "board")))
    yield callback
    callback.tb_writer.close()


def is_nearly(picture, drawn):
    """Whether a JPEG shows what was drawn."""
    return picture.size == drawn.size and abs(np.asarray(picture).astype(int) - np.asarray(drawn)).mean() < 3


def events(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_gets_a_picture_and_the_texts_of_each_group(tmp_path, tensorboard_callback):
    groups = [make_group(10, 0), make_group(10, 1)]
    groups[1].records[0]["turns"][1]["text"] = "# not a heading\n<b>not bold</b>"
    send_groups([tensorboard_callback], 10, groups, with_table=True)
    tensorboard_callback.tb_writer.flush()
    found = events(tmp_path / "board")
    assert sorted(found.Tags()["images"]) == ["rollouts/group_0", "rollouts/group_1"]
    [event] = found.Images("rollouts/group_0")
    with Image.open(io.BytesIO(event.encoded_image_string)) as shown:
        assert is_nearly(shown, draw_group(groups[0]))
        assert (event.step, (event.width, event.height)) == (10, shown.size)
    [text] = found.Tensors("rollouts/group_1/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert text.step == 10 and "reward 1.00, advantage +0.50" in written
    assert "\n    # not a heading\n    <b>not bold</b>" in written  # indented: shown as it is


def test_without_tensorboard_itself_its_stand_in_gets_the_picture(monkeypatch):
    """transformers falls back to tensorboardX, whose writer has `add_image` and no such messages."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.summary_pb2", None)
    calls = []

    class Writer:
        def add_image(self, tag, pixels, step, dataformats):
            calls.append((tag, pixels.shape, step, dataformats))

        def add_text(self, tag, text, step):
            calls.append((tag, step))

    group = make_group(10)
    width, height = draw_group(group).size
    send_groups([TensorBoardCallback(Writer())], 10, [group], with_table=True)
    assert calls == [("rollouts/group_0", (height, width, 3), 10, "HWC"), ("rollouts/group_0", 10)]


@pytest.mark.parametrize("with_table", [True, False])
def test_trackio_gets_pictures_and_a_table(with_table, request):
    from trackio.sqlite_storage import SQLiteStorage

    callback = TrackioCallback()
    project = f"watching-{request.node.name.replace('[', '-').strip(']')}"
    trackio.init(project=project, name="run", auto_log_cpu=False, auto_log_gpu=False)
    send_groups([callback], 10, [make_group(10, 0), make_group(10, 1)], with_table)
    trackio.finish()
    [entry] = [log for log in SQLiteStorage.get_logs(project, "run") if "rollouts/group_0" in log]
    assert entry["train/global_step"] == 10
    media = Path(trackio.utils.MEDIA_DIR) / entry["rollouts/group_1"]["file_path"]
    with Image.open(media) as shown:
        assert is_nearly(shown, draw_group(make_group(10, 1)))
    assert entry["rollouts/group_1"]["caption"] == "step 10, row q1"
    assert ("rollouts/table" in entry) is with_table  # TRL sends one with `log_completions`
    if with_table:
        rows = entry["rollouts/table"]["_value"]
        assert len(rows) == 6 and rows[1]["row"] == "q0" and rows[1]["reward"] == 0.0
        assert (rows[0]["round 2"], rows[0]["box 1"], rows[1]["box 1"]) == (r"\boxed{B}", "ok", "no_json")


def test_weights_and_biases_gets_pictures_and_a_table(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed.")
    monkeypatch.setenv("WANDB_SILENT", "true")
    callback = WandbCallback()
    send_groups([callback], 0, [make_group(0)], with_table=True)  # no run: nothing to send to
    run = wandb.init(project="watching", dir=str(tmp_path), mode="offline")
    send_groups([callback], 10, [make_group(10, 0), make_group(10, 1)], with_table=True)
    summary = dict(run.summary)
    wandb.finish()
    assert summary["train/global_step"] == 10 and summary["rollouts/group_1"]["caption"] == "step 10, row q1"
    media = Path(run.dir) / "media"
    pictures = sorted((media / "images" / "rollouts").iterdir())
    assert [path.suffix for path in pictures] == [".jpg", ".jpg"]
    with Image.open(pictures[0]) as shown:
        assert any(is_nearly(shown, draw_group(make_group(10, group))) for group in (0, 1))
    [table] = (media / "table" / "rollouts").iterdir()
    content = json.loads(table.read_text())
    assert content["columns"][:5] == ["step", "row", "sample", "reward", "advantage"]
    assert len(content["data"]) == 6 and content["data"][1][:4] == [10, "q0", 1, 0.0]


def test_other_callbacks_are_left_alone(tensorboard_callback):
    other = object()
    assert trackers_of([other, tensorboard_callback]) == [tensorboard_callback]


def test_a_group_is_drawn_with_box_target_crop_and_verdict():
    group = make_group(size=ROW + 1)
    picture = draw_group(group)
    pixels = np.asarray(picture).astype(int)
    assert picture.width == GAP + ROW * (CELL + GAP)

    def has(column, colour, rows=slice(None)):
        left = GAP + column * (CELL + GAP)
        return bool((abs(pixels[rows, left : left + CELL] - np.array(colour)) <= 12).all(axis=2).any())

    first = slice(0, picture.height // 2)
    assert has(0, RIGHT, first) and not has(0, WRONG, first) and has(0, TARGET, first)
    assert has(1, WRONG, first) and not has(1, RIGHT, first)
    assert has(0, (0, 0, 254), first) and not has(1, (0, 0, 254), first)  # the blue crop, and none
    assert has(0, (0, 0, 254), slice(picture.height // 2, None))  # the ninth stands in a second row
    unknown = np.asarray(draw_group(make_group(size=1, answer=None))).astype(int)
    assert not (abs(unknown - np.array(RIGHT)) <= 2).all(axis=2).any()
    assert not (abs(unknown - np.array(WRONG)) <= 2).all(axis=2).any()


def test_a_training_reports_where_it_is_told_to(make_trainer, tmp_path, monkeypatch):
    """TensorBoard and Trackio at once, through the trainer; `log_completions` keeps its own table."""
    from trackio.sqlite_storage import SQLiteStorage

    options = {"report_to": ["tensorboard", "trackio"], "project": "training", "run_name": "watched"}
    make_trainer(max_steps=3, log_rollouts_steps=2, log_rollouts_groups=1, log_completions=True, **options).train()
    [board] = (tmp_path / "run" / "runs").iterdir()
    assert [event.step for event in events(board).Images("rollouts/group_0")] == [0, 2]
    assert "rollouts/group_1" not in events(board).Tags()["images"]
    logs = SQLiteStorage.get_logs("training", "watched")
    assert [log["train/global_step"] for log in logs if "rollouts/group_0" in log] == [0, 2]
    assert not [log for log in logs if "rollouts/table" in log] and [log for log in logs if "completions" in log]
