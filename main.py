"""One-Time Secrets: an HTTP service that keeps a secret encrypted and hands it out exactly once.

DESIGN

A secret's life. POST /secret makes a receipt_key, derives the secret_key (the link) from it and an id from that,
encrypts the secret under a fresh data_key, wraps the data_key under a key that needs the link *and* the operator's
encryption_key, and inserts one row. A read deletes the row in one statement that also logs the read, and meanwhile
takes the cached wrapped_key (GETDEL: one reader gets it) and opens the cached copy. The row decides: no row back, no
secret, whatever the cache said.

Who decides what.
    PostgreSQL secrets      can it still be read? One row a live secret; `delete ... returning` commits every end
    PostgreSQL secret_logs  what happened to it? One row an event, written by the statement that makes it happen
    Redis                   nothing. It is a cache: losing it loses no secret, a stale copy reads no secret twice

What a thief gets. From a dump of PostgreSQL, of Redis, of the logs and the encryption_key together: sizes, times,
addresses, and no secret, because every data_key is wrapped under its link, which is stored nowhere. From a link
alone: one read, which the rightful reader will notice.

Words.
    secret          what somebody wants to hand over; bytes, usually text
    secret_key      the bearer's key, the part of the link that opens a secret; never stored, never logged
    receipt_key     its creator's key: shows the history, revokes; the secret_key is derived from it, never the reverse
    encryption_key  the operator's Fernet key; passphrase: a person's, guards deletion and, if asked for, reading
    claim           to end a secret for one caller: by reading it or by deleting it
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
import time
import traceback
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Final, Generic, Literal, NewType, TypeAlias, TypeVar, cast
from uuid import UUID

import asyncpg
import uvicorn
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from hiredis import pack_command
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log: Final = logging.getLogger("one-time-secrets")

# --- Constants ---------------------------------------------------------------------------------------------------

KEY_BYTES: Final = 24  # 32 characters of base64 without padding
TIME_BYTES: Final = 4  # of those: the second of creation. The other 20 (160 bits) are beyond guessing
KEY_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]{32}")
SECRET_KEY_LABEL: Final = b"one-time-secrets secret key"  # HKDF labels: each derivation has its own, so that
WRAPPING_LABEL: Final = b"one-time-secrets wrapping key"  # no key is ever used for two purposes
VERIFIER_LABEL: Final = b"one-time-secrets passphrase verifier"
FINGERPRINT_LABEL: Final = b"one-time-secrets fingerprint"
FINGERPRINT_HEX_DIGITS: Final = 16  # names one of an operator's few keys; a one-way hash of 256 random bits

# OWASP Password Storage Cheat Sheet, second Argon2id profile: about 25 ms and 19 MiB a guess.
ARGON2_MEMORY_KIB: Final = 19 * 1024
ARGON2_ITERATIONS: Final = 2
ARGON2_LANES: Final = 1
ARGON2_BYTES: Final = 64  # one half wraps the data_key, the other becomes the verifier
SALT_BYTES: Final = 16
MAX_PASSPHRASE_CHARACTERS: Final = 1024
FIELD_PATTERN: Final = re.compile(r"[A-Za-z_0-9]{1,32}")  # what an error may repeat of a field's name

ATTEMPT_LIMIT: Final = 5  # passphrase attempts a secret in ATTEMPT_WINDOW_MINUTES, whoever asks
ATTEMPT_WINDOW_MINUTES: Final = 15
DENIALS_LOGGED: Final = 20  # `denied` rows a secret in the same window: a flood of guesses must not fill the disk
USER_AGENT_CHARACTERS: Final = 200

POSTGRES_WAIT_SECONDS: Final = 30.0  # at start: a database that boots beside us gets this long
POSTGRES_TIMEOUT_SECONDS: Final = 2.0  # twice this at worst (a batch, and the wait for the one before) is a 503's delay
POSTGRES_CONNECTIONS: Final = 8  # a worker: what the batches below can use, and a few for everything else
REDIS_TIMEOUT_SECONDS: Final = 0.25  # what a request may lose to a hung cache ...
REDIS_PAUSE_SECONDS: Final = 3.0  # ... and how long the cache is then left alone
REDIS_CONNECTIONS: Final = 16
OWED_KEYS: Final = 10_000  # wrapped keys to drop once Redis is back; what is beyond that waits for its TTL
RETRY_AFTER_SECONDS: Final = 2  # what a 503 asks of the caller

BATCH_ROWS: Final = 128  # rows in one statement
CLAIM_PAUSES_SECONDS: Final = (0.02, 0.04, 0.08, 0.16, 0.32, 0.0)  # after each try for a row that another holds
CLEANUP_ROWS: Final = 1000  # expired rows in one statement: some 20 ms of work
QUOTA_WINDOW_SECONDS: Final = 60
SHUTDOWN_SECONDS: Final = 7  # for requests in flight after SIGTERM; orchestrators kill at 10

MAX_HEAD_BYTES: Final = 64 * 1024  # request line and headers; a head that exceeds it ends with the next read
MAX_PIPELINED_REQUESTS: Final = 100  # behind the one that is being answered; browsers and curl send none
MAX_UNREAD_BYTES: Final = 16 * 1024 * 1024  # of a body that was refused: many clients hear a 413 only after sending all

API_PREFIX: Final = "/api/v1"
RAW_TYPES: Final = frozenset({"text/plain", "application/octet-stream"})
PREFETCH_HEADERS: Final = frozenset({b"sec-purpose", b"purpose", b"x-purpose", b"x-moz"})
PREVIEW_BOTS: Final = re.compile(
    b"Slackbot|Slack-ImgProxy|TelegramBot|WhatsApp|Discordbot|facebookexternalhit|Facebot|meta-external|Twitterbot|"
    b"LinkedInBot|SkypeUriPreview|Microsoft Office|ms-office|MSOffice|Teams|SafeLinks|BingPreview|bingbot|Google|"
    b"Applebot|Mastodon|redditbot|Pinterest|vkShare|Viber|Iframely|Embedly|bot[/;)]|crawler|spider|preview",
    re.IGNORECASE,
)
NO_STORE_HEADERS: Final = (
    (b"cache-control", b"no-cache, no-store, must-revalidate"),
    (b"pragma", b"no-cache"),
    (b"expires", b"0"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-robots-tag", b"noindex"),
)

# --- Settings ----------------------------------------------------------------------------------------------------


class Settings(BaseSettings):
    """What the operator configures, by environment variables of the same names or a `.env` file."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")

    postgres_host: str = "localhost"  # a socket folder works too, and several hosts with commas between them
    postgres_port: Annotated[int, Field(ge=1, le=65535)] = 5432
    postgres_db: str = "secrets"
    postgres_user: str = "secrets"
    postgres_password: SecretStr | None = None
    redis_host: str = "localhost"
    redis_port: Annotated[int, Field(ge=1, le=65535)] = 6379
    redis_url: SecretStr | None = None  # wins over host and port; may hold a password
    encryption_key: SecretStr | None = None  # Fernet keys with commas between them, newest first
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
    def _default_fits_maximum(self) -> "Settings":
        if self.default_ttl_seconds > self.max_ttl_seconds:
            raise ValueError("DEFAULT_TTL_SECONDS is larger than MAX_TTL_SECONDS")
        return self

    @field_validator("redis_url")
    @classmethod
    def _redis_url_is_one(cls, url: SecretStr | None) -> SecretStr | None:
        with suppress(ValueError):
            if url:
                ConnectionPool.from_url(url.get_secret_value())
            return url
        raise ValueError("not a redis://, rediss:// or unix:// URL")

    @cached_property
    def tokens(self) -> list[bytes]:
        return [token.strip().encode() for token in self.api_tokens.get_secret_value().split(",") if token.strip()]


def load_settings() -> Settings:
    """Exits with one line that names the variable; its value may be a password, so it is never shown."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = f"{first['loc'][0]}: ".upper() if first["loc"] else ""
        raise SystemExit(f"{name}{first['msg'].removeprefix('Value error, ')}") from None


settings: Final = load_settings()

# --- Types and errors --------------------------------------------------------------------------------------------

ReceiptKey = NewType("ReceiptKey", bytes)
SecretKey = NewType("SecretKey", bytes)
SecretId = NewType("SecretId", UUID)
PassphraseScope = Literal["delete", "read"]
Timestamp = Annotated[datetime, Field(examples=["2026-11-22T03:49:39.963690Z"])]


class Action(StrEnum):
    """What secret_logs records."""

    CREATED = "created"
    READ = "read"
    DELETED = "deleted"
    EXPIRED = "expired"
    DENIED = "denied"


class Code(StrEnum):
    """Every error that a caller can see, each with its HTTP status."""

    status: int

    def __new__(cls, name: str, status: int) -> "Code":
        code = str.__new__(cls, name)
        code._value_ = name
        code.status = status
        return code

    MALFORMED = "malformed", 400
    TOKEN_REQUIRED = "token_required", 401
    PASSPHRASE_REQUIRED = "passphrase_required", 403
    WRONG_PASSPHRASE = "wrong_passphrase", 403
    NOT_FOUND = "not_found", 404
    METHOD_NOT_ALLOWED = "method_not_allowed", 405
    ALREADY_READ = "already_read", 410
    DELETED = "deleted", 410
    EXPIRED = "expired", 410
    TOO_LARGE = "too_large", 413
    INVALID = "invalid", 422
    TOO_MANY_ATTEMPTS = "too_many_attempts", 429
    RATE_LIMITED = "rate_limited", 429
    DAMAGED = "damaged", 500
    INTERNAL = "internal", 500
    UNAVAILABLE = "unavailable", 503


GONE: Final = (Code.NOT_FOUND, Code.ALREADY_READ, Code.DELETED, Code.EXPIRED)
GUARDED: Final = (Code.PASSPHRASE_REQUIRED, Code.WRONG_PASSPHRASE, Code.TOO_MANY_ATTEMPTS)


class ServiceError(Exception):
    """What a caller is told: a code, a sentence, further members of the problem document. None of it is ever input.

    `retry_after_seconds` becomes the Retry-After header."""

    def __init__(self, code: Code, detail: str, *, retry_after_seconds: int | None = None, **members: object) -> None:
        super().__init__(detail)
        self.code, self.detail, self.members = code, detail, members
        self.retry_after_seconds = retry_after_seconds


def unavailable(
    detail: str = "The database cannot answer right now; nothing has happened to the secret.",
) -> ServiceError:
    return ServiceError(Code.UNAVAILABLE, detail, retry_after_seconds=RETRY_AFTER_SECONDS)


def not_found() -> ServiceError:
    return ServiceError(Code.NOT_FOUND, "No secret with this secret_key was ever here, or its history has ended.")


def gone(action: Action, ended_at: datetime) -> ServiceError:
    """The 410 for a secret that was here."""
    code, event = {
        Action.READ: (Code.ALREADY_READ, "was read at {}. If that was not you, treat the secret as compromised."),
        Action.DELETED: (Code.DELETED, "was deleted at {}."),
        Action.EXPIRED: (Code.EXPIRED, "expired at {}."),
    }[action]
    when = ended_at.isoformat().replace("+00:00", "Z")
    return ServiceError(code, f"This secret {event.format(when)}", ended_at=when)


def rate_limited() -> ServiceError:
    seconds = QUOTA_WINDOW_SECONDS - int(time.time()) % QUOTA_WINDOW_SECONDS
    detail = f"Your address has stored its quota for this minute. Try again in {seconds} seconds."
    return ServiceError(Code.RATE_LIMITED, detail, retry_after_seconds=seconds)


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks, for the log."""

    ip_address: str | None
    user_agent: str


