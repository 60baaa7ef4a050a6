"""All clients in this process, one after the other, on real bytes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ferret_ext.federated import run, scores
from ferret_ext.federated.algorithms.base import Algorithm, Reply
from ferret_ext.federated.config import SimulationConfig
from ferret_ext.federated.data import loading
from ferret_ext.federated.data.tokens import Example
from ferret_ext.federated.evaluation import Evaluator
from ferret_ext.federated.members import Members, client_weights
from ferret_ext.federated.rounds import Watcher
from ferret_ext.federated.run import Narrator, OpenJournal, Result
from ferret_ext.federated.server import Server


class InProcessClients:
    """The clients of a run, whose weights come from the relayed bytes and from nowhere else."""

    def __init__(
        self,
        algorithm: Algorithm[Any],
        model: Any,
        shards: Sequence[Sequence[Example]],
        weights: Sequence[float],
        seed: int,
        *,
        start_on_host: bool = False,
    ) -> None:
        of_client = dict(enumerate(shards)), dict(enumerate(weights))
        self._members = Members(algorithm, model, *of_client, seed, start_on_host=start_on_host)
        self._seen = [0] * len(shards)
        self._round = 0

    def exchange(self, watcher: Watcher, round_: int, clients: list[int], server: Server[Any]) -> list[Reply]:
        """A round of the clients: each receives the broadcasts that it has not seen and sends its update."""
        self._catch_up(round_, server)
        replies = []
        for client in clients:
            broadcasts = server.broadcasts_since(self._seen[client])
            self._seen[client] = len(server.broadcasts)
            reply = self._members.update(client, round_, broadcasts, server.assembly.invitation)
            if reply.failure:
                watcher.client_left_out(round_, client, reply.failure)
            watcher.client_done(round_, client)
            replies.append(reply)
        return replies

    def ask(self, round_: int, requests: Mapping[int, bytes], enough: int, least: int) -> list[Reply]:
        """What the clients say to these requests."""
        return [self._members.reply(client, request) for client, request in requests.items()]

    def _catch_up(self, round_: int, server: Server[Any]) -> None:
        """Before the first round of a run that is resumed: as if these clients had been there all along."""
        if self._round == 0 and round_ > 1:
            self._members.replica.adopt(server.replica)
        for past in range(self._round + 1, round_):
            for client in server.choose(past):
                self._seen[client] = past
        self._round = round_


def simulate(config: SimulationConfig, narrator: Narrator, open_journal: OpenJournal | None = None) -> Result:
    """Runs the rounds of `config`, or those that its journal lacks, and returns the final global model.

    The same config gives the same weights, bit for bit, on the same machine with the same number of threads.
    Raises ConfigError, DataError, DivergedError and RunError.
    """
    measures = scores.load(config.evaluation.scores)
    with run.reproducible(config.full_determinism, config.num_threads):
        start = run.begin(config)
        data = loading.load(start.config, start.tokenizer, start.max_length, narrator.say)
        narrator.dealt(data.holdings)
        evaluator = Evaluator(config.evaluation, data.held, start.tokenizer, measures)
        weights = client_weights(start.config, start.algorithm, data.shards)
        clients = InProcessClients(
            start.algorithm,
            copy.deepcopy(start.model),
            data.shards,
            weights,
            config.seed,
            start_on_host=config.training.start_on_host,
        )
        exchange = partial(clients.exchange, narrator)
        return run.lead(start, len(data.shards), exchange, clients.ask, evaluator, narrator, open_journal)
