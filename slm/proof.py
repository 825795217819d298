"""Proof that logged models load and answer, in a process where nothing else was loaded.

    <environment>/bin/python slm/proof.py --forbid torch <model folder> …

`prove` runs this file by its path, also with the Python of an environment that holds the models'
requirements alone: so it imports nothing of the project at its top, and little else.
"""

import argparse
import importlib.util
import signal
import subprocess
import sys


def prove(
    uris: list[str],
    *,
    python: str = sys.executable,
    forbid: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> str | None:
    """Load the models and give each its input example; what is wrong, or None.

    `forbid` names packages that must not be installed beside `python`. Raises KilledError if the
    process was killed.
    """
    from slm.errors import KilledError
    from slm.variables import variables

    forbidden = [word for package in forbid for word in ("--forbid", package)]
    process = subprocess.run(
        [python, "-P", __file__, *forbidden, *uris],  # -P: slm/ is no place to import from
        env={**variables(), **(environment or {})},
        capture_output=True,
        text=True,
    )
    if process.returncode == 0:
        return None
    if process.returncode == -signal.SIGKILL:
        raise KilledError(f"what asks {' and '.join(uris)}")
    return (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]


def ask(uri: str) -> None:
    """Exit with a complaint unless the model loads and answers."""
    import mlflow

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
    parser = argparse.ArgumentParser()
    parser.add_argument("uris", nargs="+")
    parser.add_argument("--forbid", action="append", default=[], help="a package")
    arguments = parser.parse_args()
    for package in arguments.forbid:
        if importlib.util.find_spec(package):
            sys.exit(f"{package} is installed")
    for uri in arguments.uris:
        ask(uri)


if __name__ == "__main__":
    main()