@dataclass(frozen=True, slots=True)
class PassphraseLock:
    """What is stored of a passphrase: recognises it beside the link, offers nothing to guess against without."""

    scope: PassphraseScope
    salt: bytes = field(repr=False)
    verifier: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewSecret:
    """A row to insert, sealed already."""

    id: SecretId
    ciphertext: bytes = field(repr=False)
    wrapped_key: bytes = field(repr=False)
    key_fingerprint: str
    lock: PassphraseLock | None
    ttl_seconds: int
    client: Client


@dataclass(frozen=True, slots=True)
class Unread:
    """A secret that can still be read. `attempts_reset_seconds`: until passphrase attempts are counted anew."""

    expires_at: datetime
    passphrase_scope: PassphraseScope | None
    attempts_reset_seconds: int

    def guards(self, action: Action) -> bool:
        return self.passphrase_scope == "read" or (self.passphrase_scope == "delete" and action is Action.DELETED)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A passphrase attempt that has been charged and may now be checked."""

    lock: PassphraseLock
    key_fingerprint: str
    attempts_left: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A wish to end a secret. `authorized`: its passphrase was shown, or is not asked for."""

    id: SecretId
    secret_key: SecretKey = field(repr=False)
    action: Literal[Action.READ, Action.DELETED]
    client: Client
    by: Literal["secret_key", "receipt_key"] = "secret_key"
    authorized: bool = False
    passphrase_key: bytes = field(default=b"", repr=False)


class ReceiptEvent(BaseModel):
    """One thing that happened to the secret. `by`: the key that was shown; `reason`: why it was denied."""

    action: Action
    created_at: Timestamp
    ip_address: Annotated[str | None, Field(examples=["192.0.2.1"])]
    user_agent: Annotated[str | None, Field(examples=["curl/8.14.1"])] = None
    by: Literal["secret_key", "receipt_key"] | None = None
    reason: str | None = None


class Receipt(BaseModel):
    """What became of a secret, as far as the log goes back."""

    status: Literal["unread", "read", "deleted", "expired"]
    created_at: Timestamp
    expires_at: Timestamp
    events: list[ReceiptEvent]


# --- Cryptography ------------------------------------------------------------------------------------------------
#
#     receipt_key --HKDF--> secret_key --SHA-256--> id            each arrow is one-way
#
#     ciphertext  = Fernet(data_key).encrypt(secret)                            data_key: fresh for every secret
#     wrapped_key = Fernet(wrapping key).encrypt(data_key)
#     wrapping key = HKDF(secret_key + passphrase_key, salt = encryption_key, info = label + id)
#
# The wrapping key needs the link and the operator's key together: a dump lacks the link, a stolen link cannot be
# tried offline. The id in it ties a wrapped_key to its row: swapped between rows, neither opens.


@dataclass(frozen=True, slots=True)
class EncryptionKey:
    """One of the operator's keys: 32 raw bytes, and the name by which a row refers to it."""

    raw: bytes = field(repr=False)
    fingerprint: str


def parse_encryption_keys(text: str) -> tuple[EncryptionKey, ...]:
    """Fernet keys (44 characters of url-safe base64), comma-separated, newest first: the first wraps, any unwraps.

    Raises ValueError, without the text, when it holds no key or something else."""
    keys = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            Fernet(part)
        except ValueError:
            raise ValueError("not a list of Fernet keys") from None
        raw = base64.urlsafe_b64decode(part)
        fingerprint = hashlib.sha256(FINGERPRINT_LABEL + raw).hexdigest()[:FINGERPRINT_HEX_DIGITS]
        keys.append(EncryptionKey(raw, fingerprint))
    if not keys:
        raise ValueError("no Fernet key in it")
    return tuple(keys)


def new_receipt_key() -> ReceiptKey:
    """Time, then randomness. All three keys begin with the time, so that ids come in order and a table's index grows at
    its end: with millions of log rows, an insert under random ids takes half as long again."""
    return ReceiptKey(int(time.time()).to_bytes(TIME_BYTES) + os.urandom(KEY_BYTES - TIME_BYTES))


def secret_key_of(receipt_key: ReceiptKey) -> SecretKey:
    derived = HKDF(SHA256(), KEY_BYTES - TIME_BYTES, salt=None, info=SECRET_KEY_LABEL).derive(receipt_key)
    return SecretKey(receipt_key[:TIME_BYTES] + derived)


def secret_id_of(secret_key: SecretKey) -> SecretId:
    """The time, then 12 bytes of SHA-256, in the form of a uuid: names the row, the Redis keys, the log rows."""
    digest = hashlib.sha256(secret_key).digest()
    return SecretId(UUID(bytes=secret_key[:TIME_BYTES] + digest[: 16 - TIME_BYTES]))


def key_text(key: SecretKey | ReceiptKey) -> str:
    """As it stands in links and answers: 32 characters of url-safe base64."""
    return base64.urlsafe_b64encode(key).decode()


def _wrapping(key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes) -> Fernet:
    info = WRAPPING_LABEL + secret_id_of(secret_key).bytes
    derived = HKDF(SHA256(), 32, salt=key.raw, info=info).derive(secret_key + passphrase_key)
    return Fernet(base64.urlsafe_b64encode(derived))


def seal(secret: bytes, key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes = b"") -> tuple[bytes, bytes]:
    """Encrypt under a fresh data_key; returns (ciphertext, wrapped_key), both Fernet tokens."""
    data_key = Fernet.generate_key()
    return Fernet(data_key).encrypt(secret), _wrapping(key, secret_key, passphrase_key).encrypt(data_key)


def unseal(
    ciphertext: bytes, wrapped_key: bytes, key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes = b""
) -> bytes:
    """Undo seal(). Raises cryptography.fernet.InvalidToken when either token was altered, cut or swapped."""
    return Fernet(_wrapping(key, secret_key, passphrase_key).decrypt(wrapped_key)).decrypt(ciphertext)


