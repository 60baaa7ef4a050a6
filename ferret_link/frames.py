"""Frames on a Unix domain socket: u32 length (little-endian), then msgpack of one map from names to values.

Values are integers, floats, text, bytes and lists of these, as in a ConfigRecord of Flower. Updates and
broadcasts stand in them as the bytes of the wire format (docs/wire.md), of which nothing here knows. A length
is believed as far as its bytes arrive.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from pathlib import Path
from typing import IO

import msgpack  # type: ignore[import-untyped]

Scalar = int | float | str | bytes
Frame = dict[str, Scalar | list[Scalar]]

LARGEST_FRAME = 2**32 - 1  # bytes
PIECE = 1 << 20  # bytes that are asked of a socket at once
LONGEST_PATH = 107  # bytes of a socket's path, as Linux has it
_LENGTH = struct.Struct("<I")
PREFIX = _LENGTH.size  # bytes of a length
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class FrameError(ValueError):
    """Bytes that are not a frame, or a frame that is too large."""


class SocketError(OSError):
    """A socket, or the folder of one, that is not its user's alone."""


def encode(frame: Frame, limit: int = LARGEST_FRAME) -> bytes:
    """The frame as bytes, with its length. Raises FrameError."""
    try:
        body: bytes = msgpack.packb(frame)
    except (ValueError, TypeError, OverflowError) as error:
        raise FrameError(f"frame: a value does not fit: {error}") from None
    if len(body) > limit:
        raise FrameError(f"frame: must have at most {limit} bytes, got {len(body)}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Frame:
    """The frame in these bytes, which come without their length. Raises FrameError."""
    try:
        frame = msgpack.unpackb(body)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise FrameError(f"frame: must be msgpack: {type(error).__name__} {error!s:.200}") from None
    if not isinstance(frame, dict) or not all(isinstance(name, str) for name in frame):
        raise FrameError(f"frame: must be a map from names to values, got {type(frame).__name__}")
    for name, value in frame.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, Scalar) for item in items):
            raise FrameError(f"frame: {name[:64]!r} must be plain values or a list of them")
    return frame


def send(connection: socket.socket, frame: Frame, limit: int = LARGEST_FRAME) -> None:
    """Sends one frame. Raises FrameError and OSError."""
    connection.sendall(encode(frame, limit))


def receive(connection: socket.socket, limit: int = LARGEST_FRAME) -> Frame | None:
    """The next frame; None where the other side has closed. Raises FrameError and OSError."""
    prefix = _read(connection, _LENGTH.size)
    if not prefix:
        return None
    if len(prefix) < _LENGTH.size:
        raise FrameError(f"frame: its length is cut off after {len(prefix)} bytes")
    (length,) = _LENGTH.unpack(prefix)
    if length > limit:
        raise FrameError(f"frame: must have at most {limit} bytes, got {length}")
    body = _read(connection, length)
    if len(body) < length:
        raise FrameError(f"frame: {length} bytes were announced, {len(body)} came")
    return decode(bytes(body))


def _read(connection: socket.socket, size: int) -> bytearray:
    """So many bytes, or fewer if the other side closes; memory grows with what has arrived."""
    held = bytearray()
    while len(held) < size:
        piece = connection.recv(min(PIECE, size - len(held)))
        if not piece:
            break
        held += piece
    return held


# ---- sockets that are their user's alone ----


def check_folder(folder: Path) -> None:
    """Raises SocketError unless the folder is this user's and closed to everybody else."""
    about = folder.stat()
    if about.st_uid != os.getuid():
        raise SocketError(f"socket: {folder} must belong to user {os.getuid()}, got {about.st_uid}")
    if about.st_mode & 0o077:
        got = stat.S_IMODE(about.st_mode)
        raise SocketError(f"socket: {folder} must be closed to others (chmod 700), got {got:04o}")


class Listener:
    """A listening socket at `path`, in place of one that a dead process has left. A context manager.

    Its folder is made, with mode 0700, where there is none; the socket has mode 0600. A locked file beside it
    tells others that its process lives.
    """

    def __init__(self, path: Path) -> None:
        """Raises SocketError where the folder is open to others, something else is in the way, or another
        process listens."""
        check_path(path)
        if not path.parent.exists():
            path.parent.mkdir(parents=True, mode=0o700)
            path.parent.chmod(0o700)  # whatever the umask is
        check_folder(path.parent)
        self._path = path
        self._lock = _locked(path)
        if path.is_symlink() or (path.exists() and not path.is_socket()):
            raise SocketError(f"socket: {path} is in the way, and no socket")
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(before)
        self._socket.listen()

    def accept(self) -> socket.socket:
        """The next connection of this user; those of others are closed unheard."""
        while True:
            connection, _ = self._socket.accept()
            try:
                check_peer(connection)
            except OSError:
                connection.close()
                continue
            return connection

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        self._socket.close()
        self._lock.close()


def _locked(path: Path) -> IO[bytes]:
    """The file that the listener's process holds a lock on as long as it lives."""
    file = path.with_name(f"{path.name}.lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SocketError(f"socket: another worker listens at {path}") from None
    return file


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """A connection to the worker that listens at `path`. Raises SocketError where that is another user's, and
    OSError where there is none."""
    check_path(path)
    check_folder(path.parent)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(str(path))
        check_peer(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def check_peer(connection: socket.socket) -> None:
    """Raises SocketError unless the process at the other end runs as this user."""
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(said)
    if uid != os.getuid():
        raise SocketError(f"socket: expected a peer of user {os.getuid()}, got one of user {uid}")


def check_path(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > LONGEST_PATH:
        raise SocketError(f"socket: expected a path of at most {LONGEST_PATH} bytes, got {size}: {path}")
