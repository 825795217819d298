"""What the benchmark measures, each in a process of its own: `python -m bench.workers <name> …`.

A worker is a generator: it yields once when it is ready, and then the figures of one round each
time that a line comes on stdin, as JSON on stdout. So several can take turns, round by round, and a
machine whose speed drifts moves all of them alike. Times are seconds; memory is MB (10^6 bytes).
"""

import importlib.util
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

Figures = Iterator[dict[str, Any]]

THINGS = "lighthouse market train library garden storm bridge river forest desert city ship school"
TOPICS = [f"the {thing}" for thing in (*THINGS.split(), "mountain", "bakery", "island")]
NEW_TOKENS = 128
QUESTION = f"Write a very long story about {TOPICS[0]}."
LICENCE = (Path(__file__).parents[1] / "LICENSE").read_text()
DRAFTED = 8
PASSAGE = LICENCE[4000:5200]
CODE = """def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)
"""
# Kinds of answers: a question, and a temperature.
ASKING = {
    "copy": (f"Repeat this text word for word:\n\n{PASSAGE}", 0.0),
    "edit": (f"Rename total to result, and give all of the code:\n\n{CODE}", 0.0),
    "summary": (f"Summarize this text:\n\n{PASSAGE}", 0.0),
    "story": (QUESTION, 0.0),
    "story at temperature 1": (QUESTION, 1.0),
    "story at temperature 1.5": (QUESTION, 1.5),
}
LONG = {512: 2300, 1024: 4800}  # about so many tokens, in characters of it


def bare(folder: str, threads: str) -> Figures:
    """onnxruntime-genai's Generator in a loop, as its examples write it."""
    start = time.perf_counter()
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.clear_providers()
    options = {"intra_op_num_threads": int(threads)}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)

    def answer(new_tokens: int, text: str = QUESTION) -> tuple[int, int]:
        messages = json.dumps(asked(text))
        prompt = tokenizer.encode(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        )
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + new_tokens, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt)
        stream, tokens = tokenizer.create_stream(), 0
        while not generator.is_done():
            generator.generate_next_token()
            stream.decode(generator.get_next_tokens()[0])
            tokens += 1
        return len(prompt), tokens

    yield from answers(answer, start)


def chat(folder: str, quiet: str = "") -> Figures:
    """The chat model through `predict`, without its cache: the bare loop has none."""
    import mlflow.pyfunc

    start = time.perf_counter()
    model = mlflow.pyfunc.load_model(folder, bool(quiet), model_config={"cache_mb": 0})

    def answer(new_tokens: int, text: str = QUESTION) -> tuple[int, int]:
        request = {"messages": asked(text), "max_tokens": new_tokens, "temperature": 0.0}
        usage = model.predict(request)["usage"]
        return usage["prompt_tokens"], usage["completion_tokens"]

    yield from answers(answer, start)


def transformers(folder: str) -> Figures:
    """The checkpoint through MLflow's transformers flavor."""
    import mlflow.pyfunc

    start = time.perf_counter()
    model = mlflow.pyfunc.load_model(folder, model_config={"do_sample": False})

    def answer(new_tokens: int, text: str = QUESTION) -> tuple[int, int]:
        usage = model.predict({"messages": asked(text), "max_tokens": new_tokens})[0]["usage"]
        return usage["prompt_tokens"], usage["completion_tokens"]

    yield from answers(answer, start)


def llama_cpp(gguf: str, threads: str) -> Figures:
    """llama-cpp-python on the GGUF of the same checkpoint."""
    start = time.perf_counter()
    from llama_cpp import Llama

    model = Llama(gguf, n_threads=int(threads), n_ctx=2048, verbose=False)

    def answer(new_tokens: int, text: str = QUESTION) -> tuple[int, int]:
        model.reset()
        completion = model.create_chat_completion(
            asked(text), max_tokens=new_tokens, temperature=0.0
        )
        return completion["usage"]["prompt_tokens"], completion["usage"]["completion_tokens"]

    yield from answers(answer, start)


