"""What the tests share: the service, its stores, and builders of what a test needs.

Real PostgreSQL, real Valkey, the real service in a process of its own. No mocks.
"""

import asyncio
import base64
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeAlias
from unittest import mock
from uuid import UUID

import asyncpg
import psutil
import pytest
from cryptography.fernet import InvalidToken
from httpx import Client, Response
from redis import Redis

import local

with (  # a developer's settings, exported or in a .env, are not the tests'
    tempfile.TemporaryDirectory() as empty_folder,
    chdir(empty_folder),
    mock.patch.dict(os.environ, clear=True),
):
    import main

parametrize = pytest.mark.parametrize
soak = pytest.mark.soak

HERE = Path(__file__).resolve().parent
MAIN = (str(HERE / "main.py"),)  # what Python is to run
ENCRYPTION_KEY = base64.urlsafe_b64encode(bytes(range(32))).decode()
CANARY = "canary-hunter2"  # stands in bad input, and must not come back
NUMBER = "4815162342"  # the same where a number is wanted
NO_STORE = {
    "cache-control": "no-cache, no-store, must-revalidate",
    "pragma": "no-cache",
    "expires": "0",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-robots-tag": "noindex",
}
SETTINGS = {
    "ENCRYPTION_KEY": ENCRYPTION_KEY,
    "FORWARDED_ALLOW_IPS": "10.0.0.1",
    "CREATE_QUOTA_KIB_PER_MINUTE": "0",
    "CLEANUP_INTERVAL_SECONDS": "86400",  # only at the start: what expires stays where it is
    "LOG_LEVEL": "debug",
}
ENVIRONMENT = {  # of every service under test, in which main.py is found from anywhere
    **{
        name: os.environ[name]
        for name in os.environ
        if name.lower() not in main.Settings.model_fields
    },
    "PYTHONPATH": str(HERE),
}
(OPERATORS_KEY,) = main.parse_encryption_keys(ENCRYPTION_KEY)

# What callers hear once the log has this action.
GONE = {"read": "already_read", "deleted": "deleted"}
# What an address bar accepts.
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
CREATION = '{"secret": "a secret"}'
TO_DELETE = {"passphrase": "right", "passphrase_scope": "delete"}
TO_READ = {"passphrase": "right", "passphrase_scope": "read"}
END_SESSIONS = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where application_name = 'one-time-secrets'
"""
# Whatever writes to the log waits, and BLOCKED counts who does.
LOCK_LOG = "lock table secret_logs in exclusive mode"
BLOCKED = """
    select count(*) from pg_locks where not granted and relation = 'secret_logs'::regclass
