"""What an export has to do before it counts: read as its checkpoint does, load, and generate."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from slm.config.target import Target
from slm.errors import StepError, one_line
from slm_pyfunc.engine.decoder import ExecutionProviderUnavailable
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.engine.sampling import log_softmax
from slm_pyfunc.parameters import Parameters, RequestError

log = logging.getLogger("slm.export")

# What the runtime's tokenizer has to encode as the checkpoint's does: spaces, digits, code,
# accents, CJK, emoji.
PROBES = (
    "Hello, world!  It's 12:30.",
    "def f(x):\n\treturn x ** 2\n",
    "Émile naïve, für 3,50 €",
    "山脚下的小镇",
    "👍🏽 ok 😀",
)
# Nats between a token that is answered and the same that is scored: in pieces of other sizes, with
# activations in int8, they may be a few tenths apart.
SAME_LOGPROB = 0.5
# Nats between the graph for prompts and the other, in the mean of a text's tokens: 0.06 where int4
# was calibrated and 0.4 where it was not (SmolLM2), 6 or more where one layer's scales are doubled.
PROMPTS_APART, PROMPTS_TOKENS = 1.0, 256
SYSTEM = {"role": "system", "content": "Be brief."}
GREETING = ("Hello", "Hi!", "Who are you?")
# Turns of user and assistant that have to render as the checkpoint's template renders them, with
# and without a system message.
CHATS = (
    ("Hello",),
    GREETING,
    (*GREETING, "A model.", "And now?"),
    ("Hello", "", "And now?"),
    ("What is </think>?", "<think>\nhm\n</think>\n\nBlue.", "  Why?  "),
    ("Émile 山脚下 👍🏽", "One\r\ntwo\r\n", "a   b\t c\n\n\nd"),
)


def require_it_generates(
    onnx: Path, checkpoint: Path, target: Target, text: str
) -> tuple[str, int]:
    """Raise unless the model loads, tokenizes as its checkpoint and generates.

    A graph for prompts is held against the other on `text`. Returns the provider that it did so on,
    and the tokenizer's differences. Where the target's own provider is absent, the CPU stands in if
    it can; else the provider is "none".
    """
    provider = target.execution_provider.value
    try:
        runtime = Runtime(onnx, provider)
    except ExecutionProviderUnavailable as absent:
        log.info("%s; checking on the CPU", absent)
        try:
            runtime, provider = Runtime(onnx, "cpu"), "cpu"
        except RuntimeError as error:
            log.info(
                "export_onnx: not checked, the CPU cannot run it: %s",
                one_line(error)[:300],
            )
            return "none", 0
    differences = require_same_tokens(runtime, checkpoint)
    tokens = runtime.encode_chat([{"role": "user", "content": "Hello"}])
    [[answer]] = runtime.answer([tokens], Parameters(max_tokens=8, logprobs=True))
    if answer.completion_tokens == 0:
        raise StepError(f"{onnx} loads but generates nothing: the export is broken.")
    scored = runtime.log_probabilities(tokens, len(tokens))[-1]
    scored[runtime.tokenizer.nameless] = -np.inf  # as no answer may have them
    scored = log_softmax(scored)
    for token, probability, _ in answer.logprobs[:1]:  # none where it ends at once
        if abs(probability - scored[token]) > SAME_LOGPROB:
            raise StepError(
                f"{onnx} answers with token {token} at a log-probability of {probability:.3f}, and "
                f"scores it at {scored[token]:.3f}: the export is broken."
            )
    if not np.isfinite(runtime.log_probabilities(runtime.tokenizer.encode("Hello, world!"))).all():
        raise StepError(f"{onnx} loads but its logits are not finite: the export is broken.")
    if target.prompts:
        require_prompts_agree(runtime, text)
    return provider, differences


def require_prompts_agree(runtime: Runtime, text: str) -> None:
    """Raise where the graph for prompts says otherwise than the other."""
    tokens = runtime.tokenizer.encode(text)[:PROMPTS_TOKENS]
    answered, read = (runtime.log_probabilities(tokens, prompt) for prompt in (0, len(tokens)))
    apart = float((np.exp(answered) * (answered - read)).sum(-1).mean())
    log.info("export_onnx: the graph for prompts is %.3f nats from the other", apart)
    if not apart <= PROMPTS_APART:  # NaN is none
        raise StepError(
            f"the graph for prompts of {runtime.folder} is {apart:.3g} nats from the other over "
            f"{len(tokens)} tokens, more than {PROMPTS_APART}: the export is broken, or its int4 "
            "is far from the checkpoint. Export with target.prompts=null."
        )


def require_same_tokens(runtime: Runtime, checkpoint: Path) -> int:
    """Raise where the runtime renders or encodes a chat otherwise than the checkpoint.

    Returns how many of the other probes encode differently: rare characters that few prompts hold.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    special = "Hello " + "".join(map(str, tokenizer.all_special_tokens))
    for turns in (*CHATS, (special, special, special)):
        require_same_prompt(runtime, tokenizer, conversation(turns))
        require_same_prompt(runtime, tokenizer, [SYSTEM, *conversation(turns)])
    greeting = conversation(GREETING)
    rendered = expected_prompt(tokenizer, greeting)
    if rendered is None:
        rendered = expected_prompt(tokenizer, [SYSTEM, *greeting]) or ""
    differences = 0
    for text in (rendered, *PROBES):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = [int(token) for token in runtime.tokenizer.tokenizer.encode(text)]
        if found in (expected, [tokenizer.bos_token_id, *expected]):
            continue
        message = f"the exported tokenizer encodes {text!r} as {found[:8]}…, "
        message += f"the checkpoint's as {expected[:8]}…"
        if text == rendered or -1 in found:
            raise StepError(f"{message}: onnxruntime-genai does not support this tokenizer.json.")
        log.warning("%s", message)
        differences += 1
    return differences


def conversation(turns: tuple[str, ...]) -> list[dict[str, str]]:
    """The messages of a user and an assistant, who take turns."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]


def require_same_prompt(runtime: Runtime, tokenizer: Any, messages: list[dict[str, str]]) -> None:
    """Raise where the runtime renders a chat otherwise, or only one of the two refuses it."""
    expected = expected_prompt(tokenizer, messages)
    try:
        found, reason = runtime.render(messages), ""
    except RequestError as error:
        found, reason = None, f" ({error})"
    if found != expected:
        raise StepError(
            f"the chat template renders as {shown(found)}{reason}; "
            f"the checkpoint's as {shown(expected)}."
        )


def expected_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """What transformers renders; None where the template refuses the messages."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of jinja2, the template's raise_exception, or its Python
        log.info("the checkpoint's chat template refuses a probe: %s", one_line(error))
        return None


def shown(prompt: str | None) -> str:
    return "nothing, it refuses the messages" if prompt is None else repr(prompt)
