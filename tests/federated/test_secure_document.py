"""The committed messages of a masked round, unmasked by what docs/wire.md says and other implementations."""

from __future__ import annotations

from typing import Any

import gallery
import numpy as np
import pytest
from circle import seeded
from test_wire_document import MESSAGES, read

pytest.importorskip("Crypto", reason="PyCryptodome is not installed (pip install '.[secure]')")

from Crypto.Cipher import AES, ChaCha20
from Crypto.Hash import SHA256
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF

SECURE = "ferret-secure"
INVITATION = read(MESSAGES[SECURE, "request-update"])
CONTEXT = INVITATION[0][2] + (1).to_bytes(4, "little") + INVITATION[1]["session"]


def rows(values: dict[str, Any], name: str) -> list[bytes]:
    _, (count, length), data = values[name]
    return [data[length * row : length * (row + 1)] for row in range(count)]


KEYS = rows(INVITATION[1], "keys")
PRIVATE = [seeded(1000 + client)(32) for client in range(3)]  # each participant's first random bytes


def pair(one: int, other: int) -> tuple[bytes, bytes]:
    """The seed that two clients share, and the key by which `one` encrypts for `other`."""
    secret = key_agreement(
        static_priv=import_x25519_private_key(PRIVATE[one]),
        static_pub=import_x25519_public_key(KEYS[other]),
        kdf=lambda shared: shared,
    )
    both = b"".join(sorted([KEYS[one], KEYS[other]]))
    made = HKDF(secret, 96, CONTEXT + both, SHA256, context=b"ferret pair")
    return made[:32], made[32:64] if KEYS[one] < KEYS[other] else made[64:]


def stream(seed: bytes, count: int) -> Any:
    return np.frombuffer(ChaCha20.new(key=seed, nonce=bytes(8)).encrypt(bytes(4 * count)), "<u4")


def times(one: int, other: int) -> int:
    """In GF(2^128) modulo 1 + x + x^2 + x^7 + x^128."""
    product = 0
    for bit in range(other.bit_length()):
        product ^= (one << bit) * (other >> bit & 1)
    for bit in range(product.bit_length() - 1, 127, -1):
        product ^= (2**128 + 135 << bit - 128) * (product >> bit & 1)
    return product


def inverse(one: int) -> int:
    """one^(2^128 - 2)."""
    power, result = one, 1
    for _ in range(127):
        power = times(power, power)
        result = times(result, power)
    return result


def secret_of(shares: dict[int, bytes]) -> bytes:
    """The polynomial through the shares, at 0."""
    total = 0
    for x, share in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                weight = times(weight, times(other, inverse(x ^ other)))
        total ^= times(weight, int.from_bytes(share, "big"))
    return total.to_bytes(16, "big")


def test_the_keys_are_those_of_x25519() -> None:
    for private, public in zip(PRIVATE, KEYS, strict=True):
        assert import_x25519_private_key(private).public_key().export_key(format="raw") == public


@pytest.mark.parametrize("client", [0, 1, 2])
def test_a_committed_update_is_its_integers_and_the_masks_of_the_document(client: int) -> None:
    values = read(gallery.update(gallery.serve(SECURE), client))[1]
    if client == 0:
        assert read(MESSAGES[SECURE, "update"])[1] == values
    others = [other for other in range(3) if other != client]
    shares = {}
    for other in others[:1]:
        sealed = rows(values, "sealed")[other]
        cipher = AES.new(pair(client, other)[1], AES.MODE_GCM, nonce=bytes(12))
        shares[other + 1] = cipher.decrypt_and_verify(sealed[:16], sealed[16:])
    shares[client + 1] = gallery.masked_round(1, 40).circle.participants[client]._session.share  # type: ignore[union-attr]
    secret = secret_of(shares)
    assert rows(values, "sealed")[client] == bytes(32)
    words = np.frombuffer(values["masked"][2], "<u4")
    words = words - stream(HKDF(secret, 32, CONTEXT, SHA256, context=b"ferret own"), 40)
    for other in others:
        mask = stream(pair(client, other)[0], 40)
        words = words - mask if other > client else words + mask
    expected = (8 * gallery.eighths(40, client)).astype(np.int64) << 24
    assert words.view(np.int32).tolist() == expected.tolist()


def test_committed_answers_open_what_was_asked_for() -> None:
    """Client 1's seed with client 2, who is missing, and its shares of those who are not."""
    assert rows(read(MESSAGES[SECURE, "answer-pairs"])[1], "seeds") == [pair(1, 2)[0]]
    shares = rows(read(MESSAGES[SECURE, "answer-shares"])[1], "shares")
    sealed = rows(read(MESSAGES[SECURE, "update"])[1], "sealed")[1]  # client 0's, for client 1
    cipher = AES.new(pair(0, 1)[1], AES.MODE_GCM, nonce=bytes(12))
    assert shares[0] == cipher.decrypt_and_verify(sealed[:16], sealed[16:])
