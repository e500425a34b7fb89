"""
Fetching `github:owner/repo@ref:path`, against a server that answers as GitHub's REST API documents.

The stand-in was written from the documentation of two endpoints: `GET
/repos/{owner}/{repo}/commits/{ref}` with the media type `application/vnd.github.sha`, and `GET
/repos/{owner}/{repo}/tarball/{ref}` with its redirect. It was not recorded from GitHub, and no
test here reaches it.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from flash_env_freesolo.archive import Limits
from flash_env_freesolo.github import GitHubReference, fetch

from flash.api import EnvironmentFault, FlashError

SHA = "0123456789abcdef0123456789abcdef01234567"
TOP = f"me-envs-{SHA[:7]}"


class GitHub(BaseHTTPRequestHandler):
    """The two endpoints; `server.tarball` is what codeload sends, `server.status` an outage."""

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        if server.status:
            self.answer(server.status, b'{"message": "API rate limit exceeded"}')
        elif self.path in {f"/repos/me/envs/commits/{ref}" for ref in ("v1", "HEAD", "feature/x")}:
            assert self.headers["Accept"] == "application/vnd.github.sha"
            self.answer(200, server.sha.encode())
        elif self.path == f"/repos/me/envs/tarball/{SHA}":
            self.send_response(302)
            self.send_header("Location", f"/codeload/me/envs/legacy.tar.gz/{SHA}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == f"/codeload/me/envs/legacy.tar.gz/{SHA}":
            self.answer(200, server.tarball)
        else:
            self.answer(404, b'{"message": "Not Found"}')

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def tarball(*members, files=None):
    """A repository as codeload packs it: one top folder, members in order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(directory(TOP))
        for name, content in (files or {}).items():
            info = tarfile.TarInfo(f"{TOP}/{name}")
            info.size, info.mode = len(content), 0o664
            archive.addfile(info, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return buffer.getvalue()


def directory(name):
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o775
    return info


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


FILES = {
    "README.md": b"top",
    "maths/environment.py": b"x = 1",
    "maths/dataset/train.jsonl": b"{}",
    "maths-hard/environment.py": b"x = 2",
}


@pytest.fixture
def github():
    server = ThreadingHTTPServer(("127.0.0.1", 0), GitHub)
    server.sha, server.tarball, server.status, server.asked = SHA, tarball(files=FILES), None, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def get(github, tmp_path):
    def get(reference="github:me/envs@v1:maths", limits=None):
        with requests.Session() as http:
            return fetch(http, github.url, reference, tmp_path / "out", limits)

    return get


def found(tmp_path):
    out = tmp_path / "out"
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def test_a_folder_of_a_repository_at_the_commit_of_a_ref(get, github, tmp_path):
    assert get() == SHA
    assert found(tmp_path) == {"environment.py", "dataset/train.jsonl"}
    assert (tmp_path / "out" / "environment.py").read_bytes() == b"x = 1"
    assert github.asked[0] == "/repos/me/envs/commits/v1"


@pytest.mark.parametrize("reference", ["github:me/envs", "github:me/envs@feature/x:"])
def test_without_a_path_the_whole_repository(get, tmp_path, reference):
    assert get(reference) == SHA
    assert found(tmp_path) == set(FILES)


def test_files_are_the_owners_alone_whatever_the_archive_says(get, tmp_path):
    get()

    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {0o600, 0o700}


@pytest.mark.parametrize(
    "reference",
    [
        "github:me",
        "github:me/envs@",
        "github:me/envs@v1:../x",
        "github:me/envs@v1:a/../../x",
        "github:me/envs@--upload:x",
        "github:me/../envs",
        "github:me/envs@v1:a b",
        "github:me/envs@a..b",
        "https://github.com/me/envs",
    ],
)
def test_what_is_no_reference_is_refused_before_any_request(get, github, reference):
    with pytest.raises(EnvironmentFault, match="is not a GitHub reference"):
        get(reference)
    assert github.asked == []


def test_a_reference_reads_as_its_parts():
    assert GitHubReference.parse("github:me/envs@v1:a/b/") == GitHubReference(
        "me", "envs", "v1", "a/b"
    )


def test_a_missing_repository_or_ref(get):
    with pytest.raises(EnvironmentFault, match="GitHub has no public me/nothing@v1"):
        get("github:me/nothing@v1:maths")


def test_a_missing_folder_says_what_to_name(get, tmp_path):
    with pytest.raises(EnvironmentFault, match='no folder "physics"'):
        get("github:me/envs@v1:physics")
    assert found(tmp_path) == set()


@pytest.mark.parametrize(("status", "words"), [(403, "more requests"), (429, "more"), (502, "502")])
def test_an_outage_is_not_the_environments_fault(get, github, status, words):
    github.status = status

    with pytest.raises(FlashError, match=words) as caught:
        get()
    assert type(caught.value) is FlashError


def test_no_network_names_the_way_out(tmp_path):
    with requests.Session() as http, pytest.raises(FlashError, match="cannot reach") as caught:
        fetch(http, "http://127.0.0.1:9", "github:me/envs", tmp_path)
    assert "environment.path" in caught.value.hint


def test_an_answer_that_is_no_commit_is_not_followed(get, github):
    github.sha = "../../other"

    with pytest.raises(FlashError, match="other than a commit"):
        get()
    assert len(github.asked) == 1


@pytest.mark.parametrize(
    "member",
    [
        special(f"{TOP}/maths/link.py", tarfile.SYMTYPE, "/etc/passwd"),
        special(f"{TOP}/maths/link.py", tarfile.SYMTYPE, "environment.py"),
        special(f"{TOP}/maths/link.py", tarfile.LNKTYPE, f"{TOP}/README.md"),
        special(f"{TOP}/maths/pipe", tarfile.FIFOTYPE),
        special(f"{TOP}/maths/device", tarfile.CHRTYPE),
        special(f"{TOP}/maths/../../../up.py", tarfile.REGTYPE),
        special(f"/{TOP}/maths/absolute.py", tarfile.REGTYPE),
        special(f"{TOP}/maths/environment.py", tarfile.REGTYPE),
        special(f"{TOP}/maths", tarfile.REGTYPE),
    ],
    ids=["symlink", "inner-symlink", "hardlink", "fifo", "device", "up", "root", "twice", "file"],
)
def test_a_hostile_member_refuses_the_archive_and_leaves_nothing(get, github, tmp_path, member):
    github.tarball = tarball(member, files=FILES)

    with pytest.raises(EnvironmentFault, match="which is refused"):
        get()
    assert sorted((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_outside_the_folder_do_not_matter(get, github, tmp_path):
    link = special(f"{TOP}/elsewhere", tarfile.SYMTYPE, "/etc/passwd")
    github.tarball = tarball(link, files=FILES)
    get()

    assert found(tmp_path) == {"environment.py", "dataset/train.jsonl"}


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(packed_bytes=100), "larger than"),
        (Limits(scanned_members=2), "the repository holds more"),
        (Limits(scanned_bytes=1000), "the repository holds more"),
        (Limits(members=1), "the environment holds more"),
        (Limits(bytes=6), "the environment holds more"),
    ],
)
def test_too_much_is_refused_and_leaves_nothing(get, tmp_path, limits, words):
    with pytest.raises(EnvironmentFault, match=words):
        get(limits=limits)
    assert found(tmp_path) == set()


def test_a_bomb_in_a_header_is_stopped_by_what_it_unpacks_to(get, github):
    bomb = tarfile.TarInfo(f"{TOP}/x")
    bomb.type, bomb.size = tarfile.XHDTYPE, 50_000_000
    github.tarball = gzip.compress(bomb.tobuf() + b"\0" * 50_000_000)

    with pytest.raises(EnvironmentFault, match="the repository holds more"):
        get(limits=Limits(scanned_bytes=1_000_000))


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_torn_archive_is_refused(get, github, tmp_path, cut):
    github.tarball = github.tarball[: int(len(github.tarball) * cut)]

    with pytest.raises(EnvironmentFault, match="damaged"):
        get()
    assert found(tmp_path) == set()


def test_what_is_no_archive_is_refused(get, github):
    github.tarball = b"<html>down for maintenance</html>"

    with pytest.raises(EnvironmentFault, match="damaged"):
        get()
