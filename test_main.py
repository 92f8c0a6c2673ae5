"""The claims of main.py and local.py, each as a test, from pure functions to HTTP.

The clock is PostgreSQL's: a test that needs time to pass moves the times of a row.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import os
import re
import secrets
import shlex
import signal
import stat
import statistics
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote, unquote
from uuid import UUID

import asyncpg
import hypothesis
import psutil
import pytest
from cryptography.fernet import Fernet, InvalidToken
from httpx import Client, Response
from hypothesis import strategies
from starlette.exceptions import HTTPException

import local
import main
from conftest import (
    BLOCKED,
    BROWSER,
    CANARY,
    CREATION,
    ENCRYPTION_KEY,
    ENVIRONMENT,
    GET,
    GONE,
    HANDSHAKE,
    HERE,
    LOCK_LOG,
    MAIN,
    NO_STORE,
    NUMBER,
    OPERATORS_KEY,
    POST,
    SETTINGS,
    TO_DELETE,
    TO_READ,
    Document,
    HttpCall,
    Service,
    Tables,
    another_session,
    ask_and_leave,
    assert_problem,
    at_once,
    connect,
    forms,
    found,
    full_redis,
    id_of,
    kill_all,
    name_in_redis,
    parametrize,
    processes_of,
    raw,
    repeated,
    send,
    server_setting,
    serving,
    stopped,
    until,
)

# --- Cryptography ---------------------------------------------------------------------------------


(ANOTHER_KEY,) = main.parse_encryption_keys(Fernet.generate_key().decode())


A_SECRET = main.Plaintext(b"a secret", "its name")
OLD_KEY = "AAECA0IzJyOXZFoT49oCKZ55f7XTo8iW"  # of a secret that the first release has stored


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
    kek = main.key_encryption_key(OPERATORS_KEY, mine, b"p" * 32)
    sealed = main.seal(A_SECRET, kek)
    assert main.unseal(sealed, kek) == A_SECRET
    for wrong in (
        (OPERATORS_KEY, other, b"p" * 32),
        (ANOTHER_KEY, mine, b"p" * 32),
        (OPERATORS_KEY, mine, b"q" * 32),
        (OPERATORS_KEY, mine, b""),
    ):
        with pytest.raises(InvalidToken):
            main.unseal(sealed, main.key_encryption_key(*wrong))
    again = main.seal(A_SECRET, kek)
    assert not set(sealed) & set(again)
    swapped = sealed._replace(wrapped_key=again.wrapped_key)
    with pytest.raises(InvalidToken):
        main.unseal(swapped, kek)


def test_what_a_passphrase_becomes_depends_on_it_and_its_salt_but_not_on_typed_accents() -> None:
    composed = unicodedata.normalize("NFC", "Żółw café ﬁ")
    decomposed = unicodedata.normalize("NFD", composed)
    assert composed != decomposed
    inputs = [(composed, b"s"), (decomposed, b"s"), ("one", b"s"), ("two", b"s"), ("one", b"t")]
    parts = set[bytes]()
    for passphrase, salt in inputs:
        output = main.derive_passphrase_keys(
            passphrase, salt * 16, OPERATORS_KEY, main.SecretKey(b"")
        )
        parts |= {output.passphrase_key, output.verifier}
    assert len(parts) == 2 * (len(inputs) - 1)


def test_verifier_depends_on_encryption_key_and_link_and_the_passphrase_key_does_not() -> None:
    links = [main.secret_key_of(main.new_receipt_key()) for _ in range(2)]
    ingredients = itertools.product((OPERATORS_KEY, ANOTHER_KEY), links)
    outputs = [main.derive_passphrase_keys("one", b"s" * 16, *each) for each in ingredients]
    assert len({output.verifier for output in outputs}) == 4
    assert len({output.passphrase_key for output in outputs}) == 1


# --- Statements and rows --------------------------------------------------------------------------


def test_rows_have_the_fields_that_their_statement_takes() -> None:
    new, claim = re.findall(r"\bas (?:new|claim) \(([^)]+)\)", main.COMMIT_BATCH)
    assert tuple(re.findall(r"\w+", new)) == main.NewSecret._fields
    assert tuple(re.findall(r"\w+", claim)) == (*main.Claim._fields, "number")


def test_no_row_of_the_log_is_locked_before_it_is_old(tables: Tables) -> None:
    fresh = tables.fresh()
    fresh.rows("insert into secret_logs (secret_id, action) values (gen_random_uuid(), 'created')")
    fresh.rows(main.CLEAN_UP, 1000, 90)
    assert fresh.value("select count(*) from secret_logs where xmax::text <> '0'") == 0


# --- Connections, alone ---------------------------------------------------------------------------


async def never(*_: object) -> None:
    await asyncio.sleep(3600)


def postgres_error(kind: type[asyncpg.PostgresError], severity: str) -> asyncpg.PostgresError:
    error = kind("quoted")
    error.severity_en = severity  # as the server sends it
    return error


@parametrize(
    ("error", "maybe_executed", "connects_anew"),
    [
        (postgres_error(asyncpg.QueryCanceledError, "ERROR"), False, False),
        (postgres_error(asyncpg.ReadOnlySQLTransactionError, "ERROR"), False, True),
        (postgres_error(asyncpg.AdminShutdownError, "FATAL"), True, True),
        (ConnectionResetError(), True, True),
        (never, True, True),  # no answer in time
    ],
)
def test_failed_statement_tells_whether_it_may_have_been_executed(
    monkeypatch: pytest.MonkeyPatch, error: Any, maybe_executed: bool, connects_anew: bool
) -> None:
    monkeypatch.setattr(main, "POSTGRES_TIMEOUT_SECONDS", 0.05)
    idle = mock.Mock(is_closed=lambda: False)
    used = mock.AsyncMock(is_closed=lambda: False)
    used.fetch.side_effect = error

    async def fetch() -> None:
        database = main.Database()
        database._idle = [idle, used]
        await database.fetch("select")

    with pytest.raises(main.Unavailable) as raised:
        asyncio.run(asyncio.wait_for(fetch(), 10))
    assert raised.value.maybe_executed == maybe_executed
    assert idle.terminate.called == connects_anew
    assert used.close.called


def test_connecting_that_is_cancelled_leaves_no_session(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("postgres_host", "postgres_db", "postgres_user"):
        monkeypatch.setattr(main.settings, name, tables.environment[name.upper()])

    sessions = "select count(*) from pg_stat_activity where application_name = 'one-time-secrets'"
    before = tables.value(sessions)

    async def connect_and_cancel() -> None:
        database = main.Database()
        for delay in range(40):
            connecting = asyncio.create_task(database.connect())
            await asyncio.sleep(delay / 2000)
            connecting.cancel()
            (connection,) = await asyncio.gather(connecting, return_exceptions=True)
            if isinstance(connection, asyncpg.Connection):
                connection.terminate()
        await asyncio.to_thread(until, lambda: tables.value(sessions) == before)

    asyncio.run(connect_and_cancel())


def test_redis_that_failed_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "REDIS_BREAKER_SECONDS", 0.2)
    connection = mock.AsyncMock()
    connection.read_response.side_effect = [1, ConnectionError, 2]
    redis = main.Redis()
    monkeypatch.setattr(redis, "connection", connection)

    async def use() -> None:
        answers = [await redis.exchange([("PING",)]) for _ in range(3)]
        assert answers == [[1], [], []]
        assert connection.send_packed_command.call_count == 2
        await asyncio.sleep(0.25)  # longer than it is left alone
        assert await redis.exchange([("PING",)]) == [2]

    asyncio.run(use())


# --- Group commit, alone --------------------------------------------------------------------------


class Writer:
    """Writes rows by doubling them. A 0 waits for `gate`, a 13 fails, a 7 loses its result."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.is_writing = asyncio.Event()
        self.gate = asyncio.Event()

    async def write(self, rows: list[int]) -> list[int]:
        self.batches.append(rows)
        self.is_writing.set()
        if 0 in rows:
            await self.gate.wait()
        if 13 in rows:
            raise ValueError("unlucky")
        return [2 * row for row in rows if row != 7]


def accept() -> None:
    pass


def leave() -> None:
    raise ConnectionError


async def submitted(writer: Writer, *rows: int, max_weight: int = 100) -> list[Any]:
    """Submit 0, which holds the writer up, then all the others at once. The results of these."""
    batcher = main.Batcher[int, int](writer.write, max_weight)
    first = asyncio.create_task(batcher.submit(0, 1, accept))
    await writer.is_writing.wait()
    others = [asyncio.create_task(batcher.submit(row, 1, accept)) for row in rows]
    await asyncio.sleep(0)
    writer.gate.set()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    return results[1:]


def test_rows_that_come_while_a_batch_is_written_share_the_next_up_to_its_weight() -> None:
    writer = Writer()
    assert asyncio.run(submitted(writer, 1, 2, 3, 4, 5, max_weight=2)) == [2, 4, 6, 8, 10]
    assert writer.batches == [[0], [1, 2], [3, 4], [5]]


@parametrize("bad", [13, 7])
def test_batch_that_fails_fails_its_own_rows_each_with_an_error_of_its_own(bad: int) -> None:
    results = asyncio.run(submitted(Writer(), bad, 1, 2, 3, max_weight=2))
    assert results[2:] == [4, 6]
    assert [type(error.args[0]) for error in results[:2]] == [ValueError, ValueError]
    assert results[0] is not results[1]


def test_whoever_left_is_not_written_and_holds_up_nobody() -> None:
    async def use() -> None:
        writer = Writer()
        batcher = main.Batcher[int, int](writer.write, 100)
        stays = asyncio.create_task(batcher.submit(1, 1, accept))
        left = asyncio.create_task(batcher.submit(2, 1, leave))
        cancelled = asyncio.create_task(batcher.submit(3, 1, accept))
        await asyncio.sleep(0)
        cancelled.cancel()
        results = await asyncio.gather(stays, left, cancelled, return_exceptions=True)
        assert results[0] == 2
        assert [type(one) for one in results[1:]] == [ConnectionError, asyncio.CancelledError]
        assert writer.batches == [[1]]

    asyncio.run(asyncio.wait_for(use(), 5))


# --- Shares, alone --------------------------------------------------------------------------------


def test_quota_counts_before_anything_is_sent_and_by_the_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quota = main.Quota(4)
    monkeypatch.setattr(main, "time", lambda: 60.0)
    quota.charge("192.0.2.1", 3 * 1024)
    quota.charge("192.0.2.1", 60_000)  # the one that uses it up
    with pytest.raises(main.ServiceError):
        quota.charge("192.0.2.1", 1)
    quota.charge("192.0.2.2", 1)
    monkeypatch.setattr(main, "time", lambda: 120.0)
    quota.charge("192.0.2.1", 1)
    assert len(quota.known) == 1  # of the minutes before nothing is kept


def test_quota_believes_redis_when_it_counts_more() -> None:
    quota = main.Quota(4)
    quota.charge("192.0.2.1", 1)
    ((name, kib),) = quota.unsent.items()
    assert kib == 1
    quota.known[name] = 4  # others stored, too
    with pytest.raises(main.ServiceError):
        quota.charge("192.0.2.1", 1)


