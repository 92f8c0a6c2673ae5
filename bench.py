"""Measure One-Time Secrets beside a bare FastAPI echo, in one run on one machine.

    python3 bench.py           cycles a second and latencies at 1, 16 and 64 connections: 2 minutes
    python3 bench.py --full    also 64 KiB secrets, memory, and growth: 10 million unread secrets

A cycle is two requests: a secret is stored and read back, or echoed twice. What comes back is
compared with what went in. The two take turns of a second, both under uvicorn with the same
workers. The quota is counted, and never reached. On another machine only the ratios mean anything.
After `python3 local.py test` once, .venv/bin/python has all packages.
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, cast

import asyncpg
import psutil
import uvloop
from cryptography.fernet import Fernet
from fastapi import FastAPI
from pydantic import BaseModel

import local

ROW: Final = "| {:<50} | {:>24} | {:>24} | {:>5} |"  # of a Markdown table
OVERDUE_ROWS: Final = 50_000  # secrets, and as many log rows, that the cleanup finds at a start

# --- The client -----------------------------------------------------------------------------------
# One callback a response, so that the servers get most of the two cores.


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read(stored: bytes) -> bytes:
    secret_key = json.loads(stored)["secret_key"]
    return f"GET /secret/{secret_key} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@dataclass(frozen=True)
class Side:
    name: str
    port: int
    path: str  # of a cycle's first request ...
    second: Callable[[bytes], bytes]  # ... and what makes the second one from its answer


@dataclass
class Connection(asyncio.Protocol):
    side: Side
    document: bytes
    stop_at: float
    latencies: tuple[list[float], list[float]]  # of first and of second requests, seconds
    done: "asyncio.Future[None]" = field(default_factory=asyncio.Future)
    received: bytes = b""
    is_second: bool = False  # what the request on its way is

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class
        self.send(post(self.side.path, self.document))

    def send(self, request: bytes) -> None:
        self.received = b""
        self.sent_at = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.received += data
        head, _, body = self.received.partition(b"\r\n\r\n")
        length = head.partition(b"content-length: ")[2].partition(b"\r")[0]
        if not length or len(body) < int(length):
            return
        self.latencies[self.is_second].append(now - self.sent_at)
        right = body.rstrip() == self.document if self.is_second else head[9:12] in (b"200", b"201")
        if right and not (self.is_second and now > self.stop_at):
            self.is_second = not self.is_second
            if self.is_second:
                self.send(self.side.second(body))
            else:
                self.send(post(self.side.path, self.document))
            return
        if right:
            self.done.set_result(None)
        self.transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            last = f"The last answer: {self.received[:500]!r}"
            self.done.set_exception(RuntimeError(f"No figure counts. {last}"))


async def press(side: Side, connections: int, seconds: float, size: int = 64) -> dict[str, float]:
    """Run cycles for so long, with secrets of `size` characters."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    document = json.dumps({"secret": "x" * size}, separators=(",", ":")).encode()
    latencies: tuple[list[float], list[float]] = [], []
    connect = partial(Connection, side, document, started + seconds, latencies)
    running = []
    for _ in range(connections):
        _, connection = await loop.create_connection(connect, "127.0.0.1", side.port)
        running.append(connection.done)
    await asyncio.gather(*running)
    elapsed = time.perf_counter() - started
    every = sorted(latencies[0] + latencies[1])
    median = statistics.median(every)
    p99 = every[int(len(every) * 0.99)]
    return {
        "cycles/s": len(latencies[1]) / elapsed,
        "median, ms": median * 1000,
        "p99, ms": p99 * 1000,
        "p99 / median": p99 / median,
        "median of reads, ms": statistics.median(latencies[1]) * 1000,
    }


# --- The yardstick --------------------------------------------------------------------------------

echo = FastAPI()
echo.add_api_route("/health", lambda: None)  # what local.healthy asks


class Message(BaseModel):
    secret: str


@echo.post("/echo")
async def answer(message: Message) -> Message:
    return message


@contextmanager
def yardstick(workers: int) -> Iterator[Side]:
    port = local.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "uvicorn", "bench:echo", "--log-level=warning"]
    command += ["--no-access-log", f"--port={port}", f"--workers={workers}"]
    process = subprocess.Popen(command, cwd=local.HERE, start_new_session=True)
    try:
        local.wait_until(lambda: local.healthy(url), 30, "The yardstick did not start.")
        yield Side("FastAPI echo", port, "/echo", partial(post, "/echo"))
    finally:
        local.end(process)


