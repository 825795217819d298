"""The graph that prompts are read by: int8 products beside the int4 ones."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from slm.bundle import bundle, digests_of
from slm.config.model import Gate
from slm.config.target import Target
from slm.digests import write_provenance
from slm.errors import InputError, StepError
from slm.evaluation.fidelity import KINDS, compare_with_reference
from slm.evaluation.gates import judge
from slm.exporters import graph, prompts
from slm.exporters.builder import make
from slm.exporters.checks import require_prompts_agree
from slm.exporters.generation import carry_over
from slm.exporters.structure import require_structure
from slm.exporters.worker import require_batched, silent
from slm_pyfunc.engine.batch_decoder import NO_FLASH, BatchDecoder, attention_at_once
from slm_pyfunc.engine.decoder import PROMPT_GRAPH
from slm_pyfunc.engine.runtime import Runtime
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import composed
from tests.test_parity import ARCHITECTURES

pytestmark = pytest.mark.xdist_group("prompts")  # its fixtures once, not in every process

NAME = "cpu-int4-rtn-block-32-acc-level-4-int8-prompts"
TEXT = "The lighthouse keeper wrote a letter about the storm. " * 6
TOKENS = np.random.default_rng(0).integers(2, 250, 300).tolist()


def target_of(*overrides: str) -> Target:
    return composed(f"target={NAME}", *overrides).target


def exported(checkpoint: Path, folder: Path, midway: bool = False) -> Path:
    target = target_of()
    rtn = graph.Rtn(4, 32, 4)
    save = partial(prompts.write, quantizer=rtn, said=silent, midway=midway)
    make(checkpoint, target, target.precision, folder, save)
    carry_over(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, so large that their predictions are far apart."""
    folder = tmp_path_factory.mktemp("prompts")
    tokenizer = write_tokenizer(folder / "tokenizer")
    return write_tiny(folder / "checkpoint", tokenizer, initializer_range=0.2)