def test_no_network_takes_more_than_its_part_and_each_gets_a_piece() -> None:
    shares = main.Shares("places", total=4, part=2)
    with ExitStack() as stack:
        for network in ("a", "a", "b"):
            stack.enter_context(shares.take(network))
        with pytest.raises(main.Unavailable), shares.take("a"):
            pass
        stack.enter_context(shares.take("c"))
        with pytest.raises(main.Unavailable), shares.take("d"):
            pass
    with shares.take("a", 4):  # more than its part, but alone
        pass


def test_large_work_leaves_the_event_loop_alone() -> None:
    async def thread_of(size_bytes: int) -> int:
        return await main.in_thread_if_large(size_bytes, threading.get_ident)

    assert asyncio.run(thread_of(100)) == threading.get_ident()
    assert asyncio.run(thread_of(10 * 2**20)) != threading.get_ident()


def test_any_http_exception_is_an_error_of_ours() -> None:
    for status, code in ((405, "method_not_allowed"), (404, "not_found"), (418, "not_found")):
        error = HTTPException(status, headers={"X-Odd": "1"})
        assert main.as_service_error(error).code == code


@parametrize(
    ("text", "networks"),
    [
        ("127.0.0.1/8", "127.0.0.0/8"),
        ("172.18.0.1/16, ::1", "172.18.0.0/16,::1/128"),
        ("*", "*"),
    ],
)
def test_believed_addresses_are_read_as_their_networks(text: str, networks: str) -> None:
    assert main.Settings(forwarded_allow_ips=text).forwarded_allow_ips == networks


# --- Create, read, delete, look, expire -----------------------------------------------------------


def test_creation_answers_with_keys_expiry_and_link(service: Service) -> None:
    created = service.create()
    assert set(created) == {"secret_key", "receipt_key", "expires_at", "url"}
    for name in ("secret_key", "receipt_key"):
        assert re.fullmatch("[A-Za-z0-9_-]{32}", created[name])
    assert raw(created["secret_key"]) == main.secret_key_of(raw(created["receipt_key"]))
    assert created["url"] == f"{service.url}/#{created['secret_key']}"


def claims(service: Service, created: Document, passphrase: str | None = None) -> list[Response]:
    """What everybody is told who wants something of a secret."""
    key = created["secret_key"]
    presented = [service.read(key, passphrase), service.destroy(key, passphrase)]
    return [service.get(f"/secret/{key}"), *presented, service.status(key), service.revoke(created)]


@parametrize(("end", "action"), [(Service.read, "read"), (Service.destroy, "deleted")])
def test_what_has_ended_says_how_and_when(
    service: Service, end: Callable[[Service, str], Response], action: str
) -> None:
    created = service.create()
    key = created["secret_key"]
    assert end(service, key).is_success
    _, event = service.events(key)
    assert (event["action"], event["by"]) == (action, "secret_key")
    assert event["ip_address"] == "127.0.0.1"
    for response in claims(service, created):
        answer = assert_problem(response, 410, GONE[action])
        assert datetime.fromisoformat(answer["ended_at"]) == event["created_at"]
        assert ("compromised" in answer["detail"]) == (action == "read")
    assert service.actions(key) == ["created", action]
    assert not service.is_stored(key)
    assert 240 <= service.cached_seconds("secret", key) <= 300
    assert service.cached("key", key) is None


def test_status_looks_without_reading(service: Service) -> None:
    created = service.create()
    expected = {
        "status": "unread",
        "expires_at": created["expires_at"],
        "passphrase_required": False,
    }
    assert [service.status(created["secret_key"]).json() for _ in range(3)] == [expected] * 3
    assert service.actions(created["secret_key"]) == ["created"]
    for guard, required in ((TO_READ, True), (TO_DELETE, False)):
        assert service.status(service.key(**guard)).json()["passphrase_required"] is required


LOOKS = ("/", "/health", "/docs", "/redoc", "/openapi.json", "/static-offline-docs/swagger-ui.css")


@parametrize("prefix", ["", "/api/v1"])
def test_every_route_stands_under_both_prefixes_and_forbids_storing(
    service: Service, prefix: str
) -> None:
    read, deleted, revoked = (service.create() for _ in range(3))
    answers = [
        service.post(f"{prefix}/secret", json={"secret": "s"}),
        service.put(f"{prefix}/secret", content="s"),
        service.get(f"{prefix}/secret/{read['secret_key']}/status"),
        service.get(f"{prefix}/secret/{read['secret_key']}"),
        service.post(f"{prefix}/secret/{service.key()}"),
        service.delete(f"{prefix}/secret/{deleted['secret_key']}"),
        service.get(f"{prefix}/receipt/{deleted['receipt_key']}"),
        service.delete(f"{prefix}/receipt/{revoked['receipt_key']}"),
        *(service.request(method, path) for method in ("GET", "HEAD") for path in LOOKS),
    ]
    assert [answer.status_code for answer in answers] == [201, 201] + [200] * 18
    for answer in answers:
        for name, value in NO_STORE.items():
            assert answer.headers.get_list(name) == [value]
    assert_problem(service.post(f"{prefix}/secret/{read['secret_key']}"), 410, "already_read")
    for path in ("/nothing", "/secret/", "/secrets", "/api/v1", "/api/v2/secret"):
        assert_problem(service.get(prefix + path), 404, "not_found")
    health = {"status": "ok", "postgres": "up", "redis": "up"}
    assert service.get(f"{prefix}/health").json() == health


CALLS_WITH_A_KEY = """
GET /secret/{}
POST /secret/{}
DELETE /secret/{}
GET /secret/{}/status
GET /receipt/{}
DELETE /receipt/{}
""".strip().splitlines()
ODD_ENDS = ("=", "+", ".", "%20", "%2F", "a%0A", "%00", "%FF", "é", "%D9%A1")


@parametrize(
    "key",
    [
        "a" * 32,  # which is well-formed
        "a" * 31,
        "a" * 33,
        "a" * 5000,
        CANARY,
        *("a" * 31 + end for end in ODD_ENDS),
    ],
    ids=len,
)
def test_key_that_opens_nothing_is_not_found(service: Service, key: str) -> None:
    for call in CALLS_WITH_A_KEY:
        method, path = call.format(key).split(" ")
        response = service.request(method, path)
        assert_problem(response, 404, "not_found")
        assert key not in response.text


def lifetime(service: Service, created: Document) -> float:
    """The seconds from a secret's creation to its expiry."""
    created_at: datetime = service.events(created["secret_key"])[0]["created_at"]
    return (datetime.fromisoformat(created["expires_at"]) - created_at).total_seconds()


@parametrize("ttl_seconds", [None, 60, 604800])
def test_secret_expires_ttl_seconds_from_now(service: Service, ttl_seconds: int | None) -> None:
    members: Document = {"ttl_seconds": ttl_seconds} if ttl_seconds else {}
    created = service.create(**members)
    assert lifetime(service, created) == (ttl_seconds or 86400)
    assert created["expires_at"].endswith("Z")  # UTC
    assert service.read(created["secret_key"]).is_success


@parametrize("guard", [{}, TO_READ])
def test_expired_secret_is_gone_for_everybody_though_no_cleanup_ran(
    service: Service, guard: Document
) -> None:
    created = service.create(**guard)
    expired_at = service.expire(created["secret_key"])
    for response in claims(service, created, guard.get("passphrase")):
        answer = assert_problem(response, 410, "expired")
        assert datetime.fromisoformat(answer["ended_at"]) == expired_at
    assert service.actions(created["secret_key"]) == ["created"]
    assert service.is_stored(created["secret_key"])


def test_links_lifetimes_and_sizes_are_settings_which_the_page_knows(proxied: Service) -> None:
    created = proxied.create("x" * 3000)
    assert created["url"] == f"https://secrets.example/#{created['secret_key']}"
    assert lifetime(proxied, created) == 60
    assert 540 <= proxied.cached_seconds("secret", created["secret_key"]) <= 600
    assert lifetime(proxied, proxied.create(ttl_seconds=120)) == 120
    too_long = proxied.post("/secret", json={"secret": "s", "ttl_seconds": 121})
    assert_problem(too_long, 422, "invalid")
    assert_problem(proxied.post("/secret", json={"secret": "x" * 3001}), 413, "too_large")
    page = proxied.get("/", headers={"Accept": BROWSER}).text
    (limits,) = re.findall("<meta name=\"limits\" content='(.+)'>", page)
    expected = {"default_ttl_seconds": 60, "max_ttl_seconds": 120, "max_secret_bytes": 3000}
    assert json.loads(limits) == {**expected, "replay_seconds": 60, "api_tokens": ""}


# --- Passphrases ----------------------------------------------------------------------------------


@parametrize("guard", [{"passphrase": "right"}, TO_DELETE, TO_READ])
def test_passphrase_guards_deleting_and_if_asked_for_reading(
    service: Service, guard: Document
) -> None:
    read = service.create("hello", **guard)
    deleted = service.key(**guard)
    key = read["secret_key"]
    guards_reading = read["passphrase_scope"] == "read"
    assert guards_reading == (guard == TO_READ)
    for claim in (Service.destroy, Service.read) if guards_reading else (Service.destroy,):
        for _ in range(6):  # which costs no attempt, and is not logged
            assert_problem(claim(service, key), 403, "passphrase_required")
        assert_problem(claim(service, key, "wrong"), 403, "wrong_passphrase")
    assert service.reads(key, "right" if guards_reading else None) == "hello"
    assert service.actions(key) == ["created", *["denied"] * (2 if guards_reading else 1), "read"]
    assert service.destroy(deleted, "right").json() == {"status": "secret_deleted"}


@parametrize(("attempts", "minutes"), [(5, 15), (10, 30), (15, 60), (30, 480)])
def test_each_five_guesses_make_even_the_right_passphrase_wait(
    service: Service, attempts: int, minutes: int
) -> None:
    key = service.key("hello", **TO_READ)

    statement = """
        update secrets set attempts = $2, attempts_since = now() - make_interval(mins => $3)
        where id = $1
    """
    charge = partial(service.tables.rows, statement, id_of(key))
    charge(attempts - 5, 1000)  # the pauses before are over
    for left in (4, 3, 2, 1, 0):
        answer = assert_problem(service.read(key, "wrong"), 403, "wrong_passphrase")
        assert answer["attempts_left"] == left
    for claim in (Service.read, Service.destroy):
        response = claim(service, key, "right")
        answer = assert_problem(response, 429, "too_many_attempts")
        pause = datetime.fromisoformat(answer["retry_at"]).timestamp() - time.time()
        assert abs(pause - minutes * 60) < 60
        assert -60 < int(response.headers["retry-after"]) - minutes * 60 <= 0
    assert service.actions(key) == ["created", *["denied"] * 5]
    charge(attempts, minutes - 1)
    assert_problem(service.read(key, "right"), 429, "too_many_attempts")
    charge(attempts, minutes)
    assert service.read(key, "wrong").json()["attempts_left"] == 4
    assert service.reads(key, "right") == "hello"


def test_of_a_hundred_guesses_at_once_five_at_most_are_checked_and_hold_up_nobody(
    two_workers: Service,
) -> None:
    key = two_workers.key(**TO_READ)
    guesses = [("POST", f"/secret/{key}", '{"passphrase": "wrong"}')] * 100
    with ThreadPoolExecutor(1) as other:
        guessing = other.submit(at_once, two_workers, guesses)
        while not guessing.done():
            assert two_workers.status(key).is_success
    codes = Counter(answer["code"] for _, answer in guessing.result())
    assert codes.keys() <= {"wrong_passphrase", "too_many_attempts", "unavailable"}
    charged = two_workers.tables.value("select attempts from secrets where id = $1", id_of(key))
    assert 1 <= codes["wrong_passphrase"] == charged <= 5


