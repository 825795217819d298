"""slm_pyfunc as it is, without MLflow: decoders, scheduler, sampling, text."""

import gc
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from slm.config.common import ROOT
from slm.exporters.builder import make
from slm.exporters.graph import write
from slm.exporters.worker import silent
from slm_pyfunc.engine.batch_decoder import BatchDecoder
from slm_pyfunc.engine.cores import Turn, available_cores
from slm_pyfunc.engine.generator_decoder import GeneratorDecoder
from slm_pyfunc.engine.lookup import PromptLookup
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.engine.sampling import Sampler, candidates
from slm_pyfunc.engine.scheduler import Busy, Completion
from slm_pyfunc.parameters import MAX_TOKENS, Parameters, RequestError, TooLong
from slm_pyfunc.tokenizer import Tokenizer
from tests.conftest import composed

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a long story about a lighthouse.",
    "How many legs has a spider? Explain it to a child, and say why that is so.",
    "Hello!",
]


@pytest.fixture(scope="module")
def runtime(onnx: Path) -> Runtime:
    return Runtime(onnx)


@pytest.fixture(scope="module")
def prompts(runtime: Runtime) -> list[str]:
    return [runtime.render([{"role": "user", "content": text}]) for text in QUESTIONS]


def texts(answers: list[list[Completion]]) -> list[str]:
    return [completion.text for completions in answers for completion in completions]


def test_a_batch_answers_each_prompt_as_it_is_answered_alone(
    onnx: Path, prompts: list[str]
) -> None:
    parameters = Parameters(max_tokens=24)
    together = texts(Runtime(onnx, cache_mb=0).answer(prompts, parameters))
    alone = Runtime(onnx, cache_mb=0)
    assert together == [texts(alone.answer([prompt], parameters))[0] for prompt in prompts]
    assert "Paris" in together[0]


def test_more_prompts_than_rows_and_long_ones_among_them(onnx: Path, prompts: list[str]) -> None:
    small = Runtime(onnx, max_batch_size=2)
    long = "The cat sat on the mat. " * 120  # more tokens than one piece of prefill
    batch = [*prompts, long, *prompts]
    answers = small.answer(batch, Parameters(max_tokens=12))
    alone = [texts(small.answer([prompt], Parameters(max_tokens=12)))[0] for prompt in batch]
    assert texts(answers) == alone
    assert answers[5][0].prompt_tokens > 700


def test_a_row_with_company_leaves_a_prompt_that_is_half_read_as_it_is(
    onnx: Path, runtime: Runtime, prompts: list[str]
) -> None:
    config = json.loads((onnx / "genai_config.json").read_text())
    first, second = (runtime.tokenizer.encode(prompt) for prompt in prompts[:2])
    found = []
    for company in (False, True):
        decoder = BatchDecoder(onnx, config, 2, 4, 0)
        decoder.needs_company = company
        row = decoder.open(first, 100)
        decoder.extend(row, first)
        other = decoder.open(second, 100)
        decoder.extend(other, second[len(other.tokens) : -9])
        [logits] = decoder.step([row], [1])
        assert isinstance(logits, np.ndarray)
        found.append((decoder.extend(other, second[-9:]).copy(), logits))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.allclose(found[0][1], found[1][1], atol=0.05)


def test_a_prompts_last_logits_are_those_that_scoring_gives(onnx: Path, runtime: Runtime) -> None:
    config = json.loads((onnx / "genai_config.json").read_text())
    decoder = BatchDecoder(onnx, config, 2, 4, 0)
    assert decoder.keeps_last
    tokens = runtime.tokenizer.encode("The cat sat on the mat, and the dog")
    scored = decoder.score(tokens)
    row = decoder.open(tokens, len(tokens))
    row.tokens = list(tokens)
    computed = decoder.run([row], np.array([tokens]), last=3)
    assert scored.shape == (len(tokens), decoder.vocabulary_size)
    np.testing.assert_allclose(computed[0], scored[-3:], atol=1e-3)
    row.tokens = []
    np.testing.assert_allclose(decoder.extend(row, tokens), scored[-1], atol=1e-3)


