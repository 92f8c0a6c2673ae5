"""Races, faults, failover, stolen data: what must hold when everything goes wrong."""

import base64
import itertools
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

import asyncpg
import psutil
import pytest
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from httpx import Client, Response, TransportError

import local
import main
from conftest import (
    BLOCKED,
    BROWSER,
    CANARY,
    CREATION,
    ENCRYPTION_KEY,
    END_SESSIONS,
    GET,
    GONE,
    HANDSHAKE,
    HERE,
    LOCK_LOG,
    MAIN,
    OPERATORS_KEY,
    TO_READ,
    Document,
    HttpCall,
    Service,
    Tables,
    another_session,
    ask_and_leave,
    assert_problem,
    at_once,
    canaries,
    forms,
    found,
    full_redis,
    id_of,
    keys_of,
    kill,
    name_in_redis,
    opened,
    parametrize,
    processes_of,
    raw,
    repeated,
    send,
    server_setting,
    serving,
    soak,
    stopped,
    unsealed,
    until,
)

# --- Races ----------------------------------------------------------------------------------------


@parametrize(("readers", "guard"), [(50, {}), (5, TO_READ)])
@parametrize("flushed", [True, False])
def test_secret_is_read_exactly_once(
    two_workers: Service, flushed: bool, readers: int, guard: Document
) -> None:
    body = json.dumps({"passphrase": guard.get("passphrase")})
    for number in range(10):
        key = two_workers.key(f"secret {number}", **guard)
        if flushed:
            two_workers.redis.flushall()
        answers = at_once(two_workers, [("POST", f"/secret/{key}", body)] * readers)
        handed_out = [body for status, body in answers if status == 200]
        assert handed_out == [{"secret": f"secret {number}"}]
        codes = {body["code"] for status, body in answers if status != 200}
        assert codes <= ({"already_read", "unavailable"} if guard else {"already_read"})


def test_of_readers_and_deleters_in_any_order_one_wins_each_secret(two_workers: Service) -> None:
    dice = random.Random(0)  # noqa: S311 - an order, not a key
    for _ in range(5):
        texts = {two_workers.key(text): text for text in canaries(*"abcdefghijklmnopqrstuvwxyz")}
        keys = [key for _ in range(6) for key in dice.sample(list(texts), len(texts))]
        calls = [(dice.choice(["GET", "GET", "DELETE"]), f"/secret/{key}", None) for key in keys]
        answers = at_once(two_workers, calls)
        won = {}
        for key, (status, body) in zip(keys, answers, strict=True):
            assert status in (200, 410)
            if status == 200:
                assert key not in won
                assert body.get("secret") in (None, texts[key])
                won[key] = "read" if "secret" in body else "deleted"
        assert {key: [*two_workers.actions(key)[1:]] for key in texts} == {
            key: [action] for key, action in won.items()
        }
    assert b"deadlock" not in two_workers.stores.postgres.log.read_bytes()


def test_readers_and_cleanup_end_a_secret_once(swept: Service) -> None:
    key = swept.key()
    soon = "update secrets set expires_at = now() + interval '30 ms' where id = $1"
    swept.tables.rows(soon, id_of(key))
    answers = [swept.read(key).status_code for _ in range(50)]
    assert answers in ([200] + [410] * 49, [410] * 50)
    until(lambda: swept.actions(key) == ["created", "read" if 200 in answers else "expired"])


def test_read_outwaits_a_statement_that_holds_the_row_and_a_long_one_is_a_503(
    service: Service,
) -> None:
    key = service.key("hello")
    other = service.key()
    holding = f"select from secrets where id = '{id_of(key)}' for update"
    calls: list[HttpCall] = [("GET", f"/secret/{one}", None) for one in (key, other)]
    with another_session(service.tables, holding):
        answers = at_once(service, calls)
        codes = [body.get("code") for _, body in answers]
        assert codes == ["unavailable", None]  # nobody else is held up
    with ThreadPoolExecutor(1) as reader:
        with another_session(service.tables, holding):
            reading = reader.submit(service.read, key)
            time.sleep(0.1)  # so long does it take, of the 0.6 s that a reader waits
        assert reading.result().json() == {"secret": "hello"}


# --- Faults ---------------------------------------------------------------------------------------
#
# Callers create secrets all the time, and read, delete, revoke or leave them; some they race for.
# Meanwhile a store or a worker is broken. A ledger keeps what each caller was told. Once the fault
# is over, what is left is read, and then ledger and log must tell the same story. The long form of
# each fault prints its row of the README's table.


Store: TypeAlias = local.Postgres | local.Valkey
Meanwhile: TypeAlias = AbstractContextManager[None]


@contextmanager
def down(
    service: Service, break_it: Callable[[], object], mend_it: Callable[[], object]
) -> Iterator[None]:
    """Inside, a server is gone, or hangs: it is there and says nothing."""
    break_it()
    try:
        yield
        assert service.get("/health").json()["status"] != "ok"
    finally:
        mend_it()
        until(lambda: service.get("/health").json()["status"] == "ok")


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


def killed(service: Service, server: Store) -> Meanwhile:
    return down(service, lambda: kill(server), server.start)


def paused(service: Service, server: Store) -> Meanwhile:
    return down(service, lambda: pause(server), lambda: resume(server))


