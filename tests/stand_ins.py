"""Programs that take the place of those that are not here (ssh, srun, gcloud, …): first on the PATH, they take notes
of how they are called, and act."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The programs of any Linux machine that the launch scripts call.
PLAIN = ("awk", "bash", "cat", "dirname", "env", "git", "grep", "mkdir", "mktemp", "paste", "rm", "sed", "sort", "tar")


class StandIns:
    """A folder of programs, the notes that they took, and an environment in which they are found."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.notes = folder / "bin", folder / "calls.txt"
        self.started: list[subprocess.Popen] = []
        self.folder.mkdir(parents=True)
        self.python_environment()

    def add(self, name: str, body: str = "") -> None:
        """A bash script, which begins with a note of its arguments."""
        program = self.folder / name
        program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{self.notes}\n{body}\n')
        program.chmod(0o755)

    def python_environment(self) -> None:
        """A virtual environment that is there, with this Python, and a pip that installs nothing."""
        python = self.folder.parent / "venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/usr/bin/env bash\n[[ "$*" == "-m pip"* ]] || exec {sys.executable} "$@"\n')
        python.chmod(0o755)

    def calls(self, name: str = "") -> list[str]:
        """The calls of one program, or of all, in their order."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [line for line in lines if line.startswith(name)]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a launch script, without the variables that would change what it does."""
        found = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_", "NUNER_"))}
        for name in ("PYTHON", "HOSTS", "COORDINATOR", "NUM_PROCESSES", "PROCESS_ID", "BUCKET", "SPOT"):
            found.pop(name, None)
        found["PATH"] = f"{self.folder}:{found['PATH']}"
        return {**found, "NUNER_VENV": str(self.folder.parent / "venv"), **more}

    def bare_path(self) -> str:
        """A PATH of the plain programs alone, where whatever else is needed is missing."""
        bare = self.folder.parent / "bare"
        bare.mkdir(exist_ok=True)
        for name in PLAIN:
            (bare / name).unlink(missing_ok=True)
            (bare / name).symlink_to(shutil.which(name))
        return str(bare)

    def start(self, *command: str, root: pathlib.Path = ROOT, **environment: str) -> subprocess.Popen:
        """Starts a launch script from the root of the repository, or of another one."""
        process = subprocess.Popen(
            ["bash", *command],
            cwd=root,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        """Ends the scripts that a failed test has left."""
        for process in self.started:
            process.kill()
            process.wait()

    def run(self, *command: str, code: int = 0, **options: str) -> str:
        """Runs a launch script to its end, and gives what it printed."""
        process = self.start(*command, **options)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output


def small_project(root: pathlib.Path, train: str) -> pathlib.Path:
    """A repository of the launch scripts and one command, `train`, whose code this is."""
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "setup.py").write_text("")
    (root / "nuner_jax").mkdir()
    (root / "nuner_jax/__init__.py").touch()
    (root / "nuner_jax/train.py").write_text(f'import sys\nif __name__ == "__main__":\n{train}')
    subprocess.run(["git", "init", "--quiet", root], check=True)
    return root