def test_creators_of_one_address_hold_up_no_reader_of_another(proxied: Service) -> None:
    keys = [proxied.key(**TO_READ) for _ in range(20)]
    create = partial(proxied.create_from, "192.0.2.1", **TO_READ)
    took = []
    with ExitStack() as creating:
        for _ in range(20):
            creating.enter_context(repeated(create, 0))
        time.sleep(0.5)  # until all queue
        for key in keys:
            headers = {"X-Forwarded-For": "192.0.2.2"}
            response = proxied.post(f"/secret/{key}", json={"passphrase": "right"}, headers=headers)
            assert response.is_success
            took.append(response.elapsed.total_seconds())
    assert statistics.median(took) < 1


# Its clock is twenty minutes ahead of PostgreSQL's.
SKEWED = """
import datetime, main
class Skewed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(minutes=20)
main.datetime = Skewed
main.main()
"""


def test_pause_is_told_by_the_clock_of_postgresql(tables: Tables) -> None:
    with serving(tables, Path(os.devnull), ("-c", SKEWED)) as service:
        key = service.key(**TO_READ)
        answers = [service.read(key, "wrong") for _ in range(6)]
        assert_problem(answers[-1], 429, "too_many_attempts")
        assert 0 <= 900 - int(answers[-1].headers["retry-after"]) < 60


def test_right_passphrase_is_not_counted_though_the_claim_fails(service: Service) -> None:
    key = service.key("hello", **TO_READ)
    service.tables.rows("alter table secret_logs add constraint full_disk check (false) not valid")
    try:
        for _ in range(7):
            assert_problem(service.read(key, "right"), 503, "unavailable")
    finally:
        service.tables.rows("alter table secret_logs drop constraint full_disk")
    assert service.read(key, "wrong").json()["attempts_left"] == 4
    assert service.reads(key, "right") == "hello"


# --- Bad input ------------------------------------------------------------------------------------


BAD_MEMBERS = {  # as JSON
    "secret": '"" null 4815162342 4815162342.5 true ["CANARY"] {"CANARY":"CANARY"}',
    "ttl_seconds": """
        0 -1 -4815162342 1.5 true "60" "CANARY" 1e99 1e999 NaN -Infinity null 604801 4815162342
        4815162342481516234248151623424815162342 [4815162342]
    """,
    "passphrase": '"" 4815162342 true ["CANARY"] "%s"' % ("CANARY" * 1000),
    "passphrase_scope": '"CANARY" "" null 4815162342',
    "encoding": '"CANARY" 4815162342',
    "ttl": "4815162342",
    "Secret": '"CANARY"',
}
NO_OBJECTS = [
    *rb"""
null
true
4815162342
"CANARY"
["CANARY"]
[{"secret": "CANARY"}]
{"secret": "CANARY"
{"secret": "CANARY",}
{'secret': 'CANARY'}
{"secret": CANARY}
{"secret": "CANARY"}{"secret": "CANARY"}
secret=CANARY&ttl_seconds=60
{"secret": "CANARY\x"}
{"secret": "CANARY\ud800"}
{"secret": "CANARY\udc00\ud800"}
{"secret": "CANARY", "passphrase": "CANARY\ud800"}
""".strip().splitlines(),
    b"",
    b" ",
    b'{"secret": "CANARY\xff\xfe"}',
    b'{"secret": "CANARY\n"}',
    b"\x00CANARY",
    '{"secret": "CANARY"}'.encode("utf-16"),
    b'{"secret": "CANARY", "x": ' + b"[" * 100_000,
    b'{"secret": "CANARY", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
]


BAD_PASSPHRASES = [
    *(
        ("passphrase", f'{{"passphrase": {value}}}'.encode())
        for value in BAD_MEMBERS["passphrase"].split()
    ),
    ("password", b'{"password": "CANARY"}'),
    ("body", b'{"passphrase": "CANARY\\ud800"}'),
    ("body", b'["CANARY"]'),
    ("body", b'"CANARY"'),
    ("body", b'{"passphrase": "CANARY"'),
    ("body", b"passphrase=CANARY"),
]
ONE_BAD_MEMBER = [  # of two with one name, the last counts
    (name, f'{{"secret": "CANARY", "{name}": {value}}}'.encode())
    for name in BAD_MEMBERS
    for value in BAD_MEMBERS[name].split()
]
BAD_BODIES = [  # (method, path, what the error must name, the body)
    *(("POST", "/secret", *refusal) for refusal in ONE_BAD_MEMBER),
    ("POST", "/secret", "secret", b'{"passphrase": "CANARY"}'),
    ("POST", "/secret", "secret", b'{"secret": "CANARY", "encoding": "base64"}'),
    *(("POST", "/secret", "body", body) for body in NO_OBJECTS),
    *(("POST", "/secret/{}", *refusal) for refusal in BAD_PASSPHRASES),
    *(("DELETE", "/secret/{}", *refusal) for refusal in BAD_PASSPHRASES),
]


def refused(
    service: Service, send: Callable[[], Response], status: int = 422, code: str = "invalid"
) -> Document:
    """Check that an input is refused, nothing of it repeated, and nothing stored."""
    before = service.tables.counts()
    response = send()
    answer = assert_problem(response, status, code)
    assert not [trace for trace in (CANARY, CANARY.upper(), NUMBER) if trace in response.text]
    for item in answer.get("errors", []):
        assert set(item) == {"loc", "msg", "type"}
    assert service.tables.counts() == before
    return answer


@parametrize(("method", "path", "named", "body"), BAD_BODIES, ids=lambda value: repr(value)[:60])
def test_bad_body_is_refused_with_the_reason(
    service: Service, method: str, path: str, named: str, body: bytes
) -> None:
    key = service.key()
    content = body.replace(b"CANARY", CANARY.encode())
    answer = refused(service, lambda: service.request(method, path.format(key), content=content))
    assert answer["errors"][0]["loc"][:2] == (["body"] if named == "body" else ["body", named])
    assert named in answer["detail"]
    assert service.status(key).json()["status"] == "unread"


@parametrize("name", [f"{CANARY} {CANARY}", "", "\x00", pytest.param("x" * 10_000, id="10000")])
def test_every_bad_member_is_named_but_no_odd_name_repeated(service: Service, name: str) -> None:
    body = {"secret": 4815162342, "ttl_seconds": "60", "passphrase": "", "colour": CANARY}
    answer = refused(service, lambda: service.post("/secret", json={**body, name: CANARY}))
    assert set(body) < {item["loc"][1] for item in answer["errors"]}
    assert not name or name not in json.dumps(answer, ensure_ascii=False)


@parametrize("passphrase", [{}, {"passphrase": None}])
def test_guard_of_reading_needs_a_passphrase(service: Service, passphrase: Document) -> None:
    body = {"secret": "s", "passphrase_scope": "read", **passphrase}
    answer = refused(service, lambda: service.post("/secret", json=body))
    assert "body.passphrase: passphrase_scope" in answer["detail"]


FLOODS = {  # each as large as a body may be, or larger
    "unknown fields": json.dumps({f"unknown{number}": number for number in range(15_000)}),
    "a few unknown fields": json.dumps({f"x{number}": 0 for number in range(200)}),
    "small members": "{" + '"a":1,' * 1_000_000 + '"secret":"s"}',
    "lists in lists": '{"secret":' + "[" * 350_000,
    "a long number": '{"secret":"s","ttl_seconds":' + "9" * 350_000 + "}",
    "escapes": '{"' + "\\u0041" * 50_000 + '":1}',
}


@parametrize("flood", FLOODS.values(), ids=FLOODS)
@parametrize(
    ("method", "path"), [("POST", "/secret"), ("POST", "/secret/{}"), ("DELETE", "/secret/{}")]
)
def test_refusal_is_smaller_than_the_question_and_takes_no_longer(
    service: Service, method: str, path: str, flood: str
) -> None:
    path = path.format(service.key())
    with unharmed(service, 30):
        response = service.request(method, path, content=flood)
    assert response.status_code in (413, 422)
    assert len(response.content) < len(flood)
    assert len(response.json().get("errors", [])) <= 10
    assert response.elapsed.total_seconds() < 2


def test_refusal_names_ten_fields_and_how_many_more(service: Service) -> None:
    query = "&".join(f"x{number}=1" for number in range(25))
    for response in (
        service.post("/secret", content=FLOODS["a few unknown fields"]),
        service.create_raw(b"s", f"?{query}"),
    ):
        answer = assert_problem(response, 422, "invalid")
        assert len(answer["errors"]) == 10
        assert re.search(r"; and \d+ more", answer["detail"])
    assert_problem(service.create_raw(b"s", "?" + "x" * 60_000), 422, "invalid")


def test_thirty_refusals_at_once_hold_up_nobody(service: Service) -> None:
    floods = [("POST", "/secret", FLOODS["unknown fields"])] * 30
    with ThreadPoolExecutor(1) as other:
        flooding = other.submit(at_once, service, floods)
        slowest = max(service.get("/").elapsed.total_seconds() for _ in range(30))
        assert {status for status, _ in flooding.result()} == {422}
    assert slowest < 1


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")] for row in table.strip().splitlines()]


NONSENSE = """
Content-Encoding | gzip           | 415 | unsupported_encoding
Content-Range    | bytes 5-9/10   | 400 | bad_request
Host             |                | 400 | bad_request
Host             | two words      | 400 | bad_request
Host             | <script>       | 400 | bad_request
"""


@parametrize(("header", "value", "status", "code"), cells(NONSENSE))
def test_creation_that_would_store_or_link_nonsense_is_refused(
    service: Service, header: str, value: str, status: str, code: str
) -> None:
    put = partial(service.put, "/secret", content=b"s", headers={header: value})
    refused(service, put, int(status), code)


MISLABELLED = f"""
text/plain                        | ttl_seconds=0  | x          | ttl_seconds
text/plain                        | ttl_seconds=x  | x          | ttl_seconds
text/plain                        | ttl_seconds=   | x          | ttl_seconds
text/plain                        | ttl=60         | x          | ttl
text/plain                        | passphrase=p   | x          | passphrase
text/plain                        |                |            | secret
                                  | ttl_seconds=60 | {CREATION} | ttl_seconds
                                  |                | {CANARY}   | Content-Type
application/x-www-form-urlencoded |                | a=b        | curl -T FILE
multipart/form-data; boundary=x   |                | --x        | curl -T FILE
"""  # of what is no JSON the last three are told which header or call takes it


@parametrize(("label", "query", "body", "named"), cells(MISLABELLED))
def test_bad_query_and_mislabelled_body_are_refused(
    service: Service, label: str, query: str, body: str, named: str
) -> None:
    answer = refused(service, lambda: service.create_raw(body.encode(), f"?{query}", label))
    assert named in answer["detail"]