@parametrize(("fault", "code"), [(killed, "unavailable"), (paused, "outcome_unknown")])
def test_without_postgresql_all_is_503_and_nothing_happens(
    service: Service, fault: Callable[..., Any], code: str
) -> None:
    created = service.create("hello")
    path = f"/secret/{created['secret_key']}"
    receipt = f"/receipt/{created['receipt_key']}"
    calls: list[HttpCall] = [("DELETE", path, None), ("DELETE", receipt, None)]
    calls += [("GET", look, None) for look in (f"{path}/status", receipt, "/health")]
    calls += [("POST", "/secret", CREATION)] * 20
    service.read(service.key())  # the next read finds the same connection, its statement prepared
    before = service.tables.counts()
    with fault(service, service.stores.postgres):
        assert_problem(service.get(path), 503, code)
        answers = at_once(service, calls)  # while it is still down
        assert service.get("/").is_success  # it is alive
    assert {status for status, _ in answers} == {503}
    assert {body["code"] for _, body in answers[:2]} <= {code, "unavailable"}
    assert {body["code"] for _, body in answers[2:]} == {"unavailable"}
    assert service.tables.counts() == before
    assert service.get(path).json() == {"secret": "hello"}


FATES = ("read", "leave", "race", "leave", "delete", "leave", "revoke", "leave")
RACERS = ("read", "read", "delete", "read", "revoke", "read")  # one a caller
FINE = {200, 201, 410}  # the statuses of callers who notice nothing
# What they may hear although their claim was executed.
UNANSWERED = {"no answer", "outcome_unknown"}
# As the log has it: the action, and the user agent, of which each claim has its own.
Event: TypeAlias = tuple[str, str]


@dataclass
class Ledger:
    """What callers did and heard. `created` and `claims` go by the secret_key.

    A claim is what the log must have of it, if it was executed, and the code of the answer, or
    `done`. Every other read sends an Idempotency-Key, its user agent: while it has no answer, it
    is `unanswered`, and asked again. The status of a request without an answer is 0. `contested`
    is what all race for.
    """

    created: dict[str, Document] = field(default_factory=dict)
    claims: dict[str, list[tuple[Event, str]]] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    contested: str = ""
    unanswered: list[tuple[str, str]] = field(default_factory=list)
    repeated: int = 0

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

    def claim(self, client: Client, how: str, key: str, agent: str = "") -> None:
        """`how`: read, delete or revoke."""
        created = self.created[key]
        path = f"/receipt/{created['receipt_key']}" if how == "revoke" else f"/secret/{key}"
        method = "GET" if how == "read" else "DELETE"
        agent = agent or secrets.token_hex(8)
        headers = {"User-Agent": agent}
        has_key = how == "read" and agent < "8"
        if has_key:
            headers["Idempotency-Key"] = agent
        response = self.ask(client, method, path, headers=headers)
        answer = "no answer"
        if response is not None:
            body = response.json()
            answer = body.get("code", "done")
            assert how != "read" or body.get("secret") in (None, created["secret"])
        event = ("read" if how == "read" else "deleted", agent)
        if has_key and answer in UNANSWERED | {"unavailable"}:
            self.unanswered.append((key, agent))
        else:
            self.claims[key].append((event, answer))

    def ask_again(self, client: Client) -> bool:
        """Repeat one of the reads without an answer. False when there is none."""
        with suppress(IndexError):
            key, agent = self.unanswered.pop()
            self.repeated += 1
            self.claim(client, "read", key, agent)
            return True
        return False

    def complaints(self, key: str, logged: list[Event]) -> Iterator[str]:
        """What is wrong with a secret of which the log has these events, by the README's column."""
        claims = self.claims[key]
        first = [action for action, _ in logged[:1]]
        ended = logged[1:]
        done = [event for event, answer in claims if answer == "done"]
        told = [answer for event, answer in claims if event in ended]  # whose claim was executed
        if len(done) > 1 or len(told) > 1:
            yield "read twice"
        if first != ["created"] or len(ended) > 1 or done not in ([], ended):
            yield "wrong log"
        if not told:
            yield "lost"
        known = {"done", "unavailable", *UNANSWERED, *(GONE.get(action) for action, _ in ended)}
        if set(told) - {"done", *UNANSWERED} or {answer for _, answer in claims} - known:
            yield "told wrongly"


@contextmanager
def under_load(service: Service) -> Iterator[Ledger]:
    """Callers that are at it all the time: steadily, because the faults are the subject."""
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
            ledger.ask_again(client)
            yield

    with ExitStack() as calling:
        for racer in RACERS:
            client = Client(base_url=service.url, trust_env=False, timeout=30)
            calling.enter_context(client)
            calling.enter_context(repeated(partial(next, call(client, racer)), 0.005))
        until(lambda: len(ledger.created) > 100)
        yield ledger


