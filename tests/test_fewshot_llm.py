"""Language models beside encoders in few-shot tables, asked over real sockets: examples, scores, money, stops."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from asking import Lines, after_requests
from fake_openai import FakeOpenAI
from test_fewshot import material  # noqa: F401 (a fixture)

from nuner_jax import config as config_lib
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.money import Prices
from nuner_jax.annotate.units import Usage
from nuner_jax.data.ner import datasets
from nuner_jax.errors import NunerError
from nuner_jax.fewshot import frozen, run
from nuner_jax.fewshot.llm.answers import TypeNames, read_answer
from nuner_jax.fewshot.llm.prompt import answer_of
from nuner_jax.fewshot.results import Grid, append_rows, read_rows

KEY = "sk-test-0123456789-secret"
SETS = ("travel_desk", "lab_notes")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("FEWSHOT_TEST_KEY", KEY)


@pytest.fixture(scope="module")
def right():
    """The right answer about every text of the embedded sets."""
    sets = [datasets.load({"name": name}) for name in SETS]
    return {record.text: answer_of(record) for data in sets for record in (*data.train, *data.test)}


def asked_text(prompt):
    return prompt.rpartition("\n\nInput: ")[2].removesuffix("\nOutput:")


def server_of(answer, **more):
    """A server that gives `answer` of the text that a prompt ends with, and logs whole prompts."""
    return FakeOpenAI(
        key=KEY,
        find=lambda body: [body["messages"][0]["content"]],
        completion=lambda prompt: answer(asked_text(prompt)),
        retry_after=0.01,
        **more,
    )


def make_config(server=None, encoder=None, **given):
    config = config_lib.load_file("configs/fewshot_llm.py" + (f":{encoder}" if encoder else ""))
    del config.sets["lab_notes"]
    config.k, config.seeds, config.eval.max_sentences = (0, 2), 2, 12
    llm = config.llms.llm
    llm.endpoint.update(model="fake-model", key_variable="FEWSHOT_TEST_KEY", max_tokens=128)
    llm.price.update(input=1.0, output=2.0)
    llm.request.update(backoff=0.01, timeout=20.0, pilot=0)
    if server:
        llm.endpoint.base_url = server.base_url
    config.update_from_flattened_dict(given)
    return config


def evaluate(config, workdir, console=None, **more):
    config_lib.check(config, tasks=("fewshot",))
    return run.fewshot(config, workdir, console or Lines(), **more)


def answers_of(rows):
    return {(row["k"], row["seed"]): row["answers"] for row in rows}


# --- What is shown, and how it is scored -------------------------------------------------------


def test_a_model_that_answers_rightly_scores_100_without_examples_and_with_those_of_the_samples(tmp_path, right):
    console = Lines()
    with server_of(right.__getitem__) as server:
        config = make_config(server)
        results = evaluate(config, tmp_path, console)
        prompts = list(server.attempts())
    assert [(row["encoder"], row["head"], row["k"], row["seed"]) for row in results.rows] == [
        ("llm", "in context", 0, 0),
        ("llm", "in context", 2, 0),
        ("llm", "in context", 2, 1),
    ]
    for row in results.rows:
        assert row["token_macro_f1"] == row["entity_f1"] == row["string_f1"] == 1.0
        assert (row["answers"]["failed"], row["answers"]["left_out"]) == (0, {})
    samples = json.loads((tmp_path / "samples.json").read_text())["travel_desk"]
    train = datasets.load({"name": "travel_desk"}).train
    shown = {tuple(re.findall(r"^Input: (.*)\nOutput:\n", prompt, re.MULTILINE)) for prompt in prompts}
    assert shown == {()} | {tuple(train[n].text for n in samples["2"][seed]["ids"]) for seed in ("0", "1")}
    for prompt in prompts:
        assert "\norigin: the place where a leg of the journey begins\n" in prompt
        for example in re.findall(r"Input: (.*)\nOutput:\n((?:.+\n)+)", prompt):
            assert example[1].strip() == right[example[0]]
    texts = {asked_text(prompt) for prompt in prompts}
    assert len(texts) == 12 and len(prompts) == 3 * 12 and texts.isdisjoint(text for one in shown for text in one)
    table = (tmp_path / "results.md").read_text()
    assert re.search(r"\| travel_desk +\| llm, in context +\| 2 +\| 100.0 +\| 100.0 ± 0.0 +\|", table)
    assert "scored on 12 of the 199 sentences" in table and "k = 0: definitions only" in table
    assert "llm, travel_desk: 36 answers with" in table


def test_an_encoder_and_a_model_are_compared_on_the_same_samples(tmp_path, material):  # noqa: F811
    sets = {"voyages": {"path": str(material / "voyages"), "definitions": {"city": "a city with a harbour"}}}
    data = datasets.load({"name": "voyages", "path": str(material / "voyages")})
    right = {record.text: answer_of(record) for record in data.test}
    with server_of(right.__getitem__) as server:
        config = make_config(server, encoder=str(material / "one"), baseline="llm")
        config.sets = sets
        config.head.steps = 5
        results = evaluate(config, tmp_path)
    hashes = {(row["k"], row["seed"], row["sample_hash"]) for row in results.rows}
    assert len(results.rows) == 3 + 2 and len(hashes) == 3 and not results.missing
    table = (tmp_path / "results.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines() if line.startswith("|")]
    systems = [line[0] for line in lines]
    assert systems[2:5] == ["llm, in context", "encoder", "… minus llm"]
    assert lines[2][2:] == ["100.0", "100.0 ± 0.0"] and lines[3][2] == lines[4][2] == "–"
    assert lines[4][3].startswith("-")
    manifest = json.loads((tmp_path / "results.json").read_text())["manifest"]
    assert manifest["config"]["llms"]["llm"]["endpoint"]["model"] == "fake-model"


def test_each_head_of_each_encoder_is_compared_with_the_baseline_whatever_that_is():
    sizes = {"sets": ("a",), "encoders": ("x", "y"), "heads": ("linear", "mlp"), "k": (0, 4), "seeds": (0, 1)}
    for baseline, rival in {
        "llm": {("x", "linear"): "llm, in context", ("y", "mlp"): "llm, in context", ("llm", "in context"): None},
        "y": {("x", "mlp"): "y, mlp", ("llm", "in context"): "y, linear", ("y", "linear"): None},
    }.items():
        grid = Grid(**sizes, rule="k~2k", baseline=baseline, llms=("llm",))
        found = {system: grid.rival_of(*system) for system in rival}
        assert {system: one and grid.name_of(*one) for system, one in found.items()} == rival
        assert len(list(grid.runs())) == 2 * 2 * 2 + 3


def test_lines_of_no_use_are_counted_and_told(tmp_path, right):
    def answer(text):
        lines = [line.replace("<> origin", "<> harbour") for line in right[text].split("\n")]
        return "\n".join([*lines, "Atlantis <> destination", "I hope this helps!"])

    with server_of(answer) as server:
        results = evaluate(make_config(server), tmp_path)
    (row, *_) = results.rows
    asked = {asked_text(prompt) for prompt in server.attempts()}
    origins = sum(right[text].count("<> origin") for text in asked)
    nothing = sum(right[text] == "none" for text in asked)
    assert origins > 0
    assert row["answers"]["left_out"] == {
        "no_delimiter": 12 + nothing,
        "unknown_type": origins,
        "not_in_text": 12,
    }
    assert row["per_type"]["token_macro_f1"]["origin"]["f1"] == 0.0
    assert row["entity_precision"] == 1.0 > row["entity_recall"]
    told = (tmp_path / "results.md").read_text()
    assert f"not in text 36, unknown type {3 * origins}" in told


@pytest.mark.parametrize(
    ("text", "answer", "mentions", "left_out"),
    [
        ("Lima and Lima.", "Lima <> city", ["0-4 city", "9-13 city"], {}),
        ("Lima and Lima.", "Lima <> city\nLima <> city", ["0-4 city", "9-13 city"], {}),
        ("Lima, Lima, Lima", "Lima <> city\nLima <> city\nLima <> name", ["0-4 city", "6-10 city", "12-16 name"], {}),
        ("Lima and Lima.", "Lima <> name\nLima <> city\nLima <> name", ["0-4 name", "9-13 city"], {"no_place_left": 1}),
        ("Lima Times of Lima", "Lima Times <> name\nLima <> city", ["0-10 name", "14-18 city"], {}),
        ("the Lima Times", "Lima Times <> name\nLima <> city", ["4-14 name"], {"overlapping": 1}),
        ("lima in May", "Lima <> CITY\nMay <> travel date", ["0-4 city", "8-11 travel_date"], {}),
        ("Lima", "- **Lima** <> `city`", ["0-4 city"], {}),
        ("Lima", "None.", [], {}),
        ("Lima", "```\nLima <> city\n```", ["0-4 city"], {}),
        ("Lima", "Lima <> town\nQuito <> city\nhello", [], {"unknown_type": 1, "not_in_text": 1, "no_delimiter": 1}),
    ],
)
def test_an_answer_becomes_mentions(text, answer, mentions, left_out):
    found = read_answer(answer, text, TypeNames(["city", "name", "travel_date"]))
    assert [f"{one.start}-{one.end} {one.concept}" for one in found.record.entities] == mentions
    assert found.left_out == left_out


def test_the_last_line_of_an_answer_that_was_cut_is_not_trusted():
    found = read_answer("Lima <> city\nQuito <> ci", "Lima, Quito", TypeNames(["city", "ci"]), cut=True)
    assert [one.start for one in found.record.entities] == [0] and found.left_out == {"cut_off": 1}


def test_types_that_differ_in_case_alone_have_to_be_written_exactly():
    types = TypeNames(["Gene", "gene"])
    assert [types.find(name) for name in ("Gene", "gene", "GENE")] == ["Gene", "gene", None]


def test_the_right_answers_about_the_embedded_sets_give_their_mentions_back():
    for name in SETS:
        data = datasets.load({"name": name})
        types = TypeNames(data.types)
        for record in data.test:
            found = read_answer(answer_of(record), record.text, types)
            mentions = [(one.start, one.end, one.concept) for one in record.entities]
            assert [(one.start, one.end, one.concept) for one in found.record.entities] == mentions
            assert not found.left_out


def test_no_more_examples_are_shown_than_the_config_says(tmp_path, right):
    with server_of(right.__getitem__) as server:
        config = make_config(server, **{"llms.llm.examples": 3, "k": (2,)})
        results = evaluate(config, tmp_path)
        counts = {prompt.count("\nOutput:\n") for prompt in server.attempts()}
    assert counts == {3} and {row["answers"]["examples"] for row in results.rows} == {3}
    assert "of larger samples the first 3 sentences are shown" in (tmp_path / "results.md").read_text()


# --- Interruptions and money -------------------------------------------------------------------


def start(server, workdir):
    command = [sys.executable, "-m", "nuner_jax.fewshot", "--config=configs/fewshot_llm.py", f"--workdir={workdir}"]
    of_llm = {
        "endpoint.base_url": server.base_url,
        "endpoint.model": "fake-model",
        "endpoint.key_variable": "FEWSHOT_TEST_KEY",
        "price.input": 1,
        "price.output": 2,
    }
    command += [f"--config.llms.llm.{key}={value}" for key, value in of_llm.items()]
    command += ["--config.k=(0,2)", "--config.seeds=1", "--config.eval.max_sentences=30"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def done_prompts(workdir):
    with Journal.open(workdir / "llms" / "llm" / "journal.sqlite", read_only=True) as journal:
        return {one.text for one in journal.completions() if one.state == "done"}


def test_a_run_that_is_killed_asks_nothing_again_that_was_answered(tmp_path, right, root, monkeypatch):
    monkeypatch.chdir(root)
    with server_of(right.__getitem__, delay=0.05) as server:
        process = start(server, tmp_path)
        while server.requests < 60:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.kill()
        process.wait(60)
        before = done_prompts(tmp_path)
        assert 0 < len(before) < 120
        again = start(server, tmp_path)
        said = again.communicate(timeout=120)[0]
        assert again.returncode == 0, said
        attempts = server.attempts()
    assert len(done_prompts(tmp_path)) == len(attempts) == 2 * 2 * 30
    assert {attempts[prompt] for prompt in before} == {1}
    rows = read_rows(tmp_path / "results.jsonl")
    assert len(rows) == 2 * 2 and all(row["entity_f1"] == 1.0 for row in rows)
    assert "llm, in context" in said and KEY not in said


def test_a_signal_ends_the_asking_and_the_same_command_goes_on(tmp_path, right):
    with server_of(right.__getitem__, delay=0.02) as server:
        config = make_config(server, **{"llms.llm.request.max_concurrency": 4})
        after_requests(server, 14, os.kill, os.getpid(), signal.SIGTERM)
        results = evaluate(config, tmp_path)
        assert 14 <= server.requests < 36 and [row["k"] for row in results.rows] == [0]
        assert not (tmp_path / "results.md").exists()
        assert not evaluate(config, tmp_path).missing
        assert set(server.attempts().values()) == {1}


def test_a_second_start_needs_no_server(tmp_path, right):
    with server_of(right.__getitem__) as server:
        config = make_config(server)
        first = evaluate(config, tmp_path).rows
    assert evaluate(config, tmp_path).rows == first
    (tmp_path / "results.jsonl").unlink()  # the journal has all the answers
    assert [row["entity_f1"] for row in evaluate(config, tmp_path).rows] == [1.0] * 3


def test_the_budget_is_never_exceeded_and_a_higher_one_goes_on(tmp_path, right):
    console = Lines()
    with server_of(right.__getitem__) as server:
        config = make_config(server, **{"llms.llm.request.budget": 0.012, "llms.llm.request.max_concurrency": 4})
        results = evaluate(config, tmp_path, console)
        bill = server.billed
        assert 0 < Prices.make(config.llms.llm).of(Usage(bill.prompt, bill.completion, bill.cached)) <= 0.012e12
        assert [row["k"] for row in results.rows] == [0] and len(results.missing) == 2
        assert "raise config.llms.llm.request.budget to go on" in "\n".join(console.lines)
        assert "INCOMPLETE" in (tmp_path / "results.md").read_text()
        config.llms.llm.request.budget = 1.0
        assert not evaluate(config, tmp_path).missing
        assert set(server.attempts().values()) == {1}


def test_sentences_without_an_answer_count_as_empty_and_may_be_asked_again(tmp_path, right):
    refused = []

    def script(prompts, attempt):
        return "refusal" if asked_text(prompts[0]) in refused and attempt == 1 else None

    test = datasets.load({"name": "travel_desk"}).test
    with server_of(right.__getitem__, script=script) as server:
        config = make_config(server, k=(0,), **{"eval.max_sentences": None})
        refused += [record.text for record in test if len(record.entities) > 3][:2]
        (row,) = evaluate(config, tmp_path).rows
        assert row["answers"]["failed"] == 2 and row["entity_precision"] == 1.0 > row["entity_recall"]
        assert "2 sentences without an answer count as without entities" in (tmp_path / "results.md").read_text()
        config.llms.llm.request.retry_failed = True
        # An encoder that once had the model's name has rows too, and no answers.
        other = {key: value for key, value in row.items() if key != "answers"} | {"head": "mlp"}
        append_rows(tmp_path / "results.jsonl", [other])
        (row,) = evaluate(config, tmp_path).rows
        assert row["answers"]["failed"] == 0 and row["entity_f1"] == 1.0
        assert sum(server.attempts().values()) == len(test) + 2


def test_the_batch_api_answers_the_same(tmp_path, right):
    with server_of(right.__getitem__) as server:
        config = make_config(server, **{"llms.llm.endpoint.kind": "batch", "llms.llm.batch.poll": 0.01})
        results = evaluate(config, tmp_path)
        assert {entry.batch != "" for entry in server.log} == {True}
    assert [row["entity_f1"] for row in results.rows] == [1.0] * 3


def test_the_same_prompt_of_two_samples_is_asked_once(tmp_path, right):
    with server_of(right.__getitem__) as server:
        config = make_config(server, k=(500,))  # more than the pool has, so both seeds draw all of it
        rows = evaluate(config, tmp_path).rows
        assert len(rows) == 2 and server.requests == 12


# --- Before anything is asked ------------------------------------------------------------------


def test_a_dry_run_shows_prompts_and_cost_and_asks_nothing(tmp_path, right):
    console = Lines()
    with server_of(right.__getitem__) as server:
        evaluate(make_config(server), tmp_path, console, dry_run=True)
        assert server.requests == 0
    said = "\n".join(console.lines)
    assert "Find" not in said and "The goal is to find the named entities" in said
    assert said.count("--- request") == 3 and "\nOutput:\n" in said  # with examples too
    assert re.search(r"36 requests: .* prompt tokens", said) and re.search(r"between \$0\.\d+ and \$0\.\d+", said)
    assert "config.llms.llm.request.pilot" in said
    assert not (tmp_path / "llms").exists() and not (tmp_path / "results.jsonl").exists()


def test_other_definitions_in_the_same_workdir_are_refused(tmp_path, right):
    with server_of(right.__getitem__) as server:
        config = make_config(server)
        evaluate(config, tmp_path)
        config.sets.travel_desk.definitions.hotel = "a place to sleep"
        with pytest.raises(NunerError, match="results of llm on travel_desk with other .* definitions"):
            evaluate(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llms.llm.endpoint.model": None}, "config.llms.llm.endpoint.model is not set"),
        ({"llms.llm.endpoint.model": "fake-modle"}, r"no model 'fake-modle' \(config.llms.llm.endpoint.model\)"),
        (
            {"llms.llm.endpoint.key_variable": "NO_SUCH_KEY"},
            "variable NO_SUCH_KEY is not set.*config.llms.llm.endpoint",
        ),
        ({"llms.llm.endpoint.base_url": "http://127.0.0.1:9/v1"}, "cannot be reached.*config.llms.llm.endpoint"),
        ({"llms.llm.endpoint.base_url": "http://a:b@127.0.0.1/v1"}, "config.llms.llm.endpoint.base_url holds"),
        ({"llms.llm.endpoint.kind": "replay"}, "config.llms.llm.endpoint.kind = 'replay': choose one of"),
        ({"llms.llm.request.max_concurrency": 0}, "config.llms.llm.request.max_concurrency = 0: at least 1"),
        ({"llms.llm.examples": -1}, "config.llms.llm.examples = -1"),
        ({"llms.llm.price.input": None, "llms.llm.request.budget": 1.0}, "set config.llms.llm.price.input"),
        (
            {"sets.travel_desk.definitions": {"hotels": "x"}},
            "definitions: travel_desk has no type 'hotels'; did you mean",
        ),
        ({"sets.travel_desk.definitions": {"hotel": " "}}, "the meaning of 'hotel' is ' '"),
        ({"sets.travel_desk.definitions": "nowhere.json"}, "definitions: nowhere.json cannot be read as JSON"),
        ({"llms": {"a/b": config_lib.llm()}}, "config.llms.a/b: the name"),
        ({"llms": {"one": {"model": "x"}}}, "config.llms.one.*key is missing"),
        ({"encoders": {"llm": "x"}}, "config.llms.llm: an encoder has the same name"),
        ({"baseline": "gpt"}, "config.baseline = 'gpt': not among config.encoders and config.llms, llm"),
        ({"k": (-1, 2)}, "config.k = .* at least 0"),
        ({"k": (0,), "encoders": {"encoder": "x"}}, "an encoder needs mentions to learn from"),
    ],
)
def test_mistakes_are_named_before_anything_is_asked_or_computed(tmp_path, right, monkeypatch, change, message):
    monkeypatch.setattr(frozen, "word_features", lambda *_, **__: pytest.fail("it was computed"))
    with server_of(right.__getitem__) as server:
        config = make_config(server)
        for key, value in change.items():
            *path, last = key.split(".")
            section = config
            for name in path:
                section = section[name]
            with section.unlocked():
                if last in section:
                    del section[last]
                section[last] = value
        with pytest.raises(NunerError, match=message):
            evaluate(config, tmp_path)
        assert server.requests == 0 and not (tmp_path / "llms").exists()


def test_definitions_may_stand_in_a_file_and_types_without_one_are_told_in_words(tmp_path, right):
    path = tmp_path / "meanings.json"
    path.write_text(json.dumps({"hotel": "a place\nto sleep"}))
    with server_of(right.__getitem__) as server:
        config = make_config(server)
        config.sets.travel_desk = {"definitions": str(path)}
        evaluate(config, tmp_path / "run")
        prompt = next(iter(server.attempts()))
    assert "\nhotel: a place to sleep\n" in prompt
    assert "\norigin\n" in prompt and "\ntravel_date: travel date\n" in prompt
