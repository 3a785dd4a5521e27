"""Frames over a private Unix socket, with descriptors beside them.

SOCK_SEQPACKET where the fork server is used: one frame is one hand-off, and the kernel gives each to exactly one
reader, so the parent can take unread ones back. A stream socket with a length prefix elsewhere.

`recvmsg_into` into kept buffers: a large buffer allocated per read costs more than the read, and plain reads drop
descriptors silently. `MSG_DONTWAIT` instead of O_NONBLOCK, which dup'ed descriptors would share.

A frame is a msgpack array of messages, each an array whose first element is its operation.
May import the standard library and msgspec only: workers load it.
"""

from __future__ import annotations

import array
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

MAX_FRAME: Final = 128 * 1024
MAX_MESSAGE: Final = 96 * 1024  #: a longer message travels as a value in shared memory
MAX_FDS: Final = 64
ROOM: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
# Plain ints: combining the flags of the socket module costs a microsecond each time.
MSG_DONTWAIT: Final = int(getattr(socket, "MSG_DONTWAIT", 0))
MSG_CMSG_CLOEXEC: Final = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_WAIT: Final = MSG_CMSG_CLOEXEC
_DONT_WAIT: Final = MSG_CMSG_CLOEXEC | MSG_DONTWAIT
_NO_FDS: Final[list[int]] = []  # of the frames that carry none: nobody adds to it
_PREFIX: Final = struct.Struct("=IH")  # length, number of descriptors

# parent -> worker
TASK, SHIP, MAIN, SEGMENTS, FREE, FORGET, BYE, BIG, GO_ON = range(9)
# worker -> parent
READY, DONE, PART, FAILED, NOTE, RELEASED, RETURNED = range(16, 23)
MUTE: Final = 70  #: exit status of a worker whose end of the channel is gone


#: one message, or a frame of several, as bytes; raises what msgspec raises on values that are not msgpack-able
encode_message: Final = msgspec.msgpack.Encoder().encode
#: the messages of a frame, or the parts of a message
decode_frame: Final[Callable[[Any], list[Any]]] = msgspec.msgpack.Decoder(list[Any]).decode
decode_message: Final = decode_frame


def join(messages: Sequence[bytes]) -> bytes:
    """A frame of up to 65,535 encoded messages."""
    count = len(messages)
    if count < 16:
        return bytes((0x90 | count,)) + b"".join(messages)
    return b"\xdc" + count.to_bytes(2, "big") + b"".join(messages)


class Closed(Exception):
    """The other side is gone."""


class SeqChannel:
    """One end of a SOCK_SEQPACKET pair."""

    __slots__ = ("_buffer", "_buffers", "_view", "sock")
    can_take_back: Final = True
    tells_of_all: Final = True  #: the descriptor is readable as long as there is a frame

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray(MAX_FRAME + 4096)
        self._buffers = [self._buffer]
        self._view = memoryview(self._buffer)

    def fileno(self) -> int:
        """The socket's descriptor; -1 once closed."""
        return self.sock.fileno()

    def send(self, frame: bytes, fds: Sequence[int] = (), *, wait: bool = False) -> bool:
        """Send one frame; False if the socket is full and `wait` is not set. Raises Closed."""
        flags = 0 if wait else MSG_DONTWAIT
        try:
            if fds:
                self.sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], flags)
            else:
                self.sock.send(frame, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Closed(str(error)) from error
        return True

    def receive(self, *, wait: bool = False) -> tuple[memoryview, list[int]] | None:
        """The next frame (valid until the next call) and its descriptors; None if there is none. Raises Closed."""
        try:
            size, ancillary, _, _ = self.sock.recvmsg_into(self._buffers, ROOM, _WAIT if wait else _DONT_WAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Closed(str(error)) from error
        if not size:
            raise Closed("end of file")
        if not ancillary:
            return self._view[:size], _NO_FDS
        return self._view[:size], unpack_fds(ancillary)

    def close(self) -> None:
        """Give the descriptor back."""
        self.sock.close()


class StreamChannel:
    """One end of a stream pair: frames with a length prefix. Unread frames cannot be taken back."""

    __slots__ = ("_data", "_fds", "_pending", "_read", "sock")
    can_take_back: Final = False
    tells_of_all: Final = False  #: frames may have been read together with the one before

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._read = bytearray(MAX_FRAME + 4096)
        self._data = bytearray()
        self._fds: deque[int] = deque()
        self._pending = b""

    def fileno(self) -> int:
        """The socket's descriptor; -1 once closed."""
        return self.sock.fileno()

    def send(self, frame: bytes, fds: Sequence[int] = (), *, wait: bool = False) -> bool:
        """Send one frame; False if nothing of it could be sent (or of an earlier one's rest) and `wait` is not set."""
        flags = 0 if wait else MSG_DONTWAIT
        try:
            while self._pending:
                self._pending = self._pending[self.sock.send(self._pending, flags) :]
            data = _PREFIX.pack(len(frame), len(fds)) + frame
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sent = self.sock.sendmsg([data], ancillary, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Closed(str(error)) from error
        self._pending = data[sent:]
        return self.flush(wait=wait) or True

    def flush(self, *, wait: bool = False) -> bool:
        """Send the rest of a frame that fitted in part. True when nothing is left."""
        try:
            while self._pending:
                self._pending = self._pending[self.sock.send(self._pending, 0 if wait else MSG_DONTWAIT) :]
        except BlockingIOError:
            return False
        except OSError as error:
            raise Closed(str(error)) from error
        return True

    def receive(self, *, wait: bool = False) -> tuple[memoryview, list[int]] | None:
        """The next frame and its descriptors; None if none is complete and `wait` is not set. Raises Closed."""
        while True:
            if len(self._data) >= _PREFIX.size:
                size, count = _PREFIX.unpack_from(self._data)
                end = _PREFIX.size + size
                if len(self._data) >= end:
                    frame = bytes(self._data[_PREFIX.size : end])
                    del self._data[:end]
                    return memoryview(frame), [self._fds.popleft() for _ in range(count)]
            try:
                got, ancillary, _, _ = self.sock.recvmsg_into([self._read], ROOM, _WAIT if wait else _DONT_WAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                raise Closed(str(error)) from error
            if not got:
                raise Closed("end of file")
            self._data += memoryview(self._read)[:got]
            if ancillary:
                self._fds.extend(unpack_fds(ancillary))

    def close(self) -> None:
        """Give the descriptor back."""
        self.sock.close()


Channel = SeqChannel | StreamChannel


def unpack_fds(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what `recvmsg` returned beside the data."""
    found: list[int] = []
    for level, kind, packed in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(packed[: len(packed) - len(packed) % fds.itemsize])
            found.extend(fds)
    return found
