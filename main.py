"""One-Time Secrets: an HTTP service that keeps a secret encrypted and hands it out exactly once.

A secret's life. POST /secret makes a receipt_key, derives the secret_key (the link) from it and an id from that,
encrypts the secret under a fresh data_key, wraps that under a key that needs the link *and* the operator's
encryption_key, and inserts one row; the cache is filled beside it. A read deletes the row in one statement that also
logs the read, and meanwhile takes the cached wrapped_key (GETDEL: one reader gets it).

Who decides what. PostgreSQL's `secrets`: can it still be read? No row back from the deletion, no secret, whatever the
cache said. `secret_logs`: what happened? Redis: nothing; losing it loses no secret, a stale copy reads none twice.

What a thief gets. From a dump of both stores, the logs and the encryption_key: sizes, times, addresses; every data_key
is wrapped under its link, which is stored nowhere. From a link alone: one read, which the rightful reader will notice.

Words. secret: bytes to hand over. secret_key: the bearer's, in the link. receipt_key: the creator's, shows the history
and revokes; the secret_key comes from it, never the reverse. passphrase: a person's, guards deletion and, if asked for,
reading. claim: to end a secret for one caller, by reading it or by deleting it.
"""

import asyncio
import base64
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import select
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, NewType, Self, TypeAlias

import asyncpg
import uvicorn
from asyncpg.pgproto.pgproto import UUID  # a faster uuid.UUID
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from fastapi import Depends, Request, Response
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from hiredis import pack_command
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

log: Final = logging.getLogger("one-time-secrets")

# --- Constants ---------------------------------------------------------------------------------------------------
KEY_BYTES: Final = 24  # 32 characters of base64 without padding
TIME_BYTES: Final = 4  # of those: the second of creation. The other 20 (160 bits) are beyond guessing
KEY_PATTERN: Final = "^[A-Za-z0-9_-]{32}$"
SECRET_KEY_LABEL: Final = b"one-time-secrets secret key"  # HKDF labels: each derivation has its own, so that
WRAPPING_LABEL: Final = b"one-time-secrets wrapping key"  # no key is ever used for two purposes
VERIFIER_LABEL: Final = b"one-time-secrets passphrase verifier"
FINGERPRINT_LABEL: Final = b"one-time-secrets fingerprint"
ARGON2_MEMORY_KIB: Final = 19 * 1024  # OWASP Password Storage Cheat Sheet, second Argon2id profile: 25 ms a guess
ARGON2_QUEUE: Final = 8  # passphrases that a core has under way or waiting: the last is done after 0.2 s
MAX_PASSPHRASE_CHARACTERS: Final = 1024
ATTEMPTS: Final = 5  # passphrase attempts until a pause, whoever asks ...
ATTEMPT_PAUSE_MINUTES: Final = 15  # ... which doubles each time: some 50 guesses in 7 days
POSTGRES_WAIT_SECONDS: Final = 30.0  # at start: a database that boots beside us gets this long
POSTGRES_TIMEOUT_SECONDS: Final = 1.5  # for a statement, and for a connection, to whichever of several servers
POSTGRES_CONNECTIONS: Final = 8  # a worker: what the batches below can use, and a few for everything else
REDIS_TIMEOUT_SECONDS: Final = 0.25  # what a request may lose to a hung cache ...
REDIS_PAUSE_SECONDS: Final = 3.0  # ... and how long the cache is then left alone
RETRY_SOON: Final = {"Retry-After": "2"}  # seconds: what a 503 asks of the caller
PATIENCE_SECONDS: Final = 10.0  # that a request waits for its batch, behind others and behind a hung server
BATCH_BYTES: Final = 4 * 1024 * 1024  # in one statement: what PostgreSQL takes or gives well within the timeout ...
BATCH_ROW_BYTES: Final = 32 * 1024  # ... counting small rows as this, which makes it 128 of them
BATCH_TURNS: Final = 5  # of the event loop before a batch leaves: a request in a socket needs three to join it
CLAIM_PAUSES_SECONDS: Final = (0.02, 0.04, 0.08, 0.16, 0.32, 0.0)  # after each try for a row that another holds
CLEANUP_ROWS: Final = 1000  # in one statement: some 20 ms of work
BODY_SECONDS: Final = 30.0  # for a body to arrive
MAX_REQUESTS: Final = 1000  # at once in a worker: below the 1,024 open files of many systems, 0.3 s of work
RAW_TYPES: Final = ("application/octet-stream", "text/plain")
PREVIEW_BOT: Final = re.compile(
    r"(?i)bot\b|crawler|spider|preview|Slack|WhatsApp|facebook|Facebot|meta-external|Microsoft Office|ms-?office|Teams|"
    "SafeLinks|Google|Mastodon|Pinterest|vkShare|Viber|Iframely|Embedly"
)
NO_STORE_HEADERS: Final = (
    (b"cache-control", b"no-cache, no-store, must-revalidate"), (b"pragma", b"no-cache"), (b"expires", b"0"),
    (b"referrer-policy", b"no-referrer"), (b"x-content-type-options", b"nosniff"), (b"x-robots-tag", b"noindex"),
    (b"content-security-policy", b"frame-ancestors 'none'; img-src 'self' data:"),  # ReDoc wants one of its maker's
)  # fmt: skip


# --- Settings ----------------------------------------------------------------------------------------------------


