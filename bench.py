"""Measure One-Time Secrets beside a bare FastAPI echo, in one run on one machine.

    python3 bench.py                 cycles a second and latencies: about two minutes
    python3 bench.py --full          also with a million rows, memory over 100,000 cycles, 64 KiB secrets
    python3 bench.py --markdown      the table as Markdown
    python3 bench.py --url URL       a service that runs already, instead of one of our own

A cycle is two requests. The service stores a secret and reads it back, and each secret that comes back is compared
with the one that went in; the yardstick gets the same text echoed twice. Yardstick and service take turns, both under
uvicorn with the same workers. On another machine only the ratios mean anything.

Needs the packages of requirements-dev.txt: after `python3 local.py test` once, .venv/bin/python has them.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, TypeAlias, cast
from urllib.parse import urlsplit

import asyncpg
import psutil
import uvloop
from cryptography.fernet import Fernet
from fastapi import FastAPI
from pydantic import BaseModel

import local

MEMORY_CYCLES: Final = 100_000
ROWS: Final = 1_000_000
LARGE_BYTES: Final = 64 * 1024

# --- The yardstick ---------------------------------------------------------------------------------------------------

echo = FastAPI()


class Message(BaseModel):
    secret: str


@echo.get("/health")
async def health() -> None:
    pass


@echo.post("/echo")
async def answer(message: Message) -> Message:
    return message


# --- The client ------------------------------------------------------------------------------------------------------
#
# A protocol, not a client library: one callback a response, so that both sides of the comparison get what is left of
# the two cores. A scenario is a generator: it yields a request and is sent (status, body).

Scenario: TypeAlias = Generator[bytes, tuple[bytes, bytes], None]


@dataclass
class Load:
    """What one connection after another adds to. Latencies in seconds."""

    text: str
    stop_at: float
    latencies: list[float] = field(default_factory=list)

    @cached_property
    def document(self) -> bytes:
        return json.dumps({"secret": self.text}, separators=(",", ":")).encode()


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def echo_twice(load: Load) -> Scenario:
    request = post("/echo", load.document)
    while time.perf_counter() < load.stop_at:
        for _ in range(2):
            started = time.perf_counter()
            status, body = yield request
            load.latencies.append(time.perf_counter() - started)
            check(status == b"200" and body == load.document, status)


def create_and_read(load: Load) -> Scenario:
    request = post("/secret", load.document)
    while time.perf_counter() < load.stop_at:
        started = time.perf_counter()
        status, body = yield request
        created = time.perf_counter()
        check(status == b"201", status)
        secret_key = json.loads(body)["secret_key"]
        sent = time.perf_counter()
        status, body = yield f"GET /secret/{secret_key} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        load.latencies += [created - started, time.perf_counter() - sent]
        check(status == b"200" and body.rstrip() == load.document, status)


class WrongAnswerError(Exception):
    """The service answered something else than it should: no figure is worth anything."""


def check(right: bool, status: bytes) -> None:
    if not right:
        raise WrongAnswerError(f"status {status.decode()}")


class Connection(asyncio.Protocol):
    def __init__(self, scenario: Scenario, done: "asyncio.Future[None]") -> None:
        self.scenario, self.done = scenario, done
        self.received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class
        self.transport.write(next(self.scenario))

    def data_received(self, data: bytes) -> None:
        self.received += data
        head = self.received.find(b"\r\n\r\n")
        at = self.received.find(b"content-length: ", 0, head) + 16
        if head < 0 or len(self.received) < head + 4 + int(self.received[at : self.received.find(b"\r", at)]):
            return
        status, body = bytes(self.received[9:12]), bytes(self.received[head + 4 :])
        self.received.clear()
        try:
            self.transport.write(self.scenario.send((status, body)))
        except StopIteration:
            self.transport.close()
        except WrongAnswerError as error:
            self.done.set_exception(error)
            self.transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True)
class Figures:
    cycles: float  # a second
    median_ms: float
    p99_ms: float
    client_cores: float


async def run(scenario: Callable[[Load], Scenario], url: str, connections: int, seconds: float, size: int) -> Figures:
    loop, address = asyncio.get_running_loop(), urlsplit(url)
    load = Load("x" * size, time.perf_counter() + seconds)
    cpu, started = cpu_seconds(), time.perf_counter()
    waiting = [loop.create_future() for _ in range(connections)]
    for done in waiting:
        await loop.create_connection(
            lambda done=done: Connection(scenario(load), done),  # type: ignore[misc]  # mypy cannot type the default
            address.hostname or "127.0.0.1",
            address.port or 80,
        )
    await asyncio.gather(*waiting)
    elapsed = time.perf_counter() - started
    latencies = sorted(load.latencies)
    return Figures(
        cycles=len(latencies) / 2 / elapsed,
        median_ms=latencies[len(latencies) // 2] * 1000,
        p99_ms=latencies[int(len(latencies) * 0.99)] * 1000,
        client_cores=(cpu_seconds() - cpu) / elapsed,
    )


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- What is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where the two sides are, and how long and how hard to press each."""

    yardstick: str
    service: str
    seconds: float
    rounds: int
    connections: int

    def measure(self, side: str, connections: int, size: int, seconds: float | None = None) -> Figures:
        scenario, url = {"echo": (echo_twice, self.yardstick), "secrets": (create_and_read, self.service)}[side]
        return uvloop.run(run(scenario, url, connections, seconds or self.seconds, size))

    def in_turns(self, connections: int, size: int) -> dict[str, list[Figures]]:
        """Alternate, so that whatever else the machine does meets both."""
        figures: dict[str, list[Figures]] = {"echo": [], "secrets": []}
        for number in range(self.rounds):
            for side, seen in figures.items():
                seen.append(self.measure(side, connections, size))
                progress(f"{connections} connections, round {number + 1}: {side} {seen[-1].cycles:,.0f} cycles/s")
        return figures


