"""What of the caller's environment a process that runs user code may see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# What programs need to find their files, certificates, proxies and devices. Everything else stays
# out: a shell's environment is full of credentials, and environments are not trusted with ours.
_NAMES = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",
        "CURL_CA_BUNDLE",
        "FLASH_DISABLE_PLUGINS",
        "FLASH_HOME",
        "HF_DATASETS_OFFLINE",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HOME",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "LANG",
        "LD_LIBRARY_PATH",
        "LOGNAME",
        "MKL_NUM_THREADS",
        "NO_PROXY",
        "OMP_NUM_THREADS",
        "PATH",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        "TEMP",
        "TMP",
        "TMPDIR",
        "TRANSFORMERS_OFFLINE",
        "TZ",
        "USER",
        "XDG_CACHE_HOME",
        "http_proxy",
        "https_proxy",
        "no_proxy",
    }
)
_PREFIXES = ("LC_", "PIP_")

WORKER_VARIABLES = {
    # How often GNU's OpenMP looks for work before it lets go of the core. Its own 300,000 are for
    # a machine of one's own: beside three busy programs, SFT on two cores ran at 55 tokens/s, and
    # at 105 with this; alone at 328 and 322.
    "GOMP_SPINCOUNT": "2000",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of `environ` that a worker may see, and those that Flash sets itself."""
    kept = {
        name: value
        for name, value in environ.items()
        if (name in _NAMES or name.startswith(_PREFIXES)) and not _carries_password(name, value)
    }
    return kept | WORKER_VARIABLES


def _carries_password(name: str, value: str) -> bool:
    """
    Say whether one of the addresses in the value has a user or a password in it.

    Package indexes are several in one variable, and a proxy may go without a scheme.
    """
    is_proxy = name.upper().endswith("_PROXY")
    return any("@" in word and ("://" in word or is_proxy) for word in value.split())