# --- What is measured, in a table -----------------------------------------------------------------


def title(left: str, right: str) -> None:
    print(f"\n{ROW.format('', left, right, 'ratio')}\n{ROW.format('---', '---', '---', '---')}")


def compare(what: str, left: Sequence[float], right: Sequence[float]) -> None:
    """Show the median of each side, with its range, and the ratio of the medians."""
    texts = []
    for values in (left, right):
        digits = 0 if min(values) >= 100 else 2 if min(values) >= 1 else 3
        text = f"{statistics.median(values):,.{digits}f}"
        if len(values) > 1:
            text += f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
        texts.append(text)
    ratio = statistics.median(right) / statistics.median(left)
    print(ROW.format(what, *texts, f"{ratio:.2f}"), flush=True)


@contextmanager
def servers(workers: int) -> Iterator[dict[str, str]]:
    """Start PostgreSQL and Valkey on empty folders; yield what a service needs to know."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        local.stores(Path(folder)) as stores,
    ):
        yield {
            **stores.environment,
            "ENCRYPTION_KEY_FILE": f"{folder}/encryption_key",
            "WORKERS": str(workers),
            "PORT": str(local.free_port()),
            "CREATE_QUOTA_KIB_PER_MINUTE": "1073741824",  # counted, never reached
            "MAX_STORED_MIB": "0",  # 10 million secrets are more than is usual
            "LOG_LEVEL": "warning",
        }


@dataclass(frozen=True)
class Bench:
    seconds: float
    rounds: int
    workers: int

    def in_turns(self, left: Side, right: Side, connections: int, *names: str) -> None:
        """Alternate, so that whatever else the machine does meets both."""
        runs: dict[Side, list[dict[str, float]]] = {left: [], right: []}
        for _ in range(self.rounds):
            for side in (left, right):
                runs[side].append(uvloop.run(press(side, connections, self.seconds)))
        for name in names:
            before, after = ([run[name] for run in runs[side]] for side in (left, right))
            compare(f"{connections} connections: {name}", before, after)

    def large_secrets(self, secrets: Side) -> None:
        fernet = Fernet(Fernet.generate_key())
        text = b"x" * 65536
        cycles, took = timeit.Timer(lambda: fernet.decrypt(fernet.encrypt(text))).autorange()
        runs = [uvloop.run(press(secrets, 64, self.seconds, len(text))) for _ in range(self.rounds)]
        rates = [run["cycles/s"] / self.workers for run in runs]
        compare("64 KiB cycles/s: Fernet; a worker", [cycles / took], rates)

    def memory(self, secrets: Side, service: psutil.Process) -> None:
        processes = (service, *service.children(recursive=True))  # a lone worker is the service
        cycles = 0.0
        early = max(process.memory_info().rss for process in processes) / 1e6
        while cycles < 100_000:
            cycles += uvloop.run(press(secrets, 64, 5))["cycles/s"] * 5
        late = max(process.memory_info().rss for process in processes) / 1e6
        compare(f"MB of the largest worker: {cycles:,.0f} cycles later", [early], [late])

    def growth(self, rows: int) -> None:
        with grown(1000, self.workers) as (few, before), grown(rows, self.workers) as (many, after):
            title(few.name, many.name)
            for name in before:
                compare(name, [before[name]], [after[name]])
            self.in_turns(few, many, 1, "median of reads, ms")
            self.in_turns(few, many, 64, "cycles/s", "p99, ms")


# --- Growth ---------------------------------------------------------------------------------------
# $1 secrets, the first made $2 ago, the next ones each $3 later. Ids begin with that time, as real
# ones do.
SECRETS: Final = """
    insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, created_at, expires_at)
    select (to_hex(date_part('epoch', at)::bigint) || left(md5(number::text), 24))::uuid,
           repeat('x', 184)::bytea, repeat('x', 140)::bytea, fingerprint, at, at + interval '1 day'
    from encryption_keys, generate_series(1, $1::bigint) as number,
         lateral (select now() - $2::text::interval + number * $3::text::interval as at)