class Settings(BaseSettings):
    """What the operator configures, by environment variables of the same names or a `.env` file."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")

    postgres_host: str = "localhost"  # or a socket folder; several with commas between them: the one that takes writes
    postgres_port: Annotated[str, Field(pattern=r"^\d{1,5}(,\d{1,5})*$")] = "5432"  # one for all hosts, or one for each
    postgres_db: str = "secrets"
    postgres_user: str = "secrets"
    postgres_password: SecretStr = SecretStr("")
    redis_host: str = "localhost"
    redis_port: Annotated[int, Field(ge=1, le=65535)] = 6379
    redis_url: SecretStr = SecretStr("")  # wins over host and port; may hold a password
    encryption_key: SecretStr = SecretStr("")  # Fernet keys with commas between them, newest first
    encryption_key_file: Path = Path("encryption_key")  # read when encryption_key is unset; made on first start
    default_ttl_seconds: Annotated[int, Field(ge=1)] = 24 * 3600
    max_ttl_seconds: Annotated[int, Field(ge=1, le=10 * 365 * 86400)] = 7 * 86400
    max_secret_bytes: Annotated[int, Field(ge=1, le=10 * 1024 * 1024)] = 64 * 1024
    cache_seconds: Annotated[int, Field(ge=300, le=86400)] = 300
    cleanup_interval_seconds: Annotated[float, Field(gt=0, le=86400)] = 60
    log_retention_days: Annotated[int, Field(ge=1, le=36500)] = 90
    create_quota_kib_per_minute: Annotated[int, Field(ge=0)] = 16384  # stored KiB an IP address; 0: no quota
    api_tokens: SecretStr = SecretStr("")  # with commas between them; set: creation needs one of them
    public_url: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""  # in links; empty: as the request came in
    forwarded_allow_ips: str = "127.0.0.1"  # proxies whose X-Forwarded-For is believed
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _fits_together(self) -> "Settings":
        if self.default_ttl_seconds > self.max_ttl_seconds:
            raise ValueError("DEFAULT_TTL_SECONDS is larger than MAX_TTL_SECONDS")
        if self.postgres_port.count(",") not in (0, self.postgres_host.count(",")):
            raise ValueError("POSTGRES_PORT needs one port, or as many as POSTGRES_HOST has hosts")
        return self


try:
    settings: Final = Settings()
except ValidationError as error:  # one line that names the variable; its value may be a password and is never shown
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = f"{first['loc'][0]}: ".upper() if first["loc"] else ""
    raise SystemExit(f"{name}{first['msg'].removeprefix('Value error, ')}") from None

# --- Types and errors --------------------------------------------------------------------------------------------
ReceiptKey = NewType("ReceiptKey", bytes)
SecretKey = NewType("SecretKey", bytes)
SecretId = NewType("SecretId", UUID)
Sealed: TypeAlias = tuple[bytes, bytes]  # ciphertext, wrapped_key
PassphraseScope = Literal["delete", "read"]
KeyKind = Literal["secret_key", "receipt_key"]
Ending = Literal["read", "deleted"]
Code = Literal[  # unavailable: nothing has happened; outcome_unknown: this call may have ended the secret
    "token_required", "passphrase_required", "wrong_passphrase", "not_found", "method_not_allowed", "timeout",
    "already_read", "deleted", "expired", "too_large", "invalid", "too_many_attempts", "rate_limited", "damaged",
    "internal", "unavailable", "outcome_unknown",
]  # fmt: skip
STATUS: Final[dict[Code, int]] = {
    "token_required": 401, "passphrase_required": 403, "wrong_passphrase": 403, "not_found": 404,
    "method_not_allowed": 405, "timeout": 408, "already_read": 410, "deleted": 410, "expired": 410,
    "too_large": 413, "invalid": 422, "too_many_attempts": 429, "rate_limited": 429,
    "damaged": 500, "internal": 500, "unavailable": 503, "outcome_unknown": 503,
}  # fmt: skip
OUTCOME_UNKNOWN: Final = "The database did not answer: this call may have ended the secret. Its status tells."
NOT_FOUND: Final = "No secret with this key was ever here, or its history has ended."


class ServiceError(Exception):
    """What a caller is told, none of it ever input. `members` join the problem document."""

    def __init__(self, code: Code, detail: str, headers: dict[str, str] | None = None, **members: object) -> None:
        super().__init__(detail)
        self.code, self.detail, self.headers, self.members = code, detail, headers, members


class Unavailable(ServiceError):  # noqa: N818 - the code's name. It may work soon
    def __init__(self, reason: str = "The database cannot answer right now", unanswered: bool = False) -> None:
        super().__init__("unavailable", f"{reason}; nothing has happened to the secret.", RETRY_SOON)
        self.unanswered = unanswered  # PostgreSQL got a statement: it may have been executed, after all


class Unread(NamedTuple):  # a secret that can still be read; until retry_at no passphrase is checked
    expires_at: datetime
    passphrase_scope: PassphraseScope | None
    key_fingerprint: str
    retry_at: datetime | None

    def guards(self, action: Ending) -> bool:
        return self.passphrase_scope == "read" or (self.passphrase_scope == "delete" and action == "deleted")


# --- Cryptography ------------------------------------------------------------------------------------------------
#     receipt_key --HKDF--> secret_key --SHA-256--> id            each arrow is one-way
#     ciphertext   = Fernet(data_key).encrypt(secret)             data_key: fresh for every secret
#     wrapped_key  = Fernet(wrapping key).encrypt(data_key)
#     wrapping key = HKDF(secret_key + passphrase_key, salt = encryption_key, info = label + id)
#
# The wrapping key needs the link and the operator's key together: a dump lacks the link, a stolen link cannot be
# tried offline. The id in it ties a wrapped_key to its row: swapped between rows, neither opens.


@dataclass(frozen=True, slots=True)
class EncryptionKey:  # one of the operator's: 32 bytes, and the name by which a row refers to it
    raw: bytes = field(repr=False)
    fingerprint: str


def parse_encryption_keys(text: str) -> list[EncryptionKey]:
    """The first wraps, any unwraps. Raises ValueError, without the text, when it holds no key or something else."""
    raws = [base64.urlsafe_b64decode(part) for part in text.split(",") if part.strip() and Fernet(part)]
    if not raws:
        raise ValueError("There is no key")
    return [EncryptionKey(raw, hashlib.sha256(FINGERPRINT_LABEL + raw).hexdigest()[:16]) for raw in raws]


def new_receipt_key() -> ReceiptKey:
    """Time, then randomness: ids come in order, so that an index grows at its end (random: half as long again)."""
    return ReceiptKey(int(time.time()).to_bytes(TIME_BYTES) + os.urandom(KEY_BYTES - TIME_BYTES))


def secret_key_of(receipt_key: ReceiptKey) -> SecretKey:
    derived = HKDF(SHA256(), KEY_BYTES - TIME_BYTES, salt=None, info=SECRET_KEY_LABEL).derive(receipt_key)
    return SecretKey(receipt_key[:TIME_BYTES] + derived)


def secret_id_of(secret_key: SecretKey) -> SecretId:
    """The time, then 12 bytes of SHA-256, in the form of a uuid: names the row, the Redis keys, the log rows."""
    return SecretId(UUID((secret_key[:TIME_BYTES] + hashlib.sha256(secret_key).digest())[:16]))


def parse_key(text: str) -> bytes:
    """The bytes of a secret_key or receipt_key. Raises not_found when it has not the form of one."""
    if not re.fullmatch(KEY_PATTERN, text):
        raise ServiceError("not_found", NOT_FOUND)
    return base64.urlsafe_b64decode(text)


def _wrapping(key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes) -> Fernet:
    info = WRAPPING_LABEL + secret_id_of(secret_key).bytes
    derived = HKDF(SHA256(), 32, salt=key.raw, info=info).derive(secret_key + passphrase_key)
    return Fernet(base64.urlsafe_b64encode(derived))


def seal(secret: bytes, key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes = b"") -> Sealed:
    """Encrypt under a fresh data_key."""
    data_key = Fernet.generate_key()
    return Fernet(data_key).encrypt(secret), _wrapping(key, secret_key, passphrase_key).encrypt(data_key)


def unseal(sealed: Sealed, key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes = b"") -> bytes:
    """Undo seal(). Raises cryptography.fernet.InvalidToken when either token was altered, cut or swapped."""
    ciphertext, wrapped_key = sealed
    return Fernet(_wrapping(key, secret_key, passphrase_key).decrypt(wrapped_key)).decrypt(ciphertext)


@dataclass(frozen=True, slots=True)
class Stretched:  # what two independent halves of Argon2id's output become
    passphrase_key: bytes = field(repr=False)
    verifier: bytes  # is stored. Keyed with the link: without it a dump cannot tell a right guess from a wrong one


def stretch(passphrase: str, salt: bytes, key: EncryptionKey, secret_key: SecretKey) -> Stretched:
    """Argon2id (it releases the GIL: call it in a thread). NFKC first, so that an accent typed on a phone and on a
    laptop is the same passphrase (NIST SP 800-63B, 3.1.1.2)."""
    argon2 = Argon2id(salt=salt, length=64, iterations=2, lanes=1, memory_cost=ARGON2_MEMORY_KIB)
    output = argon2.derive(unicodedata.normalize("NFKC", passphrase).encode())
    return Stretched(output[:32], hmac.digest(key.raw + secret_key, VERIFIER_LABEL + output[32:], "sha256"))


# --- PostgreSQL --------------------------------------------------------------------------------------------------
# One statement, one transaction: the rows that come back are the answer. All times are the server's. A statement ends
# after 1 s, before POSTGRES_TIMEOUT_SECONDS, with an error, which is an answer. Rows are found by index: a plan for
# small tables would read them whole, and stay in use when they grow. These settings are statements because poolers such
# as PgBouncer refuse them at the start of a connection.
OPEN_SESSION: Final = """
    set application_name = 'one-time-secrets'; set synchronous_commit = on; set statement_timeout = '1000 ms';
    set timezone = 'UTC'; set plan_cache_mode = force_generic_plan; set enable_seqscan = off;
    set enable_hashjoin = off; set enable_mergejoin = off; set jit = off
"""

# The commit point of every creation, read and delete: inserts the new secrets, ends each claimed one for one caller (a
# row is deleted once), logs both, and returns the time and, by position, the claimed rows. Skipped are rows that others
# hold, because batches that wait for each other deadlock, and rows under an encryption_key that this process lacks (a
# rotation under way). After $18 nothing happens: a hung server that wakes executes what lies in its socket, when nobody
# hears its answer any more.
COMMIT_BATCH: Final = """
    with new as (
        select * from unnest($1::uuid[], $2::bytea[], $3::bytea[], $4::text[], $5::bytea[], $6::bytea[], $7::text[],
                             $8::int[], $9::text[], $10::text[])
            as new (id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
                    passphrase_scope, ttl_seconds, ip_address, user_agent)
        where now() < $18
    ), created as (
        insert into secrets (id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
                             passphrase_scope, expires_at)
        select id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
               passphrase_scope, now() + make_interval(secs => ttl_seconds) from new
    ), candidate as (
        select claim.* from unnest($11::uuid[], $12::text[], $13::bool[], $14::text[], $15::text[], $16::text[])
            with ordinality as claim (id, action, authorized, by, ip_address, user_agent, number)
        cross join lateral (  -- a plain join lets the planner come by the index on expires_at, past every dead row
            select * from secrets where secrets.id = claim.id for update skip locked
        ) as held
        where now() < $18 and held.expires_at > now() and held.key_fingerprint = any($17::text[])
          and (claim.authorized or held.passphrase_scope is null
               or (held.passphrase_scope = 'delete' and claim.action = 'read'))
    ), claimed as (
        delete from secrets using candidate where secrets.id = candidate.id
        returning candidate.*, secrets.ciphertext, secrets.wrapped_key, secrets.key_fingerprint
    ), logged as (
        insert into secret_logs (secret_id, action, ip_address, extra_data)
        select id, 'created', ip_address::inet, jsonb_strip_nulls(jsonb_build_object(
            'user_agent', user_agent, 'ttl_seconds', ttl_seconds, 'passphrase', passphrase_scope)) from new
        union all
        select id, action, ip_address::inet, jsonb_build_object('user_agent', user_agent, 'by', by) from claimed
    )
    select now(), number - 1 as position, key_fingerprint, ciphertext, wrapped_key
    from (select) as always left join claimed on true
