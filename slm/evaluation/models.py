"""The two flavors behind one protocol, each asked through MLflow as its users ask it."""

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import mlflow
import numpy as np
import pandas as pd

from slm.evaluation.positions import turning_point
from slm.sources.verify import context_length_of

Messages = list[dict[str, str]]


class Answer(NamedTuple):
    """An answer; `ended` says that the model ended it, not the limit of tokens."""

    text: str
    prompt_tokens: int
    tokens: int
    ended: bool


class Model(Protocol):
    """A loaded model; `end_tokens` are the ids that end its texts, `end_token` is one of them."""

    end_token: int
    end_tokens: list[int]

    def ask(self, conversations: list[Messages], max_tokens: int) -> list[Answer]:
        """The greedy answers, in one `predict`."""

    def complete(self, prompt: str, max_tokens: int) -> str:
        """The greedy continuation of a prompt taken as it is."""

    def render(self, messages: Messages) -> tuple[str, list[int]]:
        """The prompt that the chat template makes, and its tokens; ValueError where it refuses."""

    def encode(self, text: str) -> list[int]:
        """A text's tokens, and no others."""

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Natural-log probabilities after each token: float32 [tokens, vocabulary]."""


class Transformers:
    """A checkpoint in MLflow's transformers flavor, asked through its chat interface."""

    def __init__(self, folder: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()  # MLflow's max_tokens makes it warn every time
        # Without do_sample=False the pipeline of transformers 5 samples at temperature 0.7.
        self.pyfunc = mlflow.pyfunc.load_model(folder, model_config={"do_sample": False})
        self.pipeline = self.pyfunc.get_raw_model()
        self.tokenizer = self.pipeline.tokenizer
        self.end_token = self.tokenizer.eos_token_id
        ids = self.pipeline.model.generation_config.eos_token_id
        self.end_tokens = ids if isinstance(ids, list) else [self.end_token if ids is None else ids]
        config = self.pipeline.model.config
        self.context_length = context_length_of(config)
        self.turning_point = turning_point(config)

    def ask(self, conversations: list[Messages], max_tokens: int) -> list[Answer]:
        requests = [{"messages": messages, "max_tokens": max_tokens} for messages in conversations]
        return [
            chat_answer(completion) for completion in self.pyfunc.predict(pd.DataFrame(requests))
        ]

    def complete(self, prompt: str, max_tokens: int) -> str:
        tokens = self.tokenizer(prompt, return_tensors="pt").to(self.pipeline.model.device)
        generated = self.pipeline.model.generate(
            **tokens, max_new_tokens=max_tokens, do_sample=False
        )
        new = generated[0][tokens["input_ids"].shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True)

    def render(self, messages: Messages) -> tuple[str, list[int]]:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja2's, or the template's own raise_exception
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return text, self.encode(text)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_probabilities(self, tokens: list[int], last: int = 0) -> np.ndarray:
        """As in Model; those after the `last` tokens alone, if given."""
        import torch

        model = self.pipeline.model
        kept = {"logits_to_keep": last} if 0 < last < len(tokens) else {}
        with torch.inference_mode():
            logits = model(torch.tensor([tokens], device=model.device), **kept).logits[0]
            return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()


class Genai:
    """An ONNX model: its chat interface, or its prompt interface with its chat template."""

    def __init__(self, folder: str) -> None:
        # No cache: times are those of prompts that were not seen before.
        self.pyfunc = mlflow.pyfunc.load_model(folder, model_config={"cache_mb": 0})
        self.interface = self.pyfunc.metadata.metadata["interface"]
        self.runtime = self.pyfunc.unwrap_python_model().runtime
        self.log_probabilities = self.runtime.log_probabilities
        self.encode = self.runtime.tokenizer.encode
        self.end_tokens = sorted(self.runtime.tokenizer.end_tokens)
        self.end_token = self.end_tokens[0]

    def ask(self, conversations: list[Messages], max_tokens: int, **sampling: Any) -> list[Answer]:
        parameters = {"max_tokens": max_tokens, **(sampling or {"temperature": 0.0})}
        if self.interface == "chat":
            requests = pd.DataFrame([{"messages": c, **parameters} for c in conversations])
            completions = self.pyfunc.predict(requests)
            completions = completions if isinstance(completions, list) else [completions]
            return [chat_answer(completion) for completion in completions]
        prompts = [self.runtime.render(messages) for messages in conversations]
        texts = self.pyfunc.predict(pd.DataFrame({"prompt": prompts}), params=parameters)
        answers = []
        for prompt, text in zip(prompts, texts, strict=True):
            tokens = len(self.encode(text)) + 1  # with the end token
            ended = tokens <= max_tokens
            answers.append(Answer(text, len(self.encode(prompt)), min(tokens, max_tokens), ended))
        return answers

    def complete(self, prompt: str, max_tokens: int) -> str:
        greedy = replace(self.runtime.defaults, max_tokens=max_tokens, temperature=0.0)
        [[completion]] = self.runtime.answer([prompt], greedy)
        return completion.text

    def render(self, messages: Messages) -> tuple[str, list[int]]:
        text = self.runtime.render(messages)
        # A champion that an earlier version of this project logged encodes what it rendered.
        encode_chat = getattr(self.runtime, "encode_chat", None)
        return text, encode_chat(messages) if encode_chat else self.encode(text)


def chat_answer(completion: dict[str, Any]) -> Answer:
    """An Answer from OpenAI's chat completion."""
    choice, usage = completion["choices"][0], completion["usage"]
    return Answer(
        choice["message"]["content"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        choice["finish_reason"] == "stop",
    )
