"""Federated Ferret: rounds, clients, server, messages and the `ferret` command.

Arrows run one way: `cli` -> `engines` -> `rounds` -> `server`, `algorithms` -> `wire`. `wire` knows bytes,
not models; an algorithm knows no other algorithm; the round loop knows no engine.
"""
