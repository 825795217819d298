"""Run the entry point `score` on a Databricks cluster: the file of a job's `spark_python_task`.

    score.py /Workspace/…/files --model_uri models:/…@champion --input c.s.asked --output c.s.told

It runs in this process, which alone has the cluster's Spark session: a child of it, as `mlflow run`
starts one, cannot reach it. Databricks executes this file in a REPL: there is no __file__, and
sys.exit would be a failure.
"""

import sys


def score(project: str, arguments: list[str]) -> None:
    sys.path.insert(0, project)
    from slm.running.command import entry_point
    from steps.score import main

    sys.argv = ["score", *arguments]
    try:
        entry_point(main)
    except SystemExit as error:
        if error.code:
            raise RuntimeError(
                f"score: exit code {error.code}; the line above says why (docs/unattended.md)"
            ) from None


if __name__ == "__main__":
    score(sys.argv[1], sys.argv[2:])