@pytest.fixture(scope="module")
def onnx(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(checkpoint, tmp_path_factory.mktemp("prompts") / "onnx")


def opened(onnx: Path) -> BatchDecoder:
    return BatchDecoder(onnx, json.loads((onnx / "genai_config.json").read_text()), 1, 3, 0)


def read(decoder: BatchDecoder, cuts: list[int]) -> list[np.ndarray]:
    """A prompt's last logits, and its keys and values, where it is cut into pieces."""
    row = decoder.open(TOKENS, len(TOKENS))
    for start, stop in zip([0, *cuts], [*cuts, len(TOKENS)], strict=True):
        logits = decoder.extend(row, TOKENS[start:stop]).copy()
    found = [array[row.state, :, : len(TOKENS)].copy() for array in decoder.arrays]
    decoder.close(row)
    return [logits, *found]


def test_a_prompt_reads_the_same_to_the_bit_however_it_is_cut_and_beside_others(onnx: Path) -> None:
    decoder = opened(onnx)
    expected = read(decoder, [256])
    found = [read(decoder, cuts) for cuts in ([100, 200], [1, 129], [299], [200, 201])]
    other = decoder.open(TOKENS[::-1], 200)
    decoder.extend(other, TOKENS[::-1][:200])
    decoder.step([other], [7])
    found.append(read(decoder, [256]))
    for each in found:
        assert all(np.array_equal(a, b) for a, b in zip(each, expected, strict=True))


def test_a_cpu_that_would_overflow_computes_the_same_to_the_bit(
    onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(opened(onnx), [256])
    monkeypatch.setattr("slm_pyfunc.engine.batch_decoder.may_overflow", lambda: True)
    found = read(opened(onnx), [256])
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_prompts_are_read_by_int8_and_answers_by_int4(onnx: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(onnx, tmp_path / "onnx")
    for path in alone.glob(f"{PROMPT_GRAPH}*"):
        path.unlink()
    both, one = opened(onnx), opened(alone)
    assert np.array_equal(both.score(TOKENS, 0), one.score(TOKENS))
    assert not np.array_equal(both.score(TOKENS, 300), one.score(TOKENS))
    np.testing.assert_array_equal(both.score(TOKENS)[:150], both.score(TOKENS, 300)[:150])
    row = both.open(TOKENS[:20], 40)
    assert np.array_equal(both.extend(row, TOKENS[:20]).copy(), both.score(TOKENS[:20], 20)[-1])
    assert (onnx / f"{PROMPT_GRAPH}.data").stat().st_size < 1e6  # of layers alone


@pytest.mark.parametrize("midway", [False, True])
def test_the_graph_computes_what_rounding_in_torch_does(
    checkpoint: Path, midway: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    onnx = exported(checkpoint, tmp_path / "onnx", midway)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def rounded(module: Any, inputs: torch.Tensor) -> torch.Tensor:
        scale = inputs.abs().amax(-1, keepdim=True) / 127
        return torch.nn.functional.linear((inputs / scale).round() * scale, module.weight)

    rtn = graph.Rtn(4, 32)
    own = prompts.AlsoInInt8(rtn, set(), midway, None)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            int4 = torch.tensor(own.floats_of(*rtn.quantize("", weight.numpy())[0]))
            if name == "lm_head":
                model.lm_head.weight = torch.nn.Parameter(int4)  # and the embedding, which it is
                model.model.embed_tokens.weight = model.lm_head.weight
                continue
            weight = (weight + int4) / 2 if midway else weight
            scale = weight.abs().amax(-1, keepdim=True) / 127
            module.weight.data = (weight / scale).round() * scale
            module.forward = partial(rounded, module)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = opened(onnx).score(TOKENS, len(TOKENS))
    # The head's activations are rounded in blocks, and a tie may fall to either side.
    assert np.abs(found - expected).mean() < 0.02 * expected.std()


@pytest.mark.parametrize("architecture", ["Gemma3Text", "Granite", "Mistral", "Qwen2", "Qwen3"])
def test_other_architectures_prompts_are_as_close_as_their_answers(
    architecture: str, tmp_path: Path
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    settings = ARCHITECTURES[architecture]
    checkpoint = write_tiny(tmp_path / "made", tokenizer, architecture, **settings)
    onnx = exported(checkpoint, tmp_path / "onnx")
    require_structure(onnx, target_of())
    require_prompts_agree(Runtime(onnx), TEXT)


def damage(onnx: Path, to: Path, layer: str = "layers.1.", factor: float = 2) -> Path:
    """Multiply the scales of one layer's int8 products."""
    shutil.copytree(onnx, to)
    model = ir.load(to / PROMPT_GRAPH)
    for name, value in model.graph.initializers.items():
        if layer in name and name.endswith("_int8_scales"):
            assert value.const_value is not None
            value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(factor), name=name)
    ir.save(model, to / PROMPT_GRAPH)
    return to


def test_a_damaged_graph_for_prompts_fails_the_export_and_a_gate(
    onnx: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    damaged = damage(onnx, tmp_path / "damaged")
    require_prompts_agree(Runtime(onnx), TEXT)
    with pytest.raises(StepError, match="nats from the other over 256 tokens, more than 1.0"):
        require_prompts_agree(Runtime(damaged), TEXT)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENS])).logits[0]
    np.save(tmp_path / "tokens-00000.npy", np.array(TOKENS))
    np.save(tmp_path / "logp-00000.npy", torch.log_softmax(logits, -1).numpy()[:-1])
    (tmp_path / KINDS).write_text('[""]')
    for each, passes in ((onnx, True), (damaged, False)):
        metrics, _ = compare_with_reference(Runtime(each).log_probabilities, tmp_path)
        [judged] = judge({"kl_divergence": Gate(max=0.6)}, metrics, {})
        assert judged.passed is passes, metrics["kl_divergence"]


def one_on_int4(model: ir.Model, onnx: Path) -> None:
    first = ir.load(onnx / "model.onnx").graph
    node = next(n for n in first if n.op_type == "MatMulNBits")
    put = next(n for n in model.graph if n.op_type == prompts.INT8_PRODUCT)
    inputs = [put.inputs[0]]
    for value in node.inputs[1:3]:
        assert value is not None and value.const_value is not None
        inputs.append(prompts.initializer(model.graph, value.const_value))
    attributes = {name: each.value for name, each in node.attributes.items()}
    graph.replace(model.graph, put, "MatMulNBits", inputs, attributes, graph.MICROSOFT)


def unsigned(model: ir.Model, _: Path) -> None:
    node = next(n for n in model.graph if n.op_type == prompts.INT8_PRODUCT)
    assert node.inputs[1] is not None and node.inputs[1].const_value is not None
    array = node.inputs[1].const_value.numpy().view(np.uint8)
    node.inputs[1].const_value = ir.Tensor(array, name=node.inputs[1].name)
    node.inputs[1].dtype = ir.DataType.UINT8


def fewer_keys(model: ir.Model, _: Path) -> None:
    keys = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    keys.dtype = ir.DataType.FLOAT16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_on_int4, "is no product in int8"),
        (unsigned, "is no product of int8 weights with uint8"),
        (fewer_keys, "inputs or outputs are others"),
    ],
)
def test_a_graph_for_prompts_that_is_otherwise_is_refused(
    onnx: Path, tmp_path: Path, change: Any, words: str
) -> None:
    require_structure(onnx, target_of())
    tampered = shutil.copytree(onnx, tmp_path / "onnx")
    model = ir.load(tampered / PROMPT_GRAPH)
    change(model, tampered)
    ir.save(model, tampered / PROMPT_GRAPH)
    with pytest.raises(StepError, match=f"in {PROMPT_GRAPH}, .*{words}"):
        require_structure(tampered, target_of())