@parametrize("secret", ["x" * 65537, "🔑" * 16384 + "x", CANARY * 100_000], ids=len)
def test_oversized_secret_is_too_large_however_it_comes(service: Service, secret: str) -> None:
    def in_chunks() -> Response:
        return service.post("/secret", content=iter([b"x" * 1000] * 2000))

    def in_json() -> Response:
        return service.post("/secret", json={"secret": secret})

    for send_it in (in_chunks, in_json, lambda: service.create_raw(secret.encode())):
        answer = refused(service, send_it, 413, "too_large")
        assert "65536 bytes" in answer["detail"]


@parametrize("method", ["PATCH", "OPTIONS", "TRACE", "PROPFIND", "HEAD"])
def test_method_that_does_not_exist_is_refused_and_reads_nothing(
    service: Service, method: str
) -> None:
    key = service.key()
    before = service.tables.counts()
    for path in (f"/secret/{key}", f"/api/v1/secret/{key}", f"/secret/{key}/status", "/secret"):
        response = service.request(method, path)
        assert response.status_code == 405
        allowed = response.headers["allow"]
        assert method not in allowed
        if method != "HEAD":
            assert allowed in assert_problem(response, 405, "method_not_allowed")["detail"]
    assert service.tables.counts() == before
    assert service.status(key).json()["status"] == "unread"


# --- Documentation and curl -----------------------------------------------------------------------


CALLS = """
get / get /health post /secret put /secret get /secret/{secret_key}/status
get /secret/{secret_key} post /secret/{secret_key} put /secret/{secret_key}
delete /secret/{secret_key} get /receipt/{receipt_key} delete /receipt/{receipt_key}
"""


def test_openapi_describes_every_call_and_error(service: Service) -> None:
    document = service.get("/openapi.json").json()
    paths = document["paths"]
    calls = {f"{method} {path}" for path in paths for method in paths[path]}
    assert calls == set(re.findall(r"\w+ \S+", CALLS))
    operations = [operation for path in paths.values() for operation in path.values()]
    assert all(operation["summary"] and operation["description"] for operation in operations)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    schemas = document["components"]["schemas"]
    for responses in (operation["responses"] for operation in operations):
        assert responses.pop("default") == {
            "$ref": "#/components/responses/problem",
            "description": "Default Response",
        }
        (answer,) = responses.values()
        for content in answer["content"].values():
            schema = content["schema"]
            schema = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
            assert schema["type"] == "string" or schema["properties"]
    assert set(schemas["Problem"]["properties"]["code"]["enum"]) == set(main.Code)


def test_every_curl_line_of_the_home_page_and_the_readme_works(
    service: Service, tmp_path: Path
) -> None:
    home = service.get("/")
    assert home.headers["content-type"].startswith("text/plain")
    assert f"{service.url}/secret" in home.text
    text = home.text.replace("KEY", "$KEY").replace("RECEIPT_$KEY", "$RECEIPT_KEY")
    text += (HERE / "README.md").read_text()
    lines = [line for line in text.splitlines() if re.match("    (curl|pass|printf|while) ", line)]
    assert len(lines) >= 23
    for name in ("FILE", "id_rsa", "plan.pdf"):
        (tmp_path / name).write_bytes(b"not a key")
    for line in lines:
        created = service.create(passphrase="p")
        if "while" in line:
            service.read(created["secret_key"])
        values = rf"KEY={created['secret_key']} RECEIPT_KEY={created['receipt_key']} PASSWORD='p\n'"
        line = line.replace("curl ", "curl -sSf ", 1).replace("PASSPHRASE", "p")
        command = f"pass() {{ echo hunter2; }}; HOST={service.url} {values}; {line}"
        ended = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, capture_output=True, check=True, timeout=20
        )
        assert ended.stdout or " -OJ " in line or "while" in line
        if "$PASSWORD" in line:
            key = ended.stdout.decode().strip().rpartition("#")[2]
            assert service.read(key).json() == {"secret": r"p\n"}


TEXT = "text/plain; charset=utf-8"


@parametrize(
    ("method", "label"),
    [
        ("POST", "text/plain"),
        ("POST", "application/octet-stream"),
        ("POST", TEXT),
        ("PUT", "application/json"),
        ("PUT", "application/x-www-form-urlencoded"),
    ],
)
@parametrize("secret", [b"hello\n", b"{}", bytes(range(256)), "\u20ac".encode()])
def test_raw_body_comes_back_byte_for_byte(
    service: Service, method: str, label: str, secret: bytes
) -> None:
    headers = {"Content-Type": label, "Accept": "text/plain"}
    created = service.request(method, "/secret?ttl_seconds=77", content=secret, headers=headers)
    assert (created.status_code, created.headers["content-type"]) == (201, TEXT)
    key = created.text.removeprefix(f"{service.url}/#").removesuffix("\n")
    assert service.events(key)[0]["ttl_seconds"] == 77
    read = service.get(f"/secret/{key}", headers=headers)
    kind = "application/octet-stream" if b"\xff" in secret else TEXT
    assert (read.content, read.headers["content-type"]) == (secret, kind)


def test_secret_that_is_not_text_comes_and_goes_in_json_as_base64(service: Service) -> None:
    as_base64 = {"secret": "/wA=", "encoding": "base64"}
    plain = service.create_raw(b"\xff\x00").json()["secret_key"]
    assert service.read(plain).json() == as_base64
    locked = service.key("/wA=", encoding="base64", **TO_READ)
    assert service.read(locked, "right").json() == as_base64


# --- Names of files -------------------------------------------------------------------------------

NAMES = """
plan.pdf
Plan ü 🔑.pdf
"quoted"; filename=x
100%
dot.
CON
\u202efdp.exe
<img src=x onerror=alert(1)>.svg
""".strip().splitlines()


@parametrize("name", [*NAMES, "é" * 127])
def test_name_comes_back_and_is_harmless_in_a_header(service: Service, name: str) -> None:
    url = service.put(f"/secret/{quote(name, safe='')}", content=b"<svg>").text
    assert service.read(url.strip()[-32:]).json() == {"secret": "<svg>", "filename": name}
    raw_answer = service.get(f"/secret/{service.key(filename=name)}", headers={"Accept": "text/*"})
    disposition = raw_answer.headers["content-disposition"]
    assert re.fullmatch(r"""attachment; filename="[^"\\]+"; filename\*=UTF-8''\S+""", disposition)
    assert unquote(disposition.partition("''")[2]) == name
    assert raw_answer.headers["x-content-type-options"] == "nosniff"
    assert name.encode() not in service.log.read_bytes()


@parametrize(
    "name", ("", "/", "a/b", "a\\b", "..", "a\rb", "a\n", "a\x00", "a\x85", "é" * 128), ids=repr
)
def test_name_that_could_leave_its_place_is_refused(service: Service, name: str) -> None:
    refused(service, lambda: service.post("/secret", json={"secret": "s", "filename": name}))


