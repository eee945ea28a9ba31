"""
Train a vision-language model to look twice (MGPO).

    accelerate launch train.py                                          the built-in task, on any machine
    accelerate launch train.py --config configs/qwen2_5_vl_3b_lora.yaml  a recipe
    accelerate launch train.py --config ... --dataset_name my.jsonl      your own data
    accelerate launch train.py --config ... --preflight                 will it run? two minutes instead of a night
"""

import logging
import os
import sys


def main(arguments: list[str]) -> None:
    """Parse, load the rows, train, save, push."""
    from mgpo_trl import scripts
    from mgpo_trl.hub import prepare_push, quiet_requests

    if {"-h", "--help"} & set(arguments):
        print(scripts.training_help())
        return
    quiet_requests()
    script_args, args, model_args = scripts.parse_training(arguments)
    if script_args.preflight:
        from mgpo_trl.preflight import run_preflight

        report = run_preflight(script_args, args, model_args)
        if args.process_index == 0:
            print(report.text())
        sys.exit(1 if report.problems else 0)
    if scripts.is_builtin_run(script_args, model_args):
        from mgpo_trl.builtin.run import run_builtin

        run_builtin(script_args, args, model_args)
        return
    prepare_push(args)
    train, evaluation = scripts.open_training_sets(script_args, args)
    trainer = scripts.build_trainer(script_args, args, model_args, train, evaluation)
    trainer.train(resume_from_checkpoint=scripts.resume_point(args))
    scripts.save_and_publish(trainer, script_args.dataset_name)


if __name__ == "__main__":
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s")
    main(sys.argv[1:])