"""

# Looks without touching: at the row, if it is still there, and at all that the log has. A secret is stored once and
# ends once: min and max pick that row. `ended`: what ended it, though an expired one may not have been cleaned away.
FIND_SECRET: Final = """
    select secrets.expires_at, passphrase_scope, key_fingerprint,
        case when attempts > 0 and attempts % $2 = 0
            then attempts_since + make_interval(mins => $3) * power(2, attempts / $2 - 1) end as retry_at,
        case when secrets.expires_at <= now() then 'expired' else ending end as ended,
        coalesce(ending_at, secrets.expires_at) as ended_at, stored_at, stored_until, events
    from (
        select min(created_at) filter (where action = 'created') as stored_at,
            min(created_at + make_interval(secs => (extra_data ->> 'ttl_seconds')::int)) as stored_until,
            max(action) filter (where action in ('read', 'deleted', 'expired')) as ending,
            max(coalesce((extra_data ->> 'expires_at')::timestamptz, created_at))
                filter (where action in ('read', 'deleted', 'expired')) as ending_at,
            jsonb_agg(to_jsonb(secret_logs) || extra_data order by id)::text as events
        from secret_logs where secret_id = $1
    ) as log left join secrets on secrets.id = $1
"""

# Charges a passphrase attempt *before* it is checked: a hundred at once must not be checked for the price of one. No
# row: there is none, or a pause is on. `attempts` are all that were ever charged, `attempts_since` the last one's time.
CHARGE_ATTEMPT: Final = """
    update secrets set attempts = attempts + 1, attempts_since = now()
    where id = $1 and expires_at > now() and (attempts % $2 > 0 or attempts = 0
        or attempts_since + make_interval(mins => $3) * power(2, attempts / $2 - 1) <= now())
    returning passphrase_salt, passphrase_verifier, ($2 - attempts % $2) % $2 as attempts_left
"""

# Of charged attempts only, so that nobody can fill the disk with refusals.
LOG_DENIED: Final = """
    insert into secret_logs (secret_id, action, ip_address, extra_data) values ($1, 'denied', $2::text::inet,
        jsonb_build_object('user_agent', $3::text, 'reason', 'wrong_passphrase', 'wanted', $4::text))
"""

# Ends and logs up to $1 expired secrets, past those that a claim or another worker's loop holds.
DELETE_EXPIRED: Final = """
    with expired as (
        delete from secrets where id = any(array(
            select id from secrets where expires_at <= now() order by expires_at limit $1 for update skip locked
        )) returning id, expires_at
    ) insert into secret_logs (secret_id, action, extra_data)
    select id, 'expired', jsonb_build_object('expires_at', expires_at) from expired returning secret_id
"""

# Ends up to $1 log rows past their retention of $2 days. The lowest ids are the oldest: no index on time needed.
DELETE_OLD_LOGS: Final = """
    delete from secret_logs
    where id = any(array(select id from secret_logs order by id limit $1 for update skip locked))
      and created_at < now() - make_interval(days => $2) returning id
"""

# Secrets are wrapped with this key now: it is needed for $2 seconds from now. Pushed on, never back.
KEEP_KEY: Final = """
    insert into encryption_keys as known (fingerprint, needed_until) values ($1, now() + make_interval(secs => $2))
    on conflict (fingerprint) do update set needed_until = greatest(known.needed_until, excluded.needed_until)
"""

PostgresConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
PostgresServer: TypeAlias = tuple[str, int]  # host or socket folder, port


class Database:
    """A few connections to the server that takes writes. asyncpg's own pool took 118 us more of each statement."""

    def __init__(self) -> None:
        hosts, ports = settings.postgres_host.split(","), settings.postgres_port.split(",")
        self._servers: list[PostgresServer] = list(zip(hosts, map(int, ports * len(hosts)), strict=False))
        self._idle: list[tuple[PostgresConnection, PostgresServer]] = []
        self._places = asyncio.Semaphore(POSTGRES_CONNECTIONS)
        self.clock_ahead = timedelta(0)  # PostgreSQL's clock, of ours

    async def fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Run one statement. Raises Unavailable, `unanswered` when the statement may have been executed."""
        loop, sent, refused = asyncio.get_running_loop(), False, False
        try:
            async with asyncio.timeout(POSTGRES_TIMEOUT_SECONDS if self._places.locked() else None):
                await self._places.acquire()
            try:
                self._idle = [idle for idle in self._idle if not idle[0].is_closed()]
                connection, server = self._idle.pop() if self._idle else await self.connect()
                late_at, sent = loop.time() + POSTGRES_TIMEOUT_SECONDS, True
                # A process that was frozen finds the alarm before the answer that lies there: one last look for it.
                alarm = loop.call_at(late_at, loop.call_later, 0.05, connection.terminate)
                try:
                    rows = await connection.fetch(statement, *arguments)
                except BaseException as error:
                    connection.terminate()  # its state is unknown, and a hung server would hold up a polite end
                    # An ERROR undoes the statement; a FATAL one ends the session instead, and may come after a commit.
                    refused = getattr(error, "severity_en", None) == "ERROR"
                    if not refused or isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                        self.close(server)
                    raise
                finally:
                    alarm.cancel()
                if loop.time() < late_at:  # else the alarm ends the connection
                    self._idle.append((connection, server))
                return rows
            finally:
                self._places.release()
        except Exception as error:  # asyncpg's, the system's, and what a breaking connection makes of a parser
            log.warning("PostgreSQL cannot answer: %s", type(error).__name__)  # its message may quote a value
            raise Unavailable(unanswered=sent and not refused) from None

    async def connect(self) -> tuple[PostgresConnection, PostgresServer]:
        """To the first server that takes writes; each has its share of the time. Raises what the last one did."""
        failure, connection = Exception(), None
        for host, port in self._servers.copy():
            try:
                async with asyncio.timeout(POSTGRES_TIMEOUT_SECONDS / len(self._servers)):
                    connection = await asyncpg.connect(
                        "postgres://?target_session_attrs=read-write", host=host, port=port,
                        database=settings.postgres_db, user=settings.postgres_user,
                        password=settings.postgres_password.get_secret_value() or None,
                    )  # fmt: skip
                    await connection.execute(OPEN_SESSION)
                    self.clock_ahead = await connection.fetchval("select now()") - datetime.now(UTC)
                return connection, (host, port)
            except Exception as error:  # asyncpg's have no class in common
                failure = error
                self._servers.sort(key=(host, port).__eq__)
                if connection:
                    connection.terminate()
        raise failure

    def close(self, failed: PostgresServer | None = None) -> None:
        """End the idle connections, which are to the failed server too, and ask it last from now on."""
        self._servers.sort(key=lambda server: server == failed)
        while self._idle:
            self._idle.pop()[0].terminate()


# --- Redis -------------------------------------------------------------------------------------------------------
#     secret:ID          ciphertext, CACHE_SECONDS from creation, even when it was read: its key went with GETDEL
#     key:ID             wrapped_key, until it is read or expires, at most as long; not where reading needs a passphrase
#     quota:IP:MINUTE    KiB stored in that minute

RedisCommand: TypeAlias = tuple[str | bytes | int, ...]


class Cache:
    """Redis, on whose answer nothing depends: one short timeout, then it is left alone for a few seconds."""

    def __init__(self) -> None:
        url = settings.redis_url.get_secret_value() or f"redis://{settings.redis_host}:{settings.redis_port}"
        try:
            pool = ConnectionPool.from_url(url, socket_timeout=None)  # run() has one for a whole exchange
        except ValueError:
            raise SystemExit("REDIS_URL: not a redis://, rediss:// or unix:// URL") from None
        self.connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._turn, self._resume_at = asyncio.Lock(), 0.0

    async def run(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """One exchange: an answer for each command, or none. redis-py's pool and pipeline took 50 to 90 us more."""
        async with self._turn:
            if time.monotonic() < self._resume_at:
                return []
            try:
                async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
                    packed = map(pack_command, commands)  # type: ignore[arg-type]  # its stub takes tuples of one only
                    await self.connection.send_packed_command(b"".join(packed))  # connects first, if need be
                    return [await self.connection.read_response(disable_decoding=True) for _ in commands]
            except Exception as error:  # whatever it is: PostgreSQL decides meanwhile, and its answer counts
                self._resume_at = time.monotonic() + REDIS_PAUSE_SECONDS
                log.warning("Redis cannot answer, going on without it: %s", type(error).__name__)
                await self.connection.disconnect(nowait=True)
                return []