def stretch(passphrase: str, salt: bytes) -> tuple[bytes, bytes]:
    """Argon2id, about 25 ms and 19 MiB (it releases the GIL: call it in a thread).

    Returns two independent halves: the passphrase_key, and the half that becomes the verifier. NFKC first, so that
    an accent typed on a phone and on a laptop is the same passphrase (NIST SP 800-63B, 3.1.1.2)."""
    argon2 = Argon2id(
        salt=salt, length=ARGON2_BYTES, iterations=ARGON2_ITERATIONS, lanes=ARGON2_LANES, memory_cost=ARGON2_MEMORY_KIB
    )
    output = argon2.derive(unicodedata.normalize("NFKC", passphrase).encode())
    return output[: ARGON2_BYTES // 2], output[ARGON2_BYTES // 2 :]


def verifier_of(verifier_half: bytes, key: EncryptionKey, secret_key: SecretKey) -> bytes:
    """What is stored. Keyed with the link: without it a dump cannot tell a right guess from a wrong one."""
    return hmac.digest(key.raw + secret_key, VERIFIER_LABEL + verifier_half, "sha256")


# --- PostgreSQL --------------------------------------------------------------------------------------------------
#
# One function, one statement, one transaction: the rows that come back are the answer. All times are the server's.

# Every statement finds its rows by primary key or by expiry. A plan made while the tables were small would read them
# whole, and stay in use while they grow.
SESSION: Final = {
    "application_name": "one-time-secrets",
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
PostgresConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
POSTGRES_ERRORS: Final = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


class Database:
    """A few connections, each for one statement at a time. asyncpg's own pool took a sixth of a statement's time."""

    def __init__(self) -> None:
        self._idle: list[PostgresConnection] = []
        self._places = asyncio.Semaphore(POSTGRES_CONNECTIONS)
        self._patience = timedelta(0)

    async def set_clock(self) -> None:
        """Learn by how much PostgreSQL's clock is ahead of ours."""
        now: datetime = (await self.fetch_or_fail("select now()"))[0]["now"]
        self._patience = now - datetime.now(UTC) + timedelta(seconds=POSTGRES_TIMEOUT_SECONDS)

    def deadline(self) -> datetime:
        """By PostgreSQL's clock, when the caller of a statement that starts now has given up. A hung server executes
        what lies in its socket once it wakes, and must then change nothing: nobody hears its answer."""
        return datetime.now(UTC) + self._patience

    async def fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Run one statement. Whatever keeps PostgreSQL from answering raises UNAVAILABLE."""
        try:
            return await self.fetch_or_fail(statement, *arguments)
        except POSTGRES_ERRORS as error:
            log.warning("PostgreSQL cannot answer: %s", type(error).__name__)  # its message may quote a value
            raise unavailable() from None

    async def fetch_or_fail(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """The same, but raises what asyncpg raises, all of it in POSTGRES_ERRORS."""
        async with asyncio.timeout(POSTGRES_TIMEOUT_SECONDS), self._places:
            while self._idle and self._idle[-1].is_closed():
                self._idle.pop()
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                rows = await connection.fetch(statement, *arguments)
            except BaseException:
                connection.terminate()  # its state is unknown, and a hung server would hold up a polite end
                raise
            self._idle.append(connection)
            return rows

    async def _connect(self) -> PostgresConnection:
        password = settings.postgres_password
        return await asyncpg.connect(
            host=settings.postgres_host.split(","),
            port=settings.postgres_port,
            database=settings.postgres_db,
            user=settings.postgres_user,
            password=password.get_secret_value() if password else None,
            server_settings=SESSION,
        )

    async def wait(self) -> None:
        """Waits up to POSTGRES_WAIT_SECONDS for a server that starts beside us; then raises one of POSTGRES_ERRORS."""
        deadline = time.monotonic() + POSTGRES_WAIT_SECONDS
        while True:
            try:
                await self.set_clock()
                return
            except POSTGRES_ERRORS:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)

    def close(self) -> None:
        for connection in self._idle:
            connection.terminate()


async def check_schema(database: Database) -> None:
    """Raises asyncpg.UndefinedTableError or UndefinedColumnError when schema.sql was not loaded or is older."""
    await database.fetch_or_fail("""
        select secrets.id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
               passphrase_scope, attempts, attempts_since, secrets.created_at, expires_at,
               secret_logs.id, secret_id, action, ip_address, secret_logs.created_at, extra_data,
               fingerprint, first_used_at
        from secrets, secret_logs, encryption_keys
        where false
    """)


async def register_key(database: Database, fingerprints: Sequence[str]) -> str | None:
    """Note that the first of these keys wraps secrets from now on. Returns the fingerprint of a missing key: one that
    is not among them although live rows name it."""
    statement = """
        with newest as (
            insert into encryption_keys (fingerprint) values (($1::text[])[1]) on conflict do nothing
        )
        select fingerprint from encryption_keys
        where fingerprint <> all($1)
          and exists (select from secrets where key_fingerprint = fingerprint and expires_at > now())
    """
    rows = await database.fetch_or_fail(statement, fingerprints)
    return rows[0]["fingerprint"] if rows else None


async def insert_secrets(database: Database, new: Sequence[NewSecret]) -> dict[SecretId, datetime]:
    """Insert the rows and log `created`, all or (past the deadline) none. Returns expires_at by id."""
    statement = """
        with new as (
            select * from unnest(
                $1::uuid[], $2::bytea[], $3::bytea[], $4::text[], $5::bytea[], $6::bytea[], $7::text[],
                $8::int[], $9::text[], $10::text[]
            ) as new (
                id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier, passphrase_scope,
                ttl_seconds, ip_address, user_agent
            )
            where now() < $11
        ), logged as (
            insert into secret_logs (secret_id, action, ip_address, extra_data)
            select id, 'created', ip_address::inet, jsonb_strip_nulls(jsonb_build_object(
                'user_agent', user_agent, 'ttl_seconds', ttl_seconds, 'passphrase', passphrase_scope
            ))
            from new
        )
        insert into secrets (
            id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier, passphrase_scope,
            expires_at
        )
        select id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier, passphrase_scope,
               now() + make_interval(secs => ttl_seconds)
        from new
        returning id, expires_at
    """
    locks = [row.lock for row in new]
    rows = await database.fetch(
        statement,
        [row.id for row in new],
        [row.ciphertext for row in new],
        [row.wrapped_key for row in new],
        [row.key_fingerprint for row in new],
        [lock and lock.salt for lock in locks],
        [lock and lock.verifier for lock in locks],
        [lock and lock.scope for lock in locks],
        [row.ttl_seconds for row in new],
        [row.client.ip_address for row in new],
        [row.client.user_agent for row in new],
        database.deadline(),
    )
    return {row["id"]: row["expires_at"] for row in rows}


async def claim_secrets(
    database: Database, claims: Sequence[Claim], fingerprints: Sequence[str]
) -> dict[int, asyncpg.Record]:
    """End each claimed secret for one caller and log it: the commit point of every read and delete.

    Returns (ciphertext, wrapped_key, key_fingerprint) of the winners by position in `claims`. Of several claims on one
    row PostgreSQL takes one: it deletes a row once. A row that another transaction holds is skipped, because batches
    that wait for each other's rows deadlock. Rows under an encryption_key that this process lacks (a rotation under
    way) are left to those who can open them."""
    statement = """
        with claim as (
            select * from unnest($1::uuid[], $2::text[], $3::bool[], $4::text[], $5::text[], $6::text[])
                with ordinality as claim (id, action, authorized, ip_address, user_agent, by, number)
        ), candidate as (
            select claim.*
            from claim
            cross join lateral (  -- a plain join lets the planner come by the index on expires_at, past every dead row
                select * from secrets where secrets.id = claim.id for update skip locked
            ) as held
            where now() < $8
              and held.expires_at > now()
              and held.key_fingerprint = any($7::text[])
              and (
                  claim.authorized
                  or held.passphrase_scope is null
                  or (held.passphrase_scope = 'delete' and claim.action = 'read')
              )
        ), claimed as (
            delete from secrets
            using candidate
            where secrets.id = candidate.id
            returning candidate.*, secrets.ciphertext, secrets.wrapped_key, secrets.key_fingerprint
        ), logged as (
            insert into secret_logs (secret_id, action, ip_address, extra_data)
            select id, action, ip_address::inet, jsonb_build_object('user_agent', user_agent, 'by', by) from claimed
        )
        select number, ciphertext, wrapped_key, key_fingerprint from claimed
    """
    rows = await database.fetch(
        statement,
        [claim.id for claim in claims],
        [claim.action for claim in claims],
        [claim.authorized for claim in claims],
        [claim.client.ip_address for claim in claims],
        [claim.client.user_agent for claim in claims],
        [claim.by for claim in claims],
        fingerprints,
        database.deadline(),
    )
    return {row["number"] - 1: row for row in rows}  # ordinality counts from 1


async def find_unread(database: Database, secret_id: SecretId) -> Unread:
    """Look without touching. Raises NOT_FOUND, ALREADY_READ, DELETED or EXPIRED, as the log has it."""
    statement = """
        select
            secrets.expires_at,
            secrets.passphrase_scope,
            extract(epoch from secrets.attempts_since + make_interval(mins => $2) - now()) as attempts_reset_seconds,
            case when secrets.expires_at <= now() then 'expired' else ended.action end as ended,
            coalesce(ended.ended_at, secrets.expires_at) as ended_at
        from (select $1::uuid as id) as wanted
        left join secrets on secrets.id = wanted.id
        left join lateral (
            select action, coalesce((extra_data ->> 'expires_at')::timestamptz, created_at) as ended_at
            from secret_logs
            where secret_id = wanted.id and action in ('read', 'deleted', 'expired')
            order by secret_logs.id desc limit 1
        ) as ended on secrets.id is null
    """
    row = (await database.fetch(statement, secret_id, ATTEMPT_WINDOW_MINUTES))[0]
    if row["ended"]:
        raise gone(Action(row["ended"]), row["ended_at"])
    if not row["expires_at"]:
        raise not_found()
    return Unread(row["expires_at"], row["passphrase_scope"], math.ceil(max(1, row["attempts_reset_seconds"])))


async def find_history(database: Database, secret_id: SecretId) -> Receipt:
    """What the log has of a secret, oldest first. Raises NOT_FOUND when it has nothing (any more)."""
    statement = """
        select action, created_at, host(ip_address) as ip_address, extra_data ->> 'user_agent' as user_agent,
               extra_data ->> 'by' as by, extra_data ->> 'reason' as reason,
               created_at + make_interval(secs => (extra_data ->> 'ttl_seconds')::int) as expires_at, now()
        from secret_logs
        where secret_id = $1
        order by id
    """
    rows = await database.fetch(statement, secret_id)
    if not rows or rows[0]["action"] != Action.CREATED:
        raise not_found()
    created_at, expires_at, now = (rows[0][name] for name in ("created_at", "expires_at", "now"))
    events = [ReceiptEvent.model_validate(dict(row)) for row in rows]
    ends = [event.action for event in events if event.action in (Action.READ, Action.DELETED, Action.EXPIRED)]
    status = ends[-1] if ends else Action.EXPIRED if expires_at <= now else "unread"
    return Receipt.model_validate(
        {"status": str(status), "created_at": created_at, "expires_at": expires_at, "events": events}
    )


async def charge_attempt(database: Database, secret_id: SecretId) -> Attempt | None:
    """Charge a passphrase attempt *before* it is checked: a hundred at once must not be checked for the price of one.

    None: the limit is reached, or there is no such secret. Success resets nothing: it ends the row."""
    statement = """
        update secrets
        set attempts = case when attempts_since > now() - make_interval(mins => $2) then attempts + 1 else 1 end,
            attempts_since =
                case when attempts_since > now() - make_interval(mins => $2) then attempts_since else now() end
        where id = $1
          and expires_at > now()
          and passphrase_scope is not null
          and (attempts < $3 or attempts_since <= now() - make_interval(mins => $2))
        returning passphrase_scope, passphrase_salt, passphrase_verifier, key_fingerprint, $3 - attempts
    """
    rows = await database.fetch(statement, secret_id, ATTEMPT_WINDOW_MINUTES, ATTEMPT_LIMIT)
    if not rows:
        return None
    scope, salt, verifier, key_fingerprint, attempts_left = rows[0]
    return Attempt(PassphraseLock(scope, salt, verifier), key_fingerprint, attempts_left)


async def log_denied(database: Database, claim: Claim, reason: Code) -> None:
    """Log a refusal, unless DENIALS_LOGGED of them tell the story already."""
    statement = """
        insert into secret_logs (secret_id, action, ip_address, extra_data)
        select $1, 'denied', $2::text::inet,
               jsonb_build_object('user_agent', $3::text, 'reason', $4::text, 'wanted', $5::text)
        where (
            select count(*) from secret_logs
            where secret_id = $1 and action = 'denied' and created_at > now() - make_interval(mins => $6)
        ) < $7
    """
    client, limits = claim.client, (ATTEMPT_WINDOW_MINUTES, DENIALS_LOGGED)
    await database.fetch(statement, claim.id, client.ip_address, client.user_agent, reason, claim.action, *limits)


async def delete_expired(database: Database) -> list[SecretId]:
    """End and log up to CLEANUP_ROWS expired secrets, past those that a claim or another worker's loop holds."""
    statement = """
        with candidate as (
            select id from secrets where expires_at <= now() order by expires_at limit $1 for update skip locked
        ), expired as (
            delete from secrets using candidate where secrets.id = candidate.id
            returning secrets.id, secrets.expires_at
        )
        insert into secret_logs (secret_id, action, extra_data)
        select id, 'expired', jsonb_build_object('expires_at', expires_at) from expired
        returning secret_id
    """
    return [row["secret_id"] for row in await database.fetch(statement, CLEANUP_ROWS)]


async def delete_old_logs(database: Database) -> int:
    """End up to CLEANUP_ROWS log rows past their retention. The lowest ids are the oldest: no index on time needed."""
    statement = """
        with oldest as (
            select id, created_at from secret_logs order by id limit $1 for update skip locked
        )
        delete from secret_logs using oldest
        where secret_logs.id = oldest.id and oldest.created_at < now() - make_interval(days => $2)
        returning secret_logs.id
    """
    return len(await database.fetch(statement, CLEANUP_ROWS, settings.log_retention_days))


# --- Redis -------------------------------------------------------------------------------------------------------
#
#     secret:{ID}          ciphertext, CACHE_SECONDS from creation, whatever happens to the secret
#     key:{ID}             wrapped_key, until the secret's expiry; not for secrets whose reading needs a passphrase
#     quota:{IP}:MINUTE    KiB stored in that minute
#
# The ciphertext outlives a read; by then it is noise, because its key went with GETDEL. The braces keep both keys of a
# secret in one slot of a cluster.

RedisCommand: TypeAlias = tuple[str | bytes | int, ...]


def ciphertext_name(secret_id: SecretId) -> str:
    return f"secret:{{{secret_id}}}"


def wrapped_key_name(secret_id: SecretId) -> str:
    return f"key:{{{secret_id}}}"


@lru_cache(maxsize=4096)
def quota_address(ip_address: str | None) -> str:
    """An IPv6 caller usually has a whole /64: it counts as one."""
    if ip_address is None or ":" not in ip_address:
        return str(ip_address)
    return str(ipaddress.ip_network((ip_address, 64), strict=False))


class Cache:
    """Redis, on whose answer nothing depends: one short timeout, then it is left alone for a few seconds."""

    def __init__(self) -> None:
        url = settings.redis_url
        self._pool = ConnectionPool.from_url(
            url.get_secret_value() if url else f"redis://{settings.redis_host}:{settings.redis_port}",
            socket_timeout=None,  # run() has a timeout for the whole exchange
            retry=Retry(NoBackoff(), 0),
        )
        self._idle: list[AbstractConnection] = []
        self._places = asyncio.Semaphore(REDIS_CONNECTIONS)
        self._resume_at = 0.0
        self._owed: set[SecretId] = set()

    async def run(self, commands: Sequence[RedisCommand]) -> list[object] | None:
        """One exchange. None stands for the answer of a command that failed, or, without a server, for all of them."""
        if not commands or time.monotonic() < self._resume_at:
            return None
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
                return await self._exchange(commands)
        except (RedisError, OSError, TimeoutError) as error:
            self._resume_at = time.monotonic() + REDIS_PAUSE_SECONDS
            log.warning("Redis cannot answer, going on without it: %s", type(error).__name__)
            return None

    async def _exchange(self, commands: Sequence[RedisCommand]) -> list[object]:
        """What redis-py's own pool and pipeline do, in a quarter of their time, the dearest part of a request."""
        async with self._places:
            connection = self._idle.pop() if self._idle else self._pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                packed = map(pack_command, commands)  # type: ignore[arg-type]  # its stub takes tuples of one only
                await connection.send_packed_command(b"".join(packed))  # connects first, if need be
                answers = [await self._answer(connection) for _ in commands]
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            self._idle.append(connection)
            return answers

    async def _answer(self, connection: AbstractConnection) -> object:
        try:
            return await connection.read_response()
        except ResponseError as error:
            log.warning("Redis refused a command: %s", type(error).__name__)
            return None

    async def fill(self, new: Sequence[NewSecret]) -> None:
        commands: list[RedisCommand] = []
        for row in new:
            commands.append(("SET", ciphertext_name(row.id), row.ciphertext, "EX", settings.cache_seconds))
            if not (row.lock and row.lock.scope == "read"):
                commands.append(("SET", wrapped_key_name(row.id), row.wrapped_key, "EX", row.ttl_seconds))
        await self.run(commands)

    async def take(self, ids: Sequence[SecretId]) -> list[tuple[bytes | None, bytes | None]]:
        """(wrapped_key, ciphertext) by position. Taking is atomic: of two readers one gets the wrapped_key."""
        commands: list[RedisCommand] = []
        for secret_id in ids:
            commands += [("GETDEL", wrapped_key_name(secret_id)), ("GET", ciphertext_name(secret_id))]
        answers = cast(list[bytes | None] | None, await self.run(commands))
        if answers is None:
            self._owed.update(ids[: OWED_KEYS - len(self._owed)])
            return [(None, None)] * len(ids)
        return list(zip(answers[0::2], answers[1::2], strict=True))

    async def forget(self, ids: Sequence[SecretId]) -> None:
        """Drop these wrapped keys, and those that ended while Redis could not be reached, which may have kept them."""
        self._owed.update(ids[: OWED_KEYS - len(self._owed)])
        dropped = list(self._owed)
        if await self.run([("DEL", wrapped_key_name(secret_id)) for secret_id in dropped]) is not None:
            self._owed.difference_update(dropped)

    async def charge_quota(self, spends: Sequence[tuple[str, int]]) -> list[int]:
        """Add the KiB to what each address has stored in this minute; returns the totals by position."""
        minute = int(time.time() // QUOTA_WINDOW_SECONDS)
        commands: list[RedisCommand] = []
        for address, kib in spends:
            name = f"quota:{{{address}}}:{minute}"
            commands += [("INCRBY", name, kib), ("EXPIRE", name, QUOTA_WINDOW_SECONDS)]
        totals = cast(list[int | None] | None, await self.run(commands))
        return [0] * len(spends) if totals is None else [total or 0 for total in totals[0::2]]

    async def ping(self) -> bool:
        return await self.run([("PING",)]) is not None

    async def close(self) -> None:
        for connection in self._idle:
            await connection.disconnect(nowait=True)


# --- Group commit ------------------------------------------------------------------------------------------------
#
# A commit costs about the same for one row as for a hundred. So requests that arrive while a batch is under way
# wait for it and leave together as the next one. Nobody waits for company: with nothing under way, a lone request
# is a batch of one and leaves at once. A batch that fails fails its own requests and no others.

Wish = TypeVar("Wish")
Outcome = TypeVar("Outcome")


class Batcher(Generic[Wish, Outcome]):
    """Turns many calls of submit() into few calls of `run`, which answers a list of wishes with as many outcomes.

    An outcome that is an exception is raised in its own submit(); an exception out of `run` in all of the batch."""

    def __init__(self, run: Callable[[list[Wish]], Awaitable[Sequence[Outcome | ServiceError]]]) -> None:
        self._run = run
        self._waiting: list[tuple[Wish, asyncio.Future[Outcome], float]] = []
        self._sending: asyncio.Task[None] | None = None
        self._busy = False
        self._last_was_lone = True

    async def submit(self, wish: Wish) -> Outcome:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((wish, future, time.monotonic()))
        if not self._busy:
            self._busy = True
            if self._last_was_lone:  # this one is likely to be, too: spare it a task, and nobody else's wish is in it
                await self._send_batch()
            else:
                self._sending = asyncio.create_task(self._send_batch())
        return await future

    async def _send_batch(self) -> None:
        batch, self._waiting = self._waiting[:BATCH_ROWS], self._waiting[BATCH_ROWS:]
        self._last_was_lone = len(batch) == 1
        wishes, futures, since = zip(*batch, strict=True)
        late = time.monotonic() - since[0] > POSTGRES_TIMEOUT_SECONDS  # do not queue up behind a hung server
        try:
            outcomes = [unavailable()] * len(batch) if late else await self._send(list(wishes))
            for future, outcome in zip(futures, outcomes, strict=True):
                if future.done():
                    continue  # its caller went away
                if isinstance(outcome, ServiceError):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
        finally:
            self._busy = bool(self._waiting)
            if self._busy:
                self._sending = asyncio.create_task(self._send_batch())

    async def _send(self, wishes: list[Wish]) -> Sequence[Outcome | ServiceError]:
        try:
            return await self._run(wishes)
        except ServiceError as error:
            return [error] * len(wishes)
        except Exception as error:  # a defect: whatever it is, nobody may be left waiting for an answer
            log.error("a batch failed: %s", describe(error))
            return [unavailable()] * len(wishes)


def describe(error: BaseException) -> str:
    """Class and place of an exception, for the log. Never its message, which may quote a value."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-3:]]
    return f"{type(error).__name__} at {' > '.join(places)}"


# --- Operations --------------------------------------------------------------------------------------------------
#
# The only place where PostgreSQL, Redis and the cryptography meet.


class Vault:
    """Keeps secrets. Every method raises ServiceError and nothing else; UNAVAILABLE means: ask again."""

    def __init__(self, database: Database, cache: Cache, keys: Sequence[EncryptionKey]) -> None:
        self._database = database
        self._cache = cache
        self._keys = {key.fingerprint: key for key in keys}
        self._newest_key = keys[0]
        self._creates = Batcher[NewSecret, datetime](self._create_batch)
        self._claims = Batcher[Claim, bytes | None](self._claim_batch)
        # Argon2id takes a core and 19 MiB: more of them at once than cores would only take memory.
        self._argon2 = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // settings.workers), "argon2")

    async def create(
        self, secret: bytes, ttl_seconds: int, passphrase: str | None, scope: PassphraseScope, client: Client
    ) -> tuple[ReceiptKey, SecretKey, datetime]:
        """Returns (receipt_key, secret_key, expires_at) once the secret is durable in PostgreSQL."""
        key, receipt_key = self._newest_key, new_receipt_key()
        secret_key = secret_key_of(receipt_key)
        lock, passphrase_key = None, b""
        if passphrase is not None:
            salt = os.urandom(SALT_BYTES)
            stretched, verifier_half = await self._stretch(passphrase, salt)
            lock = PassphraseLock(scope, salt, verifier_of(verifier_half, key, secret_key))
            passphrase_key = stretched if scope == "read" else b""
        sealed = seal(secret, key, secret_key, passphrase_key)
        row = NewSecret(secret_id_of(secret_key), *sealed, key.fingerprint, lock, ttl_seconds, client)
        return receipt_key, secret_key, await self._creates.submit(row)

    async def _create_batch(self, new: list[NewSecret]) -> list[datetime | ServiceError]:
        admitted = await self._admit(new)
        filling = asyncio.create_task(self._cache.fill(admitted))  # beside the commit; without one it is noise
        try:
            expires_at = await insert_secrets(self._database, admitted)
        finally:
            await filling
        return [expires_at.get(row.id) or (unavailable() if row in admitted else rate_limited()) for row in new]

    async def _admit(self, new: list[NewSecret]) -> list[NewSecret]:
        """Those whose addresses stay within their quota of stored KiB. Without Redis, all of them."""
        if not settings.create_quota_kib_per_minute:
            return new
        spends = [(quota_address(row.client.ip_address), math.ceil(len(row.ciphertext) / 1024)) for row in new]
        totals = await self._cache.charge_quota(spends)
        return [row for row, total in zip(new, totals, strict=True) if total <= settings.create_quota_kib_per_minute]

    async def read(self, secret_key: SecretKey, passphrase: str | None, client: Client) -> bytes:
        """The secret, once. Raises NOT_FOUND, ALREADY_READ, DELETED, EXPIRED, PASSPHRASE_REQUIRED, WRONG_PASSPHRASE,
        TOO_MANY_ATTEMPTS; after any of these the secret is as readable as before."""
        return await self._claim(Claim(secret_id_of(secret_key), secret_key, Action.READ, client), passphrase)

    async def delete(self, secret_key: SecretKey, passphrase: str | None, client: Client) -> None:
        """Destroy it unread. Raises what read() raises."""
        await self._claim(Claim(secret_id_of(secret_key), secret_key, Action.DELETED, client), passphrase)

    async def history(self, receipt_key: ReceiptKey) -> Receipt:
        """What happened to the secret, for its creator. Raises NOT_FOUND."""
        return await find_history(self._database, secret_id_of(secret_key_of(receipt_key)))

    async def revoke(self, receipt_key: ReceiptKey, client: Client) -> None:
        """Destroy it unread, without its passphrase. Raises NOT_FOUND, ALREADY_READ, DELETED, EXPIRED."""
        secret_key = secret_key_of(receipt_key)
        claim = Claim(secret_id_of(secret_key), secret_key, Action.DELETED, client, by="receipt_key", authorized=True)
        await self._claim(claim, None)

    async def status(self, secret_key: SecretKey) -> Unread:
        """Look without reading. Raises NOT_FOUND, ALREADY_READ, DELETED, EXPIRED."""
        return await find_unread(self._database, secret_id_of(secret_key))

    async def _claim(self, claim: Claim, passphrase: str | None) -> bytes:
        for pause_seconds in CLAIM_PAUSES_SECONDS:
            secret = await self._claims.submit(claim)
            if secret is not None:
                return secret
            unread = await find_unread(self._database, claim.id)
            if unread.guards(claim.action) and not claim.authorized:
                claim = await self._authorize(claim, passphrase, unread)
            else:  # still there: another statement held it
                await asyncio.sleep(pause_seconds)
        raise unavailable("This secret is held by another request right now.")

    async def _claim_batch(self, claims: list[Claim]) -> list[bytes | ServiceError | None]:
        """Let PostgreSQL decide who wins, and open the cached copies meanwhile.

        A cached copy counts only once it has opened, else the winner's row does: a damaged cache must not cost anybody
        a secret."""
        opening = asyncio.create_task(self._open_cached(claims))
        try:
            won = await claim_secrets(self._database, claims, list(self._keys))
        finally:
            copies = await opening
        return [
            (self._open(claim, won[number]) if copy is None else copy) if number in won else None
            for number, (claim, copy) in enumerate(zip(claims, copies, strict=True))
        ]

    async def _open_cached(self, claims: list[Claim]) -> list[bytes | None]:
        try:
            cached = await self._cache.take([claim.id for claim in claims])
            return [self._open_copy(claim, *copy) for claim, copy in zip(claims, cached, strict=True)]
        except Exception as error:  # whatever it is: by now PostgreSQL may have winners, and their rows must be opened
            log.error("the cached copies were not opened: %s", describe(error))
            return [None] * len(claims)

    def _open_copy(self, claim: Claim, wrapped_key: bytes | None, ciphertext: bytes | None) -> bytes | None:
        if claim.action is Action.DELETED or wrapped_key is None or ciphertext is None:
            return None
        for key in self._keys.values():
            with suppress(InvalidToken):
                return unseal(ciphertext, wrapped_key, key, claim.secret_key)
        log.warning("the cached copy of %s does not open", claim.id)
        return None

    def _open(self, claim: Claim, row: asyncpg.Record) -> bytes | ServiceError:
        if claim.action is Action.DELETED:
            return b""  # nothing to open, and whoever revokes has no passphrase to open it with
        key = self._keys[row["key_fingerprint"]]
        try:
            return unseal(row["ciphertext"], row["wrapped_key"], key, claim.secret_key, claim.passphrase_key)
        except InvalidToken:
            log.error("the row of %s was altered or damaged: it does not open", claim.id)
            return ServiceError(Code.DAMAGED, "What is stored of this secret was altered or damaged.")

    async def _authorize(self, claim: Claim, passphrase: str | None, unread: Unread) -> Claim:
        """The same claim with its passphrase checked. A refusal is logged and burns nothing."""
        try:
            passphrase_key = await self._check_passphrase(claim, passphrase)
        except ServiceError as refusal:
            if refusal.code in GUARDED:
                await log_denied(self._database, claim, refusal.code)
            raise
        return replace(
            claim, authorized=True, passphrase_key=passphrase_key if unread.passphrase_scope == "read" else b""
        )

    async def _check_passphrase(self, claim: Claim, passphrase: str | None) -> bytes:
        """The passphrase_key. Raises PASSPHRASE_REQUIRED, TOO_MANY_ATTEMPTS, WRONG_PASSPHRASE."""
        if passphrase is None:
            raise ServiceError(Code.PASSPHRASE_REQUIRED, "This needs the secret's passphrase.")
        attempt = await charge_attempt(self._database, claim.id)
        if attempt is None:
            seconds = (await find_unread(self._database, claim.id)).attempts_reset_seconds
            detail = f"Too many passphrase attempts. Try again in {seconds} seconds."
            raise ServiceError(Code.TOO_MANY_ATTEMPTS, detail, retry_after_seconds=seconds)
        key = self._keys.get(attempt.key_fingerprint)
        if key is None:
            raise unavailable("This secret's encryption key is not at hand here.")
        passphrase_key, verifier_half = await self._stretch(passphrase, attempt.lock.salt)
        if not hmac.compare_digest(verifier_of(verifier_half, key, claim.secret_key), attempt.lock.verifier):
            detail = f"This is not the secret's passphrase. Attempts left: {attempt.attempts_left}."
            raise ServiceError(Code.WRONG_PASSPHRASE, detail, attempts_left=attempt.attempts_left)
        return passphrase_key

    async def _stretch(self, passphrase: str, salt: bytes) -> tuple[bytes, bytes]:
        return await asyncio.get_running_loop().run_in_executor(self._argon2, stretch, passphrase, salt)

    async def clean_expired_secrets(self) -> None:
        """End and log every expired secret, forget its cached key, end log rows past their retention.

        Rests after each batch for as long as it took, twice: reads go first."""
        await self._database.set_clock()
        await self._cache.forget([])
        started = time.monotonic()
        while expired := await delete_expired(self._database):
            await self._cache.forget(expired)
            log.info("%d secrets expired", len(expired))
            await asyncio.sleep(2 * (time.monotonic() - started))
            started = time.monotonic()
        while count := await delete_old_logs(self._database):
            log.info("%d log rows past their retention ended", count)

    async def health(self) -> tuple[bool, bool]:
        """Whether PostgreSQL and Redis answer now."""
        postgres, redis = await asyncio.gather(
            self._database.fetch("select"), self._cache.ping(), return_exceptions=True
        )
        return not isinstance(postgres, BaseException), redis is True


# --- Cleanup loop and lifespan -----------------------------------------------------------------------------------


class StartError(Exception):
    """Why the service cannot start, in one line that names the remedy."""


def load_encryption_keys() -> tuple[EncryptionKey, ...]:
    """From ENCRYPTION_KEY, else from ENCRYPTION_KEY_FILE, which is made if there is none and never overwritten."""
    if settings.encryption_key:
        name, text = "ENCRYPTION_KEY", settings.encryption_key.get_secret_value()
    else:
        name, text = f"ENCRYPTION_KEY_FILE {settings.encryption_key_file}", _read_or_make_key_file()
    try:
        return parse_encryption_keys(text)
    except ValueError as error:
        raise StartError(f"{name}: {error}. A key is 32 random bytes in url-safe base64 (44 characters).") from None


def _read_or_make_key_file() -> str:
    """Written aside and then linked into place: of two workers starting at once, both read the same whole key."""
    file = settings.encryption_key_file
    try:
        if not file.exists():
            aside = file.with_name(f".{file.name}.{os.getpid()}")
            aside.touch(mode=0o600, exist_ok=False)
            aside.write_bytes(Fernet.generate_key())
            with suppress(FileExistsError):
                os.link(aside, file)
            aside.unlink()
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"ENCRYPTION_KEY_FILE {file}: {type(error).__name__}. Name a file that can be made.") from None


@asynccontextmanager
async def open_vault() -> AsyncIterator[Vault]:
    """Connect and check. Raises StartError when PostgreSQL, its tables or an encryption_key are missing."""
    keys = load_encryption_keys()
    database = Database()
    try:
        await database.wait()
    except POSTGRES_ERRORS as error:
        where = f"{settings.postgres_host}:{settings.postgres_port}"
        raise StartError(
            f"PostgreSQL at {where} cannot be reached ({type(error).__name__}). Check POSTGRES_HOST, POSTGRES_PORT, "
            "POSTGRES_DB, POSTGRES_USER and POSTGRES_PASSWORD."
        ) from None
    cache = Cache()
    vault = Vault(database, cache, keys)
    try:
        await _check_start(database, keys)
        if not await cache.ping():
            log.warning("Redis is missing: the service works without it, only slower")
        yield vault
    finally:
        await cache.close()
        database.close()


async def _check_start(database: Database, keys: Sequence[EncryptionKey]) -> None:
    try:
        await check_schema(database)
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
        raise StartError("The tables are missing or older than this program. Load them: psql -f schema.sql") from None
    missing = await register_key(database, [key.fingerprint for key in keys])
    if missing:
        raise StartError(
            f"Unread secrets need the encryption key with the fingerprint {missing}, which is not in ENCRYPTION_KEY. "
            "Add it behind the newest key."
        )


async def clean_forever(vault: Vault) -> None:
    while True:
        try:
            await vault.clean_expired_secrets()
        except Exception as error:  # the loop must outlive whatever it meets: nobody would start it again
            log.warning("cleanup will be tried again: %s", describe(error))
        await asyncio.sleep(settings.cleanup_interval_seconds)


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[dict[str, Vault]]:
    async with open_vault() as vault:
        cleaning = asyncio.create_task(clean_forever(vault))
        gc.freeze()  # the imported modules stay: collecting past them costs 40 ms now and then, the worst latencies
        try:
            yield {"vault": vault}
        finally:
            cleaning.cancel()
            with suppress(asyncio.CancelledError):
                await cleaning


# --- HTTP: models, errors, headers -------------------------------------------------------------------------------

EXAMPLE_SECRET_KEY: Final = "aR8p4mJx0Zk3vQf7TnB1cWyLh5uEoG2d"
EXAMPLE_RECEIPT_KEY: Final = "aR8p4kV9sXw6CqNz8RtY3bMhJf0LgP7u"

Passphrase = Annotated[str, Field(min_length=1, max_length=MAX_PASSPHRASE_CHARACTERS)]
TtlSeconds = Annotated[int, Field(ge=1, le=settings.max_ttl_seconds)]


class Body(BaseModel):
    """Strict: a misspelt `ttl` must not silently become the default, nor "60" a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CreationOptions(Body):
    """How to keep a secret."""

    passphrase: Annotated[Passphrase | None, Field(repr=False, examples=["tell it by telephone"])] = None
    passphrase_scope: PassphraseScope = "delete"
    ttl_seconds: TtlSeconds = settings.default_ttl_seconds


class CreateSecret(CreationOptions):
    """A text to keep. `passphrase_scope` says what its passphrase guards: deletion only, or reading as well."""

    secret: Annotated[str, Field(min_length=1, repr=False, examples=["correct horse battery staple"])]


class PresentPassphrase(Body):
    """The passphrase of a secret that has one."""

    passphrase: Annotated[Passphrase | None, Field(repr=False, examples=["tell it by telephone"])] = None


class RawOptions(BaseModel):
    """The query of a raw body; unlike a JSON body's numbers, these arrive as text."""

    model_config = ConfigDict(extra="forbid")
    ttl_seconds: TtlSeconds = settings.default_ttl_seconds


class SecretCreated(BaseModel):
    """`secret_key` reads the secret, once; `receipt_key` shows what became of it, and revokes it."""

    secret_key: Annotated[str, Field(examples=[EXAMPLE_SECRET_KEY])]
    receipt_key: Annotated[str, Field(examples=[EXAMPLE_RECEIPT_KEY])]
    expires_at: Timestamp
    url: Annotated[str, Field(examples=[f"https://secrets.example.com/#{EXAMPLE_SECRET_KEY}"])]


class SecretRead(BaseModel):
    """The secret. With `encoding`, it is not text: `secret` is the base64 of its bytes."""

    secret: Annotated[str, Field(examples=["correct horse battery staple"])]
    encoding: Literal["base64"] | None = None


class SecretDeleted(BaseModel):
    """The secret is gone, unread."""

    status: Literal["secret_deleted"] = "secret_deleted"


class SecretStatus(BaseModel):
    """The secret can be read; `passphrase_required`: not without its passphrase."""

    status: Literal["unread"] = "unread"
    expires_at: Timestamp
    passphrase_required: bool


class Health(BaseModel):
    """`degraded`: Redis is missing, and nothing else is different."""

    status: Literal["ok", "degraded"]
    postgres: Literal["up"] = "up"
    redis: Literal["up", "down"]


class InvalidField(BaseModel):
    """Where, what and which kind, never the value itself."""

    loc: list[str | int]
    msg: str
    type: str


class Problem(BaseModel):
    """RFC 9457. `code` is for programs, `detail` for people; the rest depends on the code."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str
    code: Code
    errors: Annotated[list[InvalidField] | None, Field(description="with invalid")] = None
    ended_at: Annotated[datetime | None, Field(description="with already_read, deleted, expired")] = None
    attempts_left: Annotated[int | None, Field(description="with wrong_passphrase")] = None


BodyModel = TypeVar("BodyModel", bound=BaseModel)


def header(request: Request, name: bytes) -> str:
    """The first of this name, or nothing. Looking them up in request.headers took a fifth of a route's time."""
    for key, value in request.scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""


async def read_body(request: Request) -> bytes:
    """At most what the largest secret can need in JSON: six bytes (\\u0000) for each of its own, and a passphrase.

    FastAPI's max_body_size answers in plain text; this answers as every other error does."""
    limit = 6 * (settings.max_secret_bytes + 4 * MAX_PASSPHRASE_CHARACTERS) + 1024
    announced = header(request, b"content-length")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large()
    chunks, size = [], 0
    async for chunk in request.stream():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise too_large()
    return b"".join(chunks)


def too_large() -> ServiceError:
    return ServiceError(Code.TOO_LARGE, f"A secret may have at most {settings.max_secret_bytes} bytes.")


def parse(model: type[BodyModel], body: bytes) -> BodyModel:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid("body", error) from None


def parse_query(model: type[BodyModel], request: Request) -> BodyModel:
    try:
        return model.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise invalid("query", error) from None


def invalid(place: Literal["body", "query"], error: ValidationError) -> ServiceError:
    """Names each field, never its value. A field's name is input too: an odd one is not repeated."""
    errors = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        loc = [part if FIELD_PATTERN.fullmatch(str(part)) else "(unknown field)" for part in item["loc"]]
        errors.append({"loc": [place, *loc], "msg": item["msg"], "type": item["type"]})
    detail = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in errors)
    return ServiceError(Code.INVALID, detail, errors=errors)


def invalid_body(sentence: str) -> ServiceError:
    error = {"loc": ["body"], "msg": sentence, "type": "value_error"}
    return ServiceError(Code.INVALID, f"body: {sentence}", errors=[error])


def problem_document(error: ServiceError) -> dict[str, object]:
    status = error.code.status
    phrase = HTTPStatus(status).phrase
    known = {"type": "about:blank", "title": phrase, "status": status, "detail": error.detail, "code": error.code}
    return known | error.members


def problem(error: ServiceError) -> Response:
    """The one writer of errors."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.code is Code.TOKEN_REQUIRED:
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps(problem_document(error)) + "\n"
    return Response(body, error.code.status, headers, media_type="application/problem+json")


def allowed_methods(scope: Scope) -> str:
    """Of every route with this path: the router names only the first one's (RFC 9110, 15.5.6)."""
    found = {
        method
        for app_route in app.routes
        for method in getattr(app_route, "methods", None) or ()
        if app_route.matches({**scope, "method": method})[0] is Match.FULL
    }
    return ", ".join(sorted(found))


def answer_to(scope: Scope, error: Exception) -> Response:
    """The problem document for whatever a route has raised."""
    if isinstance(error, ServiceError):
        return problem(error)
    if isinstance(error, HTTPException):  # the router's own
        if error.status_code != 405:
            return problem(ServiceError(Code.NOT_FOUND, "There is no such route."))
        response = problem(ServiceError(Code.METHOD_NOT_ALLOWED, "Not this method."))
        response.headers["Allow"] = allowed_methods(scope)
        return response
    log.error("%s %s failed: %s", scope["method"], route_template(scope), describe(error))
    return problem(ServiceError(Code.INTERNAL, "Something here is broken. It has been logged."))


class Perimeter:
    """What every request passes: headers that forbid storing, errors made answers, and one log line without the path's
    keys. It stands in place of FastAPI's own six wrappers, which took 8 us a request and have nothing to do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *NO_STORE_HEADERS]
            await send(message)

        try:
            await self.app(scope, receive, send_marked)
        except ClientDisconnect:
            status = 499  # as nginx has it: the caller went away while we read the body
        except Exception as error:
            response = answer_to(scope, error)
            if not status:
                await response(scope, receive, send_marked)
        level = logging.WARNING if status >= 500 else logging.DEBUG  # a line a request costs a tenth of the throughput
        if log.isEnabledFor(level):
            milliseconds = (time.perf_counter() - started) * 1000
            log.log(level, "%s %s %d %.1f ms", scope["method"], route_template(scope), status, milliseconds)


def route_template(scope: Scope) -> str:
    """/secret/{secret_key}, never the path itself, which holds the key."""
    return getattr(scope.get("route"), "path", "(no route)")


class BoundedRequests(HttpToolsProtocol):
    """uvicorn's fast parser, and an end to what one connection may make it keep. It has none of its own: 64 MB of short
    headers took 1 GB of memory, 26 MB of pipelined requests 1.4 GB, one header of 128 MB 20 s of a core."""

    head_bytes: int | None = None  # what has come of the head so far; None: no head is under way
    unread_bytes = 0  # of a body that was answered before its end

    def data_received(self, data: bytes) -> None:
        if self.head_bytes is not None:
            if self.head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The request's headers are too large.")
                return
            self.head_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self.head_bytes = self.unread_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.head_bytes = None
        if len(self.pipeline) >= MAX_PIPELINED_REQUESTS:
            raise ValueError("too many requests at once")  # the parser makes a 400 of it
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self.unread_bytes += len(body)
            if self.unread_bytes > MAX_UNREAD_BYTES:
                self.transport.close()
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer as to every other error: uvicorn's own is plain text that anybody may store."""
        response = problem(ServiceError(Code.MALFORMED, msg))
        headers = [*response.raw_headers, *NO_STORE_HEADERS, (b"connection", b"close")]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + lines + b"\r\n" + bytes(response.body))
        self.transport.close()


