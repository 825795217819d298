import shutil
import tempfile
from pathlib import Path

import pytest

from slm.running.links import LARGE, copies_as_links
from tests.conftest import Packaged, folder_of


def test_weights_lie_on_the_disk_once(
    packaged: Packaged, onnx: Path, smollm2: Path, chat_folder: Path, prompt_folder: Path
) -> None:
    for logged in (chat_folder, prompt_folder):
        own = logged / "artifacts" / "onnx"
        assert (own / "model.onnx.data").samefile(onnx / "model.onnx.data")
        assert not (own / "genai_config.json").samefile(onnx / "genai_config.json")
    reference = folder_of(packaged, packaged.reference)
    assert (reference / "model" / "model.safetensors").samefile(smollm2 / "model.safetensors")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An outcome in a work folder, with a large file and a small one."""
    folder = tmp_path / "work" / "step" / "key"
    folder.mkdir(parents=True)
    (folder / "large").write_bytes(bytes(LARGE))
    (folder / "small").write_bytes(b"small")
    return folder


def test_large_files_of_the_work_folder_are_linked(made: Path, tmp_path: Path) -> None:
    with copies_as_links(made, tmp_path / "work"):
        shutil.copytree(made, tmp_path / "staged")
        shutil.copytree(tmp_path / "staged", tmp_path / "store")
    assert (tmp_path / "store" / "large").samefile(made / "large")
    assert not (tmp_path / "store" / "small").samefile(made / "small")
    shutil.copy(made / "large", tmp_path / "later")
    assert not (tmp_path / "later").samefile(made / "large")


def test_files_outside_of_the_work_folder_are_copied(made: Path, tmp_path: Path) -> None:
    with copies_as_links(made, tmp_path / "another work"):
        shutil.copy(made / "large", tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(made / "large")


def test_what_a_symbolic_link_names_is_copied(made: Path, tmp_path: Path) -> None:
    elsewhere = (made / "large").rename(tmp_path / "large")
    (made / "large").symlink_to(elsewhere)
    with copies_as_links(made, tmp_path / "work"):
        shutil.copy(made / "large", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink() and not elsewhere.samefile(tmp_path / "copy")


def test_another_file_system_gets_one_copy(made: Path, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    with (
        tempfile.TemporaryDirectory(dir=shm) as there,
        copies_as_links(made, tmp_path / "work"),
    ):
        for name in ("chat", "prompt"):
            shutil.copy(made / "large", Path(there) / name)
        assert (Path(there) / "chat").samefile(Path(there) / "prompt")