# --- Operations --------------------------------------------------------------------------------------------------
# The only place where PostgreSQL, Redis and the cryptography meet.


class ReceiptEvent(BaseModel):  # `by`: the key that was shown; `reason`: why it was denied
    action: Literal["created", "read", "deleted", "expired", "denied"]
    created_at: datetime
    ip_address: Annotated[str | None, Field(examples=["192.0.2.1"])]
    user_agent: Annotated[str | None, Field(examples=["curl/8.14.1"])] = None
    by: KeyKind | None = None
    reason: str | None = None


class Receipt(BaseModel):  # what became of a secret, as far as the log goes back
    status: Literal["unread", "read", "deleted", "expired"]
    created_at: datetime
    expires_at: datetime
    events: list[ReceiptEvent]


@lru_cache(maxsize=4096)
def parse_address(text: str) -> str:
    """IPv4 over an IPv6 socket is IPv4. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


def quota_name(ip_address: str | None) -> str:
    """In Redis, for this minute. An IPv6 caller usually has a whole /64: it counts as one."""
    one = ipaddress.ip_network(f"{ip_address}/64", strict=False) if ":" in str(ip_address) else ip_address
    return f"quota:{one}:{int(time.time()) // 60}"


class New(NamedTuple):  # a secret to store: the columns of `new` in COMMIT_BATCH, in their order
    id: SecretId
    ciphertext: bytes
    wrapped_key: bytes
    key_fingerprint: str
    passphrase_salt: bytes | None
    passphrase_verifier: bytes | None
    passphrase_scope: PassphraseScope | None
    ttl_seconds: int
    ip_address: str | None
    user_agent: str


class Claim(NamedTuple):  # a secret to end: the columns of `claim`
    id: SecretId
    action: Ending
    authorized: bool
    by: KeyKind
    ip_address: str | None
    user_agent: str


@dataclass(eq=False, repr=False, slots=True)
class Wish:  # a request's row, and what becomes of it. Its repr shows nothing
    call: "Call"
    row: New | Claim
    until: float = field(default_factory=lambda: time.monotonic() + PATIENCE_SECONDS)
    committed: "asyncio.Future[datetime]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    won: list[tuple[Sealed, EncryptionKey]] = field(default_factory=list)  # as cached, if it was, and the row's


class Vault:
    """A method for each promise. Raises ServiceError, and starlette's ClientDisconnect where nobody waits any more."""

    def __init__(self, database: Database, cache: Cache, keys: list[EncryptionKey]) -> None:
        self._database, self._cache, self._newest_key = database, cache, keys[0]
        self._keys = {key.fingerprint: key for key in keys}
        self._waiting: list[Wish] = []
        self._sending: asyncio.Task[None] | None = None
        self._stored_kib = dict[str, int]()  # as Redis last said, by quota_name
        cores = max(1, (os.cpu_count() or 1) // settings.workers)
        self._cores = asyncio.Semaphore(cores)  # Argon2id takes a core and 19 MiB: more at once only take memory
        self._argon2_queue = asyncio.Semaphore(cores * ARGON2_QUEUE)

    async def create(
        self, secret: bytes, options: "CreateSecret", call: "Call"
    ) -> tuple[ReceiptKey, SecretKey, datetime]:
        """(receipt_key, secret_key, expires_at), once the secret is durable in PostgreSQL."""
        if 0 < settings.create_quota_kib_per_minute <= self._stored_kib.get(quota_name(call.ip_address), 0):
            seconds = 60 - int(time.time()) % 60
            detail = f"Your address has stored its quota for this minute. Try again in {seconds} seconds."
            raise ServiceError("rate_limited", detail, {"Retry-After": str(seconds)})
        key, receipt_key, passphrase_key = self._newest_key, new_receipt_key(), b""
        secret_key = secret_key_of(receipt_key)
        salt, verifier, scope = None, None, None
        if options.passphrase is not None:
            salt, scope = os.urandom(16), options.passphrase_scope
            async with self._argon2_place(call):
                stretched = await asyncio.to_thread(stretch, options.passphrase, salt, key, secret_key)
            verifier, passphrase_key = stretched.verifier, stretched.passphrase_key if scope == "read" else b""
        ingredients = (secret, key, secret_key, passphrase_key)  # of many large ones at once we would hear nothing else
        sealed = await asyncio.to_thread(seal, *ingredients) if len(secret) > BATCH_ROW_BYTES else seal(*ingredients)
        kept = (*sealed, key.fingerprint, salt, verifier, scope, options.ttl_seconds)
        row = New(secret_id_of(secret_key), *kept, call.ip_address, call.user_agent)
        created_at = await self._commit(Wish(call, row))
        return receipt_key, secret_key, created_at + timedelta(seconds=options.ttl_seconds)

    async def claim(
        self, secret_key: SecretKey, action: Ending, call: "Call", passphrase: str | None, by: KeyKind = "secret_key"
    ) -> bytes:
        """End the secret for this caller, who gets it if the action is to read it. Raises what the log says of one that
        is gone, what its passphrase guards; after all but outcome_unknown and damaged it is as readable as before."""
        secret_id, passphrase_key, authorized = secret_id_of(secret_key), b"", by == "receipt_key"
        for pause_seconds in CLAIM_PAUSES_SECONDS:
            wish = Wish(call, Claim(secret_id, action, authorized, by, call.ip_address, call.user_agent))
            await self._commit(wish)
            if wish.won and action == "deleted":
                return b""
            for sealed, key in wish.won:  # a damaged cache must not cost anybody a secret
                with suppress(InvalidToken):
                    return unseal(sealed, key, secret_key, passphrase_key)
            if wish.won:
                log.error("the row of %s was altered or damaged: it does not open", secret_id)
                raise ServiceError("damaged", "What is stored of this secret was altered or damaged.")
            unread = await self.look(secret_id)
            if unread.key_fingerprint not in self._keys:
                raise Unavailable("This secret's encryption key is not at hand here")
            if unread.guards(action) and not authorized:
                passphrase_key = await self._check_passphrase(unread, secret_key, action, call, passphrase)
                authorized = True
            else:  # still there: another statement held it
                await asyncio.sleep(pause_seconds)
        raise Unavailable("This secret is held by another request right now")

    async def _check_passphrase(
        self, unread: Unread, secret_key: SecretKey, action: Ending, call: "Call", passphrase: str | None
    ) -> bytes:
        """The passphrase_key that reading needs. An attempt is charged before it is checked, and only where it can be;
        a refusal is logged and burns nothing. Raises passphrase_required, too_many_attempts, wrong_passphrase."""
        if passphrase is None:
            raise ServiceError("passphrase_required", "This needs the secret's passphrase.")
        secret_id = secret_id_of(secret_key)
        async with self._argon2_place(call):
            charged = await self._database.fetch(CHARGE_ATTEMPT, secret_id, ATTEMPTS, ATTEMPT_PAUSE_MINUTES)
            if not charged:
                retry_at = (await self.look(secret_id)).retry_at or datetime.now(UTC)
                seconds = max(1, math.ceil((retry_at - datetime.now(UTC)).total_seconds()))
                detail = f"Too many passphrase attempts. Try again in {seconds} seconds."
                raise ServiceError("too_many_attempts", detail, {"Retry-After": str(seconds)}, retry_at=retry_at)
            salt, verifier, attempts_left = charged[0]
            key = self._keys[unread.key_fingerprint]
            stretched = await asyncio.to_thread(stretch, passphrase, salt, key, secret_key)
        if not hmac.compare_digest(stretched.verifier, verifier):
            await self._database.fetch(LOG_DENIED, secret_id, call.ip_address, call.user_agent, action)
            detail = f"This is not the secret's passphrase. Attempts left: {attempts_left}."
            raise ServiceError("wrong_passphrase", detail, attempts_left=attempts_left)
        # Should the claim that follows fail, it costs its owner nothing.
        await self._database.fetch("update secrets set attempts = 0 where id = $1", secret_id)
        return stretched.passphrase_key if unread.passphrase_scope == "read" else b""

    @asynccontextmanager
    async def _argon2_place(self, call: "Call") -> AsyncIterator[None]:
        """A core's turn for one passphrase: who does not fit into the short queue is refused at once."""
        if self._argon2_queue.locked():
            raise Unavailable("Too many passphrases are being checked right now")
        async with self._argon2_queue, self._cores:
            if call.has_left():
                raise ClientDisconnect()
            yield

    async def _commit(self, wish: Wish) -> datetime:
        """A commit costs about the same for one row as for a hundred: who comes while a batch is under way leaves with
        the next one. A lone request leaves at once. A batch that fails fails its own requests only."""
        self._waiting.append(wish)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_batches())
        return await wish.committed

    async def _send_batches(self) -> None:
        while self._waiting:
            for _ in range(BATCH_TURNS):
                await asyncio.sleep(0)
            batch, room, largest_bytes = list[Wish](), BATCH_BYTES, settings.max_secret_bytes * 4 // 3  # in base64
            while room > 0 and self._waiting:
                wish = self._waiting.pop(0)
                if wish.committed.done():  # its caller was cancelled
                    continue
                if wish.call.has_left():
                    wish.committed.set_exception(ClientDisconnect())
                elif time.monotonic() > wish.until:
                    wish.committed.set_exception(Unavailable())
                else:
                    batch.append(wish)
                    size_bytes = len(wish.row.ciphertext) if isinstance(wish.row, New) else largest_bytes
                    room -= max(size_bytes, BATCH_ROW_BYTES)
            try:
                if batch:
                    await self._send(batch)
            except Exception as error:  # whatever it is, nobody may be left waiting for an answer
                unknown = ServiceError("outcome_unknown", OUTCOME_UNKNOWN, RETRY_SOON)
                unanswered = isinstance(error, Unavailable) and error.unanswered
                for wish in batch:
                    if not wish.committed.done():
                        wish.committed.set_exception(unknown if unanswered and isinstance(wish.row, Claim) else error)
        self._sending = None

    async def _send(self, batch: list[Wish]) -> None:
        """Let PostgreSQL decide, while Redis hands out and takes copies, and counts what each address stores."""
        claims = [wish for wish in batch if isinstance(wish.row, Claim)]
        new = [wish.row for wish in batch if isinstance(wish.row, New)]
        commands, stored_kib = list[RedisCommand](), Counter[str]()
        for wish in claims:
            commands += [("GET", f"secret:{wish.row.id}"), ("GETDEL", f"key:{wish.row.id}")]
        for row in new if settings.create_quota_kib_per_minute else ():
            stored_kib[quota_name(row.ip_address)] += math.ceil(len(row.ciphertext) / 1024)
        for name, kib in stored_kib.items():
            commands += [("INCRBY", name, kib), ("EXPIRE", name, 60)]
        for row in new:
            commands.append(("SET", f"secret:{row.id}", row.ciphertext, "EX", settings.cache_seconds))
            if row.passphrase_scope != "read":  # later than the ciphertext, the wrapped_key would open nothing
                seconds = min(row.ttl_seconds, settings.cache_seconds)
                commands.append(("SET", f"key:{row.id}", row.wrapped_key, "EX", seconds))
        columns = [*zip(*new, strict=True)] or [()] * len(New._fields)
        columns += [*zip(*(wish.row for wish in claims), strict=True)] or [()] * len(Claim._fields)
        exchange = asyncio.create_task(self._cache.run(commands))
        # By PostgreSQL's clock: when the alarm in fetch() ends the wait for an answer.
        deadline = datetime.now(UTC) + self._database.clock_ahead + timedelta(seconds=POSTGRES_TIMEOUT_SECONDS)
        try:
            rows = await self._database.fetch(COMMIT_BATCH, *columns, list(self._keys), deadline)
        finally:
            answers = await exchange
        committed_at: datetime = rows[0]["now"]
        if committed_at >= deadline:  # we were too busy or frozen to send it in time, or a clock was set: once more
            self._database.clock_ahead = committed_at - datetime.now(UTC)
            self._waiting[:0] = batch
            return
        self._stored_kib.update(zip(stored_kib, answers[2 * len(claims) :: 2], strict=False))
        for _, position, key_fingerprint, *stored in rows:
            if position is not None:
                for pair in (answers[2 * position : 2 * position + 2], stored):
                    if pair and None not in pair:
                        claims[position].won.append(((pair[0], pair[1]), self._keys[key_fingerprint]))
        for wish in batch:
            if not wish.committed.done():  # else its caller was cancelled
                wish.committed.set_result(committed_at)

    async def look(self, secret_id: SecretId) -> Unread:
        """Look without touching. Raises not_found, already_read, deleted or expired, as the log has it."""
        (row,) = await self._database.fetch(FIND_SECRET, secret_id, ATTEMPTS, ATTEMPT_PAUSE_MINUTES)
        if row["ended"]:
            code: Code = "already_read" if row["ended"] == "read" else row["ended"]
            warning = " If that was not you, treat the secret as compromised." if code == "already_read" else ""
            verb, when = "" if code == "expired" else "was ", row["ended_at"].isoformat().replace("+00:00", "Z")
            raise ServiceError(code, f"This secret {verb}{row['ended']} at {when}.{warning}", ended_at=row["ended_at"])
        if not row["expires_at"]:
            raise ServiceError("not_found", NOT_FOUND)
        return Unread(*row[:4])

    async def history(self, secret_id: SecretId) -> Receipt:
        """What the log has of a secret, for its creator. Raises not_found when it has nothing (any more)."""
        (row,) = await self._database.fetch(FIND_SECRET, secret_id, ATTEMPTS, ATTEMPT_PAUSE_MINUTES)
        if not row["stored_at"]:
            raise ServiceError("not_found", NOT_FOUND)
        facts = {"status": row["ended"] or "unread", "created_at": row["stored_at"], "expires_at": row["stored_until"]}
        return Receipt.model_validate({**facts, "events": json.loads(row["events"])})

    async def health(self) -> bool:
        """Whether Redis answers. Raises Unavailable unless PostgreSQL takes writes."""
        await self._database.fetch("select from encryption_keys where false for update")  # refused by a standby
        return bool(await self._cache.run([("PING",)]))

    async def clean_expired_secrets(self) -> None:
        """For ever: end and log expired secrets, forget their cached keys, end log rows past their retention. After a
        full batch the next one follows soon, but after a rest: reads go first."""
        needed_seconds = settings.max_ttl_seconds + 2 * settings.cleanup_interval_seconds
        while True:
            started, most, self._stored_kib = time.monotonic(), 0, {}  # most of these minutes are over
            try:
                await self._database.fetch(KEEP_KEY, self._newest_key.fingerprint, needed_seconds)
                if most := len(expired := await self._database.fetch(DELETE_EXPIRED, CLEANUP_ROWS)):
                    await self._cache.run([("DEL", *(f"key:{secret_id}" for (secret_id,) in expired))])
                logs = await self._database.fetch(DELETE_OLD_LOGS, CLEANUP_ROWS, settings.log_retention_days)
                if most := max(most, len(logs)):
                    log.info("cleanup: %d expired secrets, %d old log rows", len(expired), len(logs))
            except Exception as error:  # the loop must outlive whatever it meets: nobody would start it again
                log.warning("cleanup will be tried again: %s", type(error).__name__)
            rest_seconds = 2 * (time.monotonic() - started)
            await asyncio.sleep(rest_seconds if most == CLEANUP_ROWS else settings.cleanup_interval_seconds)


