"""Reward of a service: send the answer to an HTTP reward model, take the number it sends back.

Asked is {"prompt", "response", "label", "metadata"}, wanted {"reward": 0.5} or 0.5; `remote_group`
asks with "responses" and wants {"rewards": [...]} or a list. Whatever goes wrong is an exception,
so the answer has no verdict; a broken service never looks like a wrong answer.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

NETWORK = True  # reward workers have none unless a reward file says this
MAX_REPLY_BYTES = 1 << 20
BACKOFF_S = 0.1  # before the first retry; doubles with each


class RemoteError(RuntimeError):
    """The service gave no reward."""


class RemoteUnavailable(RemoteError):
    """No connection, a broken one, or a status of 500 and above: worth another attempt."""


class RemoteTimeout(RemoteError):
    """No reply in time."""


class RemoteStatus(RemoteError):
    """It refused the request: a redirect, or a status from 400 to 499."""


class RemoteReply(RemoteError):
    """It replied something else than finite numbers."""


def remote(
    response: str,
    label: str,
    *,
    prompt: str = "",
    metadata: Mapping[str, Any] | None = None,
    url: str,
    timeout_s: float = 8.0,
    retries: int = 2,
    key_env: str = "",
) -> float:
    """The service's reward. Raises RemoteError, and ValueError for options that cannot be.

    timeout_s: of all attempts together; keep it below reward.timeout_s.
    retries: further attempts where the service was RemoteUnavailable.
    key_env: environment variable with an API key, sent as a bearer token.
    """
    asked = {"prompt": prompt, "response": response, "label": label, "metadata": metadata or {}}
    reply = _ask(_request(url, asked, key_env), timeout_s, retries)
    return _number(reply["reward"] if isinstance(reply, dict) and "reward" in reply else reply)


def remote_group(
    responses: list[str],
    label: str,
    *,
    prompt: str = "",
    metadata: Mapping[str, Any] | None = None,
    url: str,
    timeout_s: float = 8.0,
    retries: int = 2,
    key_env: str = "",
) -> list[float]:
    """The service's rewards for all answers to one prompt, in one request; else as `remote`."""
    asked = {"prompt": prompt, "responses": responses, "label": label, "metadata": metadata or {}}
    reply = _ask(_request(url, asked, key_env), timeout_s, retries)
    rewards = reply["rewards"] if isinstance(reply, dict) and "rewards" in reply else reply
    if not isinstance(rewards, list) or len(rewards) != len(responses):
        raise RemoteReply(f"wanted a list of {len(responses)} rewards, got {_shown(rewards)}")
    return [_number(reward) for reward in rewards]


def _request(url: str, asked: dict[str, Any], key_env: str) -> urllib.request.Request:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.username is not None:
        raise ValueError(
            f"url is for {parts.hostname} by {parts.scheme!r}: wanted http:// or https://, and no "
            "user or password before the host; a key comes from key_env"
        )
    request = urllib.request.Request(url, json.dumps(asked, allow_nan=False).encode())
    request.add_header("Content-Type", "application/json")
    if key_env:
        key = os.environ.get(key_env, "").strip()
        if not (key.isascii() and key.isprintable() and key):
            raise ValueError(f"key_env = {key_env!r}: that environment variable holds no API key")
        request.add_header("Authorization", f"Bearer {key}")
    return request


def _ask(request: urllib.request.Request, timeout_s: float, retries: int) -> Any:
    """The reply, parsed. Raises RemoteError."""
    deadline = time.monotonic() + timeout_s
    for attempt in itertools.count():
        try:
            return _send(request, deadline - time.monotonic())
        except RemoteUnavailable:
            pause_s = BACKOFF_S * 2**attempt
            if attempt >= retries or time.monotonic() + pause_s >= deadline:
                raise
            time.sleep(pause_s)


def _send(request: urllib.request.Request, timeout_s: float) -> Any:
    where = request.full_url.partition("?")[0]  # a query may hold secrets
    try:
        with _OPENER.open(request, timeout=timeout_s) as reply:
            data = reply.read(MAX_REPLY_BYTES)
    except urllib.error.HTTPError as error:
        error.close()
        kind = RemoteUnavailable if error.code >= 500 else RemoteStatus
        raise kind(f"{where} answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise RemoteTimeout(f"{where} did not answer within {timeout_s:.1f} s") from None
        raise RemoteUnavailable(f"{where}: {type(cause).__name__}: {cause}") from None
    try:
        return json.loads(data)
    except ValueError:
        raise RemoteReply(f"{where} answered no JSON: {_shown(data)}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would lose the answer, and could carry the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _number(reward: Any) -> float:
    """Raises RemoteReply for what is no number, or not a finite one."""
    if isinstance(reward, int | float) and not isinstance(reward, bool):
        try:
            if math.isfinite(value := float(reward)):
                return value
        except OverflowError:
            pass  # an integer beyond floating point
    raise RemoteReply(f"wanted a finite reward, got {_shown(reward)}")


def _shown(value: Any) -> str:
    return repr(value)[:80]
