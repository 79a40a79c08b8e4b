"""The official OpenAI client against a mesh: plain, streaming, cancelled, refused."""

import concurrent.futures
import random
import time

import openai
import pytest


@pytest.fixture(scope="module")
def client(mesh):
    return openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def test_completion_and_usage(client, model):
    answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=16, temperature=0)
    assert answer.choices[0].text.strip()
    assert answer.usage.completion_tokens <= 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_plain_answer_in_pieces(client, model):
    asked = dict(model=model, prompt="The little dog", max_tokens=40, temperature=0)
    plain = client.completions.create(**asked)
    pieces, usage, finish = [], None, None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.text)
            finish = choice.finish_reason or finish
    assert "".join(pieces) == plain.choices[0].text
    assert finish == plain.choices[0].finish_reason
    assert usage == plain.usage


def test_chat(client, model):
    messages = [{"role": "user", "content": "Tell me a story about a cat."}]
    asked = dict(model=model, messages=messages, max_tokens=32, temperature=0)
    plain = client.chat.completions.create(**asked).choices[0].message
    assert plain.role == "assistant" and plain.content.strip()
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == plain.content


def test_n_logprobs_stop_and_seed(client, model):
    answer = client.completions.create(
        model=model, prompt="A bird", n=3, seed=5, temperature=1, max_tokens=12, logprobs=3, stop=["."]
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    for choice in answer.choices:
        assert "." not in choice.text
        assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
    again = client.completions.create(model=model, prompt="A bird", n=3, seed=5, temperature=1, max_tokens=12, stop=["."])
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]


def test_refusals_reach_the_client_as_its_own_errors(client, model):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="x", temperature=-1)
    assert refused.value.param == "temperature"


def test_32_streaming_clients_some_of_which_leave(mesh, client, model):
    """All are answered or were cancelled by us, and nothing is left behind."""
    rng = random.Random(7)
    plans = [(rng.randrange(1, 120), rng.randrange(4, 90), rng.random() < 0.3) for _ in range(32)]

    def run(plan):
        words, tokens, leaves = plan
        prompt = " ".join(["The sun was warm and the boy went out."] * (words // 9 + 1))
        stream = client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0.8, stream=True,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
        )
        seen = 0
        for chunk in stream:
            if chunk.usage:
                return chunk.usage.completion_tokens == tokens
            seen += 1
            if leaves and seen >= 3:
                stream.close()
                return True
        return False

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert all(pool.map(run, plans))

    while True:
        router = mesh.router_status()
        busy = [router[key] for key in ("running", "waiting", "kv_pages_used", "tickets_in_flight")]
        if busy == [0, 0, 0, 0]:
            break
        time.sleep(0.05)
