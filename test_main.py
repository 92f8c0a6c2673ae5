"""The claims of main.py and local.py, each as a test: against the real service, PostgreSQL and Valkey. No mocks.

The clock is PostgreSQL's: a test that needs time to pass moves the times of a row instead of waiting.
"""

import asyncio
import base64
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
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias
from uuid import UUID

import asyncpg
import httpx
import hypothesis
import psutil
import pytest
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import strategies
from redis import Redis
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import visibility_of_element_located
from selenium.webdriver.support.wait import WebDriverWait

import local
from main import (
    WRAPPING_LABEL,
    SecretKey,
    new_receipt_key,
    parse_encryption_keys,
    seal,
    secret_id_of,
    secret_key_of,
    stretch,
    unseal,
    verifier_of,
)

HERE: Final = Path(__file__).resolve().parent
ENCRYPTION_KEY: Final = base64.urlsafe_b64encode(bytes(range(32))).decode()
CANARY: Final = "canary-hunter2"  # stands in bad input, and must not come back
NUMBER: Final = "4815162342"  # the same where a number is wanted
NO_STORE: Final = {
    "cache-control": "no-cache, no-store, must-revalidate",
    "pragma": "no-cache",
    "expires": "0",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-robots-tag": "noindex",
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

CREATION: Final = '{"secret": "a secret"}'
TO_DELETE: Final = {"passphrase": "right", "passphrase_scope": "delete"}
TO_READ: Final = {"passphrase": "right", "passphrase_scope": "read"}

Document: TypeAlias = dict[str, Any]
Call: TypeAlias = tuple[str, str, str | None]  # method, path, body

# --- Fixtures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Database:
    """A database of the tests' PostgreSQL: SQL for the test, and the settings by which a service finds it."""

    environment: Mapping[str, str]

    async def _fetch(self, statement: str, arguments: Sequence[object]) -> list[Any]:
        host, user, database = (self.environment[f"POSTGRES_{name}"] for name in ("HOST", "USER", "DB"))
        connection = await asyncpg.connect(host=host, user=user, database=database)
        try:
            return list(await connection.fetch(statement, *arguments))
        finally:
            await connection.close()

    def rows(self, statement: str, *arguments: object) -> list[Any]:
        return asyncio.run(self._fetch(statement, arguments))

    def value(self, statement: str, *arguments: object) -> Any:
        return self.rows(statement, *arguments)[0][0]

    def counts(self) -> tuple[int, int]:
        """How many secrets and how many log rows there are."""
        secrets_and_logs = self.rows("select (select count(*) from secrets), (select count(*) from secret_logs)")[0]
        return int(secrets_and_logs[0]), int(secrets_and_logs[1])


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Stores]:
    with local.stores(tmp_path_factory.mktemp("stores")) as both:
        yield both


@pytest.fixture(scope="session")
def database(stores: local.Stores) -> Database:
    return Database(stores.environment)


@pytest.fixture(scope="session")
def redis(stores: local.Stores) -> Iterator[Redis]:
    with Redis.from_url(stores.environment["REDIS_URL"]) as client:
        yield client


@pytest.fixture(scope="session")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that `vault` ever says."""
    return tmp_path_factory.mktemp("log") / "vault.log"


@pytest.fixture(scope="session")
def vault(database: Database, log_file: Path) -> Iterator[httpx.Client]:
    """The service that most tests ask: default settings, but no quota."""
    with serving(database, log_file) as client:
        yield client


@pytest.fixture(scope="session")
def two_workers(database: Database) -> Iterator[httpx.Client]:
    with serving(database, WORKERS="2") as client:
        yield client


@pytest.fixture(scope="session")
def proxied(database: Database) -> Iterator[httpx.Client]:
    """A service that believes our X-Forwarded-For, and whose other settings are not the defaults either."""
    with serving(
        database,
        FORWARDED_ALLOW_IPS="127.0.0.1",
        PUBLIC_URL="https://secrets.example/",
        DEFAULT_TTL_SECONDS="60",
        MAX_TTL_SECONDS="120",
        MAX_SECRET_BYTES="3000",
        CACHE_SECONDS="600",
    ) as client:
        yield client


@pytest.fixture(scope="session")
def limited(database: Database) -> Iterator[httpx.Client]:
    """A service that believes our X-Forwarded-For and gives each address 4 KiB a minute."""
    with serving(database, FORWARDED_ALLOW_IPS="127.0.0.1", CREATE_QUOTA_KIB_PER_MINUTE="4") as client:
        yield client


@pytest.fixture(scope="session")
def swept(database: Database) -> Iterator[tuple[Database, httpx.Client]]:
    """A database of its own that two services clean, five times a second each."""
    fresh = fresh_database(database)
    with serving(fresh, CLEANUP_INTERVAL_SECONDS="0.2") as client, serving(fresh, CLEANUP_INTERVAL_SECONDS="0.2"):
        yield fresh, client


# --- Builders ----------------------------------------------------------------------------------------------------


@contextmanager
def serving(database: Database, log_file: Path = Path(os.devnull), **settings: str) -> Iterator[httpx.Client]:
    """A service with these settings, and a client for it."""
    environment = {**SETTINGS, **database.environment, "PORT": str(local.free_port()), **settings}
    with (
        log_file.open("ab") as log,
        local.service(environment, log=log) as service,
        httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client,
    ):
        yield client


def refused_start(database: Database, **settings: str) -> str:
    """The one line with which a service refuses to start."""
    environment = {**os.environ, **SETTINGS, **database.environment, "PORT": str(local.free_port()), **settings}
    ended = subprocess.run(
        [sys.executable, "main.py"], cwd=HERE, env=environment, capture_output=True, text=True, timeout=20
    )
    assert ended.returncode not in (0, None)
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    return line


def fresh_database(database: Database, *, schema: bool = True) -> Database:
    name = f"fresh_{secrets.token_hex(4)}"
    database.rows(f"create database {name}")
    fresh = Database({**database.environment, "POSTGRES_DB": name})
    if schema:
        for statement in re.sub("--.*", "", (HERE / "schema.sql").read_text()).split(";"):
            fresh.rows(statement)
    return fresh


def create(client: httpx.Client, text: str = "a secret", **members: object) -> Document:
    response = client.post("/secret", json={"secret": text, **members})
    assert response.status_code == 201, response.text
    document: Document = response.json()
    return document


def raw(key: str) -> Any:
    """The bytes of a secret_key or receipt_key."""
    return base64.urlsafe_b64decode(key)


def id_of(key: str) -> UUID:
    return secret_id_of(raw(key))


def create_key(client: httpx.Client, text: str = "a secret", **members: object) -> str:
    return str(create(client, text, **members)["secret_key"])


def create_from(client: httpx.Client, address: str, **members: object) -> httpx.Response:
    """Ask for a secret as a proxy does on behalf of this address."""
    return client.post("/secret", json={"secret": "a secret", **members}, headers={"X-Forwarded-For": address})


def read(client: httpx.Client, key: str, passphrase: str | None = None) -> httpx.Response:
    return client.post(f"/secret/{key}", json={"passphrase": passphrase})


def delete(client: httpx.Client, key: str, passphrase: str | None = None) -> httpx.Response:
    return client.request("DELETE", f"/secret/{key}", json={"passphrase": passphrase})


def problem(response: httpx.Response, status: int, code: str) -> Document:
    """Check that a response is this error, in the shape that every error has. Returns its body."""
    assert (response.status_code, response.json().get("code")) == (status, code), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert {name: response.headers.get(name) for name in NO_STORE} == NO_STORE
    document: Document = response.json()
    assert document["status"] == status
    assert document["type"] == "about:blank"
    assert document["title"]
    assert document["detail"]
    return document


def expire(database: Database, key: str) -> datetime:
    """Let a secret's time be over, this very instant, which is returned."""
    statement = """
        update secrets
        set created_at = now() - interval '1 day', expires_at = now()
        where id = $1
        returning expires_at
    """
    expires_at: datetime = database.value(statement, id_of(key))
    return expires_at


@dataclass(frozen=True)
class Event:
    action: str
    ip_address: str | None
    age_seconds: float
    extra_data: Document


def events(database: Database, key: str) -> list[Event]:
    """What the log has of a secret, in order."""
    rows = database.rows(
        """
        select action, host(ip_address), extract(epoch from now() - created_at)::float, extra_data
        from secret_logs
        where secret_id = $1
        order by id
        """,
        id_of(key),
    )
    return [Event(action, address, age, json.loads(extra)) for action, address, age, extra in rows]


def actions(database: Database, key: str) -> list[str]:
    return [event.action for event in events(database, key)]


def cached(redis: Redis, kind: str, key: str) -> Any:
    """The value in Redis of `secret:{ID}` or `key:{ID}`."""
    return redis.get(f"{kind}:{{{id_of(key)}}}")


def cached_seconds(redis: Redis, kind: str, key: str) -> Any:
    """How long it will stay there; -2: it is not there."""
    return redis.ttl(f"{kind}:{{{id_of(key)}}}")


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def at_once(client: httpx.Client, calls: Sequence[Call]) -> list[tuple[int, Document]]:
    """Send every call on a connection of its own before the first answer is read."""
    url = client.base_url
    connections = [http.client.HTTPConnection(url.host, url.port, timeout=30) for _ in calls]
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

(OPERATORS_KEY,) = parse_encryption_keys(ENCRYPTION_KEY)
(ANOTHER_KEY,) = parse_encryption_keys(Fernet.generate_key().decode())


