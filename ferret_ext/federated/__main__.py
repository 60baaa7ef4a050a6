"""`python -m ferret_ext.federated` is the `ferret` command."""

from ferret_ext.federated.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