"""

Document: TypeAlias = dict[str, Any]
HttpCall: TypeAlias = tuple[str, str, str | None]  # method, path, body


# --- The service and its stores -------------------------------------------------------------------


def raw(key: str) -> Any:
    """The bytes of a secret_key or receipt_key."""
    return base64.urlsafe_b64decode(key)


def id_of(key: str) -> UUID:
    return main.secret_id_of(raw(key))


def name_in_redis(kind: str, id: UUID) -> str:
    """Of a ciphertext (`secret`) or of the wrapped key that opens it (`key`)."""
    return f"{kind}:{id}"


def assert_problem(response: Response, status: int, code: str) -> Document:
    """Check that a response is this error, in the shape that every error has. Returns its body."""
    document: Document = response.json()
    assert (response.status_code, document.get("code")) == (status, code), response.text
    headers = {**NO_STORE, "content-type": "application/problem+json"}
    assert {name: response.headers.get(name) for name in headers} == headers
    assert (document["status"], document["type"]) == (status, "about:blank")
    assert all((document["title"], document["detail"]))
    assert status != 503 or int(response.headers["retry-after"]) >= 1
    return document


def has_settled(started: local.Service) -> bool:
    """Whether it serves, or has ended."""
    return started.process.poll() is not None or local.healthy(started.url)


@dataclass(frozen=True)
class Tables:
    """A database of the tests' PostgreSQL: SQL for the test, and how a service finds it."""

    stores: local.Stores
    name: str = "postgres"

    @property
    def environment(self) -> dict[str, str]:
        return {**self.stores.environment, "POSTGRES_DB": self.name}

    def start(self, words: Sequence[str], said: IO[bytes] | int, **settings: str) -> local.Service:
        """Let Python run this on it, where PORT stands for the service's port."""
        port = str(local.free_port())
        process = subprocess.Popen(
            [sys.executable, *(word.replace("PORT", port) for word in words)],
            cwd=self.stores.postgres.folder.parent,  # where no .env is
            env={**ENVIRONMENT, **SETTINGS, **self.environment, "PORT": port, **settings},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return local.Service(f"http://127.0.0.1:{port}", process)

    async def connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        host, user = (self.environment[f"POSTGRES_{name}"] for name in ("HOST", "USER"))
        return await asyncpg.connect(host=host, user=user, database=self.name)

    def rows(self, statement: str, *arguments: object) -> list[Any]:
        async def fetch() -> list[Any]:
            connection = await self.connect()
            try:
                return list(await connection.fetch(statement, *arguments))
            finally:
                await connection.close()

        return asyncio.run(fetch())

    def value(self, statement: str, *arguments: object) -> Any:
        return self.rows(statement, *arguments)[0][0]

    def counts(self) -> tuple[int, ...]:
        """How many secrets and how many log rows there are."""
        both = "select (select count(*) from secrets), (select count(*) from secret_logs)"
        return tuple(self.rows(both)[0])

    def load_schema(self) -> None:
        self.stores.postgres.load(HERE / "schema.sql", self.name)

    def fresh(self, *, empty: bool = False) -> "Tables":
        fresh = Tables(self.stores, f"fresh_{secrets.token_hex(4)}")
        self.rows(f"create database {fresh.name}")
        if not empty:
            fresh.load_schema()
        return fresh

    def refusals(self, *services: dict[str, str]) -> list[str]:
        """What services with these settings, started at once, say when they refuse to start."""
        started = [self.start(MAIN, subprocess.PIPE, **settings) for settings in services]
        until(lambda: all(map(has_settled, started)))
        refused = [one.process for one in started if one.process.returncode]
        for one in started:
            local.end(one.process)
        said = {one.process: one.process.communicate()[0].decode() for one in started}
        return [said[process] for process in refused]

    def refused_start(self, **settings: str) -> str:
        """The one line with which a service refuses to start on it."""
        (line,) = "".join(self.refusals(settings)).splitlines()
        return line


class Service(Client):
    """A service as its callers have it; and its process, its log, the database, the cache."""

    def __init__(self, started: local.Service, log: Path, tables: Tables, redis: Redis) -> None:
        agent = {"User-Agent": "a test"}
        super().__init__(base_url=started.url, headers=agent, trust_env=False, timeout=90)
        self.url = started.url
        self.process = started.process
        self.log = log
        self.tables = tables
        self.stores = tables.stores
        self.redis = redis

    def create(self, text: str = "a secret", **members: object) -> Document:
        response = self.post("/secret", json={"secret": text, **members})
        assert response.status_code == 201, response.text
        document: Document = response.json()
        return document

    def key(self, text: str = "a secret", **members: object) -> str:
        """The secret_key of a new secret."""
        return str(self.create(text, **members)["secret_key"])

    def create_from(self, address: str, **members: object) -> Response:
        """Ask for a secret as a proxy does on behalf of this address."""
        forwarded = {"X-Forwarded-For": address}
        return self.post("/secret", json={"secret": "a secret", **members}, headers=forwarded)

    def create_raw(self, content: bytes, query: str = "", label: str = "text/plain") -> Response:
        return self.post(f"/secret{query}", content=content, headers={"Content-Type": label})

    def read(self, key: str, passphrase: str | None = None) -> Response:
        return self.post(f"/secret/{key}", json={"passphrase": passphrase})

    def reads(self, key: str, passphrase: str | None = None) -> str:
        """The secret, of which this is the one read, and the answer has nothing else."""
        document = self.read(key, passphrase).json()
        assert [*document] == ["secret"], document
        return str(document["secret"])

    def destroy(self, key: str, passphrase: str | None = None) -> Response:
        return self.request("DELETE", f"/secret/{key}", json={"passphrase": passphrase})

    def status(self, key: str) -> Response:
        return self.get(f"/secret/{key}/status")

    def revoke(self, created: Document) -> Response:
        return self.delete(f"/receipt/{created['receipt_key']}")

    def is_stored(self, key: str) -> bool:
        return bool(self.tables.value("select count(*) from secrets where id = $1", id_of(key)))

    def expire(self, key: str) -> datetime:
        """Let a secret's time be over, this very instant, which is returned."""
        statement = """
            update secrets set created_at = now() - interval '1 day', expires_at = now()
            where id = $1 returning expires_at
        """
        expires_at: datetime = self.tables.value(statement, id_of(key))
        return expires_at

    def events(self, key: str) -> list[Document]:
        """What the log has of a secret, in order."""
        statement = """
            select action, host(ip_address) as ip_address, created_at, extra_data
            from secret_logs where secret_id = $1 order by id
        """
        rows = self.tables.rows(statement, id_of(key))
        return [{**row, **json.loads(row["extra_data"])} for row in rows]

    def actions(self, key: str) -> list[str]:
        return [event["action"] for event in self.events(key)]

    def cached(self, kind: str, key: str) -> Any:
        return self.redis.get(name_in_redis(kind, id_of(key)))

    def cached_seconds(self, kind: str, key: str) -> Any:
        """How long it will stay there; -2: it is not there."""
        return self.redis.ttl(name_in_redis(kind, id_of(key)))


@contextmanager
def serving(
    tables: Tables,
    log: Path = Path(os.devnull),
    start: Sequence[str] = MAIN,
    /,
    **settings: str,
) -> Iterator[Service]:
    with log.open("ab") as said, Redis.from_url(tables.environment["REDIS_URL"]) as redis:
        started = tables.start(start, said, **settings)
        try:
            until(lambda: has_settled(started))
            assert started.process.returncode is None, "it does not start"
            with Service(started, log, tables, redis) as service:
                yield service
        finally:
            local.end(started.process)


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tables]:
    with local.stores(tmp_path_factory.mktemp("stores")) as stores:
        yield Tables(stores)


