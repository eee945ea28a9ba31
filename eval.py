"""
Evaluate a model on any dataset with the rollout loop that training uses.

    python eval.py --model outputs/builtin --dataset builtin:refer --split heldout
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --adapter outputs/run --dataset my.jsonl --num_rounds 2
    python eval.py --model ... --dataset vstar --protocol mgpo no-crop random-crop     what was the crop worth?
    python eval.py --rescore outputs/eval                      score saved rollouts again, without a model
    python eval.py --compare outputs/a outputs/b               two results, question by question
"""

import logging
import sys


def main(arguments: list[str]) -> None:
    """Parse, load the rows, play and record the rollouts, report."""
    from trl import TrlParser

    from mgpo_trl import scripts
    from mgpo_trl.evaluation.arguments import EvalArguments
    from mgpo_trl.evaluation.compare import compare_runs, format_comparison, write_comparison
    from mgpo_trl.evaluation.joint import format_joint
    from mgpo_trl.evaluation.report import format_report, rescore

    scripts.check_config_file(arguments)
    (args,) = TrlParser((EvalArguments,), prog="eval.py").parse_args_and_config(arguments)
    if args.rescore is not None:
        print(format_report(rescore(args.rescore, args.official)))
        return
    if args.compare is not None:
        comparison = compare_runs(*args.compare)
        write_comparison(args.output_dir, comparison)
        print(format_comparison(comparison))
        return
    from mgpo_trl.builtin.tiny import register_processor
    from mgpo_trl.evaluation.runner import run_evaluation

    register_processor()
    rows = scripts.open_rows(
        args.dataset,
        split=args.split,
        columns=args.columns,
        skip_bad_rows=args.skip_bad_rows,
        limit=args.limit,
        seed=args.seed,
    )
    report = run_evaluation(args, rows)
    print(format_joint(report) if "protocols" in report else format_report(report))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(sys.argv[1:])
