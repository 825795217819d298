"""Quantizing on a calibration text: the rounding, the layers, and the graph that takes them."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slm.config.common import ROOT
from slm.config.target import Quantizer
from slm.digests import read_provenance, write_provenance
from slm.errors import InputError, StepError
from slm.exporters import builder, graph, mobius, worker
from slm.exporters.calibrated import Calibrated
from slm.exporters.calibration import (
    Half,
    Rounding,
    Saved,
    calibrate,
    corrected,
    product,
    quantize_layer,
    sum_of,
)
from slm.exporters.calibration_text import (
    ANSWER_TOKENS,
    calibration_windows,
    read_calibration,
    require_readable,
    spread,
)
from slm.exporters.decoder import Decoder, Tensors, empty_model, output_of, require_linears
from slm.exporters.gptq import Inputs, pack, round_weight, search_scales, unpack
from slm.exporters.quantizers import MIXED, require_possible, share_budget
from slm.exporters.sensitivity import sensitivity, sizes_of
from slm.exporters.worker import Request, silent
from slm_pyfunc.engine.runtime import Runtime
from tests.checkpoints import write_as_phi3, write_shallow, write_tiny, write_tokenizer
from tests.conftest import Project, composed

MIXED_TARGET = ("target=cpu-int4-mixed-acc-level-4", "target.budget_bits=null")
# An n-gram this long is not in two texts by chance.
WORDS, CHARACTERS = 8, 12


def inputs_like_a_layers(width: int) -> np.ndarray:
    """Inputs whose channels depend on one another, as those of a layer do."""
    draw = np.random.default_rng(0)
    mixing = draw.standard_normal((width, width)) * np.exp(-np.arange(width) / 60)[:, None]
    noise = 0.3 * draw.standard_normal((1024, width))
    return (draw.standard_normal((1024, width)) @ mixing + noise).astype(np.float32)


def rtn(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    [(packed, scales)] = graph.Rtn(4, 32).quantize("", weight)
    return packed, scales


def weighted_error(
    weight: np.ndarray, integers: np.ndarray, scales: np.ndarray, inputs: np.ndarray
) -> float:
    values = (integers * scales[..., None]).reshape(len(weight), -1)[:, : weight.shape[1]]
    return float(np.square(inputs @ (values - weight).T).sum())


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_gptq_is_closer_than_rounding_to_nearest_on_real_weights(smollm2: Path, name: str) -> None:
    with safe_open(smollm2 / "model.safetensors", "np") as file:
        weight = file.get_tensor(f"model.layers.5.{name}.weight")
    inputs = inputs_like_a_layers(weight.shape[1])
    packed, scales = rtn(weight)
    nearest = weighted_error(weight, unpack(packed, 32), scales, inputs)
    integers, own = round_weight(weight, Inputs(inputs.T @ inputs), 4, 32)
    packed = pack(integers, 4, 32)
    assert weighted_error(weight, unpack(packed, 32), own.astype(np.float32), inputs) < nearest / 4


@pytest.mark.parametrize("shape", [(24, 96), (5, 50), (64, 64)])
def test_searched_scales_lose_less_than_rounding_to_nearest(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(3)
    weight = draw.standard_t(3, shape).astype(np.float32)
    importance = draw.exponential(1.0, shape[1]).astype(np.float32) ** 2

    def lost(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
        values = integers * np.repeat(scales.astype(np.float32), 32, 1)[:, : shape[1]]
        return ((values - weight) ** 2 * importance).sum(1)

    packed, scales = rtn(weight)
    nearest = unpack(packed, 32).reshape(len(weight), -1)[:, : shape[1]]
    searched = search_scales(weight, importance, 4, 32)
    stored = nearest, scales.astype(np.float16)
    assert (lost(*searched) <= lost(*stored)).all()
    assert lost(*searched).sum() < 0.9 * lost(*stored).sum()


@pytest.mark.parametrize("shape", [(1, 16), (7, 33), (3, 100), (64, 96), (5, 257)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_onnxruntimes_kernels(shape: tuple[int, int], bits: int) -> None:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    [(packed, scales)] = graph.Rtn(bits, 32).quantize("", weight)
    integers = unpack(packed, 32).reshape(len(weight), -1)[:, : shape[1]]
    used = shape[1] * bits // 8  # the kernels leave what follows to chance
    found, expected = (each.reshape(len(weight), -1) for each in (pack(integers, bits, 32), packed))
    np.testing.assert_array_equal(found[:, :used], expected[:, :used])


def windows(seed: int, count: int) -> list[list[int]]:
    """Windows of 64 tokens."""
    return np.random.default_rng(seed).integers(3, 200, (count, 64)).tolist()


def calibrated(
    checkpoint: Path, folder: Path, *int8: str, block_size: int = 32, searched: bool = False
) -> Calibrated:
    folder.mkdir()
    rounding = Rounding(4, block_size, list(int8), searched)
    calibrate(Decoder(checkpoint, windows(2, 2)), rounding, folder, lambda _: None)
    return Calibrated(checkpoint, folder, block_size, 0)


def export(maker: Any, checkpoint: Path, quantizer: graph.Quantizer, folder: Path) -> Runtime:
    target = composed("target=cpu-int4-rtn-block-32").target
    write = partial(graph.write, quantizer=quantizer, said=silent)
    maker.make(checkpoint, target, target.precision, folder, write)
    return Runtime(folder)


@pytest.mark.parametrize(
    ("maker", "kind"),
    # Not mobius and phi3: its graph of a tied Phi-3 looks words up in a float embedding.
    [
        (builder, "llama"),
        (mobius, "llama"),
        (builder, "phi3"),
        (builder, "untied"),
        (builder, "head"),
        (mobius, "head"),
        (mobius, "wide"),
    ],
)
def test_an_export_says_what_its_rounded_weights_say_in_torch(
    maker: Any, kind: str, lettered: Path, smollm2: Path, tmp_path: Path
) -> None:
    """The format agrees, of 4 and 8 bits beside each other in one fused product too."""
    from transformers import AutoModelForCausalLM

    checkpoint = lettered
    if kind == "untied":
        checkpoint = write_tiny(tmp_path / "untied", smollm2, tie_word_embeddings=False)
    if kind == "phi3":
        checkpoint = write_as_phi3(tmp_path / "phi3", lettered)
    int8 = ["v_proj", "0.mlp.down_proj", *(["lm_head"] if kind == "head" else [])]
    block_size = 128 if kind == "wide" else 32  # of 64 inputs
    quantizer = calibrated(checkpoint, tmp_path / "calibrated", *int8, block_size=block_size)
    runtime = export(maker, checkpoint, quantizer, tmp_path / "onnx")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for path in quantizer.folder.glob("*.safetensors"):
        saved = Saved(path, block_size)
        for name in saved.names():
            module = model.get_submodule(name)
            module.weight = saved[name].weight(module.weight.shape[1])
    model.tie_weights()
    tokens = runtime.tokenizer.encode("Some text, and what comes after it.")
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1).numpy()
    np.testing.assert_allclose(runtime.log_probabilities(tokens), expected, atol=2e-4)


def test_a_float16_graph_finds_its_weights_and_answers(lettered: Path, tmp_path: Path) -> None:
    quantizer = calibrated(lettered, tmp_path / "calibrated", "v_proj")
    target = composed("target=cuda-int4-mixed").target
    write = partial(graph.write, quantizer=quantizer, said=silent)
    builder.make(lettered, target, target.precision, tmp_path / "onnx", write)
    assert np.isfinite(Runtime(tmp_path / "onnx").log_probabilities([5, 6, 7])).all()


def test_the_estimate_of_what_int4_harms_is_what_it_harms(lettered: Path, tmp_path: Path) -> None:
    """Against the divergence itself, of a model in which one linear alone is rounded."""
    from transformers import AutoModelForCausalLM

    rounding = Rounding(4, 32, [])
    (tmp_path / "found").mkdir()
    decoder = Decoder(lettered, windows(4, 8))
    found = sensitivity(decoder, rounding, tmp_path / "found", lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(lettered, dtype=torch.float32).eval()
    text = torch.tensor(windows(4, 8))
    with torch.inference_mode():
        whole = torch.log_softmax(model(text).logits, -1)
        for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"):
            linear = model.get_submodule(name)
            inputs: list[torch.Tensor] = []
            hook = linear.register_forward_hook(lambda _, x, __, to=inputs: to.append(x[0]))
            model(text)
            hook.remove()
            before = linear.weight
            seen = Inputs(sum_of(product(x, x) for x in inputs).numpy())
            linear.weight = rounding.round(name, before, seen, sweeps=0).weight(before.shape[1])
            rounded = torch.log_softmax(model(text).logits, -1)
            linear.weight = before
            divergence = float((whole.exp() * (whole - rounded)).sum(-1).mean())
            assert found[name] == pytest.approx(divergence, rel=0.5), name


def test_a_pass_that_broke_off_at_each_layer_finds_what_a_whole_one_finds(
    lettered: Path, tmp_path: Path
) -> None:
    rounding = Rounding(4, 32, [])
    steps: list[str] = []
    again: list[str] = []
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    found = sensitivity(Decoder(lettered, windows(4, 2)), rounding, whole, steps.append)
    assert len(steps) == 5  # two layers forward, the head, two layers back

    for number in range(1, 5):  # the last step is begun, and the one before it is done
        with pytest.raises(KeyboardInterrupt):
            dying = partial(die_at, steps[number])
            sensitivity(Decoder(lettered, windows(4, 2)), rounding, broken, dying)
    assert sensitivity(Decoder(lettered, windows(4, 2)), rounding, broken, again.append) == found
    assert [what(said) for said in again] == [what(steps[-1])]
    assert sensitivity(Decoder(lettered, windows(4, 2)), rounding, broken, pytest.fail) == found


def what(said: str) -> str:
    """A line of progress without the time left."""
    return said.partition(",")[0]


def die_at(last: str, said: str) -> None:
    if what(said) == what(last):
        raise KeyboardInterrupt


def test_a_weight_that_is_not_the_checkpoints_is_refused(lettered: Path, tmp_path: Path) -> None:
    quantizer = calibrated(lettered, tmp_path / "calibrated")
    weights = load_file(lettered / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = weights[name].numpy().copy()
    assert quantizer.quantize(name, weight)
    weight[3, 5] += 1e-6
    with pytest.raises(StepError, match="1 of 128 rows of the graph's .*up_proj.weight are in no"):
        quantizer.quantize(name, weight)


def test_searched_scales_reach_the_file_as_they_are(lettered: Path, tmp_path: Path) -> None:
    quantizer = calibrated(lettered, tmp_path / "calibrated", searched=True)
    weights = load_file(lettered / "model.safetensors")
    files = [Saved(path, 32) for path in quantizer.folder.glob("*.safetensors")]
    assert sum(len(file.names()) for file in files) == 15
    for file in files:
        for name in file.names():
            weight = weights[f"{name}.weight"]
            off = (file[name].weight(weight.shape[1]) - weight).norm() / weight.norm()
            assert off < 0.2, name


def test_equal_layers_keep_the_rounding_of_each(lettered: Path, tmp_path: Path) -> None:
    weights = load_file(lettered / "model.safetensors")
    for name in [name for name in weights if ".layers.1." in name]:
        weights[name] = weights[name.replace(".1.", ".0.")].clone()
    checkpoint = write_shallow_copy(lettered, tmp_path / "checkpoint", weights)
    quantizer = calibrated(checkpoint, tmp_path / "calibrated")
    name = "model.layers.{}.mlp.up_proj.weight"
    weight = weights[name.format(0)].numpy().copy()
    [(first, _)], [(second, _)] = (quantizer.quantize(name.format(i), weight) for i in (0, 1))
    assert (first != second).any()


def test_equal_rows_are_taken_in_their_order(tmp_path: Path) -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    save_file({"weight": rows}, tmp_path / "model.safetensors")
    tensors = Tensors(tmp_path)
    assert tensors.rows("weight", rows.numpy()).tolist() == [0, 1, 2, 3, 4]
    assert tensors.rows("weight", rows[1:4].numpy()).tolist() == [1, 2, 3]
    assert tensors.rows("weight", rows.numpy() + 1).tolist() == [-1] * 5


def write_shallow_copy(checkpoint: Path, folder: Path, weights: dict[str, Any]) -> Path:
    write_shallow(folder, checkpoint)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def test_the_checkpoints_stream_is_its_own_while_its_layer_is_rounded(
    lettered: Path, tmp_path: Path
) -> None:
    decoder = Decoder(lettered, [[n % 90 for n in each] for each in windows(2, 4)])
    layer, call, whole = decoder.layers[0], decoder.calls[0], decoder.embedded()
    with decoder.filled(layer):
        expected = [output_of(call(layer, hidden)) for hidden in whole]
        file, rounding = Saved(tmp_path / "0", 32), Rounding(4, 32, [])
        quantize_layer(layer, call, whole, decoder.embedded(), decoder.name_of, rounding, file)
        rounded = [output_of(call(layer, hidden)) for hidden in decoder.embedded()]
    assert all(map(torch.equal, whole, expected))
    assert not any(map(torch.equal, rounded, expected))


def test_calibration_that_broke_off_goes_on_after_its_last_layer(
    lettered: Path, tmp_path: Path
) -> None:
    whole = calibrated(lettered, tmp_path / "whole").folder
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("head", "0"):
        (folder / f"{name}.safetensors").write_bytes((whole / f"{name}.safetensors").read_bytes())
    before = (folder / "0.safetensors").stat().st_mtime_ns
    calibrate(Decoder(lettered, windows(2, 2)), Rounding(4, 32, []), folder, lambda _: None)
    assert (folder / "0.safetensors").stat().st_mtime_ns == before
    for name in ("head", "0", "1"):
        file = f"{name}.safetensors"
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), name


def halves_of(inputs: torch.Tensor, drifts: torch.Tensor) -> list[Half]:
    """What a text of four windows [4, positions, inputs] tells, whose residual lacks `drifts`."""
    halves = [Half(), Half()]
    for number, (x, drift) in enumerate(zip(inputs, drifts, strict=True)):
        halves[number % 2].add(x, x, drift, torch.ones_like(drift))
    return halves


def test_what_the_inputs_say_of_a_drift_is_corrected_and_its_noise_is_left() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 256, 64, generator=draw)
    weight, lacking = (torch.randn(16, 64, generator=draw) for _ in range(2))
    noise = 30 * torch.randn(4, 256, 16, generator=draw)
    assert torch.equal(corrected(weight, halves_of(inputs, noise)), weight)
    found = corrected(weight, halves_of(inputs, inputs @ lacking.T + noise / 30)) - weight
    assert (found - lacking).square().mean() < 0.03 * lacking.square().mean()
    # Where both are there, as much is taken as serves inputs that were not seen.
    found = corrected(weight, halves_of(inputs, inputs @ lacking.T + noise)) - weight
    assert (found - lacking).square().mean() < lacking.square().mean()


def test_a_position_counts_as_the_norm_that_follows_makes_it_count() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 256, 64, generator=draw)
    weight, lacking = (torch.randn(16, 64, generator=draw) for _ in range(2))
    drifts, residuals = inputs @ lacking.T, torch.ones(4, 256, 16)
    drifts[:, 0], residuals[:, 0] = 1e4 * torch.randn(4, 16, generator=draw), 1e5
    halves = [Half(), Half()]
    for number in range(4):
        halves[number % 2].add(inputs[number], inputs[number], drifts[number], residuals[number])
    found = corrected(weight, halves) - weight
    assert (found - lacking).square().mean() < 0.03 * lacking.square().mean()


def test_no_calibration_text_is_in_the_evaluations() -> None:
    def grams(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}

    def dense(text: str) -> set[str]:
        """Of scripts without spaces."""
        runs = re.findall(rf"[\u3040-\u30ff\u4e00-\u9fff，。、]{{{CHARACTERS},}}", text)
        return {run[i : i + CHARACTERS] for run in runs for i in range(len(run) - CHARACTERS + 1)}

    evaluation = [ROOT / "data" / name for name in ("texts.jsonl", "prompts.jsonl")]
    for pieces, least in ((grams, 3000), (dense, 400)):
        judged = set().union(*(pieces(text) for path in evaluation for text in texts_of(path)))
        calibration = texts_of(ROOT / "data" / "calibration.jsonl")
        read = set().union(*map(pieces, calibration))
        assert len(judged) > least and len(read) > least and not judged & read
    whole = [set(texts_of(path)) for path in (*evaluation, ROOT / "data" / "calibration.jsonl")]
    assert not (whole[0] | whole[1]) & whole[2]  # of texts too short for either


def texts_of(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        text
        for row in rows
        for text in ([row["text"]] if "text" in row else [m["content"] for m in row_messages(row)])
    ]


def row_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = (row.get("inputs") or row)["messages"]
    return found


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"body": "other"}', "row 2 has neither a text nor messages"),
        ('{"text": null}', "row 2 is malformed at .*text: None is not"),
        ('{"messages": ["hello"]}', "row 2 is malformed at .*0.: 'hello' is not"),
        ("text,of,a,table", "mine.jsonl cannot be read: line 2 is not JSON"),
    ],
)
def test_a_calibration_row_without_text_is_named(row: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"text": "some"}}\n{row}\n')
    with pytest.raises(InputError, match=words):
        read_calibration(str(path))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target.int8=[v_proj]"], "only target.quantizer=gptq with precision=int4 can heed"),
        (["target.budget_mb=90"], "only target.quantizer=gptq with precision=int4 can heed"),
        (["target.quantizer=gptq", "target.budget_mb=9", "target.budget_bits=5"], "give one of"),
        (["target.quantizer=gptq", "target.budget_mb=0"], "budget_mb is 0.0; it must be above 0"),
        (["target=cuda-fp16", "target.quantizer=gptq"], "is fp16; with .*gptq it must be int4 or"),
        (
            ["target.quantizer=grid", "target.precision=int8"],
            "is int8; with .*grid it must be",
        ),
        (["target.builder_options.block_size=33"], "needs a block_size of 16, 32, 64, 128 or 256"),
        (
            ["+target.builder_options.int4_is_symmetric=false"],
            "which the builder's own quantizer alone",
        ),
    ],
)
def test_a_mixture_that_cannot_be_made_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(Exception, match=words):
        composed(*overrides)


@pytest.fixture(scope="module")
def drafted(lettered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder of a checkpoint whose template begins with a token of its own."""
    folder = tmp_path_factory.mktemp("drafted")
    checkpoint = write_tiny(folder / "checkpoint", lettered)
    template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    target = composed("target=cpu-int4-rtn-block-32").target
    write = partial(graph.write, quantizer=graph.Rtn(4, 32), said=silent)
    builder.make(checkpoint, target, target.precision, folder / "onnx", write)
    return folder


