"""A repository on the hub of Hugging Face that an export is written to."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from flash.errors import FlashError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_OF_THE_HUB: Final = frozenset({".gitattributes", "README.md"})
"""What a repository may hold that counts as empty: the hub's own pages make these."""


class HubRepository:
    """
    One model repository, private unless it is to be `public`.

    Its hub is that of the environment (`HF_ENDPOINT`), and the token is in no error.
    """

    def __init__(self, name: str, token: str, *, public: bool) -> None:
        self._name = name
        self._token = token
        self._public = public

    def check(self) -> None:
        """Raise `UsageError` where the token is refused, or the repository is in the way."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._errors():
            api = self._api()
            api.whoami()
            try:
                found = api.model_info(self._name)
            except RepositoryNotFoundError:
                return
        files = {one.rfilename for one in found.siblings or []}
        if not found.private and not self._public:
            raise UsageError(
                f"{self._name} is public, so everybody could read what is written there",
                hint="--public says that they may",
            )
        if files - _OF_THE_HUB:
            raise UsageError(
                f"{self._name} holds {len(files)} files already, and nothing is overwritten",
                hint="name a repository that is new or empty",
            )

    def upload(self, folder: Path, message: str) -> str:
        """Make the repository where it is not there, commit the folder's files; return its URL."""
        with self._errors():
            api = self._api()
            url = api.create_repo(self._name, private=not self._public, exist_ok=True)
            api.upload_folder(repo_id=self._name, folder_path=str(folder), commit_message=message)
        return str(url)

    def _api(self) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        return HfApi(token=self._token, library_name="flash")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the hub or the way to it does wrong into a sentence."""
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code
            said = getattr(error, "server_message", None) or f"status {status}"
            kind = UsageError if status in {401, 403} else FlashError
            hint = "see that HF_TOKEN may write there" if kind is UsageError else None
            raise kind(f"the hub refuses {self._name}: {self._masked(said)}", hint=hint) from None
        except (httpx.HTTPError, OSError) as error:
            raise FlashError(
                f"{self._name} cannot be written to: {self._masked(str(error))}",
                hint="try again; what was uploaded before is not sent anew",
            ) from None

    def _masked(self, text: str) -> str:
        return text.replace(self._token, "…")
