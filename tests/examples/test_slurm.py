"""The Slurm scripts, with programs in the place of Slurm's and of torchrun."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = {
    # starts the command after its flags; as slurmstepd, it knows all processes of the step
    "srun": """
        printf '%s\\n' "$@" > srun.words
        while [[ $1 == --* ]]; do shift; done
        "$@"
    """,
    "torchrun": """
        printf '%s\\n' "$@" > torchrun.words
        python3 worker.py &
        echo $$ > agent.pid
        wait $!
    """,
    "scancel": """
        [[ $* == "--signal=USR1 77" ]] || exit 1
        kill -USR1 $(cat agent.pid) $(cat worker.pid)
    """,
    "scontrol": """
        if [[ $1 == show ]]; then echo node1; echo node2; else echo "$@" >> requeued; fi
    """,
}
# Ends as its environment tells, at once or when it is signaled.
WORKER = """
import os, pathlib, signal, sys, time

def save(*_):
    time.sleep(0.2)
    pathlib.Path("saved").touch()
    sys.exit(int(os.environ["WORKER_STATUS"]))

signal.signal(signal.SIGUSR1, save)
pathlib.Path("worker.pid").write_text(str(os.getpid()))
time.sleep(0 if os.environ["FINISHES"] else 60)
sys.exit(0 if os.environ["FINISHES"] else 9)
"""


def start(tmp_path, script, **environment):
    for name, body in STUBS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "64",
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "examples" / "slurm" / script), "recipe.yaml", "--lr", "1e-4"],
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "WORKER_STATUS": "0", "FINISHES": "", **slurm}
        | environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def signaled(tmp_path, process):
    for _ in range(1200):
        if (tmp_path / "worker.pid").exists() and (tmp_path / "agent.pid").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    return process.communicate(timeout=120)[0]


def test_the_workers_save_and_the_job_is_queued_again(tmp_path):
    process = start(tmp_path, "prune.sbatch")
    said = signaled(tmp_path, process)
    assert process.returncode == 0 and "queueing job 77 again" in said
    assert (tmp_path / "saved").exists(), "the agent ended before its worker had saved"
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    words = (tmp_path / "torchrun.words").read_text().split()
    assert words[-5:] == ["tools/prune.py", "--config", "recipe.yaml", "--lr", "1e-4"]
    assert words[words.index("--rdzv-endpoint") + 1] == "node1:20077" and words[words.index("--nnodes") + 1] == "2"
    assert "container" not in (tmp_path / "srun.words").read_text()


def test_a_job_that_saved_nothing_new_is_not_queued_again(tmp_path):
    process = start(tmp_path, "prune.sbatch", WORKER_STATUS="1")
    said = signaled(tmp_path, process)
    assert process.returncode == 1 and "not queueing job 77 again" in said
    assert not (tmp_path / "requeued").exists()


def test_a_finished_job_is_not_queued_again(tmp_path):
    process = start(tmp_path, "prune.sbatch", FINISHES="1")
    process.communicate(timeout=120)
    assert process.returncode == 0 and not (tmp_path / "requeued").exists()


def test_in_a_container(tmp_path):
    image = tmp_path / "megaprune.sqsh"
    image.touch()
    process = start(tmp_path, "prune-container.sbatch", IMAGE=str(image), MOUNTS="/data:/data", FINISHES="1")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    words = (tmp_path / "srun.words").read_text().splitlines()
    assert f"--container-image={image}" in words and f"--container-mounts={tmp_path}:{tmp_path},/data:/data" in words


@pytest.mark.parametrize("image", ["", "/nowhere.sqsh"])
def test_a_container_without_its_image_is_refused(tmp_path, image):
    process = start(tmp_path, "prune-container.sbatch", IMAGE=image)
    assert "is neither an image file nor" in process.communicate(timeout=60)[0] and process.returncode == 2


def test_both_scripts_ask_slurm_for_the_same():
    asked = [
        [line for line in (ROOT / "examples" / "slurm" / name).read_text().splitlines() if line.startswith("#SBATCH")]
        for name in ("prune.sbatch", "prune-container.sbatch")
    ]
    assert asked[0] == asked[1] and "#SBATCH --signal=B:USR1@600" in asked[0]