def judge(ledger: Ledger, service: Service, name: str) -> None:
    """Read what is left, then hold the ledger against the log."""
    until(lambda: service.get("/health").is_success)
    until(lambda: not ledger.ask_again(service))
    for key, claims in ledger.claims.items():
        if not any(answer == "done" for _, answer in claims):
            ledger.claim(service, "read", key)
    statement = """
        select secret_id, action, extra_data ->> 'user_agent' from secret_logs
        where secret_id = any($1) and action <> 'replayed' order by id
    """
    logged: dict[UUID, list[Event]] = {id_of(key): [] for key in ledger.created}
    for id, action, agent in service.tables.rows(statement, list(logged)):
        logged[id].append((action, agent))
    wrong = Counter[str]()
    answers = Counter[str]()
    for key in ledger.created:
        wrong.update(ledger.complaints(key, logged[id_of(key)]))
        answers.update(answer for _, answer in ledger.claims[key])
    columns = [wrong[column] for column in ("lost", "read twice", "wrong log", "told wrongly")]
    unanswered = sum(answers[answer] for answer in UNANSWERED)
    print("", name, len(ledger.created), *columns, unanswered, ledger.repeated, "", sep=" | ")
    assert not wrong, wrong


@contextmanager
def exhausted_postgres(service: Service) -> Iterator[None]:
    """Somebody else takes every connection, and the service's own are ended."""
    with ExitStack() as sessions:
        sessions.enter_context(another_session(service.tables, END_SESSIONS))
        with suppress(asyncpg.TooManyConnectionsError):
            while True:
                sessions.enter_context(another_session(service.tables, "select"))
        yield


def ended_sessions(service: Service) -> Meanwhile:
    return repeated(lambda: service.tables.rows(END_SESSIONS), 0.02)


def restarted(server: Store) -> Meanwhile:
    def restart() -> None:
        kill(server)
        time.sleep(0.5)  # so long it is gone
        server.start()

    return repeated(restart, 1)


def workers_of(service: Service) -> list[int]:
    """uvicorn's children, without the one that only keeps count of shared resources."""
    every = [one.info | {"pid": one.pid} for one in psutil.process_iter(["ppid", "cmdline"])]
    children = [one for one in every if one["ppid"] == service.process.pid]
    return [one["pid"] for one in children if "spawn_main" in " ".join(one["cmdline"] or [])]


def killed_workers(service: Service) -> Meanwhile:
    def kill_one() -> None:
        os.kill(random.choice(workers_of(service)), signal.SIGKILL)  # noqa: S311 - no cryptography
        until(lambda: local.healthy(service.url) and len(workers_of(service)) == 2)

    return repeated(kill_one, 0.5)


def frozen_workers(service: Service) -> Meanwhile:
    def freeze() -> None:
        with stopped(*workers_of(service)):
            time.sleep(2.2)  # beyond all their alarms

    return repeated(freeze, 0.5)


NO_STANDBY = {"synchronous_standby_names": "nobody"}
Fault: TypeAlias = Callable[[Service], Meanwhile]
FAULTS: dict[str, Fault] = {  # by their name in the table
    "Redis flushed every 100 ms": lambda service: repeated(service.redis.flushall, 0.1),
    "Redis killed with -9, restarted empty": lambda service: restarted(service.stores.valkey),
    "Redis hung (SIGSTOP)": lambda service: paused(service, service.stores.valkey),
    "Redis full, refusing writes": full_redis,
    "PostgreSQL killed with -9, restarted": lambda service: restarted(service.stores.postgres),
    "PostgreSQL hung (SIGSTOP)": lambda service: paused(service, service.stores.postgres),
    "PostgreSQL out of connections": exhausted_postgres,
    "all sessions ended": ended_sessions,
    "synchronous standby lost": lambda service: server_setting(service.tables, **NO_STANDBY),
    "workers frozen for 2.2 s (SIGSTOP)": frozen_workers,
    "workers killed with -9, one after another": killed_workers,
}


def allowed(name: str) -> set[int]:
    """All statuses that callers may get in this fault."""
    if name.startswith("Redis"):
        return FINE
    return FINE | ({0, 503} if name.startswith("workers killed") else {503})


@parametrize("seconds", [2.5, pytest.param(60, marks=soak)])
@parametrize("name", FAULTS)
def test_fault_loses_nothing_and_tells_nobody_anything_wrong(
    two_workers: Service, name: str, seconds: float
) -> None:
    with under_load(two_workers) as ledger:
        with FAULTS[name](two_workers):
            answered = len(ledger.statuses)
            time.sleep(seconds)
            # Nobody waits until it is over.
            until(lambda: len(ledger.statuses) > answered + 2 * len(RACERS))
        created = len(ledger.created)
        until(lambda: len(ledger.created) > created + 20)  # it recovers by itself
    judge(ledger, two_workers, name)
    assert FINE <= set(ledger.statuses) <= allowed(name)


def test_acknowledged_secrets_outlive_a_kill_whatever_the_servers_default(
    two_workers: Service,
) -> None:
    with server_setting(two_workers.tables, synchronous_commit="off", wal_writer_delay="9999ms"):
        two_workers.tables.rows(END_SESSIONS)
        with under_load(two_workers) as ledger, killed(two_workers, two_workers.stores.postgres):
            pass
    judge(ledger, two_workers, "PostgreSQL killed with -9, synchronous_commit = off")


def test_claim_whose_answer_does_not_come_has_an_unknown_outcome(two_workers: Service) -> None:
    key = two_workers.key()
    with server_setting(two_workers.tables, **NO_STANDBY):
        assert_problem(two_workers.get(f"/secret/{key}"), 503, "outcome_unknown")
    until(lambda: two_workers.status(key).json().get("code") == "already_read")


