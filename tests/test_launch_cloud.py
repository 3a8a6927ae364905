"""Cloud TPUs and Google Kubernetes Engine, with stand-ins for gcloud and kubectl that act on this machine."""

import pathlib
import subprocess

import pytest
import yaml
from stand_ins import StandIns, small_project

# A TPU of two machines, each a folder with a home of its own. It is not there until it was asked for twice, and a
# command reaches it only while it is ACTIVE.
GCLOUD = """
cloud=CLOUD
for word in "$@"; do
  case "$word" in
    --worker=*) worker="${word#*=}" ;;
    --command=*) command="${word#*=}" ;;
  esac
done
case "$*" in
  "storage buckets describe "*) cat "$cloud/bucket_description" ;;
  "storage cp "*) mkdir -p "$cloud/bucket/code" && cp "$3" "$cloud/bucket/${4#gs://*/}" ;;
  *"queued-resources create "*)
    [[ ! -e "$cloud/state" ]] || exit 1
    for home in 0 1; do mkdir -p "$cloud/$home" && cp -r "$NUNER_VENV" "$cloud/$home/venv"; done
    echo WAITING_FOR_RESOURCES >"$cloud/state" ;;
  *"queued-resources describe "*)
    cat "$cloud/state" || exit 1
    sed -i s/WAITING_FOR_RESOURCES/ACTIVE/ "$cloud/state" ;;
  *"queued-resources delete "*) rm -r "$cloud/state" "$cloud/0" "$cloud/1" ;;
  *"queued-resources list "*) echo "base ACTIVE" ;;
  *"tpu-vm scp "*) for home in 0 1; do cp "$5" "$cloud/$home/nuner_jax.tar.gz"; done ;;
  *"tpu-vm ssh "*)
    if [[ "$worker" == all ]]; then worker="0 1"; fi
    for home in $worker; do
      [[ "$(cat "$cloud/state")" == ACTIVE ]] || exit 255
      (cd "$cloud/$home" && export HOME="$PWD" NUNER_VENV="$PWD/venv" NUNER_MOUNT="$PWD/mount" &&
        bash -c "$command" </dev/null) || exit
    done ;;
  *) echo "what is $*?" >&2; exit 1 ;;
esac
"""

# The command: the first time the TPU is taken away, the second time the run is asked to stop, the third time it ends.
INTERRUPTED = """
  import os, pathlib, time
  times = pathlib.Path("CLOUD/times" + os.environ["HOME"][-1])
  count = len(times.read_text()) if times.exists() else 0
  times.write_text("x" * (count + 1))
  print("start", count, sys.argv[1:])
  if count == 0:
      while not pathlib.Path("CLOUD/times1").exists():
          time.sleep(0.05)
      pathlib.Path("CLOUD/state").write_text("SUSPENDED")
      os.abort()
  sys.exit(75 if count == 1 else 0)
"""


@pytest.fixture
def cloud(tmp_path):
    """The folder of a cloud, whose bucket has a hierarchical namespace."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    (folder / "bucket_description").write_text("hierarchical_namespace:\n  enabled: true\n")
    return folder


@pytest.fixture
def stand_ins(cloud, tmp_path):
    programs = StandIns(tmp_path / "programs")
    programs.add("gcloud", GCLOUD.replace("CLOUD", str(cloud)))
    programs.add("kubectl", f'if [[ "$1" == apply ]]; then cat >{cloud}/manifest.yaml; fi')
    programs.add("sudo", 'exec "$@"')
    programs.add("gcsfuse")
    yield programs
    programs.stop()


def tpu(stand_ins, *arguments, **options) -> str:
    place = {"ZONE": "us-west4-a", "TYPE": "v5litepod-16", "BUCKET": "gs://b", "POLL": "0.05"}
    return stand_ins.run("launch/tpu_vm.sh", *arguments, **{**place, **options})


def gke(stand_ins, *arguments, **options) -> str:
    place = {"BUCKET": "b", "TPU": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4"}
    return stand_ins.run("launch/gke/run.sh", *arguments, **{**place, **options})


# --- launch/tpu_vm.sh --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_a_spot_tpu_comes_to_its_end_through_preemption(stand_ins, cloud, tmp_path):
    project = small_project(tmp_path / "project", INTERRUPTED.replace("CLOUD", str(cloud)))
    output = tpu(stand_ins, "base", "train", "--config=a b.py", root=project, SPOT="1")
    flags = "['--config=a b.py', '--distributed', '--workdir=/mnt/bucket/runs/base']"
    assert output.endswith(f"start 2 {flags}\n")
    assert output.count("nuner_jax: base: waiting: WAITING_FOR_RESOURCES") == 2

    asked = [call for call in stand_ins.calls("gcloud compute tpus queued-resources") if " describe " not in call]
    create = (
        "gcloud compute tpus queued-resources create base --node-id=base --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --zone=us-west4-a"
    )
    delete = "gcloud compute tpus queued-resources delete base --force --quiet --zone=us-west4-a"
    assert asked == [create, delete, create, delete], "made anew once, and deleted at the end"
    assert [(cloud / f"times{i}").read_text() for i in (0, 1)] == ["xxx", "xxx"], "all machines run the command"
    mounted = stand_ins.calls("gcsfuse")[0]
    assert "--metadata-cache-ttl-secs=0" in mounted and " b " in mounted


def test_a_run_that_fails_is_not_repeated_and_its_tpu_is_kept(stand_ins, cloud, tmp_path):
    project = small_project(tmp_path / "project", "  print('error: no such config'); sys.exit(2)\n")
    output = tpu(stand_ins, "base", "train", root=project, code=2)
    assert output.count("error: no such config") == 1
    assert "error: the run ended with status 2; base is kept: --delete base deletes it" in output
    assert (cloud / "state").exists()
    output = tpu(stand_ins, "--logs", "base", root=project)
    assert output == "error: no such config\n"
    assert tpu(stand_ins, "--list", root=project) == "base ACTIVE\n"
    tpu(stand_ins, "--delete", "base", root=project)
    assert not (cloud / "state").exists()


def test_the_same_command_finds_a_run_that_goes_on(stand_ins, cloud, tmp_path):
    waits = f"""
  import os, time
  print("began", flush=True)
  while not os.path.exists("{cloud}/go"):
      time.sleep(0.05)