def test_conversations_are_read_in_the_checkpoints_chat_format_from_all_over_the_file(
    drafted: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    rows: list[dict[str, Any]] = [{"text": f"text {i} " + "abc " * 40} for i in range(8)]
    questions = [f"question {i}?" for i in range(40)]
    rows += [{"messages": [{"role": "user", "content": question}]} for question in questions]
    kept, asked = tmp_path / "answers.json", []

    def draft() -> Path:
        asked.append(1)
        return drafted / "onnx"

    def read(most: int) -> list[list[int]]:
        return calibration_windows(rows, drafted / "checkpoint", most, draft, kept, silent)

    found = read(4096)
    assert len(found) == 8 and {len(window) for window in found} == {512}
    tokenizer = AutoTokenizer.from_pretrained(drafted / "checkpoint")
    text = str(tokenizer.decode([token for window in found for token in window]))
    spoken = json.loads(kept.read_text())
    assert len(spoken) < len(questions)  # no more than are read
    for tokens, question in zip(spoken, spread(questions), strict=False):
        said = str(tokenizer.decode(tokens))
        assert said.startswith(f"<s>user: {question}</s>assistant: ")
        written = tokenizer(said, add_special_tokens=False)["input_ids"]
        assert said.count("<s>") == 1 + said.partition("assistant: ")[2].count("<s>")
        assert len(tokens) <= len(written) + 1
    places = sorted(int(n) for n in re.findall(r"question (\d+)\?", text))
    assert places[0] < 10 and places[-1] >= 30  # of the file's beginning and of its end
    assert all(f"text {i} " in text for i in range(8))  # too short for a half: all of it
    assert read(4096) == found and len(asked) == 1  # answered once


def test_a_mixed_target_of_a_gpu_reads_the_models_own_answers(
    lettered: Path, tmp_path: Path
) -> None:
    """The draft that answers runs on the CPU, whatever the target."""
    rows = [{"messages": [{"role": "user", "content": f"what is {i}?"}]} for i in range(12)]
    request = Request(
        checkpoint=str(lettered),
        onnx=str(tmp_path / "onnx"),
        scratch=str(tmp_path / "scratch"),
        target=composed("target=cuda-int4-mixed").target,
        makers=["genai"],
        text="some text " * 20,
        parity_tokens=64,
        calibration=rows,
        calibration_tokens=512,
        calibrated=str(tmp_path / "calibrated"),
        shared=str(tmp_path / "made.shared"),
    )
    exported = worker.export(request)
    assert exported.read == 512 and {n["bits"] for n in exported.linears.values()} == {4, 8}
    assert not (tmp_path / "scratch" / "draft").exists()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([("user", "a"), ("assistant", "b")], "row 1 ends with an answer: end it with a question"),
        ([("user", "a" * 8192)], r"row 1 takes 8\d* tokens with its answer; the .* is 8192"),
        ([("tool", "a")], "row 1: messages: the model's chat template refuses them: no tools"),
    ],
)
def test_a_conversation_that_the_model_cannot_take_is_named(
    messages: list[tuple[str, str]], words: str, lettered: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(lettered, tmp_path / "checkpoint")
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    with (checkpoint / "chat_template.jinja").open("a") as file:
        file.write(template)
    rows = [{"messages": [{"role": role, "content": text} for role, text in messages]}]
    assert ANSWER_TOKENS < 8192
    with pytest.raises(InputError, match=words):
        require_readable(rows, checkpoint)


def test_stacked_experts_are_refused_before_any_pass(lettered: Path, tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    checkpoint = write_tiny(tmp_path / "checkpoint", lettered, "Mixtral", **experts)
    with pytest.raises(StepError, match=r"experts\.\w+ is a stack of 4 matrices"):
        require_linears(empty_model(checkpoint))


@pytest.mark.parametrize("setting", [{"logits_scaling": 8.0}, {}])
def test_what_follows_the_head_is_in_the_predictions(
    setting: dict[str, float], lettered: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    architecture = "Granite" if setting else "Gemma2"  # which caps its logits
    small = setting or {"final_logit_softcapping": 0.1, "head_dim": 16}
    checkpoint = write_tiny(tmp_path / "checkpoint", lettered, architecture, **small)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    text = windows(4, 1)
    with torch.no_grad():
        decoder = Decoder(checkpoint, text)
        decoder.fill_head()
        seen: list[torch.Tensor] = []
        layer = model.model.layers[-1]
        hook = layer.register_forward_hook(lambda *of: seen.append(output_of(of[2])))
        whole = model(torch.tensor(text))
        hook.remove()
        torch.testing.assert_close(decoder.predict(decoder.head, seen[0]), whole.logits)


def test_a_budget_is_kept_and_spent_the_same_way_twice(lettered: Path, tmp_path: Path) -> None:
    rounding = Rounding(4, 32, [])
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        decoder = Decoder(lettered, windows(2, 2))
        sizes = sizes_of(decoder.linears, 32)
        least, most = (sum(size[i] for size in sizes.values()) for i in (1, 2))
        for share in (0, 0.1, 1):
            budget_mb = (least + share * (most - least)) / 1e6
            target = composed(*MIXED_TARGET, f"target.budget_mb={budget_mb!r}").target
            int8 = share_budget(target, decoder, rounding, folder, folder, silent)
            noted = json.loads((folder / MIXED).read_text())
            assert noted.keys() == sizes.keys()
            assert all(each["divergence"] > 0 for each in noted.values())
            assert set(int8) == {name for name in noted if noted[name]["bits"] == 8}
            left = budget_mb * 1e6 - least - sum(sizes[name].more for name in int8)
            assert left > -1 and all(left < sizes[n].more for n in sizes if n not in int8)
            made.append(noted)
    assert made[:3] == made[3:]


@pytest.mark.usefixtures("exports_here")
def test_a_mixed_exports_provenance_has_the_bits_of_each_linear(
    project: Project, lettered: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(lettered, tmp_path / "checkpoint")
    write_provenance(checkpoint)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": " ".join(str(number) for number in range(400))}))
    target = ["target=cpu-int4-mixed-acc-level-4", "target.budget_bits=4.8"]
    calibration = [f"export.calibration={text}", "export.calibration_tokens=512"]
    exported = project.call("export_onnx", f"source={checkpoint}", *target, *calibration)
    found = read_provenance(Path(exported.uri)).calibration
    assert found["budget_bits"] == 4.8 and found["tokens"] == 512
    bits = {name: each["bits"] for name, each in found["linears"].items()}
    assert set(bits.values()) == {4, 8} and bits["lm_head"] == 4 and len(bits) == 15
    graph = ir.load(Path(exported.uri) / "model.onnx").graph
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    rows = [p.attributes["N"].value for p in products if p.attributes["bits"].value == 8]
    with safe_open(lettered / "model.safetensors", "np") as file:
        kept = sum(file.get_slice(f"{n}.weight").get_shape()[0] for n in bits if bits[n] == 8)
    assert sum(rows) == kept


@pytest.mark.parametrize(
    ("mixing", "words"),
    [
        ("target.budget_bits=4", r"budget is .* MB; this .* take .* MB in int4 and .* in int8"),
        ("target.int8=[v_proj,qkv_proj]", "int8 has qkv_proj, which is not the end .* lm_head"),
        ("target.quantizer=mse", "has 9 tokens; calibration reads windows of 512"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_pass(
    mixing: str, words: str, tmp_path: Path
) -> None:
    checkpoint = write_tiny(tmp_path / "checkpoint", write_tokenizer(tmp_path / "tokenizer"))
    config = composed(*MIXED_TARGET, mixing, "target.name=any")
    numbers = 400 if config.target.quantizer is Quantizer.gptq else 5
    request = Request(
        checkpoint=str(checkpoint),
        onnx="",
        scratch="",
        target=config.target,
        makers=[],
        text="",
        parity_tokens=2,
        calibration=[{"text": " ".join(str(number) for number in range(numbers))}],
        calibration_tokens=512,
    )
    with pytest.raises(InputError, match=words):
        require_possible(request)
