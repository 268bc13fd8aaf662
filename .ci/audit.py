"""Known vulnerabilities of the packages in requirements.lock, by pip-audit; the exit status is 1 where there are any.

Where the advisory database cannot be reached it says so, and the exit status is 0.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LOCK = Path(__file__).parents[1] / "requirements.lock"
COMMAND = ("pip_audit", "--format=json", "--progress-spinner=off", "--no-deps", "--disable-pip", "--requirement")


def main() -> int:
    """Audit; the result is the exit status."""
    pinned = next(line for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    with TemporaryDirectory() as folder:
        first = Path(folder) / "first.txt"
        first.write_text(pinned.split()[0] + "\n", encoding="utf-8")
        status, lines = audit(first)  # without the database all others would be asked for in vain
    if lines[-1].startswith("1 of 1"):
        status, lines = audit(LOCK)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return status


def audit(requirements: Path) -> tuple[int, list[str]]:
    """Ask for the packages of a file."""
    command = [sys.executable, "-m", *COMMAND, str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return report(done.stdout, done.stderr)


def report(output: str, errors: str) -> tuple[int, list[str]]:
    """Exit status and sentences from what pip-audit has written."""
    try:
        packages: Sequence[Mapping[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        reason = (errors.strip().splitlines() or ["no reason given"])[-1]
        if "ConnectionError" in errors or "ConnectionFailure" in errors:
            return 0, [f"The advisory database cannot be reached: {reason}"]
        return 2, [f"The audit has failed: {reason}"]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return 0, ["The advisory database cannot be reached: nothing was audited."]
    found = [
        f"{package['name']} {package['version']}: {known['id']}, fixed in {', '.join(known['fix_versions']) or 'none'}"
        for package in audited
        for known in package["vulns"]
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    told = f"{len(audited)} of {len(packages)} packages were audited, {len(found)} vulnerabilities are known."
    return int(bool(found)), [*found, *([f"Not audited: {', '.join(skipped)}."] if skipped else []), told]


if __name__ == "__main__":
    sys.exit(main())