# --- Start -------------------------------------------------------------------------------------------------------


def load_encryption_keys() -> list[EncryptionKey]:
    """From ENCRYPTION_KEY, else from ENCRYPTION_KEY_FILE, which is made if there is none and never overwritten: written
    under a name that nobody else uses, synced, then linked; of two starts at once both read the same whole key."""
    name, text, file = "ENCRYPTION_KEY", settings.encryption_key.get_secret_value(), settings.encryption_key_file
    try:
        if not text:
            name = f"ENCRYPTION_KEY_FILE {file}"
            if not file.exists():
                with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.") as aside:  # mode 0600
                    aside.write(Fernet.generate_key())
                    aside.flush()
                    os.fsync(aside.fileno())
                    with suppress(FileExistsError):
                        os.link(aside.name, file)
            text = file.read_text("ascii", "replace")
        return parse_encryption_keys(text)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name}: {error}. Name a file that can be made, or keys of 32 bytes in base64.") from None


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[dict[str, Vault]]:
    """Connect and check: what stands in the way of our promises is a SystemExit with one line that names the remedy."""
    # However the service is started, this file's lines about a request are the only ones: uvicorn's hold keys.
    logging.getLogger("uvicorn.access").disabled = logging.getLogger("uvicorn.asgi").disabled = True
    logging.getLogger("uvicorn.error").addFilter(lambda record: "websockets" not in record.pathname)
    keys, database, cache = load_encryption_keys(), Database(), Cache()
    give_up_at, connection = time.monotonic() + POSTGRES_WAIT_SECONDS, None
    while not connection:
        try:
            connection, _ = await database.connect()
        except Exception as error:
            if time.monotonic() > give_up_at:
                where = f"{settings.postgres_host}:{settings.postgres_port} ({type(error).__name__})"
                raise SystemExit(f"No PostgreSQL at {where} that takes writes. Check the POSTGRES_ settings.") from None
            await asyncio.sleep(0.5)
    unsafe = "select name from pg_settings where name in ('fsync', 'full_page_writes') and setting = 'off'"
    for (name,) in await connection.fetch(unsafe):
        raise SystemExit(f"PostgreSQL runs with {name} = off: it may lose what it has acknowledged. Switch it on.")
    try:
        for statement in (COMMIT_BATCH, FIND_SECRET, CHARGE_ATTEMPT, KEEP_KEY):  # they name every column
            await connection.prepare(statement)
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
        raise SystemExit("The tables are missing or older than this program. Load them: psql -f schema.sql") from None
    async with connection.transaction():  # of two starts at once, one finds the other's key
        await connection.execute("lock table encryption_keys in exclusive mode")
        missing = "select fingerprint from encryption_keys where fingerprint <> all($1) and needed_until > now()"
        for (fingerprint,) in await connection.fetch(missing, [key.fingerprint for key in keys]):
            remedies = "add it to ENCRYPTION_KEY, behind the newest, or give them up: delete its row of encryption_keys"
            raise SystemExit(f"Unread secrets may need the encryption key with fingerprint {fingerprint}: {remedies}.")
        await connection.execute(KEEP_KEY, keys[0].fingerprint, float(settings.max_ttl_seconds))
    connection.terminate()
    answers = await cache.run([("INFO", "cluster")])
    if not answers:
        log.warning("Redis is missing: the service works without it, only slower")
    elif b"cluster_enabled:1" in answers[0]:
        raise SystemExit("REDIS_URL: this is a node of a cluster, which a cache does not need. Name a single Redis.")
    vault = Vault(database, cache, keys)
    cleaning = asyncio.create_task(vault.clean_expired_secrets())
    gc.freeze()  # the imported modules stay: collecting past them costs 40 ms now and then, the worst latencies
    yield {"vault": vault}
    cleaning.cancel()
    database.close()
    await cache.connection.disconnect(nowait=True)


