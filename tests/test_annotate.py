"""Annotation as a whole: the command, its stages, and that nothing paid for is lost, whatever happens."""

import gzip
import json
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from fake_openai import FakeOpenAI

from nuner_jax import config as config_lib
from nuner_jax.annotate import pipeline
from nuner_jax.data import builder
from nuner_jax.data.importers import Report, import_records, resolve_inputs
from nuner_jax.errors import NunerError
from nuner_jax.writers import Console

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY = "sk-test-0123456789-secret"
TINY = "tests/configs/annotate_tiny.py"


def command(server, workdir, *flags) -> list[str]:
    config = f"--config={TINY}:{server.base_url}"
    return [sys.executable, "-m", "nuner_jax.annotate", config, f"--workdir={workdir}", *map(str, flags)]


def run(server, workdir, *flags, check=True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(server, workdir, *flags),
        cwd=ROOT,
        env={**os.environ, "NUNER_TEST_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert KEY not in done.stdout + done.stderr
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def tiny(server):
    return config_lib.load_file(f"{ROOT / TINY}:{server.base_url}")


def journal(workdir, query):
    connection = sqlite3.connect(f"file:{workdir / pipeline.JOURNAL_FILE}?mode=ro", uri=True)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """An undisturbed run: its folder, what it printed, and its server."""
    workdir = tmp_path_factory.mktemp("annotated") / "run"
    with FakeOpenAI(key=KEY) as server:
        done = run(server, workdir)
        yield workdir, done.stdout, server


def test_one_command_goes_from_text_to_shards_and_a_report(annotated):
    workdir, printed, server = annotated
    assert sum(server.answered().values()) == 600 and set(server.answered().values()) == {1}
    records = list(builder.open_split(workdir / "shards", "train")) + list(
        builder.open_split(workdir / "shards", "validation")
    )
    assert 590 < len(records) <= 600
    assert all(record.entities for record in records)
    for name in ("index.html", "DATA_CARD.md", "concepts.csv"):
        assert (workdir / "report" / name).stat().st_size > 500
    assert "$" in printed and str(workdir / "report" / "index.html") in printed
    assert not list(workdir.glob("journal.sqlite-*")), "the journal is one file, which can be copied"


def test_the_key_is_nowhere_in_the_folder(annotated):
    workdir, *_ = annotated
    for name, content in files_of(workdir).items():
        content = gzip.decompress(content) if name.endswith(".gz") else content
        assert KEY.encode() not in content, name


def test_a_second_start_asks_nothing_and_changes_no_shard(annotated):
    workdir, _, server = annotated
    before, asked = files_of(workdir / "shards"), server.requests
    run(server, workdir)
    assert not [arrival for arrival in server.log[asked:] if arrival.texts]
    assert files_of(workdir / "shards") == before


def test_a_journal_of_another_prompt_or_model_is_refused_with_what_differs(annotated):
    workdir, _, server = annotated
    done = run(
        server,
        workdir,
        "--config.prompt.template=structured",
        "--config.endpoint.temperature=0.5",
        check=False,
    )
    assert done.returncode == 2
    assert "temperature: 0.0 -> 0.5" in done.stderr and "template" in done.stderr and "workdir" in done.stderr


def test_the_refused_config_is_not_what_the_folder_tells(annotated):
    workdir, *_ = annotated
    assert config_lib.read(workdir / "config.json").endpoint.temperature == 0.0


@pytest.mark.parametrize(
    ("key", "flag", "hint"),
    [
        ("another-key", None, "NUNER_TEST_KEY"),
        (None, None, "NUNER_TEST_KEY"),
        (KEY, "--config.endpoint.model=fake-modle", "fake-model"),
        (KEY, "--config.endpoint.base_url=http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1"),
    ],
    ids=["wrong key", "no key", "unknown model", "endpoint down"],
)
def test_an_endpoint_that_cannot_be_used_is_told_before_anything_is_selected(tmp_path, key, flag, hint):
    with FakeOpenAI(key=KEY) as server:
        environment = {name: value for name, value in os.environ.items() if name != "NUNER_TEST_KEY"}
        done = subprocess.run(
            command(server, tmp_path / "run", *([flag] if flag else [])),
            cwd=ROOT,
            env=environment | ({"NUNER_TEST_KEY": key} if key else {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not server.log
    assert done.returncode == 2 and hint in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert "another-key" not in done.stderr
    assert not (tmp_path / "run" / "selection").exists()


def test_where_nothing_could_be_aligned_the_report_tells_why(tmp_path):
    with FakeOpenAI(key=KEY, completion=lambda text: "There is nothing to see here.") as server:
        done = run(server, tmp_path / "run", "--config.source.size=20", check=False)
    assert done.returncode == 2 and "0 records are too few" in done.stderr
    assert "delimiter" in (tmp_path / "run/report/index.html").read_text()


def test_a_larger_sample_asks_only_for_what_is_new(tmp_path):
    with FakeOpenAI(key=KEY) as server:
        run(server, tmp_path / "run", "--config.source.size=40", "--stages=select,request")
        run(server, tmp_path / "run", "--config.source.size=60")
        assert len(server.answered()) == 60 and set(server.answered().values()) == {1}


def test_shards_of_machines_are_disjoint_and_cover_the_sample(tmp_path):
    with FakeOpenAI(key=KEY) as server:
        for i in range(3):
            run(server, tmp_path / str(i), "--config.source.size=90", f"--config.source.shard={i}/3")
        assert len(server.answered()) == 90 and set(server.answered().values()) == {1}


@pytest.mark.parametrize("template", ["paper", "structured"])
@pytest.mark.parametrize("many", [1, 5])
def test_every_form_of_prompt_gives_the_same_records(annotated, tmp_path, template, many):
    workdir, *_ = annotated
    with FakeOpenAI(key=KEY) as server:
        flags = [f"--config.prompt.template={template}", f"--config.prompt.units_per_request={many}"]
        run(server, tmp_path / "run", *flags)
        asked = len([arrival for arrival in server.log if arrival.texts])
    assert asked == pytest.approx(600 / many, abs=10)
    assert builder.fingerprint(tmp_path / "run/shards") == builder.fingerprint(workdir / "shards")


def test_a_dry_run_shows_prompts_plan_and_estimate_and_asks_nothing(tmp_path):
    with FakeOpenAI(key=KEY) as server:
        done = run(server, tmp_path / "run", "--dry_run")
        assert server.requests == 0
    assert "Label as many entities, concepts, and ideas as possible" in done.stdout
    assert "600 units" in done.stdout and "$" in done.stdout
    assert not (tmp_path / "run" / pipeline.JOURNAL_FILE).exists()


def test_a_pilot_measures_and_stops(tmp_path):
    with FakeOpenAI(key=KEY) as server:
        done = run(server, tmp_path / "run", "--pilot")
        assert sum(server.answered().values()) == 5
    assert "$" in done.stdout and not (tmp_path / "run" / "shards").exists()


def test_a_stage_whose_input_is_missing_names_the_stage_before(tmp_path):
    with FakeOpenAI(key=KEY) as server:
        for stage, before in (("request", "select"), ("align", "request"), ("build", "align")):
            done = run(server, tmp_path / "run", f"--stages={stage}", check=False)
            assert done.returncode == 2 and f"run the stage {before} first" in done.stderr


def test_a_budget_that_ends_leaves_shards_of_what_was_paid_for(tmp_path):
    with FakeOpenAI(key=KEY) as server:
        done = run(server, tmp_path / "run", "--config.request.budget=0.05")
        billed = server.billed
    assert (billed.prompt * 0.5 + billed.completion * 1.5) / 1e6 <= 0.05
    assert "budget" in done.stdout
    paid = sum(1 for state in journal(tmp_path / "run", "select state from units") if state == ("done",))
    assert 0 < paid < 600
    assert 0 < len(builder.open_split(tmp_path / "run/shards", "train")) <= paid


@pytest.mark.slow
def test_fifty_kills_leave_the_same_shards_and_no_answer_is_asked_for_twice(annotated, tmp_path):
    undisturbed, *_ = annotated
    workdir, draw, kills = tmp_path / "run", random.Random(0), 0
    with FakeOpenAI(key=KEY, delay=0.15) as server:
        while kills < 50:
            process = subprocess.Popen(
                command(server, workdir),
                cwd=ROOT,
                env={**os.environ, "NUNER_TEST_KEY": KEY},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(draw.uniform(0.2, 3.5))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        server.delay = 0.0
        run(server, workdir)
        asked = server.answered()
    assert files_of(workdir / "shards") == files_of(undisturbed / "shards")
    lost = dict(journal(workdir, "select unit, count(*) from attempts where state = 'lost' group by unit"))
    texts = dict(journal(workdir, "select text, id from units"))
    assert lost, "no kill hit a request in flight"
    again = {text: times for text, times in asked.items() if times > 1}
    assert all(times <= 1 + lost.get(texts[text], 0) for text, times in asked.items()), again


def test_the_sample_goes_through_all_stages_without_network_or_extras(tmp_path, run_python):
    extras = ("openai", "sentencex", "datasketch", "inflect", "datasets")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({extras!r}));"
    start = f"sys.argv = ['annotate', '--config=configs/annotate_sample.py', '--workdir={tmp_path / 'run'}'];"
    run_python("-c", blocked + start + "import runpy; runpy.run_module('nuner_jax.annotate', run_name='__main__')")
    counts = json.loads((tmp_path / "run" / "align.json").read_text())
    direct = Report()
    list(import_records(resolve_inputs(["sample"]), direct))
    stored = builder.read_report(tmp_path / "run" / "shards")
    assert stored["records"] == direct.records and direct.records > 5900
    assert counts["units"]["kept"] == 6000
    assert counts["annotations"]["found"] >= 0.995 * counts["lines"]["annotations"] > 34_000


def test_an_annotation_config_is_a_source_of_training_data(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = pipeline.ensure_annotated("configs/annotate_sample.py", tmp_path)
    began = time.perf_counter()
    assert pipeline.ensure_annotated("configs/annotate_sample.py", tmp_path) == first
    assert time.perf_counter() - began < 1, "a second start reads nothing again"
    assert builder.is_built(first)


def test_a_live_config_is_no_source_of_training_data(tmp_path):
    with pytest.raises(NunerError, match="annotate first"):
        pipeline.ensure_annotated(f"{ROOT / TINY}:http://localhost:1/v1", tmp_path)


def test_the_benchmark_of_the_client_runs(run_python):
    printed = run_python("tests/benchmarks/annotate_client.py", "--units=300", "--runs=1", "--concurrency=16").stdout
    figures = json.loads(printed.splitlines()[-1])
    assert figures["units"] == 300 and figures["stage_per_s"] > 0 and figures["bare_per_s"] > 0


def test_bad_flags_are_one_line_of_error(tmp_path):
    with FakeOpenAI(key=KEY) as server:
        for flags, hint in [
            (["--stages=selekt"], "no stage 'selekt'"),
            (["--config.source.shard=3/3"], "i/n with i from 0 to n-1"),
            (["--config.price.input=None", "--config.request.budget=1"], "config.price.input"),
            (["--config.source.unit=word"], "choose one of 'sentence', 'passage', 'row'"),
            (["--config.endpoint.base_url=https://me:secret@host/v1"], "NUNER_TEST_KEY, and the bare address"),
            (["--config.sorce.unit=row"], "did you mean source.unit"),
        ]:
            done = run(server, tmp_path / "run", *flags, check=False)
            assert done.returncode == 2 and hint in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
            assert "secret" not in done.stderr


def test_the_pipeline_runs_in_a_program_too(tmp_path, monkeypatch):
    monkeypatch.setenv("NUNER_TEST_KEY", KEY)
    with FakeOpenAI(key=KEY) as server:
        config = tiny(server)
        config.source.size = 20
        pipeline.annotate(config, tmp_path / "run", Console(active=False))
    assert builder.is_built(tmp_path / "run/shards")
