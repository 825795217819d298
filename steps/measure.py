"""Measure one logged model in a process of its own: how it loads, answers and scores texts.

    python -m steps.measure models:/m-… --texts work/texts.json --out work/reference

`evaluate` runs it twice with the same texts: the reference writes its tokens and log-probabilities
to `--out`, the candidate reads them there and is compared with them, chunk for chunk.
"""

import argparse
import json
import logging
import re
import resource
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import mlflow
import numpy as np
from tqdm import tqdm

from steps.step import one_line, set_up_logging

log = logging.getLogger("steps.measure")


class Measured(Protocol):
    """A loaded model: answers as its users get them, and next-token log-probabilities."""

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> tuple[str, int, int]:
        """The greedy answer, its prompt's tokens and its own."""

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """Natural-log probabilities after each token: float32 [tokens, vocabulary]."""


class Transformers:
    """MLflow's transformers flavor, asked through its chat interface."""

    def __init__(self, uri: str) -> None:
        # Without do_sample=False the pipeline of transformers 5 samples at temperature 0.7.
        self.pyfunc = mlflow.pyfunc.load_model(uri, model_config={"do_sample": False})
        self.pipeline = self.pyfunc.get_raw_model()

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> tuple[str, int, int]:
        [completion] = self.pyfunc.predict({"messages": messages, "max_tokens": max_tokens})
        usage = completion["usage"]
        return (
            completion["choices"][0]["message"]["content"],
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        import torch

        model = self.pipeline.model
        with torch.inference_mode():
            logits = model(torch.tensor([tokens], device=model.device)).logits[0]
            return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()

    def encode(self, text: str) -> list[int]:
        return self.pipeline.tokenizer(text)["input_ids"]


class Genai:
    """The ONNX model's chat interface, or its prompt interface with its chat template."""

    def __init__(self, uri: str) -> None:
        # No cache: times are those of prompts that were not seen before.
        self.pyfunc = mlflow.pyfunc.load_model(uri, model_config={"cache_mb": 0})
        self.interface = self.pyfunc.metadata.metadata["interface"]
        self.runtime = self.pyfunc.unwrap_python_model().runtime
        self.log_probabilities = self.runtime.log_probabilities

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> tuple[str, int, int]:
        parameters = {"max_tokens": max_tokens, "temperature": 0.0}
        if self.interface == "chat":
            completion = self.pyfunc.predict({"messages": messages, **parameters})
            usage = completion["usage"]
            text = completion["choices"][0]["message"]["content"]
            return text, usage["prompt_tokens"], usage["completion_tokens"]
        prompt = self.runtime.render(messages)
        [text] = self.pyfunc.predict({"prompt": prompt}, params=parameters)
        encode = self.runtime.tokenizer.encode
        generated = min(max_tokens, len(encode(text)) + 1)  # the end token counts
        return text, len(encode(prompt)), generated


def measure_speed(model: Measured, texts: dict[str, Any]) -> dict[str, float]:
    """Time answers of one token and of `max_new_tokens`, each to a prompt that was not seen before.

    Time to first token is that of an answer of one token; decoding is timed over the tokens after
    it.
    """
    first_token_s, prefill, decode = [], [], []
    model.answer([{"role": "user", "content": "Hello"}], 2)  # warm-up
    for prompt in tqdm(texts["speed_prompts"], desc="speed", leave=False):
        start = time.perf_counter()
        _, prompt_tokens, _ = model.answer([{"role": "user", "content": prompt}], 1)
        first_token_s.append(time.perf_counter() - start)
        prefill.append(prompt_tokens / first_token_s[-1])
        start = time.perf_counter()
        _, _, tokens = model.answer(
            [{"role": "user", "content": f"Again. {prompt}"}], texts["max_new_tokens"]
        )
        if tokens > 1:
            decode.append((tokens - 1) / max(time.perf_counter() - start - first_token_s[-1], 1e-9))
    return {
        "ttft_s_p50": statistics.median(first_token_s),
        "prefill_tokens_per_s": statistics.median(prefill),
        "decode_tokens_per_s": statistics.median(decode) if decode else float("nan"),
    }


def write_reference(model: Transformers, texts: dict[str, Any], out: Path) -> dict[str, float]:
    """Score the texts, leave tokens and log-probabilities in `out`, return the perplexity."""
    windows = token_windows(
        [model.encode(text) for text in texts["texts"]], texts["window"], texts["max_tokens"]
    )
    losses: list[float] = []
    for i, tokens in enumerate(tqdm(windows, desc="scoring", leave=False)):
        logp = model.log_probabilities(tokens)[:-1]
        losses += (-logp[np.arange(len(logp)), tokens[1:]]).tolist()
        np.save(out / f"tokens-{i:04}.npy", np.array(tokens))
        np.save(out / f"logp-{i:04}.npy", logp)
    return {"perplexity": float(np.exp(np.mean(losses))), "scored_tokens": float(len(losses))}


def compare_with_reference(model: Measured, reference: Path) -> dict[str, float]:
    """Score the same tokens: KL(reference || candidate) in nats, top-1 agreement, perplexity.

    Memory is bounded by one window.
    """
    losses, reference_losses, divergences, agreements = [], [], [], []
    for path in tqdm(sorted(reference.glob("tokens-*.npy")), desc="scoring", leave=False):
        tokens = np.load(path).tolist()
        p = np.load(path.with_name(path.name.replace("tokens", "logp")))
        q = model.log_probabilities(tokens)[:-1, : p.shape[1]]
        rows = np.arange(len(p))
        losses += (-q[rows, tokens[1:]]).tolist()
        reference_losses += (-p[rows, tokens[1:]]).tolist()
        divergences += (np.exp(p) * (p - q)).sum(axis=-1).tolist()
        agreements += (p.argmax(axis=-1) == q.argmax(axis=-1)).tolist()
    perplexity = float(np.exp(np.mean(losses)))
    return {
        "perplexity": perplexity,
        "perplexity_ratio": perplexity / float(np.exp(np.mean(reference_losses))),
        "kl_divergence": float(np.mean(divergences)),
        "top1_agreement": float(np.mean(agreements)),
        "scored_tokens": float(len(losses)),
    }


def token_windows(texts: list[list[int]], window: int, max_tokens: int) -> list[list[int]]:
    """Cut each text's tokens into windows of two or more, `max_tokens` in all."""
    windows: list[list[int]] = []
    for tokens in texts:
        for start in range(0, len(tokens), window):
            left = max_tokens - sum(map(len, windows))
            windows.append(tokens[start : start + min(window, left)])
    return [tokens for tokens in windows if len(tokens) > 1]


def measure(uri: str, texts: dict[str, Any], out: Path, reference: Path | None) -> dict[str, Any]:
    """Everything about one model: metrics and answers, or why it is unavailable here."""
    start = time.perf_counter()
    try:
        model: Genai | Transformers = Genai(uri) if reference else Transformers(uri)
    except RuntimeError as error:
        if type(error).__name__ != "ExecutionProviderUnavailable":  # the class ships with the model
            raise
        return {"unavailable": str(error)}
    metrics = {"load_s": time.perf_counter() - start}
    log.info("measure: %s loaded in %.1f s", uri, metrics["load_s"])
    metrics |= measure_speed(model, texts)
    log.info("measure: decodes %.1f tokens/s", metrics["decode_tokens_per_s"])
    prompts = tqdm(texts["prompts"], desc="prompts", leave=False)
    answers = [model.answer(messages, texts["max_new_tokens"])[0] for messages in prompts]
    metrics["peak_rss_mb"] = peak_rss_mb()  # of serving: scoring needs more
    if isinstance(model, Transformers):
        metrics |= write_reference(model, texts, out)
    elif reference:
        metrics |= compare_with_reference(model, reference)
    log.info("measure: scored %d tokens", metrics["scored_tokens"])
    return {"metrics": metrics, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("uri", help="URI of a logged model")
    parser.add_argument("--texts", type=Path, required=True, help="JSON: what to score and answer")
    parser.add_argument("--out", type=Path, required=True, help="folder for measured.json")
    parser.add_argument("--reference", type=Path, help="folder that the reference's run left")
    arguments = parser.parse_args()
    set_up_logging()
    texts = json.loads(arguments.texts.read_text())
    try:
        result = measure(arguments.uri, texts, arguments.out, arguments.reference)
    except Exception as error:
        log.exception("measure: %s", arguments.uri)
        result = {"error": f"{type(error).__name__}: {one_line(error)}"}
    (arguments.out / "measured.json").write_text(json.dumps(result, indent=2))


def peak_rss_mb() -> float:
    """Peak resident memory of this program, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss, begins anew with the program
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024 / 1e6  # type: ignore[union-attr]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


if __name__ == "__main__":
    main()
