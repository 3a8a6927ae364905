"""What endpoints say: answers, faults that pass, errors that stop; from JSON, from the wire, and from recordings."""

import asyncio
import email.utils
import gzip
import json
import socket
import struct
import sys
import threading
import time

import pytest
from fake_openai import FakeOpenAI

from nuner_jax.annotate.answers import (
    EndpointFault,
    EndpointStop,
    MalformedAnswer,
    fault_outcomes,
    judge,
    message_of,
    read_answer,
    retry_after,
    status_error,
)
from nuner_jax.annotate.endpoints import LiveEndpoint, ReplayEndpoint
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.units import Answer, Pending, Usage
from nuner_jax.config import annotate_schema
from nuner_jax.data.importers.stream import SAMPLE_FILE
from nuner_jax.errors import NunerError

KEY = "sk-test-0123456789-secret"
BODY = {"model": "fake-model", "messages": [{"role": "user", "content": "Input: A text"}], "max_completion_tokens": 9}


def completion(content="A <> b <> c", finish="stop", refusal=None, usage=(100, 20)):
    payload = {
        "id": "chatcmpl-7",
        "choices": [{"index": 0, "message": {"content": content, "refusal": refusal}, "finish_reason": finish}],
    }
    if usage:
        payload["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return payload


def pending(count, attempts=0):
    return [Pending(at, f"unit{at}", f"text {at}", attempts) for at in range(count)]


def make_config(base_url="http://127.0.0.1:9/v1", **request):
    config = annotate_schema.annotate()
    config.endpoint.update(base_url=base_url, model="fake-model", key_variable="ANSWERS_TEST_KEY")
    config.request.update(request)
    return config


@pytest.fixture(scope="module")
def prompt():
    return Prompt.make(make_config().prompt)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("ANSWERS_TEST_KEY", KEY)


# --- Answers -----------------------------------------------------------------------------------


def test_an_answer_is_read_whole():
    payload = completion()
    payload["usage"]["prompt_tokens_details"] = {"cached_tokens": 64}
    assert read_answer(payload) == Answer("chatcmpl-7", "A <> b <> c", "stop", "", Usage(100, 20, 64))


@pytest.mark.parametrize(
    ("payload", "text", "usage"),
    [
        (completion(content=None), "", Usage(100, 20)),
        (
            completion(content=[{"type": "text", "text": "A <> "}, {"type": "text", "text": "b"}]),
            "A <> b",
            Usage(100, 20),
        ),
        (completion(usage=None), "A <> b <> c", Usage()),
        (completion() | {"usage": None}, "A <> b <> c", Usage()),
        (completion() | {"choices": []}, "", Usage(100, 20)),
        (completion() | {"choices": [{}]}, "", Usage(100, 20)),
        (completion() | {"error": None, "id": None}, "A <> b <> c", Usage(100, 20)),
        (completion(content="caf\ud83d"), "caf?", Usage(100, 20)),
    ],
)
def test_what_servers_leave_out_or_add_is_borne(payload, text, usage):
    answer = read_answer(payload)
    assert (answer.text, answer.usage) == (text, usage)
    answer.text.encode()


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        "text",
        {},
        {"choices": None},
        {"choices": ["A"]},
        {"choices": [{"message": "A"}]},
        completion(content=7),
        completion(usage=("many", 2)),
        completion(usage=(-1, 2)),
        completion(usage=(True, 2)),
        {"error": {"message": "overloaded"}, "choices": []},
    ],
)
def test_json_of_another_form_is_malformed(payload):
    with pytest.raises(MalformedAnswer):
        read_answer(payload)


def outcome_of(prompt, *, attempts=0, count=1, **given):
    outcomes = judge(read_answer(completion(**given)), prompt, pending(count, attempts), 3)
    return [(outcome.state, outcome.error.split(":")[0], outcome.finish) for outcome in outcomes]


def test_judging_an_answer_to_one_unit(prompt):
    assert outcome_of(prompt) == [("done", "", "stop")]
    assert outcome_of(prompt, finish="length") == [("done", "", "length")]
    assert outcome_of(prompt, content=" \n") == [("retry", "empty_answer", "stop")]
    assert outcome_of(prompt, content=" \n", attempts=2) == [("failed", "empty_answer", "stop")]
    assert outcome_of(prompt, content="", finish="length") == [("failed", "no_room", "length")]
    assert outcome_of(prompt, content=None, refusal="I cannot.") == [("failed", "refusal", "stop")]
    assert outcome_of(prompt, finish="content_filter") == [("failed", "content_filter", "content_filter")]
    assert outcome_of(prompt, attempts=2) == [("done", "", "stop")]