def test_curl_sends_and_gets_a_file_with_its_name(service: Service, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    file = tmp_path / "Plan ü 🔑.pdf"
    file.write_bytes(bytes(range(256)))
    sent = ["curl", "-sSfT", str(file), f"{service.url}/secret/"]
    url = subprocess.run(sent, capture_output=True, check=True, text=True).stdout.strip()
    accept = "Accept: application/octet-stream"
    path = f"{service.url}/secret/{url[-32:]}"
    subprocess.run(["curl", "-sSfOJ", "-H", accept, path], cwd=there, check=True)
    (got,) = there.iterdir()
    assert (got.suffix, got.read_bytes()) == (".pdf", file.read_bytes())


# --- An answer that can be asked for again --------------------------------------------------------

AGAIN = {"Idempotency-Key": "of one reader, who lost the answer"}
ANOTHER = {"Idempotency-Key": "of somebody else entirely"}


def read_with(
    service: Service, key: str, headers: dict[str, str], passphrase: str | None = None
) -> Response:
    return service.post(f"/secret/{key}", json={"passphrase": passphrase}, headers=headers)


@parametrize("guard", [{}, TO_READ])
def test_reader_is_answered_again_and_nobody_else(service: Service, guard: Document) -> None:
    key = service.key("hello", filename="a", **guard)
    right = guard.get("passphrase")
    for _ in range(3):
        answer = read_with(service, key, AGAIN, right)
        assert answer.json() == {"secret": "hello", "filename": "a"}
    read_at = service.events(key)[1]["created_at"]
    for headers, passphrase in (({}, right), (ANOTHER, right), (AGAIN, "wrong" if guard else None)):
        if guard or headers != AGAIN:
            answer = read_with(service, key, headers, passphrase)
            ended_at = assert_problem(answer, 410, "already_read")["ended_at"]
            assert datetime.fromisoformat(ended_at) == read_at
    assert service.actions(key) == ["created", "read", "replayed", "replayed"]


def test_replay_has_its_time_and_is_swept(swept: Service) -> None:
    key = swept.key()
    assert read_with(swept, key, AGAIN).is_success
    kept = "select count(*) from replays where secret_id = $1"
    assert swept.tables.value(kept, id_of(key)) == 1
    over = "update replays set replay_until = now() where secret_id = $1"
    swept.tables.rows(over, id_of(key))
    assert_problem(read_with(swept, key, AGAIN), 410, "already_read")
    until(lambda: swept.tables.value(kept, id_of(key)) == 0)


def test_nothing_is_kept_without_a_key_and_where_it_is_switched_off(
    tables: Tables, service: Service
) -> None:
    keys = [service.key(), service.key()]
    service.read(keys[0])
    with serving(tables, REPLAY_SECONDS="0") as off:
        assert read_with(off, keys[1], AGAIN).is_success
        assert_problem(read_with(off, keys[1], AGAIN), 410, "already_read")
    kept = "select count(*) from replays where secret_id = any($1)"
    assert tables.value(kept, [id_of(key) for key in keys]) == 0


@parametrize("text", ["x" * 15, "x" * 201, "é" * 20, "a\ttab" * 5], ids=len)
def test_malformed_idempotency_key_is_refused(service: Service, text: str) -> None:
    headers = [(b"Idempotency-Key", text.encode("latin-1"))]
    key = service.key()
    refused(service, lambda: service.get(f"/secret/{key}", headers=headers))
    assert service.is_stored(key)


# --- Log and receipts -----------------------------------------------------------------------------


def test_receipt_waits_until_the_secret_has_ended(service: Service) -> None:
    created = service.create()
    path = f"/receipt/{created['receipt_key']}?wait_seconds=30"
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(service.get, path)
        time.sleep(0.5)  # until it waits
        service.read(created["secret_key"])
        answer = waiting.result()
    assert answer.json()["status"] == "read"
    assert answer.elapsed.total_seconds() < 3


def test_receipt_waits_no_longer_than_asked_and_only_for_a_few(tables: Tables) -> None:
    with serving(tables, Path(os.devnull), patched(MAX_WAITING_RECEIPTS=1)) as service:
        path = f"/receipt/{service.create()['receipt_key']}?wait_seconds="
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(service.get, path + "3")
            time.sleep(0.5)  # until it waits
            assert service.get(path + "60").elapsed.total_seconds() < 2
            assert 2.5 < waiting.result().elapsed.total_seconds() < 6
        for text in ("0", "61", "x", ""):
            assert_problem(service.get(path + text), 422, "invalid")
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(service.get, path + "60")
            time.sleep(0.5)  # until it waits
            service.process.terminate()
            assert waiting.result().json()["status"] == "unread"  # a stop ends it


def test_secret_that_a_restore_has_lost_says_so(service: Service) -> None:
    created = service.create()
    service.tables.rows("delete from secrets where id = $1", id_of(created["secret_key"]))
    assert service.get(f"/receipt/{created['receipt_key']}").json()["status"] == "lost"
    assert_problem(service.status(created["secret_key"]), 410, "lost")


def test_log_and_receipt_have_each_event_with_its_time_address_and_agent(service: Service) -> None:
    created = service.create(ttl_seconds=77, **TO_READ)
    for passphrase in ("wrong", "right"):
        service.read(created["secret_key"], passphrase)
    receipt = service.get(f"/receipt/{created['receipt_key']}").json()
    assert (receipt["status"], receipt["expires_at"]) == ("read", created["expires_at"])
    seen = {"ip_address": "127.0.0.1", "user_agent": "a test"}
    expected: list[Document] = [
        {"action": "created", **seen, "ttl_seconds": 77, "passphrase": "read"},
        {"action": "denied", **seen, "reason": "wrong_passphrase", "wanted": "read"},
        {"action": "read", **seen, "by": "secret_key"},
    ]
    logged = service.events(created["secret_key"])
    for event, shown, known in zip(logged, receipt["events"], expected, strict=True):
        assert event.pop("created_at") == datetime.fromisoformat(shown.pop("created_at"))
        assert known.items() <= event.items()
        assert shown.items() <= known.items()


@parametrize("guard", [{}, TO_DELETE, TO_READ])
def test_receipt_revokes_without_a_passphrase(service: Service, guard: Document) -> None:
    created = service.create(**guard)
    assert service.get(f"/receipt/{created['receipt_key']}").json()["status"] == "unread"
    (event,) = service.events(created["secret_key"])
    assert event.get("passphrase") == guard.get("passphrase_scope")
    assert service.revoke(created).json() == {"status": "secret_deleted"}
    assert_problem(service.read(created["secret_key"]), 410, "deleted")
    event = service.get(f"/receipt/{created['receipt_key']}").json()["events"][-1]
    assert (event["action"], event["by"]) == ("deleted", "receipt_key")


def test_receipt_needs_the_receipt_key_and_a_history(service: Service) -> None:
    created = service.create()
    assert_problem(service.get(f"/receipt/{created['secret_key']}"), 404, "not_found")
    assert_problem(service.delete(f"/receipt/{created['secret_key']}"), 404, "not_found")
    assert service.read(created["secret_key"]).is_success
    forget = "delete from secret_logs where secret_id = $1"
    service.tables.rows(forget, id_of(created["secret_key"]))
    assert_problem(service.get(f"/receipt/{created['receipt_key']}"), 404, "not_found")


@parametrize("user_agent", [b"x" * 5000, b"caf\xe9 \xff\xfe", b'"}, "by": "x', b"\\u0000", b""])
def test_any_user_agent_is_logged_up_to_200_characters(service: Service, user_agent: bytes) -> None:
    response = service.post("/secret", json={"secret": "s"}, headers=[(b"User-Agent", user_agent)])
    (event,) = service.events(response.json()["secret_key"])
    assert event["user_agent"] == user_agent.decode("latin-1")[:200]


FORWARDED = f"""
203.0.113.7               | 203.0.113.7
2001:db8::7               | 2001:db8::7
198.51.100.1, 203.0.113.8 | 203.0.113.8
::ffff:192.0.2.1          | 192.0.2.1
2001:db8::1%eth0          | 2001:db8::1
' or 1=1 --               |
999.1.1.1                 |
{"x" * 4000} |
,,,                       | 127.0.0.1
                          | 127.0.0.1
"""  # each in its one form; the first of two is what the client itself claims


@parametrize(("forwarded", "address"), cells(FORWARDED))
def test_only_a_trusted_proxy_is_believed(
    proxied: Service, service: Service, forwarded: str, address: str
) -> None:
    key = proxied.create_from(forwarded).json()["secret_key"]
    proxied.get(f"/secret/{key}", headers={"X-Forwarded-For": forwarded})
    assert [event["ip_address"] or "" for event in proxied.events(key)] == [address] * 2
    key = service.create_from(forwarded).json()["secret_key"]
    assert service.events(key)[0]["ip_address"] == "127.0.0.1"


def test_log_names_the_keys_at_start_and_then_what_was_answered(
    tables: Tables, tmp_path: Path
) -> None:
    info = {"LOG_LEVEL": "info", "CLEANUP_INTERVAL_SECONDS": "0.1"}
    with serving(tables, tmp_path / "log", **info) as service:
        assert service.log.read_text().count(OPERATORS_KEY.fingerprint) == 1
        service.read("x" * 32)
        until(lambda: "{secret_key} 404 not_found': 1" in service.log.read_text())


def test_proxy_that_is_not_believed_is_named_once(tables: Tables, tmp_path: Path) -> None:
    with serving(tables, tmp_path / "log", LOG_LEVEL="warning") as service:
        for _ in range(3):
            service.create_from("203.0.113.7")
        (line,) = service.log.read_text().splitlines()
    assert ("FORWARDED_ALLOW_IPS" in line, "127.0.0.1" in line) == (True, True)


# --- Links ----------------------------------------------------------------------------------------


PREVIEWS = """
Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)
TelegramBot (like TwitterBot)
Mozilla/5.0 (compatible; Discordbot/2.0; +https://discordapp.com)
facebookexternalhit/1.1
Twitterbot/1.0
LinkedInBot/1.0 (compatible; Mozilla/5.0)
Mozilla/5.0 SkypeUriPreview Preview/0.5
WhatsApp/2.23.20.0
Mozilla/5.0 (compatible; Googlebot/2.1)
Mozilla/5.0 (compatible; bingbot/2.0)
Mozilla/5.0 SafeLinks
""".strip().splitlines()


def test_page_allows_its_own_script_and_style_and_nothing_else(service: Service) -> None:
    page = service.get("/", headers={"Accept": BROWSER}).text
    (policy,) = re.findall('<meta http-equiv="Content-Security-Policy" content="(.*)">', page)
    own = [re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page) for tag in ("script", "style")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for (text,) in own]
    rest = "connect-src 'self'; img-src data:; form-action 'none'; base-uri 'none'"
    own_only = "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; " + rest
    assert policy == own_only.format(*hashes)


@parametrize(
    "headers",
    [
        {"Accept": BROWSER},
        {"Sec-Purpose": "prefetch;prerender"},
        {"Purpose": "prefetch"},
        *({"User-Agent": agent} for agent in PREVIEWS),
    ],
    ids=str,
)
def test_preview_gets_the_page_and_reads_nothing(service: Service, headers: dict[str, str]) -> None:
    key = service.key()
    response = service.get(f"/secret/{key}", headers=headers)
    assert response.is_success
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert service.reads(key) == "a secret"


WEIGHTS = f"""
curl/8.14.1  | */*                                                  | application/json
requests/2.3 | application/json                                     | application/json
Chrome/140.0 | */*                                                  | application/json
Java/1.8     | text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2 | application/json
curl/8.14.1  | text/plain                                           | {TEXT}
curl/8.14.1  | text/plain;q=0                                       | application/json
curl/8.14.1  | application/json, text/plain;q=0.9                   | application/json
curl/8.14.1  | application/json;q=0.5, text/plain                   | {TEXT}
curl/8.14.1  | text/*;q=0.3, */*;q=0.1                              | {TEXT}
"""


@parametrize(("agent", "accept", "kind"), cells(WEIGHTS))
def test_program_gets_the_secret_as_what_weighs_most(
    service: Service, agent: str, accept: str, kind: str
) -> None:
    headers = {"User-Agent": agent, "Accept": accept}
    response = service.get(f"/secret/{service.key()}", headers=headers)
    assert response.headers["content-type"] == kind
    assert "a secret" in response.text


# --- Cache and cleanup ----------------------------------------------------------------------------


def test_ciphertext_is_cached_for_five_minutes_and_its_key_no_longer_than_its_ttl(
    service: Service,
) -> None:
    long = service.key(ttl_seconds=1234)
    short = service.key(ttl_seconds=1)
    locked = service.key(**TO_READ)
    assert all(240 <= service.cached_seconds("secret", key) <= 300 for key in (long, short, locked))
    assert 240 <= service.cached_seconds("key", long) <= 300
    assert service.cached_seconds("key", short) <= 1
    assert service.cached("key", locked) is None  # nor ever, where reading needs a passphrase


def test_stale_and_damaged_copies_in_the_cache_change_nothing(service: Service) -> None:
    # After a refusal Redis is left alone for some seconds.
    until(lambda: bool(service.cached("key", service.key())))
    restored, damaged, a_list = (service.key("hello") for _ in range(3))
    names = [name_in_redis(kind, id_of(restored)) for kind in ("secret", "key")]
    snapshot: Any = service.redis.mget(names)
    assert all((*snapshot, service.reads(restored)))
    service.redis.mset(dict(zip(names, snapshot, strict=True)))
    assert_problem(service.read(restored), 410, "already_read")
    for kind in ("secret", "key"):
        service.redis.set(name_in_redis(kind, id_of(damaged)), b"\xff" * 100)
        service.redis.delete(name_in_redis(kind, id_of(a_list)))
        service.redis.rpush(name_in_redis(kind, id_of(a_list)), b"")
    assert service.reads(damaged) == service.reads(a_list) == "hello"


def test_cleanup_ends_and_logs_what_expired_and_leaves_the_rest(swept: Service) -> None:
    created = swept.create()
    live = swept.key("hello")
    key = created["secret_key"]
    expired_at = swept.expire(key)
    until(lambda: swept.actions(key) == ["created", "expired"])
    assert swept.events(key)[1]["ip_address"] is None
    assert not swept.is_stored(key)
    answer = assert_problem(swept.read(key), 410, "expired")
    assert datetime.fromisoformat(answer["ended_at"]) == expired_at
    assert swept.get(f"/receipt/{created['receipt_key']}").json()["status"] == "expired"
    assert swept.reads(live) == "hello"
    until(lambda: swept.cached("key", key) is None)
    assert 240 <= swept.cached_seconds("secret", key) <= 300


def test_two_services_end_and_log_each_secret_once(swept: Service) -> None:
    expired = """
        insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, created_at, expires_at)
        select gen_random_uuid(), 'x', 'x', 'x', now() - interval '2 days', now() - interval '1 day'
        from generate_series(1, 5000)
    """
    left = "select count(*) from secrets where expires_at <= now()"
    ends = "select count(*), count(distinct secret_id) from secret_logs where action = 'expired'"
    swept.tables.rows(expired)
    assert swept.reads(swept.key("hello")) == "hello"  # meanwhile
    until(lambda: swept.tables.value(left) == 0, 60)
    ended, distinct = swept.tables.rows(ends)[0]
    assert ended == distinct >= 5000


def test_log_rows_end_after_their_retention(swept: Service) -> None:
    old = UUID(int=secrets.randbits(128))
    young = UUID(int=secrets.randbits(128))
    statement = """
        insert into secret_logs (id, secret_id, action, created_at)
        overriding system value
        values (-2, $1, 'read', now() - interval '91 days'),
               (-1, $2, 'read', now() - interval '89 days')
    """
    swept.tables.rows(statement, old, young)
    remaining = "select array_agg(secret_id) from secret_logs where secret_id = any($1)"
    until(lambda: bool(swept.tables.value(remaining, [old, young]) == [young]))


