"""Are the packages that we import ours? Other distributions own packages named `jepa` or `data`, too.

Two distributions with a package of one name share its folder: the one installed later overwrites files of the other,
the one uninstalled takes them away, and pip says nothing of either. So the command looks before it starts.
"""

import base64
import hashlib
import importlib.util
from importlib.metadata import distributions
from pathlib import Path

NAME = "video-jepa"
PACKAGES = ("jepa", "data", "pipelines")
ROOT = Path(__file__).resolve().parents[2]


class ForeignPackageError(Exception):
    """A package of ours that is another's, or has lost files to one; the message names it and the mend."""


def check_packages() -> str | None:
    """Warning about another distribution that owns files of ours; None where we are alone.

    Raises:
        ForeignPackageError: files of ours are not what was installed, or Python finds another package first.
    """
    ours, others = _installed_files()
    shared = [f"{name} ({file})" for name, files in others.items() for file in sorted(files & set(ours))[:1]]
    lost = [name for name, digest in ours.items() if _digest(ROOT / name) != digest]
    if lost:
        raise ForeignPackageError(
            f"{ROOT / lost[0]} is not the file that {NAME} installed (nor are {len(lost) - 1} more): another "
            f"distribution has overwritten it or taken it away{': ' if shared else ''}{', '.join(shared)}; give {NAME} "
            f"an environment of its own, or install it again (pip --force-reinstall --no-deps), which breaks the other"
        )
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        found = spec and (spec.origin or next(iter(spec.submodule_search_locations or []), None))
        if Path(found or "").resolve() != ROOT / package / "__init__.py":
            raise ForeignPackageError(
                f"import {package} finds {found}, not {NAME}'s {ROOT / package}: rename or uninstall the other, take "
                f"it from PYTHONPATH, or give {NAME} an environment of its own"
            )
    return f"{NAME} has overwritten files of {', '.join(shared)}: that may not work any more" if shared else None


def _installed_files() -> tuple[dict[str, str], dict[str, set[str]]]:
    """Files in packages of our names that stand where we are installed: ours with digests, and those of others."""
    ours: dict[str, str] = {}
    others: dict[str, set[str]] = {}
    for distribution in distributions():
        if Path(str(distribution.locate_file(""))).resolve() != ROOT:  # a clone has no files in site-packages
            continue
        rows = [line.split(",") for line in (distribution.read_text("RECORD") or "").splitlines()]
        rows = [row for row in rows if row[0].split("/")[0] in PACKAGES]  # name, sha256=digest, size
        if distribution.name == NAME:
            ours = {row[0]: row[1] for row in rows if row[1]}  # compiled files have none
        elif rows:
            others[f"{distribution.name} {distribution.version}"] = {row[0] for row in rows}
    return ours, others


def _digest(path: Path) -> str:
    """A file's digest as RECORD writes it; of a missing file, that of nothing."""
    digest = hashlib.sha256(path.read_bytes() if path.exists() else b"").digest()
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
