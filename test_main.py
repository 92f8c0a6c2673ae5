"""The claims of main.py and local.py, each as a test: against the real service, PostgreSQL and Valkey. No mocks.

The clock is PostgreSQL's: a test that needs time to pass moves the times of a row instead of waiting.
"""

import asyncio
import base64
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import statistics
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, TypeAlias
from uuid import UUID

import asyncpg
import hypothesis
import psutil
import pytest
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from httpx import URL, Client, Response, TransportError
from hypothesis import strategies
from redis import Redis
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import element_to_be_clickable, visibility_of_element_located
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

import local
import main

HERE: Final = Path(__file__).resolve().parent
ENCRYPTION_KEY: Final = base64.urlsafe_b64encode(bytes(range(32))).decode()
CANARY: Final = "canary-hunter2"  # stands in bad input, and must not come back
NUMBER: Final = "4815162342"  # the same where a number is wanted
NO_STORE: Final = {
    **{"cache-control": "no-cache, no-store, must-revalidate", "pragma": "no-cache", "expires": "0"},
    **{"referrer-policy": "no-referrer", "x-content-type-options": "nosniff", "x-robots-tag": "noindex"},
}
DEFAULTS: Final = (  # set to nothing, they keep the service's default whatever the caller's shell has exported
    *("API_TOKENS", "CACHE_SECONDS", "DEFAULT_TTL_SECONDS", "ENCRYPTION_KEY_FILE", "HOST", "LOG_RETENTION_DAYS"),
    *("MAX_SECRET_BYTES", "MAX_TTL_SECONDS", "POSTGRES_PASSWORD", "PUBLIC_URL", "WORKERS"),
)
SETTINGS: Final = {
    **dict.fromkeys(DEFAULTS, ""),
    "ENCRYPTION_KEY": ENCRYPTION_KEY,
    "FORWARDED_ALLOW_IPS": "10.0.0.1",
    "CREATE_QUOTA_KIB_PER_MINUTE": "0",
    "CLEANUP_INTERVAL_SECONDS": "86400",  # only at the start: what a test lets expire stays where it is
    "LOG_LEVEL": "debug",
}

GONE: Final = {"read": "already_read", "deleted": "deleted"}  # what callers hear once the log has this action
BROWSER: Final = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"  # what an address bar accepts
CREATION: Final = '{"secret": "a secret"}'
TO_DELETE: Final = {"passphrase": "right", "passphrase_scope": "delete"}
TO_READ: Final = {"passphrase": "right", "passphrase_scope": "read"}
END_SESSIONS: Final = """
    select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'one-time-secrets'
"""
LOCK_LOG: Final = "lock table secret_logs in exclusive mode"  # whatever writes to the log waits
BLOCKED: Final = "select count(*) from pg_locks where not granted and relation = 'secret_logs'::regclass"

Document: TypeAlias = dict[str, Any]
Call: TypeAlias = tuple[str, str, str | None]  # method, path, body

# --- The service and its stores ----------------------------------------------------------------------------------


def raw(key: str) -> Any:
    """The bytes of a secret_key or receipt_key."""
    return base64.urlsafe_b64decode(key)


def id_of(key: str) -> UUID:
    return main.secret_id_of(raw(key))


def name_in_redis(kind: str, id: UUID) -> str:
    """Of a ciphertext (`secret`) or of the wrapped key that opens it (`key`)."""
    return f"{kind}:{id}"


def problem(response: Response, status: int, code: str) -> Document:
    """Check that a response is this error, in the shape that every error has. Returns its body."""
    document: Document = response.json()
    assert (response.status_code, document.get("code")) == (status, code), response.text
    headers = {**NO_STORE, "content-type": "application/problem+json"}
    assert {name: response.headers.get(name) for name in headers} == headers
    assert (document["status"], document["type"]) == (status, "about:blank")
    assert all((document["title"], document["detail"]))
    assert status != 503 or int(response.headers["retry-after"]) >= 1
    return document


@dataclass(frozen=True)
class Database:
    """A database of the tests' PostgreSQL: SQL for the test, and the settings by which a service finds it."""

    stores: local.Stores
    name: str = "postgres"

    @property
    def environment(self) -> dict[str, str]:
        return {**self.stores.environment, "POSTGRES_DB": self.name}

    def start(self, words: Sequence[str], said: IO[bytes] | int, **settings: str) -> local.Service:
        """Let Python run this on it, where PORT stands for the service's port."""
        port = str(local.free_port())
        env = {**os.environ, **SETTINGS, **self.environment, "PORT": port, **settings}
        command, errors = [sys.executable, *(word.replace("PORT", port) for word in words)], subprocess.STDOUT
        process = subprocess.Popen(command, cwd=HERE, env=env, stdout=said, stderr=errors, start_new_session=True)
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
        return tuple(self.rows("select (select count(*) from secrets), (select count(*) from secret_logs)")[0])

    def load_schema(self) -> None:
        self.stores.postgres.load(HERE / "schema.sql", self.name)

    def fresh(self, *, empty: bool = False) -> "Database":
        fresh = Database(self.stores, f"fresh_{secrets.token_hex(4)}")
        self.rows(f"create database {fresh.name}")
        if not empty:
            fresh.load_schema()
        return fresh

    def refusals(self, *services: dict[str, str]) -> list[str]:
        """What services with these settings, started at once, say when they refuse to start; the others are ended."""
        started = [self.start(["main.py"], subprocess.PIPE, **settings) for settings in services]
        until(lambda: all(one.process.poll() is not None or local.healthy(one.url) for one in started))
        refused = [one.process for one in started if one.process.returncode]
        for one in started:
            local.end(one.process)
        said = {one.process: one.process.communicate()[0].decode() for one in started}
        return [said[process] for process in refused]

    def refused_start(self, **settings: str) -> str:
        """The one line with which a service refuses to start on it."""
        (line,) = "".join(self.refusals(settings)).splitlines()
        return line


class Vault(Client):
    """A service as its callers have it, and what is behind it: its process, its log, the database, the cache."""

    def __init__(self, service: local.Service, log: Path, database: Database, redis: Redis) -> None:
        super().__init__(base_url=service.url, trust_env=False, timeout=30)
        self.url, self.process = service.url, service.process
        self.log, self.database, self.stores, self.redis = log, database, database.stores, redis

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
        return self.post("/secret", json={"secret": "a secret", **members}, headers={"X-Forwarded-For": address})

    def create_raw(self, content: bytes, query: str = "", label: str = "text/plain") -> Response:
        return self.post(f"/secret{query}", content=content, headers={"Content-Type": label})

    def read(self, key: str, passphrase: str | None = None) -> Response:
        return self.post(f"/secret/{key}", json={"passphrase": passphrase})

    def destroy(self, key: str, passphrase: str | None = None) -> Response:
        return self.request("DELETE", f"/secret/{key}", json={"passphrase": passphrase})

    def status(self, key: str) -> Response:
        return self.get(f"/secret/{key}/status")

    def revoke(self, created: Document) -> Response:
        return self.delete(f"/receipt/{created['receipt_key']}")

    def is_stored(self, key: str) -> bool:
        return bool(self.database.value("select count(*) from secrets where id = $1", id_of(key)))

    def expire(self, key: str) -> datetime:
        """Let a secret's time be over, this very instant, which is returned."""
        statement = """
            update secrets set created_at = now() - interval '1 day', expires_at = now()
            where id = $1 returning expires_at
        """
        expires_at: datetime = self.database.value(statement, id_of(key))
        return expires_at

    def events(self, key: str) -> list[Document]:
        """What the log has of a secret, in order."""
        statement = """
            select action, host(ip_address) as ip_address, created_at, extra_data
            from secret_logs where secret_id = $1 order by id
        """
        return [{**row, **json.loads(row["extra_data"])} for row in self.database.rows(statement, id_of(key))]

    def actions(self, key: str) -> list[str]:
        return [event["action"] for event in self.events(key)]

    def cached(self, kind: str, key: str) -> Any:
        return self.redis.get(name_in_redis(kind, id_of(key)))

    def cached_seconds(self, kind: str, key: str) -> Any:
        """How long it will stay there; -2: it is not there."""
        return self.redis.ttl(name_in_redis(kind, id_of(key)))


@contextmanager
def serving(
    database: Database, log: Path = Path(os.devnull), start: Sequence[str] = ("main.py",), /, **settings: str
) -> Iterator[Vault]:
    with log.open("ab") as said, Redis.from_url(database.environment["REDIS_URL"]) as redis:
        service = database.start(start, said, **settings)
        try:
            until(lambda: service.process.poll() is not None or local.healthy(service.url))
            assert service.process.returncode is None, "it does not start"
            with Vault(service, log, database, redis) as vault:
                yield vault
        finally:
            local.end(service.process)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with local.stores(tmp_path_factory.mktemp("stores")) as stores:
        yield Database(stores)


@pytest.fixture(scope="session")
def vault(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    """The service that most tests ask: default settings, but no quota."""
    with serving(database, tmp_path_factory.mktemp("vault") / "log") as vault:
        yield vault


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    """A service of two workers on stores of its own, for races and for breaking."""
    with local.stores(tmp_path_factory.mktemp("broken")) as stores, serving(Database(stores), WORKERS="2") as vault:
        yield vault


@pytest.fixture(scope="session")
def proxied(database: Database) -> Iterator[Vault]:
    """A service that believes our X-Forwarded-For, and whose other settings are not the defaults either."""
    limits = {"DEFAULT_TTL_SECONDS": "60", "MAX_TTL_SECONDS": "120", "MAX_SECRET_BYTES": "3000", "CACHE_SECONDS": "600"}
    with serving(database, FORWARDED_ALLOW_IPS="127.0.0.1", PUBLIC_URL="https://secrets.example/", **limits) as vault:
        yield vault


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def at_once(vault: Vault, calls: Sequence[Call]) -> list[tuple[int, Document]]:
    """Send every call on a connection of its own before the first answer is read."""
    connections = [http.client.HTTPConnection(vault.base_url.host, vault.base_url.port, timeout=30) for _ in calls]
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


# --- Cryptography ------------------------------------------------------------------------------------------------

(OPERATORS_KEY,) = main.parse_encryption_keys(ENCRYPTION_KEY)
(ANOTHER_KEY,) = main.parse_encryption_keys(Fernet.generate_key().decode())


def damaged(token: bytes) -> list[bytes]:
    """Cut at every place, and with one bit changed in every byte."""
    flips = [bytes([*token[:n], token[n] ^ bit, *token[n + 1 :]]) for n in range(len(token)) for bit in (1, 16, 128)]
    return [*flips, *(token[:length] for length in range(len(token)))]


def opened(tokens: Iterable[Any], open_one: Callable[[Any], bytes]) -> list[bytes]:
    """What is in those of the tokens, or pairs of them, that this opens."""
    contents = []
    for token in tokens:
        with suppress(InvalidToken):
            contents.append(open_one(token))
    return contents


def unsealed(pairs: Iterable[tuple[bytes, bytes]], key: main.SecretKey, passphrase_key: bytes = b"") -> list[bytes]:
    """What a link and the encryption_key open of these ciphertexts and wrapped_keys."""
    return opened(pairs, lambda pair: main.unseal(pair, OPERATORS_KEY, key, passphrase_key))


OLD_KEY: Final = "AAECA0IzJyOXZFoT49oCKZ55f7XTo8iW"  # of a secret that the first release has stored


def test_key_chain_is_the_same_in_every_version() -> None:
    assert main.secret_key_of(raw("AAECAwQFBgcICQoLDA0ODxAREhMUFRYX")) == raw(OLD_KEY)
    assert id_of(OLD_KEY) == UUID("00010203-9770-3f6e-9e12-c25b6ad14c59")


def test_keys_of_the_chain_have_nothing_in_common_but_their_time() -> None:
    receipt_key = main.new_receipt_key()
    secret_key = main.secret_key_of(receipt_key)
    chain = (receipt_key, secret_key, main.secret_id_of(secret_key).bytes)
    assert len({part[start : start + 4] for part in chain for start in range(4, 13)}) == 27


def test_sealed_secret_opens_with_its_keys_and_no_others() -> None:
    mine, other = (main.secret_key_of(main.new_receipt_key()) for _ in range(2))
    ciphertext, wrapped_key = main.seal(b"a secret", OPERATORS_KEY, mine, b"p" * 32)
    assert main.unseal((ciphertext, wrapped_key), OPERATORS_KEY, mine, b"p" * 32) == b"a secret"
    for wrong_key, key, link, passphrase_key in (
        (wrapped_key, OPERATORS_KEY, other, b"p" * 32),
        (wrapped_key, ANOTHER_KEY, mine, b"p" * 32),
        (wrapped_key, OPERATORS_KEY, mine, b"q" * 32),
        (wrapped_key, OPERATORS_KEY, mine, b""),
        (main.seal(b"another", OPERATORS_KEY, other, b"p" * 32)[1], OPERATORS_KEY, mine, b"p" * 32),
    ):
        with pytest.raises(InvalidToken):
            main.unseal((ciphertext, wrong_key), key, link, passphrase_key)


def test_sealing_twice_gives_nothing_in_common() -> None:
    secret_key = main.secret_key_of(main.new_receipt_key())
    first, second = (main.seal(b"a secret", OPERATORS_KEY, secret_key) for _ in range(2))
    assert not set(first) & set(second)


def test_no_flipped_bit_and_no_cut_opens_as_something_else() -> None:
    secret_key = main.secret_key_of(main.new_receipt_key())
    ciphertext, wrapped_key = main.seal(b"a secret", OPERATORS_KEY, secret_key)
    pairs = [(altered, wrapped_key) for altered in damaged(ciphertext)]
    pairs += [(ciphertext, altered) for altered in damaged(wrapped_key)]
    contents = unsealed(pairs, secret_key)  # a bit that base64 does not read may change
    assert set(contents) <= {b"a secret"}
    assert len(contents) < 10


def test_what_a_passphrase_becomes_depends_on_it_and_on_its_salt_but_not_on_how_accents_are_typed() -> None:
    composed, decomposed = (unicodedata.normalize(form, "Żółw café ﬁ") for form in ("NFC", "NFD"))
    inputs = [(composed, b"s"), (decomposed, b"s"), ("one", b"s"), ("two", b"s"), ("one", b"t")]
    outputs = [main.stretch(passphrase, salt * 16, OPERATORS_KEY, main.SecretKey(b"")) for passphrase, salt in inputs]
    assert composed != decomposed
    assert len({part for output in outputs for part in (output.passphrase_key, output.verifier)}) == 8


def test_verifier_depends_on_encryption_key_and_link_and_the_passphrase_key_does_not() -> None:
    links = [main.secret_key_of(main.new_receipt_key()) for _ in range(2)]
    ingredients = itertools.product((OPERATORS_KEY, ANOTHER_KEY), links)
    outputs = [main.stretch("one", b"s" * 16, *each) for each in ingredients]
    assert len({output.verifier for output in outputs}) == 4
    assert len({output.passphrase_key for output in outputs}) == 1


# --- Create, read, delete, look, expire --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "secret",
    [
        *("a", "zażółć gęślą jaźń", "🔑👩‍👩‍👧‍👦", "a\x00b\x00", "line\r\nline\u2028line", " ", "￿\U0010ffff"),
        *("x" * 65536, "🔑" * 16384, "".join(chr(number % 32) for number in range(65536))),  # as large as it may be
    ],
    ids=lambda secret: repr(secret[:30]),
)
def test_any_text_comes_back_as_it_was(vault: Vault, secret: str) -> None:
    assert vault.get(f"/secret/{vault.key(secret)}").json() == {"secret": secret}


def test_creation_answers_with_keys_expiry_and_link(vault: Vault) -> None:
    created = vault.create()
    assert set(created) == {"secret_key", "receipt_key", "expires_at", "url"}
    assert all(re.fullmatch("[A-Za-z0-9_-]{32}", created[name]) for name in ("secret_key", "receipt_key"))
    assert raw(created["secret_key"]) == main.secret_key_of(raw(created["receipt_key"]))
    assert created["url"] == f"{vault.url}/#{created['secret_key']}"


def claims(vault: Vault, created: Document, passphrase: str | None = None) -> list[Response]:
    """What everybody is told who wants something of a secret."""
    key = created["secret_key"]
    presented = [vault.read(key, passphrase), vault.destroy(key, passphrase)]
    return [vault.get(f"/secret/{key}"), *presented, vault.status(key), vault.revoke(created)]