@dataclass(frozen=True)
class Row:
    what: str
    echo: str
    secrets: str
    ratio: str


def spread(figures: Sequence[Figures], name: str, digits: int) -> tuple[float, str]:
    """The median, and "median (min to max)"."""
    values = [float(getattr(one, name)) for one in figures]
    median = statistics.median(values)
    return median, f"{median:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def compare(what: str, figures: dict[str, list[Figures]], name: str, digits: int) -> Row:
    (echo_median, echo_text), (median, text) = (spread(figures[side], name, digits) for side in ("echo", "secrets"))
    return Row(what, echo_text, text, f"{median / echo_median:.2f}")


def standard(bench: Bench, size: int) -> Iterator[Row]:
    many = bench.in_turns(bench.connections, size)
    yield compare(f"cycles a second, {bench.connections} connections", many, "cycles", 0)
    yield compare("... median latency, ms", many, "median_ms", 2)
    yield compare("... 99th percentile, ms", many, "p99_ms", 2)
    tail = statistics.median(one.p99_ms / one.median_ms for one in many["secrets"])
    yield Row("... 99th percentile / median", "", "", f"{tail:.2f}")
    yield compare("... cores that the client took", many, "client_cores", 2)
    yield compare("median latency of a lone client, ms", bench.in_turns(1, size), "median_ms", 3)


def with_a_million_rows(bench: Bench, stores: local.Stores, size: int) -> Iterator[Row]:
    asyncio.run(fill(stores, 1000))
    few = [bench.measure("secrets", bench.connections, size) for _ in range(bench.rounds)]
    progress(f"filling PostgreSQL with {ROWS:,} secrets and {3 * ROWS:,} log rows")
    asyncio.run(fill(stores, ROWS))
    many = []
    for number in range(bench.rounds):
        many.append(bench.measure("secrets", bench.connections, size))
        progress(f"{ROWS:,} rows, round {number + 1}: {many[-1].cycles:,.0f} cycles/s")
    (few_median, few_text), (many_median, many_text) = (spread(figures, "cycles", 0) for figures in (few, many))
    yield Row(
        f"cycles a second: 1,000 secrets / {ROWS:,} secrets", few_text, many_text, f"{many_median / few_median:.2f}"
    )


async def fill(stores: local.Stores, rows: int) -> None:
    """Unread secrets of 64 characters' size, and three log rows for each."""
    environment = stores.environment
    connection = await asyncpg.connect(
        host=environment["POSTGRES_HOST"], user=environment["POSTGRES_USER"], database=environment["POSTGRES_DB"]
    )
    await connection.execute(f"""
        insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, expires_at)
        select gen_random_uuid(), repeat('x', 184)::bytea, repeat('x', 140)::bytea, min(fingerprint),
               now() + interval '1 day'
        from encryption_keys, generate_series(1, {rows}) as number
        group by number
    """)  # noqa: S608 - a number of our own
    await connection.execute(f"""
        insert into secret_logs (secret_id, action, ip_address, extra_data)
        select gen_random_uuid(), 'created', '192.0.2.1', '{{"user_agent": "bench", "ttl_seconds": 86400}}'
        from generate_series(1, {3 * rows})
    """)  # noqa: S608 - the same
    await connection.execute("vacuum analyze")
    await connection.close()