# --- HTTP: models, errors, the call ------------------------------------------------------------------------------
TOO_LARGE: Final = f"A secret may have at most {settings.max_secret_bytes} bytes."
EXAMPLE_KEY: Final = "aR8p4mJx0Zk3vQf7TnB1cWyLh5uEoG2d"
KeyText = Annotated[str, Field(repr=False, examples=[EXAMPLE_KEY])]
KeyInPath = Annotated[KeyText, Field(pattern=KEY_PATTERN)]


class Input(BaseModel):  # strict: a misspelt `ttl` must not silently become the default, nor "60" a number
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @classmethod
    def of(cls, source: bytes | dict[str, str], remedy: str = "") -> Self:
        """From a body or a query. Raises invalid: it names each field (input too: unless it is odd), never its value.
        `remedy`: for a body that is no JSON object at all."""
        try:
            return cls.model_validate_json(source) if isinstance(source, bytes) else cls.model_validate_strings(source)
        except ValidationError as error:
            fields, place = [], "body" if isinstance(source, bytes) else "query"
            for item in error.errors(include_url=False, include_input=False, include_context=False):
                names = [name if re.fullmatch(r"(?a)\w{1,32}", name) else "(unknown)" for name in map(str, item["loc"])]
                message = item["msg"] if names else f"{item['msg']}. {remedy}"
                fields.append(InvalidField(loc=[place, *names], msg=message, type=item["type"]))
            raise invalid(*fields) from None


class RawOptions(Input):  # the query beside a body that is the secret itself
    ttl_seconds: Annotated[int, Field(ge=1, le=settings.max_ttl_seconds)] = settings.default_ttl_seconds


class PresentPassphrase(Input):
    passphrase: Annotated[str | None, Field(min_length=1, max_length=MAX_PASSPHRASE_CHARACTERS, repr=False)] = None


class SecretRead(BaseModel):
    secret: Annotated[str, Field(repr=False, examples=["correct horse battery staple"])]
    encoding: Annotated[Literal["base64"] | None, Field(description="with it, `secret` is the base64 of bytes")] = None


class CreateSecret(SecretRead, PresentPassphrase, RawOptions):
    passphrase_scope: Annotated[PassphraseScope, Field(description="what it guards", examples=["read"])] = "delete"


class SecretCreated(BaseModel):
    secret_key: Annotated[KeyText, Field(description="reads the secret, once")]
    receipt_key: Annotated[KeyText, Field(description="shows what became of the secret, revokes it, and opens it, too")]
    expires_at: datetime
    url: Annotated[str, Field(repr=False, examples=[f"https://secrets.example.com/#{EXAMPLE_KEY}"])]
    passphrase_scope: PassphraseScope | None = None


class SecretDeleted(BaseModel):
    status: Literal["secret_deleted"] = "secret_deleted"


class SecretStatus(BaseModel):
    status: Literal["unread"] = "unread"
    expires_at: datetime
    passphrase_required: bool  # for reading


class Health(BaseModel):
    status: Literal["ok", "degraded"]  # degraded: Redis is missing, and nothing else is different
    postgres: Literal["up"] = "up"
    redis: Literal["up", "down"]


class InvalidField(BaseModel):
    loc: list[str]
    msg: str
    type: str = "value_error"


class Problem(BaseModel):  # RFC 9457
    type: Literal["about:blank"] = "about:blank"
    title: Annotated[str, Field(examples=["Gone"])]
    status: Annotated[int, Field(examples=[410])]
    detail: Annotated[str, Field(description="for people", examples=["This secret expired at 2026-11-21T09:00:00Z."])]
    code: Annotated[Code, Field(description="for programs", examples=["expired"])]
    errors: Annotated[list[InvalidField] | None, Field(description="with invalid")] = None
    ended_at: Annotated[datetime | None, Field(description="with already_read, deleted, expired")] = None
    attempts_left: Annotated[int | None, Field(description="with wrong_passphrase")] = None
    retry_at: Annotated[datetime | None, Field(description="with too_many_attempts")] = None


def problem(error: ServiceError) -> Response:
    """The one writer of errors."""
    status = STATUS[error.code]
    facts = {"title": HTTPStatus(status).phrase, "status": status, "detail": error.detail, "code": error.code}
    body = Problem.model_validate(facts | error.members).model_dump_json(exclude_none=True)
    return Response(body + "\n", status, error.headers, "application/problem+json")


def invalid(*fields: InvalidField) -> ServiceError:
    return ServiceError("invalid", "; ".join(f"{'.'.join(field.loc)}: {field.msg}" for field in fields), errors=fields)