def test_lost_standby_leaves_few_statements_behind_and_looking_goes_on(
    two_workers: Service,
) -> None:
    waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'"
    key = two_workers.key()
    most = 0
    with under_load(two_workers), server_setting(two_workers.tables, **NO_STANDBY):
        until_then = time.monotonic() + 6
        while time.monotonic() < until_then:
            most = max(most, two_workers.tables.value(waiting))
            assert two_workers.status(key).is_success
            assert two_workers.get("/health").is_success
    assert most <= 6, most  # three a worker: one under way, and what is being cancelled


def test_of_twenty_readers_with_keys_one_wins_and_only_it_is_answered_again(
    two_workers: Service,
) -> None:
    for _ in range(5):
        path = f"/secret/{two_workers.key()}"

        def read(number: int, path: str = path) -> int:
            headers = {"Idempotency-Key": f"reader number {number:03}"}
            return two_workers.get(path, headers=headers).status_code

        with ThreadPoolExecutor(20) as readers:
            first = list(readers.map(read, range(20)))
            again = list(readers.map(read, range(20)))
        assert sorted(first) == [200] + [410] * 19
        assert again == first


def test_answer_that_a_killed_worker_kept_is_handed_out_by_another(tables: Tables) -> None:
    again = {"Idempotency-Key": "a reader who asks again"}
    with serving(tables) as killed_one, ThreadPoolExecutor(1) as other:
        path = f"/secret/{killed_one.key('hello')}"
        with another_session(tables, LOCK_LOG):
            reading = other.submit(killed_one.get, path, headers=again)
            until(lambda: tables.value(BLOCKED) == 1)
            os.kill(killed_one.process.pid, signal.SIGSTOP)
        key = path.rpartition("/")[2]
        until(lambda: killed_one.actions(key) == ["created", "read"])
        killed_one.process.kill()
        assert isinstance(reading.exception(), TransportError)
    with serving(tables) as service:
        assert service.get(path, headers=again).json() == {"secret": "hello"}
        assert_problem(service.get(path), 410, "already_read")


def test_outage_is_one_line_when_it_begins_and_one_when_it_ends(
    tables: Tables, tmp_path: Path
) -> None:
    start = ("-c", "import main; main.OUTAGE_CALM_SECONDS = 0.5; main.main()")
    with serving(tables, tmp_path / "log", start, LOG_LEVEL="warning") as service:
        with killed(service, tables.stores.postgres):
            at_once(service, [("POST", "/secret", CREATION)] * 20)
        ends = "WARNING PostgreSQL answers again"
        until(lambda: bool(service.get("/health")) and ends in service.log.read_text())
        lines = service.log.read_text().splitlines()
    assert len([line for line in lines if "PostgreSQL cannot answer: " in line]) == 1
    assert len(lines) == 2


def test_worker_that_was_frozen_hands_out_the_answer_that_has_arrived(service: Service) -> None:
    key = service.key("hello")
    with ThreadPoolExecutor(1) as other, ExitStack() as frozen:
        with another_session(service.tables, LOCK_LOG):
            reading = other.submit(service.get, f"/secret/{key}")
            until(lambda: service.tables.value(BLOCKED) == 1)
            frozen.enter_context(stopped(service.process.pid))
        until(lambda: service.actions(key) == ["created", "read"])
        time.sleep(2.2)  # beyond all its alarms
        frozen.close()
        assert reading.result().json() == {"secret": "hello"}


def test_readers_who_left_before_their_claim_was_sent_have_read_nothing(service: Service) -> None:
    first, *keys = [service.key() for _ in range(21)]
    requests = [f"GET /secret/{key} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for key in keys]
    with stopped(service.process.pid):
        ask_and_leave(service, *requests[:10])
    with ThreadPoolExecutor(1) as other:
        with another_session(service.tables, LOCK_LOG):
            reading = other.submit(service.get, f"/secret/{first}")
            until(lambda: service.tables.value(BLOCKED) == 1)
            ask_and_leave(service, *requests[10:])  # while a batch is under way
        assert reading.result().is_success
    assert [service.status(key).status_code for key in keys] == [200] * 20
    assert {service.read(key).status_code for key in keys} == {200}


def test_terminated_service_answers_what_it_has_begun(two_workers: Service) -> None:
    with serving(two_workers.tables, WORKERS="2") as service:
        with under_load(service) as ledger:
            service.process.terminate()
            assert service.process.wait(10) in (0, -signal.SIGTERM)
        assert workers_of(service) == []
    judge(ledger, two_workers, "SIGTERM")
    assert set(ledger.statuses) <= FINE | {0}


def test_stop_answers_whoever_is_connected_and_lets_nobody_in(tables: Tables) -> None:
    """The service listens at :: and is asked at an address of IPv4."""
    with serving(tables, HOST="::", WORKERS="2") as service:
        address = ("127.0.0.1", service.base_url.port or 80)
        with socket.create_connection(address, timeout=10) as kept:

            def is_the_last() -> bool:
                kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while b"}" not in answer:
                    answer += kept.recv(9999) or pytest.fail("It was cut.")
                return b"connection: close" in answer

            assert not is_the_last()
            service.process.terminate()
            until(is_the_last)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, timeout=10)
        assert service.process.wait(10) == 0


# --- PostgreSQL that fails over -------------------------------------------------------------------


class Pair(NamedTuple):
    """A primary and its synchronous standby, which every switch makes the primary."""

    first: local.Postgres
    second: local.Postgres
    tables: Tables  # of whichever takes writes
    promoted: Tables  # of the second alone


