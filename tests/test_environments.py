"""Environments: references, the plugin that reads them, and snapshots."""

import os
from pathlib import Path

import pytest

from flash.api import EnvironmentPlugin
from flash.environments import Located, folder_digest, left_out, locate, snapshot
from flash.errors import EnvironmentFault, PluginError, StoreError
from flash.home import FlashHome
from flash.spec.model import EnvironmentTable
from flash.testing.host import make_host


class Loader:
    """Fetches by writing a file; the revision is how often the reference was fetched."""

    def __init__(self, fetches):
        self.fetches = fetches

    def fetch(self, reference, destination):
        self.fetches.append(reference)
        if reference.endswith("broken"):
            raise RuntimeError("boom")
        (destination / "environment.py").write_text(reference)
        return f"commit-of-{reference}"


def reader(name, marker, *, fetches=(), schemes=()):
    return EnvironmentPlugin(
        name=name,
        summary=f"Folders with {marker}.",
        detect=lambda folder: (folder / marker).exists(),
        make=lambda ctx: Loader(fetches),
        schemes=schemes,
    )


@pytest.fixture
def fetches():
    return []


@pytest.fixture
def host(fetches):
    return make_host(
        reader("one", "environment.py", fetches=fetches, schemes=("github", "git+ssh")),
        reader("two", "two.toml"),
    )


@pytest.fixture
def home(tmp_path):
    return FlashHome(tmp_path / "home")


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "project"
    (folder / "env").mkdir(parents=True)
    (folder / "env" / "environment.py").write_text("x = 1\n")
    return folder


@pytest.mark.parametrize("table", [{"path": "env"}, {"id": "env"}, {"id": "./env"}])
def test_a_folder_is_found_from_the_base(table, base, host, home):
    found = locate(EnvironmentTable(**table), base, host, home)

    assert found == Located(plugin="one", reference=next(iter(table.values())), folder=base / "env")


def test_a_folder_of_the_home_and_an_absolute_one_are_found(base, host, home, monkeypatch):
    monkeypatch.setenv("HOME", str(base))

    for reference in ("~/env", str(base / "env")):
        table = EnvironmentTable(path=reference)
        assert locate(table, Path("/nowhere"), host, home).folder == base / "env"


def test_a_folder_named_like_a_hub_id_or_a_scheme_is_that_folder(base, host, home):
    for name in ("org/name", "github:x"):
        (base / name).mkdir(parents=True)
        (base / name / "environment.py").touch()

        assert locate(EnvironmentTable(id=name), base, host, home).folder == base / name