# --- Quota, tokens, start, encryption keys --------------------------------------------------------


def limited_to_four(tables: Tables, **settings: str) -> AbstractContextManager[Service]:
    quota = {"FORWARDED_ALLOW_IPS": "127.0.0.1", "CREATE_QUOTA_KIB_PER_MINUTE": "4"}
    return serving(tables, **quota, **settings)


@parametrize(
    "settings",
    [{}, {"CLEANUP_INTERVAL_SECONDS": "0.01"}, {"REDIS_URL": "unix:///no/such/socket"}],
)
def test_creation_over_the_quota_of_an_address_is_refused_and_not_stored(
    tables: Tables, settings: dict[str, str]
) -> None:
    address = f"2001:db8:0:{secrets.token_hex(2)}::7"
    fresh = tables.fresh()  # nothing of which is swept
    with limited_to_four(fresh, **settings) as limited:
        answers = [limited.create_from(address) for _ in range(25)]
        refusals = [answer for answer in answers if not answer.is_success]
        assert 17 <= len(refusals) <= 21  # the minute may turn once
        assert fresh.counts()[0] == 25 - len(refusals)
        assert_problem(refusals[0], 429, "rate_limited")
        assert 1 <= int(refusals[0].headers["retry-after"]) <= 60
        path = f"/secret/{answers[0].json()['secret_key']}"
        assert limited.get(path, headers={"X-Forwarded-For": address}).is_success
        assert limited.create_from("192.0.2.8").is_success


def test_quota_counts_beside_a_full_redis_and_before_anything_is_sent(tables: Tables) -> None:
    burst = [("POST", "/secret", json.dumps({"secret": "x" * 60_000}))] * 100
    with limited_to_four(tables) as limited, full_redis(limited):
        statuses = Counter(status for status, _ in at_once(limited, burst))
    assert 1 <= statuses[201] <= 2  # the minute may turn once
    assert statuses[429] == 100 - statuses[201]


def test_full_storage_refuses_creation_only(tables: Tables, service: Service) -> None:
    created = [service.create("hello"), service.create()]
    with serving(tables, MAX_STORED_MIB="1") as full:
        until(lambda: full.post("/secret", content=CREATION).status_code == 507)
        assert_problem(full.put("/secret", content="s"), 507, "storage_full")
        assert full.reads(created[0]["secret_key"]) == "hello"
        assert full.revoke(created[1]).is_success


def test_creation_needs_one_of_the_tokens_and_reading_needs_none(tables: Tables) -> None:
    bad = (
        "",
        "a-token",
        "Bearer",
        "Bearer a",
        f"Bearer {CANARY}",
        "Bearer a-token, b-token",
        "Basic a-token",
    )
    fresh = tables.fresh()
    with serving(fresh, API_TOKENS="a-token, b-token") as service:
        for headers in ({}, *({"Authorization": value} for value in bad)):
            response = service.post("/secret", content=CREATION, headers=headers)
            assert_problem(response, 401, "token_required")
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert CANARY not in response.text
        assert fresh.counts() == (0, 0)
        assert "a-token" not in service.get("/", headers={"Accept": BROWSER}).text
        for value in ("Bearer a-token", "Bearer b-token", "bearer a-token"):
            created = service.post("/secret", content=CREATION, headers={"Authorization": value})
            assert service.reads(created.json()["secret_key"]) == "a secret"


BAD_SETTINGS = f"""
POSTGRES_PORT={CANARY}
POSTGRES_PORT=tcp://10.0.0.1:5432
REDIS_PORT=0
REDIS_URL=nonsense://user:{CANARY}@localhost
REDIS_URL=redis://localhost?db={CANARY}
REDIS_URL=redis://localhost?socket_timeout={CANARY}
REDIS_URL=redis://localhost?{CANARY}=1
PORT={CANARY}
WORKERS=x
PUBLIC_URL={CANARY}
PUBLIC_URL=https://x/?{CANARY}
PUBLIC_URL=https://x/#{CANARY}
PUBLIC_URL=https://x/"{CANARY}
FORWARDED_ALLOW_IPS=10.0.0.0/33
FORWARDED_ALLOW_IPS=::1,{CANARY}
FORWARDED_ALLOW_IPS=::1;10.0.0.1
CREATE_QUOTA_KIB_PER_MINUTE=-1
MAX_TTL_SECONDS=0
DEFAULT_TTL_SECONDS=604801
MAX_SECRET_BYTES=-1
CACHE_SECONDS=200
CLEANUP_INTERVAL_SECONDS=nan
LOG_RETENTION_DAYS={CANARY}
LOG_RETENTION_DAYS=6
API_TOKENS_FILE=/{CANARY}
ENCRYPTION_KEY=,
ENCRYPTION_KEY={CANARY}
ENCRYPTION_KEY={ENCRYPTION_KEY},{CANARY}
ENCRYPTION_KEY={ENCRYPTION_KEY[:-2]}
ENCRYPTION_KEY={"ł" * 44}
""".split()


@parametrize("setting", BAD_SETTINGS)
def test_bad_setting_stops_the_start_with_a_line_that_names_it(
    tables: Tables, setting: str
) -> None:
    name, _, value = setting.partition("=")
    line = tables.refused_start(**{name: value})
    assert name in line
    assert CANARY not in line
    assert ENCRYPTION_KEY[:-2] not in line


OLD_SECRET = r"""
    insert into secrets (key_fingerprint, id, passphrase_scope, passphrase_salt,
        passphrase_verifier, ciphertext, wrapped_key, expires_at)
    values ('113c41147dcd58dc', '00010203-9770-3f6e-9e12-c25b6ad14c59', 'read',
        '\x000102030405060708090a0b0c0d0e0f',
        '\x0b5b242e814cae80fc16212a1356d18737fd8c9b8c625228e946bef91208c535',
        'gAAAAABrAc54Au1BObynGcWKYhk2iQFmJ_uFF3HipUlQTx6i5-wK7pR5kC6nK1tRvVl90WHif7Qg'
        'RQWYoma40H1wUX4bxHOfyg==',
        'gAAAAABrAc54Xaqm2U2pkmUA71Bm0Kvfg1dtfshXixwLbVjDiO8qUUYdy249OxBpO4Na_KWBVvjkj0ry-7'
        'CU5tEhuJ1g0i1oVqCYOwoYN5YkcKtYR9m34qVLFuLjQg7w2pwoZeUTK_xk', now() + interval '1 hour')
"""


@parametrize("name", ["postgres_password", "api_tokens"])
def test_setting_may_stand_in_a_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "file"
    file.write_text("hunter2\n")
    settings = main.Settings.model_validate({f"{name}_file": file})
    assert getattr(settings, name).get_secret_value().strip() == "hunter2"
    with pytest.raises(ValueError, match=f"{name.upper()}_FILE"):
        main.Settings.model_validate({f"{name}_file": tmp_path})


def test_tables_are_loaded_by_the_service_itself(tables: Tables) -> None:
    fresh = tables.fresh(empty=True)
    for _ in range(2):
        loading = fresh.start([*MAIN, "schema"], subprocess.DEVNULL)
        assert loading.process.wait(30) == 0
    with serving(fresh) as service:
        assert service.read(service.key()).is_success


def test_missing_tables_stop_the_start_and_those_of_the_first_release_are_taken_on(
    tables: Tables,
) -> None:
    empty = tables.fresh(empty=True)
    used = tables.fresh()
    # The tables as they were.
    used.rows("alter table encryption_keys rename needed_until to first_used_at")
    used.rows("insert into encryption_keys (fingerprint) values ($1)", OPERATORS_KEY.fingerprint)
    used.rows(OLD_SECRET)
    assert ["schema.sql" in one.refused_start() for one in (empty, used)] == [True, True]
    for _ in range(2):
        used.load_schema()
    assert used.value("select needed_until = expires_at from encryption_keys, secrets")
    assert used.refused_start(ENCRYPTION_KEY=Fernet.generate_key().decode())
    with serving(used) as service:
        assert_problem(service.read(OLD_KEY, "right"), 403, "wrong_passphrase")
        assert service.reads(OLD_KEY, "Żółw") == "hello"


def test_missing_grants_stop_the_start_and_are_named(tables: Tables) -> None:
    fresh = tables.fresh()
    fresh.rows("create role reader login")
    fresh.rows("grant select on all tables in schema public to reader")
    line = fresh.refused_start(POSTGRES_USER="reader")
    assert ("delete on secrets" in line, "select" in line) == (True, False)


@parametrize("name", ["fsync", "full_page_writes"])
def test_server_that_may_lose_what_it_acknowledged_stops_the_start(
    tables: Tables, name: str
) -> None:
    with server_setting(tables, **{name: "off"}):
        assert name in tables.refused_start()


def test_start_beside_many_unread_secrets_reads_none_of_them(tables: Tables) -> None:
    used = tables.fresh()
    read = "select seq_tup_read + idx_tup_fetch from pg_stat_user_tables where relname = $1"
    used.rows("""
        insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, expires_at)
        select gen_random_uuid(), '', '', 'of another key', now() + interval '1 day'
        from generate_series(1, 50000)
    """)
    before = used.value(read, "secrets")
    with serving(used):
        pass
    assert used.value(read, "secrets") - before < 100


@parametrize(
    "settings", [{"REDIS_URL": "unix:///no/such/socket"}, {"REDIS_URL": "", "REDIS_PORT": "1"}]
)
def test_missing_redis_is_a_warning(
    tables: Tables, tmp_path: Path, settings: dict[str, str]
) -> None:
    health = {"status": "degraded", "postgres": "up", "redis": "down"}
    with serving(tables, tmp_path / "log", **settings) as service:
        assert service.get("/health").json() == health
        assert service.reads(service.key("hello")) == "hello"
        assert "WARNING Redis" in service.log.read_text()


def test_encryption_key_is_rotated_by_putting_a_new_one_in_front(tables: Tables) -> None:
    rotated = tables.fresh()
    new = Fernet.generate_key().decode()
    old = Fernet.generate_key().decode()
    fingerprints = [main.parse_encryption_keys(key)[0].fingerprint for key in (new, old)]
    with serving(rotated, ENCRYPTION_KEY=old) as service:
        plain = service.key("hello")
        locked = service.key("hello", **TO_READ)
    with serving(rotated, ENCRYPTION_KEY=f" {new}, {old},") as service:
        assert service.reads(plain) == "hello"
        assert service.reads(locked, "right") == "hello"
        service.create()
        assert rotated.value("select key_fingerprint from secrets") == fingerprints[0]
        line = rotated.refused_start(ENCRYPTION_KEY=new)
        for word in (fingerprints[1], "ENCRYPTION_KEY", "encryption_keys"):  # and what to do
            assert word in line
        assert not [key for key in (old, new) if key in line]
    no_longer_needed = "update encryption_keys set needed_until = now() where fingerprint = $1"
    rotated.rows(no_longer_needed, fingerprints[1])
    with serving(rotated, ENCRYPTION_KEY=new) as service:
        assert service.read(service.key()).is_success