@pytest.fixture
def pair(tables: Tables, tmp_path: Path) -> Iterator[Pair]:
    tmp_path.chmod(0o711)  # nobody may have to enter
    first = local.Postgres(tmp_path / "first", tmp_path / "first-socket")
    second = local.Postgres(tmp_path / "second", tmp_path / "second-socket")
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

        def tables_of(*servers: local.Postgres) -> Tables:
            hosts = ",".join(str(server.socket_folder) for server in servers)
            environment = {**tables.environment, "POSTGRES_HOST": hosts}
            return Tables(tables.stores._replace(environment=environment))

        primary = tables_of(first)
        primary.rows("alter system set wal_keep_size = '256MB'")  # pg_rewind recovers by it
        primary.rows("alter system set synchronous_standby_names = '*'")
        primary.rows("select pg_reload_conf()")
        synchronous = "select from pg_stat_replication where sync_state = 'sync'"
        until(lambda: bool(primary.rows(synchronous)))
        yield Pair(first, second, tables_of(first, second), tables_of(second))
    finally:
        for server in (first, second):
            kill(server)


def rejoin(pair: Pair, *, rewind: bool) -> None:
    """The old primary, which is the first one asked, comes back as a standby.

    The service has to connect anew.
    """
    source = f"host={pair.second.socket_folder} user=postgres dbname=postgres"
    if rewind:
        (pair.first.folder / "postmaster.pid").unlink()
        pair.first.run("pg_rewind", "-RD", pair.first.folder, "--source-server", source)
    else:
        (pair.first.folder / "standby.signal").touch()
    options = {"primary_conninfo": source}
    local.Postgres(pair.first.folder, pair.first.socket_folder, options).start()
    pair.promoted.rows(END_SESSIONS)


@parametrize(
    ("lose", "rewind"),
    [
        pytest.param(kill, None, id="killed"),
        pytest.param(kill, True, id="killed, then rejoining", marks=soak),
        pytest.param(local.Postgres.stop, False, id="planned, rejoining", marks=soak),
        pytest.param(pause, None, id="frozen", marks=soak),
    ],
)
def test_service_goes_on_after_a_promotion(
    pair: Pair, lose: Callable[[Any], None], rewind: bool | None
) -> None:
    def goes_on(ledger: Ledger, after: str) -> None:
        moment = time.monotonic()
        count = len(ledger.created)
        until(lambda: len(ledger.created) > count)
        print(f"{after}: it goes on after {time.monotonic() - moment:.2f} s")
        until(lambda: len(ledger.created) > count + 200)

    with serving(pair.tables, WORKERS="2") as service:
        with under_load(service) as ledger:
            lose(pair.first)
            until(lambda: service.get("/health").status_code == 503)  # nothing can be written
            pair.second.run("pg_ctl", "promote", "-wD", pair.second.folder)
            goes_on(ledger, f"promotion after {lose.__name__}")
            if rewind is not None:
                rejoin(pair, rewind=rewind)
                goes_on(ledger, "return of the old primary")
        service.tables = pair.promoted
        judge(ledger, service, f"PostgreSQL fails over: {lose.__name__}")
    assert set(ledger.statuses) <= FINE | {503}


# --- Stolen data ----------------------------------------------------------------------------------


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

    def stretched(self, salt: bytes) -> main.PassphraseKeys:
        return main.derive_passphrase_keys(self.passphrase, salt, OPERATORS_KEY, self.secret_key)


@dataclass(frozen=True)
class Loot:
    kept: Sequence[Kept]
    needles: Sequence[str]  # what was said to the service, of which nothing may be found
    everything: bytes
    cache: bytes
    cached: dict[str, bytes]  # what the cache holds, by name
    rows: dict[UUID, Any]  # of those that can still be read


def keep(service: Service, number: int) -> Kept:
    """A secret, with a passphrase of either scope or none; a third of them is read."""
    text, passphrase = canaries("secret", "passphrase")
    scope = {0: "read", 1: "delete"}.get(number % 5)
    members = {"passphrase": passphrase, "passphrase_scope": scope} if scope else {}
    created = service.create(text, **members)
    is_read = number % 3 == 0
    key = created["secret_key"]
    if is_read:
        assert service.reads(key, passphrase) == text
    return Kept(text, passphrase, scope, is_read, keys_of([created]), raw(key), id_of(key))


