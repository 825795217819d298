"""A checkpoint as people have them means the same in transformers and in its ONNX model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slm.digests import Provenance, read_provenance
from slm.errors import InputError
from slm.evaluation.sanity import end_token_failure
from slm.exporters import worker
from slm.exporters.generation import carry_over
from slm.sources.mend import add_turn_ends, untie_own_head
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.parameters import Parameters, RequestError
from slm_pyfunc.tokenizer import ids_without_token
from steps.export_onnx import export_onnx
from tests.checkpoints import write_tiny, write_tiny_gguf, write_tokenizer
from tests.conftest import composed
from tests.test_fetch import fetched

IM_END, END_OF_TEXT = 2, 0
PADDED = 49152 + 64  # rows of the embedding, more than there are tokens


@pytest.fixture(scope="module")
def checkpoint(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What fetch makes of a checkpoint with several flaws.

    A head of its own beside tied embeddings, rows without a token that would always win, an eos
    that ends no turn, and settings of generation.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("flawed")
    source = write_tiny(folder / "source", smollm2, vocab_size=PADDED, eos_token_id=END_OF_TEXT)
    weights = load_file(source / "model.safetensors")
    head = torch.randn(PADDED, 64, generator=torch.Generator().manual_seed(1))
    head[-2:] = 100 * torch.stack([head[0], -head[0]])
    save_file({**weights, "lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    generation = {"eos_token_id": END_OF_TEXT, "do_sample": True, "repetition_penalty": 1.3}
    generation |= {"temperature": 0.6, "no_repeat_ngram_size": 3, "num_beams": 1}
    (source / "generation_config.json").write_text(json.dumps(generation))
    return Path(fetched(source, folder).uri)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX folder, in float32: without the noise of quantization."""
    config = composed()
    target = composed("target=cpu-fp32").target
    folder, provenance = tmp_path_factory.mktemp("exported"), read_provenance(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steps.export_onnx.run_worker", worker.export)
        return Path(export_onnx(checkpoint, provenance, target, config.export, folder).uri)


@pytest.fixture(scope="module")
def runtime(exported: Path) -> Runtime:
    return Runtime(exported)


def test_a_head_of_its_own_counts_in_both(checkpoint: Path, runtime: Runtime) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    head = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head)
    tokens = runtime.tokenizer.encode("The cat sat on the mat, and the dog did not.")
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    expected = torch.log_softmax(logits, dim=-1).numpy()
    np.testing.assert_allclose(runtime.log_probabilities(tokens), expected, atol=1e-3)


def test_what_was_mended_is_written_down_and_changes_the_copy_alone(
    checkpoint: Path, exported: Path
) -> None:
    provenance = Provenance.of(json.loads((exported / "provenance.json").read_text()))
    assert provenance.all_notes == [
        "tie_word_embeddings is now false: lm_head.weight differs from model.embed_tokens.weight",
        "eos_token_id now has 2 (<|im_end|>), which ends a turn in the chat template",
        "generation_config.json has what the ONNX model does not serve: no_repeat_ngram_size=3",
    ]
    source = checkpoint.parent.parent / "source"
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"] is True
    generation = json.loads((source / "generation_config.json").read_text())
    assert generation["eos_token_id"] == END_OF_TEXT


def test_the_end_of_a_turn_ends_an_answer_in_both(checkpoint: Path, runtime: Runtime) -> None:
    from transformers import GenerationConfig

    expected = [END_OF_TEXT, IM_END]
    assert GenerationConfig.from_pretrained(checkpoint).eos_token_id == expected
    assert runtime.tokenizer.end_tokens == set(expected)


def test_settings_of_generation_are_the_defaults_of_a_request(runtime: Runtime) -> None:
    defaults = runtime.defaults
    assert (defaults.repetition_penalty, defaults.temperature) == (1.3, 0.6)
    assert (defaults.top_k, defaults.top_p) == (50, 1.0)  # transformers' own


def test_an_id_without_a_token_is_never_chosen(runtime: Runtime) -> None:
    tokens = runtime.tokenizer.encode("The cat sat on the mat")
    assert runtime.log_probabilities(tokens)[-1].argmax() >= PADDED - 2
    for parameters in (
        Parameters(max_tokens=8, logprobs=True),
        Parameters(max_tokens=8, logprobs=True, temperature=2.0, seed=1, top_p=0.9),
        Parameters(max_tokens=8, logprobs=True, schema='{"type": "string"}'),
    ):
        [[answer]] = runtime.answer([tokens], parameters)
        assert answer.logprobs and all(token < 49152 for token, _, _ in answer.logprobs)