@pytest.mark.parametrize(("end", "action"), [(Vault.read, "read"), (Vault.destroy, "deleted")])
def test_what_has_ended_says_how_and_when(vault: Vault, end: Callable[[Vault, str], Response], action: str) -> None:
    created = vault.create()
    key = created["secret_key"]
    assert end(vault, key).status_code == 200
    _, event = vault.events(key)
    assert (event["action"], event["by"], event["ip_address"]) == (action, "secret_key", "127.0.0.1")
    for response in claims(vault, created):
        answer = problem(response, 410, GONE[action])
        assert datetime.fromisoformat(answer["ended_at"]) == event["created_at"]
        assert ("compromised" in answer["detail"]) == (action == "read")
    assert vault.actions(key) == ["created", action]
    assert not vault.is_stored(key)
    assert 240 <= vault.cached_seconds("secret", key) <= 300
    assert vault.cached("key", key) is None


def test_status_looks_without_reading(vault: Vault) -> None:
    created = vault.create()
    expected = {"status": "unread", "expires_at": created["expires_at"], "passphrase_required": False}
    assert [vault.status(created["secret_key"]).json() for _ in range(3)] == [expected] * 3
    assert vault.actions(created["secret_key"]) == ["created"]
    for guard, required in ((TO_READ, True), (TO_DELETE, False)):
        assert vault.status(vault.key(**guard)).json()["passphrase_required"] is required


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_every_route_stands_under_both_prefixes_and_forbids_storing(vault: Vault, prefix: str) -> None:
    read, deleted, revoked = (vault.post(f"{prefix}/secret", json={"secret": "s"}).json() for _ in range(3))
    answers = [
        vault.post(f"{prefix}/secret", json={"secret": "s"}),
        vault.put(f"{prefix}/secret", content="s"),
        vault.get(f"{prefix}/secret/{read['secret_key']}/status"),
        vault.get(f"{prefix}/secret/{read['secret_key']}"),
        vault.post(f"{prefix}/secret/{vault.key()}"),
        vault.delete(f"{prefix}/secret/{deleted['secret_key']}"),
        vault.get(f"{prefix}/receipt/{deleted['receipt_key']}"),
        vault.delete(f"{prefix}/receipt/{revoked['receipt_key']}"),
        *(vault.get(prefix + path) for path in ("/health", "/docs", "/redoc", "/openapi.json")),
        vault.get(f"{prefix}/static-offline-docs/swagger-ui.css"),
    ]
    assert [answer.status_code for answer in answers] == [201, 201] + [200] * 11
    for answer in answers:
        assert [answer.headers.get_list(name) for name in NO_STORE] == [[value] for value in NO_STORE.values()]
    problem(vault.post(f"{prefix}/secret/{read['secret_key']}"), 410, "already_read")
    for path in ("/nothing", "/secret/", "/secrets", "/api/v1", "/api/v2/secret"):
        problem(vault.get(prefix + path), 404, "not_found")
    assert vault.get(f"{prefix}/health").json() == {"status": "ok", "postgres": "up", "redis": "up"}


@pytest.mark.parametrize(
    "key",
    [
        *("a" * 32, CANARY, "a" * 31, "a" * 33, "a" * 5000),  # the first is well-formed
        *("a" * 31 + end for end in ("=", "+", ".", "%20", "%2F", "a%0A", "%00", "%FF", "é", "%D9%A1")),
    ],
    ids=lambda key: key[26:50],
)
def test_key_that_opens_nothing_is_not_found(vault: Vault, key: str) -> None:
    calls = [("GET", "/secret/{}"), ("POST", "/secret/{}"), ("DELETE", "/secret/{}"), ("GET", "/secret/{}/status")]
    for method, path in (*calls, ("GET", "/receipt/{}"), ("DELETE", "/receipt/{}")):
        response = vault.request(method, path.format(key))
        problem(response, 404, "not_found")
        assert key not in response.text


def lifetime(vault: Vault, created: Document) -> float:
    """The seconds from a secret's creation to its expiry."""
    created_at: datetime = vault.events(created["secret_key"])[0]["created_at"]
    return (datetime.fromisoformat(created["expires_at"]) - created_at).total_seconds()


@pytest.mark.parametrize("ttl_seconds", [None, 60, 604800])
def test_secret_expires_ttl_seconds_from_now(vault: Vault, ttl_seconds: int | None) -> None:
    members: Document = {"ttl_seconds": ttl_seconds} if ttl_seconds else {}
    created = vault.create(**members)
    assert lifetime(vault, created) == (ttl_seconds or 86400)
    assert created["expires_at"].endswith("Z")  # UTC
    assert vault.read(created["secret_key"]).status_code == 200


@pytest.mark.parametrize("guard", [{}, TO_READ])
def test_expired_secret_is_gone_for_everybody_though_no_cleanup_ran(vault: Vault, guard: Document) -> None:
    created = vault.create(**guard)
    expired_at = vault.expire(created["secret_key"])
    for response in claims(vault, created, guard.get("passphrase")):
        assert datetime.fromisoformat(problem(response, 410, "expired")["ended_at"]) == expired_at
    assert vault.actions(created["secret_key"]) == ["created"]
    assert vault.is_stored(created["secret_key"])


def test_links_lifetimes_and_sizes_are_settings_which_the_page_knows(proxied: Vault) -> None:
    created = proxied.create("x" * 3000)
    assert created["url"] == f"https://secrets.example/#{created['secret_key']}"
    assert lifetime(proxied, created) == 60
    assert 540 <= proxied.cached_seconds("secret", created["secret_key"]) <= 600
    assert lifetime(proxied, proxied.create(ttl_seconds=120)) == 120
    problem(proxied.post("/secret", json={"secret": "s", "ttl_seconds": 121}), 422, "invalid")
    problem(proxied.post("/secret", json={"secret": "x" * 3001}), 413, "too_large")
    limits = re.findall("<meta name=\"limits\" content='(.+)'>", proxied.get("/", headers={"Accept": BROWSER}).text)
    expected = {"default_ttl_seconds": 60, "max_ttl_seconds": 120, "max_secret_bytes": 3000}
    assert [json.loads(limit) for limit in limits] == [expected]


# --- Passphrases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [{"passphrase": "right"}, TO_DELETE, TO_READ])
def test_passphrase_guards_deleting_and_if_asked_for_reading(vault: Vault, guard: Document) -> None:
    read, deleted = vault.create("hello", **guard), vault.key(**guard)
    key, guards_reading = read["secret_key"], read["passphrase_scope"] == "read"
    assert guards_reading == (guard == TO_READ)
    for claim in (Vault.destroy, Vault.read) if guards_reading else (Vault.destroy,):
        for _ in range(6):  # which costs no attempt, and is not logged
            problem(claim(vault, key), 403, "passphrase_required")
        problem(claim(vault, key, "wrong"), 403, "wrong_passphrase")
    assert vault.read(key, "right" if guards_reading else None).json() == {"secret": "hello"}
    assert vault.actions(key) == ["created", *["denied"] * (2 if guards_reading else 1), "read"]
    assert vault.destroy(deleted, "right").json() == {"status": "secret_deleted"}


@pytest.mark.parametrize(("attempts", "minutes"), [(5, 15), (10, 30), (15, 60), (30, 480)])
def test_each_five_guesses_make_even_the_right_passphrase_wait(vault: Vault, attempts: int, minutes: int) -> None:
    key = vault.key("hello", **TO_READ)
    charge = "update secrets set attempts = $2, attempts_since = now() - $3::interval where id = $1"
    vault.database.rows(charge, id_of(key), attempts - 5, timedelta(days=1))  # the pauses before are over
    answers = [problem(vault.read(key, "wrong"), 403, "wrong_passphrase") for _ in range(5)]
    assert [answer["attempts_left"] for answer in answers] == [4, 3, 2, 1, 0]
    for claim in (Vault.read, Vault.destroy):
        response = claim(vault, key, "right")
        answer = problem(response, 429, "too_many_attempts")
        assert -60 < int(response.headers["retry-after"]) - minutes * 60 <= 0
        assert -60 < datetime.fromisoformat(answer["retry_at"]).timestamp() - time.time() - minutes * 60 < 60
    assert vault.actions(key) == ["created", *["denied"] * 5]
    vault.database.rows(charge, id_of(key), attempts, timedelta(minutes=minutes - 1))
    problem(vault.read(key, "right"), 429, "too_many_attempts")
    vault.database.rows(charge, id_of(key), attempts, timedelta(minutes=minutes))
    assert problem(vault.read(key, "wrong"), 403, "wrong_passphrase")["attempts_left"] == 4
    assert vault.read(key, "right").json() == {"secret": "hello"}


def test_of_a_hundred_guesses_at_once_five_at_most_are_checked_and_hold_up_nobody(two_workers: Vault) -> None:
    key = two_workers.key(**TO_READ)
    with ThreadPoolExecutor(1) as other:
        guessing = other.submit(at_once, two_workers, [("POST", f"/secret/{key}", '{"passphrase": "wrong"}')] * 100)
        while not guessing.done():
            assert two_workers.status(key).status_code == 200
    codes = Counter(answer["code"] for _, answer in guessing.result())
    assert codes.keys() <= {"wrong_passphrase", "too_many_attempts", "unavailable"}
    charged = two_workers.database.value("select attempts from secrets where id = $1", id_of(key))
    assert 1 <= codes["wrong_passphrase"] == charged <= 5


@pytest.mark.parametrize(("guessers", "readers"), [(50, 10), pytest.param(200, 40, marks=pytest.mark.soak)])
def test_many_guessers_hold_up_nobody(vault: Vault, guessers: int, readers: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        guessed, own = (list(pool.map(lambda _: vault.key(**TO_READ), range(n))) for n in (guessers, readers))
    charged = Counter[str]()

    def guess(key: str) -> None:
        ((_, answer),) = at_once(vault, [("POST", f"/secret/{key}", '{"passphrase": "wrong"}')])
        assert answer["code"] in ("wrong_passphrase", "too_many_attempts", "unavailable")
        charged[key] += answer["code"] == "wrong_passphrase"

    with ExitStack() as guessing:
        for key in guessed:
            guessing.enter_context(repeated(partial(guess, key), 0.5))
        until(lambda: len(charged) == guessers)  # all are at it
        rightful, plain = zip(*[(vault.read(key, "right"), vault.status(key)) for key in own], strict=True)
    assert all(answer.status_code == 200 or problem(answer, 503, "unavailable") for answer in rightful)
    assert {answer.status_code for answer in plain} <= {200, 410}
    slowest, median = max(one.elapsed for one in rightful), statistics.median(one.elapsed for one in plain)
    print(f"slowest rightful read {slowest}, median of plain requests {median}")
    attempts = "select id, attempts from secrets where id = any($1)"
    in_rows = dict[UUID, int](vault.database.rows(attempts, [id_of(key) for key in (*guessed, *own)]))
    assert all(in_rows[id_of(key)] == charged[key] for key in guessed)
    assert {in_rows.get(id_of(key), 0) for key in own} == {0}


def test_right_passphrase_is_not_counted_though_the_claim_fails(vault: Vault) -> None:
    key = vault.key("hello", **TO_READ)
    vault.database.rows("alter table secret_logs add constraint full_disk check (false) not valid")
    try:
        for _ in range(7):
            problem(vault.read(key, "right"), 503, "unavailable")
    finally:
        vault.database.rows("alter table secret_logs drop constraint full_disk")
    assert vault.read(key, "wrong").json()["attempts_left"] == 4
    assert vault.read(key, "right").json() == {"secret": "hello"}


# --- Bad input ---------------------------------------------------------------------------------------------------

BAD_MEMBERS: Final = {  # as JSON
    "secret": ['""', "null", "4815162342", "4815162342.5", "true", '["CANARY"]', '{"CANARY": "CANARY"}'],
    "ttl_seconds": [
        *("0", "-1", "-4815162342", "1.5", "true", '"60"', '"CANARY"', "1e99", "1e999", "NaN", "-Infinity", "null"),
        *("604801", "4815162342", "4815162342481516234248151623424815162342", "[4815162342]"),
    ],
    "passphrase": ['""', "4815162342", "true", '["CANARY"]', '"%s"' % ("CANARY" * 1000)],
    "passphrase_scope": ['"CANARY"', '""', "null", "4815162342"],
    "encoding": ['"CANARY"', "4815162342"],
    "ttl": ["4815162342"],
    "Secret": ['"CANARY"'],
}
NO_OBJECTS: Final = [
    *(b"", b" ", b"null", b"true", b"4815162342", b'"CANARY"', b'["CANARY"]', b'[{"secret": "CANARY"}]'),
    *(b'{"secret": "CANARY"', b'{"secret": "CANARY",}', b"{'secret': 'CANARY'}", b'{"secret": CANARY}'),
    *(b'{"secret": "CANARY"}{"secret": "CANARY"}', b"secret=CANARY&ttl_seconds=60", b'{"secret": "CANARY\xff\xfe"}'),
    *(b'{"secret": "CANARY\n"}', b'{"secret": "CANARY\\x"}', b'{"secret": "CANARY\\ud800"}', b"\x00CANARY"),
    *(b'{"secret": "CANARY\\udc00\\ud800"}', b'{"secret": "CANARY", "passphrase": "CANARY\\ud800"}'),
    '{"secret": "CANARY"}'.encode("utf-16"),
    b'{"secret": "CANARY", "x": ' + b"[" * 100_000,
    b'{"secret": "CANARY", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
]


BAD_PASSPHRASES: Final = [
    *(("passphrase", b'{"passphrase": %b}' % value.encode()) for value in BAD_MEMBERS["passphrase"]),
    *(("password", b'{"password": "CANARY"}'), ("body", b'{"passphrase": "CANARY\\ud800"}')),
    *(("body", body) for body in (b'["CANARY"]', b'"CANARY"', b'{"passphrase": "CANARY"', b"passphrase=CANARY")),
]
ONE_BAD_MEMBER: Final = [  # of two with one name, the last counts
    (name, f'{{"secret": "CANARY", "{name}": {value}}}'.encode()) for name in BAD_MEMBERS for value in BAD_MEMBERS[name]
]
BAD_BODIES: Final = [  # (method, path, what the error must name, the body)
    *(("POST", "/secret", *refusal) for refusal in ONE_BAD_MEMBER),
    ("POST", "/secret", "secret", b'{"passphrase": "CANARY"}'),
    ("POST", "/secret", "secret", b'{"secret": "CANARY", "encoding": "base64"}'),
    *(("POST", "/secret", "body", body) for body in NO_OBJECTS),
    *((method, "/secret/{}", *refusal) for method in ("POST", "DELETE") for refusal in BAD_PASSPHRASES),
]


def refused(vault: Vault, send: Callable[[], Response], status: int = 422, code: str = "invalid") -> Document:
    """Check that an input is refused, that nothing of it is repeated, and nothing stored. Returns the answer's body."""
    before = vault.database.counts()
    response = send()
    answer = problem(response, status, code)
    assert not [trace for trace in (CANARY, CANARY.upper(), NUMBER) if trace in response.text]
    assert {frozenset(item) for item in answer.get("errors", [])} <= {frozenset({"loc", "msg", "type"})}
    assert vault.database.counts() == before
    return answer


@pytest.mark.parametrize(("method", "path", "named", "body"), BAD_BODIES, ids=lambda value: repr(value)[:60])
def test_bad_body_is_refused_with_the_reason(vault: Vault, method: str, path: str, named: str, body: bytes) -> None:
    key, content = vault.key(), body.replace(b"CANARY", CANARY.encode())
    answer = refused(vault, lambda: vault.request(method, path.format(key), content=content))
    assert answer["errors"][0]["loc"][:2] == (["body"] if named == "body" else ["body", named])
    assert named in answer["detail"]
    assert vault.status(key).json()["status"] == "unread"


@pytest.mark.parametrize("name", [CANARY, f"{CANARY} {CANARY}", "", "\x00", pytest.param("x" * 10_000, id="10000")])
def test_every_bad_member_is_named_but_no_odd_name_repeated(vault: Vault, name: str) -> None:
    body = {"secret": 4815162342, "ttl_seconds": "60", "passphrase": "", "colour": CANARY}
    answer = refused(vault, lambda: vault.post("/secret", json={**body, name: CANARY}))
    assert set(body) < {item["loc"][1] for item in answer["errors"]}
    assert not name or name not in json.dumps(answer, ensure_ascii=False)


@pytest.mark.parametrize(
    ("label", "query", "body", "named"),
    [
        *(("text/plain", f"ttl_seconds={value}", "x", "ttl_seconds") for value in ("0", "x", "")),
        *(("text/plain", "ttl=60", "x", "ttl"), ("text/plain", "passphrase=p", "x", "passphrase")),
        *(("text/plain", "", "", "secret"), ("", "ttl_seconds=60", CREATION, "ttl_seconds")),
        ("", "", CANARY, "Content-Type"),  # no JSON: there is a header for it
    ],
)
def test_bad_query_and_mislabelled_body_are_refused(
    vault: Vault, label: str, query: str, body: str, named: str
) -> None:
    assert named in refused(vault, lambda: vault.create_raw(body.encode(), f"?{query}", label))["detail"]


@pytest.mark.parametrize("secret", ["x" * 65537, "🔑" * 16384 + "x", CANARY * 100_000], ids=len)
def test_oversized_secret_is_too_large_however_it_comes(vault: Vault, secret: str) -> None:
    answer = refused(vault, lambda: vault.post("/secret", json={"secret": secret}), 413, "too_large")
    assert "65536 bytes" in answer["detail"]
    refused(vault, lambda: vault.create_raw(secret.encode()), 413, "too_large")
    refused(vault, lambda: vault.post("/secret", content=iter([b"x" * 1000] * 2000)), 413, "too_large")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "HEAD"])