def provoke(service: Service, secret: str, right: str, wrong: str) -> tuple[list[str], bytes]:
    """Drive every error of the API. Returns the keys that took part, and what the errors said."""
    locked = {"passphrase": right, "passphrase_scope": "read"}
    guards: list[Document] = [locked, locked, {}, {}, {}, {}]
    with full_redis(service):  # so that nothing of these is cached
        created = [service.create(secret, **guard) for guard in guards]
    keys = [document["secret_key"] for document in created]
    unread, guessed, read, deleted, expired, broken = keys
    service.tables.rows("update secrets set ciphertext = 'damaged' where id = $1", id_of(broken))
    service.expire(expired)
    bodies: list[object] = [
        {"secret": secret * 10_000, "passphrase": right},
        f"secret={secret}&passphrase={right}",
        {"secret": secret, "passphrase": right, "ttl_seconds": secret},
        {"secret": secret + "\ud800"},
        {"secret": [secret], "passphrase": {right: secret}},
    ]
    calls: list[tuple[str, str, object]] = [
        *(("GET", f"/secret/{key}", None) for key in (unread, read, read, expired, broken)),
        ("DELETE", f"/secret/{unread}", {"passphrase": wrong}),
        ("DELETE", f"/secret/{deleted}", None),
        *[("POST", f"/secret/{guessed}", {"passphrase": wrong})] * 6,
        ("GET", f"/secret/{deleted}/status", None),
        ("GET", f"/x/{unread}/{secret}", None),
        ("PATCH", f"/secret/{unread}", {"passphrase": right}),
        ("GET", f"/health/{secret}?secret_key={unread}&passphrase={right}", None),
        *(("POST", path, body) for path in ("/secret", f"/secret/{unread}") for body in bodies),
    ]
    statuses = set[int]()
    said = []
    for method, path, body in calls:
        response = service.request(method, path, content=json.dumps(body))
        statuses.add(response.status_code)
        if not response.is_success:
            said.append(response.content)
    assert statuses == {200, 403, 404, 405, 410, 413, 422, 429, 500}
    return keys_of(created), b"\n".join(said)


def blocks(folder: Path) -> dict[bytes, None]:
    """What is in all files under a folder, each block once: most of a database is there thrice."""
    blocks: dict[bytes, None] = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        for start in range(0, len(content), 8192):
            blocks[content[start : start + 8192]] = None
    return blocks


@pytest.fixture(scope="session")  # a module's would be made again after another module's tests
def loot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loot]:
    folder = tmp_path_factory.mktemp("loot")
    with local.stores(folder / "stores") as stores, ExitStack() as stack:
        before = blocks(stores.postgres.folder)  # in which no secret can be
        service = stack.enter_context(serving(Tables(stores), folder / "log"))
        kept = [keep(service, number) for number in range(100)]
        words = canaries("secret", "right", "wrong")
        keys, errors = provoke(service, *words)
        service.tables.rows("checkpoint")
        stored = service.tables.rows("select * from secrets")
        logged = service.tables.rows("select * from secret_logs")
        cells = [cell for row in stored + logged for cell in row]
        values = [cell if isinstance(cell, bytes) else str(cell).encode() for cell in cells]
        service.redis.config_set("rdbcompression", "no")
        service.redis.save()
        names: Any = service.redis.keys()
        cached: Any = {name.decode(): service.redis.get(name) for name in names}
        cache = b"\n".join([*names, *cached.values(), *blocks(stores.valkey.folder)])
        logs = [file.read_bytes() for file in (service.log, stores.postgres.log, stores.valkey.log)]
        disk = b"".join(one for one in blocks(stores.postgres.folder) if one not in before)
        everything = b"\n".join([*values, cache, disk, *logs, errors, ENCRYPTION_KEY.encode()])
    needles = [*words, *keys, *(word for each in kept for word in (each.text, *each.keys))]
    needles += [each.passphrase for each in kept if each.scope]
    yield Loot(kept, needles, everything, cache, cached, {row["id"]: row for row in stored})


def test_thief_finds_no_text_no_passphrase_and_no_key(loot: Loot) -> None:
    places = [
        b" GET /secret/{secret_key} 410 ",
        b"ready to accept connections",
        b"Redis cannot answer: ",
        b'"wrong_passphrase"',
        b'"damaged"',
    ]
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
                derived = HKDF(SHA256(), 32, salt=salt, info=info).derive(material)
                key = Fernet(base64.urlsafe_b64encode(derived))
                assert opened([row["wrapped_key"]], key.decrypt) == []


def test_thief_finds_no_bytes_that_are_a_secret_key_or_a_receipt_key(loot: Loot) -> None:
    ids = {kept.id for kept in loot.kept}
    for time_bytes in {id.bytes[:4] for id in ids}:  # with these, all keys begin
        in_base64 = base64.urlsafe_b64encode(time_bytes)[:5]
        texts = re.findall(rb"(?=(%b[\w-]{27}))" % in_base64, loot.everything)
        digits = re.findall(rb"(?=(%b[0-9a-f]{40}))" % time_bytes.hex().encode(), loot.everything)
        guesses = re.findall(rb"(?s)(?=(%b.{20}))" % re.escape(time_bytes), loot.everything)
        guesses += [raw(text.decode()) for text in texts]
        guesses += [bytes.fromhex(text.decode()) for text in digits]
        assert len(guesses) >= 1
        for guess in guesses:
            assert main.secret_id_of(guess) not in ids
            assert main.secret_id_of(main.secret_key_of(guess)) not in ids


def test_thief_with_a_link_opens_that_secret_unless_it_was_read_or_needs_a_passphrase(
    loot: Loot,
) -> None:
    side_by_side = rb"(?s)(gAAAAA[\w-]+={0,2})[^\w-].{0,8}?(gAAAAA[\w-]{134})"
    pairs = set(re.findall(side_by_side, loot.everything))
    cached_keys = set(re.findall(rb"gAAAAA[\w-]{134}", loot.cache))
    for kept in loot.kept:
        if not kept.was_read:
            salt = loot.rows[kept.id]["passphrase_salt"]
            key = b""
            if kept.scope == "read":
                key = kept.stretched(salt).passphrase_key
            assert set(unsealed(pairs, kept.secret_key, key)) == {kept.text.encode()}
        if kept.scope == "read":
            assert unsealed(pairs, kept.secret_key) == []
        cached = [loot.cached[name_in_redis("secret", kept.id)]]
        contents = set(unsealed(itertools.product(cached, cached_keys), kept.secret_key))
        opens = not kept.was_read and kept.scope != "read"
        assert contents == ({kept.text.encode()} if opens else set())


