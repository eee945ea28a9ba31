"""
A trainer in two processes: `run` starts it from a test, and each process runs `main`.

    torchrun --nproc_per_node 2 tests_vllm/two_processes.py MODEL_DIR OUTPUT_DIR '{"vllm_mode": "server", ...}'
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def run(model_dir, output_dir, options):
    """What the main process reports: number of processes, of two steps losses and differences, a server's error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531"]
    done = subprocess.run(
        [*command, __file__, str(model_dir), str(output_dir), json.dumps(options)], capture_output=True, text=True
    )
    result = Path(output_dir) / "result.json"
    assert result.is_file(), done.stderr[-4000:]
    return json.loads(result.read_text())


def main(model_dir, output_dir, options):
    import pytest
    from conftest import SIZES, build_trainer, leave_out_nccl, photo_row, prepare_engine

    options = {"per_device_train_batch_size": 4, "use_cpu": True, **json.loads(options)}
    with pytest.MonkeyPatch.context() as patch:
        prepare_engine(patch)
        leave_out_nccl(patch)
        photos = [photo_row(number, size) for number, size in enumerate(SIZES)]
        trainer = build_trainer(model_dir, photos, output_dir, **options)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "num_processes": trainer.accelerator.num_processes,
            "losses": [entry["loss"] for entry in log],
            "differences": [entry["sampling/sampling_logp_difference/max"] for entry in log],
            "error": error_of(trainer, photos) if trainer.vllm_mode == "server" else None,
        }
    if trainer.accelerator.is_main_process:
        (Path(output_dir) / "result.json").write_text(json.dumps(result))
    os._exit(0)  # an engine in this process waits for the other's


def error_of(trainer, photos):
    """The second process sends a prompt with a placeholder too many: the message that the asking process raises."""
    from mgpo_trl.rollout import start_rollouts

    mine = photos[2:] if trainer.accelerator.process_index else photos[:2]
    rollouts = start_rollouts(mine, trainer.template, 2)
    prompts = [rollout.prompt_ids for rollout in rollouts]
    if trainer.accelerator.process_index:
        place = prompts[0].index(trainer.chat.image_token_id)
        prompts[0] = [*prompts[0][:place], prompts[0][place], *prompts[0][place:]]
    generation = trainer.vllm_generation
    generation.samples = [rollout.id for rollout in rollouts]
    try:
        if trainer.accelerator.is_main_process:
            generation.generate(prompts, [rollout.images for rollout in rollouts], 1)
        else:  # the main process will not come to the broadcast of its answer
            from accelerate.utils import gather_object

            for things in (generation.samples, prompts, [rollout.images for rollout in rollouts]):
                gather_object(things)
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
