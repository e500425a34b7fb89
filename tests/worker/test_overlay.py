"""`[environment].pip` goes beside the interpreter, never into it. Real pip, wheels, no index."""

import subprocess
import sys
import zipfile

import pytest

from flash.errors import EnvironmentFault
from flash.home import FlashHome
from flash.worker.overlay import ensure_overlay

pytestmark = pytest.mark.slow


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def make(name, version, body="", requires=()):
        info = f"{name}-{version}.dist-info"
        path = folder / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{name}.py", body)
            wheel.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                + "".join(f"Requires-Dist: {item}\n" for item in requires),
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
        return path

    return make


@pytest.fixture
def home(tmp_path):
    return FlashHome(tmp_path / "home")


def test_a_requirement_is_importable_from_the_overlay_and_not_from_the_interpreter(wheels, home):
    wheels("overlaid_leaf", "1.0", "VALUE = 7")
    wheels("overlaid", "2.0", "from overlaid_leaf import VALUE", requires=["overlaid_leaf"])

    overlay = ensure_overlay(["overlaid>=1"], home, lambda _: None)

    probe = "import sys; sys.path.append(sys.argv[1]); import overlaid; print(overlaid.VALUE)"
    seen = subprocess.run(
        [sys.executable, "-c", probe, str(overlay)], capture_output=True, text=True, check=True
    )
    assert seen.stdout == "7\n"
    assert subprocess.run(
        [sys.executable, "-c", "import overlaid"], check=False, capture_output=True
    ).returncode


def test_the_same_requirements_are_installed_once(wheels, home):
    wheels("overlaid", "2.0")
    said = []

    first = ensure_overlay(["overlaid"], home, said.append)
    second = ensure_overlay(["overlaid"], home, said.append)

    assert first == second
    assert len(said) == 1


@pytest.mark.slow  # three resolutions by pip
def test_what_is_installed_beside_it_and_a_changed_file_make_another_overlay(
    wheels, home, monkeypatch, tmp_path
):
    path = wheels("overlaid", "2.0", "VALUE = 1")
    requirement = f"overlaid @ {path.as_uri()}"
    first = ensure_overlay([requirement], home, lambda _: None)

    wheels("overlaid", "2.0", "VALUE = 22")
    changed = ensure_overlay([requirement], home, lambda _: None)
    (tmp_path / "more" / "installed_since-1.0.dist-info").mkdir(parents=True)
    metadata = tmp_path / "more" / "installed_since-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: installed_since\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "more")
    beside = ensure_overlay([requirement], home, lambda _: None)

    assert (first / "overlaid.py").read_text() == "VALUE = 1"
    assert (changed / "overlaid.py").read_text() == "VALUE = 22"
    assert beside not in {first, changed}


BACKEND = """
import zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{folder}/overlaid-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write("overlaid.py")
        for path in ("METADATA", "WHEEL", "RECORD"):
            wheel.write(path, f"overlaid-1.0.dist-info/{path}")
    return "overlaid-1.0-py3-none-any.whl"
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "overlaid"
version = "1.0"
"""


@pytest.mark.slow  # pip builds the package twice
def test_a_commit_of_a_repository_is_installed_as_it_was_then(home, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    repository = tmp_path / "repository"
    package = repository / "python"
    package.mkdir(parents=True)
    (package / "backend.py").write_text(BACKEND)
    (package / "pyproject.toml").write_text(PROJECT)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: overlaid\nVersion: 1.0\n")
    (package / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (package / "RECORD").touch()
    (package / "overlaid.py").write_text("VALUE = 1")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(repository)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    (package / "overlaid.py").write_text("VALUE = 2")

    # With a host, as of a remote repository: pip before 24 takes no other.
    url = f"git+file://localhost{repository}@v1#subdirectory=python"
    overlay = ensure_overlay([f"overlaid @ {url}"], home, lambda _: None)

    assert (overlay / "overlaid.py").read_text() == "VALUE = 1"


def test_a_requirement_that_would_change_the_trainers_stack_is_refused_with_the_reason(
    wheels, home
):
    wheels("attrs", "1.0")
    wheels("needs_old_attrs", "1.0", requires=["attrs<2"])

    with pytest.raises(EnvironmentFault, match=r"would replace attrs .* by 1\.0"):
        ensure_overlay(["needs_old_attrs"], home, lambda _: None)

    assert not [path for path in home.folder("overlays").iterdir() if path.is_dir()]


def test_a_requirement_that_is_met_already_installs_nothing(home):
    overlay = ensure_overlay(["attrs"], home, lambda _: None)

    assert list(overlay.iterdir()) == []


def test_an_unknown_requirement_is_an_error_that_names_it(wheels, home):
    with pytest.raises(EnvironmentFault, match="no-such-thing-anywhere"):
        ensure_overlay(["no-such-thing-anywhere"], home, lambda _: None)


def test_nothing_to_install_is_no_overlay(home):
    assert ensure_overlay([], home, lambda _: None) is None