@lru_cache(maxsize=4096)
def valid_ip_address(host: str) -> str | None:
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return None


def client_of(request: Request) -> Client:
    """As uvicorn saw it, or as a trusted proxy's X-Forwarded-For has it."""
    user_agent = header(request, b"user-agent")[:USER_AGENT_CHARACTERS]
    address = request.scope.get("client")
    return Client(address and valid_ip_address(address[0]), user_agent.replace("\x00", ""))  # jsonb has no NUL


def vault_of(request: Request) -> Vault:
    return cast(Vault, request.scope["state"]["vault"])


async def read_passphrase(request: Request) -> str | None:
    """From a body that may be missing."""
    body = await read_body(request)
    return parse(PresentPassphrase, body).passphrase if body else None


async def read_creation(request: Request) -> tuple[bytes, CreationOptions]:
    """The secret, and how to keep it. A body is the secret itself where its label says so, and JSON everywhere else:
    curl labels what it sends as a form unless told otherwise."""
    body, label = await read_body(request), header(request, b"content-type").partition(";")[0].strip().lower()
    options: CreationOptions
    if label in RAW_TYPES:
        raw_options = parse_query(RawOptions, request)
        secret, options = body, CreationOptions(ttl_seconds=raw_options.ttl_seconds)
    else:
        if request.scope["query_string"]:
            parse_query(Body, request)  # ?ttl_seconds=60 beside a JSON body would be ignored: refuse it
        options = creation = parse(CreateSecret, body)
        secret = creation.secret.encode()
    if not secret:
        raise invalid_body("The body is the secret, and it is empty")
    if len(secret) > settings.max_secret_bytes:
        raise too_large()
    return secret, options