def memory(bench: Bench, service: local.Service, size: int) -> Iterator[Row]:
    bench.measure("secrets", bench.connections, size, seconds=5)
    before, cycles = worker_megabytes(service), 0.0
    while cycles < MEMORY_CYCLES:
        cycles += bench.measure("secrets", bench.connections, size, seconds=10).cycles * 10
        progress(f"memory: {cycles:,.0f} of {MEMORY_CYCLES:,} cycles")
    after = worker_megabytes(service)
    yield Row(
        f"MB a worker: before / after {cycles:,.0f} cycles", f"{before:.1f}", f"{after:.1f}", f"{after / before:.3f}"
    )


def worker_megabytes(service: local.Service) -> float:
    """Resident memory of the largest worker; with one worker the service's own process is it."""
    process = psutil.Process(service.process.pid)
    return max(one.memory_info().rss for one in process.children() or [process]) / 1e6


def large_secrets(bench: Bench, workers: int) -> Iterator[Row]:
    fernet, text = Fernet(Fernet.generate_key()), b"x" * LARGE_BYTES
    cycles, started = 0, time.perf_counter()
    while time.perf_counter() - started < 2:
        fernet.decrypt(fernet.encrypt(text))
        cycles += 1
    alone = cycles / (time.perf_counter() - started)
    served = [bench.measure("secrets", bench.connections, LARGE_BYTES) for _ in range(bench.rounds)]
    median, _ = spread(served, "cycles", 0)
    yield Row(
        "64 KiB: Fernet alone on a core / cycles a worker",
        f"{alone:,.0f}",
        f"{median / workers:,.0f}",
        f"{median / workers / alone:.2f}",
    )


# --- Running ---------------------------------------------------------------------------------------------------------


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def yardstick(workers: int) -> Iterator[str]:
    port = local.free_port()
    words = ["bench:echo", "--port", str(port), "--workers", str(workers), "--log-level", "warning", "--no-access-log"]
    process = subprocess.Popen([sys.executable, "-m", "uvicorn", *words], cwd=local.HERE)
    url = f"http://127.0.0.1:{port}"
    try:
        local.wait_until(lambda: local.healthy(url), 30, "The yardstick did not start.")
        yield url
    finally:
        local.end(process)


def print_table(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    model = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    print(
        f"\n{os.cpu_count()} cores ({model}), Python {sys.version.split()[0]}, {arguments.workers} workers,\n"
        f"{arguments.size}-character secrets, {arguments.rounds} rounds of {arguments.seconds:g} s; "
        "median (min to max)\n"
    )
    cells = [("", "FastAPI echo", "One-Time Secrets", "ratio"), *((r.what, r.echo, r.secrets, r.ratio) for r in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    for number, row in enumerate(cells):
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"| {' | '.join(padded)} |" if arguments.markdown else "  ".join(padded))
        if arguments.markdown and number == 0:
            print(f"|{'|'.join('-' * (width + 2) for width in widths)}|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="length of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="characters of a secret")
    parser.add_argument("--url", help="a service that runs already; it needs CREATE_QUOTA_KIB_PER_MINUTE=0")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing that was started is left running
    rows: list[Row] = []
    with ExitStack() as stack:
        yardstick_url = stack.enter_context(yardstick(arguments.workers))
        url, stores, service = arguments.url, None, None
        if url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
            stores = stack.enter_context(local.stores(folder))
            environment = {
                **stores.environment,
                "ENCRYPTION_KEY_FILE": str(folder / "encryption_key"),
                "WORKERS": str(arguments.workers),
                "PORT": str(local.free_port()),
                "CREATE_QUOTA_KIB_PER_MINUTE": "0",  # all of this comes from one address
            }
            service = stack.enter_context(local.service(environment))
            url = service.url
        bench = Bench(yardstick_url, url, arguments.seconds, arguments.rounds, arguments.connections)
        rows += standard(bench, arguments.size)
        if arguments.full:
            rows += large_secrets(bench, arguments.workers)
            if stores and service:
                rows += memory(bench, service, arguments.size)
                rows += with_a_million_rows(bench, stores, arguments.size)
    print_table(rows, arguments)


if __name__ == "__main__":
    main()
