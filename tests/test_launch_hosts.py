"""GPU machines and Slurm, with stand-ins that start two processes of this machine in place of two hosts."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from stand_ins import ROOT, StandIns, small_project

from nuner_jax.writers import read_metrics

STOPPED = 75  # as in launch/remote.sh

# What sshd gives a command is a fresh environment, whatever the caller's is.
SSH = """
while [[ "$1" == -* ]]; do shift 2; done
env -i PATH="$PATH" HOME="$HOME" JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 \
  JAX_COMPILATION_CACHE_DIR="$JAX_COMPILATION_CACHE_DIR" bash -c "${*:2}"
"""

# One process a node, on two nodes, and then the worst of their statuses.
SRUN = """
while [[ "$1" == -* ]]; do shift; done
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=2
  "$@" &
  echo $! >>PIDS
done
worst=0
for job in $(jobs -p); do
  wait "$job" || { status=$?; ((status <= worst)) || worst=$status; }
done
exit "$worst"
"""


@pytest.fixture
def stand_ins(tmp_path):
    programs = StandIns(tmp_path / "programs")
    programs.add("nvidia-smi")
    programs.add("ssh", SSH)
    programs.add("srun", SRUN.replace("PIDS", str(tmp_path / "pids")))
    programs.add("scontrol")
    yield programs
    programs.stop()


@pytest.fixture
def training(rows_file, tmp_path):
    """The command of a run of seconds, in a workdir."""
    cache = f"--config.data.cache_dir={rows_file.parent}/cache"
    return ["train", f"--config=tests/configs/tiny.py:{rows_file}", f"--workdir={tmp_path}/run", cache]


def free_port(first: int = 20000) -> int:
    """The first port from `first` on that nobody listens at."""
    for port in range(first, 65536):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port
    raise AssertionError(f"no free port from {first} on")


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.time() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.05)


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps whose loss is on disk."""
    lines = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
    return [line["step"] for line in lines if "train/loss" in line]


# --- XLA's flags -------------------------------------------------------------------------------


def xla_accepts(flags: str) -> bool:
    """Whether JAX starts with these flags; XLA ends the process when it does not know one."""
    code = "import jax; print(jax.device_count())"
    env = {**os.environ, "XLA_FLAGS": flags}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False).returncode == 0


def test_xla_knows_every_flag_of_the_scripts():
    text = "".join(path.read_text() for path in (ROOT / "launch").rglob("*") if path.is_file())
    flags = sorted(set(re.findall(r"--xla_\w+(?:=[\w,.-]*)?", text)))
    assert flags and xla_accepts(" ".join(flags))
    assert not xla_accepts("--xla_gpu_enable_what_there_is_not=true"), "this test can fail"


def test_the_users_flags_come_last_and_win():
    script = "source launch/xla_gpu.sh; echo $XLA_FLAGS; echo $XLA_PYTHON_CLIENT_MEM_FRACTION"
    env = {**os.environ, "XLA_FLAGS": "--mine=1", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}
    done = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    flags, fraction = done.stdout.splitlines()
    assert flags.startswith("--xla_gpu_") and flags.endswith(" --mine=1") and fraction == ".5"


# --- launch/gpu.sh -----------------------------------------------------------------------------