def test_thief_cannot_tell_a_right_passphrase(loot: Loot) -> None:
    for kept in loot.kept:
        if kept.scope and not kept.was_read:
            salt = loot.rows[kept.id]["passphrase_salt"]
            for guess in (main.SecretKey(b""), main.SecretKey(kept.id.bytes)):
                stretched = main.derive_passphrase_keys(kept.passphrase, salt, OPERATORS_KEY, guess)
                assert found([stretched.passphrase_key, stretched.verifier], loot.everything) == []
            with_link = kept.stretched(salt)
            assert found([with_link.passphrase_key], loot.everything) == []
            assert found([with_link.verifier], loot.everything) == [with_link.verifier]


# --- Leaks while it works -------------------------------------------------------------------------

# Shows, ten times a second, what asyncio and any log might: every future, task, handle, exception,
# and our own objects.
SHOW_ALL = """
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


@parametrize("start", ["main.main()", 'main.uvicorn.run(main.app, port=PORT, loop="asyncio")'])
def test_nothing_in_flight_shows_a_secret_or_key(
    tables: Tables, tmp_path: Path, start: str
) -> None:
    keys = list[str]()
    passphrase = "passphrase-of-somebody"
    guards: list[Document] = [{}, {"passphrase": passphrase, "passphrase_scope": "read"}]
    command = ("-c", SHOW_ALL + start)
    debug = {"PYTHONASYNCIODEBUG": "1"}
    with (
        serving(tables, tmp_path / "log", command, **debug) as service,
        ThreadPoolExecutor(8) as pool,
    ):
        for number in range(4):
            keys += pool.map(lambda guard: service.key(CANARY, **guard), guards * 4)
            with another_session(tables, LOCK_LOG if number % 4 == 0 else "select"):
                reading = [pool.submit(service.read, key, passphrase) for key in keys[-8:]]
                time.sleep(0.2)  # time for a look at what is under way
            assert {one.result().json().get("secret") for one in reading} == {CANARY}
        until(lambda: b"SHOWN <main.Pending" in service.log.read_bytes())
    said = service.log.read_bytes()
    assert said.count(b"SHOWN <Task") > 20
    assert b"Executing <" in said
    assert b"SHOWN <main.Vault " in said
    assert found(forms(*keys, CANARY, passphrase, ENCRYPTION_KEY), said) == []


UVICORN = ("-m", "uvicorn", "main:app", "--port", "PORT")
STARTS = [
    MAIN,
    UVICORN,
    (*UVICORN, "--log-level", "trace"),
    (*UVICORN, "--workers", "2"),
    ("-c", 'import main; main.uvicorn.run(main.app, port=PORT, log_level="trace")'),
]


@parametrize("start", STARTS)
def test_no_line_holds_a_key_however_it_is_started(
    tables: Tables, tmp_path: Path, start: Sequence[str]
) -> None:
    websocket = b"Connection: close, upgrade\r\nUpgrade: websocket\r\n"
    with serving(tables, tmp_path / "log", start) as service:
        keys = [service.key("hello") for _ in range(4)]
        for headers in (websocket, websocket + HANDSHAKE):
            assert send(
                service, GET.replace(b"CANARY", keys[0].encode()) + headers + b"\r\n", patience=5
            )
        assert service.get(f"/secret/{keys[1]}").json() == {"secret": "hello"}
        path = f"/secret/{keys[2]}?x=/{keys[2]}"
        assert service.get(path, headers={"Accept": BROWSER}).is_success
        assert service.delete(f"/secret/{keys[3]}").is_success
    assert b"Uvicorn running" in service.log.read_bytes()
    assert found(forms(*keys), service.log.read_bytes()) == []


# --- Forced failures and damage -------------------------------------------------------------------


LOCKED = {"read with passphrase", "guess"}
# What writes a row of secrets.
SEALS = {*LOCKED, "create", "create raw", "create with passphrase"}
ALL = SEALS | {"read", "delete", "revoke"}
EACH_ROW = "for each row execute function quote()"
BREAKAGES = {  # what PostgreSQL fails of: (what mends it, what fails in between)
    "alter table secrets rename wrapped_key to gone": (
        "alter table secrets rename gone to wrapped_key",
        ALL,
    ),
    "alter table secret_logs rename to gone": (
        "alter table gone rename to secret_logs",
        ALL | {"status", "receipt"},
    ),
    "revoke update, delete on secrets from clerk": (
        "grant update, delete on secrets to clerk",
        ALL,
    ),
    f"create trigger q before insert or update or delete on secrets {EACH_ROW}": (
        "drop trigger q on secrets",
        ALL,
    ),
    f"create trigger q before insert on secret_logs {EACH_ROW}": (
        "drop trigger q on secret_logs",
        ALL,
    ),
    "alter table secrets add check (false) not valid": (
        "alter table secrets drop constraint secrets_check",
        SEALS,
    ),
    "update secrets set expires_at = '290000-01-01'": (
        "delete from secrets",
        LOCKED | {"status", "receipt"},
    ),
}


@pytest.fixture(scope="session")
def clerk(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose database user may do what the service needs, and nothing else."""
    fresh = tables.fresh()
    log = tmp_path_factory.mktemp("clerk") / "log"
    fresh.rows("create role clerk login")
    fresh.rows("grant select, insert, update, delete on all tables in schema public to clerk")
    quoting = "$$ begin raise exception 'quoted % %', old, new; end $$"
    fresh.rows(f"create function quote() returns trigger language plpgsql as {quoting}")
    with serving(fresh, log, POSTGRES_USER="clerk", CLEANUP_INTERVAL_SECONDS="0.1") as service:
        yield service


