"""Keys, masks and shares, of well-kept primitives: X25519, HKDF-SHA256, ChaCha20, AES-256-GCM, Shamir."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from ferret_ext.federated.settings import ConfigError

KEY_BYTES = 32
PAIR_BYTES = 32  # of the seed that two clients share
SHARE_BYTES = 16  # Shamir's shares are as long as their secret, which is 16 bytes in pycryptodome
SEALED_BYTES = SHARE_BYTES + 16  # with AES-GCM's tag
SESSION_BYTES = 16

Random = Callable[[int], bytes]
Words = npt.NDArray[np.uint32]


class MaskError(ValueError):
    """A key, a share or a seed that is none, or that was changed on its way."""


@dataclass(frozen=True)
class Pair:
    """What two clients have in common in a session. seed: of their mask. to, of: the keys that this client
    encrypts for the other with, and the other for this one."""

    seed: bytes
    to: bytes
    of: bytes


class Key:
    """A client's key for one session."""

    def __init__(self, random: Random = os.urandom) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self._key = X25519PrivateKey.from_private_bytes(random(KEY_BYTES))
        self.public = self._key.public_key().public_bytes_raw()

    def agree(self, other: bytes, context: bytes) -> Pair:
        """What this key and another's public one have in common in this context. Raises MaskError."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        if other == self.public:
            raise MaskError("expected another client's key, got one's own")
        try:
            secret = self._key.exchange(X25519PublicKey.from_public_bytes(other))
        except ValueError:  # a point of low order
            raise MaskError("expected a key of X25519, got a point of low order") from None
        first = self.public < other
        both = self.public + other if first else other + self.public
        derived = _derive(secret, context + both, b"ferret pair", PAIR_BYTES + 2 * KEY_BYTES)
        seed, up, down = (derived[start : start + 32] for start in (0, 32, 64))
        return Pair(seed, *((up, down) if first else (down, up)))


def context(run: bytes, round_: int, session: bytes) -> bytes:
    """What everything that is derived in a session depends on."""
    return run + round_.to_bytes(4, "little") + session


def stream(seed: bytes, count: int) -> Words:
    """`count` words of ChaCha20's key stream; a seed serves one stream."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    encryptor = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * count)), "<u4")


def own_stream(secret: bytes, context: bytes, count: int) -> Words:
    """The mask of a client's own secret of SHARE_BYTES."""
    return stream(_derive(secret, context, b"ferret own", PAIR_BYTES), count)


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret of SHARE_BYTES, any `threshold` of which give it back."""
    from Crypto.Protocol.SecretSharing import Shamir

    return [bytes(share) for _, share in Shamir.split(threshold, count, secret, False)]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret of exactly `threshold` shares, each with its place from 0 on."""
    from Crypto.Protocol.SecretSharing import Shamir

    return bytes(Shamir.combine([(place + 1, share) for place, share in shares], False))


def seal(key: bytes, share: bytes) -> bytes:
    """The share encrypted under a key that serves this once."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key).encrypt(bytes(12), share, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """The share. Raises MaskError where it was changed."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(bytes(12), sealed, None)
    except InvalidTag:
        raise MaskError("expected a share as it was encrypted, got one that was changed") from None


def require() -> None:
    """Raises ConfigError unless the libraries are installed."""
    packages = {"cryptography": "cryptography", "Crypto": "pycryptodome"}
    if missing := [package for module, package in packages.items() if find_spec(module) is None]:
        raise ConfigError(
            f"ferret.secure_aggregation: expected {missing[0]} to be installed, got none; in the source "
            "tree, pip install '.[secure]'"
        )


def _derive(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), length, salt, info).derive(secret)
