"""Frames on a Unix domain socket, and who may talk at one."""

from __future__ import annotations

import math
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferret_link import frames
from ferret_link.frames import FrameError, Listener, SocketError

SCALARS = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=20), st.binary(max_size=50)
)
FRAMES = st.dictionaries(st.text(max_size=10), SCALARS | st.lists(SCALARS, max_size=4), max_size=6)


def over_a_socket(data: bytes, limit: int = frames.LARGEST_FRAME) -> Any:
    """What `receive` makes of these bytes, after which the other side closes."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            sender = threading.Thread(target=theirs.sendall, args=(data,))
            sender.start()
            if len(data) > 100_000:  # more than a socket holds: somebody must read meanwhile
                return frames.receive(ours, limit)
            sender.join()
        return frames.receive(ours, limit)


@given(FRAMES)
def test_a_frame_arrives_as_it_was_sent(frame: frames.Frame) -> None:
    assert over_a_socket(frames.encode(frame)) == frame


def test_a_frame_is_its_length_and_msgpack() -> None:
    frame: frames.Frame = {"kind": "hello", "seen": 3}
    body = msgpack.packb(frame)
    assert frames.encode(frame) == struct.pack("<I", len(body)) + body


def test_large_frames_and_several_on_one_connection() -> None:
    frame: frames.Frame = {"payload": os.urandom(3_000_000), "loss": math.inf}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=lambda: [frames.send(theirs, frame) for _ in range(3)])
        thread.start()
        assert [frames.receive(ours) for _ in range(3)] == [frame] * 3
        thread.join()


def test_nothing_is_the_end() -> None:
    assert over_a_socket(b"") is None


@given(FRAMES.filter(bool), st.data())
def test_a_frame_that_is_cut_off_is_refused(frame: frames.Frame, data: st.DataObject) -> None:
    whole = frames.encode(frame)
    with pytest.raises(FrameError, match=r"cut off|announced"):
        over_a_socket(whole[: data.draw(st.integers(1, len(whole) - 1))])


@given(st.binary(max_size=60))
def test_any_bytes_give_a_frame_or_a_frame_error(body: bytes) -> None:
    with suppress(FrameError):
        frame = over_a_socket(struct.pack("<I", len(body)) + body)
        assert all(isinstance(name, str) for name in frame)


def test_a_length_that_lies_takes_no_memory() -> None:
    """4 GB are announced and 10 bytes come."""
    program = (
        "import resource, socket\n"
        "from ferret_link import frames\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))\n"
        "ours, theirs = socket.socketpair()\n"
        "theirs.sendall(b'\\xff\\xff\\xff\\xff' + bytes(10)); theirs.close()\n"
        "try: frames.receive(ours)\n"
        "except frames.FrameError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "frame: 4294967295 bytes were announced, 10 came\n"


def test_frames_beyond_the_limit_are_neither_sent_nor_read() -> None:
    frame: frames.Frame = {"payload": bytes(1000)}
    with pytest.raises(FrameError, match="must have at most 100 bytes, got 1012"):
        frames.encode(frame, limit=100)
    with pytest.raises(FrameError, match="must have at most 100 bytes, got 1012"):
        over_a_socket(frames.encode(frame), limit=100)


@pytest.mark.parametrize("value", [{"a": 1}, None, [[1]], object(), 2**64])
def test_values_that_no_frame_has_are_refused(value: Any) -> None:
    with pytest.raises(FrameError):
        frames.decode(frames.encode({"value": value})[4:])


def test_nothing_of_it_imports_torch(tmp_path: Path) -> None:
    program = "import sys, ferret_link.frames; print('torch' in sys.modules, 'ferret_ext' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


# ---- permissions ----


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_and_socket_are_their_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "socket"
    before = os.umask(0)
    try:
        with Listener(path):
            assert mode(path.parent) == 0o700
            assert mode(path) == 0o600
    finally:
        os.umask(before)
    assert not path.exists()


@pytest.mark.parametrize("bits", [0o755, 0o701, 0o770])
def test_a_folder_that_is_open_to_others_is_refused(tmp_path: Path, bits: int) -> None:
    tmp_path.chmod(bits)
    for use in (Listener, frames.connect):
        with pytest.raises(SocketError, match=f"must be closed to others .chmod 700., got {bits:04o}"):
            use(tmp_path / "socket")


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(SocketError, match=f"must belong to user {owner + 1}, got {owner}"):
        Listener(tmp_path / "socket")


def test_another_users_process_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides look at who is at the other end."""
    tmp_path.chmod(0o700)
    owner = os.getuid()
    with Listener(tmp_path / "socket") as listener:
        connection = frames.connect(tmp_path / "socket", timeout=60)
        accepted = listener.accept()
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
        for end in (connection, accepted):
            with pytest.raises(SocketError, match=f"a peer of user {owner + 1}, got one of user {owner}"):
                frames.check_peer(end)
            end.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run a process as somebody else")
def test_no_other_user_gets_to_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "socket"
    with Listener(path):
        process = os.fork()
        if process == 0:
            os.seteuid(65534)
            try:
                socket.socket(socket.AF_UNIX).connect(str(path))
            except PermissionError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_a_dead_workers_socket_is_replaced_and_a_living_ones_is_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with Listener(path):
        with pytest.raises(SocketError, match="another worker listens at"):
            Listener(path)
        frames.connect(path, timeout=60).close()
    with pytest.raises(FileNotFoundError):
        frames.connect(path, timeout=60)


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "socket").write_text("precious")
    with pytest.raises(SocketError, match="is in the way, and no socket"):
        Listener(tmp_path / "socket")
    assert (tmp_path / "socket").read_text() == "precious"


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SocketError, match="a path of at most 107 bytes, got"):
        Listener(tmp_path / ("x" * 108))