def wants_raw(request: Request) -> bool:
    """Whether the first thing that the caller accepts is plain text or bytes."""
    return header(request, b"accept").split(",")[0].partition(";")[0].strip().lower() in RAW_TYPES


def may_not_read(request: Request) -> bool:
    """A browser's address bar, a prefetch or a link preview: it gets the page, which asks a person first."""
    for name, value in request.scope["headers"]:  # in one pass: each look-up in request.headers is a pass of its own
        if name == b"accept":
            refused = b"text/html" in value
        elif name == b"user-agent":
            refused = PREVIEW_BOTS.search(value) is not None
        else:
            refused = name in PREFETCH_HEADERS and b"prefetch" in value
        if refused:
            return True
    return False


def secret_response(request: Request, secret: bytes) -> Response:
    """As text where it is UTF-8, byte for byte where the caller asks for that."""
    encoding: Literal["base64"] | None = None
    try:
        text = secret.decode()
    except UnicodeDecodeError:
        text, encoding = base64.b64encode(secret).decode(), "base64"
    if wants_raw(request):
        return Response(secret, media_type="application/octet-stream" if encoding else "text/plain")
    return json_response(SecretRead(secret=text, encoding=encoding))


def key_in(request: Request) -> bytes:
    """The secret_key or receipt_key in the path. Raises NOT_FOUND when it has not the form of one."""
    (text,) = request.path_params.values()
    if not KEY_PATTERN.fullmatch(text):
        raise not_found()
    return base64.urlsafe_b64decode(text)


