"""What is shipped to start many processes works as shipped: configurations, commands, SLURM, two machines."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.run
import tyro
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from data.synthetic import BallWorld, write_ball_clip

ROOT = Path(__file__).parent.parent
CONFIGURATIONS = [ROOT / "accelerate_config.yaml", *sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))]
SBATCH = ROOT / "configs" / "slurm" / "train.sbatch"
QUIET = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
SMALL = (
    "--fps 8 --encoder.image-size 32 32 --encoder.embedding-dimension 8 --expander.widths 16 16 --batch-size 16 "
    "--tracker none"
)
STAND_INS = {
    # One process for each task, each signalled as SLURM signals the tasks of a step; the highest code comes back.
    "srun": """#!{python}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
open("{folder}/srun.pid", "w").write(str(os.getpid()))
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
""",
    "scontrol": """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {folder}/requeued; fi
""",
    "squeue": """#!/bin/bash
cat {folder}/state
""",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index in range(4):
        write_ball_clip(folder, index, BallWorld(size=32, radius=3, frames=24, fps=8), seed=0)
    return folder


def commands(path):
    """The shell commands that a file shows, in comments, code blocks and table cells."""
    text = re.sub(r"\\\n#?\s*", "", path.read_text()).replace("| `", "\n`")
    return re.findall(r"^[# ]*`?((?:accelerate launch|torchrun|sbatch) [^`\n]*pipelines/[^`\n]*)", text, re.MULTILINE)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_understands_every_key(path):
    load_config_from_file(str(path))  # raises on unknown keys
    # Read by the loader, but overridden by the launcher's own default, so without effect.
    assert not {"same_network", "tpu_use_sudo"} & set(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "path", [*CONFIGURATIONS[1:], SBATCH, ROOT / "docs" / "distributed.md"], ids=lambda path: path.name
)
def test_documented_commands_are_understood(path):
    shown = commands(path)
    assert len(shown) == (6 if path.suffix == ".md" else 1)
    for line in shown:
        if line.startswith("accelerate"):
            arguments = launch_command_parser().parse_args(shlex.split(line)[2:])
            assert (ROOT / arguments.config_file).exists()
            script, options = arguments.training_script, arguments.training_script_args
        elif line.startswith("torchrun"):
            arguments = torch.distributed.run.get_args_parser().parse_args(shlex.split(line)[1:])
            script, options = arguments.training_script, arguments.training_script_args
        else:
            _, batch, script, *options = shlex.split(line)
            assert (ROOT / batch).exists()
        stage = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        assert tyro.cli(stage.Options, args=options).videos == (Path("DIR"),)


@pytest.fixture
def slurm(tmp_path):
    """Run the batch script with stand-ins for SLURM's commands; returns the process."""
    for name, content in STAND_INS.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content.format(python=sys.executable, folder=tmp_path))
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")

    def start(*arguments):
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
        path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.Popen(
            ["bash", SBATCH, *map(str, arguments)], env=os.environ | QUIET | job | {"PATH": path}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


@pytest.mark.slow
def test_a_slurm_job_saves_queues_again_and_finishes(slurm, videos, tmp_path):
    run = tmp_path / "run"
    command = ["pipelines/pretrain_encoder.py", "--videos", videos, "--output-dir", run, *SMALL.split(),
               "--steps", 60, "--checkpoint-every", 10]  # fmt: skip
    job = slurm(*command)
    while not list((run / "training_state").glob("step_*[1-9]*")) and job.poll() is None:
        time.sleep(0.02)
    assert job.poll() is None, job.communicate()[0]
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said  # of scontrol
    assert "add --resume" in said
    assert " on 2 x cpu" in said
    saved = max(path.stem for path in (run / "training_state").glob("step_*[1-9]*"))
    assert 10 <= int(saved.removeprefix("step_")) < 60
    assert not (run / "metrics.json").exists()
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"

    job = slurm(*command)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    assert (run / "metrics.json").exists()
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "state", "requeued"), [(7, "RUNNING", False), (143, "CANCELLED", False), (143, "RUNNING", True)]
)
def test_a_slurm_job_that_fails_or_is_cancelled_stays_ended(code, state, requeued, slurm, tmp_path):
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
    (tmp_path / "state").write_text(state)
    job = slurm("pipelines/pretrain_encoder.py")
    job.communicate(timeout=60)
    assert job.returncode == (0 if requeued else code)
    assert (tmp_path / "requeued").exists() == requeued