class Call(Request):
    """A request, and what is asked of it."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        super().__init__(scope, receive)
        self.vault: Vault = scope["state"]["vault"]
        self.uvicorn: Any = getattr(receive, "__self__", None)  # its side of this request; None under another server
        self.header = {name: value.decode("latin-1") for name, value in scope["headers"]}  # looked up ten times
        self.user_agent = self.header.get(b"user-agent", "")[:200].replace("\x00", "")  # jsonb has no NUL
        self.ip_address: str | None = None  # as uvicorn or a trusted proxy saw the caller, else the proxy's own
        with suppress(AttributeError, IndexError, TypeError, ValueError):
            try:
                self.ip_address = parse_address(scope["client"][0])
            except ValueError:
                transport: Any = self.uvicorn and self.uvicorn.transport
                self.ip_address = parse_address(transport.get_extra_info("peername")[0])

    def has_left(self) -> bool:
        """Whether the connection is closed, by the kernel's word: uvicorn tells a worker that is behind too late."""
        try:
            poll = select.poll()
            poll.register(self.uvicorn.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
            return bool(self.uvicorn.disconnected or poll.poll(0))
        except (AttributeError, OSError, ValueError) as error:
            return isinstance(error, ValueError)  # its number is -1: closed

    async def bounded_body(self) -> bytes:
        """At most what the largest secret needs in JSON: six bytes (\\u0000) for one of its own, and a passphrase."""
        limit, body = 6 * (settings.max_secret_bytes + 4 * MAX_PASSPHRASE_CHARACTERS) + 1024, bytearray()
        if int(self.header.get(b"content-length", "0")) > limit:  # a number: uvicorn answers others with its 400
            raise ServiceError("too_large", TOO_LARGE)
        if b"content-length" in self.header and not getattr(self.uvicorn, "more_body", True):
            return await self.body()  # it is there, as usual: an alarm would take 5 us
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in self.stream():
                    body += chunk
                    if len(body) > limit:
                        raise ServiceError("too_large", TOO_LARGE)
        except TimeoutError:  # the connection ends, because the rest may yet come
            detail = f"The body did not come within {BODY_SECONDS:.0f} seconds."
            raise ServiceError("timeout", detail, {"Connection": "close"}) from None
        return bytes(body)

    async def creation(self) -> tuple[bytes, CreateSecret]:
        """The secret, and how to keep it. JSON unless PUT or labelled as bytes: curl labels what it sends as a form."""
        secret, query = await self.bounded_body(), dict(self.query_params) if self.scope["query_string"] else {}
        label = self.header.get(b"content-type", "").partition(";")[0].strip().lower()
        if label in RAW_TYPES or self.method == "PUT":
            options = CreateSecret(secret="", ttl_seconds=RawOptions.of(query).ttl_seconds)
        else:
            if query:
                Input.of(query)  # refuses ?ttl_seconds=60, which would be ignored beside a JSON body
            options = CreateSecret.of(secret, "JSON was expected; 'Content-Type: text/plain' takes a body as it is")
            text = options.secret
            try:
                secret = base64.b64decode(text, validate=True) if options.encoding else text.encode()
            except ValueError:
                raise invalid(InvalidField(loc=["body", "secret"], msg="This is not base64")) from None
        if not secret:
            raise invalid(InvalidField(loc=["body", "secret"], msg="The secret is empty"))
        if len(secret) > settings.max_secret_bytes:
            raise ServiceError("too_large", TOO_LARGE)
        return secret, options

    async def passphrase(self) -> str | None:
        body = b"" if self.method == "GET" else await self.bounded_body()  # which may be empty
        return PresentPassphrase.of(body, 'Expected {"passphrase": "..."}').passphrase if body else None

    def require_token(self) -> None:
        if not (tokens := settings.api_tokens.get_secret_value().encode()):
            return
        scheme, _, shown = self.header.get(b"authorization", "").encode("latin-1").partition(b" ")  # as it was sent
        known = any(hmac.compare_digest(shown.strip(), token.strip()) for token in tokens.split(b",") if token.strip())
        if not (known and scheme.lower() == b"bearer"):
            detail = "Creating a secret here needs a token: Authorization: Bearer ..."
            raise ServiceError("token_required", detail, {"WWW-Authenticate": "Bearer"})

    def wants_raw(self) -> bool:
        return self.header.get(b"accept", "").split(",")[0].partition(";")[0].strip().lower() in RAW_TYPES

    def wants_page(self) -> bool:
        """A browser's address bar, a prefetch or a link preview: it gets the page, which asks a person first."""
        get = self.header.get
        purposes = f"{get(b'sec-purpose')} {get(b'purpose')} {get(b'x-purpose')} {get(b'x-moz')}"
        return "prefetch" in purposes or "text/html" in get(b"accept", "") or bool(PREVIEW_BOT.search(self.user_agent))

    def public_url(self) -> str:
        return settings.public_url.rstrip("/") or f"{self.scope['scheme']}://{self.header.get(b'host', '')}"


# --- Application -------------------------------------------------------------------------------------------------
logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=settings.log_level.upper())
logging.getLogger("asyncio").setLevel(logging.INFO)  # at debug it names its selector, beside why a start is refused
under_way: Final = asyncio.Semaphore(MAX_REQUESTS)


