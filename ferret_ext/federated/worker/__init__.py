"""A client's process that lives through all rounds of a run, and answers calls at a Unix domain socket."""
