"""Summaries of campaigns as files, and as the tables of their page."""

import json
from pathlib import Path
from typing import Any

from pages import fill, table

from campaigns import CAMPAIGNS
from campaigns.trials import Campaign

PAGE = Path(__file__).resolve().parents[2] / "docs" / "campaigns.md"


def write_summary(campaign: Campaign, results: Path) -> dict[str, Any]:
    """Write what came of a campaign so far, and show it; whose machine it was is not told."""
    summary = campaign.summary()
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary, indent=1).replace(str(campaign.place.parent), "logs/campaigns")
    (results / f"{campaign.name}.json").write_text(text + "\n", encoding="utf-8")
    print(summary_table(summary))
    return summary


def summary_table(summary: dict[str, Any]) -> str:
    """Markdown."""
    campaign = CAMPAIGNS[summary["campaign"]](Path())
    return table(*campaign.rows(summary))


def filled(page: str, results: Path) -> str:
    """A page with the tables of all campaigns that have a summary."""
    tables = {name: "Not run yet." for name in CAMPAIGNS}
    for path in sorted(results.glob("*.json")):
        tables[path.stem] = summary_table(json.loads(path.read_text(encoding="utf-8")))
    return fill(page, "campaign", tables)


def fill_page(results: Path) -> None:
    """Write the tables of the documentation anew."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
