"""Flower as what carries calls to clients elsewhere: its SuperLink and SuperNodes, our rounds.

link: the ServerApp. The ClientApp is `ferret_link.client_app`, since it must not import torch. folder: an
app's folder for `flwr run`. processes: Flower's own, as `ferret serve` and `ferret join` start them.
"""