"""
    project = small_project(tmp_path / "project", waits)
    command = ["launch/tpu_vm.sh", "base", "train"]
    environment = {"ZONE": "z", "TYPE": "v6e-8", "BUCKET": "b", "POLL": "0.05", "KEEP": "1"}
    first = stand_ins.start(*command, root=project, **environment)
    assert any(line == "began\n" for line in first.stdout)
    first.kill()
    first.wait()
    second = stand_ins.start(*command, root=project, **environment)
    assert any(line == "began\n" for line in second.stdout), "from the beginning"
    (cloud / "go").touch()
    assert second.wait(timeout=300) == 0
    assert len(stand_ins.calls("gcloud compute tpus tpu-vm scp")) == 1, "nothing is copied over what runs"
    assert (cloud / "state").exists(), "kept"


# --- launch/gke/run.sh -------------------------------------------------------------------------


def run_pod(cloud: pathlib.Path, stand_ins: StandIns, job: dict, index: int) -> str:
    """Does what a pod does, with the bucket and the container's folder below the cloud's."""
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    here = {"/mnt/bucket/code": f"{cloud}/bucket/code", "/nuner_jax": f"{cloud}/pod{index}"}
    words = [*container["command"], *container["args"]]
    for there, folder in here.items():
        words[2] = words[2].replace(there, folder)
    values = {e["name"]: e.get("value", str(index)) for e in container["env"] if e["name"] != "PATH"}
    env = stand_ins.environment(**values)
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_a_slice_of_tpus_is_a_job_of_one_pod_a_machine(stand_ins, cloud, tmp_path):
    project = small_project(tmp_path / "project", "  print(sys.argv[1:])\n")
    gke(stand_ins, "base", "train", '--config=a "b\\c.py', root=project, SPOT="1")
    service, job = yaml.safe_load_all((cloud / "manifest.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4, "16 chips, 4 a machine"
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"] == "base"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    rules = {str(rule.get("onExitCodes", rule.get("onPodConditions"))): rule["action"] for rule in podrules(job)}
    assert [rules[key] for key in rules if "[2]" in key] == ["FailJob"], "a mistake is not repeated"
    assert [rules[key] for key in rules if "[75]" in key or "Disruption" in key] == ["Ignore", "Ignore"]
    flags = ['--config=a "b\\c.py', "--workdir=/mnt/bucket/runs/base", "--distributed", "--join_timeout=1800"]
    assert run_pod(cloud, stand_ins, job, 3) == f"{flags}\n"


def podrules(job: dict) -> list[dict]:
    return job["spec"]["podFailurePolicy"]["rules"]


def test_gpu_nodes_find_each_other_by_their_pods_names(stand_ins, cloud, tmp_path):
    project = small_project(tmp_path / "project", "  print(sys.argv[1:])\n")
    stand_ins.add("nvidia-smi")
    gke(stand_ins, "base", "train", root=project, TPU="", GPU="nvidia-h100-80gb", NODES="2")
    _, job = yaml.safe_load_all((cloud / "manifest.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    cluster = ["--coordinator=base-0.base:12355", "--num_processes=2", "--process_id=1"]
    flags = ["--workdir=/mnt/bucket/runs/base", "--join_timeout=1800", *cluster]
    assert run_pod(cloud, stand_ins, job, 1) == f"{flags}\n"


def test_jobs_are_listed_followed_and_deleted_by_kubectl(stand_ins):
    for arguments in (["--list"], ["--logs", "base"], ["--delete", "base"]):
        gke(stand_ins, *arguments)
    assert stand_ins.calls() == [
        "kubectl get jobs --selector=app=nuner-jax",
        "kubectl logs --follow --container=train "
        "--selector=job-name=base,batch.kubernetes.io/job-completion-index=0 --tail=-1",
        "kubectl delete job/base service/base",
    ]


# --- All of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", [tpu, gke])
def test_a_dry_run_prints_every_command_and_runs_none(stand_ins, launch):
    output = launch(
        stand_ins, "--dry-run", "base", "train", "--config=configs/quickstart.py", PATH=stand_ins.bare_path()
    )
    lines = output.splitlines()
    assert any(line.startswith(("gcloud compute tpus queued-resources create", "kubectl apply")) for line in lines)
    assert "configs/quickstart.py" in output and "/mnt/bucket/runs/base" in output
    for arguments in (["--list"], ["--logs", "base"], ["--delete", "base"]):
        assert launch(stand_ins, "--dry-run", *arguments, PATH=stand_ins.bare_path()).startswith(
            ("gcloud ", "kubectl ")
        )
    assert not stand_ins.calls()


@pytest.mark.parametrize("launch", [tpu, gke])
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--nonsense"], {}, "unknown option --nonsense"),
        (["Base", "train"], {}, "the name 'Base' has to be of a-z"),
        (["base", "trian"], {}, "no command 'trian'. Commands: "),
        (["base"], {}, "no command: "),
        (["base", "train"], {"BUCKET": ""}, "not set: BUCKET"),
        (["base", "train", "--workdir=runs/x"], {}, "--workdir=runs/x: the workdir is gs://b/runs/NAME"),
        (["base", "train"], {"PATH": "bare"}, " is missing here: https://"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(stand_ins, launch, arguments, environment, message):
    if "PATH" in environment:
        environment = {"PATH": stand_ins.bare_path()}
    output = launch(stand_ins, *arguments, code=2, **environment)
    assert output.startswith("error: ") and message in output
    assert not stand_ins.calls()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TOPOLOGY": "4by4"}, "TOPOLOGY=4by4 is not of the form 4x4"),
        ({"TOPOLOGY": "3x3"}, "TOPOLOGY=3x3 cannot be divided into nodes of CHIPS=4"),
        ({"CHIPS": "many"}, "CHIPS=many is no number above 0"),
        ({"TPU": ""}, "not set: GPU NODES"),
        ({"GPU": "nvidia-l4"}, "TPU and GPU are both set"),
    ],
)
def test_machines_that_cannot_be_are_refused(stand_ins, environment, message):
    assert message in gke(stand_ins, "base", "train", code=2, **environment)
    assert not stand_ins.calls()


@pytest.mark.parametrize("launch", [tpu, gke])
def test_a_bucket_where_folders_cannot_be_renamed_is_refused(stand_ins, cloud, launch):
    (cloud / "bucket_description").write_text("null\n")
    output = launch(stand_ins, "base", "train", code=2)
    assert "error: gs://b has no hierarchical namespace" in output
    assert [call.split()[1] for call in stand_ins.calls()] == ["storage"], "it was looked at, and nothing was made"


def test_code_that_git_does_not_list_is_not_copied(stand_ins, tmp_path):
    project = small_project(tmp_path / "project", "  print('ran')\n")
    (project / ".git").rename(tmp_path / "not_git")
    for launch in (tpu, gke):
        assert "is no git checkout" in launch(stand_ins, "base", "train", root=project, code=2)
    assert not stand_ins.calls()


# --- launch/tpu_worker.sh ----------------------------------------------------------------------


def test_a_machine_with_an_old_python_gets_a_newer_one(stand_ins, tmp_path):
    project = small_project(tmp_path / "project", "  print('ran')\n")
    home = tmp_path / "home"
    (home / ".local/bin").mkdir(parents=True)
    for name in ("python3", "python3.11", "python3.12", "python3.13"):  # -c of find_python fails: too old
        stand_ins.add(name, '[[ "$1" != -c ]]')
    uv = home / ".local/bin/uv"
    uv.write_text(f'#!/usr/bin/env bash\necho "uv $*" >>{stand_ins.notes}\necho /managed/python3.12\n')
    uv.chmod(0o755)
    output = stand_ins.run(
        "launch/tpu_worker.sh", "prepare", "b", root=project, HOME=str(home), NUNER_MOUNT=f"{home}/mount"
    )
    assert "with extras tpu" in output
    assert "python3 -m pip install --quiet --user uv" in stand_ins.calls()
    assert stand_ins.calls("uv") == ["uv python install --quiet 3.12", "uv python find 3.12"]