def test_method_that_does_not_exist_is_refused_and_reads_nothing(vault: Vault, method: str) -> None:
    key = vault.key()
    before = vault.database.counts()
    paths = {f"/secret/{key}", f"/api/v1/secret/{key}", f"/secret/{key}/status", "/secret", "/health", "/docs"}
    for path in paths - {"PUT": {"/secret"}, "HEAD": {"/health", "/docs"}}.get(method, set()):
        response = vault.request(method, path)
        assert (response.status_code, method in response.headers["allow"]) == (405, False)
        assert method == "HEAD" or response.headers["allow"] in problem(response, 405, "method_not_allowed")["detail"]
    assert vault.database.counts() == before
    assert vault.status(key).json()["status"] == "unread"


@pytest.mark.parametrize("path", ["/", "/health", "/docs", "/redoc", "/openapi.json"])
def test_head_answers_as_get_does_where_that_only_looks(vault: Vault, path: str) -> None:
    got, head = vault.get(path), vault.head(path)
    assert (head.status_code, head.content, head.headers["content-type"]) == (200, b"", got.headers["content-type"])


# --- Documentation and curl --------------------------------------------------------------------------------------


def test_openapi_describes_every_call_and_error(vault: Vault) -> None:
    document = vault.get("/openapi.json").json()
    paths = document["paths"]
    assert {(method, path) for path in paths for method in paths[path]} == {
        *(("get", path) for path in ("/", "/health", "/secret/{secret_key}/status")),
        *((method, "/secret/{secret_key}") for method in ("get", "post", "delete")),
        *((method, "/receipt/{receipt_key}") for method in ("get", "delete")),
        *((method, "/secret") for method in ("post", "put")),
    }
    operations = [operation for path in paths.values() for operation in path.values()]
    assert all(operation["summary"] and operation["description"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    errors = [answer for one in operations for status, answer in one["responses"].items() if status >= "400"]
    assert {*itertools.chain(*(answer["content"] for answer in errors))} == {"application/problem+json"}
    code = document["components"]["schemas"]["Problem"]["properties"]["code"]
    assert {*", ".join(answer["description"] for answer in errors).split(", "), *code["examples"]} <= {*code["enum"]}
    assert {"201", "401", "408", "413", "422", "429", "503"} <= set(paths["/secret"]["post"]["responses"])


def test_every_curl_line_of_the_home_page_and_the_readme_works(vault: Vault, tmp_path: Path) -> None:
    home = vault.get("/")
    assert home.headers["content-type"].startswith("text/plain")
    assert f"{vault.url}/secret" in home.text
    texts = [home.text.replace("KEY", "$KEY").replace("RECEIPT_$KEY", "$RECEIPT_KEY"), (HERE / "README.md").read_text()]
    lines = [line for text in texts for line in text.splitlines() if line.startswith(("    curl ", "    pass "))]
    assert len(lines) >= 18
    for name in ("FILE", "id_rsa"):
        (tmp_path / name).write_bytes(b"not a key")
    for line in lines:
        created = vault.create(passphrase="p")
        keys = f"HOST={vault.url} KEY={created['secret_key']} RECEIPT_KEY={created['receipt_key']}"
        line = line.replace("curl ", "curl -sSf ", 1).replace("PASSPHRASE", "p")
        command = ["sh", "-c", f"pass() {{ echo hunter2; }}; {keys}; {line}"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=20)
        assert ended.stdout or " -o " in line


@pytest.mark.parametrize(
    ("method", "label"),
    [
        *(("POST", label) for label in ("text/plain", "application/octet-stream", "text/plain; charset=utf-8")),
        *(("PUT", label) for label in ("application/json", "application/x-www-form-urlencoded")),
    ],
)
@pytest.mark.parametrize("secret", [b"hello\n", b"{}", bytes(range(256)), "\u20ac".encode()])
def test_raw_body_comes_back_byte_for_byte(vault: Vault, method: str, label: str, secret: bytes) -> None:
    headers = {"Content-Type": label, "Accept": "*/*" if method == "PUT" else "text/plain"}
    created = vault.request(method, "/secret?ttl_seconds=77", content=secret, headers=headers)
    assert (created.status_code, created.headers["content-type"]) == (201, "text/plain; charset=utf-8")
    url, key = created.text.removesuffix("\n").split("/#")
    assert (url, vault.events(key)[0]["ttl_seconds"]) == (vault.url, 77)
    accept = {"POST": "text/plain", "PUT": "application/octet-stream"}[method]
    read, text = vault.get(f"/secret/{key}", headers={"Accept": accept}), "text/plain; charset=utf-8"
    kind = "application/octet-stream" if secret == bytes(range(256)) else text
    assert (read.content, read.headers["content-type"]) == (secret, kind)


def test_secret_that_is_not_text_comes_and_goes_in_json_as_base64(vault: Vault) -> None:
    keys = vault.create_raw(b"\xff\x00").json()["secret_key"], vault.key("/wA=", encoding="base64", **TO_READ)
    assert vault.read(keys[0]).json() == vault.read(keys[1], "right").json() == {"secret": "/wA=", "encoding": "base64"}


# --- Log and receipts --------------------------------------------------------------------------------------------


def test_log_and_receipt_have_each_event_with_its_time_address_and_agent(vault: Vault) -> None:
    created = vault.create(ttl_seconds=77, **TO_READ)
    for passphrase in ("wrong", "right"):
        vault.read(created["secret_key"], passphrase)
    log, receipt = vault.events(created["secret_key"]), vault.get(f"/receipt/{created['receipt_key']}").json()
    assert (receipt["status"], receipt["expires_at"]) == ("read", created["expires_at"])
    assert (log[0]["ttl_seconds"], log[0]["passphrase"]) == (77, "read")
    for event, shown in zip(log, receipt["events"], strict=True):
        assert datetime.fromisoformat(shown["created_at"]) == event["created_at"]
        assert abs(event["created_at"].timestamp() - time.time()) < 60
    for events in (log, receipt["events"]):
        assert [event["action"] for event in events] == ["created", "denied", "read"]
        assert {event["ip_address"] for event in events} == {"127.0.0.1"}
        assert {event["user_agent"] for event in events} == {vault.headers["User-Agent"]}
        assert (events[1]["reason"], events[2]["by"]) == ("wrong_passphrase", "secret_key")


@pytest.mark.parametrize("guard", [{}, TO_DELETE, TO_READ])
def test_receipt_revokes_without_a_passphrase(vault: Vault, guard: Document) -> None:
    created = vault.create(**guard)
    assert vault.get(f"/receipt/{created['receipt_key']}").json()["status"] == "unread"
    assert vault.events(created["secret_key"])[0].get("passphrase") == guard.get("passphrase_scope")
    assert vault.revoke(created).json() == {"status": "secret_deleted"}
    problem(vault.read(created["secret_key"]), 410, "deleted")
    event = vault.get(f"/receipt/{created['receipt_key']}").json()["events"][-1]
    assert (event["action"], event["by"]) == ("deleted", "receipt_key")


def test_receipt_needs_the_receipt_key_and_a_history(vault: Vault) -> None:
    created = vault.create()
    problem(vault.get(f"/receipt/{created['secret_key']}"), 404, "not_found")
    problem(vault.delete(f"/receipt/{created['secret_key']}"), 404, "not_found")
    assert vault.read(created["secret_key"]).status_code == 200
    vault.database.rows("delete from secret_logs where secret_id = $1", id_of(created["secret_key"]))
    problem(vault.get(f"/receipt/{created['receipt_key']}"), 404, "not_found")


@pytest.mark.parametrize("user_agent", [b"x" * 5000, b"caf\xe9 \xff\xfe", b'"}, "by": "x', b"\\u0000", b""])
def test_any_user_agent_is_logged_up_to_200_characters(vault: Vault, user_agent: bytes) -> None:
    response = vault.post("/secret", json={"secret": "s"}, headers=[(b"User-Agent", user_agent)])
    (event,) = vault.events(response.json()["secret_key"])
    assert event["user_agent"] == user_agent.decode("latin-1")[:200]


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        *(("203.0.113.7", "203.0.113.7"), ("2001:db8::7", "2001:db8::7")),
        ("198.51.100.1, 203.0.113.8", "203.0.113.8"),  # the first is what the client itself claims
        *(("::ffff:192.0.2.1", "192.0.2.1"), ("2001:db8::1%eth0", "2001:db8::1")),  # each in its one form
        *((bad, "127.0.0.1") for bad in ("garbage", "' or 1=1 --", ",,,", "999.1.1.1", "x" * 4000, "unknown", "")),
    ],
)
def test_only_a_trusted_proxy_is_believed(proxied: Vault, vault: Vault, forwarded: str, address: str) -> None:
    key = proxied.create_from(forwarded).json()["secret_key"]
    proxied.get(f"/secret/{key}", headers={"X-Forwarded-For": forwarded})
    assert [event["ip_address"] for event in proxied.events(key)] == [address] * 2
    assert vault.events(vault.create_from(forwarded).json()["secret_key"])[0]["ip_address"] == "127.0.0.1"


# --- Links -------------------------------------------------------------------------------------------------------

PREVIEWS: Final = (
    *("Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)", "TelegramBot (like TwitterBot)"),
    *("Mozilla/5.0 (compatible; Discordbot/2.0; +https://discordapp.com)", "facebookexternalhit/1.1", "Twitterbot/1.0"),
    *("LinkedInBot/1.0 (compatible; Mozilla/5.0)", "Mozilla/5.0 SkypeUriPreview Preview/0.5", "WhatsApp/2.23.20.0"),
    *("Mozilla/5.0 (compatible; Googlebot/2.1)", "Mozilla/5.0 (compatible; bingbot/2.0)", "Mozilla/5.0 SafeLinks"),
)
PREFETCHES: Final = ({"Sec-Purpose": "prefetch;prerender"}, {"Purpose": "prefetch"}, {"X-Moz": "prefetch"})


def test_page_allows_its_own_script_and_style_and_nothing_else(vault: Vault) -> None:
    page = vault.get("/", headers={"Accept": BROWSER}).text
    (policy,) = re.findall('<meta http-equiv="Content-Security-Policy" content="(.*)">', page)
    own = [re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page) for tag in ("script", "style")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for (text,) in own]
    assert policy.startswith("default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; ".format(*hashes))
    assert set(policy.partition("style-src")[2].split("; ")[1:]) == {
        *("connect-src 'self'", "img-src data:", "form-action 'none'", "base-uri 'none'")
    }


@pytest.mark.parametrize(
    "headers", [{"Accept": BROWSER}, *PREFETCHES, *({"User-Agent": agent} for agent in PREVIEWS)], ids=str
)
def test_preview_gets_the_page_and_reads_nothing(vault: Vault, headers: dict[str, str]) -> None:
    key = vault.key()
    response = vault.get(f"/secret/{key}", headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert vault.get(f"/secret/{key}").json() == {"secret": "a secret"}


@pytest.mark.parametrize("agent", ["curl/8.14.1", "python-requests/2.32.5", "PostmanRuntime/7.49.0", "Chrome/140.0"])
def test_program_gets_the_secret(vault: Vault, agent: str) -> None:
    for accept in ("*/*", "application/json"):
        response = vault.get(f"/secret/{vault.key()}", headers={"User-Agent": agent, "Accept": accept})
        assert response.json() == {"secret": "a secret"}


# --- The page ----------------------------------------------------------------------------------------------------
#
# In Debian's Chromium, headless, by one walk through each view. `python3 local.py test` leaves these out, and says so,
# where there is none.


@contextmanager
def window(folder: Path, language: str = "en", width: int = 1000) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own, which must end without an error on its console and without having asked any
    other host than the service."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
        *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", f"--lang={language}"),
        *(f"--window-size={width},800", f"--user-data-dir={folder / secrets.token_hex(4)}"),
    ):
        options.add_argument(argument)
    preferences = {"intl.accept_languages": language, "download.default_directory": str(folder)}
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver"))
    if width < 500:  # a window cannot be that narrow; a telephone's screen can
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        yield browser
        # Chromium reports an error status as an error; ReDoc asks for its maker's logo, which the policy blocks.
        usual = ("status of 403", "status of 404", "status of 410", "status of 503", "redoc/logo-mini.svg")
        messages = [entry["message"] for entry in entries(browser, "browser")]
        assert [one for one in messages if not any(words in one for words in usual)] == []
        assert asked_hosts(browser) <= {"127.0.0.1"}
    finally:
        browser.quit()


def entries(browser: webdriver.Chrome, log: str) -> list[Document]:
    found: list[Document] = browser.get_log(log)  # type: ignore[no-untyped-call]  # Selenium has no types here
    return found


def asked_hosts(browser: webdriver.Chrome) -> set[str]:
    """The hosts of all requests but those that the page's policy blocked."""
    messages = [json.loads(entry["message"])["message"] for entry in entries(browser, "performance")]
    blocked = {one["params"]["requestId"] for one in messages if one["params"].get("blockedReason")}
    sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in sent if one["requestId"] not in blocked]
    return {URL(url).host for url in urls if url.startswith("http")}


def shown(browser: webdriver.Chrome, name: str) -> WebElement:
    """The element with this id, once it can be seen, on a page that fits its window."""
    element: WebElement = WebDriverWait(browser, 30).until(visibility_of_element_located((By.ID, name)))
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    return element


def content(browser: webdriver.Chrome, name: str) -> str:
    """What the element with this id says, once it can be seen."""
    return str(shown(browser, name).get_property("value") or shown(browser, name).text)


def says(browser: webdriver.Chrome, *words: str) -> None:
    """Wait until the page shows one of these words."""
    body = (By.TAG_NAME, "body")
    WebDriverWait(browser, 30).until(lambda one: any(word in one.find_element(*body).text for word in words))


def go(browser: webdriver.Chrome, address: str) -> None:
    """As from another page: a new fragment alone would load nothing."""
    browser.get("about:blank")
    browser.get(address)


def fill_in(browser: webdriver.Chrome, vault: Vault, secret: str | Path, passphrase: str = "") -> tuple[str, str]:
    """Create a secret on the page, of a text or of a file. Returns the link and the receipt link."""
    go(browser, vault.url)
    shown(browser, "passphrase").send_keys(passphrase)
    browser.find_element(By.ID, "file" if isinstance(secret, Path) else "secret").send_keys(str(secret))
    shown(browser, "create").click()
    return content(browser, "link"), content(browser, "receipt-link")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    with window(tmp_path) as one:
        yield one


@pytest.mark.browser
@pytest.mark.parametrize("language", ["en", "ru"])
def test_page_hands_a_secret_to_another_telephone_once(vault: Vault, tmp_path: Path, language: str) -> None:
    text = "from the page " + "x" * 200
    with window(tmp_path, language, 360) as creator, window(tmp_path, language, 360) as reader:
        link, receipt_link = fill_in(creator, vault, text)
        key = link.partition("#")[2]
        reader.get(link)
        shown(reader, "open")
        assert reader.find_element(By.TAG_NAME, "html").get_attribute("lang") == language
        assert vault.status(key).json()["status"] == "unread"
        shown(reader, "open").click()
        assert content(reader, "shown") == text
        reader.refresh()
        says(reader, "This secret was read", "Секрет уже прочитан")
        assert key not in reader.current_url
        assert text not in reader.page_source
        go(creator, receipt_link)
        says(creator, "127.0.0.1")


