"""What proves to every process of Ray that another one is of the same run: Ray runs the code of
whoever it believes. Generated for each run, never logged; who can read its file belongs to the run.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")  # Ray's variables about it


def write_token(path: Path) -> str:
    """A new one in a new file of mode 0600, in place of one that was left there."""
    path.unlink(missing_ok=True)
    token = secrets.token_hex(32)
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    return token


def token_env(path: Path) -> dict[str, str]:
    """For Ray and everybody who talks to it; RAY_AUTH_TOKEN, if set, would win over the file."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def proof(token: str, address: str) -> str:
    """That the host of this address knows the token, without saying it."""
    return hmac.digest(token.encode(), address.encode(), "sha256").hex()
