"""
Train a vision-language model to look twice (MGPO).

    accelerate launch train.py                                          the built-in task, on any machine
    accelerate launch train.py --config configs/qwen2_5_vl_3b_lora.yaml  a recipe
    accelerate launch train.py --config ... --dataset_name my.jsonl      your own data
"""

import logging
import os
import sys


def main(arguments: list[str]) -> None:
    """Parse, load the rows, train, save, push."""
    from mgpo_trl import scripts

    if {"-h", "--help"} & set(arguments):
        print(scripts.training_help())
        return
    script_args, args, model_args = scripts.parse_training(arguments)
    if scripts.is_builtin_run(script_args, model_args):
        from mgpo_trl.builtin.run import run_builtin

        run_builtin(script_args, args, model_args)
        return
    train, evaluation = scripts.open_training_sets(script_args, args)
    trainer = scripts.build_trainer(script_args, args, model_args, train, evaluation)
    trainer.train(resume_from_checkpoint=scripts.resume_point(args))
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s")
    main(sys.argv[1:])
