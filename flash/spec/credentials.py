"""What looks like a credential: known shapes, telling names, and text as random as a key."""

from __future__ import annotations

import math
import re
from collections import Counter

# Every repetition is bounded or cannot start over inside itself, so that a search of a hostile
# megabyte stays linear.
_SHAPES = re.compile(
    r"""
    (?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{30,}                                      # Hugging Face
      | fslo_[A-Za-z0-9]{30,} | pit_[A-Za-z0-9]{40,}             # Freesolo, Prime Intellect
      | (?<![_-])sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}       # OpenAI, Anthropic, OpenRouter
      | (?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{30,}              # GitHub
      | glpat-[A-Za-z0-9_-]{20,}                                 # GitLab
      | (?:AKIA|ASIA)[A-Z0-9]{16}                                # AWS
      | AIza[A-Za-z0-9_-]{35}                                    # Google
      | xox[abprs]-[A-Za-z0-9-]{10,}                             # Slack
      | rpa_[A-Za-z0-9]{30,}                                     # RunPod
      | npm_[A-Za-z0-9]{36} | pypi-[A-Za-z0-9_-]{50,}            # package registries
      | eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]+             # JSON web token
    )
    | -----BEGIN\ (?:[A-Z]+\ ){0,3}PRIVATE\ KEY-----            # PEM
    | ://[^\s/@:]{0,200}:[^\s/@]{1,400}@                         # password in a URL
    """,
    re.VERBOSE,
)

_SECRET_WORDS = frozenset(
    "TOKEN SECRET PASSWORD PASSWD PASSPHRASE CREDENTIAL CREDENTIALS APIKEY PRIVATEKEY PAT".split()  # noqa: SIM905 - reads better than a column of quotes
)
_KEY_COMPANIONS = frozenset(
    "API SECRET PRIVATE ACCESS INTERNAL AUTH SIGNING ENCRYPTION SSH DEPLOY GPG PGP RSA PEM SSL TLS".split()  # noqa: SIM905, E501 - same
)

# Random text over letters and digits has close to 5 bits a character at these lengths; words,
# paths and versions stay below.
_RANDOM_LENGTH = 32
_RANDOM_RUN = 20
_RANDOM_BITS = 4.4
_RANDOM_TEXT = re.compile(r"[A-Za-z0-9+/_=-]+")


def secret_name(name: str) -> bool:
    """Say whether a variable's name announces a secret: `API_KEY` does, `SORT_KEY` does not."""
    words = set(name.upper().split("_"))
    return bool(words & _SECRET_WORDS) or ("KEY" in words and bool(words & _KEY_COMPANIONS))


def looks_like_secret(text: str) -> bool:
    """Say whether the text contains a credential of a known shape."""
    return _SHAPES.search(text) is not None


def looks_random(text: str) -> bool:
    """
    Say whether the text is long and as random as only keys are.

    Needs digits and letters of both cases, so that hex digests, ids, paths and sentences pass.
    """
    if len(text) < _RANDOM_LENGTH or not _RANDOM_TEXT.fullmatch(text):
        return False
    longest_run = max(map(len, re.split("[/_-]", text)))
    mixed = all(re.search(kind, text) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    counts = Counter(text).values()
    bits = -sum(n / len(text) * math.log2(n / len(text)) for n in counts)
    return mixed and longest_run >= _RANDOM_RUN and bits > _RANDOM_BITS