class PlainRoute(APIRoute):
    """Its function takes the Call, returns a model or a response. FastAPI's own way took 25 us of a request's 150."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            here = [one for one in app.routes if isinstance(one, PlainRoute) and one.path == self.path]
            allowed = ", ".join(sorted(method for one in here for method in one.methods or ()))
            raise HTTPException(405, headers={"Allow": allowed})
        answer: BaseModel | Response = await self.endpoint(Call(scope, receive), **scope["path_params"])
        if not isinstance(answer, Response):  # with a newline, for the sake of terminals
            document = answer.model_dump_json(exclude_none=True)
            answer = Response(document + "\n", self.status_code or 200, media_type="application/json")
        await answer(scope, receive, send)


async def perimeter(scope: Scope, receive: Receive, send: Send) -> None:
    """What every request passes, in place of FastAPI's own wrappers: a limit, headers that forbid storing, errors made
    answers, and one log line, which has the route's template and never the path, because that holds the key."""
    if scope["type"] != "http":
        await app.router(scope, receive, send)
        return
    if scope["path"].startswith("/api/v1/"):
        scope["root_path"] += "/api/v1"  # the same routes once more, as behind a proxy that adds a prefix
    started, status, failure = time.perf_counter(), 0, ""

    async def send_marked(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            message["headers"] = [*message["headers"], *NO_STORE_HEADERS]
        await send(message)

    try:
        if under_way.locked():
            raise Unavailable("Too many requests are under way")
        async with under_way:
            await app.router(scope, receive, send_marked)
    except ClientDisconnect:
        status = 499  # as nginx has it: the caller went away. uvicorn, which may not know yet, wants an answer
        await Response(status_code=status)(scope, receive, send)
    except Exception as error:
        if isinstance(error, HTTPException) and error.headers:  # 405, ours and the documentation's
            allowed = error.headers["Allow"]
            error = ServiceError("method_not_allowed", f"There are only: {allowed}.", {"Allow": allowed})
        elif isinstance(error, HTTPException):
            error = ServiceError("not_found", "There is no such route.")
        elif not isinstance(error, ServiceError):  # told without its message, which may quote a value
            failure = f": {type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-3:]}"
            error = ServiceError("internal", "Something here is broken. It has been logged.")
        if not status:
            await problem(error)(scope, receive, send_marked)
    level = logging.WARNING if failure or status >= 500 else logging.DEBUG  # a line each costs a tenth of all requests
    if log.isEnabledFor(level):
        route, milliseconds = getattr(scope.get("route"), "path", "(no route)"), (time.perf_counter() - started) * 1000
        log.log(level, "%s %s %d %.1f ms%s", scope["method"], route, status, milliseconds, failure)


app = FastAPIOffline(
    title="One-Time Secrets", description="Keeps a secret encrypted and hands it out exactly once.", version="1.0.0",
    lifespan=lifespan, redirect_slashes=False, servers=[{"url": "/"}, {"url": "/api/v1"}], root_path_in_servers=False,
    telemetry={"tracing": False, "metrics": False, "logs": False},  # spans hold paths, and paths hold keys
)  # fmt: skip
for docs_page in app.routes:
    if isinstance(docs_page, APIRoute):
        docs_page.methods, docs_page.app = {"GET", "HEAD"}, AsyncExitStackMiddleware(docs_page.app)
app.router.route_class = PlainRoute
app.middleware_stack = perimeter


def errors(*codes: Code) -> dict[int | str, dict[str, Any]]:
    """A route's `responses=`: the errors that it may answer, by status; and what any call may meet."""
    responses: dict[int | str, dict[str, Any]] = {"default": {"model": Problem, "description": "internal"}}
    for code in codes:
        names = ", ".join(other for other in codes if STATUS[other] == STATUS[code])
        responses[STATUS[code]] = {"model": Problem, "description": names}
    return responses


HTML: Final = (Path(__file__).parent / "index.html").read_text("utf-8")
CURL_LINES: Final = HTML.partition("<pre>\n")[2].partition("</pre>")[0]  # shown without JavaScript, too
LIMITS: Final = settings.model_dump_json(include={"default_ttl_seconds", "max_ttl_seconds", "max_secret_bytes"})
PAGE: Final = HTMLResponse(re.sub("""(?<=name="limits" content=)'.*'""", f"'{LIMITS}'", HTML))

# --- Routes ------------------------------------------------------------------------------------------------------
TOKEN: Final = Depends(HTTPBearer(auto_error=False, scheme_name="token", description="where API_TOKENS is set"))
TTL_SCHEMA: Final = {"type": "integer", "minimum": 1, "maximum": settings.max_ttl_seconds}
TTL_QUERY: Final = {"name": "ttl_seconds", "in": "query", "schema": TTL_SCHEMA, "description": "not beside JSON"}
OPTIONAL: Final = {"parameters": [TTL_QUERY], "security": [{}]}  # the token, too
BYTES: Final = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
EXAMPLE: Final = {"secret": "hello", "passphrase": "tell it by telephone", "passphrase_scope": "read"}
JSON: Final = {"application/json": {"schema": CreateSecret.model_json_schema(), "example": EXAMPLE}}
POST_BODY: Final = {"requestBody": {"required": True, "content": JSON | dict.fromkeys(RAW_TYPES, BYTES)}, **OPTIONAL}
PUT_BODY: Final = {"requestBody": {"required": True, "content": {RAW_TYPES[0]: BYTES}}, **OPTIONAL}
CLAIM: Final = {"requestBody": {"content": {"application/json": {"schema": PresentPassphrase.model_json_schema()}}}}
BODY: Final[tuple[Code, ...]] = ("timeout", "too_large", "invalid")
GONE: Final[tuple[Code, ...]] = ("not_found", "already_read", "deleted", "expired", "unavailable")
GUARDED: Final[tuple[Code, ...]] = ("outcome_unknown", "passphrase_required", "wrong_passphrase", "too_many_attempts")
READING: Final[tuple[Code, ...]] = (*GONE, *GUARDED, "damaged")
CREATING: Final = errors("token_required", "rate_limited", *BODY, "unavailable")
STORE: Final[dict[str, Any]] = {"status_code": 201, "responses": CREATING, "dependencies": [TOKEN]}


@app.put("/secret", response_model=None, response_class=PlainTextResponse, openapi_extra=PUT_BODY, **STORE)
@app.post("/secret", response_model=SecretCreated, openapi_extra=POST_BODY, **STORE)
async def create_secret(call: Call) -> SecretCreated | Response:
    """Store a secret, and get the link that reads it once.

    The body of POST is JSON; labelled text/plain or application/octet-stream, or with PUT, it is the secret itself,
    byte for byte. PUT, and who accepts text/plain, gets the bare url."""
    call.require_token()
    secret, options = await call.creation()
    *keys, expires_at = await call.vault.create(secret, options, call)
    receipt_key, secret_key = (base64.urlsafe_b64encode(key).decode() for key in keys)
    url = f"{call.public_url()}/#{secret_key}"  # behind the #: browsers send that part to no server
    if call.method == "PUT" or call.wants_raw():
        return PlainTextResponse(url + "\n", 201)
    created = SecretCreated(secret_key=secret_key, receipt_key=receipt_key, expires_at=expires_at, url=url)
    if options.passphrase:
        created.passphrase_scope = options.passphrase_scope
    return created


@app.post("/secret/{secret_key}", response_model=SecretRead, responses=errors(*READING, *BODY), openapi_extra=CLAIM)
@app.get("/secret/{secret_key}", response_model=SecretRead, responses=errors(*READING))
async def read_secret(call: Call, secret_key: KeyInPath) -> SecretRead | Response:
    """Read a secret. This ends it: a second read says when the first one was.

    GET from a browser's address bar, a prefetch and a link preview gets a page instead, and ends nothing. Who accepts
    text/plain gets the bare secret."""
    if call.method == "GET" and call.wants_page():
        return PAGE
    secret = await call.vault.claim(SecretKey(parse_key(secret_key)), "read", call, await call.passphrase())
    try:
        answer = SecretRead(secret=secret.decode())
    except UnicodeDecodeError:
        answer = SecretRead(secret=base64.b64encode(secret).decode(), encoding="base64")
    if call.wants_raw():
        return Response(secret, media_type="application/octet-stream" if answer.encoding else "text/plain")
    return answer


@app.delete("/secret/{secret_key}", responses=errors(*GONE, *GUARDED, *BODY), openapi_extra=CLAIM)
async def delete_secret(call: Call, secret_key: KeyInPath) -> SecretDeleted:
    """Destroy a secret unread. A secret with a passphrase needs it."""
    await call.vault.claim(SecretKey(parse_key(secret_key)), "deleted", call, await call.passphrase())
    return SecretDeleted()


@app.get("/secret/{secret_key}/status", responses=errors(*GONE))
async def secret_status(call: Call, secret_key: KeyInPath) -> SecretStatus:
    """Look whether a secret can still be read, without reading it."""
    unread = await call.vault.look(secret_id_of(SecretKey(parse_key(secret_key))))
    return SecretStatus(expires_at=unread.expires_at, passphrase_required=unread.guards("read"))


@app.get("/receipt/{receipt_key}", responses=errors("not_found", "unavailable"))
async def show_receipt(call: Call, receipt_key: KeyInPath) -> Receipt:
    """What became of a secret, for its creator: read when, from which address, by what. Also after it is gone."""
    return await call.vault.history(secret_id_of(secret_key_of(ReceiptKey(parse_key(receipt_key)))))


@app.delete("/receipt/{receipt_key}", responses=errors(*GONE, "outcome_unknown"))
async def revoke_secret(call: Call, receipt_key: KeyInPath) -> SecretDeleted:
    """Destroy a secret unread, as its creator: no passphrase is asked for."""
    await call.vault.claim(secret_key_of(ReceiptKey(parse_key(receipt_key))), "deleted", call, None, by="receipt_key")
    return SecretDeleted()


@app.head("/", include_in_schema=False)
@app.get("/", response_class=PlainTextResponse)
async def home(call: Call) -> Response:
    """curl lines for this very host; a browser gets the page for people. Needs no store: ask here whether it lives."""
    if "text/html" in call.header.get(b"accept", ""):
        return PAGE
    return PlainTextResponse(CURL_LINES.replace("URL", call.public_url()))


@app.head("/health", include_in_schema=False)
@app.get("/health", responses=errors("unavailable"))
async def health(call: Call) -> Health:
    """Whether the service can serve: `degraded` without Redis, 503 without a PostgreSQL that takes writes."""
    redis = await call.vault.health()
    return Health(status="ok" if redis else "degraded", redis="up" if redis else "down")


app.router.routes.sort(key=lambda route: not isinstance(route, PlainRoute))  # ours first: asked for more often
for path in app.openapi()["paths"].values():  # FastAPI's, and kept; but it gives errors the media type of answers
    for operation in path.values():
        for status, response in operation["responses"].items():
            if status >= "400":
                response["content"] = {"application/problem+json": response["content"].popitem()[1]}


def main() -> None:
    async def check_start() -> None:  # what keeps the service from starting is told once, and not by every worker
        async with lifespan(app):
            pass

    asyncio.run(check_start())
    listening: dict[str, Any] = settings.model_dump(include={"host", "port", "workers", "forwarded_allow_ips"})
    hidden: dict[str, Any] = {"ws": "none", "access_log": False, "log_config": None, "server_header": False}
    uvicorn.run("main:app", **listening, **hidden, timeout_graceful_shutdown=7)  # seconds; orchestrators kill at 10


if __name__ == "__main__":
    main()
