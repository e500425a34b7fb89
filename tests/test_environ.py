"""What of the caller's environment reaches a process that runs user code."""

import pytest

from flash.environ import WORKER_VARIABLES, worker_environment


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/bin:/home/me@work/bin"),
        ("LC_ALL", "de_DE.UTF-8@euro"),
        ("HTTPS_PROXY", "http://proxy:3128"),
        ("PIP_EXTRA_INDEX_URL", "https://a/simple https://b/simple"),
        ("PIP_FIND_LINKS", "/home/me@work/wheels"),
        ("FLASH_DISABLE_PLUGINS", "wandb"),
        ("HF_ENDPOINT", "https://mirror.example"),
        ("XDG_CACHE_HOME", "/scratch/cache"),
    ],
)
def test_what_programs_need_is_passed_on(name, value):
    assert worker_environment({name: value}) == {name: value} | WORKER_VARIABLES


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENAI_API_KEY", "x"),
        ("PIP_INDEX_URL", "https://user:pw@a/simple"),
        ("PIP_INDEX_URL", "https://user:p/w@a/simple"),
        ("PIP_EXTRA_INDEX_URL", "https://a/simple https://user:pw@b/simple"),
        ("PIP_EXTRA_INDEX_URL", "https://a/simple\nhttps://token@b/simple"),
        ("HTTPS_PROXY", "user:pw@proxy:3128"),
        ("https_proxy", "user:pw@proxy:3128"),
        ("PIP_PROXY", "user:pw@proxy:3128"),
        ("HF_ENDPOINT", "https://user:pw@mirror.example"),
    ],
)
def test_credentials_and_addresses_with_them_are_not(name, value):
    assert worker_environment({name: value}) == WORKER_VARIABLES