def openvino_genai(gguf: str, threads: str) -> Figures:
    """openvino-genai on the GGUF of the same checkpoint."""
    start = time.perf_counter()
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(gguf, "CPU", INFERENCE_NUM_THREADS=int(threads))

    def answer(new_tokens: int, text: str = QUESTION) -> tuple[int, int]:
        result = pipeline.generate([text], max_new_tokens=new_tokens, do_sample=False)
        metrics = result.perf_metrics
        return metrics.get_num_input_tokens(), metrics.get_num_generated_tokens()

    yield from answers(answer, start)


def answers(answer: Callable[..., tuple[int, int]], start: float) -> Figures:
    """Time answers of one token and of many, and long prompts.

    `answer` takes the number of tokens and a question, and returns how many tokens the prompt and
    the answer had. The first figures are those of the load that began at `start`, up to the first
    token.
    """
    answer(1)
    yield {"load_to_first_token_s": time.perf_counter() - start, "rss_mb": rss_mb()}
    answer(NEW_TOKENS)
    for number in range(10**6):
        answer(1)  # the caches of the CPU are another worker's yet
        ttft_s = statistics.median(timed(answer, 1)[0] for _ in range(5))
        seconds, (_, tokens) = timed(answer, NEW_TOKENS)
        figures = {"ttft_s": ttft_s, "decode_tokens_per_s": (tokens - 1) / (seconds - ttft_s)}
        for length, characters in LONG.items():
            start = (101 * number + length) % 4000  # which no cache has the start of
            text = LICENCE[start:][:characters]
            seconds, (tokens, _) = timed(answer, 1, text)
            figures[f"prompt_{length}_tokens_per_s"] = tokens / seconds
        yield figures


def imports() -> Figures:
    """What an interpreter takes, and MLflow's pyfunc in it."""
    alone = rss_mb()
    import mlflow.pyfunc  # noqa: F401

    yield {"interpreter_rss_mb": alone, "rss_mb": rss_mb()}


def rows(folder: str) -> Figures:
    """Tokens per second of one row, and of 16 in one `predict` of the prompt model, cache off."""
    import mlflow.pyfunc
    import pandas as pd

    model = mlflow.pyfunc.load_model(folder, model_config={"cache_mb": 0})
    runtime = model.unwrap_python_model().runtime

    def throughput(count: int) -> float:
        prompts = [runtime.render(question(topic)) for topic in TOPICS[:count]]
        parameters = {"max_tokens": NEW_TOKENS, "temperature": 0.0}
        frame = pd.DataFrame({"prompt": prompts})
        seconds, texts = timed(model.predict, frame, parameters)
        return sum(len(runtime.tokenizer.encode(text)) for text in texts) / seconds

    throughput(2)
    yield {}
    while True:
        yield {"one_tokens_per_s": throughput(1), "sixteen_tokens_per_s": throughput(16)}


