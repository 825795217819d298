"""Load models and give each its input example, in a process where nothing else was loaded.

    <environment>/bin/python steps/ask.py <model folder> …
    python steps/ask.py --with-torch models:/<name>/<version> …

Run by log_pyfunc in an environment of the models' requirements alone, where torch is an error, and
by register with the versions of the registry. Imports nothing of the project.
"""

import importlib.util
import sys

import mlflow


def ask(uri: str) -> None:
    """Exit with a complaint unless the model loads and answers."""
    try:
        model = mlflow.pyfunc.load_model(uri)
        example = mlflow.models.Model.load(uri).load_input_example(uri)
        answer = model.predict(example)
    except Exception as error:  # of whatever library: to name the model that it is about
        text = " ".join(str(error).split())
        sys.exit(f"{uri} does not answer: {type(error).__name__}: {text}")
    if not answer:
        sys.exit(f"{uri} answers {answer!r}")


def main() -> None:
    uris = sys.argv[1:]
    if "--with-torch" in uris:
        uris.remove("--with-torch")
    else:
        for forbidden in ("torch", "transformers"):
            if importlib.util.find_spec(forbidden):
                sys.exit(f"{forbidden} is installed")
    for uri in uris:
        ask(uri)


if __name__ == "__main__":
    main()