def test_units_that_an_answer_leaves_out_are_asked_again(prompt):
    content = "1.\nA <> b <> c\n\n3.\nD <> e <> f"
    done, missing = ("done", "", "stop"), ("retry", "missing_in_answer", "stop")
    assert outcome_of(prompt, content=content, count=3) == [done, missing, done]
    assert outcome_of(prompt, content=content, count=3, attempts=2)[1] == ("failed", "missing_in_answer", "stop")


def test_of_many_units_only_the_last_part_of_a_cut_answer_is_cut(prompt):
    content = "1.\nA <> b <> c\n\n2.\nD <> e <> "
    states = outcome_of(prompt, content=content, count=3, finish="length")
    assert states == [("done", "", "stop"), ("done", "", "length"), ("retry", "missing_in_answer", "length")]


def test_a_refusal_of_many_units_is_not_yet_one_of_each(prompt):
    assert outcome_of(prompt, content="", refusal="No.", count=2) == [("retry", "refusal", "stop")] * 2
    assert outcome_of(prompt, content="", refusal="No.", count=2, attempts=2) == [("failed", "refusal", "stop")] * 2


def test_faults_are_retried_until_attempts_are_used_up():
    passing, final = EndpointFault("timeout", retry=True), EndpointFault("bad_request", "HTTP 400: no", retry=False)
    assert [o.state for o in fault_outcomes(pending(2, 1), passing, 3)] == ["retry", "retry"]
    assert [o.state for o in fault_outcomes(pending(2, 2), passing, 3)] == ["failed", "failed"]
    assert [(o.state, o.error) for o in fault_outcomes(pending(1), final, 3)] == [
        ("failed", "bad_request: HTTP 400: no")
    ]
    assert [o.state for o in fault_outcomes(pending(2), final, 3)] == ["retry", "retry"]


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "reason", "retry"),
    [
        (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, "rate_limited", True),
        (503, "<html><h1>Service  Unavailable</h1></html>", "overloaded", True),
        (529, {}, "overloaded", True),
        (500, {"detail": "oops"}, "server_error", True),
        (502, "", "server_error", True),
        (408, "", "server_error", True),
        (409, "", "server_error", True),
        (400, {"error": {"message": "too long"}}, "bad_request", False),
        (413, "", "bad_request", False),
        (422, {"detail": [{"msg": "field required"}]}, "bad_request", False),
        (400, {"error": {"message": "filtered", "code": "content_filter"}}, "content_filter", False),
    ],
)
def test_statuses_that_are_faults_of_one_request(status, body, reason, retry):
    fault = status_error(status, body, {}, make_config().endpoint)
    assert isinstance(fault, EndpointFault)
    assert (fault.reason, fault.retry, fault.billed) == (reason, retry, "no")
    assert message_of(body) in fault.detail and "<" not in fault.detail


@pytest.mark.parametrize(
    ("status", "body", "named"),
    [
        (401, {"error": {"message": "Incorrect API key"}}, ["ANSWERS_TEST_KEY", "Incorrect API key", "127.0.0.1"]),
        (403, "no", ["ANSWERS_TEST_KEY", "fake-model"]),
        (404, {"error": {"message": "no such model"}}, ["'fake-model'", "127.0.0.1:9/v1", "no such model"]),
        (400, {"error": {"code": "model_not_found", "message": "?"}}, ["'fake-model'"]),
        (402, "", ["credit"]),
        (429, {"error": {"message": "quota", "type": "insufficient_quota", "code": None}}, ["credit", "quota"]),
    ],
)
def test_statuses_that_stop_the_run(status, body, named):
    stop = status_error(status, body, {}, make_config().endpoint)
    assert isinstance(stop, EndpointStop)
    assert all(name in str(stop) for name in named), str(stop)


def test_messages_are_one_short_line():
    assert message_of({"error": {"message": "a\n b" + "x" * 1000}}).startswith("a bxxx")
    assert len(message_of("x" * 1000)) == 300
    assert message_of({"object": "error", "message": "vLLM's form", "code": 400}) == "vLLM's form"
    assert message_of({"error": "Ollama's form"}) == "Ollama's form"
    assert message_of(None) == message_of({}) == message_of("") == ""