@pytest.fixture(scope="session")
def service(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service that most tests ask: default settings, but no quota."""
    with serving(tables, tmp_path_factory.mktemp("service") / "log") as service:
        yield service


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of two workers on stores of its own, for races and for breaking."""
    folder = tmp_path_factory.mktemp("broken")
    with (
        local.stores(folder) as stores,
        serving(Tables(stores), folder / "log", WORKERS="2") as one,
    ):
        yield one


@pytest.fixture(scope="session")
def proxied(tables: Tables) -> Iterator[Service]:
    """A service that believes our X-Forwarded-For, and whose other settings are odd, too."""
    settings = {
        "FORWARDED_ALLOW_IPS": "127.0.0.1",
        "PUBLIC_URL": "https://secrets.example/",
        "DEFAULT_TTL_SECONDS": "60",
        "MAX_TTL_SECONDS": "120",
        "MAX_SECRET_BYTES": "3000",
        "CACHE_SECONDS": "600",
    }
    with serving(tables, **settings) as service:
        yield service


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def at_once(service: Service, calls: Sequence[HttpCall]) -> list[tuple[int, Document]]:
    """Send every call on a connection of its own before the first answer is read."""
    host, port = service.base_url.host, service.base_url.port
    connections = [http.client.HTTPConnection(host, port, timeout=30) for _ in calls]
    for connection in connections:
        connection.connect()
    for connection, (method, path, body) in zip(connections, calls, strict=True):
        connection.request(method, path, body)
    answers = []
    for connection in connections:
        response = connection.getresponse()
        answers.append((response.status, json.loads(response.read())))
        connection.close()
    return answers


def opened(tokens: Iterable[Any], open_one: Callable[[Any], bytes]) -> list[bytes]:
    """What is in those of the tokens, or pairs of them, that this opens."""
    contents = []
    for token in tokens:
        with suppress(InvalidToken):
            contents.append(open_one(token))
    return contents


def unsealed(
    pairs: Iterable[tuple[bytes, bytes]], key: main.SecretKey, passphrase_key: bytes = b""
) -> list[bytes]:
    """What a link and the encryption_key open of these ciphertexts and wrapped_keys."""
    kek = main.key_encryption_key(OPERATORS_KEY, key, passphrase_key)
    return opened(pairs, lambda pair: main.unseal(main.Sealed(pair[0], pair[1], None), kek).secret)


@pytest.fixture(scope="session")
def swept(tables: Tables) -> Iterator[Service]:
    """One of two services that clean a database, five times a second each."""
    fresh = tables.fresh()
    often = {"CLEANUP_INTERVAL_SECONDS": "0.2"}
    with serving(fresh, **often) as service, serving(fresh, **often):
        yield service


@contextmanager
def server_setting(tables: Tables, **settings: str) -> Iterator[None]:
    """The whole server's own defaults are these meanwhile."""
    for name, value in settings.items():
        tables.rows(f"alter system set {name} = '{value}'")
    tables.rows("select pg_reload_conf()")
    try:
        wanted = settings.items()
        until(lambda: all(tables.value(f"show {name}") == value for name, value in wanted))
        yield
    finally:
        tables.rows("alter system reset all")
        tables.rows("select pg_reload_conf()")


@contextmanager
def another_session(tables: Tables, statement: str, *, commit: bool = False) -> Iterator[None]:
    """Inside, another session has executed this; the end undoes it, or commits."""
    with asyncio.Runner() as runner:
        session = runner.run(tables.connect())
        runner.run(session.execute(f"begin; {statement}"))
        try:
            yield
            if commit:
                runner.run(session.execute("commit"))
        finally:
            runner.run(session.close())


def processes_of(folder: Path) -> set[psutil.Process]:
    """Those that work in a folder, as a server does, or for it, as local.py and its service do."""
    found = set()
    for one in psutil.process_iter(["cwd", "environ"]):
        data_dir = (one.info["environ"] or {}).get("DATA_DIR")
        if Path(one.info["cwd"] or "/").is_relative_to(folder) or data_dir == str(folder):
            found.add(one)
    return found


def kill_all(folder: Path) -> None:
    while running := processes_of(folder):  # again: one may just have started another
        for one in running:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def kill(server: local.Server) -> None:
    kill_all(server.folder)


@contextmanager
def full_redis(service: Service) -> Iterator[None]:
    """No memory left, and nothing may be evicted: every write is answered with an error."""
    service.redis.config_set("maxmemory", "1")
    try:
        yield
    finally:
        service.redis.config_set("maxmemory", "0")


@contextmanager
def repeated(action: Callable[[], object], pause: float) -> Iterator[None]:
    """Inside, it is done again and again, with a pause of so many seconds."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(pause):
            action()

    with ThreadPoolExecutor(1) as thread:
        repeating = thread.submit(repeat)
        try:
            yield
        finally:
            over.set()
        repeating.result()


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def ask_and_leave(service: Service, *requests: bytes) -> None:
    for request in requests:
        with connect(service) as connection:
            connection.sendall(request)


def found(traces: Iterable[bytes], haystack: bytes) -> list[bytes]:
    return [trace for trace in traces if trace in haystack]


def forms(*texts: str) -> list[bytes]:
    """A text as it may stand somewhere: as it is, cut short, in base64 or hex.

    Where it is a key, also as its bytes, as Python shows those, and without their time.
    """
    keys = [raw(text) for text in texts if re.fullmatch(r"[\w-]{32}|[\w-]{43}=", text)]
    plain = [text.encode() for text in texts] + keys
    in_base64 = [base64.b64encode(text)[:-4] for text in plain]
    in_hex = [text.hex().encode() for text in plain]
    shown = [repr(key)[2:-1].encode() for key in keys]
    timeless = [key[4:] for key in keys]
    cut = [text[:12].encode() for text in texts]
    return plain + in_base64 + in_hex + shown + timeless + cut


def keys_of(created: Iterable[Document]) -> list[str]:
    return [document[name] for document in created for name in ("secret_key", "receipt_key")]


def canaries(*names: str) -> list[str]:
    return [f"canary-{name}-{secrets.token_hex(8)}" for name in names]


GET = b"GET /secret/CANARY HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /secret HTTP/1.1\r\nHost: x\r\n"
# What makes an Upgrade to websocket whole.
HANDSHAKE = b"""Sec-WebSocket-Version: 13\r
Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==\r
"""


def connect(service: Service) -> socket.socket:
    address = (service.base_url.host, service.base_url.port or 80)
    return socket.create_connection(address, timeout=10)


def send(service: Service, *contents: bytes, patience: float = 0.5) -> bytes:
    """What comes back on a connection of its own, until its end or so many silent seconds."""
    answers = bytearray()
    with connect(service) as connection, suppress(TimeoutError, ConnectionError):
        with suppress(ConnectionError):
            for content in contents:
                connection.sendall(content)
                time.sleep(0.01 if len(contents) > 1 else 0)  # so that each is a segment
        connection.settimeout(patience)
        while part := connection.recv(65536):
            answers += part
    return bytes(answers)
