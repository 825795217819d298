"""How models write calls of tools: what `tool_calls` in a model's YAML may say."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dialect:
    """How a family of models writes calls: JSON with `name` and `arguments`.

    A call stands between `opens` and `closes`; without `closes` it goes on to the end of the
    answer, without `opens` it is the whole answer. `begins` is what the prompt ends with where a
    call is forced. `by_message` says that templates know no tools: they get them as the field
    `tools` of the system message, and past calls as content. `single` says that templates refuse
    several calls in a turn.
    """

    opens: str = ""
    closes: str = ""
    begins: str = ""
    arguments: str = "arguments"
    by_message: bool = False
    single: bool = False


DIALECTS = {
    "none": None,
    "hermes": Dialect("<tool_call>", "</tool_call>", "<tool_call>\n"),  # Qwen 2.5 and 3 too
    "llama3": Dialect(arguments="parameters", single=True),
    "phi4": Dialect("functools[", begins="functools[", by_message=True),
}
