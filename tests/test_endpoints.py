"""Endpoints: what comes over the wire, what is said before any work, and recordings in place of a server."""

import asyncio
import gzip
import json
import socket
import struct
import sys
import threading
import time

import pytest
from fake_openai import FakeOpenAI

from nuner_jax.annotate.request.answers import (
    EndpointFault,
    EndpointStop,
)
from nuner_jax.annotate.request.endpoints import LiveEndpoint, ReplayEndpoint
from nuner_jax.annotate.units import Usage
from nuner_jax.config import annotate_schema
from nuner_jax.data.importers.stream import SAMPLE_FILE
from nuner_jax.errors import NunerError

KEY = "sk-test-0123456789-secret"
BODY = {"model": "fake-model", "messages": [{"role": "user", "content": "Input: A text"}], "max_completion_tokens": 9}


GOOD = json.dumps({"choices": [{"message": {"content": "A <> b <> c"}}]}).encode()


def make_config(base_url="http://127.0.0.1:9/v1", **request):
    config = annotate_schema.annotate()
    config.endpoint.update(base_url=base_url, model="fake-model", key_variable="ANSWERS_TEST_KEY")
    config.request.update(request)
    return config


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("ANSWERS_TEST_KEY", KEY)


# --- The wire ----------------------------------------------------------------------------------


def whole(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


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
    "the key where it is cut": (whole(b"x" * 70 + KEY.encode()), "truncated_json"),
    "JSON with the key where it is cut": (whole(b'{"models": "%s%s"}' % (b"x" * 60, KEY.encode())), "malformed_answer"),
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
    assert KEY[:10] not in str(fault) and len(str(fault)) < 400


def test_the_key_is_blotted_out_as_some_servers_write_it_in_json(monkeypatch):
    monkeypatch.setenv("ANSWERS_TEST_KEY", "ab/cd+0123/ef")
    answer = whole(rb'{"error": {"message": "no ab\/cd+0123\/ef here"}}', "401 No")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_once, args=(listener, answer))
        thread.start()
        with pytest.raises(EndpointStop, match=r"It said: no \[key\] here"):
            ask_live(make_config(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"))
        thread.join()


def test_an_error_with_status_200_stops_the_run_if_its_reason_does():
    body = json.dumps({"error": {"code": 402, "message": "no credit"}}).encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_once, args=(listener, whole(body)))
        thread.start()
        with pytest.raises(EndpointStop, match="no credit left"):
            ask_live(make_config(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"))
        thread.join()


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
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"authorization: Bearer {KEY}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
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
    assert KEY.encode() not in sent[0] and b"Bearer no-key" in sent[0]  # and it was sent where the config says


@pytest.mark.parametrize("url", ["localhost:8000/v1", "", "ftp://host/v1", "http://host:99999/v1", "http://[bad"])
def test_what_is_no_address_is_named(url):
    with pytest.raises(NunerError, match="config.endpoint.base_url.*not an address"):
        check_live(make_config(url))


@pytest.mark.parametrize("url", ["http://me:hunter2@host/v1", "http://hunter2@[bad", "https://host/v1?key=hunter2"])
def test_an_address_with_a_secret_in_it_is_refused_and_not_shown(monkeypatch, url):
    for key in (KEY, ""):  # what is said of a missing key comes later
        monkeypatch.setenv("ANSWERS_TEST_KEY", key)
        with pytest.raises(NunerError, match=r"config\.endpoint\.base_url holds") as caught:
            check_live(make_config(url))
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("variable", "value"), [("ALL_PROXY", "foo://me:hunter2@host:3"), ("SSL_CERT_FILE", "/none")])
def test_settings_of_the_environment_that_cannot_be_used_are_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(NunerError, match=variable) as caught:
        check_live(make_config())
    assert "hunter2" not in str(caught.value)


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
