"""SECURITY.md names a test for each claim; the lock file has what pyproject.toml asks for; what an audit says."""

import json
import re
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def load_audit():
    spec = spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked() -> dict[str, list[tuple[str, Requirement, int]]]:
    """Of each package its versions with their requirement and number of hashes: one for each kind of Python."""
    found: dict[str, list[tuple[str, Requirement, int]]] = {}
    for block in re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text(encoding="utf-8")):
        line = block.splitlines()[0]
        if "==" in line:
            requirement = Requirement(line.rstrip("\\ "))
            (specifier,) = requirement.specifier
            hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}", block)
            found.setdefault(canonicalize_name(requirement.name), []).append(
                (specifier.version, requirement, len(hashes))
            )
    return found


def wanted() -> list[Requirement]:
    """What the package and its extra `dev` ask for, other extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pending, found = [*project["dependencies"], *extras["dev"]], []
    while pending:
        requirement = Requirement(pending.pop())
        if requirement.name == project["name"]:
            pending += [each for extra in requirement.extras for each in extras[extra]]
        else:
            found.append(requirement)
    return found


def test_every_claim_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    found = TEST.findall(text)
    assert len(found) > 25
    missing = [f"{file}::{name}" for file, name in found if f"def {name}(" not in (ROOT / file).read_text()]
    assert missing == []
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row for row in rows if not TEST.search(row) and not row.startswith("| claim")] == []


def test_the_lock_file_has_what_the_package_asks_for():
    packages = locked()
    assert len(packages) > 100
    for requirement in wanted():
        if requirement.name != "torch":
            for version, _, _ in packages[canonicalize_name(requirement.name)]:
                assert requirement.specifier.contains(version), (str(requirement), version)
    assert not [name for name in packages if name == "torch" or name.startswith(("nvidia", "triton"))]


def test_every_package_of_the_lock_file_has_digests():
    assert [name for name, each in locked().items() if not all(count for _, _, count in each)] == []


def test_there_is_one_version_of_each_package_for_this_python():
    for name, each in locked().items():
        fitting = [version for version, one, _ in each if one.marker is None or one.marker.evaluate()]
        assert len(fitting) <= 1, name


def test_torch_that_is_installed_first_is_one_that_the_package_takes():
    (version,) = re.findall(r"^TORCH \?= torch==([\d.]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (torch,) = [requirement for requirement in wanted() if requirement.name == "torch"]
    assert torch.specifier.contains(version)


KNOWN = {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
GOOD = {"name": "b", "version": "1", "vulns": []}
SKIPPED = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "lines"),
    [
        ([GOOD], 0, ["1 of 1 packages were audited, 0 vulnerabilities are known."]),
        ([GOOD, KNOWN], 1, ["a 1: PYSEC-1, fixed in 2", "2 of 2 packages were audited, 1 vulnerabilities are known."]),
        ([GOOD, SKIPPED], 0, ["Not audited: c.", "1 of 2 packages were audited, 0 vulnerabilities are known."]),
        ([SKIPPED], 0, ["The advisory database cannot be reached: nothing was audited."]),
    ],
)
def test_an_audit_says_what_it_has_found(packages, status, lines):
    assert load_audit().report(json.dumps({"dependencies": packages}), "") == (status, lines)


def test_an_audit_tells_no_connection_from_a_failure():
    report = load_audit().report
    assert report("", "...\nrequests.exceptions.ConnectionError: no route")[0] == 0
    assert report("", "usage: pip-audit") == (2, ["The audit has failed: usage: pip-audit"])


def test_an_audit_asks_for_all_packages_only_where_it_is_answered(monkeypatch, capsys):
    audit, asked = load_audit(), []
    answers = {"first.txt": (0, ["1 of 1 packages"]), "requirements.lock": (1, ["152 of 152 packages"])}
    monkeypatch.setattr(audit, "audit", lambda path: asked.append(path.name) or answers[path.name])
    assert audit.main() == 1
    answers["first.txt"] = (0, ["The advisory database cannot be reached: nothing was audited."])
    assert audit.main() == 0
    assert asked == ["first.txt", "requirements.lock", "first.txt"]
    assert capsys.readouterr().out.splitlines()[-1] == answers["first.txt"][1][0]
