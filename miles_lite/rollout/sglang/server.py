"""The process of one SGLang server, run by the interpreter that has sglang:

    python -m miles_lite.rollout.sglang.server

It reads one line of JSON from its standard input, {"options": {ServerArgs field: value}, "keys":
{field: "..."}}, so that no secret is on a command line, where every user of the host can read it.
Standard input stays open: when it ends, which it does however the parent ends, the server and all
its children are killed.

SGLang spawns its schedulers. A spawned process imports the main module of its parent first, this
one, under the name __mp_main__; so what must hold in every process is done on import.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from typing import Any

from miles_lite import orphan

if __name__ in ("__main__", "__mp_main__"):
    orphan.bind_spawns()
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        from miles_lite.rollout.sglang.cpu import shim

        shim.install()
    if __name__ == "__mp_main__":
        from miles_lite.rollout.sglang import stores

        stores.install()


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_stdin, daemon=True).start()
    # only now: it takes seconds, and the parent may go meanwhile
    from sglang.launch_server import run_server  # pyright: ignore[reportMissingImports]
    from sglang.srt.plugins import load_plugins  # pyright: ignore[reportMissingImports]
    from sglang.srt.utils import kill_process_tree  # pyright: ignore[reportMissingImports]

    from miles_lite.rollout.sglang.arguments import server_args

    load_plugins()
    arguments = server_args(request["options"])
    # not through the command-line parser: SGLang keeps those words and tells them to clients
    for field, key in request["keys"].items():
        if key:
            setattr(arguments, field, key)
            _redact(key)
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _die_with_stdin() -> None:
    """Unlike a parent-death signal this follows the parent process, not the thread of it that
    started us. The children follow by such signals."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _redact(secret: str) -> None:
    """SGLang logs all its options, the keys among them."""
    make_record = logging.getLogRecordFactory()

    def redacted(*positional: Any, **named: Any) -> logging.LogRecord:
        record = make_record(*positional, **named)
        text = record.getMessage()
        if secret in text:
            record.msg, record.args = text.replace(secret, "***"), None
        return record

    logging.setLogRecordFactory(redacted)


if __name__ == "__main__":
    main()
