"""Why a run stops where it is. What it has reached stays in its ledger, and it can be resumed."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that cannot go on."""


class QuorumError(RunError):
    """A round with too few updates that it can take."""


class DisagreementError(RunError):
    """Weights that should be the same at two parties and are not. digests: of each parameter, at the one."""

    def __init__(self, text: str, digests: list[bytes] | None = None) -> None:
        super().__init__(text)
        self.digests = digests or []


class LedgerError(RunError):
    """A ledger, or what stands beside it, that cannot be read or written, or is not what it should be."""
