"""Who holds which training example."""

from __future__ import annotations

import numpy as np

from ferret_ext.federated.data.errors import DataError


def iid(num_examples: int, num_clients: int, seed: int) -> list[list[int]]:
    """The examples' indices, shuffled and dealt out to the clients as evenly as can be.

    Raises DataError if there are fewer examples than clients.
    """
    if num_examples < num_clients:
        raise DataError(
            f"num_clients: expected at most the {num_examples} training examples, got {num_clients}"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_examples)
    return [part.tolist() for part in np.array_split(order, num_clients)]