def require_token(request: Request) -> None:
    """Raises TOKEN_REQUIRED when API_TOKENS is set and the request shows none of them."""
    if not settings.tokens:
        return
    scheme, _, shown = header(request, b"authorization").partition(" ")
    known = any(hmac.compare_digest(shown.strip().encode(), token) for token in settings.tokens)
    if scheme.lower() != "bearer" or not known:
        raise ServiceError(Code.TOKEN_REQUIRED, "Creating a secret here needs a token: Authorization: Bearer ...")


def base_url(request: Request) -> str:
    """Without a slash at its end."""
    return settings.public_url.rstrip("/") or f"{request.scope['scheme']}://{header(request, b'host')}"


def json_response(model: BaseModel, status: int = 200) -> Response:
    """Ends with a newline, for the sake of terminals."""
    return Response(to_json(model, exclude_none=True) + b"\n", status, media_type="application/json")


# --- Application, pages, documentation ---------------------------------------------------------------------------

CURL_PAGE: Final = """\
One-Time Secrets: a secret goes in, a link comes out, and the link reads it once.

Store a text, and get the link:
    curl -H 'Accept: text/plain' -d '{"secret": "hello"}' URL/secret

Store a file as it is, for ten minutes:
    curl --data-binary @FILE -H 'Content-Type: application/octet-stream' 'URL/secret?ttl_seconds=600'

Store a text that needs a passphrase to be read:
    curl -d '{"secret": "hello", "passphrase": "PASSPHRASE", "passphrase_scope": "read"}' URL/secret

Read a secret. KEY is the secret_key, the part of the link behind #:
    curl URL/secret/KEY
    curl -d '{"passphrase": "PASSPHRASE"}' URL/secret/KEY
    curl -H 'Accept: application/octet-stream' URL/secret/KEY -o FILE

Look whether it can still be read, without reading it:
    curl URL/secret/KEY/status

Destroy it unread:
    curl -X DELETE -d '{"passphrase": "PASSPHRASE"}' URL/secret/KEY

As its creator, see what became of it, and revoke it:
    curl URL/receipt/RECEIPT_KEY
    curl -X DELETE URL/receipt/RECEIPT_KEY

Everything else: URL/docs
"""
PAGE: Final = (Path(__file__).parent / "index.html").read_bytes()
PAGE_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src {scripts}; style-src {styles}; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
DOCS_POLICY: Final = (  # Swagger UI and ReDoc set styles as they go
    "default-src 'self'; img-src 'self' data:; worker-src blob:; script-src 'self' {scripts}; "
    "style-src 'self' 'unsafe-inline'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


def html_response(html: bytes, policy: str) -> Response:
    """A page under a Content-Security-Policy that runs the page's own inline scripts, named by hash, and no others."""

    def hashes(tag: str) -> str:
        contents = re.findall(f"<{tag}>(.*?)</{tag}>".encode(), html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(content).digest()).decode() for content in contents]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    headers = {"Content-Security-Policy": policy.format(scripts=hashes("script"), styles=hashes("style"))}
    return Response(html, media_type="text/html", headers=headers)