def test_key_file_is_made_once_and_private_and_never_overwritten(
    tables: Tables, tmp_path: Path
) -> None:
    fresh = tables.fresh()
    file = tmp_path / "encryption_key"
    settings = {"ENCRYPTION_KEY": "", "ENCRYPTION_KEY_FILE": str(file)}
    assert fresh.refusals(settings, settings, settings) == []  # started at once
    assert fresh.value("select count(*) from encryption_keys") == 1
    made = file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for workers in ("2", "1"):
        with serving(fresh, WORKERS=workers, **settings) as service:
            assert service.reads(service.key("hello")) == "hello"
    assert file.read_text() == made
    assert list(tmp_path.iterdir()) == [file]


@parametrize("content", ["", CANARY, "\n"])
def test_damaged_key_file_stops_the_start_and_stays_as_it_is(
    tables: Tables, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "encryption_key"
    file.write_text(content)
    for path in (file, tmp_path / "no" / "such" / "folder"):
        line = tables.refused_start(ENCRYPTION_KEY="", ENCRYPTION_KEY_FILE=str(path))
        assert ("ENCRYPTION_KEY_FILE" in line, CANARY in line) == (True, False)
    assert file.read_text() == content


def test_of_two_services_with_different_keys_started_at_once_one_is_refused(tables: Tables) -> None:
    other = {"ENCRYPTION_KEY": Fernet.generate_key().decode()}
    assert len(tables.fresh().refusals({}, other)) == 1


def test_start_outwaits_another_one_that_is_about_to_note_its_key(tables: Tables) -> None:
    fresh = tables.fresh()
    noting = """
        select pg_advisory_xact_lock(hashtext('one-time-secrets'));
        insert into encryption_keys values ('its fingerprint', 'infinity')
    """
    waits = """
        select query_start from pg_stat_activity
        where datname = current_database() and wait_event_type = 'Lock'
    """
    with ThreadPoolExecutor(1) as other:
        with another_session(fresh, noting, commit=True):
            starting = other.submit(fresh.refusals, {})
            until(lambda: bool(fresh.rows(waits)))
            first = fresh.rows(waits)
            until(lambda: fresh.rows(waits) not in ([], first))  # a statement has ended, unserved
        assert "its fingerprint" in starting.result()[0]


def test_name_of_the_key_file_is_synced_too(tables: Tables, tmp_path: Path) -> None:
    file = tmp_path / "encryption_key"
    start = f"import os, main; os.sync = lambda: print(os.path.exists({str(file)!r})); main.main()"
    key_file = {"ENCRYPTION_KEY": "", "ENCRYPTION_KEY_FILE": str(file), "PYTHONUNBUFFERED": "1"}
    with serving(tables.fresh(), tmp_path / "log", ("-c", start), **key_file) as service:
        assert service.log.read_text().startswith("True\n")


def test_start_killed_while_it_makes_the_key_leaves_nothing_in_the_way(
    tables: Tables, tmp_path: Path
) -> None:
    fresh = tables.fresh()
    file = tmp_path / "encryption_key"
    settings = {"ENCRYPTION_KEY": "", "ENCRYPTION_KEY_FILE": str(file)}
    start = "import os, main; main.os.link = lambda *_: os.kill(os.getpid(), 9); main.main()"
    for _ in range(2):
        started = fresh.start(["-c", start], subprocess.DEVNULL, **settings)
        assert started.process.wait(30) == -signal.SIGKILL
    assert (len(list(tmp_path.iterdir())), file.exists()) == (2, False)
    with serving(fresh, **settings) as service:
        assert service.reads(service.key("hello")) == "hello"


def test_passphrase_costs_no_attempt_where_the_key_is_not_at_hand(tables: Tables) -> None:
    fresh = tables.fresh()
    with serving(fresh) as service:
        key = service.key("hello", **TO_READ)
        fresh.rows("delete from encryption_keys")  # given up
        with serving(fresh, ENCRYPTION_KEY=Fernet.generate_key().decode()) as other:
            for _ in range(7):
                assert_problem(other.read(key, "right"), 503, "unavailable")
        assert fresh.value("select attempts from secrets") == 0
        assert service.reads(key, "right") == "hello"


# --- local.py -------------------------------------------------------------------------------------


def start_local_py(folder: Path, port: int) -> "subprocess.Popen[str]":
    """`python3 local.py` with its data in this folder."""
    settings = {**SETTINGS, "ENCRYPTION_KEY": "", "DATA_DIR": str(folder), "PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "local.py"],
        cwd=HERE,
        env={**ENVIRONMENT, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def laptop(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", Client, str]]:
    """The same, once it serves: the process, a client, the path of a secret made by its line."""
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


@parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_local_py_starts_again_on_its_data(
    tmp_path: Path, number: signal.Signals
) -> None:
    with laptop(tmp_path) as (process, _, path):
        assert len(processes_of(tmp_path)) >= 4
        if number == signal.SIGKILL:
            kill_all(tmp_path)
        process.send_signal(number)
        process.wait(20)
        assert processes_of(tmp_path) == set()
    with laptop(tmp_path) as (_, client, _):
        assert client.get(path).json() == {"secret": "hello"}


def test_what_a_killed_local_py_left_is_named_and_then_used(tmp_path: Path) -> None:
    with laptop(tmp_path) as (process, client, path):
        servers = {int(file.read_text().split()[0]) for file in tmp_path.glob("*/*.pid")}
        process.kill()
        process.wait(20)
        line = line_of_refusal(start_local_py(tmp_path, local.free_port()))
        assert client.get("/health").json()["status"] == "ok"
        left = psutil.Process(int(re.findall(r"process (\d+)", line)[0]))
        left.terminate()
        until(lambda: left not in processes_of(tmp_path))
        with laptop(tmp_path) as (_, again, _):
            assert again.get(path).json() == {"secret": "hello"}
            assert servers < {one.pid for one in processes_of(tmp_path)}
        assert processes_of(tmp_path) == set()


def test_two_local_py_run_side_by_side_but_not_on_one_folder(tmp_path: Path) -> None:
    with laptop(tmp_path / "one") as (_, one, path), laptop(tmp_path / "two") as (_, two, _):
        assert_problem(two.get(path), 404, "not_found")
        assert "DATA_DIR" in line_of_refusal(start_local_py(tmp_path / "one", local.free_port()))
        assert one.get(path).json() == {"secret": "hello"}


def test_local_py_installs_every_pin_of_the_service() -> None:
    """But one for an old Python, and two servers."""
    wanted = local.wanted_packages(testing=False)
    assert (HERE / "requirements.txt").read_text().count("==") == len(wanted) - 1


def test_local_py_on_a_taken_port_says_so_in_one_line(tmp_path: Path, service: Service) -> None:
    assert "PORT" in line_of_refusal(start_local_py(tmp_path, service.base_url.port or 0))
    assert processes_of(tmp_path) == set()


# --- Hostile input --------------------------------------------------------------------------------


# What no schema can say of a valid request: its secret is gone or never was, its ttl_seconds
# stands in the wrong place. And any text is a name.
SCHEMATHESIS_TOML = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 403, 404, 410, 429]

[[operations]]
include-name = "POST /secret"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 413, 422, 429]

[[operations]]
include-name = "PUT /secret/{secret_key}"
checks.negative_data_rejection.expected-statuses = ["2xx", "4xx"]

[[operations]]
include-name = "GET /receipt/{receipt_key}"
parameters = { "query.wait_seconds" = 1 }
"""


@hypothesis.settings(max_examples=200, derandomize=True, database=None, deadline=None)
@hypothesis.example(text="x" * 65536, content=bytes(range(256)) * 256)  # the largest
@hypothesis.example(text="🔑" * 16384, content=b"{}")
@hypothesis.given(
    text=strategies.text(strategies.characters(exclude_categories=["Cs"]), min_size=1),
    content=strategies.binary(min_size=1),
)
def test_nothing_is_found_that_comes_back_changed(
    service: Service, text: str, content: bytes
) -> None:
    assert service.read(service.key(text)).json()["secret"] == text
    key = service.create_raw(content).json()["secret_key"]
    assert service.get(f"/secret/{key}", headers={"Accept": "text/plain"}).content == content


def test_nothing_is_found_that_is_not_documented(service: Service, tmp_path: Path) -> None:
    """Schemathesis makes requests out of the service's document, and holds answers against it."""
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS_TOML)
    document = f"{service.url}/openapi.json"
    report = tmp_path / "report.json"
    options = "--checks all --seed 1 --max-examples 20 --no-color"
    options += f" --report json --report-json-path {report}"
    command = [str(Path(sys.executable).with_name("st")), "run", document, *options.split()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads(report.read_text())["test_cases"]["generated"] >= 300


# An error, but not what uvicorn and uvloop say of an answer to a caller who has gone already.
COMPLAINT = re.compile(
    r"(?m)^(?:\S+ \S+ ERROR (?!.*UVStream|ASGI callable).*|.* 500 [\d.]+ ms|Traceback.*)$"
)
ARGON2_MIB = 100 + 19 * (os.cpu_count() or 1)  # fifty at once would take 950


def peak_mib(service: Service) -> float:
    """The most memory that it had since `unharmed` began; 0 without /proc (macOS)."""
    with suppress(FileNotFoundError):
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    return 0


@contextmanager
def unharmed(service: Service, mib: float = 100) -> Iterator[None]:
    """Check that what happens inside takes no more memory, is no error, and hinders nobody."""
    with suppress(OSError):
        Path(f"/proc/{service.process.pid}/clear_refs").write_text("5")
    said = len(service.log.read_bytes())
    before = peak_mib(service)
    yield
    assert service.reads(service.key("hello")) == "hello"
    assert peak_mib(service) - before < mib
    assert COMPLAINT.findall(service.log.read_bytes()[said:].decode()) == []


def test_fifty_passphrases_at_once_take_the_memory_of_one_a_core_and_hold_up_nobody(
    service: Service,
) -> None:
    creation = json.dumps({"secret": "s", **TO_READ})
    with unharmed(service, ARGON2_MIB), ThreadPoolExecutor(1) as other:
        creating = other.submit(at_once, service, [("POST", "/secret", creation)] * 50)
        while not creating.done():
            assert service.reads(service.key("hello")) == "hello"
    assert {201} <= {status for status, _ in creating.result()} <= {201, 503}


@parametrize("framing", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
def test_body_without_end_is_refused_and_not_taken_in(service: Service, framing: bytes) -> None:
    part = b"%x\r\n%b\r\n" % (65536, b"x" * 65536)
    with unharmed(service), connect(service) as connection:
        connection.sendall(POST + framing + b"\r\n\r\n")
        sent_parts = 0 if b"Length" in framing else 16  # what is announced is refused unread
        for _ in range(sent_parts):
            connection.sendall(part)
        assert connection.recv(12) == b"HTTP/1.1 413"
        with suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(part)


def test_caller_who_goes_away_between_claim_and_answer_has_read_it(service: Service) -> None:
    key = service.key()
    with unharmed(service):
        with another_session(service.tables, LOCK_LOG), connect(service) as connection:
            connection.sendall(b"GET /secret/%b HTTP/1.1\r\nHost: x\r\n\r\n" % key.encode())
            until(lambda: service.tables.value(BLOCKED) == 1)
            connection.close()
        until(lambda: service.actions(key) == ["created", "read"])
        assert_problem(service.read(key), 410, "already_read")


def test_abandoned_creations_give_their_places_back(service: Service) -> None:
    body = json.dumps({"secret": "s", **TO_READ}).encode()
    stored, logged = service.tables.counts()
    said = len(service.log.read_bytes())

    def statuses() -> Counter[bytes]:
        return Counter(re.findall(rb"POST /secret (\d+)", service.log.read_bytes()[said:]))

    with stopped(service.process.pid):  # so that all are gone when the first is looked at
        ask_and_leave(service, *[POST + b"Content-Length: %d\r\n\r\n" % len(body) + body] * 300)
    # One that comes at once would have those who left queue behind it, for as many as there may be.
    until(lambda: statuses() == {b"499": 300})
    service.create(**TO_READ)  # none of them is in its way
    until(lambda: statuses() == {b"499": 300, b"201": 1})
    assert service.tables.counts() == (stored + 1, logged + 1)


def patched(**constants: int | float) -> tuple[str, str]:
    """What lets Python run the service with other constants."""
    patches = "".join(f"main.{name} = {value}; " for name, value in constants.items())
    return ("-c", f"import main; {patches}main.main()")


def test_body_that_does_not_come_is_a_timeout(tables: Tables) -> None:
    with serving(tables, Path(os.devnull), patched(BODY_SECONDS=0.5)) as service:
        answer = send(service, POST + b"Content-Length: 100\r\n\r\n{", patience=5)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "timeout"


def test_slow_body_may_take_as_long_as_it_keeps_coming(tables: Tables) -> None:
    def in_pieces() -> Iterator[bytes]:
        for _ in range(10):
            yield b"x" * 6000
            time.sleep(0.15)  # 40 kB a second

    start = patched(BODY_SECONDS=0.5, BODY_BYTES_PER_SECOND=20_000)
    with serving(tables, Path(os.devnull), start) as service:
        response = service.put("/secret", content=in_pieces())
        key = response.text.strip().partition("#")[2]
        assert service.reads(key) == "x" * 60_000


def test_stalled_bodies_hold_up_nobody_else(tables: Tables) -> None:
    start = patched(BODY_BUDGET_BYTES=2**20)  # eight of them, four from one address
    head = PUT + b"X-Forwarded-For: 192.0.2.%d\r\nContent-Length: 9\r\n\r\n"
    forwarded = {"FORWARDED_ALLOW_IPS": "127.0.0.1"}
    with serving(tables, Path(os.devnull), start, **forwarded) as service, ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(service)).sendall(head % 1)
        until(lambda: send(service, head % 1, patience=2).startswith(b"HTTP/1.1 503 "))
        assert service.create_from("192.0.2.1").is_success  # which comes at once
        assert send(service, head % 2 + b"x" * 4, patience=1) == b""  # another's place is free
        assert service.create_from("192.0.2.2").is_success


@parametrize("method", ["POST", "DELETE"])
def test_body_of_a_passphrase_has_a_small_bound(service: Service, method: str) -> None:
    path = f"/secret/{service.key()}"
    longest = json.dumps({"passphrase": "\u0001" * 1024})
    response = service.request(method, path, content=longest)
    assert response.is_success
    response = service.request(method, path, content=longest + " " * 20_000)
    assert_problem(response, 413, "too_large")


def test_body_without_a_length_is_bounded_even_when_it_comes_at_once(tables: Tables) -> None:
    head = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = head + b"ffff\r\n{}%b\r\n0\r\n\r\n" % (b" " * 65533)
    with serving(tables, MAX_SECRET_BYTES="1") as service:
        assert send(service, POST + body, patience=5).startswith(b"HTTP/1.1 413 ")


def test_liveness_is_never_shed_and_what_is_shed_writes_no_line(
    tables: Tables, tmp_path: Path
) -> None:
    start = patched(MAX_CONCURRENT_REQUESTS=3)
    with (
        serving(tables, tmp_path / "log", start, LOG_LEVEL="info") as service,
        ExitStack() as stack,
    ):
        key = service.key()
        while service.get("/health").status_code != 503:
            stack.enter_context(connect(service)).sendall(POST + b"Content-Length: 9\r\n\r\n")
        said = service.log.read_text()
        assert [service.get("/").status_code for _ in range(9)] == [200] * 9
        for _ in range(9):
            assert_problem(service.read(key), 503, "unavailable")
        assert service.log.read_text() == said


def test_of_two_hundred_mebibytes_at_once_each_is_stored_or_refused_at_once(tables: Tables) -> None:
    creations = [("POST", "/secret", json.dumps({"secret": "x" * 2**20}))] * 200
    with serving(tables, MAX_SECRET_BYTES="1048576") as service:
        answers = at_once(service, creations)
        stored = [body["secret_key"] for status, body in answers if status == 201]
        assert {status for status, _ in answers} <= {201, 503}
        assert len(stored) >= 16
        assert service.reads(stored[-1]) == "x" * 2**20


ALIVE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_small_reads_share_batches_however_large_a_secret_may_be(tables: Tables) -> None:
    batches = """
        select count(distinct created_at) from secret_logs
        where secret_id = any($1) and action = 'read'
    """
    with serving(tables, MAX_SECRET_BYTES="10485760") as service:
        keys = [service.key("x") for _ in range(200)]
        calls: list[HttpCall] = [("GET", f"/secret/{key}", None) for key in keys]
        assert {status for status, _ in at_once(service, calls)} == {200}
    # A batch is a transaction, which has one time.
    assert tables.value(batches, [id_of(key) for key in keys]) < 15


CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
UPGRADE = GET + b"Authorization: Bearer CANARY\r\nConnection: upgrade\r\nUpgrade: "
ODD_PATHS = (
    b"/secret/CANARY\x00",
    b"/CANARY%00%0d%0a%ff",
    b"//\\CANARY",
    b"http://[::1/",
    b"http://CANARY/X",
)
HOSTILE = [
    GET + b"X-Null: CANARY\x00b\r\n\r\n",
    GET + b"X-\x00CANARY: ab\r\n\r\n",
    b"GET /secret/CANARY HTTP/9.9\r\n\r\n",
    *(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in ODD_PATHS),
    b"GET /x HTTP/1.1\r\nHost: CANARY\xff\xfe\r\n\r\n",
    b"GET *CANARY HTTP/1.1\r\n\r\n",
    b"CONNECT CANARY:1 HTTP/1.1\r\n\r\n",
    b"CANARY /CANARY HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /secret/CANARY\r\n",
    b"GET /CANARY" + b"x" * 1_000_000,
    GET + b"X-Flood: CANARY\r\n" * 10_000 + b"\r\n",
    CHUNKED + b"f" * 18 + b"\r\nCANARY",
    CHUNKED + b"-1\r\nCANARY",
    POST + b"Content-Length: -1\r\n\r\nCANARY",
    POST + b"Content-Length: " + b"9" * 23 + b"\r\n\r\nCANARY",
    POST + b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n",
    UPGRADE + b"h2c\r\n\r\n",
    UPGRADE + b"websocket\r\n\r\n",
    UPGRADE + b"websocket\r\n" + HANDSHAKE + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03CANARY",
    b"\r\n" * 10_000,
    b"CANARY" + bytes(range(256)) * 100,
]


# uvicorn drops the body of a request with Upgrade, and would run what comes after its first segment
# (Kludex/uvicorn#2722).
SMUGGLED_PUT = b"PUT /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\nsmuggled"
UPGRADES = (b"anything", b"websocket\r\n" + HANDSHAKE.strip())


@parametrize("start", [b"POST /secret", b"GET /secret/%b", b"DELETE /secret/%b"])
@parametrize("upgrade", UPGRADES)
@parametrize(("size", "pieces"), [(200, 1), (200, 2), (300_000, 1), (300_000, 40)])
@parametrize("is_chunked", [False, True])
def test_nothing_behind_an_upgrade_runs(
    service: Service, start: bytes, upgrade: bytes, size: int, pieces: int, is_chunked: bool
) -> None:
    key = service.key()
    body = b"\r\n" * (size // 2) + SMUGGLED_PUT
    framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    if is_chunked:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    line = start.replace(b"%b", key.encode()) + b" HTTP/1.1\r\nHost: x\r\n"
    asked = line + framing + b"\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n\r\n"
    before = service.tables.counts()
    said = len(service.log.read_bytes())
    content = ALIVE + asked + body + ALIVE
    length = len(content) // pieces + 1
    answers = send(service, *(content[at : at + length] for at in range(0, len(content), length)))
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"400"]
    assert b'"upgrade_refused"' in answers
    assert b"connection: close" in answers
    assert service.tables.counts() == before
    assert b"WARNING" not in service.log.read_bytes()[said:]


@parametrize("upgrade", UPGRADES)
def test_upgrade_without_a_body_is_answered_once(service: Service, upgrade: bytes) -> None:
    asked = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n\r\n"
    answers = send(service, asked + SMUGGLED_PUT)
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200"]
    assert b"connection: close" in answers


PUT = b"PUT /secret HTTP/1.1\r\nHost: x\r\n"
HELLO = b"Content-Length: 5\r\n\r\nhello"
ODD_FRAMINGS = [
    *(
        PUT + framing
        for framing in (
            b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nContent-Length: 99\r\n\r\n",
            b"Transfer-Encoding: chunked\n\n5\nhello\n0\n\n",
            b"Transfer-Encoding: chunked\r\nContent-Length: 99\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            b"Transfer-Encoding: identity, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            b"Content-Length: +5\r\n\r\nhello",
        )
    ),
    *(
        PUT + header + HELLO
        for header in (
            b"Transfer-Encoding : chunked\r\n",
            b"Transfer-Encoding:\x0bchunked\r\n",
            b"Transfer-Encoding: xchunked\r\n",
            b" Transfer-Encoding: chunked\r\n",
            b"X-Folded: a\r\n Content-Length: 99\r\n",
            b"X-Bare: a\n",
            b"Content-Length: 5\r\n",
            b"Content-Length: 99\r\n",
            b"Expect: 100-continue\r\n",
        )
    ),
    *(
        line + b" HTTP/1.1\r\nHost: x\r\n" + HELLO
        for line in (b"PUT http://y/secret", b"GET /", b"HEAD /", b"DELETE /secret/KEY")
    ),
]


@parametrize("odd", ODD_FRAMINGS, ids=repr)
def test_request_ends_where_a_proxy_thinks_or_is_refused(service: Service, odd: bytes) -> None:
    answers = send(service, odd + ALIVE)
    statuses = [status for status in re.findall(rb"HTTP/1.1 (\d+)", answers) if status != b"100"]
    assert statuses == [b"400"] or (len(statuses) == 2 and statuses[1] == b"200")
    for key in re.findall(rb"/#([\w-]{32})", answers):
        assert service.reads(key.decode()) == "hello"


@parametrize("hostile", HOSTILE, ids=lambda hostile: repr(hostile[:60]))
def test_hostile_bytes_read_nothing_and_are_neither_repeated_nor_logged(
    service: Service, hostile: bytes
) -> None:
    key = service.key()
    hostile = hostile.replace(b"CANARY", CANARY.encode())
    with unharmed(service):
        answers = send(service, hostile)
    assert not re.search(rb"HTTP/1\.1 (200|5)", answers)
    assert answers.count(b"HTTP/1.1 ") <= 1
    assert found([b"Traceback", b".py", CANARY.encode(), key.encode()], answers) == []
    assert found(forms(CANARY, key), service.log.read_bytes()) == []
    assert service.status(key).json()["status"] == "unread"
