"""What a bare GPU machine without a network needs beside the project: wheels, and parts of the material."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, shared
from pipelines.run.command import require

WHEELS = ("av", "tyro", "docstring-parser", "typeguard")
"""Packages that the machine lacks; it has all the others."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MOST_BYTES = 64 * 2**20
"""Of the tree and all that is carried."""
IMAGES = {"train": 15_000, "test": 2000}
DIGITS = {"train": 25_000, "test": 5000}
COMMAND = """set -o pipefail
install="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site"
$install {folder}/wheels/*.whl || exit
export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1
nvidia-smi; nproc
python3 -m benchmarks.gpu --budget-minutes 8 --output-dir $OUT 2>&1 | tee $OUT/log"""


def pack(folder: Path) -> None:
    """Write wheels and material into a folder, and print their sizes and the command to run.

    Raises:
        UserError: together with the project's tree they are too large.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    named = [f"{name}=={version(name)}" for name in WHEELS]
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                    "--python-version", "3.12", "--implementation", "cp", *platforms, "-d", folder / "wheels", *named],
                   check=True)  # fmt: skip
    pack_material(folder)
    tree = sum((ROOT / name).stat().st_size for name in tracked())
    total = tree
    print(f"{tree / 2**20:6.2f} MiB the project's tree")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total += path.stat().st_size
        print(f"{path.stat().st_size / 2**20:6.2f} MiB {path}")
    print(f"{total / 2**20:6.2f} MiB in all, of {MOST_BYTES / 2**20:.0f}")
    require(total < MOST_BYTES, f"{total:,} bytes are more than {MOST_BYTES:,}: carry less")
    command = COMMAND.format(folder=folder)
    print(f"\nCarry {folder}; timeout_s 590; this command ({len(command)} characters):\n\n{command}")


def pack_material(folder: Path, images: dict[str, int] = IMAGES, digits: dict[str, int] = DIGITS) -> None:
    """A driving clip, and as many images and digits of each split as are named, as `$JEPA_SHARED` has them."""
    (folder / "driving").mkdir(parents=True)
    (folder / "images").mkdir()
    shutil.copyfile(shared("driving/b_01.mp4"), folder / "driving" / "b_01.mp4")
    with (
        zipfile.ZipFile(shared("images/cifar10.zip")) as whole,
        zipfile.ZipFile(folder / "images" / "cifar10.zip", "w") as part,
    ):
        for split, count in images.items():
            names = sorted(name for name in whole.namelist() if name.startswith(f"{split}/") and name.endswith(".jpg"))
            for name in (names[at] for at in np.linspace(0, len(names) - 1, count).astype(int)):
                part.writestr(name, whole.read(name))
    with np.load(shared("images/mnist.npz")) as whole:
        some = {f"{split}_images": whole[f"{split}_images"][:count] for split, count in digits.items()}
        np.savez_compressed(folder / "images" / "mnist.npz", **some)


def tracked() -> list[str]:
    """Files of the project that travel."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines()