"""
LOGS: Final = """
    insert into secret_logs (secret_id, action, ip_address, created_at, extra_data)
    select id, 'created', '192.0.2.1', created_at, '{"user_agent": "bench", "ttl_seconds": 86400}'
    from secrets, generate_series(1, $1::bigint) where (expires_at < now()) = $2
"""
NO_OVERDUE: Final = """
    select not exists (select from secrets where expires_at < now() - interval '1 hour')
"""
NO_OLD_LOGS: Final = """
    select created_at > now() - interval '1 day' from secret_logs order by id limit 1
"""


def seconds_until(condition: Callable[[], object]) -> float:  # 60 means: not at all
    started = time.perf_counter()
    while not condition() and time.perf_counter() < started + 60:
        time.sleep(0.02)
    return time.perf_counter() - started


@contextmanager
def grown(rows: int, workers: int) -> Iterator[tuple[Side, dict[str, float]]]:
    """Measure a service beside so many unread secrets and thrice the log rows, then yield it."""
    with servers(workers) as environment, asyncio.Runner() as runner:
        with local.service(environment):
            pass  # it notes its encryption key, which the rows name
        host, user, database = (environment[f"POSTGRES_{name}"] for name in ("HOST", "USER", "DB"))
        connection = runner.run(asyncpg.connect(host=host, user=user, database=database))

        def sql(statement: str, *arguments: object) -> object:
            return runner.run(connection.fetchval(statement, *arguments))

        sql("alter system set autovacuum = off")  # nothing is analysed before the first start
        sql("select pg_reload_conf()")
        sql(SECRETS, OVERDUE_ROWS, "400 days", "100 ms")
        sql(LOGS, 1, True)
        sql(SECRETS, rows, "12 hours", f"{12 * 3600_000 / rows:.3f} ms")
        sql(LOGS, 3, False)
        sql("checkpoint")
        sql(SECRETS, 100_000, "1 day", "2 ms")  # from now on, 500 of them a second expire
        figures = dict[str, float]()
        started = time.perf_counter()
        with local.service(environment):
            figures["start, nothing analysed, s"] = time.perf_counter() - started
            removed = seconds_until(lambda: sql(NO_OVERDUE))
            figures[f"{OVERDUE_ROWS:,} overdue secrets removed, s"] = removed
            removed = seconds_until(lambda: sql(NO_OLD_LOGS))
            figures["... then as many log rows, while secrets expire, s"] = removed
        sql("delete from secrets where expires_at < now() + interval '1 hour'")
        sql("vacuum analyze")
        sql("checkpoint")
        sql("alter system reset autovacuum")
        sql("select pg_reload_conf()")
        runner.run(connection.close())
        started = time.perf_counter()
        with local.service(environment):
            figures["start, analysed, s"] = time.perf_counter() - started
            yield Side(f"{rows:,} unread", int(environment["PORT"]), "/secret", read), figures


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--seconds", type=float, default=1, help="length of a turn (default: 1)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side (default: 20)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--full", action="store_true")
    many = 10_000_000 if psutil.disk_usage(tempfile.gettempdir()).free > 40e9 else 1_000_000
    parser.add_argument("--rows", type=int, default=many, help="unread secrets (here: %(default)s)")
    arguments = parser.parse_args()
    # So that nothing that was started is left running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    bench = Bench(arguments.seconds, arguments.rounds, arguments.workers)
    machine = f"{psutil.cpu_count()} cores, Python {sys.version.split()[0]}"
    print(f"{machine}, {bench}; median (lowest to highest)")
    with (
        yardstick(bench.workers) as echo,
        servers(bench.workers) as environment,
        local.service(environment) as service,
    ):
        secrets = Side("One-Time Secrets", int(environment["PORT"]), "/secret", read)
        title(echo.name, secrets.name)
        bench.in_turns(echo, secrets, 1, "median, ms")
        for connections in (16, 64):
            figures = ("cycles/s", "median, ms", "p99, ms", "p99 / median")
            bench.in_turns(echo, secrets, connections, *figures)
        if arguments.full:
            bench.memory(secrets, psutil.Process(service.process.pid))
            bench.large_secrets(secrets)
    if arguments.full:
        bench.growth(arguments.rows)


if __name__ == "__main__":
    main()
