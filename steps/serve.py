"""Serve logged models over HTTP, as OpenAI's API and as MLflow's scoring server.

    mlflow run . -e serve -P model_uri=models:/…-chat@champion -P port=8000
    python -m steps.serve model_uri=[models:/…-chat@champion,models:/…-prompt@champion] follow=true

Ends on Ctrl-C or SIGTERM, once what is under way is answered (docs/serving.md).
"""

from slm.config import Config
from slm.running.command import entry_point
from slm.serving.run import serve


def main(config: Config) -> None:
    serve(config)


if __name__ == "__main__":
    entry_point(main)
