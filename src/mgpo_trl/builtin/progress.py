"""The progress bar of the built-in run: one short line of what is being learnt, where Trainer prints every metric."""

from transformers import ProgressCallback

SHOWN = {
    "reward": "reward",
    "hit rate": "grounding/hit_rate",
    "valid boxes": "grounding/valid_ratio",
    "entropy": "entropy",
}
"""Label and metric of the figures on the line; metrics that a run does not have are left out."""


class ShortProgress(ProgressCallback):
    """`ProgressCallback` with a short line; the only change is what a logging step prints."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the line above the bar, which goes on showing steps and the time left."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            if line := progress_line(state.global_step, state.max_steps, logs):
                self.training_bar.write(line)


def progress_line(step: int, max_steps: int, logs: dict) -> str:
    """
    For example `step  20/80  reward 0.53  hit rate 0.36  valid boxes 0.97  entropy 0.16`.

    Args:
        step (`int`), max_steps (`int`): Where training is.
        logs (`dict`): Metrics of the logging step.

    Returns:
        `str`: The line; empty where the logs hold no reward, as in the summary at the end.
    """
    if "reward" not in logs or "train_runtime" in logs:
        return ""
    figures = [f"{label} {logs[name]:.2f}" for label, name in SHOWN.items() if logs.get(name) is not None]
    return "  ".join([f"step {step:>{len(str(max_steps))}}/{max_steps}", *figures])
