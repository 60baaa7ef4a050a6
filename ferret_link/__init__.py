"""What a Flower ClientApp and a long-lived worker say to each other. Nothing here imports torch.

Flower starts a process for every message, so what it imports is paid for in every round.
"""