def test_one_machine_runs_with_the_gpu_version_and_xlas_flags(stand_ins, tmp_path):
    project = small_project(tmp_path / "project", "  import os; print(sys.argv[1:], os.environ['XLA_FLAGS'])\n")
    output = stand_ins.run("launch/gpu.sh", "train", "--config=a b.py", root=project)
    assert "with extras cuda13" in output
    assert output.endswith("['--config=a b.py'] --xla_gpu_enable_latency_hiding_scheduler=true\n")
    cluster = {"COORDINATOR": "there:1", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
    output = stand_ins.run("launch/gpu.sh", "train", root=project, **cluster)
    assert "['--coordinator=there:1', '--num_processes=4', '--process_id=3']" in output


def test_a_dry_run_on_hosts_prints_what_it_would_run_in_order(stand_ins, tmp_path):
    output = stand_ins.run("launch/gpu.sh", "--dry-run", "train", "--config=it's.py", HOSTS="me@one two")
    commands = output.splitlines()
    assert [command.split()[3] for command in commands] == ["me@one", "two", "me@one", "two"]
    assert all("set_up cuda13" in command for command in commands[:2])
    assert "COORDINATOR=one:12355 NUM_PROCESSES=2 PROCESS_ID=1 launch/gpu.sh --attended train" in commands[3]
    assert not stand_ins.calls()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_hosts_train_as_one_save_when_asked_and_resume(stand_ins, training, tmp_path):
    environment = {"HOSTS": "127.0.0.1 localhost", "COORDINATOR": f"127.0.0.1:{free_port()}"}
    process = stand_ins.start("launch/gpu.sh", *training, **environment)
    wait_for(lambda: len(steps(tmp_path / "run")) >= 5, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == STOPPED and "SIGTERM: saved at step" in output, output
    assert sorted(call.split()[3] for call in stand_ins.calls("ssh")) == ["127.0.0.1"] * 2 + ["localhost"] * 2
    output = stand_ins.run("launch/gpu.sh", *training, **environment)
    assert "resumed at step" in output and "devices: 2 x" in output
    assert steps(tmp_path / "run") == list(range(1, 21))


# A run that saves when it is asked to stop, as training does.
SAVES = """
  import signal, time
  def stop(*_):
      open("saved-" + sys.argv[-1][-1], "w").close()
      sys.exit(75)
  signal.signal(signal.SIGTERM, stop)
  open("began-" + sys.argv[-1][-1], "w").close()
  time.sleep({seconds})
  sys.exit({status})
"""


def test_hosts_save_when_the_script_is_killed(stand_ins, tmp_path):
    project = small_project(tmp_path / "project", SAVES.format(seconds=60, status=0))
    process = stand_ins.start("launch/gpu.sh", "train", root=project, HOSTS="one two")
    wait_for(lambda: len(list(project.glob("began-*"))) == 2, process)
    process.kill()
    process.wait()
    deadline = time.time() + 60
    while len(list(project.glob("saved-*"))) < 2:
        assert time.time() < deadline
        time.sleep(0.05)


def test_a_host_that_fails_ends_the_others_and_is_named(stand_ins, tmp_path):
    fails = "  if sys.argv[-1] == '--process_id=1':\n    sys.exit(3)\n"
    project = small_project(tmp_path / "project", fails + SAVES.format(seconds=60, status=0))
    output = stand_ins.run("launch/gpu.sh", "train", root=project, HOSTS="one two", code=3)
    assert "two: ended with status 3; the others stop" in output and "one: ended" not in output


def test_a_host_that_is_not_reached_is_named_before_anything_starts(stand_ins, tmp_path):
    project = small_project(tmp_path / "project", "  print('ran')\n")
    stand_ins.add("ssh", '[[ "$3" == one ]] || { echo "ssh: no route to $3" >&2; exit 255; }')
    output = stand_ins.run("launch/gpu.sh", "train", root=project, HOSTS="one two", code=2)
    assert "error: two: not reached by ssh" in output
    assert not any("--attended" in call for call in stand_ins.calls("ssh"))


# --- launch/slurm.sbatch -----------------------------------------------------------------------


def test_a_job_gives_a_process_all_gpus_of_its_node(stand_ins, tmp_path):
    code = """  import os; sys.stdout.write(f"{os.environ['JAX_LOCAL_DEVICE_IDS']} {sys.argv[1:]}\\n")\n"""
    project = small_project(tmp_path / "project", code)
    # Slurm runs a copy of the script, from where it was submitted.
    copy = tmp_path / "spool/slurm_script"
    copy.parent.mkdir()
    copy.write_bytes((project / "launch/slurm.sbatch").read_bytes())
    slurm = {"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(project)}
    output = stand_ins.run(str(copy), "train", "--config=a b.py", root=project, **slurm)
    assert output.splitlines()[-2:] == ["0,1,2,3 ['--config=a b.py', '--distributed']"] * 2
    assert stand_ins.calls("srun") == [
        "srun --ntasks-per-node=1 --cpu-bind=none launch/local.sh train --config=a b.py --distributed"
    ]


def test_slurms_options_stand_where_slurm_reads_them():
    """Before the first line that is no comment; the signal goes to the processes, not to the script alone."""
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH ")]
    assert {"--ntasks-per-node=1", "--requeue", "--signal=TERM@120"} <= set(options)
    assert not any("#SBATCH" in line for line in lines[first:])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_job_trains_on_two_nodes_is_queued_again_when_stopped_and_resumes(stand_ins, training, tmp_path):
    # JAX makes the port from the job's number.
    job = str(free_port(61440) - 61440)
    process = stand_ins.start("launch/slurm.sbatch", *training, SLURM_JOB_ID=job)
    wait_for(lambda: len(steps(tmp_path / "run")) >= 5, process)
    os.kill(int((tmp_path / "pids").read_text().split()[1]), signal.SIGTERM)  # the second node is preempted
    output, _ = process.communicate(timeout=300)
    assert process.returncode == STOPPED and "SIGTERM: saved at step" in output, output
    assert stand_ins.calls("scontrol") == [f"scontrol requeue {job}"]
    output = stand_ins.run("launch/slurm.sbatch", *training, SLURM_JOB_ID=job)
    assert "resumed at step" in output and "devices: 2 x" in output
    assert steps(tmp_path / "run") == list(range(1, 21))
    assert len(stand_ins.calls("scontrol")) == 1, "a run that has come to its end is not queued again"


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["launch/gpu.sh", "launch/slurm.sbatch"])
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--nonsense", "train"], {}, "unknown option --nonsense"),
        (["trian"], {}, "no command 'trian'. Commands: "),
        ([], {}, "no command: "),
        (["train"], {"PATH": "bare", "SLURM_JOB_ID": "1"}, " is missing here: "),
    ],
)
def test_bad_input_is_refused_before_anything_runs(stand_ins, script, arguments, environment, message):
    if "PATH" in environment:
        environment = {**environment, "PATH": stand_ins.bare_path()}
    output = stand_ins.run(script, *arguments, code=2, **environment)
    assert output.startswith("error: ") and message in output
    assert not stand_ins.calls()


def test_half_a_cluster_and_no_job_are_refused(stand_ins):
    output = stand_ins.run("launch/gpu.sh", "train", code=2, PROCESS_ID="1")
    assert output.startswith("error: not set: COORDINATOR NUM_PROCESSES.")
    output = stand_ins.run("launch/slurm.sbatch", "train", code=2)
    assert output.startswith("error: this is no Slurm job: sbatch --nodes=N")
    output = stand_ins.run("launch/gpu.sh", "train", code=2, HOSTS="one", PATH=stand_ins.bare_path())
    assert output.startswith("error: ssh is missing here: ")