@pytest.fixture(scope="module")
def floats(lettered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder in float32, whose logits do not hang on how many tokens a call has."""
    folder, target = tmp_path_factory.mktemp("floats") / "onnx", composed("target=cpu-fp32").target
    save = partial(write, quantizer=None, said=silent, last_logits=True)
    make(lettered, target, target.precision, folder, save)
    return folder


@pytest.mark.parametrize(
    "parameters",
    [
        Parameters(max_tokens=90),
        Parameters(max_tokens=90, repetition_penalty=1.2),
        Parameters(max_tokens=40, temperature=0.2, seed=7, n=1, logprobs=True, top_logprobs=2),
    ],
)
def test_drafts_shorten_the_work_and_change_no_token(
    floats: Path, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "one two three four five six seven eight nine ten " * 3
    plain, drafting = Runtime(floats), Runtime(floats, prompt_lookup_num_tokens=8)
    calls: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        own = getattr(BatchDecoder, name)

        def counted(*arguments: Any) -> Any:
            calls.append(name)
            return own(*arguments)

        return counted

    for name in ("extend_by_draft", "step"):
        monkeypatch.setattr(BatchDecoder, name, counting(name))
    expected = plain.answer([text, text[:-20] + "and"], parameters)
    calls.clear()
    for prompt, [wanted] in zip([text, text[:-20] + "and"], expected, strict=True):
        [[found]] = drafting.answer([prompt], parameters)
        assert found.text == wanted.text
        assert found.completion_tokens == wanted.completion_tokens
        assert found.finish_reason == wanted.finish_reason
        assert [token for token, *_ in found.logprobs] == [token for token, *_ in wanted.logprobs]
    assert "extend_by_draft" in calls
    if parameters.temperature == 0:
        assert len(calls) < sum(answer.completion_tokens for [answer] in expected) * 0.8
    turn = text + expected[0][0].text + " and then"  # begun from what the draft left in the cache
    [[after]], [[before]] = (model.answer([turn], parameters) for model in (drafting, plain))
    assert after.text == before.text


def test_a_draft_is_cut_at_a_stop_string_and_at_the_last_token(floats: Path) -> None:
    plain, drafting = Runtime(floats), Runtime(floats, prompt_lookup_num_tokens=16)
    text = "over and over and over and over and "
    [[whole]] = plain.answer([text], Parameters(max_tokens=48))
    middle = whole.text[len(whole.text) // 2 :][:2]
    for parameters in (
        *(Parameters(max_tokens=most) for most in range(1, 24)),
        Parameters(max_tokens=48, stop=(middle,)),
    ):
        [[expected]], [[found]] = (model.answer([text], parameters) for model in (plain, drafting))
        assert found == replace(expected, cached_tokens=found.cached_tokens)


def test_a_short_prompt_is_not_held_up_by_a_long_one_and_answers_as_alone(floats: Path) -> None:
    alone, model = Runtime(floats, cache_mb=0), Runtime(floats, cache_mb=0)
    long, first = "a long prompt " * 110, "the first one"
    shorts = [f"a short prompt {number}" for number in range(5)]
    asked = [first, long, *shorts]
    expected = [texts(alone.answer([text], Parameters(max_tokens=30)))[0] for text in asked]
    ended: SimpleQueue[tuple[int, str | Completion | Exception]] = SimpleQueue()
    model.begin([first, long, *shorts], Parameters(max_tokens=30), ended, streamed=False)
    events = [ended.get(timeout=30) for _ in asked]
    found = {choice: event.text for choice, event in events if isinstance(event, Completion)}
    assert [found[choice] for choice in range(len(asked))] == expected
    assert [choice for choice, _ in events].index(1) > 2  # some short ones were answered before
    assert len(model.tokenizer.encode(long)) > 1000


def test_the_queue_holds_no_more_than_it_may_while_a_row_is_opened(
    floats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Runtime(floats, max_batch_size=1, max_queue_size=1)
    opening, go_on = threading.Event(), threading.Event()
    own = model.scheduler.decoder.open

    def slow(*args: Any) -> Any:
        opening.set()
        go_on.wait(30)
        return own(*args)

    monkeypatch.setattr(model.scheduler.decoder, "open", slow)
    events: SimpleQueue[Any] = SimpleQueue()
    asked = Parameters(max_tokens=2), events, False
    model.begin(["first"], *asked)
    assert opening.wait(30)
    model.begin(["second"], *asked)
    with pytest.raises(Busy):
        model.begin(["third"], *asked)
    go_on.set()
    assert all(isinstance(events.get(timeout=30)[1], Completion) for _ in range(2))


def test_a_default_of_max_tokens_gives_way_to_the_context_and_a_wish_does_not(floats: Path) -> None:
    model = Runtime(floats, context_length=40, defaults={"max_tokens": 30})
    no_end = {"logit_bias": {str(token): -100 for token in model.tokenizer.end_tokens}}

    def ask(model: Runtime, length: int, **fields: Any) -> Completion:
        parameters = Parameters.of({**no_end, **fields}, model.defaults)
        [[answer]] = model.answer([[9] * length], parameters)
        return answer

    for length, most in ((5, 30), (35, 5), (39, 1)):
        answer = ask(model, length)
        assert (answer.completion_tokens, answer.finish_reason) == (most, "length")
        assert ask(model, length, max_tokens=1).completion_tokens == 1
    for length, fields in ((35, {"max_tokens": 6}), (40, {}), (41, {})):
        with pytest.raises(TooLong, match="leaves no room for .* the context length is 40"):
            ask(model, length, **fields)
    assert ask(Runtime(floats), 1).completion_tokens == MAX_TOKENS


def test_drafts_come_from_where_the_last_tokens_stood_before() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 1, 2, 3], 8)
    assert lookup.draft(8) == [4, 5]
    assert lookup.draft(1) == [4]
    assert lookup.draft(0) == []
    lookup.judge(2, 2)
    assert lookup.draft(8) == [4, 5, 9, 1]  # right ones make the next one longer
    lookup.judge(4, 0)
    assert lookup.draft(8) == []  # wrong ones make it pause
    for token in [1, 2, 3] * 4:
        lookup.push(token)
    assert lookup.draft(8) == [1, 2]


def test_the_generators_of_onnxruntime_genai_agree_with_the_batch(
    onnx: Path, runtime: Runtime, prompts: list[str]
) -> None:
    config = json.loads((onnx / "genai_config.json").read_text())
    batch = BatchDecoder(onnx, config, 2, 4, 0)
    single = GeneratorDecoder(onnx, config, "cpu", 2, 64)
    for prompt in prompts[:2] * 2:  # the second time from what the Generator kept
        tokens = runtime.tokenizer.encode(prompt)
        rows = [(decoder, decoder.open(tokens, len(tokens) + 9)) for decoder in (batch, single)]
        left, right = (decoder.extend(row, tokens[len(row.tokens) :]) for decoder, row in rows)
        for _ in range(8):
            assert left.argmax() == right.argmax()
            token = int(left.argmax())
            steps = [decoder.step([row], [token])[0] for decoder, row in rows]
            left, right = map(np.asarray, steps)
        for decoder, row in rows:
            decoder.close(row)
    assert single.kept
    scores = batch.score(tokens), single.score(tokens)
    np.testing.assert_allclose(*scores, atol=1e-3)


def test_a_generators_logits_are_those_after_a_last_token_of_padding(
    onnx: Path, runtime: Runtime
) -> None:
    config = json.loads((onnx / "genai_config.json").read_text())
    single = GeneratorDecoder(onnx, config, "cpu", 2, 64)
    for last in (config["model"]["pad_token_id"], 0, config["model"]["bos_token_id"]):
        tokens = [*runtime.tokenizer.encode("The cat sat on the"), last]
        logits = single.extend(single.open(tokens, 64), tokens)
        np.testing.assert_allclose(logits, single.score(tokens)[-1], atol=1e-4)


def test_a_prompt_out_of_the_cache_gives_the_same_answer(onnx: Path, prompts: list[str]) -> None:
    runtime = Runtime(onnx)
    parameters = Parameters(max_tokens=24, temperature=0.8, seed=5)
    [[first]], [[second]] = (runtime.answer(prompts[:1], parameters) for _ in range(2))
    assert first.cached_tokens == 0
    assert second.cached_tokens == second.prompt_tokens - 1
    assert first.text == second.text


def test_a_second_turn_computes_only_what_is_new(onnx: Path) -> None:
    runtime = Runtime(onnx)
    messages = [{"role": "user", "content": "Here are my notes. " + "I like tea. " * 60}]
    [[first]] = runtime.answer([runtime.render(messages)], Parameters(max_tokens=16))
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "So?"}]
    [[second]] = runtime.answer([runtime.render(messages)], Parameters(max_tokens=4))
    assert second.cached_tokens >= first.prompt_tokens


def test_the_cache_keeps_to_its_budget(onnx: Path, prompts: list[str]) -> None:
    runtime = Runtime(onnx, cache_mb=3)  # some 65 tokens of this model
    runtime.answer(prompts, Parameters(max_tokens=16))
    wait_for_idle(runtime)
    decoder = runtime.scheduler.decoder
    assert isinstance(decoder, BatchDecoder)
    kept = [array.nbytes for prefix in decoder.prefixes.kept for array in prefix.arrays]
    assert 0 < sum(kept) == decoder.prefixes.size <= 3e6
    assert not decoder.rows


def test_n_answers_share_their_prompt_and_differ(runtime: Runtime, prompts: list[str]) -> None:
    parameters = Parameters(max_tokens=16, n=3, temperature=1.2, seed=1)
    [answers] = runtime.answer(prompts[2:3], parameters)
    assert len({answer.text for answer in answers}) == 3
    assert answers[2].cached_tokens == answers[2].prompt_tokens - 1
    assert texts([answers]) == texts(runtime.answer(prompts[2:3], parameters))


def test_a_stream_is_the_answer_token_for_token(runtime: Runtime, prompts: list[str]) -> None:
    for parameters in (
        Parameters(max_tokens=40),
        Parameters(max_tokens=40, temperature=1.0, seed=7, stop=("the", " a")),
    ):
        *pieces, last = [event for _, event in runtime.stream(prompts[2], parameters)]
        [[whole]] = runtime.answer(prompts[2:3], parameters)
        assert "".join(map(str, pieces)) == whole.text
        assert isinstance(last, Completion) and last.completion_tokens == whole.completion_tokens
        assert not any(stop in whole.text for stop in parameters.stop)
    assert len(pieces) > 1


def test_a_stop_string_is_never_leaked_across_pieces(runtime: Runtime, prompts: list[str]) -> None:
    [[whole]] = runtime.answer(prompts[2:3], Parameters(max_tokens=40))
    stop = whole.text[25:45]  # spans several tokens, and begins within one
    parameters = Parameters(max_tokens=40, stop=("never comes", stop))
    *pieces, last = [event for _, event in runtime.stream(prompts[2], parameters)]
    assert "".join(map(str, pieces)) == whole.text[: whole.text.index(stop)]
    assert isinstance(last, Completion) and last.finish_reason == "stop"


def test_characters_of_several_tokens_come_whole(
    runtime: Runtime, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "🎉👩‍👩‍👧 你好世界 naïve ก็"
    tokens = runtime.tokenizer.encode(text)
    assert len(tokens) > 2 * len(text.split())
    for count in range(1, len(tokens) + 1):  # also where the answer ends within a character
        said = iter(tokens)
        monkeypatch.setattr(Sampler, "choose", lambda self, logits, said=said: next(said))
        events = [event for _, event in runtime.stream(prompts[0], Parameters(max_tokens=count))]
        *pieces, last = events
        said_text = "".join(map(str, pieces))
        assert isinstance(last, Completion) and last.text == said_text
        assert "\ufffd" not in said_text and text.startswith(said_text)
    assert said_text == text


def test_a_json_schema_is_kept_also_when_sampling(runtime: Runtime, prompts: list[str]) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    parameters = Parameters(max_tokens=120, temperature=1.0, seed=2, n=3, schema=json.dumps(schema))
    [answers] = runtime.answer(prompts[:1], parameters)
    for answer in answers:
        assert answer.finish_reason == "stop"
        assert json.loads(answer.text).keys() == {"city", "people"}


def test_a_schema_may_hold_characters_of_several_tokens(
    runtime: Runtime, prompts: list[str]
) -> None:
    wanted = {"mood": "🎉 你好 ก็", "by": "👩‍👩‍👧"}
    names = [wanted["by"], "x🌀"]
    schema = {
        "type": "object",
        "properties": {"mood": {"const": wanted["mood"]}, "by": {"enum": names}},
        "required": ["mood", "by"],
        "additionalProperties": False,
    }
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    for temperature in (0.0, 1.5):
        parameters = Parameters.of({**asked, "temperature": temperature, "seed": 1})
        [[answer]] = runtime.answer(prompts[:1], parameters)
        found = json.loads(answer.text)
        assert found["mood"] == wanted["mood"] and found["by"] in names


def test_a_grammar_knows_tokens_that_the_model_has_no_row_for(onnx: Path) -> None:
    config = json.loads((onnx / "genai_config.json").read_text())
    config["model"]["vocab_size"] -= 100  # as Gemma 3's, whose last token is an image's
    grammar = Tokenizer(onnx, config).grammar('{"const": "yes"}')
    scores = grammar.within(np.zeros(config["model"]["vocab_size"], np.float32))
    assert 0 < np.isfinite(scores).sum() < 10


def test_an_abandoned_stream_frees_its_row(runtime: Runtime, prompts: list[str]) -> None:
    stream = runtime.stream(prompts[2], Parameters(max_tokens=2000))
    next(stream)
    assert len(runtime.scheduler.decoder.rows) == 1  # type: ignore[attr-defined]
    del stream
    gc.collect()
    wait_for_idle(runtime)
    assert not runtime.scheduler.decoder.rows  # type: ignore[attr-defined]


ENDS_AMIDST = """
import sys
from queue import SimpleQueue
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.parameters import Parameters
events = SimpleQueue()
Runtime(sys.argv[1]).begin(["Once upon a time"], Parameters(max_tokens=2000), events, True)
events.get()
"""


def test_a_process_may_end_while_a_model_answers(onnx: Path) -> None:
    command = [sys.executable, "-c", ENDS_AMIDST, str(onnx)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_full_queue_says_busy_and_recovers(onnx: Path, prompts: list[str]) -> None:
    runtime = Runtime(onnx, max_batch_size=1, max_queue_size=1)
    streams = [runtime.stream(prompt, Parameters(max_tokens=2000)) for prompt in prompts[:2]]
    next(streams[0])
    waiting = threading.Thread(target=lambda: next(streams[1]))
    waiting.start()
    while not runtime.scheduler.waiting:
        time.sleep(0.01)
    with pytest.raises(Busy, match="max_queue_size is 1"):
        runtime.answer(prompts[:1], Parameters(max_tokens=1))
    streams[0].close()
    waiting.join()
    streams[1].close()
    assert texts(runtime.answer(prompts[:1], Parameters(max_tokens=4)))


def test_more_answers_than_the_queue_can_hold_are_refused(onnx: Path) -> None:
    runtime = Runtime(onnx, max_batch_size=2, max_queue_size=3)
    [answers] = runtime.answer(["Hello"], Parameters(max_tokens=2, n=5))
    assert len(answers) == 5
    with pytest.raises(RequestError, match="n is 6; max_batch_size and max_queue_size hold 5"):
        runtime.answer(["Hello"], Parameters(max_tokens=2, n=6))


def test_an_error_while_computing_reaches_its_caller_and_not_the_next(
    onnx: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(onnx)
    step = runtime.scheduler.decoder.step

    def fail(*arguments: object) -> list[np.ndarray]:
        monkeypatch.setattr(runtime.scheduler.decoder, "step", step)
        raise RuntimeError("out of memory")

    question = prompts[:1], Parameters(max_tokens=8)
    expected = texts(runtime.answer(*question))
    monkeypatch.setattr(runtime.scheduler.decoder, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        runtime.answer(*question)
    assert texts(runtime.answer(*question)) == expected


@pytest.mark.parametrize("computed", [0, 12], ids=["reading", "answering"])
@pytest.mark.parametrize("decoder", ["BatchDecoder", "GeneratorDecoder"])
def test_a_sequence_that_cannot_be_computed_fails_alone(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, decoder: str, computed: int
) -> None:
    alone = decoder == "GeneratorDecoder"
    monkeypatch.setattr("slm_pyfunc.engine.runtime.runs_alone", lambda _: alone)
    runtime, bad = Runtime(tiny_onnx), 500
    prompts = [[start, 7, 8, 9] for start in (400, bad, 600, 700)]
    parameters = Parameters(max_tokens=60)
    expected = [texts(runtime.answer([prompt], parameters)) for prompt in prompts]
    assert type(runtime.scheduler.decoder).__name__ == decoder
    batches = []

    def failing(compute: Any) -> Any:
        def run(rows: Any, ids: Any, **options: Any) -> Any:
            every = rows if isinstance(rows, list) else [rows]
            batches.append(len(every))
            if any(row.tokens[:1] == [bad] and len(row.tokens) > computed for row in every):
                raise RuntimeError("indices element out of data bounds")
            return compute(rows, ids, **options)

        return run

    method = "extend" if alone else "run"
    compute = getattr(runtime.scheduler.decoder, method)
    monkeypatch.setattr(runtime.scheduler.decoder, method, failing(compute))

    def ask(prompt: list[int]) -> list[str]:
        try:
            return texts(runtime.answer([prompt], parameters))
        except RuntimeError as error:
            return [str(error)]

    for _ in range(2):
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(ask, prompts))
        assert found.pop(1) == ["indices element out of data bounds"]
        assert found == [expected[0], *expected[2:]]
    assert alone or max(batches) > 2
    wait_for_idle(runtime)
    monkeypatch.undo()
    assert texts(runtime.answer(prompts[1:2], parameters)) == expected[1]


def test_a_sequence_without_memory_fails_alone(
    onnx: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(onnx)
    stream = runtime.stream(prompts[2], Parameters(max_tokens=60))
    pieces = [next(stream)]

    def fail(*arguments: object) -> np.ndarray:
        raise MemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr("slm_pyfunc.engine.batch_decoder.lazy_zeros", fail)
        with pytest.raises(MemoryError):
            runtime.answer(prompts[:1], Parameters(max_tokens=4000))
    *pieces, last = [*pieces, *stream]
    expected = Runtime(onnx).answer(prompts[2:3], Parameters(max_tokens=60))
    assert isinstance(last[1], Completion) and [last[1].text] == texts(expected)
    assert texts(runtime.answer(prompts[:1], Parameters(max_tokens=4)))


def test_threads_get_their_own_answers(runtime: Runtime, prompts: list[str]) -> None:
    parameters = [Parameters(max_tokens=10 + 3 * i, temperature=0.7, seed=i) for i in range(4)]
    jobs = [(prompt, chosen) for prompt in prompts for chosen in parameters]

    def ask(job: tuple[str, Parameters]) -> str:
        return texts(runtime.answer([job[0]], job[1]))[0]

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(ask, jobs)) == alone


def answer_in_child(runtime: Runtime, prompt: str, queue: "multiprocessing.Queue[str]") -> None:
    queue.put(texts(runtime.answer([prompt], Parameters(max_tokens=8)))[0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_loads_for_itself(
    runtime: Runtime, prompts: list[str], method: str
) -> None:
    expected = texts(runtime.answer(prompts[:1], Parameters(max_tokens=8)))[0]
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=answer_in_child, args=(runtime, prompts[0], queue))
    child.start()
    assert queue.get(timeout=120) == expected
    child.join()
    assert child.exitcode == 0


def test_a_pickle_holds_no_weights(runtime: Runtime, prompts: list[str]) -> None:
    pickled = pickle.dumps(runtime)
    assert len(pickled) < 20_000
    again = pickle.loads(pickle.dumps(pickle.loads(pickled)))
    question = prompts[:1], Parameters(max_tokens=4)
    assert texts(again.answer(*question)) == texts(runtime.answer(*question))


def test_a_flipped_byte_is_refused(onnx: Path, tmp_path: Path) -> None:
    digests = json.loads((onnx / "provenance.json").read_text())["files"]
    copy = shutil.copytree(onnx, tmp_path / "onnx")
    Runtime(copy, sha256=digests)
    weights = copy / "model.onnx.data"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"model.onnx.data changed since the model was logged"):
        Runtime(copy, sha256=digests)


def test_threads_are_the_cores_that_the_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from slm_pyfunc.engine.cores import all_cores; print(all_cores())"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.strip() == "1"


def test_openmps_limit_caps_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spark sets it to the cores of a task."""
    monkeypatch.setattr("slm_pyfunc.engine.cores.affinity", lambda: list(range(8)))
    monkeypatch.setattr("slm_pyfunc.engine.cores.cpu_quota", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert available_cores() == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert available_cores() == 3


@pytest.mark.parametrize(("limit", "turns"), [("2", False), ("3", True), ("64", True)])
def test_models_take_turns_where_two_of_them_want_more_cores_than_there_are(
    tiny_onnx: Path, limit: str, turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm_pyfunc.engine.cores.affinity", lambda: list(range(4)))
    monkeypatch.setattr("slm_pyfunc.engine.cores.cpu_quota", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert (Runtime(tiny_onnx).scheduler.turn.turn is not None) == turns


def test_telemetry_is_off_before_the_runtime_is_imported() -> None:
    code = "import slm_pyfunc, os, sys; assert 'onnxruntime_genai' not in sys.modules; "
    code += "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.stdout.strip() == "1", process.stderr


def test_a_stopped_process_holds_up_others_no_longer_than_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slm_pyfunc.engine.cores.PATIENCE_S", 0.2)
    code = "import sys; from slm_pyfunc.engine.cores import Turn\n"
    code += "with Turn()():\n    print('taken', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
    turn = Turn()
    with turn():
        assert turn.waits_again_at > time.monotonic()
    holder.communicate()
    turn.waits_again_at = 0
    with turn():
        assert turn.waits_again_at == 0


def test_text_that_the_tokenizer_would_cut_is_refused(runtime: Runtime) -> None:
    for prompt in ("abc\0def", "half \ud83c"):
        with pytest.raises(RequestError, match="prompt holds a NUL or half a surrogate pair"):
            runtime.answer([prompt], Parameters())


def test_a_tiny_temperature_is_greedy(runtime: Runtime, prompts: list[str]) -> None:
    greedy = texts(runtime.answer(prompts[:1], Parameters(max_tokens=8)))
    for temperature in (1e-40, 1e-4):
        parameters = Parameters(max_tokens=8, temperature=temperature, top_p=0.9)
        assert texts(runtime.answer(prompts[:1], parameters)) == greedy


def test_candidates_are_the_nucleus_of_the_best() -> None:
    scores = np.log(np.array([0.5, 0.25, 0.15, 0.06, 0.04], np.float32))
    assert set(candidates(scores, 0, 1.0)) == {0, 1, 2, 3, 4}
    assert set(candidates(scores, 2, 1.0)) == {0, 1}
    assert list(candidates(scores, 0, 0.7)) == [0, 1]
    assert list(candidates(scores, 2, 0.6)) == [0]  # two thirds of what top_k leaves
    assert list(candidates(scores, 0, 0.01)) == [0]
    assert set(candidates(scores, 0, 1.0, 0.25)) == {0, 1, 2}  # a quarter as likely as the best
    assert set(candidates(scores, 2, 1.0, 0.1)) == {0, 1}


def test_biases_and_penalties_move_what_is_chosen() -> None:
    logits = np.array([3.0, 2.5, 2.0, 0.0], np.float32)

    def chosen(**fields: Any) -> list[int]:
        sampler = Sampler(Parameters.of(fields), [0, 1], 0, None)
        return [sampler.choose(logits) for _ in range(4)]

    assert chosen() == [0, 0, 0, 0]
    assert chosen(presence_penalty=0.8) == [0, 1, 0, 0]  # once for each token, not the prompt's
    assert chosen(frequency_penalty=0.8) == [0, 1, 0, 2]  # each time again
    assert chosen(presence_penalty=-1) == [0, 0, 0, 0]
    assert chosen(logit_bias={"0": -100, "3": 2.4}) == [1, 1, 1, 1]
    assert chosen(logit_bias={"0": -100, "3": 2.6}) == [3, 3, 3, 3]
    assert logits[0] == 3


def test_sampling_follows_the_models_probabilities(runtime: Runtime) -> None:
    parameters = Parameters(max_tokens=1, temperature=1.0, n=64, logprobs=True, top_logprobs=1)
    answers = [a for seed in range(8) for a in sample(runtime, parameters, seed)]
    [(token, logprob)] = answers[0].logprobs[0][2]
    share = np.mean([answer.logprobs[0][0] == token for answer in answers])
    assert abs(share - np.exp(logprob)) < 0.1  # 4.5 standard deviations at most


def sample(runtime: Runtime, parameters: Parameters, seed: int) -> Iterator[Completion]:
    from dataclasses import replace

    [answers] = runtime.answer(["The capital of France is"], replace(parameters, seed=seed))
    yield from answers


def wait_for_idle(runtime: Runtime) -> None:
    while runtime.scheduler.working:
        time.sleep(0.01)
