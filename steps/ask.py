"""Load models from folders and give each its input example, where nothing but they is installed.

    <environment>/bin/python steps/ask.py <model folder> …

Run by log_pyfunc in a fresh environment. Imports nothing of the project; torch there is an error.
"""

import importlib.util
import sys

import mlflow


def ask(folder: str) -> None:
    """Exit with a complaint unless the model answers."""
    model = mlflow.pyfunc.load_model(folder)
    example = mlflow.models.Model.load(folder).load_input_example(folder)
    if not (answer := model.predict(example)):
        sys.exit(f"{folder} answers {answer!r}")


def main() -> None:
    for forbidden in ("torch", "transformers"):
        if importlib.util.find_spec(forbidden):
            sys.exit(f"{forbidden} is installed")
    for folder in sys.argv[1:]:
        ask(folder)


if __name__ == "__main__":
    main()
