"""The pages say what is so: links, files and configuration keys that they name exist."""

import re
from pathlib import Path

import pytest

from slm.config.common import ROOT
from slm.running.hydra_errors import keys_beside
from tests.conftest import composed

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = ("bench", "conf", "data", "docs", "exporters", "slm", "slm_pyfunc", "steps", "tests")
GROUPS = (
    "model",
    "target",
    "fetch",
    "log_pyfunc",
    "evaluate",
    "register",
    "signing",
    "score",
    "serve",
    "clean",
    "ladder",
    "paths",
)
# Keys of a dict may be anything.
# Endings of what is no key: files, and methods of a `model` in Python.
NO_KEYS = (
    ".yaml",
    ".onnx",
    ".data",
    ".py",
    ".html",
    ".md",
    ".json",
    ".safetensors",
    ".predict",
    ".predict_stream",
    ".sig",
    ".png",
    ".pem",
    ".pub",
)
OPEN = ("model.gates", "model.sha256", "evaluate.gates", "register.margins")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    names = re.findall(
        rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w(?![\w<*])", page.read_text()
    )
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_keys_that_a_page_names_exist(page: Path) -> None:
    keys = re.findall(rf"(?<![\w./-])(?:{'|'.join(GROUPS)})\.[a-z][\w.]*\w", page.read_text())
    for key in keys:
        if not key.startswith(OPEN) and Path(key).suffix not in NO_KEYS:
            assert key.rsplit(".", 1)[1] in keys_beside(key), key


def test_every_model_and_target_is_on_their_page() -> None:
    text = (ROOT / "docs/targets-and-models.md").read_text()
    for group in ("model", "target"):
        for file in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{file.stem}`" in text, file.stem


def test_yaml_and_metrics_of_the_pages_are_valid() -> None:
    """The gates that the page on evaluation shows as an example."""
    gates = re.search(r"`\"(\+evaluate\.gates=[^`]*)\"`", (ROOT / "docs/evaluation.md").read_text())
    assert gates and "no_slower" in composed(gates.group(1)).evaluate.gates


def test_the_readme_is_one_page() -> None:
    assert (ROOT / "README.md").stat().st_size <= 12_288
