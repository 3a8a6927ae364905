"""The fake endpoint itself: the tests that stand on it are worth what its billing and its faults are worth."""

import asyncio
import collections
import json
import subprocess
import sys
import urllib.request

import openai
import pytest
from fake_answers import completion_of, recorded
from fake_openai import LIVE_FAULTS, FakeOpenAI

PROMPT = "Find entities.\n\nInput: "


def client(server, **changes) -> openai.AsyncOpenAI:
    options = {"base_url": server.base_url, "api_key": "test-key", "max_retries": 0, "timeout": 20, **changes}
    return openai.AsyncOpenAI(**options)


def ask(server, texts, **changes) -> list:
    """The answer, or the error, to each text; all at once."""

    async def all_of_them():
        async with client(server, **changes) as endpoint:
            return await asyncio.gather(
                *(
                    endpoint.chat.completions.create(
                        model="fake-model", messages=[{"role": "user", "content": PROMPT + text}]
                    )
                    for text in texts
                ),
                return_exceptions=True,
            )

    return asyncio.run(all_of_them())


def test_an_answer_is_the_recorded_completion_or_made_from_the_words_and_its_usage_is_billed():
    text = next(iter(recorded()))
    with FakeOpenAI() as server:
        known, made = ask(server, [text, "Robert went to Paris"])
        assert known.choices[0].message.content == recorded()[text]
        assert made.choices[0].message.content == completion_of("Robert went to Paris")
        assert made.choices[0].message.content.count(" <> ") >= 2
        usages = [answer.usage for answer in (known, made)]
        assert server.billed.prompt == sum(usage.prompt_tokens for usage in usages)
        assert server.billed.completion == sum(usage.completion_tokens for usage in usages)
        assert usages[1].prompt_tokens <= len(PROMPT + "Robert went to Paris")
        assert server.answered() == {text: 1, "Robert went to Paris": 1}


@pytest.mark.parametrize("fault", LIVE_FAULTS)
def test_every_fault_looks_as_it_says_and_is_billed_only_if_the_work_was_done(fault):
    with FakeOpenAI(faults={fault: 1.0}, slow=0.01, retry_after=7) as server:
        (answer,) = ask(server, ["Robert went to Paris"], timeout=0.3 if fault == "timeout" else 20)
    (entry,) = server.log
    assert entry.what == fault
    status = LIVE_FAULTS[fault]
    assert entry.billed == (status == 200)
    assert server.billed.requests == entry.billed and server.delivered.requests == entry.delivered
    if fault == "timeout":
        assert isinstance(answer, openai.APITimeoutError)
    elif fault == "cut":
        assert isinstance(answer, openai.APIConnectionError) and not entry.delivered
    elif fault == "truncated_json":
        assert isinstance(answer, json.JSONDecodeError) and not entry.delivered
    elif status != 200:
        assert answer.status_code == status
        assert answer.response.headers.get("retry-after") == ("7" if fault == "rate_limit_retry_after" else None)
    else:
        assert entry.delivered
        message = answer.choices[0].message
        assert bool(message.content) == (fault not in ("empty", "refusal", "content_filter"))
        assert bool(message.refusal) == (fault == "refusal")


def test_faults_are_drawn_by_text_and_attempt_whatever_the_order():
    texts = [f"Robert went to Paris {number} times" for number in range(150)]
    drawn = []
    for order in (texts, texts[::-1]):
        with FakeOpenAI(faults={"error_500": 0.3}, seed=4) as server:
            for _ in range(2):
                ask(server, order)
        drawn.append({(entry.texts, entry.attempts): entry.what for entry in server.log})
    assert drawn[0] == drawn[1]
    counts = collections.Counter(drawn[0].values())
    assert 0.2 < counts["error_500"] / 300 < 0.4
    assert any(drawn[0][(text,), (1,)] != drawn[0][(text,), (2,)] for text in texts)


def test_a_client_that_goes_away_before_a_generated_answer_is_billed_all_the_same():
    with FakeOpenAI(faults={"slow": 1.0}, slow=60.0) as server:
        (error,) = ask(server, ["Robert went to Paris"], timeout=0.5)
        assert isinstance(error, openai.APITimeoutError)
    assert server.undelivered.requests == 1 and server.delivered.requests == 0


def test_requests_beyond_its_limits_are_refused_and_the_headers_say_what_remains():
    with FakeOpenAI(max_in_flight=3, delay=1.0) as server:
        refused = [answer for answer in ask(server, ["a text"] * 10) if isinstance(answer, Exception)]
        assert len(refused) == 7
    with FakeOpenAI(rate=(4, 60.0)) as server:
        answers = ask(server, ["a text"] * 6)
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        assert len(refused) == 2
        assert refused[0].response.headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < float(refused[0].response.headers["x-ratelimit-reset-requests"].removesuffix("ms")) <= 60_000


def test_it_knows_its_key_and_models_and_can_be_told_to_fail_or_wait():
    with FakeOpenAI() as server:
        assert isinstance(ask(server, ["a"], api_key="wrong")[0], openai.AuthenticationError)
        server.models = ("another",)
        assert ask(server, ["a"])[0].code == "model_not_found"
        server.models = ("fake-model",)
        server.fail_with(503, after=1)
        assert [isinstance(ask(server, ["a"])[0], Exception) for _ in range(2)] == [False, True]
        server.fail_with(None)
        paused = server.pause()
        assert isinstance(ask(server, ["a"], timeout=0.5)[0], openai.APITimeoutError) and paused.is_set()
        server.resume()
        assert not isinstance(ask(server, ["a"])[0], Exception)
        assert server.billed.requests == 2


def test_as_a_process_it_prints_its_address_and_tells_its_counts(root):
    process = subprocess.Popen(
        [sys.executable, root / "tests" / "fake_openai.py", "--port=0", "--fault=error_500=1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = process.stdout.readline().strip()
        ask(type("Server", (), {"base_url": url}), ["a", "b"])
        with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as response:
            stats = json.load(response)
    finally:
        process.kill()
        process.wait()
    assert stats["requests"] == 2 and stats["what"] == {"error_500": 2}
