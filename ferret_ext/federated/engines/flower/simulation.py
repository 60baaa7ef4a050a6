"""The ClientApp of Flower's simulation: in each of its processes a worker, for whichever client's turn it is.

The processes outlive messages, one a core, so model and data are loaded once in each. Which client a call is
for says the node's `partition-id`, which the simulation gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ferret_ext.federated.engines.flower.link import RECORD
from ferret_ext.federated.settings import Setting
from ferret_ext.federated.worker.worker import Worker, is_own

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp


def client_app() -> ClientApp:
    """The ClientApp, whose run configuration is a run's settings."""
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Who this is, and how far its process is in the run."""
        client = int(context.node_config["partition-id"])
        return _reply(message, worker(own(context.run_config)).greet(client))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """A round of one client."""
        return _reply(message, worker(own(context.run_config)).answer(dict(message.content[RECORD])))

    return app


def own(settings: Mapping[str, Any]) -> tuple[Setting, ...]:
    """Those of the run's settings that a party has for itself: here all are on one machine."""
    return tuple((key, value) for key, value in settings.items() if is_own(key))


@lru_cache(maxsize=1)
def worker(own: tuple[Setting, ...]) -> Worker:
    """This process's worker."""
    return Worker(None, own, print, share=True)


def _reply(message: Message, answer: Any) -> Message:
    from flwr.app import ConfigRecord, Message, RecordDict

    return Message(RecordDict({RECORD: ConfigRecord(answer)}), reply_to=message)
