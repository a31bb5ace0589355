"""A chat template is a program of whoever made the model: its first chat is rendered in a process
that may be killed. The sandbox of jinja bounds neither time nor memory."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys

CPU_S = 5  # real templates need milliseconds
WALL_S = 300.0  # its start on a busy host included
MEMORY_BYTES = 4 << 30
MAX_CHARS = 1_000_000
_CHAT = [{"role": "user", "content": "What is 1+1?"}]
_OUT_OF_MEMORY, _TOO_LONG = 3, 4  # statuses


def refuse_endless(template: str, where: object) -> None:
    """Raise ValueError if a short chat takes more time, memory or characters than any should. One
    that the template itself refuses is none of our business: it may want other messages."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(template),
            text=True,
            stderr=subprocess.PIPE,
            timeout=WALL_S,
        )
    except subprocess.TimeoutExpired:
        status = -signal.SIGXCPU
    else:
        status = done.returncode
    took = {
        -signal.SIGXCPU: f"more than {CPU_S} s",
        _OUT_OF_MEMORY: f"more than {MEMORY_BYTES >> 30} GiB of memory",
        _TOO_LONG: f"more than {MAX_CHARS:,} characters",
    }
    if status:
        raise ValueError(
            f"the chat template in {where} takes {took.get(status, f'its process ({status})')} for "
            "a chat of one short message: give the folder another chat_template.jinja"
        )


def main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = json.load(sys.stdin)
    limit_s = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        (text,), _ = render_jinja_template(
            conversations=[_CHAT], chat_template=template, add_generation_prompt=True
        )
    except MemoryError:
        sys.exit(_OUT_OF_MEMORY)
    except Exception:
        return
    sys.exit(_TOO_LONG if len(text) > MAX_CHARS else 0)


if __name__ == "__main__":
    main()