def page() -> Response:
    return html_response(PAGE, PAGE_POLICY)


class PlainRoute(APIRoute):
    """Routes here take the request and return the response. FastAPI's own way to them, through dependencies, exit
    stacks and validation of what comes out, took 30 us of a request's 150 and had nothing to do."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            raise HTTPException(405)
        response: Response = await self.endpoint(Request(scope, receive))
        await response(scope, receive, send)


app = FastAPIOffline(
    docs_url=None,  # its own pages come without a Content-Security-Policy; their scripts and styles are used below
    redoc_url=None,
    title="One-Time Secrets",
    description="Keeps a secret encrypted and hands it out exactly once.",
    version="1.0.0",
    lifespan=lifespan,
    redirect_slashes=False,
    generate_unique_id_function=lambda route: route.name,  # operation ids that a generated client can show
    servers=[{"url": "/"}, {"url": API_PREFIX}],
    root_path_in_servers=False,
    telemetry={"tracing": False, "metrics": False, "logs": False},  # spans hold paths, and paths hold keys
)
app.router.route_class = PlainRoute
app.middleware_stack = Perimeter(app.router)

Route = TypeVar("Route", bound=Callable[[Request], Awaitable[Response]])


def route(
    method: Literal["GET", "POST", "DELETE"],
    path: str,
    answer: type[BaseModel] | None,
    *codes: Code,
    status: int = 200,
    takes: type[Body] | None = None,
    raw: str = "",
) -> Callable[[Route], Route]:
    """A route that reads its request and writes its response itself, and all of its documentation.

    `raw` says what callers get who accept text/plain."""
    examples: dict[int, dict[Code, object]] = {}
    for code in (*codes, Code.UNAVAILABLE):
        document = problem_document(ServiceError(code, "What happened, in a sentence."))
        examples.setdefault(code.status, {})[code] = {"value": document}
    responses: dict[int | str, dict[str, object]] = {}
    for code_status, here in sorted(examples.items()):
        content = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": here}
        responses[code_status] = {"description": ", ".join(here), "content": {"application/problem+json": content}}
    if raw:
        text = {"schema": {"type": "string"}, "example": "correct horse battery staple"}
        description = f"Or, for those who accept text/plain: {raw}"
        responses[status] = {"description": description, "content": {"text/plain": text}}
    extra: dict[str, object] = {}
    if "{" in path:
        name = path[path.index("{") + 1 : path.index("}")]
        schema = {"type": "string", "pattern": f"^{KEY_PATTERN.pattern}$"}
        example = EXAMPLE_SECRET_KEY if name == "secret_key" else EXAMPLE_RECEIPT_KEY
        extra["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema, "example": example}]
    if takes:
        taken: dict[str, object] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{takes.__name__}"}}}
        if takes is CreateSecret:
            taken |= {label: {"schema": {"type": "string", "minLength": 1}} for label in sorted(RAW_TYPES)}
            query = RawOptions.model_json_schema()["properties"]["ttl_seconds"]
            extra["parameters"] = [
                {"name": "ttl_seconds", "in": "query", "description": "With raw bodies only", "schema": query}
            ]
            extra["security"] = [{}, {"token": []}]
        extra["requestBody"] = {"required": takes is CreateSecret, "content": taken}
    return app.api_route(
        path,
        methods=[method],
        status_code=status,
        response_class=JSONResponse if answer else PlainTextResponse,
        response_model=answer,
        responses=responses,
        openapi_extra=extra,
    )


def openapi() -> dict[str, Any]:
    """FastAPI's document, with the models that it does not see because the routes read their own bodies."""
    if not app.openapi_schema:
        document = FastAPI.openapi(app)
        _, definitions = models_json_schema(
            [(CreateSecret, "validation"), (PresentPassphrase, "validation"), (Problem, "validation")],
            ref_template="#/components/schemas/{model}",
        )
        document["components"]["schemas"] |= definitions["$defs"]
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return app.openapi_schema or {}


