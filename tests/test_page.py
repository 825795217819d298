"""The page's own script, run by node against a server of the test's, and with as much of a page."""

import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from slm.config.common import ROOT

# The elements that the script asks for, and fetch: `answers` says what each question gets.
PAGE = """
const { setTimeout: later } = require("timers"), tick = () => new Promise(go => later(go, 20));
const element = () => ({
  value: "", textContent: "", children: [], listeners: {},
  addEventListener(name, does) { this.listeners[name] = does; },
  append(child) { this.children.push(child); child.parent = this; },
  remove() { this.parent.children = this.parent.children.filter(child => child !== this); },
  replaceChildren(...children) { this.children = children; },
  scrollIntoView() {}, requestSubmit() { this.listeners.submit({ preventDefault() {} }); },
});
const elements = {}, sent = [];
const document = {
  getElementById: id => elements[id] ??= element(), createElement: element,
};
const Option = function (id) { this.value = id; };
const at = id => document.getElementById(id);
const shown = () => at("said").children.map(child => child.textContent);
const send = text => { at("text").value = text; at("form").requestSubmit(); };
const anew = () => at("anew").listeners.click();
const piece = text => `data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\\n\\n`;
const answers = {
  hello: { pieces: ["Hi", " there"], done: true },
  slow: { pieces: ["Once"], done: false },
  wrong: { status: 400 },
  broken: { pieces: ['{"error": {"message": "it failed"}}'], done: false },
};
async function fetch(path, options = {}) {
  if (path === "/v1/models") return Response.json({ data: [{ id: "m", interface: "chat" }] });
  const { messages } = JSON.parse(options.body);
  sent.push(messages.map(message => `${message.role}: ${message.content}`));
  const { status = 200, pieces = [], done } = answers[messages.at(-1).content];
  if (status !== 200) return Response.json({ error: { message: "no" } }, { status });
  const body = new ReadableStream({
    start(stream) {
      const bytes = new TextEncoder();
      for (const text of pieces)
        stream.enqueue(bytes.encode(text.startsWith("{") ? `data: ${text}\\n\\n` : piece(text)));
      if (done) { stream.enqueue(bytes.encode("data: [DONE]\\n\\n")); stream.close(); }
      const leave = () => stream.error(new DOMException("left", "AbortError"));
      options.signal.addEventListener("abort", () => later(leave, 5));
    },
  });
  return new Response(body);
}
"""


def run(steps: str) -> dict[str, Any]:
    """What the page sent and shows after steps of a user."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here")
    html = (ROOT / "slm" / "serving" / "page.html").read_text()
    [script] = re.findall(r"<script>(.*)</script>", html, re.DOTALL)
    user = f"(async () => {{ at('model').value = 'm'; await tick(); {steps}; await tick(); "
    said = "console.log(JSON.stringify({ sent, shown: shown(), send: at('send').textContent }))"
    code = f"{PAGE}\n{{{script}}}\n{user} {said} }})()"
    process = subprocess.run([node, "-e", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_conversation_is_sent_with_its_answers() -> None:
    found = run("send('hello'); await tick(); send('hello')")
    assert found["sent"][1] == ["user: hello", "assistant: Hi there", "user: hello"]
    assert found["shown"] == ["hello", "Hi there"] * 2 and found["send"] == "Send"


def test_a_new_chat_ends_the_answer_under_way_and_has_nothing_of_it() -> None:
    found = run("send('slow'); await tick(); anew(); send('hello'); await tick(); send('hello')")
    assert found["sent"][1:] == [
        ["user: hello"],
        ["user: hello", "assistant: Hi there", "user: hello"],
    ]
    assert found["shown"] == ["hello", "Hi there"] * 2 and found["send"] == "Send"


def test_a_question_that_got_no_answer_is_not_sent_again() -> None:
    for asked, told in (("wrong", "no"), ("broken", "it failed")):
        found = run(f"send('{asked}'); await tick(); send('hello')")
        assert found["sent"][1] == ["user: hello"]
        assert found["shown"] == [asked, told, "hello", "Hi there"]


def test_what_was_answered_before_a_stop_stays() -> None:
    found = run("send('slow'); await tick(); send(''); await tick(); send('hello')")
    assert found["sent"][1] == ["user: slow", "assistant: Once", "user: hello"]