WRONG = {
    "no folder": ({"path": "enw"}, 'no such folder: {base}/enw; did you mean "env"?'),
    "file": ({"path": "env/environment.py"}, "is a file, and an environment is a folder"),
    "nobody reads it": ({"path": "."}, "no installed plugin reads the folder {base}"),
    "hub": ({"id": "org/name@1.0"}, "is the id of a published environment, and there is no hub"),
    "hub with project": ({"id": "org/project/name"}, "there is no hub to ask yet"),
    "scheme": ({"id": "s3://bucket/env"}, 'no installed environment plugin reads "s3://bucket'),
    "word": ({"id": "nothing"}, '"nothing" names no environment'),
    "too long": ({"id": "x" * 5000}, "names no environment"),
    "too long a path": ({"path": "x" * 5000}, "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_reference_that_leads_nowhere_says_why(name, base, host, home):
    table, expected = WRONG[name]

    with pytest.raises(EnvironmentFault) as caught:
        locate(EnvironmentTable(**table), base, host, home)

    assert expected.format(base=base) in str(caught.value)


def test_the_formats_and_schemes_that_can_be_read_are_listed(base, host, home):
    with pytest.raises(EnvironmentFault) as unread:
        locate(EnvironmentTable(path="."), base, host, home)
    with pytest.raises(EnvironmentFault) as unclaimed:
        locate(EnvironmentTable(id="s3://x"), base, host, home)

    assert unread.value.hint == "one: Folders with environment.py.; two: Folders with two.toml."
    assert unclaimed.value.hint == "schemes that are read here: git+ssh:, github:"


def test_a_folder_that_two_plugins_read_is_refused_with_the_way_out(base, host, home):
    (base / "env" / "two.toml").touch()

    with pytest.raises(EnvironmentFault, match=r"several plugins read .*: one, two") as caught:
        locate(EnvironmentTable(path="env"), base, host, home)

    assert caught.value.hint == "set one aside: FLASH_DISABLE_PLUGINS=two"


def test_a_scheme_that_two_plugins_claim_is_refused_with_the_way_out(base, home):
    host = make_host(
        reader("one", "x", schemes=("github",)), reader("two", "y", schemes=("s3", "github"))
    )

    with pytest.raises(EnvironmentFault, match=r'several plugins read "github:".*: one, two') as c:
        locate(EnvironmentTable(id="github:owner/repo"), base, host, home, offline=True)

    assert c.value.hint == "set one aside: FLASH_DISABLE_PLUGINS=two"


def test_a_plugin_whose_detect_raises_stops_only_what_no_other_reads(base, home):
    ill = EnvironmentPlugin(
        name="ill", summary="", detect=lambda _: 1 / 0, make=lambda _: Loader([])
    )
    host = make_host(ill, reader("one", "environment.py"))

    assert locate(EnvironmentTable(path="env"), base, host, home).plugin == "one"
    with pytest.raises(PluginError, match="plugin ill: detect raised ZeroDivisionError"):
        locate(EnvironmentTable(path="."), base, host, home)


def test_a_reference_with_a_scheme_is_fetched_and_kept_by_revision(base, host, home, fetches):
    table = EnvironmentTable(id="github:owner/repo@main:env")

    first = locate(table, base, host, home)
    second = locate(table, base, host, home)

    assert first == second
    assert first.revision == "commit-of-github:owner/repo@main:env"
    assert [file.name for file in first.folder.iterdir()] == ["environment.py"]
    assert len(fetches) == 2
    assert [folder.name for folder in first.folder.parent.iterdir()] == [first.folder.name]


def test_nothing_is_fetched_offline(base, host, home, fetches):
    found = locate(EnvironmentTable(id="github:owner/repo"), base, host, home, offline=True)

    assert (found.plugin, found.folder, fetches) == ("one", None, [])


def test_a_fetch_that_fails_names_the_plugin_and_leaves_nothing(base, host, home):
    with pytest.raises(PluginError, match=r"plugin one: fetch raised RuntimeError: boom"):
        locate(EnvironmentTable(id="github:broken"), base, host, home)

    assert list(home.folder("environments").iterdir()) == []


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_snapshot_has_the_environments_files_and_none_of_the_authors(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    kept = [
        "README.md",
        "configs/sft.toml",
        "credentials.py",
        "dataset/train.jsonl",
        "dataset/keys.json",
        "environment.py",
        "helpers/__init__.py",
        ".hidden-settings",
    ]
    fill(source, *kept)
    fill(
        source,
        ".env",
        ".env.local",
        "prod.env",
        "helpers/.ENV",
        ".git/config",
        ".venv/bin/python",
        ".ssh/config",
        "venv/pyvenv.cfg",
        "venv/lib/x.py",
        "__pycache__/environment.cpython-311.pyc",
        "node_modules/x/index.js",
        "id_rsa",
        "id_ed25519.pub",
        "server.pem",
        "deploy/private.KEY",
        ".netrc",
        ".npmrc",
        "credentials.json",
    )
    (source / ".venv" / "link").symlink_to("/")
    fill(source, "old.pyc")

    snapshot(source, copy)

    assert files(copy) == sorted(kept)
    assert left_out(source) == [
        "credentials.json",
        "deploy/private.KEY",
        "id_ed25519.pub",
        "id_rsa",
        "prod.env",
        "server.pem",
    ]


def test_a_snapshot_is_only_the_owners_and_keeps_the_executable_bit(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    fill(source, "tools/run.sh", "environment.py")
    (source / "tools" / "run.sh").chmod(0o755)

    snapshot(source, copy)

    modes = {str(p.relative_to(copy)): oct(p.stat().st_mode & 0o777) for p in copy.rglob("*")}
    assert modes == {"tools": "0o700", "tools/run.sh": "0o700", "environment.py": "0o600"}
    assert oct(copy.stat().st_mode & 0o777) == "0o700"


def test_the_digest_is_of_names_contents_and_executable_bits_alone(tmp_path):
    def digest(name, change=lambda folder: None):
        source = tmp_path / name
        fill(source, "environment.py", "dataset/train.jsonl", ".env")
        os.utime(source / "environment.py", (0, 0))
        change(source)
        return snapshot(source, tmp_path / f"{name}-copy")

    plain = digest("plain")
    same = digest("same", lambda folder: fill(folder, ".git/HEAD", "__pycache__/x.pyc"))
    others = {
        digest("content", lambda folder: (folder / "environment.py").write_text("x")),
        digest("name", lambda f: (f / "environment.py").rename(f / "environment2.py")),
        digest("bit", lambda folder: (folder / "environment.py").chmod(0o755)),
        digest("more", lambda folder: fill(folder, "helper.py")),
        digest("moved", lambda f: (f / "dataset").rename(f / "dataset2")),
    }

    assert plain == same
    assert plain.startswith("sha256:")
    assert len(plain) == len("sha256:") + 64
    assert len(others | {plain}) == 6


def test_the_digest_of_a_snapshot_is_the_one_it_was_made_with(tmp_path):
    fill(tmp_path / "source", "environment.py", "dataset/train.jsonl")

    digest = snapshot(tmp_path / "source", tmp_path / "copy")
    fill(tmp_path / "copy", "__pycache__/environment.cpython-311.pyc")

    assert folder_digest(tmp_path / "copy") == digest


def test_links_and_special_files_are_refused_with_their_path(tmp_path):
    links, pipes = tmp_path / "links", tmp_path / "pipes"
    fill(links, "dataset/train.jsonl")
    (links / "dataset" / "more").symlink_to("/etc")
    fill(pipes, "environment.py")
    os.mkfifo(pipes / "pipe")

    with pytest.raises(EnvironmentFault, match=r"links/dataset/more is a link"):
        snapshot(links, tmp_path / "copy")
    with pytest.raises(EnvironmentFault, match=r"pipes/pipe is not a plain file"):
        snapshot(pipes, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_name_that_is_not_unicode_is_refused(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / os.fsdecode(b"caf\xe9.txt")).touch()

    with pytest.raises(EnvironmentFault, match=r"caf\\udce9.txt has a name that is not Unicode"):
        snapshot(source, tmp_path / "copy")


def test_too_many_or_too_big_files_are_refused_with_the_largest(tmp_path):
    many, big = tmp_path / "many", tmp_path / "big"
    for number in range(5001):
        fill(many, f"files/{number}")
    fill(big, "environment.py")
    with (big / "weights.bin").open("wb") as file:
        file.truncate((256 << 20) + 1)

    with pytest.raises(EnvironmentFault, match="holds 5001 files"):
        snapshot(many, tmp_path / "copy")
    with pytest.raises(EnvironmentFault, match="2 files and 256 MiB") as caught:
        snapshot(big, tmp_path / "copy")
    assert caught.value.hint.startswith("the largest: weights.bin (256 MiB)")


def test_a_snapshot_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    fill(tmp_path / "source", "environment.py")
    fill(tmp_path / "copy", "in the way")

    with pytest.raises(StoreError, match="cannot copy the environment to"):
        snapshot(tmp_path / "source", tmp_path / "copy")
    assert files(tmp_path / "copy") == ["in the way"]
    with pytest.raises(StoreError):
        snapshot(tmp_path / "source", tmp_path / "no" / "such" / "folder")