@pytest.mark.browser
def test_page_guards_a_file_and_does_not_keep_its_name(vault: Vault, browser: webdriver.Chrome, tmp_path: Path) -> None:
    file, saved = tmp_path / "taxes-2026.pdf", tmp_path / "secret.bin"
    file.write_bytes(bytes(range(256)) * 256)  # the largest, and no text
    link, _ = fill_in(browser, vault, file, "right")
    assert file.name not in str(entries(browser, "performance"))  # all that was sent
    go(browser, link)
    assert shown(browser, "open-passphrase") == browser.switch_to.active_element
    browser.switch_to.active_element.send_keys("wrong\n")
    says(browser, "4 attempts left")
    browser.switch_to.active_element.send_keys("right\n")  # in the place of the wrong one, which is selected
    assert "main" in str(shown(browser, "save").get_attribute("class"))
    shown(browser, "save").click()
    until(lambda: saved.exists() and saved.read_bytes() == file.read_bytes())


@pytest.mark.browser
def test_page_takes_a_dropped_file_that_fits(vault: Vault, browser: webdriver.Chrome) -> None:
    drop = """const dataTransfer = new DataTransfer();
        for (const size of arguments) dataTransfer.items.add(new File(["x".repeat(size)], `${size}.txt`));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));"""
    go(browser, vault.url)
    for sizes, answer in (([65537], "65,536 bytes"), ([1, 2], "one file"), ([0], "one file"), ([5], "5.txt")):
        browser.execute_script(drop, *sizes)
        says(browser, answer)
    shown(browser, "create").click()
    go(browser, content(browser, "link"))
    shown(browser, "open").click()
    assert content(browser, "shown") == "xxxxx"


@pytest.mark.browser
def test_page_offers_the_lifetimes_that_the_service_takes(proxied: Vault, browser: webdriver.Chrome) -> None:
    go(browser, proxied.url)
    lifetimes = Select(shown(browser, "lifetime"))
    assert [one.text for one in lifetimes.options] == ["1 minute", "2 minutes"]
    assert lifetimes.first_selected_option.text == "1 minute"


@pytest.mark.browser
def test_page_prints_all_of_a_secret(vault: Vault, browser: webdriver.Chrome) -> None:
    secret = "\n".join(f"{number} of 400 lines" for number in range(400))
    go(browser, vault.create(secret)["url"])
    shown(browser, "open").click()
    assert content(browser, "shown") == secret
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    printed = shown(browser, "printed")
    assert printed.text == secret
    assert printed.get_property("clientHeight") == printed.get_property("scrollHeight")


@pytest.mark.browser
def test_page_asks_before_the_link_and_the_receipt_are_gone(vault: Vault, browser: webdriver.Chrome) -> None:
    link, _ = fill_in(browser, vault, "a secret")
    says(browser, "It opens the secret too")
    for leave in (browser.back, shown(browser, "again").click):
        leave()
        shown(browser, "confirm-no").click()
        assert content(browser, "link") == link
    browser.refresh()  # ChromeDriver says yes to what the browser asks
    assert '"beforeunload"' in "".join(entry["message"] for entry in entries(browser, "performance"))
    fill_in(browser, vault, "another secret")
    browser.back()
    shown(browser, "confirm-yes").click()
    shown(browser, "create")


@pytest.mark.browser
def test_page_opens_links_as_chats_and_mails_leave_them(vault: Vault, browser: webdriver.Chrome) -> None:
    created = vault.create("by its path")
    for end in (".", ")", ">", '"', "',", "%3E", "%22", "»", "_"):
        go(browser, created["url"] + end)
        shown(browser, "open")
    go(browser, f"{vault.url}/#receipt:{created['receipt_key']}).")
    shown(browser, "revoke")
    for broken in (created["url"][:-1], created["url"] + "A"):
        go(browser, broken)
        says(browser, "This link is not complete")
    go(browser, f"{vault.url}/secret/{created['secret_key']}).")  # not the link, but what GET takes
    shown(browser, "open").click()
    assert content(browser, "shown") == "by its path"


@pytest.mark.browser
def test_receipt_revokes_and_says_when_and_by_what(vault: Vault, browser: webdriver.Chrome) -> None:
    browser.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Kolkata"})
    link, receipt_link = fill_in(browser, vault, "to revoke")
    assert browser.title == "The link is ready · One-Time Secrets"
    go(browser, receipt_link)
    shown(browser, "revoke").click()
    shown(browser, "confirm-yes").click()
    says(browser, "revoked")
    events = shown(browser, "events")
    assert events.text.count("GMT+5:30") == events.text.count("Chrome on Linux") == 2
    assert "Mozilla/5.0" not in events.text
    events.find_element(By.TAG_NAME, "summary").click()
    assert "Mozilla/5.0" in events.text
    go(browser, link)
    says(browser, "It was deleted on")
    assert browser.title == "This secret was deleted · One-Time Secrets"


@pytest.mark.browser
@pytest.mark.parametrize("path", ["/docs", "/redoc", "/api/v1/docs", "/api/v1/redoc"])
def test_documentation_shows_itself_and_its_example_works(vault: Vault, browser: webdriver.Chrome, path: str) -> None:
    go(browser, f"{vault.url}{path}")
    says(browser, "Store a secret", "Create Secret")
    if path.endswith("/docs"):
        for button in (".opblock-post .opblock-summary-control", ".try-out__btn", ".execute"):
            WebDriverWait(browser, 30).until(element_to_be_clickable((By.CSS_SELECTOR, button))).click()
        status = (By.CSS_SELECTOR, ".live-responses-table .response .response-col_status")
        assert WebDriverWait(browser, 30).until(visibility_of_element_located(status)).text == "201"


@pytest.mark.soak
@pytest.mark.browser
def test_picture_of_the_page_for_the_readme(vault: Vault, browser: webdriver.Chrome) -> None:
    picture = HERE / "page.png"
    browser.set_window_size(720, 920)
    go(browser, vault.url)
    shown(browser, "secret").send_keys("correct horse battery staple")
    assert browser.save_screenshot(str(picture))
    assert picture.stat().st_size < 60_000


# --- Cache and cleanup ---------------------------------------------------------------------------------------------


def test_ciphertext_is_cached_for_five_minutes_and_its_key_no_longer_than_its_ttl(vault: Vault) -> None:
    long, short, locked = (vault.key(**members) for members in ({"ttl_seconds": 1234}, {"ttl_seconds": 1}, TO_READ))
    assert all(240 <= vault.cached_seconds("secret", key) <= 300 for key in (long, short, locked))
    assert 240 <= vault.cached_seconds("key", long) <= 300
    assert vault.cached_seconds("key", short) <= 1
    assert vault.cached("key", locked) is None  # nor ever, where reading needs a passphrase


def test_copies_in_a_redis_restored_from_an_old_snapshot_are_not_handed_out(two_workers: Vault) -> None:
    keys = [two_workers.key() for _ in range(20)]
    names = [name_in_redis(kind, id_of(key)) for key in keys for kind in ("secret", "key")]
    snapshot: Any = two_workers.redis.mget(names)
    assert all((*snapshot, *(two_workers.read(key).is_success for key in keys)))
    two_workers.redis.mset(dict(zip(names, snapshot, strict=True)))
    assert {two_workers.read(key).json()["code"] for key in keys} == {"already_read"}


@pytest.mark.parametrize("kinds", [["secret"], ["key"], ["secret", "key"]])
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "flipped", "another's", "a list"])
def test_damage_in_the_cache_costs_nobody_a_secret(vault: Vault, kinds: list[str], damage: str) -> None:
    until(lambda: bool(vault.cached("key", vault.key())))  # after a refusal Redis is left alone for some seconds
    key, other = vault.key("hello"), vault.key("another")
    for kind in kinds:
        value, others = vault.cached(kind, key), vault.cached(kind, other)
        flipped = value[:50] + bytes([value[50] ^ 1]) + value[51:]
        values = {"empty": b"", "garbage": b"\xff" * 100, "cut": value[:-8], "flipped": flipped, "another's": others}
        vault.redis.delete(name_in_redis(kind, id_of(key)))
        if damage == "a list":
            vault.redis.rpush(name_in_redis(kind, id_of(key)), value)
        else:
            vault.redis.set(name_in_redis(kind, id_of(key)), values[damage])
    assert vault.read(key).json() == {"secret": "hello"}


def test_cache_whose_answers_cannot_be_read_hinders_neither_reading_nor_revoking(database: Database) -> None:
    url = f"{database.environment['REDIS_URL']}?decode_responses=true"  # as text, and this is none
    with serving(database, REDIS_URL=url) as vault:
        plain, locked = vault.create("hello"), vault.create(**TO_READ)
        for created in (plain, locked):
            vault.redis.set(name_in_redis("secret", id_of(created["secret_key"])), b"\xff")
        assert vault.read(plain["secret_key"]).json() == {"secret": "hello"}
        assert vault.revoke(locked).json() == {"status": "secret_deleted"}


@pytest.fixture(scope="session")
def swept(database: Database) -> Iterator[Vault]:
    """One of two services that clean a database, five times a second each."""
    fresh, often = database.fresh(), {"CLEANUP_INTERVAL_SECONDS": "0.2"}
    with serving(fresh, **often) as vault, serving(fresh, **often):
        yield vault


def test_cleanup_ends_and_logs_what_expired_and_leaves_the_rest(swept: Vault) -> None:
    created, live = swept.create(), swept.key("hello")
    key = created["secret_key"]
    expired_at = swept.expire(key)
    until(lambda: swept.actions(key) == ["created", "expired"])
    assert swept.events(key)[1]["ip_address"] is None
    assert not swept.is_stored(key)
    assert datetime.fromisoformat(problem(swept.read(key), 410, "expired")["ended_at"]) == expired_at
    assert swept.get(f"/receipt/{created['receipt_key']}").json()["status"] == "expired"
    assert swept.read(live).json() == {"secret": "hello"}
    until(lambda: swept.cached("key", key) is None)
    assert 240 <= swept.cached_seconds("secret", key) <= 300


