"""What the tests launch on every process: `worker.py MODEL DIRECTORY CASE...` plays cases and writes `rank-N.json`."""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def deepspeed_without_a_compiler():
    """DeepSpeed would compile collectives for CPUs first, for a minute or two; without them it uses gloo."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def fsdp_on_cpu():
    """accelerate keeps FSDP for GPUs; torch shards on CPUs just as well, once the processes pass for GPU processes."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")


def main(model, directory, *cases):
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        deepspeed_without_a_compiler()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpu()
    import torch
    from cases import CASES

    from mgpo_trl.builtin.tiny import register_processor

    torch.set_num_threads(1)
    register_processor()
    results = {case: CASES[case](model, Path(directory) / case) for case in cases}
    Path(directory, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