def test_retry_after_in_all_its_forms():
    at = email.utils.formatdate(1_700_000_010, usegmt=True)
    assert retry_after({}) is None
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "3", "retry-after-ms": "20"}) == 0.02
    assert retry_after({"retry-after": at, "date": email.utils.formatdate(1_700_000_000, usegmt=True)}) == 10
    assert retry_after({"retry-after": at}) == 0
    soon = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 95 < retry_after({"retry-after": soon}) <= 100
    for nonsense in ("soon", "-3", "nan", "inf", ""):
        assert retry_after({"retry-after": nonsense}) is None


# --- The wire ----------------------------------------------------------------------------------


def whole(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


GOOD = json.dumps(completion()).encode()
WIRE = {
    "connection closed without a word": (b"", "connection"),
    "cut in the headers": (b"HTTP/1.1 200 OK\r\nConte", "connection"),
    "cut in the body": (whole(GOOD)[:-20], "connection"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.0\r\n", "connection"),
    "broken compression": (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\nhi", "connection"),
    "half of the JSON": (whole(GOOD[:40]), "truncated_json"),
    "a web page": (whole(b"<html>Log in</html>"), "truncated_json"),
    "nothing": (whole(b""), "truncated_json"),
    "not UTF-8": (whole(b'{"choices": "\xe9"}'), "truncated_json"),
    "JSON without end": (whole(b"[" * 100_000), "truncated_json"),
    "JSON of another form": (whole(b'{"models": []}'), "malformed_answer"),
    "an error with status 200": (whole(b'{"error": {"message": "your key %s"}}' % KEY.encode()), "malformed_answer"),
    "its page, with the key": (whole(KEY.encode()), "truncated_json"),
    "reset": (None, "connection"),
    "a byte now and then": (iter, "timeout"),
}


def serve_once(listener: socket.socket, answer) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        if answer is None:  # close with a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif answer is iter:
            connection.sendall(whole(GOOD)[:-50])
            for _ in range(10):
                time.sleep(0.05)
                try:
                    connection.sendall(b" ")
                except OSError:
                    return
        else:
            connection.sendall(answer)


def ask_live(config, body=BODY):
    async def ask():
        endpoint = LiveEndpoint(config)
        endpoint._connect()  # as `check` does, for which these servers have no answer
        try:
            return await endpoint.ask(body, ["A text"])
        finally:
            await endpoint.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("name", WIRE)
def test_whatever_comes_over_the_wire_is_a_fault_that_may_have_been_billed(name):
    answer, reason = WIRE[name]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_once, args=(listener, answer))
        thread.start()
        with pytest.raises(EndpointFault) as caught:
            ask_live(make_config(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout=0.3))
        thread.join()
    fault = caught.value
    assert (fault.reason, fault.retry, fault.billed) == (reason, True, "unknown")
    assert KEY not in str(fault) and len(str(fault)) < 400


def test_a_request_that_was_never_sent_was_not_billed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(EndpointFault) as caught:
        ask_live(make_config(f"http://127.0.0.1:{port}/v1"))
    assert (caught.value.reason, caught.value.billed, caught.value.retry) == ("unreachable", "no", True)


def test_the_body_is_sent_as_it_is_with_the_key_and_nothing_is_retried():
    seen = []

    def find(body):
        seen.append(body)
        return ["A text"]

    with FakeOpenAI(key=KEY, find=find, faults={"error_500": 1.0}) as server:
        body = BODY | {"seed": 7, "vendor": {"top_k": 3}}
        with pytest.raises(EndpointFault, match="server_error: HTTP 500: The fake endpoint says"):
            ask_live(make_config(server.base_url), body)
    assert seen == [body]


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_key_that_the_server_quotes_is_blotted_out(status):
    quoted = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}."}}).encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer = whole(quoted, f"{status} No")
        thread = threading.Thread(target=serve_once, args=(listener, answer))
        thread.start()
        with pytest.raises((EndpointFault, EndpointStop)) as caught:
            ask_live(make_config(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"))
        thread.join()
    assert "Incorrect API key provided: [key]." in str(caught.value)
    assert KEY not in str(caught.value)


# --- Before any work ---------------------------------------------------------------------------


def check_live(config):
    async def check():
        endpoint = LiveEndpoint(config)
        try:
            await endpoint.check()
        finally:
            await endpoint.close()

    asyncio.run(check())


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(NunerError, match=r"openai is missing.*pip install 'nuner_jax\[annotate\]'"):
        check_live(make_config())


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_a_missing_key_is_named(monkeypatch, value):
    monkeypatch.delenv("ANSWERS_TEST_KEY")
    if value is not None:
        monkeypatch.setenv("ANSWERS_TEST_KEY", value)
    with pytest.raises(NunerError, match="ANSWERS_TEST_KEY is not set.*config.endpoint.key_variable"):
        check_live(make_config())


def test_a_key_with_a_line_break_inside_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("ANSWERS_TEST_KEY", "sk-one\nsk-two")
    with pytest.raises(NunerError, match="ANSWERS_TEST_KEY") as caught:
        check_live(make_config())
    assert "sk-" not in str(caught.value)


def test_a_server_without_keys_gets_none_of_ours(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = make_config(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        config.endpoint.key_variable = ""
        sent = []

        def serve():
            connection, _ = listener.accept()
            with connection:
                sent.append(connection.recv(65536))
                connection.sendall(whole(GOOD))

        thread = threading.Thread(target=serve)
        thread.start()
        answer, _ = ask_live(config)
        thread.join()
    assert answer.text == "A <> b <> c"
    assert KEY.encode() not in sent[0] and b"Bearer no-key" in sent[0]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "ftp://host/v1", "http://host:99999/v1", "http://[bad"])
def test_what_is_no_address_is_named(url):
    with pytest.raises(NunerError, match="config.endpoint.base_url.*not an address"):
        check_live(make_config(url))


def test_a_server_that_is_down_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with pytest.raises(NunerError, match=f"{url} cannot be reached.*vllm serve fake-model"):
        check_live(make_config(url))


def test_an_unknown_model_is_named_with_the_nearest_ones():
    models = ["zzz", "fake-model-2", *(f"other{n}" for n in range(20))]
    with (
        FakeOpenAI(key=KEY, models=models) as server,
        pytest.raises(NunerError, match=r"no model 'fake-model' .*; it has fake-model-2, .* and 14 more"),
    ):
        check_live(make_config(server.base_url))


@pytest.mark.parametrize("listed", ["fake-model", "fake-model:latest", "models/fake-model"])
def test_names_that_servers_take_for_the_model(listed):
    with FakeOpenAI(key=KEY, models=[listed]) as server:
        check_live(make_config(server.base_url))


def test_a_wrong_key_stops_at_once():
    with FakeOpenAI(key="another") as server, pytest.raises(EndpointStop, match="ANSWERS_TEST_KEY"):
        check_live(make_config(server.base_url))


@pytest.mark.parametrize("answer", [whole(b"", f"{status} No") for status in (403, 404, 405, 501)] + [whole(b"hi")])
def test_a_server_without_a_list_of_models_passes(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_once, args=(listener, answer))
        thread.start()
        check_live(make_config(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"))
        thread.join()


# --- Recordings --------------------------------------------------------------------------------


def replay(name, *texts):
    async def ask():
        endpoint = ReplayEndpoint(name)
        await endpoint.check()
        return [(await endpoint.ask({}, [text]))[0] for text in texts]

    return asyncio.run(ask())


def test_recordings_answer_by_text_and_cost_nothing():
    with gzip.open(SAMPLE_FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:5]
    answers = replay("sample", *(row["text"] for row in rows), f"  {rows[0]['text']}\n")
    assert [answer.text for answer in answers] == [row["completion"] for row in [*rows, rows[0]]]
    assert all(answer.usage == Usage() and answer.finish == "stop" for answer in answers)


def test_a_text_without_a_recording_fails_for_good():
    with pytest.raises(EndpointFault) as caught:
        replay("sample", "This was never asked.")
    assert (caught.value.reason, caught.value.retry) == ("not_recorded", False)


@pytest.mark.parametrize("row", ['{"input": "a", "output": []}', '{"text": "a", "completion": 7}', "{broken"])
def test_a_file_that_holds_no_recordings_is_named_with_its_line(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "completion": "b"}\n' + row + "\n")
    with pytest.raises(NunerError, match=r"rows\.jsonl:2"):
        replay(str(path))
