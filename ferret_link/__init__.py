"""What a Flower ClientApp and a long-lived worker say to each other, and where the command `ferret` begins.

Nothing here imports torch by being imported. Flower starts a process for every message, so what it imports is
paid for in every round; and `ferret` can be interrupted before torch is there.
"""