@pytest.mark.parametrize("rows", [5_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_two_services_end_and_log_each_secret_once(swept: Vault, rows: int) -> None:
    expired = """
        insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, created_at, expires_at)
        select gen_random_uuid(), 'x', 'x', 'x', now() - interval '2 days', now() - interval '1 day'
        from generate_series(1, $1)
    """
    ends = "select count(*), count(distinct secret_id) from secret_logs where action = 'expired'"
    swept.database.rows(expired, rows)
    assert swept.read(swept.key("hello")).json() == {"secret": "hello"}  # meanwhile
    until(lambda: swept.database.value("select count(*) from secrets where expires_at <= now()") == 0, 60)
    ended, distinct = swept.database.rows(ends)[0]
    assert ended == distinct >= rows


def test_log_rows_end_after_their_retention(swept: Vault) -> None:
    old, young = UUID(int=secrets.randbits(128)), UUID(int=secrets.randbits(128))
    statement = """
        insert into secret_logs (id, secret_id, action, created_at)
        overriding system value
        values (-2, $1, 'read', now() - interval '91 days'), (-1, $2, 'read', now() - interval '89 days')
    """
    swept.database.rows(statement, old, young)
    remaining = "select secret_id from secret_logs where secret_id = any($1)"
    until(lambda: [row["secret_id"] for row in swept.database.rows(remaining, [old, young])] == [young])


# --- Quota, tokens, start, encryption keys -----------------------------------------------------------------------


def fill_quota(limited: Vault, size: int, count: int) -> tuple[str, list[Response]]:
    """A new address, and the answers to its first creations: all in one minute, for the quota goes by the clock."""
    while True:
        minute, address = time.time() // 60, f"2001:db8:{secrets.token_hex(2)}:{secrets.token_hex(2)}::1"
        answers = [limited.create_from(address, secret="x" * size) for _ in range(count)]
        if time.time() // 60 == minute:
            return address, answers


def test_creation_over_the_quota_of_an_address_is_refused_and_not_stored(database: Database) -> None:
    with serving(database, FORWARDED_ALLOW_IPS="127.0.0.1", CREATE_QUOTA_KIB_PER_MINUTE="4") as limited:
        address, answers = fill_quota(limited, 1, 5)  # each counts as 1 KiB
        assert [answer.status_code for answer in answers] == [201, 201, 201, 201, 429]
        problem(answers[-1], 429, "rate_limited")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert database.value("select count(*) from secret_logs where ip_address = $1::text::inet", address) == 4
        _, others = fill_quota(limited, 2000, 3)
        assert [answer.status_code for answer in others] == [201, 201, 429]
        reading = limited.get(f"/secret/{answers[0].json()['secret_key']}", headers={"X-Forwarded-For": address})
        assert reading.status_code == 200
        mapped = [limited.create_from(one).status_code for one in ("192.0.2.7", "::ffff:192.0.2.7") * 6]
        assert 4 <= mapped.count(201) <= 8  # they share it, and the minute may turn once
        assert limited.create_from("::ffff:192.0.2.8").status_code == 201


def test_creation_needs_one_of_the_tokens_and_reading_needs_none(database: Database) -> None:
    bad = ("", "a-token", "Bearer", "Bearer a", f"Bearer {CANARY}", "Bearer a-token, b-token", "Basic a-token")
    with serving(database, API_TOKENS="a-token, b-token") as vault:
        before = database.counts()
        for headers in ({}, *({"Authorization": value} for value in bad)):
            response = vault.post("/secret", content=CREATION, headers=headers)
            problem(response, 401, "token_required")
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert CANARY not in response.text
        assert database.counts() == before
        for value in ("Bearer a-token", "Bearer b-token", "bearer a-token"):
            created = vault.post("/secret", content=CREATION, headers={"Authorization": value})
            assert vault.read(created.json()["secret_key"]).json() == {"secret": "a secret"}


BAD_SETTINGS: Final = [
    *(("POSTGRES_PORT", CANARY), ("REDIS_PORT", "0"), ("REDIS_URL", f"nonsense://user:{CANARY}@localhost")),
    *(("PORT", CANARY), ("WORKERS", "x"), ("PUBLIC_URL", CANARY), ("CREATE_QUOTA_KIB_PER_MINUTE", "-1")),
    *(("MAX_TTL_SECONDS", "0"), ("DEFAULT_TTL_SECONDS", "604801"), ("MAX_SECRET_BYTES", "-1")),
    *(("CACHE_SECONDS", "200"), ("CLEANUP_INTERVAL_SECONDS", "nan"), ("LOG_RETENTION_DAYS", CANARY)),
    *(("ENCRYPTION_KEY", text) for text in (",", CANARY, f"{ENCRYPTION_KEY},{CANARY}", ENCRYPTION_KEY[:-2], "ł" * 44)),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_bad_setting_stops_the_start_with_a_line_that_names_it(database: Database, name: str, value: str) -> None:
    line = database.refused_start(**{name: value})
    assert name in line
    assert CANARY not in line
    assert ENCRYPTION_KEY[:-2] not in line


OLD_SECRET: Final = r"""
    insert into secrets (key_fingerprint, id, passphrase_scope, passphrase_salt, passphrase_verifier,
        ciphertext, wrapped_key, expires_at)
    values ('113c41147dcd58dc', '00010203-9770-3f6e-9e12-c25b6ad14c59', 'read', '\x000102030405060708090a0b0c0d0e0f',
        '\x0b5b242e814cae80fc16212a1356d18737fd8c9b8c625228e946bef91208c535',
        'gAAAAABrAc54Au1BObynGcWKYhk2iQFmJ_uFF3HipUlQTx6i5-wK7pR5kC6nK1tRvVl90WHif7QgRQWYoma40H1wUX4bxHOfyg==',
        'gAAAAABrAc54Xaqm2U2pkmUA71Bm0Kvfg1dtfshXixwLbVjDiO8qUUYdy249OxBpO4Na_KWBVvjkj0ry-7'
        'CU5tEhuJ1g0i1oVqCYOwoYN5YkcKtYR9m34qVLFuLjQg7w2pwoZeUTK_xk', now() + interval '1 hour')
"""


def test_missing_tables_stop_the_start_and_those_of_the_first_release_are_taken_on(database: Database) -> None:
    empty, used = database.fresh(empty=True), database.fresh()
    used.rows("alter table encryption_keys rename needed_until to first_used_at")  # the tables as they were
    used.rows("insert into encryption_keys (fingerprint) values ($1)", OPERATORS_KEY.fingerprint)
    used.rows(OLD_SECRET)
    assert ["schema.sql" in one.refused_start() for one in (empty, used)] == [True, True]
    for _ in range(2):
        used.load_schema()
    assert used.value("select needed_until = expires_at from encryption_keys, secrets")
    assert used.refused_start(ENCRYPTION_KEY=Fernet.generate_key().decode())
    with serving(used) as vault:
        problem(vault.read(OLD_KEY, "right"), 403, "wrong_passphrase")
        assert vault.read(OLD_KEY, "Żółw").json() == {"secret": "hello"}


@contextmanager
def server_setting(database: Database, **settings: str) -> Iterator[None]:
    """The whole server's own defaults are these meanwhile."""
    for name, value in settings.items():
        database.rows(f"alter system set {name} = '{value}'")
    database.rows("select pg_reload_conf()")
    try:
        until(lambda: all(database.value(f"show {name}") == value for name, value in settings.items()))
        yield
    finally:
        database.rows("alter system reset all")
        database.rows("select pg_reload_conf()")


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
def test_server_that_may_lose_what_it_acknowledged_stops_the_start(database: Database, name: str) -> None:
    with server_setting(database, **{name: "off"}):
        assert name in database.refused_start()


def test_start_beside_many_unread_secrets_reads_none_of_them(database: Database) -> None:
    used, read = database.fresh(), "select seq_tup_read + idx_tup_fetch from pg_stat_user_tables where relname = $1"
    used.rows("""
        insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, expires_at)
        select gen_random_uuid(), '', '', 'of another key', now() + interval '1 day' from generate_series(1, 50000)
    """)
    before = used.value(read, "secrets")
    with serving(used):
        pass
    assert used.value(read, "secrets") - before < 100


def test_node_of_a_redis_cluster_stops_the_start(database: Database, tmp_path: Path) -> None:
    ports = {"port": str(local.free_port()), "cluster-port": str(local.free_port())}
    node = local.Valkey(tmp_path / "node", tmp_path, {"cluster-enabled": "yes", "bind": "127.0.0.1", **ports})
    node.start()
    try:
        assert "REDIS_URL" in database.refused_start(REDIS_URL=f"unix://{node.socket}")
    finally:
        node.stop()


@pytest.mark.parametrize("settings", [{"REDIS_URL": "unix:///no/such/socket"}, {"REDIS_URL": "", "REDIS_PORT": "1"}])
def test_missing_redis_is_a_warning(database: Database, tmp_path: Path, settings: dict[str, str]) -> None:
    with serving(database, tmp_path / "log", **settings) as vault:
        assert vault.get("/health").json() == {"status": "degraded", "postgres": "up", "redis": "down"}
        assert vault.read(vault.key("hello")).json() == {"secret": "hello"}
        assert "WARNING Redis" in vault.log.read_text()


def test_encryption_key_is_rotated_by_putting_a_new_one_in_front(database: Database) -> None:
    rotated, new, old = database.fresh(), Fernet.generate_key().decode(), Fernet.generate_key().decode()
    fingerprints = [main.parse_encryption_keys(key)[0].fingerprint for key in (new, old)]
    with serving(rotated, ENCRYPTION_KEY=old) as vault:
        plain, locked = vault.key("hello"), vault.key("hello", **TO_READ)
    with serving(rotated, ENCRYPTION_KEY=f" {new}, {old},") as vault:
        assert vault.read(plain).json() == vault.read(locked, "right").json() == {"secret": "hello"}
        vault.create()
        assert rotated.value("select key_fingerprint from secrets") == fingerprints[0]
        line = rotated.refused_start(ENCRYPTION_KEY=new)
        assert all(word in line for word in (fingerprints[1], "ENCRYPTION_KEY", "encryption_keys"))  # and what to do
        assert not [key for key in (old, new) if key in line]
    rotated.rows("update encryption_keys set needed_until = now() where fingerprint = $1", fingerprints[1])
    with serving(rotated, ENCRYPTION_KEY=new) as vault:
        assert vault.read(vault.key()).status_code == 200


def test_key_file_is_made_private_and_never_overwritten(database: Database, tmp_path: Path) -> None:
    fresh, file = database.fresh(), tmp_path / "encryption_key"
    with serving(fresh, ENCRYPTION_KEY="", ENCRYPTION_KEY_FILE=str(file), WORKERS="2") as vault:
        key = vault.key("hello")
    made = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with serving(fresh, ENCRYPTION_KEY="", ENCRYPTION_KEY_FILE=str(file)) as vault:
        assert vault.read(key).json() == {"secret": "hello"}
    assert file.read_text() == made
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", ["", CANARY, "\n"])
def test_damaged_key_file_stops_the_start_and_stays_as_it_is(database: Database, tmp_path: Path, content: str) -> None:
    file = tmp_path / "encryption_key"
    file.write_text(content)
    for path in (file, tmp_path / "no" / "such" / "folder"):
        line = database.refused_start(ENCRYPTION_KEY="", ENCRYPTION_KEY_FILE=str(path))
        assert ("ENCRYPTION_KEY_FILE" in line, CANARY in line) == (True, False)
    assert file.read_text() == content


def test_of_two_services_with_different_keys_started_at_once_one_is_refused(database: Database) -> None:
    other = {"ENCRYPTION_KEY": Fernet.generate_key().decode()}
    assert len(database.fresh().refusals({}, other)) == 1


def test_start_waits_for_another_one_that_is_about_to_note_its_key(database: Database) -> None:
    fresh, noting = database.fresh(), "insert into encryption_keys values ('its fingerprint', 'infinity')"
    with ThreadPoolExecutor(1) as pool:
        with another_session(fresh, noting, commit=True):
            starting = pool.submit(fresh.refused_start)
            until(lambda: fresh.value(BLOCKED.replace("secret_logs", "encryption_keys")) == 1)
        assert "its fingerprint" in starting.result()


def test_services_started_at_once_make_one_key(database: Database, tmp_path: Path) -> None:
    fresh, settings = database.fresh(), {"ENCRYPTION_KEY": "", "ENCRYPTION_KEY_FILE": str(tmp_path / "encryption_key")}
    assert fresh.refusals(settings, settings, settings) == []
    assert [file.name for file in tmp_path.iterdir()] == ["encryption_key"]
    assert fresh.value("select count(*) from encryption_keys") == 1


def test_start_killed_while_it_makes_the_key_leaves_nothing_in_the_way(database: Database, tmp_path: Path) -> None:
    fresh, file = database.fresh(), tmp_path / "encryption_key"
    settings = {"ENCRYPTION_KEY": "", "ENCRYPTION_KEY_FILE": str(file)}
    start = "import os, main; main.os.link = lambda *_: os.kill(os.getpid(), 9); main.main()"
    for _ in range(2):
        assert fresh.start(["-c", start], subprocess.DEVNULL, **settings).process.wait(30) == -signal.SIGKILL
    assert (len(list(tmp_path.iterdir())), file.exists()) == (2, False)
    with serving(fresh, **settings) as vault:
        assert vault.read(vault.key("hello")).json() == {"secret": "hello"}


def test_passphrase_costs_no_attempt_where_the_key_is_not_at_hand(database: Database) -> None:
    fresh = database.fresh()
    with serving(fresh) as vault:
        key = vault.key("hello", **TO_READ)
        fresh.rows("delete from encryption_keys")  # given up
        with serving(fresh, ENCRYPTION_KEY=Fernet.generate_key().decode()) as other:
            for _ in range(7):
                problem(other.read(key, "right"), 503, "unavailable")
        assert fresh.value("select attempts from secrets") == 0
        assert vault.read(key, "right").json() == {"secret": "hello"}


# --- Races -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("readers", "guard"), [(50, {}), (5, TO_READ)])
@pytest.mark.parametrize("flushed", [True, False])
def test_secret_is_read_exactly_once(two_workers: Vault, flushed: bool, readers: int, guard: Document) -> None:
    body = json.dumps({"passphrase": guard.get("passphrase")})
    for number in range(10):
        key = two_workers.key(f"secret {number}", **guard)
        if flushed:
            two_workers.redis.flushall()
        answers = at_once(two_workers, [("POST", f"/secret/{key}", body)] * readers)
        assert [body for status, body in answers if status == 200] == [{"secret": f"secret {number}"}]
        codes = {body["code"] for status, body in answers if status != 200}
        assert codes <= ({"already_read", "unavailable"} if guard else {"already_read"})


def test_of_readers_and_deleters_in_any_order_one_wins_each_secret(two_workers: Vault) -> None:
    dice = random.Random(0)  # noqa: S311 - an order, not a key
    for _ in range(5):
        made = at_once(two_workers, [("POST", "/secret", json.dumps({"secret": f"secret {n}"})) for n in range(40)])
        texts = {body["secret_key"]: f"secret {number}" for number, (_, body) in enumerate(made)}
        keys = [key for _ in range(6) for key in dice.sample(list(texts), len(texts))]
        calls: list[Call] = [(dice.choice(["GET", "GET", "DELETE"]), f"/secret/{key}", None) for key in keys]
        answers = at_once(two_workers, calls)
        won = [(key, body) for key, (status, body) in zip(keys, answers, strict=True) if status == 200]
        assert sorted(key for key, _ in won) == sorted(texts)
        assert all(body.get("secret") in (None, texts[key]) for key, body in won)
        assert all(two_workers.actions(key)[1:] == ["read" if "secret" in body else "deleted"] for key, body in won)
        assert {status for status, _ in answers} == {200, 410}
    assert b"deadlock" not in two_workers.stores.postgres.log.read_bytes()


def test_readers_and_cleanup_end_a_secret_once(swept: Vault) -> None:
    key = swept.key()
    swept.database.rows("update secrets set expires_at = now() + interval '30 ms' where id = $1", id_of(key))
    answers = [swept.read(key).status_code for _ in range(50)]
    assert answers in ([200] + [410] * 49, [410] * 50)
    until(lambda: swept.actions(key) == ["created", "read" if 200 in answers else "expired"])


@contextmanager
def another_session(database: Database, statement: str, *, commit: bool = False) -> Iterator[None]:
    """Inside, another session has executed this and not committed it; the end undoes it, or commits."""
    with asyncio.Runner() as runner:
        session = runner.run(database.connect())
        runner.run(session.execute(f"begin; {statement}"))
        try:
            yield
            if commit:
                runner.run(session.execute("commit"))
        finally:
            runner.run(session.close())


def test_read_outwaits_a_statement_that_holds_the_row_and_a_long_one_is_a_503(vault: Vault) -> None:
    key, other = vault.key("hello"), vault.key()
    holding = f"select from secrets where id = '{id_of(key)}' for update"
    with another_session(vault.database, holding):
        answers = at_once(vault, [("GET", f"/secret/{key}", None), ("GET", f"/secret/{other}", None)])
        assert [body.get("code") for _, body in answers] == ["unavailable", None]  # and nobody else is held up
    with ThreadPoolExecutor(1) as reader:
        with another_session(vault.database, holding):
            reading = reader.submit(vault.read, key)
            time.sleep(0.1)  # so long does it take, of the 0.6 s that a reader waits
        assert reading.result().json() == {"secret": "hello"}


# --- Faults ------------------------------------------------------------------------------------------------------
#
# Callers create secrets all the time, and read, delete, revoke or leave them; some they race for. Meanwhile a store or
# a worker is broken. A ledger keeps what each caller was told. Once the fault is over, what is left is read, and then
# ledger and log must tell the same story. The long form of each fault prints its row of the README's table.


@contextmanager
def down(vault: Vault, break_it: Callable[[], object], mend_it: Callable[[], object]) -> Iterator[None]:
    """Inside, a server is gone, or hangs: it is there and says nothing."""
    break_it()
    try:
        yield
        assert vault.get("/health").json()["status"] != "ok"
    finally:
        mend_it()
        until(lambda: vault.get("/health").json()["status"] == "ok")


def processes_of(folder: Path) -> set[psutil.Process]:
    """Those that work in a folder, as a server and its children do, or for it, as local.py and its service do."""
    data_dir, found = {"DATA_DIR": str(folder)}.items(), psutil.process_iter(["cwd", "environ"])
    known = [(one, Path(one.info["cwd"] or "/"), (one.info["environ"] or {}).items()) for one in found]
    return {one for one, cwd, environment in known if cwd.is_relative_to(folder) or data_dir <= environment}


def kill_all(folder: Path) -> None:
    while running := processes_of(folder):  # again: one that is killed may just have started another
        for one in running:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def kill(server: local.Server) -> None:
    kill_all(server.folder)


def pause(server: local.Server) -> None:
    stopped: set[psutil.Process] = set()
    while fresh := processes_of(server.folder) - stopped:  # again: a child may have been on its way
        for one in fresh:
            with suppress(psutil.NoSuchProcess):
                one.suspend()
        stopped |= fresh


def resume(server: local.Server) -> None:
    for one in processes_of(server.folder):
        one.resume()


def killed(vault: Vault, server: local.Postgres | local.Valkey) -> AbstractContextManager[None]:
    return down(vault, lambda: kill(server), server.start)


def paused(vault: Vault, server: local.Postgres | local.Valkey) -> AbstractContextManager[None]:
    return down(vault, lambda: pause(server), lambda: resume(server))


@pytest.mark.parametrize(("fault", "code"), [(killed, "unavailable"), (paused, "outcome_unknown")])
def test_without_postgresql_all_is_503_and_nothing_happens(vault: Vault, fault: Callable[..., Any], code: str) -> None:
    created = vault.create("hello")
    path, receipt = f"/secret/{created['secret_key']}", f"/receipt/{created['receipt_key']}"
    looks = [("GET", f"{path}/status", None), ("GET", receipt, None), ("GET", "/health", None)]
    calls = [("DELETE", path, None), ("DELETE", receipt, None), *looks, *[("POST", "/secret", CREATION)] * 20]
    vault.read(vault.key())  # the next read finds the same connection, its statement prepared
    before = vault.database.counts()
    with fault(vault, vault.stores.postgres):
        problem(vault.get(path), 503, code)
        answers = at_once(vault, calls)  # while it is still down
        assert vault.get("/").status_code == 200  # it is alive
    assert {status for status, _ in answers} == {503}
    assert {body["code"] for _, body in answers[:2]} <= {code, "unavailable"}
    assert {body["code"] for _, body in answers[2:]} == {"unavailable"}
    assert vault.database.counts() == before
    assert vault.get(path).json() == {"secret": "hello"}


FATES: Final = ("read", "leave", "race", "leave", "delete", "leave", "revoke", "leave")
RACERS: Final = ("read", "read", "delete", "read", "revoke", "read")  # one a caller
FINE: Final = {200, 201, 410}  # the statuses of callers who notice nothing
UNANSWERED: Final = {"no answer", "outcome_unknown"}  # what they may hear although their claim was executed
Event: TypeAlias = tuple[str, str]  # as the log has it: the action, and the user agent, of which each claim has its own


@dataclass
class Ledger:
    created: dict[str, Document] = field(default_factory=dict)  # what was acknowledged, by its secret_key
    claims: dict[str, list[tuple[Event, str]]] = field(default_factory=dict)  # (what to log, the answer), each
    statuses: list[int] = field(default_factory=list)  # of every answer; 0: there was none
    contested: str = ""  # a secret_key that all race for

    def ask(self, client: Client, method: str, path: str, **options: Any) -> Response | None:
        response = None
        with suppress(TransportError):
            response = client.request(method, path, **options)
        self.statuses.append(response.status_code if response is not None else 0)
        return response

    def create(self, client: Client) -> str | None:
        text = secrets.token_hex(32)
        response = self.ask(client, "POST", "/secret", json={"secret": text})
        if response is None or response.status_code != 201:
            return None
        key = str(response.json()["secret_key"])
        self.claims[key] = []
        self.created[key] = {**response.json(), "secret": text}
        return key

    def claim(self, client: Client, how: str, key: str) -> None:
        """`how`: read, delete or revoke."""
        path = f"/receipt/{self.created[key]['receipt_key']}" if how == "revoke" else f"/secret/{key}"
        event = ("read" if how == "read" else "deleted", secrets.token_hex(8))
        response = self.ask(client, "GET" if how == "read" else "DELETE", path, headers={"User-Agent": event[1]})
        answer = "no answer"
        if response is not None:
            answer = response.json().get("code", "done")
            assert how != "read" or response.json().get("secret") in (None, self.created[key]["secret"])
        self.claims[key].append((event, answer))

    def complaints(self, key: str, logged: list[Event]) -> Iterator[str]:
        """What is wrong with a secret of which the log has these events, by the column of the README's table."""
        claims, ended = self.claims[key], logged[1:]
        done = [event for event, answer in claims if answer == "done"]
        told = [answer for event, answer in claims if event in ended]  # to those whose claim was executed
        if len(done) > 1 or len(told) > 1:
            yield "read twice"
        if [action for action, _ in logged[:1]] != ["created"] or len(ended) > 1 or done not in ([], ended):
            yield "wrong log"
        if not told:
            yield "lost"
        known = {"done", "unavailable", *UNANSWERED, *(GONE.get(action) for action, _ in ended)}
        if set(told) - {"done", *UNANSWERED} or {answer for _, answer in claims} - known:
            yield "told wrongly"


@contextmanager
def under_load(vault: Vault) -> Iterator[Ledger]:
    """Callers that are at it all the time: steadily, not as fast as it goes, because the faults are the subject."""
    ledger = Ledger()

    def call(client: Client, racer: str) -> Iterator[None]:
        contested = ""
        for fate in itertools.cycle(FATES):
            key = ledger.create(client)
            if key and fate == "race":
                ledger.contested = key
            elif key and fate != "leave":
                ledger.claim(client, fate, key)
            if contested != ledger.contested:
                contested = ledger.contested
                ledger.claim(client, racer, contested)
            yield

    with ExitStack() as calling:
        for racer in RACERS:
            client = calling.enter_context(Client(base_url=vault.url, trust_env=False, timeout=30))
            calling.enter_context(repeated(partial(next, call(client, racer)), 0.005))
        until(lambda: len(ledger.created) > 100)
        yield ledger


def judge(ledger: Ledger, vault: Vault, name: str) -> None:
    """Read what is left, then hold the ledger against the log."""
    until(lambda: vault.get("/health").status_code == 200)
    for key, claims in ledger.claims.items():
        if not any(answer == "done" for _, answer in claims):
            ledger.claim(vault, "read", key)
    statement = """
        select secret_id, action, extra_data ->> 'user_agent' from secret_logs where secret_id = any($1) order by id
    """
    logged: dict[UUID, list[Event]] = {id_of(key): [] for key in ledger.created}
    for id, action, agent in vault.database.rows(statement, list(logged)):
        logged[id].append((action, agent))
    found = Counter(one for key in ledger.created for one in ledger.complaints(key, logged[id_of(key)]))
    unanswered = sum(answer in UNANSWERED for claims in ledger.claims.values() for _, answer in claims)
    columns = [found[column] for column in ("lost", "read twice", "wrong log", "told wrongly")]
    print(f"| {name} | {' | '.join(f'{number:,}' for number in (len(ledger.created), *columns, unanswered))} |")
    assert not found, found


@contextmanager
def full_redis(vault: Vault) -> Iterator[None]:
    """No memory left, and nothing may be evicted: every write is answered with an error."""
    vault.redis.config_set("maxmemory", "1")
    try:
        yield
    finally:
        vault.redis.config_set("maxmemory", "0")


@contextmanager
def exhausted_postgres(vault: Vault) -> Iterator[None]:
    """Somebody else takes every connection, and the service's own are ended."""
    with ExitStack() as sessions:
        sessions.enter_context(another_session(vault.database, END_SESSIONS))
        with suppress(asyncpg.TooManyConnectionsError):
            while True:
                sessions.enter_context(another_session(vault.database, "select"))
        yield


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


def restarted(server: local.Postgres | local.Valkey) -> AbstractContextManager[None]:
    def restart() -> None:
        kill(server)
        time.sleep(0.5)  # so long it is gone
        server.start()

    return repeated(restart, 1)


def workers_of(vault: Vault) -> list[int]:
    """uvicorn's children, without the one that only keeps count of shared resources."""
    children = (one for one in psutil.process_iter(["ppid", "cmdline"]) if one.info["ppid"] == vault.process.pid)
    return [one.pid for one in children if "spawn_main" in " ".join(one.info["cmdline"] or [])]


def killed_workers(vault: Vault) -> AbstractContextManager[None]:
    def kill_one() -> None:
        os.kill(random.choice(workers_of(vault)), signal.SIGKILL)  # noqa: S311 - no cryptography
        until(lambda: len(workers_of(vault)) == 2)

    return repeated(kill_one, 0.5)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def frozen_workers(vault: Vault) -> AbstractContextManager[None]:
    def freeze() -> None:
        with stopped(*workers_of(vault)):
            time.sleep(2.2)  # beyond all their alarms

    return repeated(freeze, 0.5)


NO_STANDBY: Final = {"synchronous_standby_names": "nobody"}
Fault: TypeAlias = Callable[[Vault], AbstractContextManager[None]]
FAULTS: Final[dict[str, tuple[Fault, set[int]]]] = {  # by their name in the table; all statuses that callers may get
    "Redis flushed every 100 ms": (lambda vault: repeated(vault.redis.flushall, 0.1), FINE),
    "Redis killed with -9, restarted empty": (lambda vault: restarted(vault.stores.valkey), FINE),
    "Redis hung (SIGSTOP)": (lambda vault: paused(vault, vault.stores.valkey), FINE),
    "Redis full, refusing writes": (full_redis, FINE),
    "PostgreSQL killed with -9, restarted": (lambda vault: restarted(vault.stores.postgres), FINE | {503}),
    "PostgreSQL hung (SIGSTOP)": (lambda vault: paused(vault, vault.stores.postgres), FINE | {503}),
    "PostgreSQL out of connections": (exhausted_postgres, FINE | {503}),
    "all sessions ended": (lambda vault: repeated(lambda: vault.database.rows(END_SESSIONS), 0.02), FINE | {503}),
    "synchronous standby lost": (lambda vault: server_setting(vault.database, **NO_STANDBY), FINE | {503}),
    "workers frozen for 2.2 s (SIGSTOP)": (frozen_workers, FINE | {503}),
    "workers killed with -9, one after another": (killed_workers, FINE | {0, 503}),
}


@pytest.mark.parametrize("seconds", [2.5, pytest.param(60, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_loses_nothing_and_tells_nobody_anything_wrong(two_workers: Vault, name: str, seconds: float) -> None:
    fault, allowed = FAULTS[name]
    with under_load(two_workers) as ledger:
        with fault(two_workers):
            answered = len(ledger.statuses)
            time.sleep(seconds)
            until(lambda: len(ledger.statuses) > answered + 2 * len(RACERS))  # nobody waits until it is over
        created = len(ledger.created)
        until(lambda: len(ledger.created) > created + 20)  # it recovers by itself
    judge(ledger, two_workers, name)
    assert FINE <= set(ledger.statuses) <= allowed


def test_acknowledged_secrets_outlive_a_kill_whatever_the_servers_default(two_workers: Vault) -> None:
    with server_setting(two_workers.database, synchronous_commit="off", wal_writer_delay="9999ms"):
        two_workers.database.rows(END_SESSIONS)
        with under_load(two_workers) as ledger, killed(two_workers, two_workers.stores.postgres):
            pass
    judge(ledger, two_workers, "PostgreSQL killed with -9, synchronous_commit = off")


def test_claim_whose_answer_does_not_come_has_an_unknown_outcome(two_workers: Vault) -> None:
    key = two_workers.key()
    with server_setting(two_workers.database, **NO_STANDBY):
        problem(two_workers.get(f"/secret/{key}"), 503, "outcome_unknown")
    until(lambda: two_workers.status(key).json().get("code") == "already_read")


def test_worker_that_was_frozen_hands_out_the_answer_that_has_arrived(vault: Vault) -> None:
    key = vault.key("hello")
    with ThreadPoolExecutor(1) as other, ExitStack() as frozen:
        with another_session(vault.database, LOCK_LOG):
            reading = other.submit(vault.get, f"/secret/{key}")
            until(lambda: vault.database.value(BLOCKED) == 1)
            frozen.enter_context(stopped(vault.process.pid))
        until(lambda: vault.actions(key) == ["created", "read"])
        time.sleep(2.2)  # beyond all its alarms
        frozen.close()
        assert reading.result().json() == {"secret": "hello"}


def ask_and_leave(vault: Vault, *requests: bytes) -> None:
    for request in requests:
        with connect(vault) as connection:
            connection.sendall(request)


def test_readers_who_left_before_their_claim_was_sent_have_read_nothing(vault: Vault) -> None:
    first, *keys = [vault.key() for _ in range(21)]
    requests = [f"GET /secret/{key} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for key in keys]
    with stopped(vault.process.pid):
        ask_and_leave(vault, *requests[:10])
    with ThreadPoolExecutor(1) as other:
        with another_session(vault.database, LOCK_LOG):
            reading = other.submit(vault.get, f"/secret/{first}")
            until(lambda: vault.database.value(BLOCKED) == 1)
            ask_and_leave(vault, *requests[10:])  # while a batch is under way
        assert reading.result().status_code == 200
    assert [vault.status(key).status_code for key in keys] == [200] * 20
    assert {vault.read(key).status_code for key in keys} == {200}


def test_terminated_service_answers_what_it_has_begun(two_workers: Vault) -> None:
    with serving(two_workers.database, WORKERS="2") as vault:
        with under_load(vault) as ledger:
            vault.process.terminate()
            assert vault.process.wait(10) in (0, -signal.SIGTERM)
        assert workers_of(vault) == []
    judge(ledger, two_workers, "SIGTERM")
    assert set(ledger.statuses) <= FINE | {0}


# --- PostgreSQL that fails over ----------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A primary and its synchronous standby, which every switch makes the primary."""

    first: local.Postgres
    second: local.Postgres
    database: Database  # of whichever takes writes
    promoted: Database  # of the second alone


@pytest.fixture
def pair(database: Database, tmp_path: Path) -> Iterator[Pair]:
    tmp_path.chmod(0o711)  # nobody may have to enter
    first, second = (local.Postgres(tmp_path / one, tmp_path / f"{one}-socket") for one in ("first", "second"))
    for server in (first, second):
        server.socket_folder.mkdir()
    try:
        first.start()
        first.load(HERE / "schema.sql")
        second.folder.mkdir(mode=0o700)
        shutil.chown(second.folder, first.folder.owner())
        copy = ("-Rc", "fast", "-h", first.socket_folder, "-U", "postgres", "-D", second.folder)
        second.run("pg_basebackup", *copy)
        second.start()
        hosts = (f"{first.socket_folder}", f"{first.socket_folder},{second.socket_folder}", f"{second.socket_folder}")
        environments = [{**database.environment, "POSTGRES_HOST": host} for host in hosts]
        primary, both, promoted = (Database(database.stores._replace(environment=one)) for one in environments)
        primary.rows("alter system set wal_keep_size = '256MB'")  # for pg_rewind, which recovers by this file
        primary.rows("alter system set synchronous_standby_names = '*'")
        primary.rows("select pg_reload_conf()")
        until(lambda: bool(primary.rows("select from pg_stat_replication where sync_state = 'sync'")))
        yield Pair(first, second, both, promoted)
    finally:
        for server in (first, second):
            kill(server)


def rejoin(pair: Pair, *, rewind: bool) -> None:
    """The old primary, which is the first one asked, comes back as a standby; and the service has to connect anew."""
    source = f"host={pair.second.socket_folder} user=postgres dbname=postgres"
    if rewind:
        (pair.first.folder / "postmaster.pid").unlink()
        pair.first.run("pg_rewind", "-RD", pair.first.folder, "--source-server", source)
    else:
        (pair.first.folder / "standby.signal").touch()
    local.Postgres(pair.first.folder, pair.first.socket_folder, {"primary_conninfo": source}).start()
    pair.promoted.rows(END_SESSIONS)


@pytest.mark.parametrize(
    ("lose", "rewind"),
    [
        pytest.param(kill, None, id="killed"),
        pytest.param(kill, True, id="killed, then rejoining", marks=pytest.mark.soak),
        pytest.param(local.Postgres.stop, False, id="planned, the old one back", marks=pytest.mark.soak),
        pytest.param(pause, None, id="frozen", marks=pytest.mark.soak),
    ],
)
def test_service_goes_on_after_a_promotion(pair: Pair, lose: Callable[[Any], None], rewind: bool | None) -> None:
    def goes_on(ledger: Ledger, after: str) -> None:
        moment, count = time.monotonic(), len(ledger.created)
        until(lambda: len(ledger.created) > count)
        print(f"{after}: it goes on after {time.monotonic() - moment:.2f} s")
        until(lambda: len(ledger.created) > count + 200)

    with serving(pair.database, WORKERS="2") as vault:
        with under_load(vault) as ledger:
            lose(pair.first)
            until(lambda: vault.get("/health").status_code == 503)  # nothing can be written
            pair.second.run("pg_ctl", "promote", "-wD", pair.second.folder)
            goes_on(ledger, f"promotion after {lose.__name__}")
            if rewind is not None:
                rejoin(pair, rewind=rewind)
                goes_on(ledger, "return of the old primary")
        vault.database = pair.promoted
        judge(ledger, vault, f"PostgreSQL fails over: {lose.__name__}")
    assert set(ledger.statuses) <= FINE | {503}


# --- local.py ----------------------------------------------------------------------------------------------------


def start_local_py(folder: Path, port: int) -> "subprocess.Popen[str]":
    """`python3 local.py` with its data in this folder."""
    settings = {**os.environ, **SETTINGS, "ENCRYPTION_KEY": "", "DATA_DIR": str(folder), "PORT": str(port)}
    command, output = [sys.executable, "local.py"], subprocess.PIPE
    return subprocess.Popen(command, cwd=HERE, env=settings, stdout=output, stderr=subprocess.STDOUT, text=True)


@contextmanager
def laptop(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", Client, str]]:
    """The same, once it has shown its curl line: the process, a client, and the path of a secret made by that line."""
    port = local.free_port()
    with start_local_py(folder, port) as process:
        try:
            line = next(line for line in process.stdout or [] if line.strip().startswith("curl"))
            program, option, body, url = shlex.split(line)
            assert (program, option) == ("curl", "-d")
            form = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl labels it
            with Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                created = client.post(url, content=body, headers=form).json()
                assert created["url"] == f"{client.base_url}/#{created['secret_key']}"
                yield process, client, f"/secret/{created['secret_key']}"
        finally:
            process.terminate()
            process.wait(20)
            kill_all(folder)  # something is left only after a test that failed


def line_of_refusal(process: "subprocess.Popen[str]") -> str:
    (line,) = process.communicate(timeout=20)[0].splitlines()
    assert process.returncode not in (0, None)
    return line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_local_py_leaves_no_process_and_keeps_the_data(tmp_path: Path, number: signal.Signals) -> None:
    with laptop(tmp_path) as (process, _, path):
        assert len(processes_of(tmp_path)) >= 4
        process.send_signal(number)
        process.wait(20)
        assert processes_of(tmp_path) == set()
    with laptop(tmp_path) as (_, client, _):
        assert client.get(path).json() == {"secret": "hello"}


def test_local_py_starts_again_after_a_kill_of_everything(tmp_path: Path) -> None:
    with laptop(tmp_path) as (process, _, path):
        kill_all(tmp_path)
        process.wait(20)
        with laptop(tmp_path) as (_, client, _):
            assert client.get(path).json() == {"secret": "hello"}


def test_what_a_killed_local_py_left_is_named_and_then_used(tmp_path: Path) -> None:
    with laptop(tmp_path) as (process, client, path):
        servers = [psutil.Process(int(file.read_text().split()[0])) for file in tmp_path.glob("*/*.pid")]
        process.kill()
        process.wait(20)
        line = line_of_refusal(start_local_py(tmp_path, local.free_port()))
        assert client.get("/health").json()["status"] == "ok"
        left = psutil.Process(int(re.findall(r"process (\d+)", line)[0]))
        left.terminate()
        until(lambda: left not in processes_of(tmp_path))
        with laptop(tmp_path) as (_, again, _):
            assert again.get(path).json() == {"secret": "hello"}
            assert [server.is_running() for server in servers] == [True, True]
        assert processes_of(tmp_path) == set()


def test_two_local_py_run_side_by_side_but_not_on_one_folder(tmp_path: Path) -> None:
    with laptop(tmp_path / "one") as (_, one, path), laptop(tmp_path / "two") as (_, two, _):
        problem(two.get(path), 404, "not_found")
        assert "DATA_DIR" in line_of_refusal(start_local_py(tmp_path / "one", local.free_port()))
        assert one.get(path).json() == {"secret": "hello"}


def test_local_py_on_a_taken_port_says_so_in_one_line(tmp_path: Path, vault: Vault) -> None:
    assert "PORT" in line_of_refusal(start_local_py(tmp_path, vault.base_url.port or 0))
    assert processes_of(tmp_path) == set()


# --- Stolen data -------------------------------------------------------------------------------------------------
#
# A hundred secrets are stored, a third of them read; then every error is provoked. The thief copies everything:
# PostgreSQL and its disk, the cache and its snapshot, every log, each error that a caller was told, the encryption key.


def found(traces: Iterable[bytes], haystack: bytes) -> list[bytes]:
    return [trace for trace in traces if trace in haystack]


def forms(*texts: str) -> list[bytes]:
    """A text as it may stand somewhere: as it is, cut short, in base64 or hex, and, where it is a key, as the bytes of
    it, also as Python shows them, and without their time."""
    keys = [raw(text) for text in texts if re.fullmatch(r"[\w-]{32}|[\w-]{43}=", text)]
    plain = [*(text.encode() for text in texts), *keys]
    plain += [*(base64.b64encode(text)[:-4] for text in plain), *(text.hex().encode() for text in plain)]
    plain += [*(repr(key)[2:-1].encode() for key in keys), *(key[4:] for key in keys)]
    return [*plain, *(text[:12].encode() for text in texts)]


def keys_of(created: Iterable[Document]) -> list[str]:
    return [document[name] for document in created for name in ("secret_key", "receipt_key")]


def canaries(*names: str) -> list[str]:
    return [f"canary-{name}-{secrets.token_hex(8)}" for name in names]


@dataclass(frozen=True)
class Kept:
    """What the creator of a secret knows of it."""

    text: str
    passphrase: str
    scope: str | None
    was_read: bool
    keys: Sequence[str]
    secret_key: Any
    id: UUID


@dataclass(frozen=True)
class Loot:
    kept: Sequence[Kept]
    needles: Sequence[str]  # what was said to the service, of which nothing may be found
    everything: bytes
    cache: bytes
    cached: dict[str, bytes]  # what the cache holds, by name
    rows: dict[UUID, Any]  # of those that can still be read


def keep(vault: Vault, number: int) -> Kept:
    """A secret, with a passphrase of either scope or none; a third of them is read."""
    text, passphrase = canaries("secret", "passphrase")
    scope = {0: "read", 1: "delete"}.get(number % 5)
    members = {"passphrase": passphrase, "passphrase_scope": scope} if scope else {}
    created, is_read = vault.create(text, **members), number % 3 == 0
    key = created["secret_key"]
    if is_read:
        assert vault.read(key, passphrase).json() == {"secret": text}
    return Kept(text, passphrase, scope, is_read, keys_of([created]), raw(key), id_of(key))


def provoke(vault: Vault, secret: str, right: str, wrong: str) -> tuple[list[str], bytes]:
    """Drive every error of the API with these. Returns the keys that took part, and what the errors said."""
    locked = {"passphrase": right, "passphrase_scope": "read"}
    with full_redis(vault):  # so that nothing of these is cached
        created = [vault.create(secret, **members) for members in (locked, locked, {}, {}, {}, {})]
    unread, guessed, read, deleted, expired, broken = (document["secret_key"] for document in created)
    vault.database.rows("update secrets set ciphertext = 'damaged' where id = $1", id_of(broken))
    vault.expire(expired)
    bodies: list[object] = [{"secret": secret * 10_000, "passphrase": right}, f"secret={secret}&passphrase={right}"]
    bodies += [{"secret": secret, "passphrase": right, "ttl_seconds": secret}, {"secret": secret + "\ud800"}]
    bodies += [{"secret": [secret], "passphrase": [right]}, {"secret": secret, "passphrase": {right: secret}}]
    calls: list[tuple[str, str, object]] = [
        *(("GET", f"/secret/{key}", None) for key in (unread, read, read, expired, broken, created[0]["receipt_key"])),
        *[("DELETE", f"/secret/{unread}", {"passphrase": wrong}), ("DELETE", f"/secret/{deleted}", None)],
        *[("POST", f"/secret/{guessed}", {"passphrase": wrong})] * 6,
        *(("GET", path, None) for path in (f"/secret/{deleted}/status", f"/secrets/{unread}", f"/x/{unread}/{secret}")),
        *[("PATCH", f"/secret/{unread}", {"passphrase": right}), ("POST", f"/secret/{unread}", secret)],
        ("GET", f"/health/{secret}?secret_key={unread}&passphrase={right}", None),
        *(("POST", path, body) for path in ("/secret", f"/secret/{unread}") for body in bodies),
    ]
    responses = [vault.request(method, path, content=json.dumps(body)) for method, path, body in calls]
    assert {response.status_code for response in responses} == {200, 403, 404, 405, 410, 413, 422, 429, 500}
    return keys_of(created), b"\n".join(response.content for response in responses if not response.is_success)


def files(folder: Path) -> bytes:
    """What is in all files under a folder, each 8 KiB block once: most of a new database is there three times."""
    blocks: dict[bytes, None] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        blocks.update((content[start : start + 8192], None) for start in range(0, len(content), 8192))
    return b"".join(blocks)


@pytest.fixture(scope="module")
def loot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loot]:
    folder = tmp_path_factory.mktemp("loot")
    with local.stores(folder / "stores") as stores, serving(Database(stores), folder / "log") as vault:
        kept, words = [keep(vault, number) for number in range(100)], canaries("secret", "right", "wrong")
        keys, errors = provoke(vault, *words)
        vault.database.rows("checkpoint")
        tables = [vault.database.rows("select * from secrets"), vault.database.rows("select * from secret_logs")]
        cells = [cell for rows in tables for row in rows for cell in row]
        values = [cell if isinstance(cell, bytes) else str(cell).encode() for cell in cells]
        vault.redis.config_set("rdbcompression", "no")
        vault.redis.save()
        names: Any = vault.redis.keys()
        cached: Any = {name.decode(): vault.redis.get(name) for name in names}
        cache = b"\n".join([*names, *cached.values(), files(stores.valkey.folder)])
        logs = [file.read_bytes() for file in (vault.log, stores.postgres.log, stores.valkey.log)]
        everything = b"\n".join([*values, cache, files(stores.postgres.folder), *logs, errors, ENCRYPTION_KEY.encode()])
    needles = [*words, *keys, *(word for each in kept for word in (each.text, *each.keys))]
    needles += [each.passphrase for each in kept if each.scope]
    yield Loot(kept, needles, everything, cache, cached, {row["id"]: row for row in tables[0]})


def test_thief_finds_no_text_no_passphrase_and_no_key(loot: Loot) -> None:
    places = [b" GET /secret/{secret_key} 410 ", b"ready to accept connections", b"Redis cannot answer, going on "]
    places += [b'"wrong_passphrase"', b'"damaged"']
    assert found(places, loot.everything) == places
    assert all(kept.id.bytes in loot.everything for kept in loot.kept)
    assert found(forms(*loot.needles), loot.everything) == []


def test_thief_has_no_key_that_opens_anything(loot: Loot) -> None:
    tokens = set(re.findall(rb"gAAAAA[\w-]{94,}={0,2}", loot.everything))
    keys = {ENCRYPTION_KEY.encode(), *re.findall(rb"[\w-]{43}=", loot.everything)}
    keys |= {base64.urlsafe_b64encode(kept.id.bytes * 2) for kept in loot.kept}
    assert len(tokens) >= 160
    assert [content for key in keys for content in opened(tokens, Fernet(key).decrypt)] == []


def test_thief_derives_no_key_that_opens_anything(loot: Loot) -> None:
    for id, row in loot.rows.items():
        for salt, material in itertools.product((b"", id.bytes, OPERATORS_KEY.raw), repeat=2):
            for info in (b"", id.bytes, main.WRAPPING_LABEL, main.WRAPPING_LABEL + id.bytes):
                derived = base64.urlsafe_b64encode(HKDF(SHA256(), 32, salt=salt, info=info).derive(material))
                assert opened([row["wrapped_key"]], Fernet(derived).decrypt) == []


def test_thief_finds_no_bytes_that_are_a_secret_key_or_a_receipt_key(loot: Loot) -> None:
    ids = {kept.id for kept in loot.kept}
    for time_bytes in {id.bytes[:4] for id in ids}:  # with these, all keys begin
        texts = re.findall(rb"(?=(%b[\w-]{27}))" % base64.urlsafe_b64encode(time_bytes)[:5], loot.everything)
        digits = re.findall(rb"(?=(%b[0-9a-f]{40}))" % time_bytes.hex().encode(), loot.everything)
        guesses = re.findall(rb"(?s)(?=(%b.{20}))" % re.escape(time_bytes), loot.everything)
        guesses += [raw(text.decode()) for text in texts] + [bytes.fromhex(text.decode()) for text in digits]
        assert len(guesses) >= 1
        assert not ids & {main.secret_id_of(key) for guess in guesses for key in (guess, main.secret_key_of(guess))}


def test_thief_with_a_link_opens_that_secret_unless_it_was_read_or_needs_a_passphrase(loot: Loot) -> None:
    pairs = set(re.findall(rb"(?s)(gAAAAA[\w-]+={0,2})[^\w-].{0,8}?(gAAAAA[\w-]{134})", loot.everything))
    cached_keys = set(re.findall(rb"gAAAAA[\w-]{134}", loot.cache))
    for kept in loot.kept:
        if not kept.was_read:
            salt = loot.rows[kept.id]["passphrase_salt"]
            key = b""
            if kept.scope == "read":
                key = main.stretch(kept.passphrase, salt, OPERATORS_KEY, kept.secret_key).passphrase_key
            assert set(unsealed(pairs, kept.secret_key, key)) == {kept.text.encode()}
        if kept.scope == "read":
            assert unsealed(pairs, kept.secret_key) == []
        cached = [loot.cached[name_in_redis("secret", kept.id)]]
        contents = set(unsealed(itertools.product(cached, cached_keys), kept.secret_key))
        assert contents == (set() if kept.was_read or kept.scope == "read" else {kept.text.encode()})


def test_thief_cannot_tell_a_right_passphrase(loot: Loot) -> None:
    for kept in loot.kept:
        if kept.scope and not kept.was_read:
            salt = loot.rows[kept.id]["passphrase_salt"]
            for guess in (main.SecretKey(b""), main.SecretKey(kept.id.bytes)):
                stretched = main.stretch(kept.passphrase, salt, OPERATORS_KEY, guess)
                assert found([stretched.passphrase_key, stretched.verifier], loot.everything) == []
            with_link = main.stretch(kept.passphrase, salt, OPERATORS_KEY, kept.secret_key)
            assert found([with_link.passphrase_key, with_link.verifier], loot.everything) == [with_link.verifier]


# --- Leaks while it works ----------------------------------------------------------------------------------------

# Shows, ten times a second, what asyncio and any log might: every future, task, handle, exception, and our own objects.
SHOW_ALL: Final = """
import asyncio, gc, sys, threading, time, asyncpg, main
shown = asyncio.Future, asyncio.Handle, BaseException, asyncpg.Record
def show():
    while True:
        time.sleep(0.1)
        gc.unfreeze()
        for one in gc.get_objects():
            if isinstance(one, asyncio.AbstractEventLoop):
                one.set_debug(True)  # which uvicorn switches off before Python 3.12
                one.slow_callback_duration = 0
            if isinstance(one, shown) or type(one).__module__ == "main":
                print("SHOWN", repr(one), file=sys.stderr)
threading.Thread(target=show, daemon=True).start()
"""


@pytest.mark.parametrize("start", ["main.main()", 'main.uvicorn.run(main.app, port=PORT, loop="asyncio")'])
@pytest.mark.parametrize("rounds", [4, pytest.param(12, marks=pytest.mark.soak)])
def test_nothing_in_flight_shows_a_secret_or_key(database: Database, tmp_path: Path, start: str, rounds: int) -> None:
    keys, passphrase = list[str](), "passphrase-of-somebody"
    guards: list[Document] = [{}, {"passphrase": passphrase, "passphrase_scope": "read"}]
    command, debug = ("-c", SHOW_ALL + start), {"PYTHONASYNCIODEBUG": "1"}
    with serving(database, tmp_path / "log", command, **debug) as vault, ThreadPoolExecutor(8) as pool:
        for number in range(rounds):
            keys += pool.map(lambda guard: vault.key(CANARY, **guard), guards * 4)
            with another_session(database, LOCK_LOG if number % 4 == 0 else "select"):
                reading = [pool.submit(vault.read, key, passphrase) for key in keys[-8:]]
                time.sleep(0.2)  # time for a look at what is under way
            assert {one.result().json().get("secret") for one in reading} == {CANARY}
        until(lambda: b"SHOWN <main.Wish" in vault.log.read_bytes())
    said = vault.log.read_bytes()
    assert said.count(b"SHOWN <Task") > 20
    assert found([b"Executing <", b"SHOWN EncryptionKey("], said) == [b"Executing <", b"SHOWN EncryptionKey("]
    assert found(forms(*keys, CANARY, passphrase, ENCRYPTION_KEY), said) == []


UVICORN: Final = ("-m", "uvicorn", "main:app", "--port", "PORT")
STARTS: Final = [
    *(("main.py",), UVICORN, (*UVICORN, "--log-level", "trace"), (*UVICORN, "--workers", "2")),
    ("-c", 'import main; main.uvicorn.run(main.app, port=PORT, log_level="trace")'),
]


@pytest.mark.parametrize("start", STARTS)
def test_no_line_holds_a_key_however_it_is_started(database: Database, tmp_path: Path, start: Sequence[str]) -> None:
    websocket = b"Connection: close, upgrade\r\nUpgrade: websocket\r\n"
    handshake = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==\r\n"
    with serving(database, tmp_path / "log", start) as vault:
        keys = [vault.key("hello") for _ in range(4)]
        for headers in (websocket, websocket + handshake):
            assert send(vault, GET.replace(b"CANARY", keys[0].encode()) + headers + b"\r\n", 5)
        assert vault.get(f"/secret/{keys[1]}").json() == {"secret": "hello"}
        assert vault.get(f"/secret/{keys[2]}?x=/{keys[2]}", headers={"Accept": BROWSER}).is_success
        assert vault.delete(f"/secret/{keys[3]}").is_success
    assert b"Uvicorn running" in vault.log.read_bytes()
    assert found(forms(*keys), vault.log.read_bytes()) == []


# --- Forced failures and damage ----------------------------------------------------------------------------------

LOCKED: Final = {"read with passphrase", "guess"}
SEALS: Final = LOCKED | {"create", "create raw", "create with passphrase"}  # what writes a row of secrets
ALL: Final = SEALS | {"read", "delete", "revoke"}
EACH_ROW: Final = "for each row execute function quote()"
BREAKAGES: Final = {  # what PostgreSQL fails of: (what mends it, what fails in between)
    "alter table secrets rename wrapped_key to gone": ("alter table secrets rename gone to wrapped_key", ALL),
    "alter table secret_logs rename to gone": ("alter table gone rename to secret_logs", ALL | {"status", "receipt"}),
    "revoke update, delete on secrets from clerk": ("grant update, delete on secrets to clerk", ALL),
    f"create trigger q before insert or update or delete on secrets {EACH_ROW}": ("drop trigger q on secrets", ALL),
    f"create trigger q before insert on secret_logs {EACH_ROW}": ("drop trigger q on secret_logs", ALL),
    "alter table secrets add check (false) not valid": ("alter table secrets drop constraint secrets_check", SEALS),
    "update secrets set expires_at = '290000-01-01'": ("delete from secrets", LOCKED | {"status", "receipt"}),
}


@pytest.fixture(scope="module")
def clerk(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    """A service whose database user may do what the service needs, and nothing else."""
    fresh, log = database.fresh(), tmp_path_factory.mktemp("clerk") / "log"
    fresh.rows("create role clerk login")
    fresh.rows("grant select, insert, update, delete on all tables in schema public to clerk")
    quoting = "$$ begin raise exception 'quoted % %', old, new; end $$"
    fresh.rows(f"create function quote() returns trigger language plpgsql as {quoting}")
    with serving(fresh, log, POSTGRES_USER="clerk", CLEANUP_INTERVAL_SECONDS="0.1") as vault:
        yield vault


def odd_lines(vault: Vault) -> list[str]:
    """Warnings and errors that are more than a class, a place, a code."""
    known = r"(GET|POST|DELETE) [a-z_/{}]+ 503 [\d.]+ ms|(PostgreSQL cannot answer|cleanup will be tried again): \w+"
    lines = [line for line in vault.log.read_text().splitlines() if not re.match(r"[\d-]+ \S+ (DEBUG|INFO) ", line)]
    return [line for line in lines if not re.fullmatch(rf"[\d-]+ \S+ WARNING ({known})( at [\w.:<> ]+)?", line)]


@pytest.mark.parametrize("fault", BREAKAGES)
def test_forced_failure_tells_nobody_anything_and_is_no_loss(clerk: Vault, fault: str) -> None:
    mend, failing = BREAKAGES[fault]
    secret, passphrase = canaries("secret", "passphrase")
    locked = {"passphrase": passphrase, "passphrase_scope": "read"}
    created = [clerk.create(secret, **members) for members in ({}, {}, {}, locked, locked)]
    plain, deleted, _, guarded, guessed = (document["secret_key"] for document in created)
    before = clerk.database.counts()
    clerk.database.rows(fault)
    try:
        answers = {
            "status": clerk.status(guarded),
            "receipt": clerk.get(f"/receipt/{created[0]['receipt_key']}"),
            "guess": clerk.read(guessed, passphrase.upper()),
            "read": clerk.get(f"/secret/{plain}"),
            "read with passphrase": clerk.read(guarded, passphrase),
            "delete": clerk.destroy(deleted),
            "revoke": clerk.revoke(created[2]),
            "create": clerk.post("/secret", json={"secret": secret}),
            "create raw": clerk.create_raw(secret.encode()),
            "create with passphrase": clerk.post("/secret", json={"secret": secret, "passphrase": passphrase}),
        }
    finally:
        clerk.database.rows(mend)
    assert {name for name, answer in answers.items() if answer.status_code >= 500} == failing
    for answer in (answers[name] for name in failing):
        problem(answer, 503, "unavailable")
    errors = b"\n".join(answer.content for answer in answers.values() if not answer.is_success)
    said = errors + clerk.log.read_bytes() + clerk.stores.postgres.log.read_bytes()
    assert found(forms(secret, passphrase, passphrase.upper(), *keys_of(created)), said) == []
    assert found([b"Traceback", b".py", b"quoted"], errors) == []
    assert odd_lines(clerk) == []
    if failing >= ALL:
        assert clerk.database.counts() == before
        assert clerk.read(plain).json() == {"secret": secret}


def test_failing_cleanup_tells_nothing_and_goes_on(clerk: Vault) -> None:
    key = clerk.key(CANARY)
    clerk.database.rows(f"create trigger q before delete on secrets {EACH_ROW}")
    try:
        clerk.expire(key)
        until(lambda: b"cleanup will be tried again: " in clerk.log.read_bytes())
    finally:
        clerk.database.rows("drop trigger q on secrets")
    until(lambda: "expired" in clerk.actions(key))
    assert odd_lines(clerk) == []


DAMAGES: Final = [
    *("ciphertext = other.ciphertext", "wrapped_key = other.wrapped_key"),
    "ciphertext = other.ciphertext, wrapped_key = other.wrapped_key",
    *(f"ciphertext = substr(mine.ciphertext, 1, length(mine.ciphertext) - {bytes})" for bytes in (1, 64)),
    *("ciphertext = ''", "wrapped_key = substr(mine.wrapped_key, 1, 100)"),
    "ciphertext = set_bit(mine.ciphertext, 400, 1 - get_bit(mine.ciphertext, 400))",
    "wrapped_key = set_bit(mine.wrapped_key, 400, 1 - get_bit(mine.wrapped_key, 400))",
]


@pytest.mark.parametrize("members", [{}, TO_READ], ids=["plain", "locked"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_row_is_refused_and_logged_and_shows_nothing(vault: Vault, damage: str, members: Document) -> None:
    key, other = (vault.key(f"{CANARY}-{number}", **members) for number in range(2))
    statement = "update secrets as mine set {} from secrets as other where mine.id = $1 and other.id = $2"
    vault.database.rows(statement.format(damage), id_of(key), id_of(other))
    vault.redis.flushall()
    response = vault.read(key, members.get("passphrase"))
    assert set(problem(response, 500, "damaged")) == {"type", "title", "status", "detail", "code"}
    assert CANARY not in response.text
    assert f"ERROR the row of {id_of(key)} was altered or damaged" in vault.log.read_text()
    assert "Traceback" not in vault.log.read_text()


# --- Hostile input -----------------------------------------------------------------------------------------------

ANY_TEXT: Final = strategies.text(strategies.characters(exclude_categories=["Cs"]), min_size=1)  # no lone surrogates
ANY_BYTES: Final = strategies.binary(min_size=1)
# What no schema can say of a valid request: its secret is gone or never was, its ttl_seconds stands in the wrong place.
SCHEMATHESIS_TOML: Final = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 403, 404, 410, 429]

[[operations]]
include-name = "POST /secret"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 413, 422, 429]
"""


@hypothesis.settings(max_examples=200, derandomize=True, database=None, deadline=None)
@hypothesis.given(text=ANY_TEXT, content=ANY_BYTES)
def test_nothing_is_found_that_comes_back_changed(vault: Vault, text: str, content: bytes) -> None:
    assert vault.read(vault.key(text)).json()["secret"] == text
    key = vault.create_raw(content).json()["secret_key"]
    assert vault.get(f"/secret/{key}", headers={"Accept": "text/plain"}).content == content


@pytest.mark.parametrize(("examples", "cases"), [(20, 300), pytest.param(500, 2000, marks=pytest.mark.soak)])
def test_nothing_is_found_that_is_not_documented(vault: Vault, tmp_path: Path, examples: int, cases: int) -> None:
    """Schemathesis makes requests out of the service's own document, and holds the answers against it."""
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS_TOML)
    document, report = f"{vault.url}/openapi.json", tmp_path / "report.json"
    options = f"--checks all --seed 1 --max-examples {examples} --no-color --report json --report-json-path {report}"
    command = [str(Path(sys.executable).with_name("st")), "run", document, *options.split()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads(report.read_text())["test_cases"]["generated"] >= cases


# An error, but not what uvicorn and uvloop say of an answer to a caller whose connection is closed already.
COMPLAINT: Final = re.compile(r"(?m)^(?:\S+ \S+ ERROR (?!.*UVStream|ASGI callable).*|.* 500 [\d.]+ ms|Traceback.*)$")
ARGON2_MIB: Final = 100 + 19 * (os.cpu_count() or 1)  # fifty at once would take 950
GET: Final = b"GET /secret/CANARY HTTP/1.1\r\nHost: x\r\n"
POST: Final = b"POST /secret HTTP/1.1\r\nHost: x\r\n"


def peak_mib(vault: Vault) -> float:
    """The most memory that it had since `unharmed` began. Without /proc (macOS), this is not measured: 0."""
    with suppress(FileNotFoundError):
        status = Path(f"/proc/{vault.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    return 0


@contextmanager
def unharmed(vault: Vault, mib: float = 100) -> Iterator[None]:
    """Check that what happens inside costs no more memory than that, is no error, and keeps nobody from service."""
    with suppress(OSError):
        Path(f"/proc/{vault.process.pid}/clear_refs").write_text("5")
    said, before = len(vault.log.read_bytes()), peak_mib(vault)
    yield
    assert vault.read(vault.key("hello")).json() == {"secret": "hello"}
    assert peak_mib(vault) - before < mib
    assert COMPLAINT.findall(vault.log.read_bytes()[said:].decode()) == []


def connect(vault: Vault) -> socket.socket:
    return socket.create_connection((vault.base_url.host, vault.base_url.port or 80), timeout=10)


def send(vault: Vault, content: bytes, patience: float = 0.5) -> bytes:
    """What comes back on a connection of its own, until it is closed or nothing comes for so many seconds."""
    answers = bytearray()
    with connect(vault) as connection, suppress(TimeoutError, ConnectionError):
        with suppress(ConnectionError):
            connection.sendall(content)
        connection.settimeout(patience)
        while part := connection.recv(65536):
            answers += part
    return bytes(answers)


def test_fifty_passphrases_at_once_take_the_memory_of_one_a_core_and_hold_up_nobody(vault: Vault) -> None:
    creation = json.dumps({"secret": "s", **TO_READ})
    with unharmed(vault, ARGON2_MIB), ThreadPoolExecutor(1) as other:
        creating = other.submit(at_once, vault, [("POST", "/secret", creation)] * 50)
        while not creating.done():
            assert vault.read(vault.key("hello")).json() == {"secret": "hello"}
    assert {201} <= {status for status, _ in creating.result()} <= {201, 503}


@pytest.mark.parametrize(("count", "said"), [(500, b""), (50, POST + b"Content-Length: 100\r\n\r\n{")])
def test_many_silent_callers_hold_up_nobody(vault: Vault, count: int, said: bytes) -> None:
    gone = vault.log.read_text().count("POST /secret 499")
    with unharmed(vault), ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(connect(vault)).sendall(said)
        assert vault.get("/health").status_code == 200
    until(lambda: not said or vault.log.read_text().count("POST /secret 499") - gone == count)


@pytest.mark.parametrize("framing", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
def test_body_without_end_is_refused_and_not_taken_in(vault: Vault, framing: bytes) -> None:
    part = b"%x\r\n%b\r\n" % (65536, b"x" * 65536)
    with unharmed(vault), connect(vault) as connection:
        connection.sendall(POST + framing + b"\r\n\r\n")
        for _ in range(0 if b"Length" in framing else 16):  # what is announced is refused before it comes
            connection.sendall(part)
        assert connection.recv(12) == b"HTTP/1.1 413"
        with suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(part)


def test_caller_who_goes_away_between_claim_and_answer_has_read_it(vault: Vault) -> None:
    key = vault.key()
    with unharmed(vault):
        with another_session(vault.database, LOCK_LOG), connect(vault) as connection:
            connection.sendall(b"GET /secret/%b HTTP/1.1\r\nHost: x\r\n\r\n" % key.encode())
            until(lambda: vault.database.value(BLOCKED) == 1)
            connection.close()
        until(lambda: vault.actions(key) == ["created", "read"])
        problem(vault.read(key), 410, "already_read")


def test_abandoned_creations_give_their_places_back(vault: Vault) -> None:
    body = json.dumps({"secret": "s", **TO_READ}).encode()
    (stored, logged), said = vault.database.counts(), len(vault.log.read_bytes())
    with stopped(vault.process.pid):  # so that all are gone when the first is looked at
        ask_and_leave(vault, *[POST + b"Content-Length: %d\r\n\r\n" % len(body) + body] * 300)
    vault.create(**TO_READ)  # none of them is in its way
    until(lambda: vault.log.read_bytes()[said:].count(b"POST /secret ") == 301)
    assert Counter(re.findall(rb"POST /secret (\d+)", vault.log.read_bytes()[said:])) == {b"499": 300, b"201": 1}
    assert vault.database.counts() == (stored + 1, logged + 1)


def test_body_that_does_not_come_is_a_timeout(database: Database) -> None:
    with serving(database, Path(os.devnull), ("-c", "import main; main.BODY_SECONDS = 0.5; main.main()")) as vault:
        answer = send(vault, POST + b"Content-Length: 100\r\n\r\n{", 5)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "timeout"


def test_body_without_a_length_is_bounded_even_when_it_comes_at_once(database: Database) -> None:
    body = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n{}%b\r\n0\r\n\r\n" % (b" " * 65533)
    with serving(database, MAX_SECRET_BYTES="1") as vault:
        assert send(vault, POST + body, 5).startswith(b"HTTP/1.1 413 ")


def test_request_too_many_is_a_503_that_says_when_to_come_again(database: Database) -> None:
    start = "import asyncio, main; main.under_way = asyncio.Semaphore(3); main.main()"
    with serving(database, Path(os.devnull), ("-c", start)) as vault, ThreadPoolExecutor(8) as pool:
        keys = [vault.key("hello") for _ in range(8)]
        with another_session(database, LOCK_LOG):
            reading = [pool.submit(vault.read, key) for key in keys]
            until(lambda: sum(one.done() for one in reading) >= 5)
        answers = [one.result() for one in reading]
        for answer in answers:
            assert answer.status_code == 200 or problem(answer, 503, "unavailable")
        assert [vault.status(key).is_success for key in keys] == [answer.status_code == 503 for answer in answers]


@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.soak)])
def test_two_hundred_connections_store_secrets_of_a_mebibyte(database: Database, rounds: int) -> None:
    creation = json.dumps({"secret": "x" * 2**20})
    with serving(database, MAX_SECRET_BYTES="1048576") as vault:
        answers = [one for _ in range(rounds) for one in at_once(vault, [("POST", "/secret", creation)] * 200)]
    statuses = Counter(status for status, _ in answers)
    assert statuses[201] >= 0.95 * statuses.total(), statuses


UPGRADE: Final = GET + b"Authorization: Bearer CANARY\r\nConnection: upgrade\r\nUpgrade: "
SMUGGLED: Final = b"Connection: close\r\n\r\n0\r\n\r\nGET /secret/LIVE_KEY HTTP/1.1\r\nHost: x\r\n\r\n"
LENGTH: Final = b"Content-Length: 71"  # of what is smuggled; LIVE_KEY stands for 32 characters
FRAMINGS: Final = (
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding:\x0bchunked"),
    *(b"Transfer-Encoding: xchunked", b" Transfer-Encoding: chunked", b"Content-Length: 5", b"Content-Length: +71"),
)
ODD_PATHS: Final = (b"/secret/CANARY\x00", b"/CANARY%00%0d%0a%ff", b"//\\CANARY", b"http://[::1/", b"http://CANARY/X")
HOSTILE: Final = [
    *(GET + b"X-Null: CANARY\x00b\r\n\r\n", GET + b"X-\x00CANARY: ab\r\n\r\n", b"GET /secret/CANARY HTTP/9.9\r\n\r\n"),
    *(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in ODD_PATHS),
    *(b"GET /x HTTP/1.1\r\nHost: CANARY\xff\xfe\r\n\r\n", b"GET *CANARY HTTP/1.1\r\n\r\n"),
    *(b"CONNECT CANARY:1 HTTP/1.1\r\n\r\n", b"CANARY /CANARY HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *(b"GET /secret/CANARY\r\n", b"GET /CANARY" + b"x" * 1_000_000, GET + b"X-Flood: CANARY\r\n" * 10_000 + b"\r\n"),
    *(POST + b"Transfer-Encoding: chunked\r\n\r\n%b\r\nCANARY" % size for size in (b"f" * 18, b"-1")),
    *(POST + b"Content-Length: %b\r\n\r\nCANARY" % length for length in (b"-1", b"9" * 23)),
    *(POST + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n", UPGRADE + b"h2c\r\n\r\n"),
    UPGRADE + b"websocket\r\n\r\n",
    UPGRADE + b"websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==\r\n\r\n",
    *(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03CANARY", b"\r\n" * 10_000, b"CANARY" + bytes(range(256)) * 100),
    *(POST + LENGTH + b"\r\n" + framing + b"\r\n" + SMUGGLED for framing in FRAMINGS),
    *(POST + framing + b"\r\n" + LENGTH + b"\r\n" + SMUGGLED for framing in FRAMINGS),
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: repr(hostile[:60]))
def test_hostile_bytes_read_nothing_and_are_neither_repeated_nor_logged(vault: Vault, hostile: bytes) -> None:
    key = vault.key()
    with unharmed(vault):
        answers = send(vault, hostile.replace(b"CANARY", CANARY.encode()).replace(b"LIVE_KEY", key.encode()))
    assert not re.search(rb"HTTP/1\.1 (200|5)", answers)
    assert answers.count(b"HTTP/1.1 ") <= 1
    assert found([b"Traceback", b".py", CANARY.encode(), key.encode()], answers) == []
    assert found(forms(CANARY, key), vault.log.read_bytes()) == []
    assert vault.status(key).json()["status"] == "unread"