def turns(folder: str) -> Figures:
    """Time to first token of a second turn, after one of 1,000 tokens, with and without reuse."""
    import mlflow.pyfunc

    models = {
        name: mlflow.pyfunc.load_model(folder, model_config={"cache_mb": cache_mb})
        for name, cache_mb in (("reuse", 1024), ("cold", 0))
    }
    tokenizer = models["reuse"].unwrap_python_model().runtime.tokenizer

    def second_turn(name: str, topic: str) -> dict[str, Any]:
        sentences = [f"Here is a long text about {topic}."]
        while len(tokenizer.encode(" ".join(sentences))) < 960:
            sentences.append(f"Sentence {len(sentences)} says more about {topic}.")
        messages = [{"role": "user", "content": " ".join(sentences)}]
        request = {"messages": messages, "max_tokens": 32, "temperature": 0.0}
        first = models[name].predict(request)
        messages += [first["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        stream = models[name].predict_stream({**request, "messages": messages})
        ttft_s, _ = timed(next, stream)
        *_, last = stream
        cached = last["usage"]["prompt_tokens_details"]["cached_tokens"]
        return {f"{name}_ttft_s": ttft_s, f"{name}_cached_tokens": cached}

    for name in models:
        second_turn(name, "nothing")  # MLflow's first stream imports for a second
    yield {}
    for number in range(10**6):
        topic = f"{TOPICS[number % len(TOPICS)]}, number {number}"
        yield second_turn("reuse", topic) | second_turn("cold", topic)


def clients(url: str) -> Figures:
    """Tokens per second of chat requests through a scoring server: from one client, and from 16."""
    numbers = iter(range(10**6))

    def ask(number: int) -> int:
        topic = f"{TOPICS[number % len(TOPICS)]}, number {number}"
        body = {"messages": question(topic), "max_tokens": NEW_TOKENS, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{url}/invocations", json.dumps(body).encode(), headers)) as response:
            return json.load(response)["usage"]["completion_tokens"]

    def throughput(count: int, requests: int) -> float:
        with ThreadPoolExecutor(count) as pool:
            batch = [next(numbers) for _ in range(requests)]
            seconds, tokens = timed(lambda: sum(pool.map(ask, batch)))
        return tokens / seconds

    throughput(2, 2)
    yield {}
    while True:
        yield {"one_tokens_per_s": throughput(1, 4), "sixteen_tokens_per_s": throughput(16, 32)}


def drafts(folder: str) -> Figures:
    """Decode of answers that repeat their prompt or themselves, and of others; DRAFTED or 0."""
    import mlflow.pyfunc

    models = {
        drafted: mlflow.pyfunc.load_model(
            folder, model_config={"cache_mb": 0, "prompt_lookup_num_tokens": drafted}
        )
        for drafted in (0, DRAFTED)
    }

    def decode(drafted: int, text: str, temperature: float) -> float:
        request = {"messages": asked(text), "temperature": temperature, "seed": 1}
        ttft_s, _ = timed(models[drafted].predict, {**request, "max_tokens": 1})
        seconds, answer = timed(models[drafted].predict, {**request, "max_tokens": NEW_TOKENS})
        return max(1, answer["usage"]["completion_tokens"] - 1) / (seconds - ttft_s)

    for drafted in models:
        decode(drafted, QUESTION, 0)
    yield {}
    while True:
        yield {
            f"{kind}, {drafted} drafted": decode(drafted, *asking)
            for kind, asking in ASKING.items()
            for drafted in models
        }


def threads(uri: str) -> Figures:
    """16 threads that call `predict` four times each: tokens/s, and CPU time in ms a token."""
    import mlflow.pyfunc

    from bench.serve import CONTEXT, question

    settings = {"context_length": CONTEXT}
    model = mlflow.pyfunc.load_model(uri, suppress_warnings=True, model_config=settings)

    def ask(first: int) -> int:
        tokens = 0
        for number in range(first, first + 4):
            body = question(number, "")
            del body["model"]  # which is no input of a model
            tokens += model.predict(body)["usage"]["completion_tokens"]
        return tokens

    yield {}
    with ThreadPoolExecutor(16) as pool:
        while True:
            before = time.process_time()
            seconds, tokens = timed(lambda: sum(pool.map(ask, range(0, 64, 4))))
            cpu_s = time.process_time() - before
            yield {"tokens_per_s": tokens / seconds, "cpu_ms": 1000 * cpu_s / tokens}


def question(topic: str) -> list[dict[str, str]]:
    return asked(f"Write a very long story about {topic}.")


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


def rss_mb() -> float:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024 / 1e6  # type: ignore[union-attr]


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name == "installed":
        sys.exit(importlib.util.find_spec(arguments[0]) is None)
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not ours
    for figures in globals()[name](*arguments):
        print(json.dumps(figures), file=out, flush=True)
        if not sys.stdin.readline():
            break
