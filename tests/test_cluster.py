"""Several processes of one run, as real ones: joined where they fit together, else ended, each with the reason."""

import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
from ml_collections import ConfigDict

from nuner_jax.distributed import cluster
from nuner_jax.errors import NunerError
from tests.free_port import free_port

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What the training command does with its processes, without the training. Its arguments: what data it has, and
# whether it fails before it compares them.
PROGRAM = """
from ml_collections import ConfigDict
from nuner_jax.distributed import cluster
from nuner_jax.errors import NunerError, run_command

def main(argv):
    cluster.join(ConfigDict({"lr": 0.1}))
    print(cluster.describe(), flush=True)
    with cluster.ending_together():
        if "fail" in argv:
            raise NunerError("the disk is full")
        cluster.same_data(argv[1])
        print("the same data", flush=True)

cluster.define_flags()
run_command(main)
"""


def start(command, flags, *, devices=2, root=ROOT, env=None) -> subprocess.Popen:
    """A process of the run."""
    return subprocess.Popen(
        [sys.executable, *command, *flags],
        cwd=root,  # of which python -c and -m take the package
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **(env or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def cluster_flags(processes, *, timeout=60):
    """The flags of each process."""
    port = free_port()
    shared = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--join_timeout={timeout}"]
    return [[*shared, f"--process_id={number}"] for number in range(processes)]


def ended(*processes) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def program(*arguments):
    return ["-c", PROGRAM, *arguments]


def errors(results) -> list[str]:
    """The one error that each process ended with."""
    found = [[line for line in output.splitlines() if line.startswith("error: ")] for _, output in results]
    assert [code for code, _ in results] == [2] * len(results), results
    assert all(len(lines) == 1 for lines in found), results
    assert not any("Traceback" in output for _, output in results), results
    return [lines[0] for lines in found]


@pytest.mark.multiprocess
def test_processes_that_fit_together_are_joined_and_told_apart():
    results = ended(*(start(program("data"), flags) for flags in cluster_flags(3)))
    for code, output in results:
        assert code == 0, output
        assert "6 x cpu in 3 processes, 2 each" in output and "the same data" in output


@pytest.mark.multiprocess
def test_a_missing_process_is_named_within_the_time_that_was_given():
    flags = cluster_flags(3, timeout=5)
    first, last = errors(ended(start(program("data"), flags[0]), start(program("data"), flags[2])))
    assert first == last
    assert "process 1 of 3 did not join at 127.0.0.1:" in first and "within 5 s (--join_timeout)" in first


@pytest.mark.multiprocess
def test_two_configs_are_told_by_key_before_any_training(tmp_path):
    command = ["-m", "nuner_jax.train", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    flags = cluster_flags(2)
    both = ended(start(command, flags[0]), start(command, [*flags[1], "--config.lr=0.5", "--config.optim.b2=0.9"]))
    first, second = errors(both)
    assert first == second
    assert "config.lr: 0.002 (process 0), 0.5 (process 1)" in first
    assert "config.optim.b2:" in first and first.count("(process 1)") == 2, "and nothing else"
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
def test_another_version_of_the_code_is_told_by_file(tmp_path):
    shutil.copytree(ROOT / "nuner_jax", tmp_path / "nuner_jax")
    with open(tmp_path / "nuner_jax" / "losses.py", "a") as file:
        file.write("\n# changed\n")
    (tmp_path / "nuner_jax" / "more.py").touch()
    one, two = cluster_flags(2)
    first, second = errors(ended(start(program("data"), one), start(program("data"), two, root=tmp_path)))
    assert first == second
    assert "nuner_jax/losses.py: sha256 " in first and "nuner_jax/more.py: missing (process 0)" in first
    assert "config." not in first and "version of" not in first


@pytest.mark.multiprocess
def test_other_devices_are_told():
    one, two = cluster_flags(2)
    for told in errors(ended(start(program("data"), one), start(program("data"), two, devices=1))):
        assert "different devices: 2 x cpu (process 0), 1 x cpu (process 1)" in told


@pytest.mark.multiprocess
def test_other_data_is_told():
    one, two = cluster_flags(2)
    for told in errors(ended(start(program("data"), one), start(program("other"), two))):
        assert "the training data of process 1 is not that of process 0" in told


@pytest.mark.slow
@pytest.mark.multiprocess
def test_where_one_process_fails_the_other_ends_too():
    one, two = cluster_flags(2)
    (code, output), failed = ended(start(program("data"), one), start(program("fail"), two))
    assert errors([failed]) == ["error: the disk is full"]
    assert code not in (0, None) and "the same data" not in output, output


@pytest.mark.multiprocess
def test_what_slurm_says_of_a_step_is_enough():
    port = free_port()

    def slurm(number):
        return {
            "JAX_COORDINATOR_PORT": str(port),
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(number),
            "SLURM_LOCALID": "0",
        }

    results = ended(*(start(program("data"), ["--distributed"], env=slurm(number)) for number in range(2)))
    for code, output in results:
        assert code == 0, output
        assert "4 x cpu in 2 processes, 2 each" in output


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ({"num_processes": 2}, "--coordinator, --num_processes and --process_id go together"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "--coordinator=host: host:port is needed"),
        (
            {"coordinator": "host:1", "num_processes": 2, "process_id": 2},
            "--process_id=2: from 0 to 1, as --num_processes=2 says",
        ),
        ({"distributed": True}, "--distributed: JAX knows of no TPU pod, SLURM step or MPI run here"),
    ],
)
def test_flags_that_name_no_cluster_are_refused(monkeypatch, flags, hint):
    nothing = dict.fromkeys(("coordinator", "num_processes", "process_id"), None)
    given = types.SimpleNamespace(**{**nothing, "distributed": False, "join_timeout": 1.0, **flags})
    monkeypatch.setattr(cluster.flags, "FLAGS", given)
    with pytest.raises(NunerError) as error:
        cluster.join(ConfigDict())
    assert hint in str(error.value)