def test_ids_without_a_token_are_those_that_no_vocabulary_names() -> None:
    added = [{"id": 4, "content": "<end>"}]
    by_name = {"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": added}
    assert list(ids_without_token(by_name, 7)) == [1, 3, 5, 6]
    assert list(ids_without_token({"model": {"vocab": [["a", 0.5], ["b", 0.1]]}}, 2)) == []


def test_a_token_without_a_row_is_the_error_of_its_request_alone(runtime: Runtime) -> None:
    known = runtime.tokenizer.rows
    runtime.tokenizer.rows = 2
    try:
        with pytest.raises(RequestError, match="prompt has the token .*, which the model has no r"):
            runtime.answer(["Hello"], Parameters(max_tokens=1))
    finally:
        runtime.tokenizer.rows = known


def test_a_tied_head_that_is_the_embedding_stays_tied(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    ties = {"lm_head.weight": "model.embed_tokens.weight"}
    copy = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": copy}, tmp_path / "model.safetensors")
    assert untie_own_head(tmp_path, "x", ties) == []


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", [5]),
        ("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}", [5, 2]),
        # Phi-3's: an eos after the whole conversation.
        ("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}<|endoftext|>", [5, 2]),
        ("{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}", [5]),
        ("{{ raise_exception('only with a system message') }}", [5]),
    ],
)
def test_what_the_template_writes_after_an_answer_ends_it(
    tiny: Path, tmp_path: Path, template: str, ends: list[int]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((tiny / name).read_text())
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    notes = add_turn_ends(tmp_path, "x", None)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    found = generation["eos_token_id"]
    assert (found if isinstance(found, list) else [found]) == ends and len(notes) == len(ends) - 1


PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def test_the_token_that_ends_a_turn_in_a_gguf_ends_an_answer(tmp_path: Path) -> None:
    folder = Path(fetched(write_tiny_gguf(tmp_path / "model.gguf", PLAIN), tmp_path).uri)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    [note] = read_provenance(folder).notes
    assert note == "eos_token_id now has 2 (<|im_end|>), which ends a turn in the GGUF"


def test_a_gguf_without_one_of_the_weights_is_refused(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "model.gguf", PLAIN, without="blk.0.ffn_up")
    with pytest.raises(InputError, match=r"no file holds: model\.layers\.0\.mlp\.up_proj\.weight"):
        fetched(gguf, tmp_path)


def test_a_checkpoint_whose_answers_never_end_is_no_reference() -> None:
    model: Any = SimpleNamespace(end_tokens=[5])
    assert "lack [2], at which the checkpoint ends" in end_token_failure(model, [2, 5])
    assert not end_token_failure(model, [5])


@pytest.mark.parametrize("is_mended", [False, True])
def test_settings_of_generation_in_an_old_config_are_kept(tmp_path: Path, is_mended: bool) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    if not is_mended:
        (tokenizer / "chat_template.jinja").write_text(PLAIN)
    checkpoint, onnx = write_tiny(tmp_path / "checkpoint", tokenizer), tmp_path / "onnx"
    (checkpoint / "generation_config.json").unlink()
    old = {"do_sample": True, "repetition_penalty": 1.3, "temperature": 0.6, "top_k": 7}
    old |= {"no_repeat_ngram_size": 3, "eos_token_id": 0}
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | old))
    assert len(add_turn_ends(checkpoint, "x", None)) == is_mended
    assert (checkpoint / "generation_config.json").is_file() == is_mended

    expected = AutoModelForCausalLM.from_pretrained(checkpoint).generation_config.to_dict()
    ends = {"eos_token_id": [0, 1] if is_mended else 0}
    assert {name: expected[name] for name in old} == old | ends
    onnx.mkdir()
    (onnx / "genai_config.json").write_text('{"model": {}, "search": {}}')
    [note] = carry_over(checkpoint, onnx)
    assert note.endswith("no_repeat_ngram_size=3")
    made = json.loads((onnx / "genai_config.json").read_text())
    served = {**made["search"], **made["model"], "no_repeat_ngram_size": 3}
    assert {name: served[name] for name in old} == old | ends


@pytest.mark.parametrize("settings", [{}, {"num_beams": 1, "typical_p": 1.0, "max_length": 20}])
def test_settings_that_change_nothing_are_not_named(
    tiny: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    checkpoint, onnx = tmp_path / "checkpoint", tmp_path / "onnx"
    checkpoint.mkdir()
    onnx.mkdir()
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    (onnx / "genai_config.json").write_text('{"model": {}, "search": {"top_k": 1}}')
    assert carry_over(checkpoint, onnx) == []
    search = json.loads((onnx / "genai_config.json").read_text())["search"]
    assert search["top_k"] == 50 and search["do_sample"] is False
