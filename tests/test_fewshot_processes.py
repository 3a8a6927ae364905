"""The few-shot command as processes: killed, it loses nothing; two of them never share a workdir."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_fewshot import make_material

CONFIG = """
from nuner_jax.config import fewshot

def get_config():
    config = fewshot()
    config.encoders = {{name: f"{folder}/{{name}}" for name in ("one", "two")}}
    config.baseline = "two"
    config.sets = {{name: {{"path": f"{folder}/{{name}}"}} for name in ("voyages", "notes")}}
    config.k, config.seeds = (1, 2, 4, 8), 3
    config.head.steps, config.head.width = 40, 16
    return config
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Gives the command for a workdir."""
    folder = make_material(tmp_path_factory.mktemp("fewshot"))
    (folder / "config.py").write_text(CONFIG.format(folder=folder))
    return lambda workdir: ("-m", "nuner_jax.fewshot", f"--config={folder / 'config.py'}", f"--workdir={workdir}")


def rows(workdir):
    """Which run each row is of, with what it says but for its time."""
    found = {}
    for line in (workdir / "results.jsonl").read_text().splitlines():
        row = json.loads(line) | {"seconds": 0}
        key = tuple(row[name] for name in ("set", "encoder", "head", "k", "seed"))
        assert key not in found, f"{key} has two rows"
        found[key] = row
    return found


def test_a_killed_run_loses_no_row_and_nobody_else_writes_meanwhile(command, tmp_path, run_python, root):
    run_python(*command(tmp_path / "whole"))
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *command(workdir)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    )
    results, deadline = workdir / "results.jsonl", time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)  # in the middle, for as long as another one tries
    try:
        second = run_python(*command(workdir), check=False)
    finally:
        process.kill()
        process.wait()
    assert second.returncode == 2
    assert second.stderr.splitlines()[-1].startswith(f"error: {workdir}: in use by another process; wait for it")

    kept = results.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 0 < kept.count(b"\n") < 48
    run_python(*command(workdir))
    assert results.read_bytes().startswith(kept)
    assert rows(workdir) == rows(tmp_path / "whole") and len(rows(workdir)) == 48

    manifest = json.loads((workdir / "results.json").read_text())["manifest"]
    killed, last = (start["seconds"] for start in manifest["starts"])
    assert killed > 0 and last > 0 and manifest["seconds"] == pytest.approx(killed + last)
    assert json.loads((workdir / "results.json").read_text())["missing"] == []
    assert manifest["command"].startswith("python") and f"--workdir={workdir}" in manifest["command"]
