"""
`github:owner/repo@ref:path`: a folder of a public repository at an exact commit.

Two documented endpoints of GitHub's REST API are used: `GET /repos/{owner}/{repo}/commits/{ref}`
with the media type `application/vnd.github.sha`, which answers with the commit's SHA as text, and
`GET /repos/{owner}/{repo}/tarball/{ref}`, which redirects to codeload.
"""

from __future__ import annotations

import re
import tempfile
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

import attrs

from flash.api import EnvironmentFault, FlashError
from flash_env_freesolo.archive import Limits, extract

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REFERENCE = re.compile(
    rf"github:(?P<owner>{_NAME})/(?P<repo>{_NAME})(?:@(?P<ref>[^:\s]+))?(?::(?P<path>\S*))?"
)
_SHA = re.compile(r"[0-9a-f]{40}")
_TOO_MANY = {403, 429}
_MISSING = {404, 422}
_CHUNK = 1 << 16


@attrs.frozen
class GitHubReference:
    """What `github:owner/repo@ref:path` names; the default branch and the root unless said."""

    owner: str
    repo: str
    ref: str
    path: str

    @classmethod
    def parse(cls, reference: str) -> GitHubReference:
        """Read a reference; `EnvironmentFault` says what it should look like."""
        match = _REFERENCE.fullmatch(reference)
        ref = (match and match["ref"]) or "HEAD"
        path = ((match and match["path"]) or "").strip("/")
        odd = ref.startswith("-") or ".." in ref or {"..", "."} & set(path.split("/"))
        if match is None or odd or "\\" in path:
            raise EnvironmentFault(
                f'"{reference}" is not a GitHub reference',
                hint="write github:owner/repo@ref:path, for example github:me/envs@v1:maths",
            )
        return cls(match["owner"], match["repo"], ref, path)

    def __str__(self) -> str:
        return f"{self.owner}/{self.repo}@{self.ref}"


def fetch(
    http: Any, api: str, reference: str, destination: Path, limits: Limits | None = None
) -> str:
    """
    Extract the folder that `reference` names into `destination` and return the commit's SHA.

    `http` is a requests session; `api` the base URL of the API. Nothing is left in `destination`
    after a failure.
    """
    import requests

    named = GitHubReference.parse(reference)
    limits = limits or Limits()
    repository = f"{api}/repos/{named.owner}/{named.repo}"
    try:
        sha = _commit(http, f"{repository}/commits/{quote(named.ref)}", named)
        with tempfile.TemporaryFile() as file:
            _download(http, f"{repository}/tarball/{sha}", file, named, limits)
            extract(file, named.path, destination, limits)
    except requests.RequestException as error:
        raise FlashError(
            f"cannot reach GitHub for {reference}: {type(error).__name__}",
            hint="check the network, or use a local copy: environment.path",
        ) from error
    return sha


def _commit(http: Any, url: str, named: GitHubReference) -> str:
    answer = http.get(url, headers={"Accept": "application/vnd.github.sha"})
    if answer.status_code != HTTPStatus.OK:
        _refuse(answer.status_code, named)
    sha: str = answer.text.strip()
    if not _SHA.fullmatch(sha):
        raise FlashError(
            f"GitHub answered for {named} with something other than a commit",
            hint="try again later, or name the commit itself",
        )
    return sha


def _download(http: Any, url: str, file: IO[bytes], named: GitHubReference, limits: Limits) -> None:
    with http.get(url, stream=True) as answer:
        if answer.status_code != HTTPStatus.OK:
            _refuse(answer.status_code, named)
        size = 0
        for chunk in answer.iter_content(_CHUNK):
            size += len(chunk)
            if size > limits.packed_bytes:
                raise EnvironmentFault(
                    f"the archive of {named} is larger than {limits.packed_bytes >> 20} MiB",
                    hint="clone the repository and use a local folder: environment.path",
                )
            file.write(chunk)
    file.seek(0)


def _refuse(status: int, named: GitHubReference) -> NoReturn:
    if status in _MISSING:
        raise EnvironmentFault(
            f"GitHub has no public {named}",
            hint="check owner, repository and ref; for a private one use a local clone",
        )
    if status in _TOO_MANY:
        raise FlashError(
            f"GitHub refuses more requests from this address for now (HTTP {status})",
            hint="wait an hour, or use a local clone: environment.path",
        )
    raise FlashError(f"GitHub answered with HTTP {status} for {named}", hint="try again later")
