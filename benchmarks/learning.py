"""What GRPO makes of the embedded model, beside supervised fine-tuning and in other forms, at equal cost.

Every training has BUDGET CPU-seconds of training steps on one thread (FEW_BUDGET on few labels), ends with the best of
four validations, and is tested on nothing that it was trained or chosen on. `study/trainings.py` lists them all, in
parts; `study/plan.py` says how their settings are found.

    python benchmarks/learning.py search                     # settings and costs, once
    python benchmarks/learning.py run --jobs 2               # what is not there yet; it can be stopped and goes on
    python benchmarks/learning.py run --parts estimators     # other parts
    python benchmarks/learning.py report                     # tables and plots of what is there

Every run is a file in benchmarks/results/learning; see `study/run.py` for what is measured, `study/worlds.py` for
where, and docs/results.md for what was found.
"""

import argparse
import sys
from pathlib import Path

from study.plan import LABELS, ROOT, SEEDS, Study, plan, search_jobs
from study.trainings import PARTS, TASKS, TRAININGS


def main() -> int:
    """Search, run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "run", "report"))
    parser.add_argument("--parts", nargs="+", default=("main",), choices=PARTS)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, help="All of the parts unless given.")
    parser.add_argument("--labels", nargs="*", type=int, help="Numbers of labelled images, in the main part.")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="Runs side by side, one thread each.")
    parser.add_argument("--results", type=Path, default=Study.results, help="Folder of the results.")
    parser.add_argument("--runs", type=Path, default=Study.runs, help="Folder of the trainings.")
    parser.add_argument("--num_tested", type=int, help="Held-out images of a run.")
    args = parser.parse_args()
    study = Study(results=args.results.resolve(), runs=args.runs.resolve(), num_tested=args.num_tested)
    if args.what == "search":
        costs, trials = search_jobs(args.tasks)
        study.do(costs, 1)
        study.do(trials, args.jobs)
    elif args.what == "run":
        trainings = args.trainings
        if trainings is None:
            trainings = [name for name, training in TRAININGS.items() if training.part in args.parts]
        labels = args.labels if args.labels is not None else LABELS if "main" in args.parts else ()
        jobs = plan(args.tasks, trainings, labels, args.seeds)
        study.do(study.costs(jobs), 1)
        study.do(jobs, args.jobs)
    else:
        from study.report import report

        report(study.results, ROOT / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
