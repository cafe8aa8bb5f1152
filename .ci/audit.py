"""
What comes with an installation: its licences, and vulnerabilities that a newer version mends.

Fails on a licence that would bind whoever builds on this package, and on a vulnerability with a fix. Passes, and says so,
where the database of vulnerabilities cannot be asked.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


EXTRAS = ("quantization", "explain")
# Not LGPL, which lets itself be imported
BINDING = re.compile(r"(?<![A-Z])A?GPL|(?<!lesser )general public licen[sc]e|affero", re.IGNORECASE)
SECONDS = 25


class Package(NamedTuple):
    """An installed package, and what its metadata call its licence."""

    name: str
    version: str
    licence: str


def installed_with(name: str, extras: Sequence[str] = ()) -> list[Package]:
    """The packages that `name` needs to run, themselves included, as far as they are installed."""
    found: dict[str, Package] = {}
    waiting = [(name, tuple(extras))]
    while waiting:
        name, extras = waiting.pop()
        try:
            here = distribution(name)
        except PackageNotFoundError:  # of an extra, or of another platform
            continue
        if canonicalize_name(name) in found and not extras:
            continue
        found[canonicalize_name(name)] = Package(here.metadata["Name"], here.version, licence_of(here))
        for requirement in map(Requirement, here.requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((requirement.name, tuple(requirement.extras)))
    return sorted(found.values(), key=lambda package: package.name.lower())


def licence_of(package: Distribution) -> str:
    """The licence that a package names: as an expression, by its classifiers, or in words."""
    metadata = package.metadata
    classifiers = [entry.split(" :: ")[-1] for entry in metadata.get_all("Classifier", []) if "License ::" in entry]
    words = (metadata.get("License") or "").strip().splitlines()
    return metadata.get("License-Expression") or ", ".join(classifiers) or (words[0] if words else "not named")


def binds(licence: str) -> bool:
    """Whether a licence binds who uses the package: all of several to choose from, or one of several that hold at once."""
    # The exception is that of GCC's runtime library, which compiled wheels carry
    parts = [re.split(r"\bAND\b|,", choice) for choice in re.split(r"\bOR\b", licence)]
    return all(any(BINDING.search(part) and "GCC-exception" not in part for part in choice) for choice in parts)


def ask_database(packages: Sequence[Package]) -> list[dict[str, Any]]:
    """
    What pip-audit knows of the packages.

    Raises:
        `ConnectionError`: the database cannot be reached, or knows none of the packages.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "installed.txt"
        # Local versions, such as 2.13.0+cpu, are in no database
        listed.write_text("".join(f"{each.name}=={each.version.partition('+')[0]}\n" for each in packages))
        command = [sys.executable, "-m", "pip_audit", "-r", str(listed), "--no-deps", "--disable-pip", "-f", "json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ConnectionError(f"no answer within {SECONDS} seconds") from None
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except ValueError:
        raise ConnectionError((done.stderr.strip().splitlines() or ["no answer"])[-1]) from None
    asked = [answer for answer in answers if "skip_reason" not in answer]
    if not asked:  # what pip-audit itself takes for a clean bill
        raise ConnectionError(f"it knows none of the {len(answers)} packages")
    for answer in answers:
        if "skip_reason" in answer:
            print(f"Not checked: {answer['name']}: {answer['skip_reason']}")
    return asked


def report_vulnerabilities(answers: Sequence[dict[str, Any]]) -> bool:
    """Print all vulnerabilities; returns whether one of them has a fix."""
    with_fix = False
    for answer in answers:
        for found in answer["vulns"]:
            fixes = ", ".join(found["fix_versions"])
            with_fix |= bool(fixes)
            print(
                f"{answer['name']} {answer['version']}: {found['id']}, {f'fixed in {fixes}' if fixes else 'no fix yet'}"
            )
    return with_fix


def main() -> int:
    packages = installed_with("trl-dmpo", EXTRAS)
    for package in packages:
        print(f"{package.name:24} {package.version:14} {package.licence}")
    binding = [package for package in packages if binds(package.licence)]
    for package in binding:
        print(f"error: {package.name} is under {package.licence}, which would bind users of trl-dmpo")
    try:
        answers = ask_database([package for package in packages if package.name != "trl-dmpo"])
    except ConnectionError as error:
        print(f"Vulnerabilities were NOT checked: the database cannot be asked ({error}).")
        return int(bool(binding))
    with_fix = report_vulnerabilities(answers)
    print(
        f"{len(answers)} packages checked: {'a vulnerability has a fix, update' if with_fix else 'nothing to update'}."
    )
    return int(bool(binding) or with_fix)


if __name__ == "__main__":
    sys.exit(main())