def test_scales_that_are_not_finite_and_graphs_that_a_target_has_not_are_refused(
    onnx: Path, tmp_path: Path
) -> None:
    with pytest.raises(StepError, match=f"in {PROMPT_GRAPH}, .*holds NaN or infinity"):
        require_structure(damage(onnx, tmp_path / "nan", factor=float("nan")), target_of())
    plain = composed("target=cpu-int4-rtn-block-32-acc-level-4").target
    with pytest.raises(StepError, match="is there, and target.prompts is null"):
        require_structure(onnx, plain)
    (damage(onnx, tmp_path / "none") / PROMPT_GRAPH).unlink()
    with pytest.raises(StepError, match="is missing, and target.prompts is int8"):
        require_structure(tmp_path / "none", target_of())


def test_a_model_of_several_targets_keeps_the_graph_and_shares_all_other_weights(
    onnx: Path, checkpoint: Path, tmp_path: Path
) -> None:
    origin = write_provenance(checkpoint, model="tiny", source="hub:tiny", licence="mit")
    plain = shutil.copytree(onnx, tmp_path / "plain")
    for path in plain.glob(f"{PROMPT_GRAPH}*"):
        path.unlink()
    folders = {NAME: shutil.copytree(onnx, tmp_path / "prompts"), "plain": plain}
    provenances = [
        write_provenance(folder, target=name, checkpoint=origin, checked_on="cpu")
        for name, folder in folders.items()
    ]
    into = tmp_path / "onnx"
    provenance = bundle(list(folders.values()), provenances, into)
    assert len(list((into / "weights").iterdir())) == 2
    digests = digests_of(into, provenance)
    assert sum(file.startswith("../weights/") for file in digests[NAME]) == 2
    assert sum(file.startswith("../weights/") for file in digests["plain"]) == 1
    found = Runtime(into / NAME, sha256=digests[NAME]).log_probabilities(TOKENS)
    assert np.array_equal(found, Runtime(onnx).log_probabilities(TOKENS))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target=cuda-int4-rtn-block-32"], "the target is int4 for cuda, by target.quantizer=rtn"),
        (["target=cpu-fp32"], "the target is fp32 for cpu"),
        (["target.quantizer=builder"], "the target is int4 for cpu, by target.quantizer=builder"),
        ([], "prompts is None, and it is int8.*target.name=" + NAME),
    ],
)
def test_a_target_that_cannot_have_int8_prompts_is_refused(
    overrides: list[str], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        composed(*overrides, "target.prompts=int8")


def test_a_name_that_promises_int8_prompts_is_held_to_it() -> None:
    with pytest.raises(InputError, match="prompts is int8, and it is None"):
        target_of("target.prompts=null")


def test_a_model_that_is_run_one_sequence_at_a_time_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model": {"type": "phi3", "context_length": 131072}, "search": {}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(StepError, match="export with target.prompts=null"):
        require_batched(tmp_path)


def test_the_environment_is_as_before_after_a_session_is_opened_or_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(NO_FLASH, raising=False)
    config = {"model": {"context_length": 2048, "decoder": {"num_attention_heads": 32}}}
    with pytest.raises(RuntimeError), attention_at_once(config):
        assert os.environ[NO_FLASH] == "1"
        raise RuntimeError
    assert NO_FLASH not in os.environ
    config["model"]["context_length"] = 2**17
    with attention_at_once(config):
        assert NO_FLASH not in os.environ
