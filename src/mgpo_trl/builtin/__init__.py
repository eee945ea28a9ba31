"""The built-in task: a small Qwen2.5-VL learns on a CPU where to look. Scenes, model, warm start, recipe."""
