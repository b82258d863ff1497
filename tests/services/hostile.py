"""Malformed and hostile messages for every method of the coordinator, and for both of its ports.

What a seed makes is always the same. Valid messages are made from the contract's descriptors, so
that a new field is attacked without a change here.

Not covered: sending them (`fuzz.py`).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from switokd.v1 import coordinator_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["CoordinatorService"]
METHODS = {method.name: method for method in SERVICE.methods}
INTEGERS = (0, 1, 2, 3, 7, -1, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63))
DOUBLES = (0.0, -0.0, 1.0, 2.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", "a", "b", "s", "switokd", "threshold", "dml", "kd", "paper", "published", "{}"),
    *(
        '{"delta": 0.5}',
        '{"delta": NaN}',
        "[" * 2000,
        "os:system",
        "builtins:eval",
        "no.such:thing",
    ),
    *("\n\x1b[31mred\x00", "{x}%s%(y)d", "../../etc/passwd", "ü" * 300, "'; DROP TABLE runs; --"),
)
HEADERS = (
    *("Host: a", "Accept-Encoding: gzip", "X: " + "y" * 3000, "Content-Length: -5", "\x00: \xff"),
    *("Content-Length: 99999999999", "Transfer-Encoding: chunked", "no colon"),
    *("Connection: keep-alive", "Expect: 100-continue"),
)
HUGE = 3_000_000
"""Characters of the longest texts."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Hostile:
    """Makes messages from a seed. run_id: the run that must not suffer, whose id is no secret."""

    def __init__(self, seed: int | str, run_id: str) -> None:
        self.rng = random.Random(seed)
        self._texts = (*TEXTS, run_id, run_id)

    def message(self, kind: type[Message], depth: int = 0) -> Message:
        """A message whose fields have the types of the contract, and any values."""
        message, rng = kind(), self.rng
        for field in kind.DESCRIPTOR.fields:
            if rng.random() < (0.25 if depth < 4 else 0.8):
                continue
            if field.type == Field.TYPE_MESSAGE:
                self._nest(message, field, depth)
            elif _is_repeated(field):
                count = rng.choice((0, 1, 1, 2, 3, 5, 300 if rng.random() < 0.02 else 4))
                getattr(message, field.name).extend(self._value(field) for _ in range(count))
            else:
                setattr(message, field.name, self._value(field))
        return message

    def _nest(self, message: Message, field: Any, depth: int) -> None:
        if depth > 5:
            return
        parts = getattr(message, field.name)
        if not _is_repeated(field):
            parts.CopyFrom(self.message(type(parts), depth + 1))
            return
        for _ in range(60 if self.rng.random() < 0.02 else self.rng.choice((0, 1, 2, 3))):
            part = parts.add()
            part.CopyFrom(self.message(type(part), depth + 1))

    def _value(self, field: Any) -> object:
        rng = self.rng
        if field.type == Field.TYPE_STRING:
            return "x" * HUGE if rng.random() < 0.0003 else rng.choice(self._texts)
        if field.type == Field.TYPE_BYTES:
            return rng.choice((b"", b"secret", rng.randbytes(16), rng.randbytes(32)))
        if field.type == Field.TYPE_BOOL:
            return rng.random() < 0.5
        if field.type in (Field.TYPE_DOUBLE, Field.TYPE_FLOAT):
            return rng.choice((*DOUBLES, rng.uniform(0, 2)))
        if field.type == Field.TYPE_ENUM:
            return rng.choice((0, 1, 2, 3, -1, 2**31 - 1))
        value = rng.choice(INTEGERS)
        if field.type == Field.TYPE_INT32:
            return max(min(value, 2**31 - 1), -(2**31))
        return value

    def plausible(self, name: str) -> Message:
        """A request that is nearly right: it passes the first checks."""
        rng = self.rng
        run_id = rng.choice((f"hostile-{rng.randrange(40)}", *self._texts))
        if name == "Join":
            request = pb.JoinRequest(run_id=run_id, plan=self.plan())
            request.rank = rng.choice((0, 1, 2, -1))
            request.secret = rng.choice((b"", rng.randbytes(16)))
            request.epoch = rng.choice((0, 1, 2, 9))
            return request
        train = self._event()
        if rng.random() < 0.4:
            train.attach.run_id, train.attach.rank = run_id, rng.choice((0, 1, 2))
        return train

    def _event(self) -> pb.TrainRequest:
        """A message of a stream with one event, whose fields are anything."""
        request = pb.TrainRequest()
        field = self.rng.choice(pb.TrainRequest.DESCRIPTOR.fields)
        self._nest(request, field, 0)
        return request

    def rank(self, run_id: str, rank: int, secret: bytes) -> list[bytes]:
        """The messages of a rank that joins a run of its own, and then misbehaves."""
        rng = self.rng
        attach = pb.Attach(run_id=run_id, rank=rank, epoch=1, secret=secret, client=f"{rank}")
        requests = [pb.TrainRequest(attach=attach)]
        step = 1
        for _ in range(rng.randrange(1, 25)):
            if rng.random() < 0.4:
                requests.append(self._event())
                continue
            report = pb.Report(step=step if rng.random() < 0.97 else rng.choice(INTEGERS))
            for teacher in ("a", "b")[rank : rank + 1]:
                e_s, e_t = rng.uniform(0, 2), rng.uniform(0, 2)
                sums = report.pairs.add(teacher=teacher, student="s", e_s=e_s, e_t=e_t, n=1)
                sums.gap = rng.choice((e_s, e_s, e_s, *DOUBLES))
                sums.delta_scale = rng.choice((0.0, 0.0, 1.0, *DOUBLES))
            step += 1
            requests.append(pb.TrainRequest(report=report))
        return [request.SerializeToString() for request in requests]

    def plan(self) -> pb.RunPlan:
        """A plan that a run could follow, or that misses it by little."""
        rng = self.rng
        count = rng.choice((1, 2, 3, 3, 3, 30))
        roles = [pb.ROLE_TEACHER] * (count - 1) + [pb.ROLE_STUDENT]
        networks = [
            pb.Network(
                name=rng.choice(("abcdefgh"[i % 8] + str(i // 8), "a")), role=role, ranks=[i]
            )
            for i, role in enumerate(roles)
        ]
        if rng.random() < 0.3:
            networks[rng.randrange(count)].CopyFrom(self.message(pb.Network))  # type: ignore[arg-type]
        timeout = rng.choice((60.0, 0.01, 1e300, *DOUBLES))
        strategy = rng.choice(("switokd", "threshold", *TEXTS))
        return pb.RunPlan(
            networks=networks,
            strategy=strategy,
            round_timeout_seconds=timeout,
            strategy_kwargs=rng.choice(("", '{"delta": 0.5}', "{", "[1]", '{"delta": 1e999}')),
            semantics=rng.choice(("", "paper", "published", "x")),
            first_step=rng.choice((0, 1, 1, *INTEGERS)),
        )

    def serialized(self, name: str) -> bytes:
        """A request of a method as bytes: right, nearly right, mutilated, or random."""
        rng = self.rng
        kind: type[Message] = METHODS[name].input_type._concrete_class  # type: ignore[attr-defined]
        if rng.random() < 0.15:
            return rng.randbytes(rng.choice((0, 1, 5, 40, 400)))
        if name in ("Join", "Train") and rng.random() < 0.5:
            content = self.plausible(name).SerializeToString()
        else:
            content = self.message(kind).SerializeToString()
        return self._mutilated(content) if rng.random() < 0.3 else content

    def _mutilated(self, content: bytes) -> bytes:
        rng, changed = self.rng, bytearray(content[:10_000])
        for _ in range(rng.randrange(1, 6)):
            if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        cut = rng.randrange(len(changed) + 1)
        return bytes(changed[:cut] if rng.random() < 0.4 else changed)

    def raw(self) -> list[bytes]:
        """What to write to a TCP port, piece by piece: frames of HTTP/2, HTTP/1, or garbage."""
        rng = self.rng
        makers: tuple[Callable[[], list[bytes]], ...] = (self._frames, self._frames, self._http)
        if rng.random() < 0.25:
            return [
                rng.randbytes(rng.choice((1, 9, 100, 4000))) for _ in range(rng.randrange(1, 6))
            ]
        return rng.choice(makers)()

    def _frames(self) -> list[bytes]:
        rng = self.rng
        pieces = [PREFACE if rng.random() < 0.9 else PREFACE[: rng.randrange(24)], _frame(4, 0, 0)]
        for _ in range(rng.randrange(1, 25)):
            kind, flags = rng.randrange(12), rng.choice((0, 1, 4, 5, 8, 0x20, 0xFF))
            stream = rng.choice((0, 1, 1, 3, 5, 2, 2**31 - 1))
            body = rng.randbytes(rng.choice((0, 4, 5, 6, 8, 9, 60, 3000)))
            if kind == 1 and rng.random() < 0.7:
                body = _headers(rng)
            if kind == 0 and rng.random() < 0.7:  # the prefix of a gRPC message, mostly a lie
                length = rng.choice((0, 3, 2**31, 2**32 - 1, len(body)))
                body = struct.pack(">BI", rng.choice((0, 1, 7)), length) + body
            frame = _frame(kind, flags, stream, body)
            if rng.random() < 0.1:  # a length that is none
                frame = struct.pack(">I", rng.randrange(2**24))[1:] + frame[3:]
            pieces.append(frame)
        return pieces

    def _http(self) -> list[bytes]:
        rng = self.rng
        method = rng.choice(("GET", "GET", "POST", "HEAD", "BREW", "", "G" * 5000))
        path = rng.choice(("/metrics", "/healthz", "/", "/" + "x" * 9000, "/%00", "http://h/", "*"))
        version = rng.choice(("HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/9", ""))
        headers = rng.choices(HEADERS, k=rng.choice((0, 1, 3, 150)))
        text = "\r\n".join([f"{method} {path} {version}", *headers, "", ""])
        pieces = [text.encode("latin-1")]
        if rng.random() < 0.3:
            pieces = [pieces[0][: rng.randrange(len(pieces[0]) + 1)], rng.randbytes(30)]
        return pieces


def _is_repeated(field: Any) -> bool:
    return bool(getattr(field, "is_repeated", False) or getattr(field, "label", 1) == 3)


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """A frame of HTTP/2: length, type, flags, stream, body."""
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def _headers(rng: random.Random) -> bytes:
    """A block of headers (HPACK without compression) of a gRPC call, with wrong parts."""
    path = rng.choice([f"/{SERVICE.full_name}/{name}" for name in METHODS] + ["/x", ""])
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "a")]
    fields += [("te", "trailers"), ("content-type", "application/grpc")]
    fields += [("grpc-timeout", rng.choice(("1S", "-1S", "99999999999H", "x")))]
    fields += [("grpc-encoding", rng.choice(("gzip", "identity", "nonsense")))]
    if rng.random() < 0.4:
        rng.shuffle(fields)
        fields = fields[rng.randrange(3) :]
    return b"".join(b"\0" + _literal(name) + _literal(value) for name, value in fields)


def _literal(text: str) -> bytes:
    return bytes([len(text) % 127]) + text.encode()
