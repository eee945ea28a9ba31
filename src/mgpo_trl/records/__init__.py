"""What a run leaves on disk: `run.json` (where the numbers come from) and `rollouts.jsonl` (one rollout a line).

`run.json` is written before the work starts. A rollout counts as recorded once `RolloutWriter.write` returns; a
process killed at any moment leaves at most one half-written last line, which the next writer cuts off and every reader
skips.

A rollout record:

```python
{"id": "q7", "question": "What is on the red card?", "choices": ["a dog", "a cat"], "answer": "B", "category": "cards",
 "image": {"name": "7.jpg", "size": [4000, 3000]}, "view_size": [1120, 840], "num_rounds": 2,
 "target_boxes": [[900, 600, 1500, 1100]],
 "turns": [{"round": 1, "text": "...", "num_tokens": 31, "truncated": False,
            "box": {"status": "ok", "box_text": [250, 160, 430, 320], "box_view_px": [250, 160, 430, 320],
                    "box_original_px": [892, 571, 1536, 1143], "crop_size": [644, 572]}},
           {"round": 2, "text": "It is a cat. \\boxed{B}", "num_tokens": 12, "truncated": False, "box": None}]}
```
"""

from .rollouts import ROLLOUTS_FILE, RolloutWriter, question_id, read_rollouts, sample_id, seen_ids
from .run import RUN_FILE, check_resumable, git_state, library_versions, read_run, run_record, write_run
from .strict_json import RecordError, to_json, write_atomically, write_json

__all__ = [
    "ROLLOUTS_FILE", "RUN_FILE", "RecordError", "RolloutWriter", "check_resumable", "git_state", "library_versions",
    "question_id", "read_rollouts", "read_run", "run_record", "sample_id", "seen_ids", "to_json", "write_atomically",
    "write_json", "write_run",
]  # fmt: skip
