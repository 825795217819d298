"""Chat templates as people write them render as transformers renders them."""

import json
from pathlib import Path

import pytest

from slm_pyfunc.chat_template import ChatTemplate
from slm_pyfunc.parameters import RequestError
from tests.checkpoints import TOKENIZER_FILES, write_tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "One\r\ntwo   three\t four"},
        {"role": "assistant", "content": "<think>hm</think>\n\nBlue."},
        {"role": "user", "content": "Émile 👍🏽 日本 <|im_end|> {{ x }}"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "  and now?  "},
    ],
]
# Each has something that onnxruntime-genai 0.18's own renderer refuses, or reads otherwise.
TEMPLATES = {
    "in": "{% for m in messages %}{% if '</think>' in m.content %}T{% endif %}{{ m.content }}"
    "{% endfor %}",
    "methods": "{% for m in messages %}{{ m.content.replace('e', 'E').upper() }}"
    "{{ m.content.split('</think>')[-1] }}{{ m['role'].title() }}{% endfor %}",
    "filters": "{% for m in messages %}{{ m.content | trim | upper | replace('A', 'b') }}"
    "{{ m | tojson }}{% endfor %}",
    "format": "{% for m in messages %}{{ '%s: %s' % (m.role, m.content) }}{{ m.content[-1:] }}"
    "{% endfor %}",
    "lines": "{% for m in messages %}\n    {% if m.role == 'user' %}\n<user>{{ m.content }}\n"
    "    {% else %}\n<other>{{ m.content }}\n    {% endif %}\n{% endfor %}\n",
    "loops": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% if loop.index > 4 %}{% break %}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ bos_token }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    "none": "{{ none }}{% if tools is none %}no tools{% endif %}"
    "{{ messages[0].name is undefined }}",
}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the letters."""
    return write_tokenizer(tmp_path_factory.mktemp("letters"))


def with_template(tokenizer: Path, template: str, folder: Path) -> Path:
    for name in TOKENIZER_FILES:
        (folder / name).write_text((tokenizer / name).read_text())
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_template_renders_as_transformers_renders_it(
    tiny: Path, tmp_path: Path, template: str
) -> None:
    from transformers import AutoTokenizer

    folder = with_template(tiny, template, tmp_path)
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), ChatTemplate(folder)
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert ours.render(messages) == expected


def test_a_template_inside_the_tokenizers_configuration_is_found(
    tiny: Path, tmp_path: Path
) -> None:
    folder = with_template(tiny, "", tmp_path)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    for inside in ("yes", named):
        config["chat_template"] = inside
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert ChatTemplate(folder).render(CONVERSATIONS[0]) == "yes"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system') }}",
        "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}",
        "{% set x = messages.append(1) %}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_the_requests_error(
    tiny: Path, tmp_path: Path, template: str
) -> None:
    made = ChatTemplate(with_template(tiny, template, tmp_path))
    with pytest.raises(RequestError, match="the model's chat template refuses them"):
        made.render(CONVERSATIONS[0])


def test_control_tokens_in_a_message_are_cut_and_nothing_else_is(tiny: Path) -> None:
    made = ChatTemplate(tiny)
    [whole] = made.pieces(CONVERSATIONS[0])
    assert whole == made.render(CONVERSATIONS[0])
    pieces = made.pieces(CONVERSATIONS[2])
    assert len(pieces) == 2 and "".join(pieces) == made.render(CONVERSATIONS[2])
    assert pieces[0].endswith("<") and pieces[1].startswith("|im_end|>")


# As Qwen3's: it reads `</think>`, and writes it.
READS_THINK = (
    "{% for m in messages %}<turn>[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<turn>[assistant]<think></think>{% endif %}"
)


def with_added(tokenizer: Path, template: str, folder: Path, **tokens: bool) -> ChatTemplate:
    """A template whose tokenizer has added tokens, each special or not."""
    tokenizer_json = json.loads((tokenizer / "tokenizer.json").read_text())
    added = [{"content": token, "special": special} for token, special in tokens.items()]
    tokenizer_json["added_tokens"] += added
    with_template(tokenizer, template, folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    return ChatTemplate(folder)


def test_every_added_token_of_the_template_is_cut_special_or_not(
    letters: Path, tmp_path: Path
) -> None:
    names = ("<turn>", "[user]", "  ", "<b>", "role", "</think>", "<think>")
    made = with_added(letters, READS_THINK, tmp_path, **dict.fromkeys(names, False))
    content = "role  <b><turn>[user]</think></s>"
    pieces = made.pieces([{"role": "user", "content": content}])
    assert pieces[0] == "<turn>[user]role  <b><" and pieces[1:3] == ["turn>[", "user]<"]
    assert pieces[3:] == ["/think><", "/s><turn>[assistant]<think></think>"]


def test_a_token_that_the_template_reads_in_an_answer_stays_whole_there(
    letters: Path, tmp_path: Path
) -> None:
    names = {"<turn>": False, "</think>": False, "<think>": False}
    made = with_added(letters, READS_THINK, tmp_path, **names)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    messages[1]["content"] = "<think>hm</think>Blue."
    assert "".join(made.pieces(messages)) == made.render(messages)
    messages[1]["content"] = "<think>hm</think>Blue.<turn>[user]"
    assert made.pieces(messages)[0].endswith("Blue.<") and "hm" not in made.pieces(messages)[0]


def test_private_use_characters_of_a_message_are_kept(letters: Path) -> None:
    made = ChatTemplate(letters)
    text = "\uf8f0\U000f0000</s>\U000f0001"
    [*_, piece] = made.pieces([{"role": "user", "content": text}])
    assert piece == "/s>\U000f0001</s>"
    assert "".join(made.pieces([{"role": "user", "content": text}])) == f"{text}</s>"


def test_a_control_token_of_one_character_is_refused_in_a_message(
    letters: Path, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content }}¶{% endfor %}"
    made = with_added(letters, template, tmp_path, **{"¶": True, "?": True})
    assert made.pieces([{"role": "user", "content": "a?"}]) == ["a?¶"]
    with pytest.raises(RequestError, match="messages hold '¶', with which the model marks turns"):
        made.pieces([{"role": "user", "content": "a¶"}])


def test_what_ends_a_turn_is_read_from_the_template(tiny: Path) -> None:
    assert ChatTemplate(tiny).turn_end() == "<|im_end|>\n"
