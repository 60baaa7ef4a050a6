"""The ServerApp: a run's rounds over Flower's messages, which are pushed and pulled at our own pace."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ferret_ext.federated import config as configuration
from ferret_ext.federated import run, scores
from ferret_ext.federated.command import make_console, perform
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data import loading
from ferret_ext.federated.data.protocols import PROTOCOLS
from ferret_ext.federated.engines.remote import Link, RemoteClients
from ferret_ext.federated.evaluation import Evaluator
from ferret_ext.federated.report import RunFolder
from ferret_ext.federated.run import Narrator, OpenJournal, Result
from ferret_ext.federated.settings import ConfigError
from ferret_ext.federated.worker import calls
from ferret_ext.federated.worker.calls import Frame

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.serverapp import Grid, ServerApp

RECORD = "ferret"  # the name of the only record in a message, as in `ferret_link.client_app`
TYPES = {"hello": "query", "train": "train", "ask": "query"}  # of Flower's messages, by the kind of a call


def server_app() -> ServerApp:
    """The ServerApp, whose run configuration is a run's settings. It goes on with what its folder has."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        play(FlowerLink(grid), context.run_config)

    return app


def play(link: Link, settings: Mapping[str, Any]) -> None:
    """The run from where its folder stands to its end. Raises ConfigError, DataError and RunError."""
    config = configuration.build(settings.items())
    folder = RunFolder(config, resume=True)
    perform(make_console(), config, folder, partial(serve, link))


def serve(
    link: Link, config: SimulationConfig, narrator: Narrator, open_journal: OpenJournal | None = None
) -> Result:
    """The rounds of `config`, or those that its journal lacks, with the clients at the link's nodes.

    Where clients hold the parts that `in_process.simulate` deals out, the result is the same to the bit.
    Raises ConfigError, DataError, DivergedError and RunError.
    """
    measures, clients = scores.load(config.evaluation.scores), number_of_clients(config)
    with run.reproducible(config.full_determinism, config.num_threads):
        start = run.begin(config)
        held = loading.load_held(start.config, start.tokenizer, start.max_length, narrator.say)
        evaluator = Evaluator(config.evaluation, held, start.tokenizer, measures)
        remote = RemoteClients(
            link, config.federation, config.robust.quorum, clients, start.genesis, narrator.say
        )
        exchange = partial(remote.exchange, narrator)
        return run.lead(start, clients, exchange, remote.ask, evaluator, narrator, open_journal)


def number_of_clients(config: SimulationConfig) -> int:
    """How many clients there are. Raises ConfigError where only their data would tell."""
    protocol = PROTOCOLS[config.dataset.protocol]
    kind = protocol.kind if config.partition.kind == "auto" else config.partition.kind
    number = config.num_clients
    if number is None and kind != "natural-id":
        number = protocol.num_clients
    if number is None:
        raise ConfigError("num_clients: expected a number where clients are elsewhere, got none")
    return number


class FlowerLink:
    """A `remote.Link` on Flower's grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> list[int]:
        return list(self._grid.get_node_ids())

    def send(self, node: int, frame: Frame) -> str | None:
        from flwr.app import ConfigRecord, Message, RecordDict

        content = RecordDict({RECORD: ConfigRecord(frame)})
        names = list(self._grid.push_messages([Message(content, node, TYPES[frame["kind"]])]))
        return str(names[0]) if names and names[0] else None

    def receive(self, names: Collection[str]) -> Iterator[tuple[str, Frame]]:
        for message in self._grid.pull_messages(list(names)):
            if (name := message.metadata.reply_to_message_id) in names:
                yield name, _frame_of(message)


def _frame_of(message: Message) -> Frame:
    if message.has_error():
        return calls.error("NoAnswer", f"Flower: {message.error.reason or message.error.code}")
    record = message.content.get(RECORD)
    return dict(record) if isinstance(record, Mapping) else calls.error("CallError", "no record of ours")
