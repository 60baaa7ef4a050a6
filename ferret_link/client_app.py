"""The ClientApp: hands every message to the worker at the node's socket, and its answer back.

    from ferret_link.client_app import app

The node's configuration names the socket (`flower-supernode --node-config 'socket="/path/of/the/socket"'`),
which `ferret join` does by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ferret_link import frames
from ferret_link.frames import Frame, FrameError

RECORD = "ferret"  # the name of the only record in a message

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who the worker is, and how far."""
    return _pass_on(message, context, timeout=60)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A round, which takes as long as it takes."""
    return _pass_on(message, context, timeout=None)


def _pass_on(message: Message, context: Context, timeout: float | None) -> Message:
    answer: Any = ask(str(context.node_config.get("socket", "")), dict(message.content[RECORD]), timeout)
    return Message(RecordDict({RECORD: ConfigRecord(answer)}), reply_to=message)


def ask(path: str, call: dict[str, Any], timeout: float | None) -> Frame:
    """The worker's answer, or an answer of kind "error" where none comes."""
    if not path:
        return _error("the node's configuration names no socket; start the SuperNode by ferret join")
    try:
        with frames.connect(Path(path), timeout) as connection:
            frames.send(connection, call)
            answer = frames.receive(connection)
    except (OSError, FrameError) as error:
        return _error(f"no worker answers at {path}: {error}")
    return answer or _error(f"the worker at {path} has died; it may have been killed for want of memory")


def _error(text: str) -> Frame:
    return {"kind": "error", "type": "NoWorker", "text": text}