def flipped(token: bytes) -> bytes:
    """A Fernet token with one bit of its content changed."""
    raw = bytearray(base64.urlsafe_b64decode(token))
    raw[len(raw) // 2] ^= 1
    return base64.urlsafe_b64encode(raw)


def test_key_chain_is_the_same_in_every_version() -> None:
    secret_key = secret_key_of(raw("AAECAwQFBgcICQoLDA0ODxAREhMUFRYX"))
    assert secret_key == raw("AAECA0IzJyOXZFoT49oCKZ55f7XTo8iW")
    assert secret_id_of(secret_key) == UUID("00010203-9770-3f6e-9e12-c25b6ad14c59")


def test_keys_of_the_chain_have_nothing_in_common_but_their_time() -> None:
    receipt_key = new_receipt_key()
    secret_key = secret_key_of(receipt_key)
    chain = (receipt_key, secret_key, secret_id_of(secret_key).bytes)
    assert len({part[start : start + 4] for part in chain for start in range(4, 13)}) == 27


def test_receipt_keys_never_repeat() -> None:
    assert len({new_receipt_key() for _ in range(1000)}) == 1000


@pytest.mark.parametrize("secret", [b"", b"\x00", "zażółć 🔑".encode(), bytes(range(256)) * 256])
@pytest.mark.parametrize("passphrase_key", [b"", b"p" * 32])
def test_sealed_secret_opens_with_its_keys(secret: bytes, passphrase_key: bytes) -> None:
    secret_key = secret_key_of(new_receipt_key())
    sealed = seal(secret, OPERATORS_KEY, secret_key, passphrase_key)
    assert unseal(*sealed, OPERATORS_KEY, secret_key, passphrase_key) == secret


def test_sealing_twice_gives_nothing_in_common() -> None:
    secret_key = secret_key_of(new_receipt_key())
    first, second = (seal(b"a secret", OPERATORS_KEY, secret_key) for _ in range(2))
    assert not set(first) & set(second)


def test_another_link_does_not_open() -> None:
    sealed = seal(b"a secret", OPERATORS_KEY, secret_key_of(new_receipt_key()))
    with pytest.raises(InvalidToken):
        unseal(*sealed, OPERATORS_KEY, secret_key_of(new_receipt_key()))


def test_another_encryption_key_does_not_open() -> None:
    secret_key = secret_key_of(new_receipt_key())
    sealed = seal(b"a secret", OPERATORS_KEY, secret_key)
    with pytest.raises(InvalidToken):
        unseal(*sealed, ANOTHER_KEY, secret_key)


@pytest.mark.parametrize("presented", [b"", b"q" * 32])
def test_another_passphrase_key_does_not_open(presented: bytes) -> None:
    secret_key = secret_key_of(new_receipt_key())
    sealed = seal(b"a secret", OPERATORS_KEY, secret_key, b"p" * 32)
    with pytest.raises(InvalidToken):
        unseal(*sealed, OPERATORS_KEY, secret_key, presented)


def test_flipped_bit_in_the_ciphertext_does_not_open() -> None:
    secret_key = secret_key_of(new_receipt_key())
    ciphertext, wrapped_key = seal(b"a secret", OPERATORS_KEY, secret_key)
    with pytest.raises(InvalidToken):
        unseal(flipped(ciphertext), wrapped_key, OPERATORS_KEY, secret_key)


def test_flipped_bit_in_the_wrapped_key_does_not_open() -> None:
    secret_key = secret_key_of(new_receipt_key())
    ciphertext, wrapped_key = seal(b"a secret", OPERATORS_KEY, secret_key)
    with pytest.raises(InvalidToken):
        unseal(ciphertext, flipped(wrapped_key), OPERATORS_KEY, secret_key)


def test_wrapped_key_of_another_secret_does_not_open() -> None:
    mine, other = (secret_key_of(new_receipt_key()) for _ in range(2))
    ciphertext, _ = seal(b"a secret", OPERATORS_KEY, mine)
    _, swapped = seal(b"another", OPERATORS_KEY, other)
    with pytest.raises(InvalidToken):
        unseal(ciphertext, swapped, OPERATORS_KEY, mine)


def test_encryption_keys_keep_their_order_and_differ_by_fingerprint() -> None:
    new, old = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    fingerprints = [key.fingerprint for key in parse_encryption_keys(f" {new}, {old},")]
    assert fingerprints == [parse_encryption_keys(key)[0].fingerprint for key in (new, old)]
    assert len(set(fingerprints)) == 2


@pytest.mark.parametrize("text", ["", ",", CANARY, f"{ENCRYPTION_KEY},{CANARY}", f"{ENCRYPTION_KEY[:-4]}", "ł" * 44])
def test_garbage_is_no_encryption_key_and_is_not_repeated(text: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_encryption_keys(text)
    assert not any(part in str(refusal.value) for part in text.split(",") if part)


def test_encryption_key_does_not_show_itself() -> None:
    assert base64.urlsafe_b64decode(ENCRYPTION_KEY).hex() not in repr(OPERATORS_KEY)
    assert repr(base64.urlsafe_b64decode(ENCRYPTION_KEY)) not in repr(OPERATORS_KEY)


def test_passphrase_is_the_same_however_its_accents_are_typed() -> None:
    composed, decomposed = (unicodedata.normalize(form, "Żółw café ﬁ") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert stretch(composed, b"s" * 16) == stretch(decomposed, b"s" * 16)


def test_stretched_halves_depend_on_passphrase_and_salt() -> None:
    outputs = [stretch("one", b"s" * 16), stretch("two", b"s" * 16), stretch("one", b"t" * 16)]
    assert len({half for output in outputs for half in output}) == 6


def test_verifier_depends_on_half_encryption_key_and_link() -> None:
    mine, other = (secret_key_of(new_receipt_key()) for _ in range(2))
    verifiers = {
        verifier_of(b"h" * 32, OPERATORS_KEY, mine),
        verifier_of(b"i" * 32, OPERATORS_KEY, mine),
        verifier_of(b"h" * 32, ANOTHER_KEY, mine),
        verifier_of(b"h" * 32, OPERATORS_KEY, other),
    }
    assert len(verifiers) == 4


# --- Create and read ---------------------------------------------------------------------------------------------


def test_secret_comes_back(vault: httpx.Client) -> None:
    response = vault.get(f"/secret/{create_key(vault, 'hello')}")
    assert (response.status_code, response.json()) == (200, {"secret": "hello"})


def test_secret_comes_back_by_post(vault: httpx.Client) -> None:
    response = vault.post(f"/secret/{create_key(vault, 'hello')}")
    assert (response.status_code, response.json()) == (200, {"secret": "hello"})


def test_second_read_says_already_read_and_when(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    vault.get(f"/secret/{key}")
    answer = problem(vault.get(f"/secret/{key}"), 410, "already_read")
    logged = "select created_at from secret_logs where action = 'read' and secret_id = $1"
    assert datetime.fromisoformat(answer["ended_at"]) == database.value(logged, id_of(key))
    assert "compromised" in answer["detail"]


def test_read_leaves_no_row(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    vault.get(f"/secret/{key}")
    assert database.value("select count(*) from secrets where id = $1", id_of(key)) == 0


def test_keys_are_32_url_safe_characters(vault: httpx.Client) -> None:
    created = create(vault)
    assert re.fullmatch("[A-Za-z0-9_-]{32}", created["secret_key"])
    assert re.fullmatch("[A-Za-z0-9_-]{32}", created["receipt_key"])


def test_creation_answers_with_keys_expiry_and_link(vault: httpx.Client) -> None:
    created = create(vault)
    assert set(created) == {"secret_key", "receipt_key", "expires_at", "url"}
    assert raw(created["secret_key"]) == secret_key_of(raw(created["receipt_key"]))
    assert created["url"] == f"{str(vault.base_url).rstrip('/')}/#{created['secret_key']}"


def test_link_starts_with_the_public_url(proxied: httpx.Client) -> None:
    created = create(proxied)
    assert created["url"] == f"https://secrets.example/#{created['secret_key']}"


def test_curl_needs_no_content_type(vault: httpx.Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert vault.post("/secret", content='{"secret": "hello"}', headers=form).status_code == 201


@pytest.mark.parametrize(
    "secret",
    [
        "a",
        "zażółć gęślą jaźń",
        "🔑👩‍👩‍👧‍👦",
        "a\x00b\x00",
        "line\r\nline\u2028line",
        " ",
        "￿\U0010ffff",
        pytest.param("x" * 65536, id="65536 bytes"),
        pytest.param("🔑" * 16384, id="65536 bytes of emoji"),
        pytest.param("".join(chr(number % 32) for number in range(65536)), id="65536 control characters"),
    ],
)
def test_any_text_comes_back_as_it_was(vault: httpx.Client, secret: str) -> None:
    assert vault.get(f"/secret/{create_key(vault, secret)}").json() == {"secret": secret}


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_every_route_stands_under_both_prefixes(vault: httpx.Client, prefix: str) -> None:
    read, deleted = (vault.post(f"{prefix}/secret", json={"secret": "s"}).json()["secret_key"] for _ in range(2))
    assert vault.get(f"{prefix}/secret/{read}/status").json()["status"] == "unread"
    assert vault.get(f"{prefix}/secret/{read}").json() == {"secret": "s"}
    problem(vault.post(f"{prefix}/secret/{read}"), 410, "already_read")
    assert vault.delete(f"{prefix}/secret/{deleted}").json() == {"status": "secret_deleted"}
    for path in ("/health", "/docs", "/redoc", "/openapi.json"):
        assert vault.get(prefix + path).status_code == 200


# --- Delete and status -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{}", b'{"passphrase": null}'])
def test_delete_needs_only_the_link_when_there_is_no_passphrase(vault: httpx.Client, body: bytes) -> None:
    response = vault.request("DELETE", f"/secret/{create_key(vault)}", content=body)
    assert (response.status_code, response.json()) == (200, {"status": "secret_deleted"})


def test_read_after_delete_says_deleted_and_when(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    delete(vault, key)
    answer = problem(vault.get(f"/secret/{key}"), 410, "deleted")
    logged = "select created_at from secret_logs where action = 'deleted' and secret_id = $1"
    assert datetime.fromisoformat(answer["ended_at"]) == database.value(logged, id_of(key))


def test_second_delete_says_deleted(vault: httpx.Client) -> None:
    key = create_key(vault)
    delete(vault, key)
    problem(delete(vault, key), 410, "deleted")


def test_delete_after_read_says_already_read(vault: httpx.Client) -> None:
    key = create_key(vault)
    vault.get(f"/secret/{key}")
    problem(delete(vault, key), 410, "already_read")


def test_delete_leaves_no_row(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    delete(vault, key)
    assert database.value("select count(*) from secrets where id = $1", id_of(key)) == 0


def test_status_looks_without_reading(vault: httpx.Client, database: Database) -> None:
    created = create(vault)
    key = created["secret_key"]
    expected = {"status": "unread", "expires_at": created["expires_at"], "passphrase_required": False}
    assert [vault.get(f"/secret/{key}/status").json() for _ in range(3)] == [expected] * 3
    assert actions(database, key) == ["created"]
    assert vault.get(f"/secret/{key}").status_code == 200


@pytest.mark.parametrize(("scope", "required"), [("read", True), ("delete", False)])
def test_status_says_whether_reading_needs_a_passphrase(vault: httpx.Client, scope: str, required: bool) -> None:
    key = create_key(vault, **{**TO_READ, "passphrase_scope": scope})
    assert vault.get(f"/secret/{key}/status").json()["passphrase_required"] is required


def test_status_after_read_says_already_read(vault: httpx.Client) -> None:
    key = create_key(vault)
    vault.get(f"/secret/{key}")
    assert "ended_at" in problem(vault.get(f"/secret/{key}/status"), 410, "already_read")


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("a" * 32, id="never existed"),
        pytest.param(CANARY, id="short"),
        pytest.param("a" * 31, id="31"),
        pytest.param("a" * 33, id="33"),
        pytest.param("a" * 5000, id="5000"),
        "a" * 31 + "=",
        "a" * 31 + "+",
        "a" * 31 + ".",
        "a" * 31 + "%20",
        "a" * 31 + "%2F",
        "a" * 32 + "%0A",
        "a" * 31 + "%00",
        "a" * 31 + "%FF",
        "a" * 31 + "é",
        "a" * 31 + "%D9%A1",  # a digit, but an Arabic one
    ],
)
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("POST", ""), ("DELETE", ""), ("GET", "/status")])
def test_key_that_opens_nothing_is_not_found(vault: httpx.Client, method: str, suffix: str, key: str) -> None:
    response = vault.request(method, f"/secret/{key}{suffix}")
    problem(response, 404, "not_found")
    assert key not in response.text


# --- Time to live ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "seconds"), [({}, 86400), ({"ttl_seconds": 1}, 1), ({"ttl_seconds": 604800}, 604800)]
)
def test_secret_expires_ttl_seconds_from_now(
    vault: httpx.Client, database: Database, members: Document, seconds: int
) -> None:
    created = create(vault, **members)
    left = datetime.fromisoformat(created["expires_at"]) - database.value("select now()")
    assert seconds - 3 < left.total_seconds() <= seconds


def test_expires_at_is_in_utc(vault: httpx.Client) -> None:
    expires_at = create(vault)["expires_at"]
    assert datetime.fromisoformat(expires_at).utcoffset() is not None
    assert expires_at.endswith("Z")


def test_default_ttl_is_a_setting(proxied: httpx.Client, database: Database) -> None:
    created = create(proxied)
    left = datetime.fromisoformat(created["expires_at"]) - database.value("select now()")
    assert 57 < left.total_seconds() <= 60


@pytest.mark.parametrize(("ttl_seconds", "status"), [(120, 201), (121, 422)])
def test_largest_ttl_is_a_setting(proxied: httpx.Client, ttl_seconds: int, status: int) -> None:
    assert proxied.post("/secret", json={"secret": "s", "ttl_seconds": ttl_seconds}).status_code == status


def test_expired_secret_cannot_be_read_though_no_cleanup_ran(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    expires_at = expire(database, key)
    answer = problem(vault.get(f"/secret/{key}"), 410, "expired")
    assert datetime.fromisoformat(answer["ended_at"]) == expires_at
    assert database.value("select count(*) from secrets where id = $1", id_of(key)) == 1


def test_expired_secret_cannot_be_deleted(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    expire(database, key)
    problem(delete(vault, key), 410, "expired")
    assert actions(database, key) == ["created"]


def test_expired_secret_has_no_status(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    expire(database, key)
    problem(vault.get(f"/secret/{key}/status"), 410, "expired")


def test_expired_secret_asks_for_no_passphrase(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault, **TO_READ)
    expire(database, key)
    problem(vault.get(f"/secret/{key}"), 410, "expired")
    problem(read(vault, key, "right"), 410, "expired")


def test_secret_can_be_read_in_its_last_seconds(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    database.rows("update secrets set expires_at = now() + interval '3 s' where id = $1", id_of(key))
    assert vault.get(f"/secret/{key}").status_code == 200


# --- Passphrases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [{"passphrase": "right"}, TO_DELETE])
def test_passphrase_guards_no_reading_unless_asked_for(vault: httpx.Client, members: Document) -> None:
    key = create_key(vault, "hello", **members)
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


@pytest.mark.parametrize("scope", ["delete", "read"])
def test_delete_needs_the_passphrase(vault: httpx.Client, database: Database, scope: str) -> None:
    key = create_key(vault, **{**TO_READ, "passphrase_scope": scope})
    problem(vault.delete(f"/secret/{key}"), 403, "passphrase_required")
    problem(delete(vault, key, "wrong"), 403, "wrong_passphrase")
    assert delete(vault, key, "right").json() == {"status": "secret_deleted"}
    assert actions(database, key) == ["created", "denied", "denied", "deleted"]


def test_scope_read_needs_the_passphrase_for_reading(vault: httpx.Client) -> None:
    key = create_key(vault, "hello", **TO_READ)
    problem(vault.get(f"/secret/{key}"), 403, "passphrase_required")
    problem(read(vault, key, "wrong"), 403, "wrong_passphrase")
    assert read(vault, key, "right").json() == {"secret": "hello"}


def test_passphrase_is_recognised_however_its_accents_are_typed(vault: httpx.Client) -> None:
    typed, shown = (unicodedata.normalize(form, "Żółw café") for form in ("NFC", "NFD"))
    key = create_key(vault, **{**TO_READ, "passphrase": typed})
    assert read(vault, key, shown).status_code == 200


def test_attempts_left_count_down(vault: httpx.Client) -> None:
    key = create_key(vault, **TO_READ)
    answers = [read(vault, key, "wrong") for _ in range(5)]
    assert [problem(answer, 403, "wrong_passphrase")["attempts_left"] for answer in answers] == [4, 3, 2, 1, 0]


def test_sixth_attempt_is_refused_even_with_the_right_passphrase(vault: httpx.Client) -> None:
    key = guessed_at(vault)
    response = read(vault, key, "right")
    problem(response, 429, "too_many_attempts")
    assert 890 < int(response.headers["retry-after"]) <= 900


def test_attempts_are_shared_by_reading_and_deleting(vault: httpx.Client) -> None:
    key = guessed_at(vault)
    problem(delete(vault, key, "right"), 429, "too_many_attempts")


def test_right_passphrase_works_again_after_a_quarter_of_an_hour(vault: httpx.Client, database: Database) -> None:
    key = guessed_at(vault)
    database.rows("update secrets set attempts_since = now() - interval '15 min' where id = $1", id_of(key))
    assert read(vault, key, "right").json() == {"secret": "hello"}


def test_attempts_are_still_counted_a_minute_before_that(vault: httpx.Client, database: Database) -> None:
    key = guessed_at(vault)
    database.rows("update secrets set attempts_since = now() - interval '14 min' where id = $1", id_of(key))
    response = read(vault, key, "right")
    problem(response, 429, "too_many_attempts")
    assert 50 < int(response.headers["retry-after"]) <= 60


def test_guesses_do_not_burn_the_secret(vault: httpx.Client, database: Database) -> None:
    key = guessed_at(vault)
    assert vault.get(f"/secret/{key}/status").json()["status"] == "unread"
    assert database.value("select count(*) from secrets where id = $1", id_of(key)) == 1


def test_missing_passphrase_costs_no_attempt(vault: httpx.Client) -> None:
    key = create_key(vault, **TO_READ)
    for _ in range(6):
        problem(vault.get(f"/secret/{key}"), 403, "passphrase_required")
    assert read(vault, key, "right").status_code == 200


def test_of_twenty_guesses_at_once_five_are_checked(two_workers: httpx.Client) -> None:
    key = create_key(two_workers, **TO_READ)
    answers = at_once(two_workers, [("POST", f"/secret/{key}", '{"passphrase": "wrong"}')] * 20)
    assert sorted(answer["code"] for _, answer in answers) == ["too_many_attempts"] * 15 + ["wrong_passphrase"] * 5


def guessed_at(client: httpx.Client) -> str:
    """The key of a secret whose five attempts are spent."""
    key = create_key(client, "hello", **TO_READ)
    for _ in range(5):
        problem(read(client, key, "wrong"), 403, "wrong_passphrase")
    return key


# --- Bad input ---------------------------------------------------------------------------------------------------

BAD_CREATIONS: Final = [  # (the field that the error must name, the body)
    ("secret", '{"secret": "", "passphrase": "CANARY"}'),
    ("secret", '{"passphrase": "CANARY"}'),
    ("secret", '{"secret": null, "passphrase": "CANARY"}'),
    ("secret", '{"secret": 4815162342}'),
    ("secret", '{"secret": 4815162342.5}'),
    ("secret", '{"secret": true, "passphrase": "CANARY"}'),
    ("secret", '{"secret": ["CANARY"]}'),
    ("secret", '{"secret": {"CANARY": "CANARY"}}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": 0}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": -1}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": -4815162342}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": 1.5}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": true}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": "60"}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": "CANARY"}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": 1e99}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": 1e999}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": NaN}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": -Infinity}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": null}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": 604801}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": 4815162342}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": 4815162342481516234248151623424815162342}'),
    ("ttl_seconds", '{"secret": "CANARY", "ttl_seconds": [4815162342]}'),
    ("ttl", '{"secret": "CANARY", "ttl": 4815162342}'),
    ("Secret", '{"secret": "CANARY", "Secret": "CANARY"}'),
    ("passphrase", '{"secret": "CANARY", "passphrase": ""}'),
    ("passphrase", '{"secret": "CANARY", "passphrase": 4815162342}'),
    ("passphrase", '{"secret": "CANARY", "passphrase": true}'),
    ("passphrase", '{"secret": "CANARY", "passphrase": ["CANARY"]}'),
    ("passphrase", '{"secret": "CANARY", "passphrase": "%s"}' % ("CANARY" * 1000)),
    ("passphrase_scope", '{"secret": "CANARY", "passphrase": "CANARY", "passphrase_scope": "CANARY"}'),
    ("passphrase_scope", '{"secret": "CANARY", "passphrase": "CANARY", "passphrase_scope": ""}'),
    ("passphrase_scope", '{"secret": "CANARY", "passphrase": "CANARY", "passphrase_scope": null}'),
    ("passphrase_scope", '{"secret": "CANARY", "passphrase": "CANARY", "passphrase_scope": 4815162342}'),
]
NOT_AN_OBJECT: Final = [
    b"",
    b" ",
    b"null",
    b"true",
    b"4815162342",
    b'"CANARY"',
    b'["CANARY"]',
    b'[{"secret": "CANARY"}]',
    b'{"secret": "CANARY"',
    b'{"secret": "CANARY",}',
    b"{'secret': 'CANARY'}",
    b'{"secret": CANARY}',
    b'{"secret": "CANARY"}{"secret": "CANARY"}',
    b"secret=CANARY&ttl_seconds=60",
    b'{"secret": "CANARY\xff\xfe"}',
    b'{"secret": "CANARY\n"}',
    b'{"secret": "CANARY\\x"}',
    b'{"secret": "CANARY\\ud800"}',
    b'{"secret": "CANARY\\udc00\\ud800"}',
    b'{"secret": "CANARY", "passphrase": "CANARY\\ud800"}',
    '{"secret": "CANARY"}'.encode("utf-16"),
    b"\x00CANARY",
    pytest.param(b'{"secret": "CANARY", "x": ' + b"[" * 100_000, id="100000 brackets"),
    pytest.param(b'{"secret": "CANARY", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", id="50000 deep"),
]


def refused(database: Database, send: Callable[[], httpx.Response]) -> Document:
    """Check that an input is refused with 422, that nothing of it is repeated, and nothing stored. Returns the body."""
    before = database.counts()
    response = send()
    answer = problem(response, 422, "invalid")
    assert not [trace for trace in (CANARY, CANARY.upper(), NUMBER) if trace in response.text]
    assert [set(item) for item in answer["errors"]] == [{"loc", "msg", "type"}] * len(answer["errors"])
    assert database.counts() == before
    return answer


@pytest.mark.parametrize(("named", "body"), BAD_CREATIONS, ids=lambda text: text[:70])
def test_bad_member_is_named_and_nothing_is_stored(
    vault: httpx.Client, database: Database, named: str, body: str
) -> None:
    answer = refused(database, lambda: vault.post("/secret", content=body.replace("CANARY", CANARY)))
    assert answer["errors"][0]["loc"][:2] == ["body", named]
    assert named in answer["detail"]


@pytest.mark.parametrize("body", NOT_AN_OBJECT)
def test_body_that_is_no_json_object_is_refused(vault: httpx.Client, database: Database, body: bytes) -> None:
    answer = refused(database, lambda: vault.post("/secret", content=body.replace(b"CANARY", CANARY.encode())))
    assert answer["errors"][0]["loc"] == ["body"]
    assert "body" in answer["detail"]


def test_every_bad_member_is_named(vault: httpx.Client, database: Database) -> None:
    body = {"secret": 4815162342, "ttl_seconds": "60", "passphrase": "", "colour": CANARY}
    answer = refused(database, lambda: vault.post("/secret", json=body))
    assert {item["loc"][1] for item in answer["errors"]} == set(body)


@pytest.mark.parametrize("name", [CANARY, f"{CANARY} {CANARY}", "", "\x00", pytest.param("x" * 10_000, id="10000")])
def test_odd_name_of_an_unknown_member_is_not_repeated(vault: httpx.Client, database: Database, name: str) -> None:
    answer = refused(database, lambda: vault.post("/secret", json={"secret": "s", name: CANARY}))
    assert not name or name not in json.dumps(answer, ensure_ascii=False)


@pytest.mark.parametrize("secret", ["x" * 65537, "🔑" * 16384 + "x", CANARY * 100_000])
def test_oversized_secret_is_too_large(vault: httpx.Client, database: Database, secret: str) -> None:
    before = database.counts()
    response = vault.post("/secret", json={"secret": secret})
    assert "65536 bytes" in problem(response, 413, "too_large")["detail"]
    assert CANARY not in response.text
    assert database.counts() == before


@pytest.mark.parametrize(("size", "status"), [(3000, 201), (3001, 413)])
def test_largest_secret_is_a_setting(proxied: httpx.Client, size: int, status: int) -> None:
    assert proxied.post("/secret", json={"secret": "x" * size}).status_code == status


def test_announced_flood_is_refused_unread(vault: httpx.Client) -> None:
    connection = http.client.HTTPConnection(vault.base_url.host, vault.base_url.port, timeout=5)
    connection.putrequest("POST", "/secret")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_unannounced_flood_is_refused(vault: httpx.Client, database: Database) -> None:
    before = database.counts()
    problem(vault.post("/secret", content=(b"x" * 1000 for _ in range(2000))), 413, "too_large")
    assert database.counts() == before


@pytest.mark.parametrize("method", ["POST", "DELETE"])
@pytest.mark.parametrize(
    ("named", "body"),
    [
        ("passphrase", '{"passphrase": ""}'),
        ("passphrase", '{"passphrase": 4815162342}'),
        ("passphrase", '{"passphrase": ["CANARY"]}'),
        ("body", '{"passphrase": "CANARY\\ud800"}'),
        ("passphrase", '{"passphrase": "%s"}' % ("CANARY" * 1000)),
        ("password", '{"password": "CANARY"}'),
        ("body", '["CANARY"]'),
        ("body", '"CANARY"'),
        ("body", '{"passphrase": "CANARY"'),
        ("body", "passphrase=CANARY"),
    ],
    ids=lambda text: text[:40],
)
def test_bad_passphrase_body_is_refused_and_nothing_is_lost(
    vault: httpx.Client, database: Database, method: str, named: str, body: str
) -> None:
    key = create_key(vault, **TO_READ)
    path, content = f"/secret/{key}", body.replace("CANARY", CANARY)
    answer = refused(database, lambda: vault.request(method, path, content=content))
    assert answer["errors"][0]["loc"][-1] == named
    assert named in answer["detail"]
    assert read(vault, key, "right").status_code == 200


@pytest.mark.parametrize("method", ["PUT", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_method_that_does_not_exist_is_refused_and_reads_nothing(
    vault: httpx.Client, database: Database, method: str
) -> None:
    key = create_key(vault)
    before = database.counts()
    for path in ("/secret", f"/secret/{key}", f"/secret/{key}/status", "/health", f"/api/v1/secret/{key}"):
        response = vault.request(method, path)
        problem(response, 405, "method_not_allowed")
        assert response.headers["allow"]
    assert database.counts() == before


def test_head_reads_nothing(vault: httpx.Client) -> None:
    key = create_key(vault)
    assert vault.head(f"/secret/{key}").status_code == 405
    assert vault.get(f"/secret/{key}").status_code == 200


@pytest.mark.parametrize("path", ["/nothing", "/secret/", "/secrets", "/api/v1", "/api/v2/secret", "/api/v1/nothing"])
def test_route_that_does_not_exist_is_not_found(vault: httpx.Client, path: str) -> None:
    problem(vault.get(path), 404, "not_found")


# --- Headers and documentation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "method", "path", "body"),
    [
        (201, "POST", "/secret", '{"secret": "s"}'),
        (200, "GET", "/secret/{live}", ""),
        (200, "POST", "/secret/{live}", ""),
        (200, "DELETE", "/secret/{live}", ""),
        (200, "GET", "/secret/{live}/status", ""),
        (200, "GET", "/health", ""),
        (200, "GET", "/docs", ""),
        (200, "GET", "/redoc", ""),
        (200, "GET", "/openapi.json", ""),
        (200, "GET", "/static-offline-docs/swagger-ui.css", ""),
        (403, "GET", "/secret/{guarded}", ""),
        (403, "POST", "/secret/{guarded}", '{"passphrase": "wrong"}'),
        (404, "GET", "/secret/nothing", ""),
        (404, "GET", "/nothing", ""),
        (405, "PUT", "/secret", ""),
        (410, "GET", "/secret/{spent}", ""),
        (413, "POST", "/secret", json.dumps({"secret": "x" * 70_000})),
        (422, "POST", "/secret", "{}"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_every_answer_forbids_storing(
    vault: httpx.Client, prefix: str, status: int, method: str, path: str, body: str
) -> None:
    keys = {"live": create_key(vault), "guarded": create_key(vault, **TO_READ)}
    keys["spent"] = create_key(vault)
    vault.get(f"/secret/{keys['spent']}")
    response = vault.request(method, prefix + path.format_map(keys), content=body)
    assert response.status_code == status
    assert [response.headers.get_list(name) for name in NO_STORE] == [[value] for value in NO_STORE.values()]


def test_health_is_ok(vault: httpx.Client) -> None:
    assert vault.get("/health").json() == {"status": "ok", "postgres": "up", "redis": "up"}


def test_openapi_lists_every_call(vault: httpx.Client) -> None:
    paths = vault.get("/openapi.json").json()["paths"]
    assert {path: set(paths[path]) for path in paths} == {
        "/": {"get"},
        "/secret": {"post"},
        "/secret/{secret_key}": {"get", "post", "delete"},
        "/secret/{secret_key}/status": {"get"},
        "/receipt/{receipt_key}": {"get", "delete"},
        "/health": {"get"},
    }


def test_openapi_shows_the_bodies(vault: httpx.Client) -> None:
    document = vault.get("/openapi.json").json()
    operation = document["paths"]["/secret"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert set(schema["properties"]) == {"secret", "passphrase", "passphrase_scope", "ttl_seconds"}
    assert {"201", "401", "413", "422", "429", "503"} <= set(operation["responses"])


@pytest.mark.parametrize("page", ["/docs", "/redoc", "/api/v1/docs", "/api/v1/redoc"])
def test_documentation_needs_no_other_host(vault: httpx.Client, page: str) -> None:
    html = vault.get(page).text
    references = re.findall(r"""(?:src|href|url|spec-url)\s*[=:]\s*["']([^"']+)""", html)
    assert [reference for reference in references if not re.match("/(?!/)", reference)] == []
    assert {vault.get(reference).status_code for reference in references} == {200}


def test_openapi_describes_every_operation_and_error(vault: httpx.Client) -> None:
    document = vault.get("/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert all(operation["summary"] and operation["description"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    errors = [answer for one in operations for status, answer in one["responses"].items() if status >= "400"]
    assert all(answer["content"]["application/problem+json"]["examples"] for answer in errors)


def test_openapi_tells_the_truth_about_a_creation(vault: httpx.Client) -> None:
    """What a generated client would rely on: the example goes in, and what comes out has the described members."""
    schemas = vault.get("/openapi.json").json()["components"]["schemas"]
    example = {
        name: field["examples"][0]
        for name, field in schemas["CreateSecret"]["properties"].items()
        if "examples" in field
    }
    answer = vault.post("/secret", json=example).json()
    assert set(answer) == set(schemas["SecretCreated"]["properties"]) == set(schemas["SecretCreated"]["required"])
    assert vault.get(f"/secret/{answer['secret_key']}").json() == {"secret": example["secret"]}


# --- curl --------------------------------------------------------------------------------------------------------


def curl(line: str, folder: Path) -> str:
    """What a line of a shell prints."""
    ended = subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return ended.stdout


def curl_lines(vault: httpx.Client, **replaced: str) -> dict[str, str]:
    """The lines of GET /, by the sentence above each."""
    text = vault.get("/").text
    for name, value in replaced.items():
        text = text.replace(name, value)
    paragraphs = [paragraph.splitlines() for paragraph in text.split("\n\n")]
    return {
        f"{lines[0]} {number}": line.strip().replace("curl ", "curl -sS ", 1)
        for lines in paragraphs
        for number, line in enumerate(lines[1:])
        if line.startswith("    curl ")
    }


def test_home_shows_curl_lines_for_this_very_host(vault: httpx.Client) -> None:
    response = vault.get("/")
    assert response.headers["content-type"].startswith("text/plain")
    assert f"{str(vault.base_url).rstrip('/')}/secret" in response.text


def test_every_curl_line_works(vault: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_bytes(secrets.token_bytes(100))
    stored = {name: curl(line, tmp_path) for name, line in curl_lines(vault).items() if name.startswith("Store")}
    link, file_document, guarded = stored.values()
    keys = iter(
        [link.strip().partition("#")[2], json.loads(guarded)["secret_key"], json.loads(file_document)["secret_key"]]
    )
    read_lines = [line for name, line in curl_lines(vault).items() if name.startswith("Read")]
    (text, protected, _) = [curl(line.replace("KEY", next(keys)), tmp_path) for line in read_lines]
    assert (json.loads(text), json.loads(protected)) == ({"secret": "hello"}, {"secret": "hello"})
    assert len((tmp_path / "FILE").read_bytes()) == 100


def test_every_curl_line_about_a_kept_secret_works(vault: httpx.Client, tmp_path: Path) -> None:
    answers = []
    for name in ("Look", "Destroy", "As"):
        created = create(vault, passphrase="PASSPHRASE")
        for title, line in curl_lines(vault).items():
            if title.startswith(name):
                line = line.replace("RECEIPT_KEY", created["receipt_key"]).replace("/KEY", f"/{created['secret_key']}")
                answers.append(json.loads(curl(line, tmp_path)))
    assert [answer["status"] for answer in answers] == ["unread", "secret_deleted", "unread", "secret_deleted"]


def test_readme_curl_lines_work(vault: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_bytes(b"not a key")
    lines = [line.strip() for line in (HERE / "README.md").read_text().splitlines() if line.startswith("    curl ")]
    assert len(lines) >= 8
    for line in lines:
        created = create(vault, passphrase="p")
        keys = f"HOST={vault.base_url} KEY={created['secret_key']} RECEIPT_KEY={created['receipt_key']}"
        answer = curl(f"{keys}; {line.replace('curl ', 'curl -sS --fail-with-body ', 1)}", tmp_path)
        assert answer.strip()


@pytest.mark.parametrize("label", ["text/plain", "application/octet-stream", "text/plain; charset=utf-8"])
@pytest.mark.parametrize("secret", [b"hello\n", b"{}", bytes(range(256)), "\u20ac".encode()])
def test_raw_body_comes_back_byte_for_byte(vault: httpx.Client, label: str, secret: bytes) -> None:
    response = vault.post("/secret?ttl_seconds=60", content=secret, headers={"Content-Type": label})
    key = response.json()["secret_key"]
    assert vault.get(f"/secret/{key}", headers={"Accept": "application/octet-stream"}).content == secret


def test_secret_that_is_not_text_comes_in_json_as_base64(vault: httpx.Client) -> None:
    response = vault.post("/secret", content=b"\xff\x00", headers={"Content-Type": "text/plain"})
    document = vault.get(f"/secret/{response.json()['secret_key']}").json()
    assert document == {"secret": "/wA=", "encoding": "base64"}


def test_plain_text_is_the_bare_secret(vault: httpx.Client) -> None:
    response = vault.get(f"/secret/{create_key(vault, 'bare')}", headers={"Accept": "text/plain"})
    assert (response.content, response.headers["content-type"]) == (b"bare", "text/plain; charset=utf-8")


def test_plain_text_is_the_bare_url_on_creation(vault: httpx.Client) -> None:
    response = vault.post("/secret", content=CREATION, headers={"Accept": "text/plain"})
    url, key = response.text.rstrip("\n").split("/#")
    assert (response.status_code, url) == (201, str(vault.base_url).rstrip("/"))
    assert vault.get(f"/secret/{key}").json() == {"secret": "a secret"}


def test_ttl_of_a_raw_body_stands_in_the_query(vault: httpx.Client, database: Database) -> None:
    response = vault.post("/secret?ttl_seconds=77", content=b"x", headers={"Content-Type": "text/plain"})
    assert events(database, response.json()["secret_key"])[0].extra_data["ttl_seconds"] == 77


@pytest.mark.parametrize("query", ["ttl=60", "ttl_seconds=0", "ttl_seconds=x", "ttl_seconds=", "passphrase=p"])
def test_raw_body_with_a_bad_query_is_refused(vault: httpx.Client, database: Database, query: str) -> None:
    before = database.counts()
    response = vault.post(f"/secret?{query}", content=b"x", headers={"Content-Type": "text/plain"})
    assert query.partition("=")[0] in problem(response, 422, "invalid")["detail"]
    assert database.counts() == before


def test_json_body_with_a_query_is_refused(vault: httpx.Client, database: Database) -> None:
    before = database.counts()
    assert "ttl_seconds" in problem(vault.post("/secret?ttl_seconds=60", content=CREATION), 422, "invalid")["detail"]
    assert database.counts() == before


@pytest.mark.parametrize(("size", "status", "code"), [(0, 422, "invalid"), (65537, 413, "too_large")])
def test_raw_body_of_a_bad_size_is_refused(
    vault: httpx.Client, database: Database, size: int, status: int, code: str
) -> None:
    before = database.counts()
    problem(vault.post("/secret", content=b"x" * size, headers={"Content-Type": "text/plain"}), status, code)
    assert database.counts() == before


# --- Receipts ----------------------------------------------------------------------------------------------------


def test_receipt_shows_who_read_the_secret(vault: httpx.Client) -> None:
    created = create(vault)
    vault.get(f"/secret/{created['secret_key']}", headers={"User-Agent": "reader/1"})
    receipt = vault.get(f"/receipt/{created['receipt_key']}").json()
    assert (receipt["status"], [event["action"] for event in receipt["events"]]) == ("read", ["created", "read"])
    event = receipt["events"][1]
    assert (event["ip_address"], event["user_agent"], event["by"]) == ("127.0.0.1", "reader/1", "secret_key")


def test_receipt_of_an_unread_secret_says_so(vault: httpx.Client) -> None:
    created = create(vault)
    receipt = vault.get(f"/receipt/{created['receipt_key']}").json()
    assert (receipt["status"], receipt["expires_at"]) == ("unread", created["expires_at"])


def test_receipt_of_an_expired_secret_says_so_before_and_after_the_cleanup(
    swept: tuple[Database, httpx.Client],
) -> None:
    database, client = swept
    created = create(client, ttl_seconds=1)
    until(lambda: actions(database, created["secret_key"]) == ["created", "expired"])
    assert client.get(f"/receipt/{created['receipt_key']}").json()["status"] == "expired"


def test_receipt_shows_denials_with_their_reason(vault: httpx.Client) -> None:
    created = create(vault, **TO_READ)
    read(vault, created["secret_key"], "wrong")
    events = vault.get(f"/receipt/{created['receipt_key']}").json()["events"]
    assert (events[1]["action"], events[1]["reason"]) == ("denied", "wrong_passphrase")


def test_secret_key_opens_no_receipt(vault: httpx.Client) -> None:
    key = create_key(vault)
    problem(vault.get(f"/receipt/{key}"), 404, "not_found")
    problem(vault.delete(f"/receipt/{key}"), 404, "not_found")
    assert vault.get(f"/secret/{key}").status_code == 200


@pytest.mark.parametrize("guard", [{}, TO_DELETE, TO_READ])
def test_receipt_revokes_without_a_passphrase(vault: httpx.Client, guard: Document) -> None:
    created = create(vault, **guard)
    assert vault.delete(f"/receipt/{created['receipt_key']}").json() == {"status": "secret_deleted"}
    problem(vault.get(f"/secret/{created['secret_key']}"), 410, "deleted")
    events = vault.get(f"/receipt/{created['receipt_key']}").json()["events"]
    assert (events[-1]["action"], events[-1]["by"]) == ("deleted", "receipt_key")


def test_receipt_revokes_nothing_that_was_read(vault: httpx.Client) -> None:
    created = create(vault)
    vault.get(f"/secret/{created['secret_key']}")
    problem(vault.delete(f"/receipt/{created['receipt_key']}"), 410, "already_read")


def test_receipt_ends_with_the_history(vault: httpx.Client, database: Database) -> None:
    created = create(vault)
    database.rows("delete from secret_logs where secret_id = $1", id_of(created["secret_key"]))
    problem(vault.get(f"/receipt/{created['receipt_key']}"), 404, "not_found")


# --- Links -------------------------------------------------------------------------------------------------------

BROWSER: Final = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.mark.parametrize(
    "headers",
    [
        {"Accept": BROWSER},
        {"Sec-Purpose": "prefetch;prerender"},
        {"Purpose": "prefetch"},
        {"X-Moz": "prefetch"},
        {"User-Agent": "Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)"},
        {"User-Agent": "TelegramBot (like TwitterBot)"},
        {"User-Agent": "WhatsApp/2.23.20.0"},
        {"User-Agent": "Mozilla/5.0 (compatible; Discordbot/2.0; +https://discordapp.com)"},
        {"User-Agent": "facebookexternalhit/1.1"},
        {"User-Agent": "Twitterbot/1.0"},
        {"User-Agent": "LinkedInBot/1.0 (compatible; Mozilla/5.0)"},
        {"User-Agent": "Mozilla/5.0 SkypeUriPreview Preview/0.5"},
        {"User-Agent": "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"},
        {"User-Agent": "Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)"},
        {"User-Agent": "Mozilla/5.0 (Windows NT 10.0) SafeLinks"},
    ],
)
def test_preview_gets_the_page_and_reads_nothing(vault: httpx.Client, headers: dict[str, str]) -> None:
    key = create_key(vault)
    response = vault.get(f"/secret/{key}", headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert vault.get(f"/secret/{key}").json() == {"secret": "a secret"}


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_looking_methods_read_nothing(vault: httpx.Client, method: str) -> None:
    key = create_key(vault)
    vault.request(method, f"/secret/{key}")
    assert vault.get(f"/secret/{key}").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"User-Agent": "curl/8.14.1", "Accept": "*/*"},
        {"User-Agent": "python-requests/2.32.5", "Accept": "*/*"},
        {"User-Agent": "PostmanRuntime/7.49.0", "Accept": "*/*"},
        {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Chrome/140.0 Safari/537.36", "Accept": "application/json"},
    ],
)
def test_program_gets_the_secret(vault: httpx.Client, headers: dict[str, str]) -> None:
    assert vault.get(f"/secret/{create_key(vault)}", headers=headers).json() == {"secret": "a secret"}


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc"])
def test_page_runs_no_script_but_its_own(vault: httpx.Client, path: str) -> None:
    response = vault.get(path, headers={"Accept": BROWSER})
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert "unsafe-inline" not in policy["script-src"]
    assert policy["frame-ancestors"] == "'none'"


# --- The page ----------------------------------------------------------------------------------------------------
#
# In Debian's Chromium, headless. `python3 local.py test` leaves these out, and says so, where there is none.

Window: TypeAlias = webdriver.Chrome


@contextmanager
def window(folder: Path, *, language: str = "en", width: int = 1000) -> Iterator[Window]:
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
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver"))
    if width < 500:  # a window cannot be that narrow; a telephone's screen can
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        yield browser
        # Chromium reports an error status as an error; ReDoc asks for its maker's logo, which the policy blocks.
        usual = ("status of 403", "status of 404", "status of 410", "redoc/logo-mini.svg")
        messages = [entry["message"] for entry in entries(browser, "browser")]
        assert [one for one in messages if not any(words in one for words in usual)] == []
        assert asked_hosts(browser) <= {"127.0.0.1"}
    finally:
        browser.quit()


def entries(browser: Window, log: str) -> list[Document]:
    found: list[Document] = browser.get_log(log)  # type: ignore[no-untyped-call]  # Selenium has no types here
    return found


def asked_hosts(browser: Window) -> set[str]:
    """The hosts of all requests but those that the page's policy blocked."""
    messages = [json.loads(entry["message"])["message"] for entry in entries(browser, "performance")]
    blocked = {one["params"]["requestId"] for one in messages if one["params"].get("blockedReason")}
    sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    urls = [one["request"]["url"] for one in sent if one["requestId"] not in blocked]
    return {httpx.URL(url).host for url in urls if url.startswith("http")}


def shown(browser: Window, name: str) -> WebElement:
    """The element with this id, once it can be seen."""
    element: WebElement = WebDriverWait(browser, 10).until(visibility_of_element_located((By.ID, name)))
    return element


def says(browser: Window, *words: str) -> None:
    """Wait until the page shows one of these words."""
    WebDriverWait(browser, 10).until(
        lambda one: any(word in one.find_element(By.TAG_NAME, "body").text for word in words)
    )


def content(element: WebElement) -> str:
    return str(element.get_property("value") or element.text)


def fill_in(
    browser: Window, vault: httpx.Client, text: str, passphrase: str = "", scope: str = "read"
) -> tuple[str, str]:
    """Create a secret on the page. Returns the link and the receipt link."""
    browser.get(str(vault.base_url))
    shown(browser, "secret").send_keys(text)
    if passphrase:
        shown(browser, "passphrase").send_keys(passphrase)
        browser.find_element(By.ID, f"scope-{scope}").click()
    shown(browser, "create").click()
    return content(shown(browser, "link")), content(shown(browser, "receipt-link"))


@pytest.mark.browser
def test_page_hands_a_secret_to_another_browser_once(vault: httpx.Client, tmp_path: Path) -> None:
    with window(tmp_path) as creator, window(tmp_path) as reader:
        link, _ = fill_in(creator, vault, "from the page")
        reader.get(link)
        shown(reader, "open").click()
        assert content(shown(reader, "shown")) == "from the page"
        reader.refresh()
        says(reader, "This secret was read")
        assert link.partition("#")[2] not in reader.current_url
        assert "from the page" not in reader.page_source


@pytest.mark.browser
def test_page_asks_before_it_reads(vault: httpx.Client, tmp_path: Path) -> None:
    key = create_key(vault)
    with window(tmp_path) as reader:
        reader.get(f"{vault.base_url}/#{key}")
        shown(reader, "open")
    assert vault.get(f"/secret/{key}/status").json()["status"] == "unread"


@pytest.mark.browser
def test_page_asks_for_the_passphrase_until_it_is_right(vault: httpx.Client, tmp_path: Path) -> None:
    with window(tmp_path) as browser:
        link, _ = fill_in(browser, vault, "guarded", "right")
        browser.get("about:blank")
        browser.get(link)
        shown(browser, "open-passphrase").send_keys("wrong")
        shown(browser, "open").click()
        says(browser, "4 attempts left")
        shown(browser, "open-passphrase").clear()
        shown(browser, "open-passphrase").send_keys("right")
        shown(browser, "open").click()
        assert content(shown(browser, "shown")) == "guarded"


@pytest.mark.browser
def test_page_revokes_from_the_receipt(vault: httpx.Client, tmp_path: Path) -> None:
    with window(tmp_path) as browser:
        link, receipt_link = fill_in(browser, vault, "to revoke")
        browser.get("about:blank")
        browser.get(receipt_link)
        shown(browser, "revoke").click()
        shown(browser, "confirm-yes").click()
        says(browser, "revoked")
    problem(vault.get(f"/secret/{link.partition('#')[2]}"), 410, "deleted")


@pytest.mark.browser
def test_address_bar_opens_the_page_for_a_secret(vault: httpx.Client, tmp_path: Path) -> None:
    key = create_key(vault, "by its path")
    with window(tmp_path) as browser:
        browser.get(f"{vault.base_url}/secret/{key}")
        shown(browser, "open").click()
        assert content(shown(browser, "shown")) == "by its path"


@pytest.mark.browser
@pytest.mark.parametrize("language", ["en", "ru"])
def test_page_fits_a_telephone(vault: httpx.Client, tmp_path: Path, language: str) -> None:
    with window(tmp_path, language=language, width=360) as browser:
        link, receipt_link = fill_in(browser, vault, "x" * 200)
        for address, control in ((str(vault.base_url), "create"), (link, "open"), (receipt_link, "revoke")):
            browser.get("about:blank")
            browser.get(address)
            shown(browser, control)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
            assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == language


@pytest.mark.browser
@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_documentation_shows_itself_under_its_policy(vault: httpx.Client, tmp_path: Path, path: str) -> None:
    with window(tmp_path) as browser:
        browser.get(f"{vault.base_url}{path}")
        says(browser, "Store a secret", "Create Secret")


# --- Audit log ---------------------------------------------------------------------------------------------------


def test_creation_is_logged(vault: httpx.Client, database: Database) -> None:
    response = vault.post("/secret", json={"secret": "s", "ttl_seconds": 77}, headers={"User-Agent": "curl/8"})
    (event,) = events(database, response.json()["secret_key"])
    assert (event.action, event.ip_address) == ("created", "127.0.0.1")
    assert 0 <= event.age_seconds < 10
    assert (event.extra_data["ttl_seconds"], event.extra_data["user_agent"]) == (77, "curl/8")


def test_read_is_logged(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    vault.get(f"/secret/{key}", headers={"User-Agent": "curl/8"})
    _, event = events(database, key)
    assert (event.action, event.ip_address) == ("read", "127.0.0.1")
    assert 0 <= event.age_seconds < 10
    assert (event.extra_data["by"], event.extra_data["user_agent"]) == ("secret_key", "curl/8")


def test_delete_is_logged(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault)
    vault.delete(f"/secret/{key}", headers={"User-Agent": "curl/8"})
    _, event = events(database, key)
    assert (event.action, event.ip_address) == ("deleted", "127.0.0.1")
    assert (event.extra_data["by"], event.extra_data["user_agent"]) == ("secret_key", "curl/8")


def test_refusal_is_logged(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault, **TO_READ)
    read(vault, key, "wrong")
    _, event = events(database, key)
    assert (event.action, event.ip_address, event.extra_data["reason"]) == ("denied", "127.0.0.1", "wrong_passphrase")


@pytest.mark.parametrize("scope", ["delete", "read"])
def test_log_tells_what_the_passphrase_guards(vault: httpx.Client, database: Database, scope: str) -> None:
    key = create_key(vault, **{**TO_READ, "passphrase_scope": scope})
    assert events(database, key)[0].extra_data["passphrase"] == scope


def test_flood_of_refusals_does_not_flood_the_log(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault, **TO_READ)
    for _ in range(60):
        problem(vault.get(f"/secret/{key}"), 403, "passphrase_required")
    assert 5 <= actions(database, key).count("denied") <= 30


@pytest.mark.parametrize("user_agent", [b"x" * 5000, b"caf\xe9 \xff\xfe", b'"}, "by": "x', b"\\u0000", b""])
def test_any_user_agent_is_logged_up_to_200_characters(
    vault: httpx.Client, database: Database, user_agent: bytes
) -> None:
    response = vault.post("/secret", json={"secret": "s"}, headers=[(b"User-Agent", user_agent)])
    (event,) = events(database, response.json()["secret_key"])
    assert event.extra_data["user_agent"] == user_agent.decode("latin-1")[:200]


def test_forwarded_address_of_a_stranger_is_not_believed(vault: httpx.Client, database: Database) -> None:
    response = vault.post("/secret", json={"secret": "s"}, headers={"X-Forwarded-For": "203.0.113.7"})
    assert events(database, response.json()["secret_key"])[0].ip_address == "127.0.0.1"


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::7"])
def test_forwarded_address_of_a_trusted_proxy_is_logged(
    proxied: httpx.Client, database: Database, address: str
) -> None:
    key = create_from(proxied, address).json()["secret_key"]
    proxied.get(f"/secret/{key}", headers={"X-Forwarded-For": address})
    assert [event.ip_address for event in events(database, key)] == [address, address]


def test_address_that_the_client_itself_forwarded_is_not_believed(proxied: httpx.Client, database: Database) -> None:
    key = create_from(proxied, "198.51.100.1, 203.0.113.8").json()["secret_key"]
    assert events(database, key)[0].ip_address == "203.0.113.8"


@pytest.mark.parametrize(
    "garbage", ["garbage", "' or 1=1 --", ",,,", "999.1.1.1", "x" * 4000, "::1%eth0", "1.2.3.4:80"]
)
def test_forwarded_garbage_does_no_harm(proxied: httpx.Client, database: Database, garbage: str) -> None:
    response = create_from(proxied, garbage)
    assert events(database, response.json()["secret_key"])[0].action == "created"


# --- Cache -------------------------------------------------------------------------------------------------------


def test_new_secret_is_cached_for_five_minutes_and_its_key_for_its_ttl(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault, ttl_seconds=1234)
    assert 290 <= cached_seconds(redis, "secret", key) <= 300
    assert 1224 <= cached_seconds(redis, "key", key) <= 1234


def test_cache_seconds_is_a_setting(proxied: httpx.Client, redis: Redis) -> None:
    key = create_key(proxied)
    assert 590 <= cached_seconds(redis, "secret", key) <= 600


def test_ciphertext_stays_cached_after_a_read_but_not_its_key(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault)
    vault.get(f"/secret/{key}")
    assert 290 <= cached_seconds(redis, "secret", key) <= 300
    assert cached(redis, "key", key) is None


def test_ciphertext_stays_cached_after_a_delete_but_not_its_key(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault)
    delete(vault, key)
    assert 290 <= cached_seconds(redis, "secret", key) <= 300
    assert cached(redis, "key", key) is None


def test_ciphertext_stays_cached_longer_than_a_short_lived_secret(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault, ttl_seconds=1)
    assert cached_seconds(redis, "key", key) <= 1
    assert 290 <= cached_seconds(redis, "secret", key) <= 300


def test_key_of_a_secret_whose_reading_needs_a_passphrase_is_not_cached(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault, **TO_READ)
    assert cached(redis, "secret", key) is not None
    assert cached(redis, "key", key) is None


def test_read_works_after_redis_lost_everything(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault, "hello")
    redis.flushall()
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_stale_copy_in_redis_is_not_handed_out(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault)
    wrapped_key = cached(redis, "key", key)
    vault.get(f"/secret/{key}")
    redis.set(f"key:{{{id_of(key)}}}", wrapped_key)
    assert cached(redis, "secret", key) is not None
    problem(vault.get(f"/secret/{key}"), 410, "already_read")


def test_expired_copy_in_redis_is_not_handed_out(vault: httpx.Client, database: Database, redis: Redis) -> None:
    key = create_key(vault)
    expire(database, key)
    assert cached(redis, "key", key) is not None
    problem(vault.get(f"/secret/{key}"), 410, "expired")


@pytest.mark.parametrize("kind", ["secret", "key"])
@pytest.mark.parametrize("damage", [b"", b"garbage", b"\xff" * 100])
def test_damaged_cache_costs_nobody_a_secret(vault: httpx.Client, redis: Redis, kind: str, damage: bytes) -> None:
    key = create_key(vault, "hello")
    redis.set(f"{kind}:{{{id_of(key)}}}", damage)
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_cache_whose_answers_cannot_be_read_costs_nobody_a_secret(database: Database, redis: Redis) -> None:
    url = f"{database.environment['REDIS_URL']}?decode_responses=true"  # as text, and this is none
    with serving(database, REDIS_URL=url) as client:
        key = create_key(client, "hello")
        redis.set(f"secret:{{{id_of(key)}}}", b"\xff")
        assert client.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_cache_whose_answers_cannot_be_read_hinders_no_revocation(database: Database, redis: Redis) -> None:
    url = f"{database.environment['REDIS_URL']}?decode_responses=true"
    with serving(database, REDIS_URL=url) as client:
        made = create(client, passphrase="p", passphrase_scope="read")
        redis.set(f"secret:{{{id_of(made['secret_key'])}}}", b"\xff")
        assert client.delete(f"/receipt/{made['receipt_key']}").json() == {"status": "secret_deleted"}


def test_cache_entry_of_another_kind_costs_nobody_a_secret(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault, "hello")
    name = f"key:{{{id_of(key)}}}"
    redis.delete(name)
    redis.rpush(name, "a list")
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_refused_read_leaves_the_secret_readable_without_the_cache(vault: httpx.Client, redis: Redis) -> None:
    key = create_key(vault, "hello", **TO_DELETE)
    problem(vault.delete(f"/secret/{key}"), 403, "passphrase_required")
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


# --- Cleanup -----------------------------------------------------------------------------------------------------


def test_cleanup_ends_and_logs_an_expired_secret(swept: tuple[Database, httpx.Client]) -> None:
    database, client = swept
    key = create_key(client)
    expire(database, key)
    until(lambda: actions(database, key) == ["created", "expired"])
    assert database.value("select count(*) from secrets where id = $1", id_of(key)) == 0
    assert events(database, key)[1].ip_address is None


def test_cleaned_secret_says_the_same_as_before(swept: tuple[Database, httpx.Client]) -> None:
    database, client = swept
    key = create_key(client)
    expired_at = expire(database, key)
    until(lambda: "expired" in actions(database, key))
    answer = problem(client.get(f"/secret/{key}"), 410, "expired")
    assert datetime.fromisoformat(answer["ended_at"]) == expired_at


def test_cleanup_forgets_the_cached_key_and_leaves_the_ciphertext(
    swept: tuple[Database, httpx.Client], redis: Redis
) -> None:
    database, client = swept
    key = create_key(client)
    expire(database, key)
    until(lambda: cached(redis, "key", key) is None)
    assert 280 <= cached_seconds(redis, "secret", key) <= 300


def test_cleanup_leaves_live_secrets(swept: tuple[Database, httpx.Client]) -> None:
    database, client = swept
    live, dying = create_key(client, "hello"), create_key(client)
    expire(database, dying)
    until(lambda: "expired" in actions(database, dying))
    assert client.get(f"/secret/{live}").json() == {"secret": "hello"}


def test_two_services_log_each_expiry_once(swept: tuple[Database, httpx.Client]) -> None:
    database, _ = swept
    marker = secrets.token_hex(8)
    database.rows(
        """
        insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, created_at, expires_at)
        select gen_random_uuid(), '', '', $1, now() - interval '2 s', now() - interval '1 s'
        from generate_series(1, 5000)
        """,
        marker,
    )
    until(lambda: database.value("select count(*) from secrets where key_fingerprint = $1", marker) == 0)
    logged = database.rows("select count(*) as n from secret_logs where action = 'expired' group by secret_id")
    assert len(logged) >= 5000
    assert {row["n"] for row in logged} == {1}


def test_log_rows_end_after_their_retention(swept: tuple[Database, httpx.Client]) -> None:
    database, _ = swept
    old, young = UUID(int=secrets.randbits(128)), UUID(int=secrets.randbits(128))
    database.rows(
        """
        insert into secret_logs (id, secret_id, action, created_at)
        overriding system value
        values (-2, $1, 'read', now() - interval '91 days'), (-1, $2, 'read', now() - interval '89 days')
        """,
        old,
        young,
    )
    remaining = "select secret_id from secret_logs where secret_id = any($1)"
    until(lambda: [row["secret_id"] for row in database.rows(remaining, [old, young])] == [young])


# --- Quota and tokens --------------------------------------------------------------------------------------------


def fill_quota(client: httpx.Client, size: int, count: int) -> tuple[str, list[httpx.Response]]:
    """A new address, and the answers to its first creations: all in one minute, for the quota goes by the clock."""
    while True:
        minute, address = time.time() // 60, f"2001:db8:{secrets.token_hex(2)}:{secrets.token_hex(2)}::1"
        answers = [create_from(client, address, secret="x" * size) for _ in range(count)]
        if time.time() // 60 == minute:
            return address, answers


def test_creation_over_the_quota_is_refused_and_not_stored(limited: httpx.Client, database: Database) -> None:
    address, answers = fill_quota(limited, 1, 5)
    assert [answer.status_code for answer in answers] == [201, 201, 201, 201, 429]
    problem(answers[-1], 429, "rate_limited")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert database.value("select count(*) from secret_logs where ip_address = $1::text::inet", address) == 4


def test_quota_counts_bytes(limited: httpx.Client) -> None:
    _, answers = fill_quota(limited, 2000, 2)
    assert [answer.status_code for answer in answers] == [201, 429]


def test_quota_of_one_address_is_not_that_of_another(limited: httpx.Client) -> None:
    fill_quota(limited, 1, 5)
    assert fill_quota(limited, 1, 1)[1][0].status_code == 201


def test_quota_does_not_keep_anybody_from_reading(limited: httpx.Client) -> None:
    address, answers = fill_quota(limited, 1, 5)
    key = answers[0].json()["secret_key"]
    assert limited.get(f"/secret/{key}", headers={"X-Forwarded-For": address}).status_code == 200


@pytest.fixture(scope="module")
def tokened(database: Database) -> Iterator[httpx.Client]:
    """A service where creation needs a token."""
    with serving(database, API_TOKENS="a-token, b-token") as client:
        yield client


@pytest.mark.parametrize(
    "authorization",
    [None, "", "a-token", "Bearer", "Bearer a", f"Bearer {CANARY}", "Bearer a-token, b-token", "Basic a-token"],
)
def test_creation_without_a_token_is_refused_and_not_stored(
    tokened: httpx.Client, database: Database, authorization: str | None
) -> None:
    before = database.counts()
    headers = {} if authorization is None else {"Authorization": authorization}
    response = tokened.post("/secret", json={"secret": "s"}, headers=headers)
    problem(response, 401, "token_required")
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert CANARY not in response.text
    assert database.counts() == before


@pytest.mark.parametrize("authorization", ["Bearer a-token", "Bearer b-token", "bearer a-token"])
def test_either_token_creates_and_reading_needs_none(tokened: httpx.Client, authorization: str) -> None:
    response = tokened.post("/secret", json={"secret": "hello"}, headers={"Authorization": authorization})
    assert response.status_code == 201
    assert tokened.get(f"/secret/{response.json()['secret_key']}").json() == {"secret": "hello"}


# --- Start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES_PORT", CANARY),
        ("REDIS_PORT", "0"),
        ("MAX_TTL_SECONDS", "0"),
        ("DEFAULT_TTL_SECONDS", "604801"),
        ("MAX_SECRET_BYTES", "-1"),
        ("CACHE_SECONDS", "200"),
        ("CLEANUP_INTERVAL_SECONDS", "nan"),
        ("LOG_RETENTION_DAYS", CANARY),
        ("CREATE_QUOTA_KIB_PER_MINUTE", "-1"),
        ("WORKERS", "x"),
        ("PORT", CANARY),
        ("PUBLIC_URL", CANARY),
        ("ENCRYPTION_KEY", CANARY),
        ("ENCRYPTION_KEY", f"{ENCRYPTION_KEY},{CANARY}"),
        ("ENCRYPTION_KEY", ENCRYPTION_KEY[:-2]),
        ("REDIS_URL", f"nonsense://user:{CANARY}@localhost"),
    ],
)
def test_bad_setting_stops_the_start_with_a_line_that_names_it(database: Database, name: str, value: str) -> None:
    line = refused_start(database, **{name: value})
    assert name in line
    assert CANARY not in line
    assert ENCRYPTION_KEY[:-2] not in line


def test_missing_tables_stop_the_start(database: Database) -> None:
    assert "schema.sql" in refused_start(fresh_database(database, schema=False))


def test_older_tables_stop_the_start(database: Database) -> None:
    older = fresh_database(database)
    older.rows("alter table secrets drop column attempts_since")
    assert "schema.sql" in refused_start(older)


def test_tables_load_twice(database: Database, stores: local.Stores) -> None:
    before = database.counts()
    stores.postgres.load(HERE / "schema.sql")
    assert database.counts() == before


@pytest.mark.parametrize("settings", [{"REDIS_URL": "unix:///no/such/socket"}, {"REDIS_URL": "", "REDIS_PORT": "1"}])
def test_missing_redis_is_a_warning(database: Database, tmp_path: Path, settings: dict[str, str]) -> None:
    log = tmp_path / "log"
    with serving(database, log, **settings) as client:
        assert client.get("/health").json() == {"status": "degraded", "postgres": "up", "redis": "down"}
        assert client.get(f"/secret/{create_key(client, 'hello')}").json() == {"secret": "hello"}
    assert "WARNING Redis" in log.read_text()


def test_secrets_outlive_a_restart(database: Database) -> None:
    with serving(database) as client:
        key = create_key(client, "hello")
    with serving(database) as client:
        assert client.get(f"/secret/{key}").json() == {"secret": "hello"}


# --- Encryption keys ---------------------------------------------------------------------------------------------

OLD_KEY: Final = Fernet.generate_key().decode()
NEW_KEY: Final = Fernet.generate_key().decode()


@pytest.mark.parametrize("members", [{}, TO_READ])
def test_secret_under_the_old_key_is_read_beside_the_new_one(database: Database, members: Document) -> None:
    rotated = fresh_database(database)
    with serving(rotated, ENCRYPTION_KEY=OLD_KEY) as client:
        key = create_key(client, "hello", **members)
    with serving(rotated, ENCRYPTION_KEY=f"{NEW_KEY},{OLD_KEY}") as client:
        assert read(client, key, members.get("passphrase")).json() == {"secret": "hello"}


def test_first_of_two_keys_wraps(database: Database) -> None:
    rotated = fresh_database(database)
    with serving(rotated, ENCRYPTION_KEY=f"{NEW_KEY},{OLD_KEY}") as client:
        create(client)
    (new,) = parse_encryption_keys(NEW_KEY)
    assert rotated.value("select key_fingerprint from secrets") == new.fingerprint


def test_wrong_encryption_key_stops_the_start(database: Database) -> None:
    rotated = fresh_database(database)
    with serving(rotated, ENCRYPTION_KEY=OLD_KEY) as client:
        create(client)
    line = refused_start(rotated, ENCRYPTION_KEY=NEW_KEY)
    assert parse_encryption_keys(OLD_KEY)[0].fingerprint in line
    assert not [key for key in (OLD_KEY, NEW_KEY) if key in line]


def test_key_that_only_expired_secrets_need_may_go(database: Database) -> None:
    rotated = fresh_database(database)
    with serving(rotated, ENCRYPTION_KEY=OLD_KEY) as client:
        expire(rotated, create_key(client))
    with serving(rotated, ENCRYPTION_KEY=NEW_KEY) as client:
        assert client.get(f"/secret/{create_key(client)}").status_code == 200


def test_key_file_is_made_private_and_never_overwritten(database: Database, tmp_path: Path) -> None:
    fresh, file = fresh_database(database), tmp_path / "encryption_key"
    with serving(fresh, ENCRYPTION_KEY="", ENCRYPTION_KEY_FILE=str(file), WORKERS="2") as client:
        key = create_key(client, "hello")
    made = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with serving(fresh, ENCRYPTION_KEY="", ENCRYPTION_KEY_FILE=str(file)) as client:
        assert client.get(f"/secret/{key}").json() == {"secret": "hello"}
    assert file.read_text() == made
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", ["", CANARY, "\n"])
def test_damaged_key_file_stops_the_start_and_is_not_overwritten(
    database: Database, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "encryption_key"
    file.write_text(content)
    line = refused_start(database, ENCRYPTION_KEY="", ENCRYPTION_KEY_FILE=str(file))
    assert "ENCRYPTION_KEY_FILE" in line
    assert CANARY not in line
    assert file.read_text() == content


def test_key_file_that_cannot_be_made_stops_the_start(database: Database, tmp_path: Path) -> None:
    line = refused_start(database, ENCRYPTION_KEY="", ENCRYPTION_KEY_FILE=str(tmp_path / "no" / "such" / "folder"))
    assert "ENCRYPTION_KEY_FILE" in line


# --- Leaks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What was said to the service, of which nothing may be found, and all that it answered to errors."""

    needles: tuple[bytes, ...]
    unread: str  # the key of a secret that is still there
    errors: bytes


@pytest.fixture(scope="module")
def evidence(vault: httpx.Client, database: Database, redis: Redis) -> Evidence:
    """Drive every success and every error of the API with recognisable secrets, passphrases and keys."""
    secret, right, wrong = (f"canary-{name}-{secrets.token_hex(8)}" for name in ("secret", "right", "wrong"))
    locked = {"passphrase": right, "passphrase_scope": "read"}
    created = [create(vault, secret, **members) for members in [locked, locked, locked, {}, {}, {}, {}]]
    read, guessed, unread, plain, deleted, expired, damaged = (document["secret_key"] for document in created)
    database.rows("update secrets set ciphertext = 'damaged' where id = $1", id_of(damaged))
    redis.delete(f"key:{{{id_of(damaged)}}}")
    expire(database, expired)
    calls: list[tuple[str, str, object]] = [
        ("GET", f"/secret/{read}", None),
        ("POST", f"/secret/{read}", {"passphrase": wrong}),
        ("DELETE", f"/secret/{read}", {"passphrase": wrong}),
        ("POST", f"/secret/{read}", {"passphrase": right}),
        ("POST", f"/secret/{read}", {"passphrase": right}),
        *[("POST", f"/secret/{guessed}", {"passphrase": wrong})] * 6,
        ("GET", f"/secret/{plain}", None),
        ("GET", f"/secret/{plain}", None),
        ("DELETE", f"/secret/{deleted}", None),
        ("GET", f"/secret/{deleted}/status", None),
        ("GET", f"/secret/{expired}", None),
        ("GET", f"/secret/{damaged}", None),
        ("GET", f"/secret/{created[0]['receipt_key']}", None),
        ("GET", f"/secrets/{unread}", None),
        ("GET", f"/secret/{unread}/{secret}", None),
        ("PUT", f"/secret/{unread}", {"passphrase": right}),
        ("GET", f"/health/{secret}?secret_key={unread}&passphrase={right}", None),
        ("POST", "/secret", {"secret": secret * 10_000, "passphrase": right}),
        ("POST", "/secret", {"secret": secret, "passphrase": right, "ttl_seconds": secret}),
        ("POST", "/secret", {"secret": [secret], "passphrase": [right]}),
        ("POST", "/secret", {"secret": secret + "\ud800", "passphrase": right}),
        ("POST", f"/secret/{unread}", {"passphrase": {right: secret}}),
        ("POST", f"/secret/{unread}", secret),
    ]
    responses = [vault.request(method, path, content=json.dumps(body)) for method, path, body in calls]
    responses.append(vault.post("/secret", content=f"secret={secret}&passphrase={right}"))
    found = {response.status_code for response in responses}
    assert found == {200, 403, 404, 405, 410, 413, 422, 429, 500}
    keys = [document[name] for document in created for name in ("secret_key", "receipt_key")]
    texts = [text.encode() for text in (secret, right, wrong, *keys)]
    raw_keys = [raw(key) for key in keys]
    return Evidence(
        needles=(*texts, *raw_keys, *(base64.b64encode(text)[:-4] for text in (*texts, *raw_keys))),
        unread=unread,
        errors=b"\n".join(response.content for response in responses if not response.is_success),
    )


def leaked(evidence: Evidence, haystack: bytes) -> list[bytes]:
    return [needle for needle in evidence.needles if needle in haystack]


def test_no_table_holds_a_secret_passphrase_or_key(evidence: Evidence, database: Database) -> None:
    tables = "select table_name from information_schema.tables where table_schema = 'public'"
    values = [
        value
        for table in database.rows(tables)
        for row in database.rows(f"select * from {table['table_name']}")  # noqa: S608 - the catalogue's own names
        for value in row
    ]
    haystack = b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in values)
    assert str(id_of(evidence.unread)).encode() in haystack
    assert leaked(evidence, haystack) == []


def test_no_redis_key_or_value_holds_a_secret_passphrase_or_key(evidence: Evidence, redis: Redis) -> None:
    names: Any = redis.keys()
    values: Any = [redis.get(name) or b"" for name in names if redis.type(name) == b"string"]
    haystack = b"\n".join([*names, *values])
    assert str(id_of(evidence.unread)).encode() in haystack
    assert leaked(evidence, haystack) == []


def test_no_line_of_the_service_holds_a_secret_passphrase_or_key(evidence: Evidence, log_file: Path) -> None:
    haystack = log_file.read_bytes()
    assert b"/secret/{secret_key}" in haystack
    assert leaked(evidence, haystack) == []


def test_no_line_of_postgresql_holds_a_secret_passphrase_or_key(evidence: Evidence, stores: local.Stores) -> None:
    haystack = stores.postgres.log.read_bytes()
    assert b"ready to accept connections" in haystack
    assert leaked(evidence, haystack) == []


def test_no_error_holds_a_secret_passphrase_or_key(evidence: Evidence) -> None:
    assert b"wrong_passphrase" in evidence.errors
    assert leaked(evidence, evidence.errors) == []


def test_all_stores_and_the_encryption_key_open_nothing_without_the_link(
    evidence: Evidence, database: Database, vault: httpx.Client
) -> None:
    key = create_key(vault)
    row = database.rows("select ciphertext, wrapped_key from secrets where id = $1", id_of(key))[0]
    for guess in (ENCRYPTION_KEY, base64.urlsafe_b64encode(id_of(key).bytes * 2)):
        with pytest.raises(InvalidToken):
            Fernet(guess).decrypt(row["wrapped_key"])
    assert unseal(row["ciphertext"], row["wrapped_key"], OPERATORS_KEY, raw(key)) == b"a secret"


# --- Races -------------------------------------------------------------------------------------------------------


def test_fifty_readers_of_one_secret_see_it_exactly_once(two_workers: httpx.Client) -> None:
    for number in range(20):
        key = create_key(two_workers, f"secret {number}")
        answers = at_once(two_workers, [("GET", f"/secret/{key}", None)] * 50)
        assert [body for status, body in answers if status == 200] == [{"secret": f"secret {number}"}]
        assert [body["code"] for status, body in answers if status != 200] == ["already_read"] * 49


def test_fifty_readers_see_it_exactly_once_without_the_cache(two_workers: httpx.Client, redis: Redis) -> None:
    for _ in range(10):
        key = create_key(two_workers)
        redis.flushall()
        answers = at_once(two_workers, [("GET", f"/secret/{key}", None)] * 50)
        assert sorted(status for status, _ in answers) == [200] + [410] * 49


def test_readers_with_the_passphrase_see_it_exactly_once(two_workers: httpx.Client) -> None:
    for _ in range(5):
        key = create_key(two_workers, **TO_READ)
        answers = at_once(two_workers, [("POST", f"/secret/{key}", '{"passphrase": "right"}')] * 5)
        assert sorted(status for status, _ in answers) == [200] + [410] * 4


def test_sixteen_readers_of_fifty_secrets_end_with_one_winner_each(
    two_workers: httpx.Client, stores: local.Stores
) -> None:
    texts = {create_key(two_workers, f"secret {number}"): f"secret {number}" for number in range(50)}

    def read_all(seed: int) -> list[tuple[Any, httpx.Response]]:
        order = random.Random(seed).sample(list(texts), len(texts))  # noqa: S311 - a shuffle, not a key
        return [(key, two_workers.get(f"/secret/{key}")) for key in order]

    with ThreadPoolExecutor(16) as readers:
        answers = [answer for some in readers.map(read_all, range(16)) for answer in some]
    won = [(key, response.json()["secret"]) for key, response in answers if response.status_code == 200]
    assert sorted(won) == sorted(texts.items())
    assert {response.status_code for _, response in answers} == {200, 410}
    assert b"deadlock" not in stores.postgres.log.read_bytes()


def test_bursts_of_readers_over_the_same_secrets_do_not_deadlock(
    two_workers: httpx.Client, stores: local.Stores
) -> None:
    shuffle = random.Random(0).sample  # noqa: S311 - an order, not a key
    for _ in range(5):
        keys = [create_key(two_workers) for _ in range(20)]
        calls: list[Call] = [("GET", f"/secret/{key}", None) for _ in range(10) for key in shuffle(keys, len(keys))]
        answers = at_once(two_workers, calls)
        assert sorted(status for status, _ in answers) == [200] * 20 + [410] * 180
    assert b"deadlock" not in stores.postgres.log.read_bytes()


@contextmanager
def held(database: Database, key: str, seconds: float) -> Iterator[None]:
    """Another transaction holds the row of a secret for this long."""
    hold = "select pg_sleep($2) from (select from secrets where id = $1 for update) as held"
    free = "select count(*) from (select from secrets where id = $1 for update skip locked) as free"
    with ThreadPoolExecutor(1) as thread:
        thread.submit(database.rows, hold, id_of(key), seconds)
        until(lambda: database.value(free, id_of(key)) == 0)
        yield


def test_read_outwaits_a_statement_that_holds_the_row(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault, "hello")
    with held(database, key, 0.2):
        assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_row_held_for_long_is_a_503_that_delays_nobody_else(vault: httpx.Client, database: Database) -> None:
    key, other = create_key(vault, "hello"), create_key(vault)
    with held(database, key, 1.5):
        answers = at_once(vault, [("GET", f"/secret/{key}", None), ("GET", f"/secret/{other}", None)])
    assert [status for status, _ in answers] == [503, 200]
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_of_readers_and_deleters_exactly_one_wins(two_workers: httpx.Client, database: Database) -> None:
    for number in range(20):
        key = create_key(two_workers)
        calls: list[Call] = [("GET", f"/secret/{key}", None), ("DELETE", f"/secret/{key}", None)] * 10
        answers = at_once(two_workers, calls[number % 2 :])
        (winner,) = [body for status, body in answers if status == 200]
        assert actions(database, key) == ["created", "read" if "secret" in winner else "deleted"]


def test_readers_and_cleanup_end_a_secret_once(two_workers: httpx.Client, database: Database) -> None:
    key = create_key(two_workers)
    database.rows("update secrets set expires_at = now() + interval '30 ms' where id = $1", id_of(key))
    answers = [two_workers.get(f"/secret/{key}").status_code for _ in range(50)]
    assert answers in ([200] + [410] * 49, [410] * 50)


def test_many_creations_at_once_are_all_stored(two_workers: httpx.Client) -> None:
    answers = at_once(two_workers, [("POST", "/secret", json.dumps({"secret": f"{n}"})) for n in range(200)])
    read = [two_workers.get(f"/secret/{body['secret_key']}").json()["secret"] for _, body in answers]
    assert read == [f"{number}" for number in range(200)]


# --- Faults ------------------------------------------------------------------------------------------------------


def processes_of(server: local.Server) -> set[psutil.Process]:
    """The server and its children: nobody else works in its folder."""
    return {one for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == str(server.folder)}


def kill(server: local.Server) -> None:
    while running := processes_of(server):  # again: one that is killed may just have started another
        for one in running:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def pause(server: local.Server) -> None:
    """A client still connects, but hears nothing."""
    stopped: set[psutil.Process] = set()
    while fresh := processes_of(server) - stopped:  # again: a child may have been on its way
        for one in fresh:
            with suppress(psutil.NoSuchProcess):
                one.suspend()
        stopped |= fresh


def resume(server: local.Server) -> None:
    for one in processes_of(server):
        one.resume()


@contextmanager
def paused(server: local.Postgres | local.Valkey, client: httpx.Client) -> Iterator[None]:
    """A server that hangs: it is there, and says nothing."""
    pause(server)
    try:
        yield
    finally:
        resume(server)
        until(lambda: client.get("/health").json().get("status") == "ok")


@contextmanager
def killed(server: local.Postgres | local.Valkey, client: httpx.Client) -> Iterator[None]:
    """A server that is gone, as after kill -9."""
    kill(server)
    try:
        yield
    finally:
        server.start()
        until(lambda: client.get("/health").json().get("status") == "ok")


def test_what_cannot_be_logged_does_not_happen(vault: httpx.Client, database: Database) -> None:
    key = create_key(vault, "hello")
    database.rows("alter table secret_logs add constraint full_disk check (false) not valid")
    try:
        before = database.counts()
        problem(vault.post("/secret", json={"secret": "s"}), 503, "unavailable")
        problem(vault.get(f"/secret/{key}"), 503, "unavailable")
        assert database.counts() == before
    finally:
        database.rows("alter table secret_logs drop constraint full_disk")
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


@pytest.mark.parametrize("fault", [paused, killed])
def test_without_redis_secrets_are_created_read_and_deleted(
    vault: httpx.Client, stores: local.Stores, fault: Callable[..., Any]
) -> None:
    key = create_key(vault, "before")
    with fault(stores.valkey, vault):
        started = time.monotonic()
        assert vault.get(f"/secret/{key}").json() == {"secret": "before"}
        assert vault.get(f"/secret/{create_key(vault, 'meanwhile')}").json() == {"secret": "meanwhile"}
        assert delete(vault, create_key(vault)).status_code == 200
        assert vault.get("/health").json()["status"] == "degraded"
        assert time.monotonic() - started < 2
    problem(vault.get(f"/secret/{key}"), 410, "already_read")


def test_without_postgresql_every_call_is_a_503_and_nothing_happens(
    vault: httpx.Client, database: Database, stores: local.Stores
) -> None:
    read, deleted = create_key(vault, "hello"), create_key(vault, "hello")
    before = database.counts()
    calls: list[Call] = [("GET", f"/secret/{read}", None), ("DELETE", f"/secret/{deleted}", None)]
    calls += [("POST", "/secret", CREATION), ("GET", f"/secret/{read}/status", None), ("GET", "/health", None)]
    with killed(stores.postgres, vault):
        answers = at_once(vault, calls)
    assert [(status, body["code"]) for status, body in answers] == [(503, "unavailable")] * 5
    assert database.counts() == before
    assert [vault.get(f"/secret/{key}").json() for key in (read, deleted)] == [{"secret": "hello"}] * 2


def test_read_that_a_hung_postgresql_did_not_answer_has_read_nothing(vault: httpx.Client, stores: local.Stores) -> None:
    key = create_key(vault, "hello")
    vault.get(f"/secret/{create_key(vault)}")  # the next read finds the same connection, its statement prepared
    with paused(stores.postgres, vault):
        problem(vault.get(f"/secret/{key}"), 503, "unavailable")
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_hung_postgresql_is_a_503_before_callers_give_up(vault: httpx.Client, stores: local.Stores) -> None:
    with paused(stores.postgres, vault):
        started = time.monotonic()
        at_once(vault, [("POST", "/secret", CREATION)] * 20)
        assert time.monotonic() - started < 5


def test_503_says_when_to_come_again(vault: httpx.Client, stores: local.Stores) -> None:
    key = create_key(vault)
    with killed(stores.postgres, vault):
        response = vault.get(f"/secret/{key}")
        problem(response, 503, "unavailable")
        assert int(response.headers["retry-after"]) >= 1


def test_killed_service_loses_no_secret(database: Database, tmp_path: Path) -> None:
    environment = {**SETTINGS, **database.environment, "PORT": str(local.free_port())}
    with local.service(environment, log=subprocess.DEVNULL) as service:
        with httpx.Client(base_url=service.url, trust_env=False) as client:
            key = create_key(client, "hello")
        service.process.kill()
    with serving(database) as client:
        assert client.get(f"/secret/{key}").json() == {"secret": "hello"}


# --- local.py ----------------------------------------------------------------------------------------------------


def start_local_py(folder: Path, port: int) -> "subprocess.Popen[str]":
    """`python3 local.py` with its data in this folder."""
    settings = {**SETTINGS, "ENCRYPTION_KEY": "", "DATA_DIR": str(folder), "PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "local.py"],
        cwd=HERE,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pids_of(folder: Path) -> list[int]:
    """Every process that runs for this folder: local.py, the servers, the service."""
    return [
        one.pid
        for one in psutil.process_iter(["environ", "cwd"])
        if (one.info["environ"] or {}).get("DATA_DIR") == str(folder)
        or (one.info["cwd"] or "").startswith(f"{folder}/")
    ]


@dataclass(frozen=True)
class Laptop:
    process: "subprocess.Popen[str]"
    client: httpx.Client
    line: str  # what it told the user to try


@contextmanager
def laptop(folder: Path) -> Iterator[Laptop]:
    """The same, once it has shown its curl line."""
    port = local.free_port()
    with start_local_py(folder, port) as process:
        try:
            line = next(line for line in process.stdout or [] if line.strip().startswith("curl"))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                yield Laptop(process, client, line)
        finally:
            process.terminate()
            process.wait(20)
            for pid in pids_of(folder):  # only after a test that failed
                os.kill(pid, signal.SIGKILL)


def test_local_py_shows_a_curl_line_that_works(tmp_path: Path) -> None:
    with laptop(tmp_path) as running:
        curl, option, body, url = shlex.split(running.line)
        assert (curl, option) == ("curl", "-d")
        form = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl labels it
        created = running.client.post(url, content=body, headers=form)
        assert created.json()["url"] == f"{running.client.base_url}/#{created.json()['secret_key']}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_local_py_leaves_no_process_and_keeps_the_data(tmp_path: Path, number: signal.Signals) -> None:
    with laptop(tmp_path) as running:
        key = create_key(running.client, "hello")
        assert len(pids_of(tmp_path)) >= 4
        running.process.send_signal(number)
        running.process.wait(20)
        assert pids_of(tmp_path) == []
    with laptop(tmp_path) as again:
        assert again.client.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_local_py_starts_again_after_a_kill_of_everything(tmp_path: Path) -> None:
    with laptop(tmp_path) as running:
        key = create_key(running.client, "hello")
        for pid in pids_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
        running.process.wait(20)
        with laptop(tmp_path) as again:
            assert again.client.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_what_a_killed_local_py_left_is_named_and_then_used(tmp_path: Path) -> None:
    with laptop(tmp_path) as running:
        key = create_key(running.client, "hello")
        servers = [psutil.Process(int(file.read_text().split()[0])) for file in tmp_path.glob("*/*.pid")]
        running.process.kill()
        running.process.wait(20)
        (line,) = start_local_py(tmp_path, local.free_port()).communicate(timeout=20)[0].splitlines()
        assert running.client.get("/health").json()["status"] == "ok"
        left = int(re.findall(r"process (\d+)", line)[0])
        os.kill(left, signal.SIGTERM)
        until(lambda: left not in pids_of(tmp_path))
        with laptop(tmp_path) as again:
            assert again.client.get(f"/secret/{key}").json() == {"secret": "hello"}
            assert [server.is_running() for server in servers] == [True, True]
        assert pids_of(tmp_path) == []


def test_second_local_py_on_the_same_folder_says_so_in_one_line(tmp_path: Path) -> None:
    with laptop(tmp_path) as running:
        second = start_local_py(tmp_path, local.free_port())
        (line,) = second.communicate(timeout=20)[0].splitlines()
        assert second.returncode not in (0, None)
        assert "DATA_DIR" in line
        assert running.client.get("/health").json()["status"] == "ok"


def test_two_local_py_run_side_by_side_on_two_folders(tmp_path: Path) -> None:
    with laptop(tmp_path / "one") as one, laptop(tmp_path / "two") as two:
        key = create_key(one.client)
        problem(two.client.get(f"/secret/{key}"), 404, "not_found")


def test_local_py_on_a_taken_port_says_so_in_one_line(tmp_path: Path, vault: httpx.Client) -> None:
    process = start_local_py(tmp_path, vault.base_url.port or 0)
    (line,) = process.communicate(timeout=20)[0].splitlines()
    assert process.returncode not in (0, None)
    assert "PORT" in line
    assert pids_of(tmp_path) == []


# --- Faults under load -------------------------------------------------------------------------------------------
#
# Callers create and read all the time while a store or a worker is broken. A ledger keeps what was acknowledged; once
# the fault is over, every acknowledged secret must have been handed out exactly once. Only a read that got no answer
# may have consumed its secret, and then the log says so. The long form of each prints its row of the README's table.


@dataclass
class Ledger:
    created: dict[str, str] = field(default_factory=dict)  # secret_key: text
    handed_out: list[str] = field(default_factory=list)  # secret_keys, once for each time
    unanswered: set[str] = field(default_factory=set)  # secret_keys of reads that ended in a 503 or without an answer
    refused: list[str] = field(default_factory=list)  # secret_keys of reads that ended in 404 or 410
    answers: list[tuple[int, float]] = field(default_factory=list)  # (status, seconds); status 0: no answer

    def ask(self, client: httpx.Client, method: str, path: str, text: str | None = None) -> httpx.Response | None:
        started = time.monotonic()
        try:
            response = client.request(method, path, json=text and {"secret": text})
        except httpx.TransportError:
            response = None
        self.answers.append((response.status_code if response else 0, time.monotonic() - started))
        return response

    def create(self, client: httpx.Client) -> str | None:
        text = secrets.token_hex(32)
        response = self.ask(client, "POST", "/secret", text)
        if response is None or response.status_code != 201:
            return None
        key = str(response.json()["secret_key"])
        self.created[key] = text
        return key

    def read(self, client: httpx.Client, key: str) -> None:
        response = self.ask(client, "GET", f"/secret/{key}")
        if response is None or response.status_code >= 500:
            self.unanswered.add(key)
        elif response.status_code == 200:
            assert response.json() == {"secret": self.created[key]}
            self.handed_out.append(key)
        else:
            self.refused.append(key)


@contextmanager
def under_load(client: httpx.Client, callers: int = 6) -> Iterator[Ledger]:
    """Callers that create all the time and read half of it at once; the other half is left for after the fault."""
    ledger, over = Ledger(), threading.Event()

    def call() -> None:
        with httpx.Client(base_url=client.base_url, trust_env=False, timeout=30) as caller:
            while not over.is_set():
                key = ledger.create(caller)
                if key and len(ledger.created) % 2:
                    ledger.read(caller, key)
                over.wait(0.005)  # steady, not as fast as it goes: the faults are the subject

    with ThreadPoolExecutor(callers) as pool:
        running = [pool.submit(call) for _ in range(callers)]
        try:
            until(lambda: len(ledger.created) > 50)
            yield ledger
        finally:
            over.set()
        for caller in running:
            caller.result()


def judge(ledger: Ledger, client: httpx.Client, database: Database, name: str) -> None:
    """Read what is left, then compare the ledger, the log and the promise."""
    until(lambda: client.get("/health").status_code == 200)
    for key in set(ledger.created) - set(ledger.handed_out):
        ledger.read(client, key)
    missing = set(ledger.created) - set(ledger.handed_out)
    consumed = {key for key in missing if actions(database, key) == ["created", "read"]}
    ended_twice = database.value("""
        select count(*) from (
            select from secret_logs
            where action in ('read', 'deleted', 'expired')
            group by secret_id
            having count(*) > 1
        ) as twice
    """)
    twice = len(ledger.handed_out) - len(set(ledger.handed_out))
    lost = missing - (consumed & ledger.unanswered)
    print(f"| {name} | {len(ledger.answers):,} | {len(ledger.created):,} | {len(lost)} | {len(consumed)} | {twice} |")
    assert (lost, twice, ended_twice) == (set(), 0, 0)
    assert set(ledger.refused) <= ledger.unanswered  # nobody was told "gone" of a secret that nobody had asked for


def repeat(seconds: float, action: Callable[[], object], pause: float) -> None:
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        action()
        time.sleep(pause)


def flush_redis(stores: local.Stores, seconds: float) -> None:
    with Redis.from_url(stores.environment["REDIS_URL"]) as client:
        repeat(seconds, client.flushall, 0.1)


def kill_redis(stores: local.Stores, seconds: float) -> None:
    for _ in range(2):
        kill(stores.valkey)
        time.sleep(seconds / 4)
        stores.valkey.start()
        time.sleep(seconds / 4)


def pause_redis(stores: local.Stores, seconds: float) -> None:
    pause(stores.valkey)
    time.sleep(seconds)
    resume(stores.valkey)


def fill_redis(stores: local.Stores, seconds: float) -> None:
    """No memory left, and nothing may be evicted: every write is answered with an error."""
    with Redis.from_url(stores.environment["REDIS_URL"]) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        time.sleep(seconds)
        client.config_set("maxmemory", "0")


def kill_postgres(stores: local.Stores, seconds: float) -> None:
    kill(stores.postgres)
    time.sleep(seconds / 3)
    stores.postgres.start()
    time.sleep(seconds / 3)


def pause_postgres(stores: local.Stores, seconds: float) -> None:
    pause(stores.postgres)
    time.sleep(seconds)
    resume(stores.postgres)


def exhaust_postgres(stores: local.Stores, seconds: float) -> None:
    """Somebody else takes every connection, and the service's own are ended."""

    async def hold() -> None:
        host, user, name = (stores.environment[f"POSTGRES_{part}"] for part in ("HOST", "USER", "DB"))
        held = [await asyncpg.connect(host=host, user=user, database=name)]
        await held[0].execute("""
            select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'one-time-secrets'
        """)
        with suppress(asyncpg.TooManyConnectionsError):
            while True:
                held.append(await asyncpg.connect(host=host, user=user, database=name))
        await asyncio.sleep(seconds)
        for connection in held:
            await connection.close()

    asyncio.run(hold())


REDIS_FAULTS: Final = [flush_redis, kill_redis, pause_redis, fill_redis]
POSTGRES_FAULTS: Final = [kill_postgres, pause_postgres, exhaust_postgres]
Fault: TypeAlias = Callable[[local.Stores, float], None]


@pytest.fixture(scope="module")
def broken_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Stores]:
    """Stores for breaking: other tests keep theirs."""
    with local.stores(tmp_path_factory.mktemp("broken")) as both:
        yield both


@pytest.fixture(scope="module")
def broken_database(broken_stores: local.Stores) -> Database:
    return Database(broken_stores.environment)


@pytest.fixture(scope="module")
def under_fault(broken_database: Database) -> Iterator[httpx.Client]:
    with serving(broken_database, WORKERS="2") as client:
        yield client


LENGTHS: Final = [pytest.param(2.5, id="short"), pytest.param(20, id="long", marks=pytest.mark.soak)]


@pytest.mark.parametrize("seconds", LENGTHS)
@pytest.mark.parametrize("fault", REDIS_FAULTS, ids=lambda fault: fault.__name__)
def test_no_caller_notices_what_happens_to_redis(
    under_fault: httpx.Client, broken_stores: local.Stores, broken_database: Database, fault: Fault, seconds: float
) -> None:
    with under_load(under_fault) as ledger:
        fault(broken_stores, seconds)
    judge(ledger, under_fault, broken_database, fault.__name__)
    assert {status for status, _ in ledger.answers} == {200, 201}
    assert max(taken for _, taken in ledger.answers) < 2


@pytest.mark.parametrize("seconds", LENGTHS)
@pytest.mark.parametrize("fault", POSTGRES_FAULTS, ids=lambda fault: fault.__name__)
def test_postgres_fault_is_a_503_and_loses_nothing(
    under_fault: httpx.Client, broken_stores: local.Stores, broken_database: Database, fault: Fault, seconds: float
) -> None:
    with under_load(under_fault) as ledger:
        fault(broken_stores, seconds)
        answered = len(ledger.created)
        until(lambda: len(ledger.created) > answered + 20)  # it recovers by itself
    judge(ledger, under_fault, broken_database, fault.__name__)
    assert 503 in {status for status, _ in ledger.answers} <= {200, 201, 410, 503}
    assert max(taken for _, taken in ledger.answers) < 5


@pytest.mark.parametrize("seconds", LENGTHS)
def test_killed_worker_loses_nothing(broken_stores: local.Stores, broken_database: Database, seconds: float) -> None:
    environment = {**SETTINGS, **broken_stores.environment, "WORKERS": "2", "PORT": str(local.free_port())}
    with (
        local.service(environment, log=subprocess.DEVNULL) as service,
        httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client,
    ):
        with under_load(client) as ledger:
            over = time.monotonic() + seconds
            while time.monotonic() < over:
                os.kill(random.choice(workers_of(service)), signal.SIGKILL)  # noqa: S311 - no cryptography
                until(lambda: len(workers_of(service)) == 2)
                answered = len(ledger.created)
                until(lambda: len(ledger.created) > answered + 50)  # noqa: B023 - called before it changes
        judge(ledger, client, broken_database, "kill -9 of a worker")


def workers_of(service: local.Service) -> list[int]:
    """uvicorn's children, without the one that only keeps count of shared resources."""
    children = (one for one in psutil.process_iter(["ppid", "cmdline"]) if one.info["ppid"] == service.process.pid)
    return [one.pid for one in children if "spawn_main" in " ".join(one.info["cmdline"] or [])]


def test_terminated_service_answers_what_it_has_begun(broken_stores: local.Stores, broken_database: Database) -> None:
    environment = {**SETTINGS, **broken_stores.environment, "WORKERS": "2", "PORT": str(local.free_port())}
    with (
        local.service(environment, log=subprocess.DEVNULL) as service,
        httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client,
    ):
        with under_load(client) as ledger:
            service.process.terminate()
            assert service.process.wait(10) in (0, -signal.SIGTERM)
        assert workers_of(service) == []
    assert {status for status, _ in ledger.answers} <= {200, 201, 0}
    with serving(broken_database) as again:
        judge(ledger, again, broken_database, "SIGTERM")


def test_stale_copies_in_redis_are_never_handed_out(
    under_fault: httpx.Client, broken_stores: local.Stores, broken_database: Database
) -> None:
    """As after a restore from an old snapshot: the cache has keys of secrets that were read since."""
    keys = [create_key(under_fault) for _ in range(20)]
    with Redis.from_url(broken_stores.environment["REDIS_URL"]) as redis:
        names = [f"{kind}:{{{id_of(key)}}}" for key in keys for kind in ("secret", "key")]
        snapshot: Any = redis.mget(names)
        assert all(under_fault.get(f"/secret/{key}").status_code == 200 for key in keys)
        redis.mset(dict(zip(names, snapshot, strict=True)))
    assert {under_fault.get(f"/secret/{key}").json()["code"] for key in keys} == {"already_read"}


def test_key_of_a_secret_read_while_redis_was_away_is_dropped_later(
    broken_stores: local.Stores, broken_database: Database
) -> None:
    with serving(broken_database, CLEANUP_INTERVAL_SECONDS="0.2") as client:
        first, key = create_key(client), create_key(client)
        pause(broken_stores.valkey)
        try:
            assert client.get(f"/secret/{first}").status_code == 200
        finally:
            resume(broken_stores.valkey)
        assert client.get(f"/secret/{key}").status_code == 200  # Redis is back, but left alone for some seconds
        with Redis.from_url(broken_stores.environment["REDIS_URL"]) as redis:
            assert cached(redis, "key", key)
            until(lambda: cached(redis, "key", key) is None)


@pytest.mark.parametrize(
    "rows", [pytest.param(5_000, id="short"), pytest.param(100_000, id="long", marks=pytest.mark.soak)]
)
def test_cleanup_ends_what_a_fault_left_and_nothing_twice(
    broken_stores: local.Stores, broken_database: Database, rows: int
) -> None:
    with (
        serving(broken_database, CLEANUP_INTERVAL_SECONDS="0.2") as client,
        serving(broken_database, CLEANUP_INTERVAL_SECONDS="0.2"),
    ):
        before = median_read_seconds(client)
        kill_postgres(broken_stores, 0.5)
        broken_database.rows(
            """
            insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, created_at, expires_at)
            select gen_random_uuid(), 'x', 'x', 'x', now() - interval '2 days', now() - interval '1 day'
            from generate_series(1, $1)
            """,
            rows,
        )
        meanwhile = median_read_seconds(client)
        until(lambda: broken_database.value("select count(*) from secrets where expires_at <= now()") == 0, 60)
    print(f"median read: {before * 1000:.2f} ms, while {rows:,} rows expire {meanwhile * 1000:.2f} ms")
    ends = "select count(*), count(distinct secret_id) from secret_logs where action = 'expired'"
    ended, distinct = broken_database.rows(ends)[0]
    assert ended == distinct >= rows


def median_read_seconds(client: httpx.Client) -> float:
    ledger = Ledger()
    until(lambda: client.get("/health").status_code == 200)
    for key in [ledger.create(client) for _ in range(100)]:
        ledger.read(client, key or "")
    return sorted(taken for _, taken in ledger.answers[100:])[50]


# --- Stolen data, forced failures, damage ------------------------------------------------------------------------


def found(traces: Iterable[bytes], haystack: bytes) -> list[bytes]:
    return [trace for trace in traces if trace in haystack]


def forms(*texts: str) -> list[bytes]:
    """A text as it may stand somewhere: as it is, in base64 or hex, and, where it is a key, as the bytes of it."""
    plain = [text.encode() for text in texts] + [raw(text) for text in texts if re.fullmatch(r"[\w-]{32}", text)]
    return [*plain, *(base64.b64encode(text)[:-4] for text in plain), *(text.hex().encode() for text in plain)]


def keys_of(created: Iterable[Document]) -> list[str]:
    return [document[name] for document in created for name in ("secret_key", "receipt_key")]


@dataclass(frozen=True)
class Kept:
    """What the creator of a secret knows of it."""

    text: str
    passphrase: str
    scope: str | None
    was_read: bool
    created: Document

    @property
    def secret_key(self) -> Any:
        return raw(self.created["secret_key"])

    @property
    def id(self) -> UUID:
        return id_of(self.created["secret_key"])


@dataclass(frozen=True)
class Loot:
    """What a thief has who copied everything: PostgreSQL and its disk, the cache and its snapshot, every log."""

    kept: Sequence[Kept]
    everything: bytes
    cache: bytes
    cached: dict[str, bytes]  # what the cache holds, by name
    wrapped_keys: dict[UUID, bytes]  # of those that can still be read
    salts: dict[UUID, bytes]

    def pairs(self) -> set[tuple[bytes, bytes]]:
        """Each ciphertext with the wrapped_key beside it, wherever PostgreSQL has written them."""
        return set(re.findall(rb"(?s)(gAAAAA[\w-]+={0,2})[^\w-].{0,8}?(gAAAAA[\w-]{134})", self.everything))

    def passphrase_key(self, kept: Kept) -> bytes:
        return stretch(kept.passphrase, self.salts[kept.id])[0] if kept.scope == "read" else b""


def keep(client: httpx.Client, number: int) -> Kept:
    """A secret, with a passphrase of either scope or none; a third of them is read."""
    text, passphrase = (f"canary-{name}-{secrets.token_hex(8)}" for name in ("secret", "passphrase"))
    scope = {0: "read", 1: "delete"}.get(number % 5)
    members = {"passphrase": passphrase, "passphrase_scope": scope} if scope else {}
    kept = Kept(text, passphrase, scope, number % 3 == 0, create(client, text, **members))
    if kept.was_read:
        assert read(client, kept.created["secret_key"], passphrase).json() == {"secret": text}
    return kept


def files(folder: Path) -> bytes:
    """What is in all files under a folder, each 8 KiB block once: most of a new database is there three times."""
    blocks: dict[bytes, None] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        blocks.update((content[start : start + 8192], None) for start in range(0, len(content), 8192))
    return b"".join(blocks)


def plunder(database: Database, stores: local.Stores, log: Path, kept: Sequence[Kept]) -> Loot:
    database.rows("checkpoint")
    tables = [database.rows("select * from secrets"), database.rows("select * from secret_logs")]
    cells = [cell for rows in tables for row in rows for cell in row]
    values = [cell if isinstance(cell, bytes) else str(cell).encode() for cell in cells]
    with Redis.from_url(stores.environment["REDIS_URL"]) as redis:
        redis.config_set("rdbcompression", "no")
        redis.save()
        names: Any = redis.keys()
        cached: Any = {name.decode(): redis.get(name) for name in names}
    cache = b"\n".join([*names, *cached.values(), files(stores.valkey.folder)])
    logs = b"".join(file.read_bytes() for file in (log, stores.postgres.log, stores.valkey.log))
    everything = b"\n".join([*values, cache, files(stores.postgres.folder), logs, ENCRYPTION_KEY.encode()])
    wrapped_keys, salts = ({row["id"]: row[name] for row in tables[0]} for name in ("wrapped_key", "passphrase_salt"))
    return Loot(kept, everything, cache, cached, wrapped_keys, salts)


@pytest.fixture(scope="module")
def loot(tmp_path_factory: pytest.TempPathFactory) -> Loot:
    """Of a hundred secrets in stores of their own, a third of them read."""
    folder = tmp_path_factory.mktemp("loot")
    with local.stores(folder / "stores") as both:
        database, log = Database(both.environment), folder / "service.log"
        with serving(database, log) as client:
            kept = [keep(client, number) for number in range(100)]
        return plunder(database, both, log, kept)


def opened(tokens: set[bytes], key: bytes) -> list[bytes]:
    """What a Fernet key opens of these tokens."""
    contents = []
    for token in tokens:
        with suppress(InvalidToken, ValueError):
            contents.append(MultiFernet([Fernet(key)]).decrypt(token))
    return contents


def unsealed(pairs: Iterable[tuple[bytes, bytes]], secret_key: SecretKey, passphrase_key: bytes = b"") -> list[bytes]:
    """What a link and the encryption_key open of these ciphertexts and wrapped_keys."""
    contents = []
    for pair in pairs:
        with suppress(InvalidToken):
            contents.append(unseal(*pair, OPERATORS_KEY, secret_key, passphrase_key))
    return contents


def test_thief_of_everything_has_no_key_that_opens_anything(loot: Loot) -> None:
    tokens = set(re.findall(rb"gAAAAA[\w-]{94,}={0,2}", loot.everything))
    keys = {ENCRYPTION_KEY.encode(), *re.findall(rb"[\w-]{43}=", loot.everything)}
    keys |= {base64.urlsafe_b64encode(kept.id.bytes * 2) for kept in loot.kept}
    assert len(tokens) >= 160
    assert [content for key in keys for content in opened(tokens, key)] == []


def test_thief_of_everything_derives_no_key_that_opens_anything(loot: Loot) -> None:
    for id, wrapped_key in loot.wrapped_keys.items():
        for ingredients in itertools.product((b"", id.bytes, OPERATORS_KEY.raw), repeat=2):
            for info in (b"", id.bytes, WRAPPING_LABEL, WRAPPING_LABEL + id.bytes):
                derived = HKDF(SHA256(), 32, salt=ingredients[0], info=info).derive(ingredients[1])
                assert opened({wrapped_key}, base64.urlsafe_b64encode(derived)) == []


def test_thief_of_everything_finds_no_secret_key_and_no_receipt_key(loot: Loot) -> None:
    ids = {kept.id for kept in loot.kept}
    for time_bytes in {id.bytes[:4] for id in ids}:  # with these, all keys begin
        texts = re.findall(rb"(?=(%b[\w-]{27}))" % base64.urlsafe_b64encode(time_bytes)[:5], loot.everything)
        digits = re.findall(rb"(?=(%b[0-9a-f]{40}))" % time_bytes.hex().encode(), loot.everything)
        guesses = re.findall(rb"(?s)(?=(%b.{20}))" % re.escape(time_bytes), loot.everything)
        guesses += [raw(text.decode()) for text in texts] + [bytes.fromhex(text.decode()) for text in digits]
        assert len(guesses) >= 1
        assert not ids & {secret_id_of(guess) for guess in guesses}
        assert not ids & {secret_id_of(secret_key_of(guess)) for guess in guesses}


def test_thief_with_a_link_opens_that_secret_and_no_other(loot: Loot) -> None:
    pairs = loot.pairs()
    for kept in loot.kept:
        if not kept.was_read:
            assert set(unsealed(pairs, kept.secret_key, loot.passphrase_key(kept))) == {kept.text.encode()}


def test_thief_with_a_link_but_without_its_passphrase_opens_nothing(loot: Loot) -> None:
    pairs = loot.pairs()
    locked = [kept for kept in loot.kept if kept.scope == "read"]
    assert [content for kept in locked for content in unsealed(pairs, kept.secret_key)] == []


def test_thief_of_the_cache_with_the_link_of_a_read_secret_opens_nothing(loot: Loot) -> None:
    wrapped_keys = set(re.findall(rb"gAAAAA[\w-]{134}", loot.cache))
    for kept in loot.kept:
        ciphertext = loot.cached[f"secret:{{{kept.id}}}"]
        contents = unsealed([(ciphertext, wrapped_key) for wrapped_key in wrapped_keys], kept.secret_key)
        assert set(contents) == (set() if kept.was_read or kept.scope == "read" else {kept.text.encode()})


def test_thief_of_everything_cannot_tell_a_right_passphrase(loot: Loot) -> None:
    for kept in loot.kept:
        if kept.scope and not kept.was_read:
            halves = stretch(kept.passphrase, loot.salts[kept.id])
            guesses = [SecretKey(b""), SecretKey(kept.id.bytes)]
            derived = [verifier_of(half, OPERATORS_KEY, guess) for half in halves for guess in guesses]
            assert found([*halves, *derived], loot.everything) == []


def test_thief_of_everything_finds_no_text_and_no_passphrase(loot: Loot) -> None:
    texts = [kept.text for kept in loot.kept] + [kept.passphrase for kept in loot.kept if kept.scope]
    assert all(kept.id.bytes in loot.everything for kept in loot.kept)
    assert found(forms(*texts), loot.everything) == []


CREATIONS: Final = {"create", "create raw", "create with passphrase"}
CLAIMS: Final = {"read", "read with passphrase", "guess", "delete", "revoke"}
BREAKAGES: Final = {  # what makes PostgreSQL fail, what mends it, and the operations that fail in between
    "missing column": (
        "alter table secrets rename wrapped_key to gone",
        "alter table secrets rename gone to wrapped_key",
        CREATIONS | CLAIMS,
    ),
    "missing table": (
        "alter table secret_logs rename to gone",
        "alter table gone rename to secret_logs",
        CREATIONS | CLAIMS | {"status", "receipt"},
    ),
    "missing permission": (
        "revoke update, delete on secrets from clerk",
        "grant update, delete on secrets to clerk",
        CLAIMS,
    ),
    "trigger that quotes the row": (
        "create trigger quote before insert or update or delete on secrets for each row execute function quote()",
        "drop trigger quote on secrets",
        CREATIONS | CLAIMS,
    ),
    "trigger that quotes the log row": (
        "create trigger quote before insert on secret_logs for each row execute function quote()",
        "drop trigger quote on secret_logs",
        CREATIONS | CLAIMS,
    ),
    "constraint whose violation quotes the row": (
        "alter table secrets add constraint full_disk check (false) not valid",
        "alter table secrets drop constraint full_disk",
        CREATIONS | {"guess", "read with passphrase"},
    ),
    "number that Python cannot take": (
        "update secrets set attempts_since = 'infinity'",
        "update secrets set attempts_since = '-infinity'",
        {"status", "guess", "read with passphrase"},
    ),
}


@dataclass(frozen=True)
class Clerk:
    """A service whose database user may do what the service needs, and nothing else."""

    client: httpx.Client
    database: Database
    log: Path

    def odd_lines(self) -> list[str]:
        """Its warnings and errors that are more than a class, a place, a code."""
        known = (
            r"\S+ (WARNING|ERROR) ("
            r"(GET|POST|DELETE) [a-z_/{}]+ 50[03] [\d.]+ ms|"
            r"(PostgreSQL cannot answer|cleanup will be tried again|a batch failed|(GET|POST|DELETE) [a-z_/{}]+ failed)"
            r": \w+( at [\w.:<> ]+)?)"
        )
        lines = [line for line in self.log.read_text().splitlines() if not re.match(r"[\d-]+ \S+ (DEBUG|INFO) ", line)]
        return [line for line in lines if not re.fullmatch(rf"[\d-]+ {known}", line)]


@pytest.fixture(scope="module")
def clerk(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clerk]:
    fresh, log = fresh_database(database), tmp_path_factory.mktemp("clerk") / "log"
    fresh.rows("create role clerk login")
    fresh.rows("grant select, insert, update, delete on all tables in schema public to clerk")
    fresh.rows(
        """
        create function quote() returns trigger language plpgsql as
        $$ begin raise exception 'quoted % %', old, new; end $$
        """
    )
    user = Database({**fresh.environment, "POSTGRES_USER": "clerk"})
    with serving(user, log, CLEANUP_INTERVAL_SECONDS="0.1") as client:
        yield Clerk(client, fresh, log)


def every_operation(client: httpx.Client, secret: str, passphrase: str, keys: Sequence[str]) -> dict[str, Any]:
    """The answer of each. `keys` are those of four secrets, the last two of them with this passphrase."""
    plain, _, deleted, revocation, locked, receipt, guessed, _ = keys
    return {
        "status": client.get(f"/secret/{locked}/status"),
        "receipt": client.get(f"/receipt/{receipt}"),
        "guess": read(client, guessed, passphrase.upper()),
        "read": client.get(f"/secret/{plain}"),
        "read with passphrase": read(client, locked, passphrase),
        "delete": delete(client, deleted),
        "revoke": client.delete(f"/receipt/{revocation}"),
        "create": client.post("/secret", json={"secret": secret}),
        "create raw": client.post("/secret", content=secret, headers={"Content-Type": "text/plain"}),
        "create with passphrase": client.post("/secret", json={"secret": secret, "passphrase": passphrase}),
    }


@pytest.mark.parametrize(("fault", "mend", "failing"), BREAKAGES.values(), ids=BREAKAGES)
def test_forced_failure_tells_nobody_anything(
    clerk: Clerk, stores: local.Stores, fault: str, mend: str, failing: set[str]
) -> None:
    secret, passphrase = (f"canary-{name}-{secrets.token_hex(8)}" for name in ("secret", "passphrase"))
    locked = {"passphrase": passphrase, "passphrase_scope": "read"}
    keys = keys_of([create(clerk.client, secret, **members) for members in ({}, {}, locked, locked)])
    clerk.database.rows(fault)
    try:
        answers = every_operation(clerk.client, secret, passphrase, keys)
    finally:
        clerk.database.rows(mend)
    assert {name for name, answer in answers.items() if answer.status_code >= 500} == failing
    for answer in (answers[name] for name in failing):
        problem(answer, answer.status_code, {500: "internal", 503: "unavailable"}[answer.status_code])
    errors = b"\n".join(answer.content for answer in answers.values() if not answer.is_success)
    said = clerk.log.read_bytes() + stores.postgres.log.read_bytes()
    assert found(forms(secret, passphrase, passphrase.upper(), *keys), errors + said) == []
    assert found([b"Traceback", b".py", b"quoted"], errors) == []
    assert clerk.odd_lines() == []


def test_failing_cleanup_tells_nothing_and_goes_on(clerk: Clerk) -> None:
    key = create_key(clerk.client, CANARY)
    clerk.database.rows("create trigger quote before delete on secrets for each row execute function quote()")
    try:
        expire(clerk.database, key)
        until(lambda: b"cleanup will be tried again: " in clerk.log.read_bytes())
    finally:
        clerk.database.rows("drop trigger quote on secrets")
    until(lambda: "expired" in actions(clerk.database, key))
    assert clerk.odd_lines() == []


def test_redis_that_refuses_every_write_tells_nothing(
    vault: httpx.Client, redis: Redis, log_file: Path, stores: local.Stores
) -> None:
    redis.config_set("maxmemory", "1")
    try:
        created = create(vault, "canary-full-cache")
        assert vault.get(f"/secret/{created['secret_key']}").json() == {"secret": "canary-full-cache"}
    finally:
        redis.config_set("maxmemory", "0")
    log = log_file.read_bytes()
    assert b"Redis refused a command: " in log
    assert found(forms("canary-full-cache", *keys_of([created])), log + stores.valkey.log.read_bytes()) == []


SWAP: Final = """
    update secrets as mine
    set {} = other.{}
    from secrets as other
    where (mine.id, other.id) in (($1, $2), ($2, $1))
"""
DAMAGES: Final = {
    "ciphertexts swapped": [SWAP.format(*["ciphertext"] * 2)],
    "wrapped keys swapped": [SWAP.format(*["wrapped_key"] * 2)],
    "rows swapped": [SWAP.format(*["ciphertext"] * 2), SWAP.format(*["wrapped_key"] * 2)],
    "ciphertext cut by a byte": ["update secrets set ciphertext = substr(ciphertext, 1, length(ciphertext) - 1)"],
    "ciphertext cut by a block": ["update secrets set ciphertext = substr(ciphertext, 1, length(ciphertext) - 64)"],
    "ciphertext empty": ["update secrets set ciphertext = ''"],
    "wrapped key cut": ["update secrets set wrapped_key = substr(wrapped_key, 1, 100)"],
    "bit in the ciphertext": ["update secrets set ciphertext = set_bit(ciphertext, 400, 1 - get_bit(ciphertext, 400))"],
    "bit in the wrapped key": [
        "update secrets set wrapped_key = set_bit(wrapped_key, 400, 1 - get_bit(wrapped_key, 400))"
    ],
}


@pytest.mark.parametrize("members", [{}, TO_READ], ids=["plain", "locked"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_row_is_refused_and_logged_and_shows_nothing(
    vault: httpx.Client, database: Database, redis: Redis, log_file: Path, damage: list[str], members: Document
) -> None:
    key, other = (create_key(vault, f"{CANARY}-{number}", **members) for number in range(2))
    for statement in damage:
        if "$2" in statement:
            database.rows(statement, id_of(key), id_of(other))
        else:
            database.rows(f"{statement} where id = $1", id_of(key))
    redis.flushall()
    response = read(vault, key, members.get("passphrase"))
    assert set(problem(response, 500, "damaged")) == {"type", "title", "status", "detail", "code"}
    assert CANARY not in response.text
    log = log_file.read_text()
    assert f"ERROR the row of {id_of(key)} was altered or damaged" in log
    assert "Traceback" not in log


def damaged(token: bytes) -> list[bytes]:
    """Cut at every place, and with one bit changed in every byte."""
    flips = [bytes([*token[:n], token[n] ^ bit, *token[n + 1 :]]) for n in range(len(token)) for bit in (1, 16, 128)]
    return [*flips, *(token[:length] for length in range(len(token)))]


def test_no_flipped_bit_and_no_cut_opens_as_something_else() -> None:
    secret_key = secret_key_of(new_receipt_key())
    ciphertext, wrapped_key = seal(b"a secret", OPERATORS_KEY, secret_key)
    pairs = [(altered, wrapped_key) for altered in damaged(ciphertext)]
    pairs += [(ciphertext, altered) for altered in damaged(wrapped_key)]
    assert set(unsealed(pairs, secret_key)) <= {b"a secret"}


@pytest.mark.parametrize("kind", ["secret", "key"])
@pytest.mark.parametrize("damage", ["swapped", "cut", "flipped"])
def test_damage_in_the_cache_alone_costs_nobody_a_secret(
    vault: httpx.Client, redis: Redis, kind: str, damage: str
) -> None:
    key, other = create_key(vault, "hello"), create_key(vault, "another")
    value = cached(redis, kind, key)
    values = {"swapped": cached(redis, kind, other), "cut": value[:-8], "flipped": flipped(value)}
    redis.set(f"{kind}:{{{id_of(key)}}}", values[damage])
    assert vault.get(f"/secret/{key}").json() == {"secret": "hello"}


def test_cache_with_two_secrets_exchanged_hands_out_the_right_ones(vault: httpx.Client, redis: Redis) -> None:
    key, other = create_key(vault, "hello"), create_key(vault, "another")
    for kind in ("secret", "key"):
        mine, others = cached(redis, kind, key), cached(redis, kind, other)
        redis.set(f"{kind}:{{{id_of(key)}}}", others)
        redis.set(f"{kind}:{{{id_of(other)}}}", mine)
    assert [vault.get(f"/secret/{each}").json()["secret"] for each in (key, other)] == ["hello", "another"]


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


def through_json(client: httpx.Client, secret: str) -> object:
    return client.post(f"/secret/{create_key(client, secret)}").json()["secret"]


def through_raw_bodies(client: httpx.Client, secret: bytes) -> object:
    created = client.post("/secret", content=secret, headers={"Content-Type": "application/octet-stream"})
    return client.get(f"/secret/{created.json()['secret_key']}", headers={"Accept": "text/plain"}).content


@pytest.mark.parametrize(("secret", "through"), [(ANY_TEXT, through_json), (ANY_BYTES, through_raw_bodies)])
def test_nothing_is_found_that_comes_back_changed(
    vault: httpx.Client, secret: strategies.SearchStrategy[Any], through: Callable[[httpx.Client, Any], object]
) -> None:
    @hypothesis.settings(max_examples=200, derandomize=True, database=None, deadline=None)
    @hypothesis.given(secret)
    def check(value: Any) -> None:
        assert through(vault, value) == value

    check()


@pytest.mark.parametrize(("examples", "cases"), [(20, 300), pytest.param(500, 2000, marks=pytest.mark.soak)])
def test_nothing_is_found_that_is_answered_otherwise_than_documented(
    vault: httpx.Client, tmp_path: Path, examples: int, cases: int
) -> None:
    """Schemathesis makes requests out of the service's own document, and holds the answers against it."""
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS_TOML)
    document, report = f"{str(vault.base_url).rstrip('/')}/openapi.json", tmp_path / "report.json"
    options = f"--checks all --seed 1 --max-examples {examples} --no-color --report json --report-json-path {report}"
    command = [str(Path(sys.executable).with_name("st")), "run", document, *options.split()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads(report.read_text())["test_cases"]["generated"] >= cases


# An error, but not what uvicorn and uvloop say of an answer to a caller whose connection is closed already.
COMPLAINT: Final = re.compile(r"(?m)^(?:\S+ \S+ ERROR (?!.*UVStream|ASGI callable).*|.* 5\d\d [\d.]+ ms|Traceback.*)$")


@dataclass(frozen=True)
class Target:
    """A service that is about to be abused."""

    client: httpx.Client
    log: Path
    pid: int

    @contextmanager
    def unharmed(self, mib: float = 100) -> Iterator[None]:
        """Check that what happens inside costs no more memory than that, is no error, and keeps nobody from service."""
        said, before = len(self.log.read_bytes()), self.forget_peak_mib()
        yield
        assert self.client.get(f"/secret/{create_key(self.client, 'hello')}").json() == {"secret": "hello"}
        assert self.peak_mib() - before < mib
        assert COMPLAINT.findall(self.log.read_bytes()[said:].decode()) == []

    def peak_mib(self) -> float:
        """The most memory that it had since forget_peak_mib(). Without /proc (macOS), this is not measured: 0."""
        with suppress(FileNotFoundError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
        return 0

    def forget_peak_mib(self) -> float:
        """Returns what it has now."""
        with suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self.peak_mib()

    def connect(self) -> socket.socket:
        return socket.create_connection((self.client.base_url.host, self.client.base_url.port or 80), timeout=10)

    def send(self, *parts: bytes, patience: float = 0.5) -> bytes:
        """What comes back on a connection of its own, until it is closed or nothing comes for so many seconds."""
        with self.connect() as connection:
            with suppress(ConnectionError):
                for part in parts:
                    connection.sendall(part)
            return received(connection, patience)


def received(connection: socket.socket, patience: float) -> bytes:
    content = bytearray()
    connection.settimeout(patience)
    with suppress(TimeoutError, ConnectionError):
        while part := connection.recv(65536):
            content += part
    return bytes(content)


def flood(connection: socket.socket, part: bytes, mib: int) -> float:
    """Send the same again and again until the other side has had enough of it; returns how many MiB it took."""
    connection.settimeout(2)
    sent = 0
    with suppress(ConnectionError, TimeoutError):
        while sent < mib * 1024 * 1024:
            connection.sendall(part)
            sent += len(part)
    return sent / 1024 / 1024


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answers)]


@pytest.fixture(scope="module")
def target(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    log = tmp_path_factory.mktemp("target") / "log"
    with serving(database, log) as client:
        port = str(client.base_url.port)
        (pid,) = [p.pid for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("PORT") == port]
        yield Target(client, log, pid)


ARGON2_MIB: Final = 100 + 19 * (os.cpu_count() or 1)  # fifty at once would take 950
CLOSE: Final = b"Connection: close\r\n\r\n"


def test_hundred_guesses_at_once_are_checked_five_times_and_hold_up_nobody(target: Target, database: Database) -> None:
    key = create_key(target.client, **TO_READ)
    with target.unharmed(ARGON2_MIB), ThreadPoolExecutor(1) as other:
        guessing = other.submit(at_once, target.client, [("POST", f"/secret/{key}", '{"passphrase": "wrong"}')] * 100)
        while not guessing.done():
            assert target.client.get(f"/secret/{key}/status").status_code == 200
    codes = sorted(answer["code"] for _, answer in guessing.result())
    assert codes == ["too_many_attempts"] * 95 + ["wrong_passphrase"] * 5
    assert database.value("select attempts from secrets where id = $1", id_of(key)) == 5


def test_fifty_passphrases_at_once_take_the_memory_of_one_a_core_and_hold_up_nobody(target: Target) -> None:
    creation = json.dumps({"secret": "s", **TO_READ})
    with target.unharmed(ARGON2_MIB), ThreadPoolExecutor(1) as other:
        creating = other.submit(at_once, target.client, [("POST", "/secret", creation)] * 50)
        while not creating.done():
            assert target.client.get(f"/secret/{create_key(target.client, 'hello')}").json() == {"secret": "hello"}
    assert {status for status, _ in creating.result()} == {201}


def test_bodies_that_never_come_hold_up_nobody(target: Target) -> None:
    with target.unharmed(), ExitStack() as stack:
        for _ in range(50):
            connection = stack.enter_context(target.connect())
            connection.sendall(b"POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert target.client.get("/health").status_code == 200
    until(lambda: target.log.read_text().count("POST /secret 499") >= 50)


@pytest.mark.parametrize("framing", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
def test_body_without_end_is_refused_and_not_taken_in(target: Target, framing: bytes) -> None:
    part = b"%x\r\n%b\r\n" % (65536, b"x" * 65536)
    with target.unharmed(), target.connect() as connection:
        connection.sendall(b"POST /secret HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
        if b"Length" in framing:
            assert connection.recv(12) == b"HTTP/1.1 413"
        assert flood(connection, part, 64) < 32


def test_request_that_comes_byte_by_byte_is_answered(target: Target) -> None:
    body = b'{"secret": "hello"}'
    request = b"POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%b%b" % (len(body), CLOSE, body)
    with target.unharmed():
        assert statuses(target.send(*(bytes([byte]) for byte in request), patience=10)) == [201]


@contextmanager
def nothing_can_be_logged(database: Database) -> Iterator[None]:
    """Inside, whatever writes to the log waits: another session holds the table."""
    host, user, name = (database.environment[f"POSTGRES_{each}"] for each in ("HOST", "USER", "DB"))
    with asyncio.Runner() as runner:
        session = runner.run(asyncpg.connect(host=host, user=user, database=name))
        runner.run(session.execute("begin; lock table secret_logs in exclusive mode"))
        try:
            yield
        finally:
            runner.run(session.close())


def test_caller_who_goes_away_between_claim_and_answer_has_read_it(target: Target, database: Database) -> None:
    key, waiting = create_key(target.client), "select count(*) from pg_locks where not granted"
    with target.unharmed():
        with nothing_can_be_logged(database), target.connect() as connection:
            connection.sendall(b"GET /secret/%b HTTP/1.1\r\nHost: x\r\n\r\n" % key.encode())
            until(lambda: database.value(waiting) == 1, 1.5)
            connection.close()
        until(lambda: actions(database, key) == ["created", "read"])
        problem(target.client.get(f"/secret/{key}"), 410, "already_read")


@pytest.mark.parametrize(
    "request_head",
    [
        pytest.param(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-Flood: x\r\n" * 10_000, id="10000 headers"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Flood: " + b"x" * 10_000_000 + b"\r\n", id="10 MB header"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"x" * 10_000_000 + b": x\r\n", id="10 MB header name"),
        pytest.param(b"GET /secret/" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n", id="1 MB URL"),
        pytest.param(b"GET /health?" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n", id="1 MB query"),
    ],
)
def test_oversized_head_harms_nobody(target: Target, request_head: bytes) -> None:
    with target.unharmed():
        answers = target.send(request_head, CLOSE, patience=10)
    assert [status for status in statuses(answers) if status >= 500] == []


@pytest.mark.parametrize("part", [b"X-Flood: " + b"x" * 65_536 + b"\r\n", b"x" * 65_536], ids=["headers", "one header"])
def test_head_without_end_is_cut_off(target: Target, part: bytes) -> None:
    with target.unharmed(), target.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Flood: ")
        assert flood(connection, part, 64) < 32


def test_what_is_not_http_is_refused_in_the_form_of_every_other_error(target: Target) -> None:
    head, _, body = target.send(b"CANARY / HTTP/1.1\r\n\r\n", patience=10).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert status == "HTTP/1.1 400 Bad Request"
    assert NO_STORE.items() <= headers.items()
    assert (headers["content-type"], json.loads(body)["code"]) == ("application/problem+json", "malformed")


def test_five_hundred_idle_connections_hold_up_nobody(target: Target) -> None:
    with target.unharmed(), ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(target.connect())
        assert target.client.get("/health").status_code == 200


def test_pipelined_requests_are_answered_in_order(target: Target) -> None:
    key = create_key(target.client, "hello")
    head = b"GET /secret/%b HTTP/1.1\r\nHost: x\r\n" % key.encode()
    with target.unharmed():
        answers = target.send((head + b"\r\n") * 99, head + CLOSE, patience=10)
    assert statuses(answers) == [200] + [410] * 99
    assert answers.count(b"hello") == 1


@pytest.mark.parametrize("request_head", [b"GET /health", b"POST /secret/nothing", b"GET /openapi.json"])
def test_pipeline_without_end_is_cut_off(target: Target, request_head: bytes) -> None:
    part = (request_head + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}") * 1000
    with target.unharmed(), target.connect() as connection:
        assert flood(connection, part, 24) < 12
        assert target.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n",
        b"Content-Length: %d\r\nTransfer-Encoding : chunked\r\n",
        b"Content-Length: %d\r\nTransfer-Encoding:\x0bchunked\r\n",
        b"Content-Length: %d\r\nTransfer-Encoding: xchunked\r\n",
        b"Content-Length: %d\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: %d\r\n",
        b"Content-Length: +%d\r\n",
        b"Content-Length: %d\r\n Transfer-Encoding: chunked\r\n",
    ],
)
def test_request_smuggled_in_a_body_reads_nothing(target: Target, framing: bytes) -> None:
    key = create_key(target.client)
    body = b"0\r\n\r\nGET /secret/%b HTTP/1.1\r\nHost: x\r\n\r\n" % key.encode()
    with target.unharmed():
        head = b"POST /secret HTTP/1.1\r\nHost: x\r\n" + framing.replace(b"%d", b"%d" % len(body))
        assert len(statuses(target.send(head, CLOSE, body))) <= 1
        assert target.client.get(f"/secret/{key}/status").json()["status"] == "unread"


@pytest.mark.parametrize(
    "handshake", [b"", b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==\r\n"]
)
def test_upgrade_to_a_websocket_logs_no_key_and_no_token(target: Target, handshake: bytes) -> None:
    key = create_key(target.client)
    upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\n" + handshake
    request = b"GET /secret/%b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n%b\r\n"
    with target.unharmed():
        target.send(request % (key.encode(), CANARY.encode(), upgrade))
    assert found(forms(key, CANARY), target.log.read_bytes()) == []


GARBAGE: Final = [
    b"GET /secret/CANARY HTTP/1.1\r\nHost: x\r\nX-Null: CANARY\x00b\r\n\r\n",
    b"GET /secret/CANARY HTTP/1.1\r\nHost: x\r\nX-\x00CANARY: ab\r\n\r\n",
    b"GET /secret/CANARY\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /secret/CANARY%00%0d%0a%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[::1/secret/CANARY HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://CANARY/secret/CANARY HTTP/1.1\r\nHost: CANARY\r\n\r\n",
    b"GET //\\CANARY HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
    b"GET * HTTP/1.1\r\n\r\n",
    b"CONNECT CANARY:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CANARY /secret/CANARY HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /secret/CANARY HTTP/9.9\r\n\r\n",
    b"GET /secret/CANARY\r\n",
    b"POST /secret HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nCANARY",
    b"POST /secret HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nCANARY\r\n",
    b"POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\nCANARY",
    b"POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\nCANARY",
    b"POST /secret HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n",
    b"GET /secret/CANARY HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03CANARY",
    b"\r\n" * 10_000,
    b"CANARY" + bytes(range(256)) * 100,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:50]))
def test_garbage_is_refused_and_neither_repeated_nor_logged(target: Target, garbage: bytes) -> None:
    with target.unharmed():
        answers = target.send(garbage.replace(b"CANARY", CANARY.encode()))
    assert [status for status in statuses(answers) if status >= 500 or status == 200] == []
    assert found([b"Traceback", b".py", CANARY.encode()], answers) == []
    assert CANARY not in target.log.read_text()