app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation extends it


def documentation(request: Request, write: Callable[..., Response], **assets: str) -> Response:
    root = request.scope.get("root_path", "")
    urls = {name: f"{root}/static-offline-docs/{file}" for name, file in assets.items()}
    html = write(openapi_url=f"{root}/openapi.json", title=app.title, **urls)
    return html_response(bytes(html.body), DOCS_POLICY)


# --- Routes ------------------------------------------------------------------------------------------------------


@route(
    "POST",
    "/secret",
    SecretCreated,
    *(Code.INVALID, Code.TOO_LARGE, Code.TOKEN_REQUIRED, Code.RATE_LIMITED),
    status=201,
    takes=CreateSecret,
    raw="the bare url.",
)
async def create_secret(request: Request) -> Response:
    """Store a secret, and get the link that reads it once.

    The body is JSON. Labelled text/plain or application/octet-stream it is the secret itself, byte for byte, and
    ttl_seconds stands in the query."""
    require_token(request)
    secret, options = await read_creation(request)
    receipt_key, secret_key, expires_at = await vault_of(request).create(
        secret, options.ttl_seconds, options.passphrase, options.passphrase_scope, client_of(request)
    )
    url = f"{base_url(request)}/#{key_text(secret_key)}"  # behind the #: browsers send that part to no server
    if wants_raw(request):
        return Response(url + "\n", 201, media_type="text/plain")
    answer = SecretCreated(
        secret_key=key_text(secret_key), receipt_key=key_text(receipt_key), expires_at=expires_at, url=url
    )
    return json_response(answer, 201)


@route("GET", "/secret/{secret_key}", SecretRead, *GONE, *GUARDED, Code.DAMAGED, raw="the secret, byte for byte.")
async def read_secret(request: Request) -> Response:
    """Read a secret. This ends it: a second read says when the first one was.

    A browser's address bar, a prefetch and a link preview get a page instead, and end nothing."""
    if may_not_read(request):
        return page()
    return secret_response(request, await vault_of(request).read(SecretKey(key_in(request)), None, client_of(request)))


@route(
    "POST",
    "/secret/{secret_key}",
    SecretRead,
    *(*GONE, *GUARDED, Code.DAMAGED, Code.INVALID, Code.TOO_LARGE),
    takes=PresentPassphrase,
    raw="the secret, byte for byte.",
)
async def read_secret_with_passphrase(request: Request) -> Response:
    """Read a secret as GET does, with its passphrase if it has one; nobody is taken for a prefetch here."""
    passphrase = await read_passphrase(request)
    secret = await vault_of(request).read(SecretKey(key_in(request)), passphrase, client_of(request))
    return secret_response(request, secret)


@route(
    "DELETE",
    "/secret/{secret_key}",
    SecretDeleted,
    *(*GONE, *GUARDED, Code.INVALID, Code.TOO_LARGE),
    takes=PresentPassphrase,
)
async def delete_secret(request: Request) -> Response:
    """Destroy a secret unread. A secret with a passphrase needs it."""
    passphrase = await read_passphrase(request)
    await vault_of(request).delete(SecretKey(key_in(request)), passphrase, client_of(request))
    return json_response(SecretDeleted())


@route("GET", "/secret/{secret_key}/status", SecretStatus, *GONE)
async def secret_status(request: Request) -> Response:
    """Look whether a secret can still be read, without reading it."""
    unread = await vault_of(request).status(SecretKey(key_in(request)))
    return json_response(SecretStatus(expires_at=unread.expires_at, passphrase_required=unread.guards(Action.READ)))


@route("GET", "/receipt/{receipt_key}", Receipt, Code.NOT_FOUND)
async def show_receipt(request: Request) -> Response:
    """What became of a secret, for its creator: read when, from which address, by what. Also after it is gone."""
    return json_response(await vault_of(request).history(ReceiptKey(key_in(request))))


@route("DELETE", "/receipt/{receipt_key}", SecretDeleted, *GONE)
async def revoke_secret(request: Request) -> Response:
    """Destroy a secret unread, as its creator: no passphrase is asked for."""
    await vault_of(request).revoke(ReceiptKey(key_in(request)), client_of(request))
    return json_response(SecretDeleted())


@route("GET", "/", None, raw="")
async def home(request: Request) -> Response:
    """A text page of curl lines for this very host; a browser gets the page for people."""
    if "text/html" in header(request, b"accept"):
        return page()
    return Response(CURL_PAGE.replace("URL", base_url(request)), media_type="text/plain")


@route("GET", "/health", Health)
async def health(request: Request) -> Response:
    """Whether the service can serve: `degraded` without Redis, 503 without PostgreSQL."""
    postgres, redis = await vault_of(request).health()
    if not postgres:
        raise unavailable()
    return json_response(Health(status="ok" if redis else "degraded", redis="up" if redis else "down"))


@app.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    return documentation(
        request,
        get_swagger_ui_html,
        swagger_js_url="swagger-ui-bundle.js",
        swagger_css_url="swagger-ui.css",
        swagger_favicon_url="favicon.png",
    )


@app.get("/redoc", include_in_schema=False)
async def redoc(request: Request) -> Response:
    write = partial(get_redoc_html, with_google_fonts=False)
    return documentation(request, write, redoc_js_url="redoc.standalone.js", redoc_favicon_url="favicon.png")


# The same routes once more, documentation included. The router, not the app: one Perimeter is enough.
app.mount(API_PREFIX, app.router)


# --- Start -------------------------------------------------------------------------------------------------------

LOGGING: Final = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": settings.log_level.upper()},
}


async def check_start() -> None:
    """Everything that keeps the service from starting is told here, once, and not by every worker."""
    async with open_vault():
        pass


def main() -> None:
    try:
        asyncio.run(check_start())
    except StartError as error:
        raise SystemExit(str(error)) from None
    uvicorn.run(
        "main:app",
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        loop="uvloop",
        http="main:BoundedRequests",
        ws="none",  # there are no WebSockets here, and uvicorn's code for them logs paths and headers
        log_config=LOGGING,
        log_level=settings.log_level,
        access_log=False,  # its lines hold paths, and paths hold keys
        server_header=False,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


if __name__ == "__main__":
    main()
