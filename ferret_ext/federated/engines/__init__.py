"""What carries the bytes between server and clients; an engine knows the round loop, which knows none."""