def odd_lines(service: Service) -> list[str]:
    """Warnings and errors that are more than a class, a place, a code."""
    request = r"(GET|POST|DELETE) [a-z_/{}]+ 503 [\d.]+ ms"
    failure = r"(PostgreSQL cannot answer|cleanup will be tried again): \w+"
    usual = rf"(DEBUG|INFO) .*|WARNING ({request}|{failure})( at [\w.:<> ]+)?"
    lines = service.log.read_text().splitlines()
    return [line for line in lines if not re.fullmatch(rf"[\d-]+ \S+ ({usual})", line)]


@parametrize("fault", BREAKAGES)
def test_forced_failure_tells_nobody_anything_and_is_no_loss(clerk: Service, fault: str) -> None:
    mend, failing = BREAKAGES[fault]
    secret, passphrase = canaries("secret", "passphrase")
    locked = {"passphrase": passphrase, "passphrase_scope": "read"}
    created = [clerk.create(secret, **members) for members in ({}, {}, {}, locked, locked)]
    plain, deleted, _, guarded, guessed = (document["secret_key"] for document in created)
    before = clerk.tables.counts()
    clerk.tables.rows(fault)
    try:
        create = partial(clerk.post, "/secret")
        answers = {
            "status": clerk.status(guarded),
            "receipt": clerk.get(f"/receipt/{created[0]['receipt_key']}"),
            "guess": clerk.read(guessed, passphrase.upper()),
            "read": clerk.get(f"/secret/{plain}"),
            "read with passphrase": clerk.read(guarded, passphrase),
            "delete": clerk.destroy(deleted),
            "revoke": clerk.revoke(created[2]),
            "create": create(json={"secret": secret}),
            "create raw": clerk.create_raw(secret.encode()),
            "create with passphrase": create(json={"secret": secret, **locked}),
        }
    finally:
        clerk.tables.rows(mend)
    assert {name for name, answer in answers.items() if answer.status_code >= 500} == failing
    for answer in (answers[name] for name in failing):
        assert_problem(answer, 503, "unavailable")
    errors = b"\n".join(answer.content for answer in answers.values() if not answer.is_success)
    said = errors + clerk.log.read_bytes() + clerk.stores.postgres.log.read_bytes()
    assert found(forms(secret, passphrase, passphrase.upper(), *keys_of(created)), said) == []
    assert found([b"Traceback", b".py", b"quoted"], errors) == []
    assert odd_lines(clerk) == []
    if failing >= ALL:
        assert clerk.tables.counts() == before
        assert clerk.reads(plain) == secret


def test_failing_cleanup_tells_nothing_and_goes_on(clerk: Service) -> None:
    key = clerk.key(CANARY)
    clerk.tables.rows(f"create trigger q before delete on secrets {EACH_ROW}")
    try:
        clerk.expire(key)
        until(lambda: b"cleanup will be tried again: " in clerk.log.read_bytes())
    finally:
        clerk.tables.rows("drop trigger q on secrets")
    until(lambda: "expired" in clerk.actions(key))
    assert odd_lines(clerk) == []


DAMAGES = """
ciphertext = other.ciphertext
wrapped_key = other.wrapped_key
ciphertext = other.ciphertext, wrapped_key = other.wrapped_key
ciphertext = substr(mine.ciphertext, 1, length(mine.ciphertext) - 1)
ciphertext = substr(mine.ciphertext, 1, length(mine.ciphertext) - 64)
ciphertext = ''
wrapped_key = substr(mine.wrapped_key, 1, 100)
ciphertext = set_bit(mine.ciphertext, 400, 1 - get_bit(mine.ciphertext, 400))
wrapped_key = set_bit(mine.wrapped_key, 400, 1 - get_bit(mine.wrapped_key, 400))
""".strip().splitlines()


@parametrize("members", [{}, TO_READ], ids=["plain", "locked"])
@parametrize("damage", DAMAGES)
def test_damaged_row_is_refused_and_logged_and_shows_nothing(
    service: Service, damage: str, members: Document
) -> None:
    key, other = (service.key(f"{CANARY}-{number}", **members) for number in range(2))
    statement = """
        update secrets as mine set {} from secrets as other where mine.id = $1 and other.id = $2
    """
    service.tables.rows(statement.format(damage), id_of(key), id_of(other))
    service.redis.flushall()
    response = service.read(key, members.get("passphrase"))
    answer = assert_problem(response, 500, "damaged")
    assert set(answer) == {"type", "title", "status", "detail", "code"}
    assert CANARY not in response.text
    assert f"ERROR the row of {id_of(key)} was altered or damaged" in service.log.read_text()
    assert "Traceback" not in service.log.read_text()
