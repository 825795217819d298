"""What log_pyfunc and log_transformers left, as its users see it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from tests.conftest import MODEL, TARGET, Project, tracking

FRANCE = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
SKY = "<|im_start|>user\nWhat colour is the sky?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def prompt(packaged: Project) -> Iterator[Any]:
    with tracking(packaged):
        yield mlflow.pyfunc.load_model(f"models:/{MODEL}-{TARGET}-prompt@champion")


@pytest.fixture(scope="module")
def chat(packaged: Project) -> Iterator[Any]:
    with tracking(packaged):
        yield mlflow.pyfunc.load_model(f"models:/{MODEL}-transformers@champion")


def ask(model: Any, *prompts: str, **params: object) -> list[str]:
    return model.predict(pd.DataFrame({"prompt": prompts}), params={"max_tokens": 12, **params})


def test_the_prompt_model_has_the_promised_signature(prompt: Any) -> None:
    signature = prompt.metadata.signature
    assert str(signature.inputs) == "['prompt': string (required)]"
    assert str(signature.outputs) == "[string (required)]"
    names = {parameter.name for parameter in signature.params}
    assert names >= {"max_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty"}


def test_every_row_gets_its_own_answer_in_order(prompt: Any) -> None:
    france, sky = ask(prompt, FRANCE, temperature=0), ask(prompt, SKY, temperature=0)
    assert "Paris" in france[0]
    assert ask(prompt, FRANCE, SKY, FRANCE, temperature=0) == [*france, *sky, *france]


def test_threads_that_ask_at_once_get_their_own_answers(prompt: Any) -> None:
    alone = {text: ask(prompt, text, temperature=0) for text in (FRANCE, SKY)}
    texts = [FRANCE, SKY] * 4
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda text: ask(prompt, text, temperature=0), texts)
        assert list(together) == [alone[text] for text in texts]


def test_the_same_seed_gives_the_same_text_and_another_another(prompt: Any) -> None:
    def sample(seed: int) -> list[str]:
        return ask(prompt, SKY, temperature=1.5, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed)[0] for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("parameter", "value", "limit"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 100_000, "at most 8192, the context length"),
        ("temperature", -0.1, "0 or more"),
        ("top_p", 2.0, "above 0 and at most 1"),
        ("top_k", 0, "at least 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("seed", -1, "from 0"),
    ],
)
def test_a_wrong_parameter_is_named_with_its_limit(
    prompt: Any, parameter: str, value: object, limit: str
) -> None:
    with pytest.raises(MlflowException, match=limit) as error:
        ask(prompt, FRANCE, **{parameter: value})
    assert error.value.error_code == "INVALID_PARAMETER_VALUE"
    assert ask(prompt, FRANCE, temperature=0)


def test_the_prompt_model_needs_no_torch_and_carries_its_provenance(prompt: Any) -> None:
    path = mlflow.pyfunc.get_model_dependencies(f"models:/{MODEL}-{TARGET}-prompt@champion")
    pins = Path(path).read_text().split()
    names = [pin.split("==")[0] for pin in pins]
    assert names == ["mlflow", "numpy", "pandas", "onnxruntime-genai"]
    assert all("==" in pin for pin in pins)
    provenance = prompt.metadata.metadata["provenance"]
    assert provenance["checkpoint"]["licence"] == "apache-2.0"
    assert set(provenance["files"]) >= {"model.onnx", "model.onnx.data"}


def test_the_prompt_model_holds_no_pickle(packaged: Project) -> None:
    model = packaged.client.get_logged_model(packaged.made["log_pyfunc"]["model_id"])
    folder = Path(model.artifact_location.removeprefix("file://"))
    files = [path.name for path in folder.rglob("*")]
    assert "prompt.py" in files
    assert not [name for name in files if name.endswith((".pkl", ".pt", ".bin"))]


def test_the_chat_model_answers_with_openais_schema_and_its_own_name(chat: Any) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    [answer] = chat.predict({"messages": [question], "max_tokens": 8})
    assert answer["model"] == MODEL
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 8
    assert chat.metadata.metadata["task"] == "llm/v1/chat"
