"""What endpoints say, judged: answers, faults that pass, and errors that stop a run."""

import email.utils
import time

import pytest

from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request.answers import (
    EndpointFault,
    EndpointStop,
    MalformedAnswer,
    error_within,
    fault_outcomes,
    judge,
    message_of,
    read_answer,
    retry_after,
    status_error,
)
from nuner_jax.annotate.units import Answer, Pending, Usage
from nuner_jax.config import annotate_schema

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
        (completion() | {"usage": {"prompt_tokens": 100}}, "A <> b <> c", Usage()),
        (completion(usage=("many", 2)), "A <> b <> c", Usage()),
        (completion(usage=(-1, 2)), "A <> b <> c", Usage()),
        (completion(usage=(True, 2)), "A <> b <> c", Usage()),
        (completion(usage=(100, 20.5)), "A <> b <> c", Usage()),
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
    whole, cut, missing = ("done", "", "stop"), ("done", "", "length"), ("retry", "missing_in_answer", "length")
    assert outcome_of(prompt, content=content, count=3, finish="length") == [whole, cut, missing]
    swapped = "2.\nD <> e <> f\n\n1.\nA <> b <> "
    assert outcome_of(prompt, content=swapped, count=2, finish="length") == [cut, whole]
    equal = "1.\nA <> b <> c\n\n2.\nA <> b <> c"
    assert outcome_of(prompt, content=equal, count=2, finish="length") == [whole, cut]


def test_a_part_of_which_only_the_heading_came_is_no_answer(prompt):
    content = "1.\n\n2.\nA <> b <> c\n\n3."
    whole, missing = ("done", "", "stop"), ("retry", "missing_in_answer", "length")
    assert outcome_of(prompt, content=content, count=3, finish="length") == [whole, whole, missing]
    assert outcome_of(prompt, content=content, count=3) == [whole] * 3  # the model found nothing in two of them


def test_the_parts_of_a_json_answer_that_was_cut_are_whole(prompt):
    row = '{"entity": "A", "concept": "b", "description": "c"}'
    content = f'{{"sentences": [{{"number": 1, "entities": [{row}]}}, {{"number": 2, "entities": [{row}, {{"ent'
    assert outcome_of(prompt, content=content, count=2, finish="length") == [
        ("done", "", "stop"),
        ("retry", "missing_in_answer", "length"),
    ]


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
        (504, "", "server_error", True),
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
    # Who stands before a server does not know how far it came.
    assert (fault.reason, fault.retry, fault.billed) == (
        reason,
        retry,
        "unknown" if status in (408, 502, 504) else "no",
    )
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


def test_an_error_with_status_200_is_what_it_says_but_may_have_been_billed():
    endpoint = make_config().endpoint
    limited = error_within({"error": {"code": 429, "message": "slow down"}}, endpoint)
    assert (limited.reason, limited.retry, limited.billed) == ("rate_limited", True, "unknown")
    for code in (402, "insufficient_quota"):
        assert error_within({"error": {"code": code, "message": "no"}}, endpoint).reason == "out_of_money"
    for other in (completion(), {"error": {"message": "?"}}, {"error": "?"}, {"error": {"code": 200}}, [], None):
        assert error_within(other, endpoint) is None


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
