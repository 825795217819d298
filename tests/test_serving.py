"""The logged models behind `mlflow models serve`, asked over HTTP and by the openai client."""

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from bench.server import ScoringServer, serving
from tests.conftest import MODEL, Packaged

FRANCE = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def post(server: ScoringServer, body: dict[str, Any]) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    request = urllib.request.Request(
        f"{server.url}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def chat(packaged: Packaged, chat_folder: Path) -> Iterator[ScoringServer]:
    with serving(chat_folder, packaged.environment) as server:
        yield server


@pytest.fixture(scope="module")
def prompt(packaged: Packaged, prompt_folder: Path) -> Iterator[ScoringServer]:
    with serving(prompt_folder, packaged.environment) as server:
        yield server


@pytest.fixture(scope="module")
def client(chat: ScoringServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=chat.url, api_key="none", max_retries=0)


def complete(client: openai.OpenAI, content: str, **fields: object) -> ChatCompletion:
    """A chat completion; MLflow's path for it is /invocations."""
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
    return client.post("/invocations", cast_to=ChatCompletion, body={"max_tokens": 16, **body})


def text(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


def test_the_openai_client_reads_the_answer(client: openai.OpenAI) -> None:
    answer = complete(client, "What is the capital of France?")
    assert answer.object == "chat.completion" and answer.model == MODEL
    assert "Paris" in text(answer)
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = text(complete(client, "What is the capital of France?"))
    for stop in ("Paris", ["never", "Paris"]):
        answer = complete(client, "What is the capital of France?", stop=stop)
        assert text(answer) == whole[: whole.index("Paris")]
        assert answer.choices[0].finish_reason == "stop"


def test_a_seed_makes_sampling_repeatable(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        return text(complete(client, "Invent a name.", temperature=1.3, top_p=0.95, seed=seed))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [1, 2]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = complete(client, "A person?", response_format=response_format, max_tokens=80)
    assert json.loads(text(answer)).keys() == {"name", "age"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages is []"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content is 7"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, "the context length is 8192"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be an integer of at least 1"),
        ({"max_tokens": -1}, "max_tokens is -1; it must be an integer of at least 1"),
        ({"top_p": 2}, "top_p is 2; it must be a number above 0 and at most 1"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format.json_schema.schema is not a JSON schema",
        ),
    ],
)
def test_a_wrong_request_is_400_and_the_next_is_served(
    client: openai.OpenAI, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, "Hello", **fields)
    message = error.value.response.json()["message"]
    assert words in message.split("Error: ")[-1]
    assert text(complete(client, "Hello"))


def test_32_clients_get_their_own_answers(client: openai.OpenAI) -> None:
    questions = [f"Repeat the number {number}{number}, please." for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda question: text(complete(client, question)), questions))
    assert together == [text(complete(client, question)) for question in questions]
    assert len(set(together)) > 16


def test_the_prompt_model_answers_rows_in_order(prompt: ScoringServer) -> None:
    def ask(*prompts: str) -> list[str]:
        body = {"dataframe_split": {"columns": ["prompt"], "data": [[p] for p in prompts]}}
        status, answer = post(prompt, {**body, "params": {"max_tokens": 8, "temperature": 0}})
        assert status == 200, answer
        return answer["predictions"]

    other = FRANCE.replace("France", "Italy")
    [france], [italy] = ask(FRANCE), ask(other)
    assert "Paris" in france
    assert ask(*[FRANCE, other] * 6) == [france, italy] * 6


@pytest.mark.parametrize(
    ("row", "params", "words"),
    [
        ("a " * 9000, {}, "the context length is 8192"),
        ("", {}, "prompt is empty"),
        (5, {}, "prompt"),
        (FRANCE, {"max_tokens": 0}, "max_tokens is 0"),
        (FRANCE, {"top_p": 2.0}, "top_p is 2"),
        (FRANCE, {"stop": ["a"] * 20}, "at most 16"),
    ],
)
def test_a_wrong_prompt_is_400_and_the_next_is_served(
    prompt: ScoringServer, row: object, params: dict[str, Any], words: str
) -> None:
    status, answer = post(prompt, {"dataframe_records": [{"prompt": row}], "params": params})
    assert status == 400 and words in answer["message"], answer
    right = {"dataframe_records": [{"prompt": FRANCE}], "params": {"max_tokens": 2}}
    assert post(prompt, right)[0] == 200


def test_a_server_killed_while_it_answers_starts_again(chat: ScoringServer) -> None:
    question = {"messages": [{"role": "user", "content": "Write a very long story."}]}
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(post, chat, {**question, "max_tokens": 4000})
        time.sleep(1.5)
        chat.stop(signal.SIGKILL)
        assert isinstance(answering.exception(), (OSError, ValueError))
    chat.start()
    status, answer = post(chat, {**question, "max_tokens": 4})
    assert status == 200 and answer["choices"][0]["message"]["content"]
