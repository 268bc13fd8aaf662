"""Campaigns: trials without end against what may never happen, each derived from a seed and its number.

    python benchmarks/campaign.py kill               # 300 interrupted commands
    python benchmarks/campaign.py fuzz --trials 23   # a fiftieth of all hostile answers, rows and settings
    python benchmarks/campaign.py kill --only 17     # one trial again
    python benchmarks/campaign.py report             # the tables of docs/campaigns.md

A campaign can be stopped and goes on: every outcome is a line in logs/campaigns/NAME-seed-N/trials.jsonl at once,
beside the folders of those trials in which something was wrong. Its summary is a file in benchmarks/results/campaigns.
See `campaigns/` for what each one tries, and docs/campaigns.md for what came of it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from campaigns import CAMPAIGNS  # noqa: E402
from campaigns.report import fill_page, write_summary  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "campaigns"


def main() -> int:
    """Run a campaign, or report; the status is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*CAMPAIGNS, "report"))
    parser.add_argument("--trials", type=int, help="How many; a whole campaign unless given.")
    parser.add_argument("--only", type=int, nargs="+", help="Numbers of the trials to do, in place of the first ones.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path, default=ROOT / "logs" / "campaigns", help="Folder of the trials.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the summaries.")
    args = parser.parse_args()
    if args.what == "report":
        fill_page(args.results)
        return 0
    campaign = CAMPAIGNS[args.what](args.place / f"{args.what}-seed-{args.seed}", args.seed)
    campaign.run(args.only or range(campaign.size if args.trials is None else args.trials))
    summary = write_summary(campaign, args.results)
    return int(summary["num_faulty_trials"] > 0)


if __name__ == "__main__":
    sys.exit(main())
