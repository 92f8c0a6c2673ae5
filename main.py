"""One-Time Secrets: an HTTP service that keeps a secret encrypted and hands it out exactly once.

A secret's life. POST /secret makes a receipt_key, derives the secret_key (the link) from it and an
id from that, encrypts the secret under a fresh data_key, wraps that key so that opening it needs
the link *and* the operator's encryption_key, and inserts one row; the cache is filled beside it.
A read deletes the row in one statement, which also logs the read and returns what it deleted.

Who decides what. PostgreSQL's `secrets`: can it still be read? Where the deletion returns no row,
nothing is handed out, whatever the cache says. `secret_logs`: what happened? Redis decides nothing:
losing it loses no secret, and a stale copy in it reads none twice.

What a thief gets. From a dump of both stores, the logs and the encryption_key: sizes, times and
addresses; every data_key is wrapped under its link, which is stored nowhere. From a link alone:
one read, which the rightful reader will notice.

Words. secret: the bytes to hand over. secret_key: the bearer's key, in the link. receipt_key: the
creator's, shows the history and revokes; the secret_key comes from it, never the reverse.
passphrase: a person's, guards deletion and, if asked for, reading. claim: to end a secret for one
caller, by reading it or by deleting it.
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
import resource
import select
import tempfile
import time
import traceback
import unicodedata
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    Self,
    TypeAlias,
    TypeVar,
)
from uuid import UUID

import asyncpg
import fastapi_offline
import uvicorn
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from hiredis import pack_command
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import AuthenticationError, ResponseError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

log: Final = logging.getLogger("one-time-secrets")

# --- Settings ---------------------------------------------------------------------------------


class Settings(BaseSettings):
    """What the operator configures, by environment variables of these names or a `.env` file."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")

    # A host or a socket folder; of several, with commas between them, the one that takes writes.
    postgres_host: str = "localhost"
    # One for all hosts, or as many as there are hosts.
    postgres_port: Annotated[str, Field(pattern=r"^\d{1,5}(,\d{1,5})*$")] = "5432"
    postgres_db: str = "secrets"
    postgres_user: str = "secrets"
    postgres_password: SecretStr = SecretStr("")
    redis_host: str = "localhost"
    redis_port: Annotated[int, Field(ge=1, le=65535)] = 6379
    redis_url: SecretStr = SecretStr("")  # wins over host and port; may hold a password
    encryption_key: SecretStr = SecretStr("")  # Fernet keys with commas between them, newest first
    encryption_key_file: Path = Path("encryption_key")  # for encryption_key unset; made if missing
    default_ttl_seconds: Annotated[int, Field(ge=1)] = 24 * 3600
    max_ttl_seconds: Annotated[int, Field(ge=1, le=10 * 365 * 86400)] = 7 * 86400
    max_secret_bytes: Annotated[int, Field(ge=1, le=10 * 1024 * 1024)] = 64 * 1024
    max_stored_mib: Annotated[int, Field(ge=0)] = 10240  # of the whole database; 0: no bound
    cache_seconds: Annotated[int, Field(ge=300, le=86400)] = 300
    cleanup_interval_seconds: Annotated[float, Field(gt=0, le=86400)] = 60
    log_retention_days: Annotated[int, Field(ge=1, le=36500)] = 90
    create_quota_kib_per_minute: Annotated[int, Field(ge=0)] = 16384  # an address; 0: no quota
    api_tokens: SecretStr = SecretStr("")  # with commas between them; creating needs one of them
    # What links begin with; empty: the address of the request.
    public_url: Annotated[str, Field(pattern=r"""^(https?://[^\s?#"'<>\\]+)?$""")] = ""
    forwarded_allow_ips: str = "127.0.0.1"  # addresses and networks whose X-Forwarded-* count
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _as_networks(cls, text: str) -> str:
        """Read 172.18.0.1/16 as its network. uvicorn itself would silently match nothing."""
        if text.strip() == "*":
            return "*"
        networks = []
        for number, part in enumerate(text.split(","), 1):
            try:
                networks.append(str(ipaddress.ip_network(part.strip(), strict=False)))
            except ValueError:
                raise ValueError(f"entry {number} is no IP address and no network") from None
        return ",".join(networks)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.default_ttl_seconds > self.max_ttl_seconds:
            raise ValueError("DEFAULT_TTL_SECONDS is larger than MAX_TTL_SECONDS")
        if self.log_retention_days * 86400 < self.max_ttl_seconds:
            raise ValueError("LOG_RETENTION_DAYS is shorter than MAX_TTL_SECONDS")
        if self.postgres_port.count(",") not in (0, self.postgres_host.count(",")):
            raise ValueError("POSTGRES_PORT needs one port, or as many as POSTGRES_HOST has hosts")
        return self


def load_settings() -> Settings:
    """Exit with one line that names a bad variable, and not its value: it may be a password."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = f"{first['loc'][0]}: ".upper() if first["loc"] else ""
        raise SystemExit(f"{name}{first['msg'].removeprefix('Value error, ')}") from None


settings: Final = load_settings()

# --- Errors -----------------------------------------------------------------------------------
# Whatever a caller is refused is a ServiceError, whose Code stands here with its status and its
# sentence. `problem`, under "Application", is the only place that writes one. UNAVAILABLE promises
# that nothing has happened; where a claim was sent and its answer did not come, the code is
# OUTCOME_UNKNOWN instead.

TOO_LARGE_DETAIL: Final = f"A secret may have at most {settings.max_secret_bytes} bytes."
RETRY_SOON: Final = {"Retry-After": "2"}  # seconds


class Code(StrEnum):
    """What went wrong: a name for programs, the status, and a sentence for people."""

    status: HTTPStatus
    detail: str

    def __new__(cls, name: str, status: int, detail: str = "") -> "Code":
        code = str.__new__(cls, name)
        code._value_ = name
        code.status = HTTPStatus(status)
        code.detail = detail
        return code

    BAD_REQUEST = "bad_request", 400
    UPGRADE_REFUSED = (
        "upgrade_refused",
        400,
        "A body together with the header Upgrade is refused. Ask in HTTP/1.1: curl --http1.1, or "
        "HttpClient.Version.HTTP_1_1.",
    )
    TOKEN_REQUIRED = (
        "token_required",
        401,
        "Creating a secret here needs a token: Authorization: Bearer ...",
    )
    PASSPHRASE_REQUIRED = "passphrase_required", 403, "This needs the secret's passphrase."
    WRONG_PASSPHRASE = "wrong_passphrase", 403
    NOT_FOUND = (
        "not_found",
        404,
        "No secret with this key was ever here, or its history has ended.",
    )
    METHOD_NOT_ALLOWED = "method_not_allowed", 405
    TIMEOUT = "timeout", 408
    ALREADY_READ = "already_read", 410
    DELETED = "deleted", 410
    EXPIRED = "expired", 410
    TOO_LARGE = "too_large", 413, TOO_LARGE_DETAIL
    UNSUPPORTED_ENCODING = (
        "unsupported_encoding",
        415,
        "The secret would be stored as it is encoded. Send it without Content-Encoding.",
    )
    INVALID = "invalid", 422
    TOO_MANY_ATTEMPTS = "too_many_attempts", 429
    RATE_LIMITED = "rate_limited", 429
    DAMAGED = "damaged", 500, "What is stored of this secret was altered or damaged."
    INTERNAL = "internal", 500, "Something here is broken. It has been logged."
    UNAVAILABLE = "unavailable", 503
    OUTCOME_UNKNOWN = (
        "outcome_unknown",
        503,
        "The database did not answer: this call may have ended the secret. Its status tells.",
    )
    STORAGE_FULL = (
        "storage_full",
        507,
        "Nothing more can be stored here right now; what is stored can be read.",
    )


class ServiceError(Exception):
    """What a caller is told, none of it ever input. `members` join the problem document."""

    def __init__(
        self,
        code: Code,
        detail: str | None = None,
        headers: dict[str, str] | None = None,
        **members: object,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail or code.detail
        self.headers = headers
        self.members = members


class Unavailable(ServiceError):  # noqa: N818 - it has the code's name
    """Nothing has happened, unless `maybe_executed`: then PostgreSQL may have done it after all."""

    def __init__(
        self, reason: str = "The database cannot answer right now", *, maybe_executed: bool = False
    ) -> None:
        super().__init__(Code.UNAVAILABLE, f"{reason}; nothing has happened.", RETRY_SOON)
        self.maybe_executed = maybe_executed


class Outage:
    """Logs when a store stops answering and when it answers again, however many requests ask."""

    CALM_SECONDS: Final = 5.0  # without a failure until it is over

    def __init__(self, store: str) -> None:
        self._store = store
        self._failed_at = -math.inf

    def fails(self, error: BaseException) -> None:
        """The message of an error may quote a value: only its type is told."""
        if self._failed_at + self.CALM_SECONDS < time.monotonic():
            log.warning("%s cannot answer: %s", self._store, type(error).__name__)
        self._failed_at = time.monotonic()

    def answers(self) -> None:
        if -math.inf < self._failed_at < time.monotonic() - self.CALM_SECONDS:
            log.warning("%s answers again", self._store)
            self._failed_at = -math.inf


# --- Cryptography -----------------------------------------------------------------------------
#     receipt_key --HKDF--> secret_key --SHA-256--> id            each arrow is one-way
#     ciphertext  = Fernet(data_key).encrypt(secret)              data_key: fresh for every secret
#     wrapped_key = Fernet(key-encryption key).encrypt(data_key)
#     key-encryption key =
#         HKDF(secret_key + passphrase_key, salt = encryption_key, info = label + id)
#
# The key-encryption key needs the link and the operator's key together: a dump lacks the link, and
# a stolen link cannot be tried offline. The id in it ties a wrapped_key to its row: swapped between
# two rows, neither opens. This room is pure: it reads no clock but for new keys, and no store.

KEY_BYTES: Final = 24  # of a secret_key or receipt_key: 32 characters of base64 without padding
KEY_TIME_BYTES: Final = 4  # of those, the second of creation; 20 random bytes are beyond guessing
KEY_PATTERN: Final = "^[A-Za-z0-9_-]{32}$"
SECRET_KEY_LABEL: Final = b"one-time-secrets secret key"  # HKDF labels: each derivation has its
WRAPPING_LABEL: Final = b"one-time-secrets wrapping key"  # own, so that no key is ever used for
VERIFIER_LABEL: Final = b"one-time-secrets passphrase verifier"  # two purposes
FINGERPRINT_LABEL: Final = b"one-time-secrets fingerprint"
ARGON2_MEMORY_KIB: Final = 19 * 1024  # OWASP Password Storage Cheat Sheet, second Argon2id profile
ARGON2_SALT_BYTES: Final = 16

ReceiptKey = NewType("ReceiptKey", bytes)
SecretKey = NewType("SecretKey", bytes)
SecretId = NewType("SecretId", UUID)


@dataclass(frozen=True, slots=True)
class EncryptionKey:
    """One of the operator's keys, and the fingerprint by which a row refers to it."""

    raw: bytes = field(repr=False)
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Plaintext:
    """What a creator hands in and a reader gets."""

    secret: bytes = field(repr=False)
    filename: str | None = field(default=None, repr=False)


class Sealed(NamedTuple):
    """Fernet tokens: of the secret and its filename under the data_key, and of the data_key."""

    ciphertext: bytes
    wrapped_key: bytes
    filename: bytes | None


@dataclass(frozen=True, slots=True)
class PassphraseKeys:
    """What the two halves of Argon2id's output become."""

    passphrase_key: bytes = field(repr=False)
    verifier: bytes  # stored; keyed with the link, so that a dump cannot tell a right guess


def parse_encryption_keys(text: str) -> list[EncryptionKey]:
    """The first wraps, any unwraps. Raises ValueError, without the text, for anything else."""
    keys = []
    for part in text.split(","):
        if part.strip():
            Fernet(part.strip())  # raises for what is no key
            raw = base64.urlsafe_b64decode(part.strip())
            fingerprint = hashlib.sha256(FINGERPRINT_LABEL + raw).hexdigest()[:16]
            keys.append(EncryptionKey(raw, fingerprint))
    if not keys:
        raise ValueError("There is no key")
    return keys


def new_receipt_key() -> ReceiptKey:
    """Time, then randomness: ids come in order, which halves an insert beside millions."""
    created = int(time.time()).to_bytes(KEY_TIME_BYTES, "big")
    return ReceiptKey(created + os.urandom(KEY_BYTES - KEY_TIME_BYTES))


def secret_key_of(receipt_key: ReceiptKey) -> SecretKey:
    kdf = HKDF(SHA256(), KEY_BYTES - KEY_TIME_BYTES, salt=None, info=SECRET_KEY_LABEL)
    return SecretKey(receipt_key[:KEY_TIME_BYTES] + kdf.derive(receipt_key))


def secret_id_of(secret_key: SecretKey) -> SecretId:
    """The time, then 12 bytes of SHA-256: names the row, the Redis keys and the log rows."""
    digest = hashlib.sha256(secret_key).digest()
    return SecretId(UUID(bytes=secret_key[:KEY_TIME_BYTES] + digest[: 16 - KEY_TIME_BYTES]))


def parse_key(text: str) -> bytes:
    """The bytes of a secret_key or receipt_key. Raises not_found for what has not its form."""
    if not re.fullmatch(KEY_PATTERN, text):
        raise ServiceError(Code.NOT_FOUND)
    return base64.urlsafe_b64decode(text)


def _key_encryption_key(key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes) -> Fernet:
    info = WRAPPING_LABEL + secret_id_of(secret_key).bytes
    derived = HKDF(SHA256(), 32, salt=key.raw, info=info).derive(secret_key + passphrase_key)
    return Fernet(base64.urlsafe_b64encode(derived))


def seal(
    plaintext: Plaintext, key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes = b""
) -> Sealed:
    """Encrypt under a fresh data_key."""
    data_key = Fernet.generate_key()
    fernet = Fernet(data_key)
    name = plaintext.filename
    return Sealed(
        ciphertext=fernet.encrypt(plaintext.secret),
        wrapped_key=_key_encryption_key(key, secret_key, passphrase_key).encrypt(data_key),
        filename=None if name is None else fernet.encrypt(name.encode()),
    )


def unseal(
    sealed: Sealed, key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes = b""
) -> Plaintext:
    """Undo seal(). Raises cryptography.fernet.InvalidToken for a token altered, cut or swapped."""
    kek = _key_encryption_key(key, secret_key, passphrase_key)
    fernet = Fernet(kek.decrypt(sealed.wrapped_key))
    name = sealed.filename
    return Plaintext(
        secret=fernet.decrypt(sealed.ciphertext),
        filename=None if name is None else fernet.decrypt(name).decode(),
    )


def derive_passphrase_keys(
    passphrase: str, salt: bytes, key: EncryptionKey, secret_key: SecretKey
) -> PassphraseKeys:
    """Argon2id: 22 ms of a core, without the GIL. NFKC first, so that an accent typed on a phone
    and on a laptop is the same passphrase (NIST SP 800-63B, 3.1.1.2)."""
    argon2 = Argon2id(salt=salt, length=64, iterations=2, lanes=1, memory_cost=ARGON2_MEMORY_KIB)
    output = argon2.derive(unicodedata.normalize("NFKC", passphrase).encode())
    verifier = hmac.digest(key.raw + secret_key, VERIFIER_LABEL + output[32:], "sha256")
    return PassphraseKeys(output[:32], verifier)


# --- PostgreSQL: statements -------------------------------------------------------------------
# Each statement is a transaction of its own, and the rows that come back are the answer. All times
# are the server's. The server ends a statement after a second, before POSTGRES_TIMEOUT_SECONDS,
# with an error, which is an answer.

# Rows are found by index: a plan made for small tables would read them whole, and would stay in
# use when they grow. These are statements because poolers such as PgBouncer refuse them at the
# start of a connection.
SESSION_SETTINGS: Final = """
    set application_name = 'one-time-secrets'; set synchronous_commit = on;
    set statement_timeout = '1000 ms'; set timezone = 'UTC';
    set plan_cache_mode = force_generic_plan; set enable_seqscan = off;
    set enable_hashjoin = off; set enable_mergejoin = off; set jit = off
"""

# The commit point of every creation, read and deletion: inserts the new secrets, ends each claimed
# one for one caller (a row is deleted once), logs both, and returns the time with the claimed rows,
# by their numbers from 1. It skips rows that others hold, because batches that wait for each other
# deadlock, and rows under an encryption_key that this process lacks (a rotation under way). Nothing
# happens from the deadline, $18, on: a hung server that wakes executes what lies in its socket,
# when nobody hears its answer any more. One statement for both kinds, because a commit costs more
# than all the rest: as two, 16 connections had 0.32 of an echo's cycles instead of 0.39.
COMMIT_BATCH: Final = """
    with new as (
        select * from unnest(
            $1::uuid[], $2::bytea[], $3::bytea[], $4::text[], $5::bytea[], $6::bytea[],
            $7::text[], $8::int[], $9::text[], $10::text[]
        ) as new (
            id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
            passphrase_scope, ttl_seconds, ip_address, user_agent
        )
        where now() < $18
    ), created as (
        insert into secrets (
            id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
            passphrase_scope, expires_at
        )
        select id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
               passphrase_scope, now() + make_interval(secs => ttl_seconds)
        from new
    ), candidate as (
        select claim.*
        from unnest($11::uuid[], $12::text[], $13::bool[], $14::text[], $15::text[], $16::text[])
            with ordinality as claim (
                id, action, authorized, by, ip_address, user_agent, number
            )
        cross join lateral (  -- a plain join could come by expires_at's index, past dead rows
            select * from secrets where secrets.id = claim.id for update skip locked
        ) as held
        where now() < $18
          and held.expires_at > now()
          and held.key_fingerprint = any($17::text[])
          and (
              claim.authorized
              or held.passphrase_scope is null
              or (held.passphrase_scope = 'delete' and claim.action = 'read')
          )
    ), claimed as (
        delete from secrets using candidate where secrets.id = candidate.id
        returning
            candidate.*, secrets.ciphertext, secrets.wrapped_key, secrets.key_fingerprint
    ), logged as (
        insert into secret_logs (secret_id, action, ip_address, extra_data)
        select id, 'created', ip_address::inet, jsonb_strip_nulls(jsonb_build_object(
            'user_agent', user_agent, 'ttl_seconds', ttl_seconds, 'passphrase', passphrase_scope
        ))
        from new
        union all
        select id, action, ip_address::inet, jsonb_build_object('user_agent', user_agent, 'by', by)
        from claimed
    )
    select now() as committed_at, number, key_fingerprint, ciphertext, wrapped_key
    from (values (0)) as always left join claimed on true
"""


class NewSecret(NamedTuple):
    """A secret to store: $1 to $10 of COMMIT_BATCH, in their order."""

    id: SecretId
    ciphertext: bytes
    wrapped_key: bytes
    key_fingerprint: str
    passphrase_salt: bytes | None
    passphrase_verifier: bytes | None
    passphrase_scope: "PassphraseScope | None"
    ttl_seconds: int
    ip_address: str | None
    user_agent: str


class Claim(NamedTuple):
    """A secret to end: $11 to $16 of COMMIT_BATCH, in their order."""

    id: SecretId
    action: "Action"
    authorized: bool
    by: "KeyKind"
    ip_address: str | None
    user_agent: str


# Looks without touching, at the row, if it is still there, and at all that the log has. A secret
# is stored once and ends once: min and max pick that log row. `status` is null for an id that was
# never here. $2: attempts before a pause, $3: minutes of the first pause.
FIND_SECRET: Final = """
    select
        case
            when secrets.expires_at <= now() then 'expired'
            when secrets.id is not null then 'unread'
            else ending
        end as status,
        secrets.expires_at,
        passphrase_scope,
        key_fingerprint,
        coalesce(ending_at, secrets.expires_at) as ended_at,
        retry_at,
        ceil(extract(epoch from retry_at - now()))::int as retry_seconds,
        stored_at,
        stored_until,
        events
    from (
        select
            min(created_at) filter (where action = 'created') as stored_at,
            min(created_at + make_interval(secs => (extra_data ->> 'ttl_seconds')::int))
                as stored_until,
            max(action) filter (where action in ('read', 'deleted', 'expired')) as ending,
            max(coalesce((extra_data ->> 'expires_at')::timestamptz, created_at))
                filter (where action in ('read', 'deleted', 'expired')) as ending_at,
            jsonb_agg(to_jsonb(secret_logs) || extra_data order by id)::text as events
        from secret_logs where secret_id = $1
    ) as log
    left join secrets on secrets.id = $1
    cross join lateral (
        select case when attempts > 0 and attempts % $2 = 0 then
            attempts_since + make_interval(mins => $3) * power(2, attempts / $2 - 1)
        end as retry_at
    ) as pause
"""

# Charges a passphrase attempt *before* it is checked: a hundred at once must not be checked for the
# price of one. No row: the secret is gone, or a pause is on. `attempts` are all that were ever
# charged, `attempts_since` is the time of the last one.
CHARGE_ATTEMPT: Final = """
    update secrets set attempts = attempts + 1, attempts_since = now()
    where id = $1
      and expires_at > now()
      and (
          attempts % $2 > 0
          or attempts = 0
          or attempts_since + make_interval(mins => $3) * power(2, attempts / $2 - 1) <= now()
      )
    returning passphrase_salt, passphrase_verifier, ($2 - attempts % $2) % $2 as attempts_left
"""

FORGET_ATTEMPTS: Final = "update secrets set attempts = 0 where id = $1"

# Only charged attempts are logged, so that nobody can fill the disk with refusals.
LOG_DENIED: Final = """
    insert into secret_logs (secret_id, action, ip_address, extra_data)
    values ($1, 'denied', $2::text::inet, jsonb_build_object(
        'user_agent', $3::text, 'reason', 'wrong_passphrase', 'wanted', $4::text
    ))
"""

# Ends and logs up to $1 expired secrets, past those that a claim or another worker's loop holds.
DELETE_EXPIRED: Final = """
    with expired as (
        delete from secrets where id = any(array(
            select id from secrets where expires_at <= now()
            order by expires_at limit $1 for update skip locked
        ))
        returning id, expires_at
    )
    insert into secret_logs (secret_id, action, extra_data)
    select id, 'expired', jsonb_build_object('expires_at', expires_at) from expired
    returning secret_id
"""

# Ends up to $1 log rows past their retention of $2 days. The lowest ids are the oldest: no index
# on time is needed, and only rows that are old are locked.
DELETE_OLD_LOGS: Final = """
    delete from secret_logs where id = any(array(
        select id from secret_logs
        where id = any(array(select id from secret_logs order by id limit $1))
          and created_at < now() - make_interval(days => $2)
        for update skip locked
    ))
    returning id
"""

# Secrets are wrapped with key $1 now: it is needed for $2 seconds from now. Pushed on, never back.
EXTEND_KEY_RETENTION: Final = """
    insert into encryption_keys as known (fingerprint, needed_until)
    values ($1, now() + make_interval(secs => $2))
    on conflict (fingerprint) do update
    set needed_until = greatest(known.needed_until, excluded.needed_until)
"""

# --- PostgreSQL: connections ------------------------------------------------------------------
# A pool of a few connections to whichever of the servers takes writes, and one way to ask it. What
# matters is what is known after a failure. An ERROR undoes its statement: nothing has happened. A
# FATAL ends the session and may come after a commit, and so may silence: `maybe_executed`. A
# statement whose answer did not come is cancelled on the server too, because a backend that waits
# for a lost synchronous standby does not notice that its client has gone.

POSTGRES_CONNECTIONS: Final = 8  # a worker: for a batch under way, and a few for everything else
POSTGRES_TIMEOUT_SECONDS: Final = 1.5  # for a statement, and for a connection to one server
LAST_LOOK_SECONDS: Final = 0.05
CANCEL_SECONDS: Final = 1.0  # for a cancel request to reach the server, then the connection is cut

PostgresConnection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def _keep_session(_: PostgresConnection) -> None:
    """In place of asyncpg's reset on release: nothing here changes a session's state."""


class Database:
    """PostgreSQL, the one of its servers that takes writes."""

    def __init__(self) -> None:
        hosts = settings.postgres_host.split(",")
        ports = [int(port) for port in settings.postgres_port.split(",")]
        if len(ports) == 1:
            ports *= len(hosts)
        self._servers = list(zip(hosts, ports, strict=True))
        self._outage = Outage("PostgreSQL")
        self.clock_offset = timedelta(0)  # PostgreSQL's clock less ours

    async def open(self) -> None:
        self._pool = await asyncpg.create_pool(
            connect=self.connect,
            reset=_keep_session,
            min_size=0,
            max_size=POSTGRES_CONNECTIONS,
            max_inactive_connection_lifetime=0,
        )

    def close(self) -> None:
        self._pool.terminate()

    async def connect(self, *_: object, **__: object) -> PostgresConnection:
        """To the first server that takes writes. Raises what the last one did."""
        failure = Exception()
        for host, port in self._servers.copy():
            try:
                async with asyncio.timeout(POSTGRES_TIMEOUT_SECONDS):
                    return await self._connect_to(host, port)
            except Exception as error:  # asyncpg's have no class in common
                failure = error
                self._servers.sort(key=(host, port).__eq__)  # it is asked last from now on
        raise failure

    async def _connect_to(self, host: str, port: int) -> PostgresConnection:
        connection: PostgresConnection = await asyncpg.connect(
            "postgres://?target_session_attrs=read-write",
            host=host,
            port=port,
            database=settings.postgres_db,
            user=settings.postgres_user,
            password=settings.postgres_password.get_secret_value() or None,
        )
        try:
            await connection.execute(SESSION_SETTINGS)
            self.clock_offset = await connection.fetchval("select now()") - datetime.now(UTC)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Run one statement. Raises Unavailable, with `maybe_executed` where that is so."""
        connection = None
        rolled_back = False
        try:
            seconds = POSTGRES_TIMEOUT_SECONDS * (1 + len(self._servers))
            connection = await self._pool.acquire(timeout=seconds)
            rows = await self._fetch_in_time(connection, statement, arguments)
            self._outage.answers()
            return rows
        except Exception as error:  # asyncpg's, the system's, a broken connection's parser's
            rolled_back = getattr(error, "severity_en", None) == "ERROR"
            if not rolled_back or isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                await self._pool.expire_connections()
            self._outage.fails(error)
            maybe_executed = connection is not None and not rolled_back
            raise Unavailable(maybe_executed=maybe_executed) from None
        finally:
            if connection is not None:
                with suppress(Exception):  # it is cut then
                    await self._pool.release(connection, timeout=CANCEL_SECONDS)

    async def _fetch_in_time(
        self,
        connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]",
        statement: str,
        arguments: Sequence[object],
    ) -> list[asyncpg.Record]:
        """A process that was frozen finds its alarm before the answer that lies in its socket: one
        last look for that, then the statement is cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:

            def take_last_look() -> None:
                limit.reschedule(loop.time() + LAST_LOOK_SECONDS)

            alarm = loop.call_later(POSTGRES_TIMEOUT_SECONDS, take_last_look)
            try:
                return await connection.fetch(statement, *arguments)
            finally:
                alarm.cancel()


# --- Redis ------------------------------------------------------------------------------------
#     secret:ID          ciphertext, CACHE_SECONDS from creation, even after a read: by then it is
#                        noise, for the key that opens it went with GETDEL
#     key:ID             wrapped_key, until the read or the expiry, at most as long; never where
#                        reading needs a passphrase
#     quota:NET:MINUTE   KiB stored from there in that minute
#
# A circuit breaker around one exchange on one connection. Nothing depends on an answer: after a
# failure Redis is left alone for a while, and everything goes on without it.

REDIS_TIMEOUT_SECONDS: Final = 0.25  # what a request may lose to a hung cache
REDIS_BREAKER_SECONDS: Final = 3.0  # then Redis is left alone so long

RedisCommand: TypeAlias = tuple[str | bytes | int, ...]


class Redis:
    """redis-py's connection, without its pool and pipeline, which took 50 to 90 us more a batch."""

    def __init__(self) -> None:
        url = settings.redis_url.get_secret_value()
        url = url or f"redis://{settings.redis_host}:{settings.redis_port}"
        try:
            # No timeout a command: exchange() has one for all.
            pool = ConnectionPool.from_url(url, socket_timeout=None)
            self._connection = pool.make_connection()  # type: ignore[no-untyped-call]
        except Exception:  # of several kinds, whose messages quote the URL
            raise SystemExit("REDIS_URL: redis-py cannot take this URL or its options") from None
        self._turn = asyncio.Lock()
        self._resume_at = -math.inf
        self._outage = Outage("Redis")

    async def exchange(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """Send the commands as one. Returns an answer for each, or none at all."""
        async with self._turn:
            if time.monotonic() < self._resume_at:
                return []
            try:
                answers = await self.converse(commands)
            except Exception as error:  # whatever it is: PostgreSQL decides meanwhile
                self._resume_at = time.monotonic() + REDIS_BREAKER_SECONDS
                self._outage.fails(error)
                await self.close()
                return []
            self._outage.answers()
            return answers

    async def converse(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """The same without the breaker: raises whatever goes wrong."""
        async with asyncio.timeout(REDIS_TIMEOUT_SECONDS):
            packed = b"".join(pack_command(command) for command in commands)  # type: ignore[arg-type]  # its stub takes tuples of one only
            await self._connection.send_packed_command(packed)  # connects first, if need be
            return [await self._connection.read_response(disable_decoding=True) for _ in commands]

    async def close(self) -> None:
        await self._connection.disconnect(nowait=True)


# --- Group commit -----------------------------------------------------------------------------
# A commit costs about the same for one row as for a hundred. Who comes while a batch is being
# written leaves with the next one; a lone request leaves at once. A batch that fails fails its own
# rows only, each with an error of its own. The writer task outlives whatever happens to a row or a
# batch: should it ever end with rows left, these would wait for ever, and health would not show it.

BATCH_LINGER_TICKS: Final = 5  # event loop iterations to wait before writing, so that requests
# already in a socket's buffer (three iterations away) join the batch: 24 instead of 13 of 64

Row = TypeVar("Row")
Result = TypeVar("Result")


class BatchFailed(Exception):  # noqa: N818 - what happened, not what is wrong
    """Writing this row's batch raised `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(type(cause).__name__)
        self.cause = cause


@dataclass(eq=False, slots=True)
class Pending(Generic[Row, Result]):
    """A row that waits for its batch. `check` raises when nobody wants its result any more."""

    row: Row = field(repr=False)
    weight: int
    check: Callable[[], None]
    result: "asyncio.Future[Result]"


class Batcher(Generic[Row, Result]):
    """Writes what arrives together. `write` takes rows, and returns a result for each, in order."""

    def __init__(
        self, write: Callable[[list[Row]], Awaitable[list[Result]]], max_weight: int
    ) -> None:
        self._write = write
        self._max_weight = max_weight  # of a batch: the row that reaches it is its last
        self._waiting = deque[Pending[Row, Result]]()
        self._writing: asyncio.Task[None] | None = None

    async def submit(self, row: Row, weight: int, check: Callable[[], None]) -> Result:
        """Raises BatchFailed, or what `check` raises: then the row was not written."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append(Pending(row, weight, check, result))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_batches())
        return await result

    async def _write_batches(self) -> None:
        try:
            while self._waiting:
                for _ in range(BATCH_LINGER_TICKS):
                    await asyncio.sleep(0)
                batch = self._next_batch()
                if batch:
                    await self._write_batch(batch)
        finally:
            self._writing = None

    def _next_batch(self) -> list[Pending[Row, Result]]:
        batch = []
        weight = 0
        while self._waiting and weight < self._max_weight:
            pending = self._waiting.popleft()
            if pending.result.done():  # its caller was cancelled
                continue
            try:
                pending.check()
            except Exception as error:
                pending.result.set_exception(error)
            else:
                batch.append(pending)
                weight += pending.weight
        return batch

    async def _write_batch(self, batch: list[Pending[Row, Result]]) -> None:
        try:
            results = await self._write([pending.row for pending in batch])
            settled = list(zip(batch, results, strict=True))
        except Exception as error:
            for pending in batch:
                if not pending.result.done():
                    pending.result.set_exception(BatchFailed(error))
        else:
            for pending, result in settled:
                if not pending.result.done():
                    pending.result.set_result(result)


# --- Callers, and what each may take ----------------------------------------------------------
# Whatever is scarce is shared by address, so that one caller cannot take all of it: the bytes that
# a minute may store, turns at Argon2id, memory for bodies that are slow to come. An IPv6 caller
# usually has a whole /64, which counts as one address.

QUEUE_TIMEOUT_SECONDS: Final = 10.0  # the longest wait for a batch or a turn; then 503, unsent
ARGON2_WAITING: Final = 128  # for each core: passphrases that wait or are under way
ARGON2_WAITING_A_NETWORK: Final = 32  # of those
BODY_BUDGET_BYTES: Final = 64 * 1024 * 1024  # a worker: bodies that did not come at once
BODY_MIN_CHARGE_BYTES: Final = 128 * 1024  # what each of them counts at least: 512 in all


@lru_cache(maxsize=4096)
def parse_address(text: str) -> str:
    """IPv4 over an IPv6 socket is IPv4. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


@lru_cache(maxsize=4096)
def network_of(ip_address: str | None) -> str:
    if ip_address and ":" in ip_address:
        return str(ipaddress.ip_network(f"{ip_address}/64", strict=False))
    return ip_address or "unknown"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as far as the operations need to know."""

    ip_address: str | None
    user_agent: str
    has_left: Callable[[], bool]
    deadline: float  # of the monotonic clock

    @property
    def network(self) -> str:
        return network_of(self.ip_address)

    def check(self) -> None:
        """Raises ClientDisconnect or Unavailable when there is no use in going on."""
        if self.has_left():
            raise ClientDisconnect()
        if time.monotonic() > self.deadline:
            raise Unavailable("Too much is waiting here")


class Quota:
    """KiB that each network stored in this minute, counted by the names of the keys in Redis.
    Charged before anything is sent, and added up in Redis for all workers; the larger count holds,
    so that without Redis it is this worker's own."""

    def __init__(self, kib_per_minute: int) -> None:
        self._limit = kib_per_minute  # 0: none
        self._minute = 0
        self._clear()

    def _clear(self) -> None:
        self._own = Counter[str]()
        self._shared = Counter[str]()  # as Redis last said
        self._unsent = Counter[str]()

    def charge(self, network: str, size_bytes: int) -> None:
        """Raises rate_limited once the quota is used up; the secret that does so is still taken."""
        if not self._limit:
            return
        minute, seconds = divmod(int(time.time()), 60)
        if minute != self._minute:
            self._minute = minute
            self._clear()
        name = f"quota:{network}:{minute}"
        if max(self._own[name], self._shared[name] + self._unsent[name]) >= self._limit:
            wait = 60 - seconds
            detail = f"Your address has stored its quota for this minute. Try again in {wait} s."
            raise ServiceError(Code.RATE_LIMITED, detail, {"Retry-After": str(wait)})
        kib = math.ceil(max(size_bytes, 1) / 1024)
        self._own[name] += kib
        self._unsent[name] += kib

    def take_unsent(self) -> Counter[str]:
        """What Redis has not been told yet, by the name of its key there: it is told once."""
        unsent = self._unsent
        self._unsent = Counter[str]()
        return unsent

    def learn(self, name: str, kib: int) -> None:
        """What Redis counts for all workers."""
        self._shared[name] = kib


class Shares:
    """Something scarce that networks share: none takes more than its part, but always a piece."""

    def __init__(self, what: str, total: int, part: int) -> None:
        self._refusal = f"Too many {what} at once"
        self._total = total
        self._part = part
        self._taken = Counter[str]()

    @contextmanager
    def take(self, network: str, amount: int = 1) -> Iterator[None]:
        """Raises Unavailable at once where there is no room."""
        own = self._taken[network]
        if self._taken.total() + amount > self._total or (own and own + amount > self._part):
            raise Unavailable(self._refusal)
        self._taken[network] += amount
        try:
            yield
        finally:
            self._taken[network] -= amount
            self._taken += Counter()  # drops what is zero


class Argon2Queue:
    """Turns at Argon2id, which takes a core and 19 MiB: more at once would only take memory.
    Readers and creators queue apart; within a queue the networks take turns."""

    def __init__(self, cores: int) -> None:
        self._cores = asyncio.Semaphore(cores)
        total, part = ARGON2_WAITING * cores, ARGON2_WAITING_A_NETWORK * cores
        self._places = [Shares("passphrases", total, part) for _ in (False, True)]
        # Of the creators one at a time comes before the readers: these wait for it 22 ms at most.
        self._lanes = [asyncio.Semaphore(total), asyncio.Semaphore(1)]
        self._turns = weakref.WeakValueDictionary[tuple[bool, str], asyncio.Semaphore]()

    @asynccontextmanager
    async def turn(self, caller: Caller, *, creating: bool) -> AsyncIterator[None]:
        """Raises Unavailable at once for whoever does not fit into the queue."""
        own_turn = self._turns.setdefault((creating, caller.network), asyncio.Semaphore(1))
        with self._places[creating].take(caller.network):
            async with own_turn, self._lanes[creating], self._cores:
                caller.check()
                yield


def usable_cores() -> int:
    """For each worker: of those that the process may use, by affinity and by its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # no such file: no Linux, or no cgroup v2
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores or 1, math.ceil(int(quota) / int(period)))  # ValueError for "max"
    return max(1, (cores or 1) // settings.workers)


# --- Operations -------------------------------------------------------------------------------
# A method for each promise, and the only place where PostgreSQL, Redis and the cryptography meet.
# Nothing here knows HTTP. All raise ServiceError, and ClientDisconnect where nobody waits any more.

MAX_PASSPHRASE_CHARACTERS: Final = 1024
ATTEMPTS: Final = 5  # passphrase attempts until a pause, whoever asks ...
ATTEMPT_PAUSE_MINUTES: Final = 15  # ... which doubles each time: some 50 guesses in 7 days
BATCH_BYTES: Final = 4 * 1024 * 1024  # of a statement: well within its timeout ...
BATCH_ROW_BYTES: Final = 32 * 1024  # ... counting small rows as this, which makes it 128 of them
LARGE_BYTES: Final = 32 * 1024  # from here on a thread seals, opens and parses: 100 us a time
CLAIM_BACKOFF_SECONDS: Final = (0.02, 0.04, 0.08, 0.16, 0.32, 0.0)  # after another held the row

PassphraseScope = Literal["delete", "read"]
KeyKind = Literal["secret_key", "receipt_key"]
Action = Literal["read", "deleted"]
Status = Literal["unread", "read", "deleted", "expired"]

ENDED_CODES: Final[dict[str, Code]] = {
    "read": Code.ALREADY_READ,
    "deleted": Code.DELETED,
    "expired": Code.EXPIRED,
}


class ReceiptEvent(BaseModel):
    """`by`: the key that was shown; `reason`: why it was denied."""

    action: Literal["created", "read", "deleted", "expired", "denied"]
    created_at: datetime
    ip_address: Annotated[str | None, Field(examples=["192.0.2.1"])]
    user_agent: Annotated[str | None, Field(examples=["curl/8.14.1"])] = None
    by: KeyKind | None = None
    reason: str | None = None


class Receipt(BaseModel):
    """What became of a secret, as far as the log goes back."""

    status: Status
    created_at: datetime
    expires_at: datetime
    events: list[ReceiptEvent]


@dataclass(frozen=True, slots=True)
class LiveSecret:
    """A secret that can still be read."""

    expires_at: datetime
    passphrase_scope: PassphraseScope | None
    key_fingerprint: str
    retry_at: datetime | None  # until then no passphrase is checked
    retry_seconds: int | None  # the same from now on, by PostgreSQL's clock

    def guards(self, action: Action) -> bool:
        return self.passphrase_scope == "read" or (
            self.passphrase_scope == "delete" and action == "deleted"
        )


@dataclass(frozen=True, slots=True)
class Created:
    receipt_key: ReceiptKey = field(repr=False)
    secret_key: SecretKey = field(repr=False)
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Committed:
    """When a batch was; and for a claim that it granted, what was stored."""

    at: datetime
    stored: asyncpg.Record | None = None


async def in_thread_if_large(
    size_bytes: int, work: Callable[..., Result], *arguments: object
) -> Result:
    """The event loop serves everybody, and 10 MiB would hold it for 0.2 s."""
    if size_bytes > LARGE_BYTES:
        return await asyncio.to_thread(work, *arguments)
    return work(*arguments)


class Vault:
    def __init__(self, database: Database, redis: Redis, keys: list[EncryptionKey]) -> None:
        self.database = database
        self.redis = redis
        self.newest_key = keys[0]
        self.storage_is_full = False  # as the cleanup loop last saw
        self.bodies = Shares("bodies", BODY_BUDGET_BYTES, BODY_BUDGET_BYTES // 2)
        self._keys = {key.fingerprint: key for key in keys}
        self._quota = Quota(settings.create_quota_kib_per_minute)
        self._argon2 = Argon2Queue(usable_cores())
        self._batcher = Batcher[NewSecret | Claim, Committed](self._write, BATCH_BYTES)
        # What a claim will return is unknown: ten at once are possible of 10 MiB each, not 128.
        self._claim_weight = max(BATCH_ROW_BYTES, settings.max_secret_bytes // 24)

    async def create(
        self,
        plaintext: Plaintext,
        caller: Caller,
        *,
        ttl_seconds: int,
        passphrase: str | None,
        passphrase_scope: PassphraseScope,
    ) -> Created:
        """Returns once the secret is durable in PostgreSQL."""
        if self.storage_is_full:
            raise ServiceError(Code.STORAGE_FULL)
        self._quota.charge(caller.network, len(plaintext.secret))
        key = self.newest_key
        receipt_key = new_receipt_key()
        secret_key = secret_key_of(receipt_key)
        salt = verifier = scope = None
        passphrase_key = b""
        if passphrase is not None:
            salt = os.urandom(ARGON2_SALT_BYTES)
            scope = passphrase_scope
            async with self._argon2.turn(caller, creating=True):
                derived = await asyncio.to_thread(
                    derive_passphrase_keys, passphrase, salt, key, secret_key
                )
            verifier = derived.verifier
            if scope == "read":
                passphrase_key = derived.passphrase_key
        sealed = await in_thread_if_large(
            len(plaintext.secret), seal, plaintext, key, secret_key, passphrase_key
        )
        row = NewSecret(
            id=secret_id_of(secret_key),
            ciphertext=sealed.ciphertext,
            wrapped_key=sealed.wrapped_key,
            key_fingerprint=key.fingerprint,
            passphrase_salt=salt,
            passphrase_verifier=verifier,
            passphrase_scope=scope,
            ttl_seconds=ttl_seconds,
            ip_address=caller.ip_address,
            user_agent=caller.user_agent,
        )
        weight = max(len(row.ciphertext), BATCH_ROW_BYTES)
        committed = await self._submit(row, weight, caller)
        expires_at = committed.at + timedelta(seconds=ttl_seconds)
        return Created(receipt_key, secret_key, expires_at)

    async def read(
        self, secret_key: SecretKey, caller: Caller, passphrase: str | None = None
    ) -> Plaintext:
        """Hand the secret out, once. After any error but outcome_unknown and damaged it is as
        readable as before."""
        stored, passphrase_key = await self._claim(secret_key, "read", caller, passphrase)
        sealed = Sealed(stored["ciphertext"], stored["wrapped_key"], None)
        key = self._keys[stored["key_fingerprint"]]
        try:
            return await in_thread_if_large(
                len(sealed.ciphertext), unseal, sealed, key, secret_key, passphrase_key
            )
        except InvalidToken:
            log.error("the row of %s was altered or damaged", secret_id_of(secret_key))
            raise ServiceError(Code.DAMAGED) from None

    async def delete(
        self, secret_key: SecretKey, caller: Caller, passphrase: str | None = None
    ) -> None:
        """Destroy the secret unread."""
        await self._claim(secret_key, "deleted", caller, passphrase)

    async def revoke(self, receipt_key: ReceiptKey, caller: Caller) -> None:
        """Destroy the secret unread, as its creator: no passphrase is asked for."""
        await self._claim(secret_key_of(receipt_key), "deleted", caller, None, by="receipt_key")

    async def _claim(
        self,
        secret_key: SecretKey,
        action: Action,
        caller: Caller,
        passphrase: str | None,
        by: KeyKind = "secret_key",
    ) -> tuple[asyncpg.Record, bytes]:
        """End the secret for this caller alone. Returns what was stored, and the passphrase_key
        that opening it needs. Raises what the log says of one that is gone."""
        claim = Claim(
            id=secret_id_of(secret_key),
            action=action,
            authorized=by == "receipt_key",
            by=by,
            ip_address=caller.ip_address,
            user_agent=caller.user_agent,
        )
        passphrase_key = b""
        for backoff_seconds in CLAIM_BACKOFF_SECONDS:
            committed = await self._submit(claim, self._claim_weight, caller)
            if committed.stored:
                return committed.stored, passphrase_key
            live = await self.find_live(claim.id)
            if live.key_fingerprint not in self._keys:
                raise Unavailable("This secret's encryption key is not at hand here")
            if live.guards(action) and not claim.authorized:
                passphrase_key = await self._check_passphrase(
                    live, secret_key, action, caller, passphrase
                )
                claim = claim._replace(authorized=True)
            else:  # still there: another statement held it
                await asyncio.sleep(backoff_seconds)
        raise Unavailable("This secret is held by another request right now")

    async def _check_passphrase(
        self,
        live: LiveSecret,
        secret_key: SecretKey,
        action: Action,
        caller: Caller,
        passphrase: str | None,
    ) -> bytes:
        """The passphrase_key that reading needs. An attempt is charged before it is checked, and
        only where it can be; a refusal is logged and burns nothing."""
        if passphrase is None:
            raise ServiceError(Code.PASSPHRASE_REQUIRED)
        secret_id = secret_id_of(secret_key)
        async with self._argon2.turn(caller, creating=False):
            charged = await self.database.fetch(
                CHARGE_ATTEMPT, secret_id, ATTEMPTS, ATTEMPT_PAUSE_MINUTES
            )
            if not charged:
                raise _too_many_attempts(await self.find_live(secret_id))
            attempt = charged[0]
            derived = await asyncio.to_thread(
                derive_passphrase_keys,
                passphrase,
                attempt["passphrase_salt"],
                self._keys[live.key_fingerprint],
                secret_key,
            )
        if not hmac.compare_digest(derived.verifier, attempt["passphrase_verifier"]):
            await self.database.fetch(
                LOG_DENIED, secret_id, caller.ip_address, caller.user_agent, action
            )
            left = attempt["attempts_left"]
            detail = f"This is not the secret's passphrase. Attempts left: {left}."
            raise ServiceError(Code.WRONG_PASSPHRASE, detail, attempts_left=left)
        # Should the claim that follows fail, it costs its owner nothing.
        await self.database.fetch(FORGET_ATTEMPTS, secret_id)
        return derived.passphrase_key if live.passphrase_scope == "read" else b""

    async def _submit(self, row: NewSecret | Claim, weight: int, caller: Caller) -> Committed:
        """Have the row committed. A failed creation is told that nothing has happened, even where
        it may be stored: nobody has its link."""
        try:
            return await self._batcher.submit(row, weight, caller.check)
        except BatchFailed as failed:
            cause = failed.cause
            if not isinstance(cause, Unavailable):
                log.error("a batch failed: %s", type(cause).__name__)
            if isinstance(row, Claim) and getattr(cause, "maybe_executed", True):
                raise ServiceError(Code.OUTCOME_UNKNOWN, headers=RETRY_SOON) from None
            raise Unavailable() from None

    async def _write(self, rows: list[NewSecret | Claim]) -> list[Committed]:
        """Let PostgreSQL decide, while Redis takes and forgets copies and counts the quota."""
        new = [row for row in rows if isinstance(row, NewSecret)]
        claims = [row for row in rows if isinstance(row, Claim)]
        caching = asyncio.create_task(self._cache(new, claims))
        try:
            records = await self._commit(new, claims)
        finally:
            await caching
        at = records[0]["committed_at"]
        stored = {record["number"]: record for record in records}
        numbers = {id(claim): number for number, claim in enumerate(claims, 1)}
        return [Committed(at, stored.get(numbers.get(id(row)))) for row in rows]

    async def _commit(self, new: list[NewSecret], claims: list[Claim]) -> list[asyncpg.Record]:
        columns = [*_columns(NewSecret, new), *_columns(Claim, claims), list(self._keys)]
        while True:
            # By PostgreSQL's clock: when fetch() stops waiting for the answer.
            deadline = datetime.now(UTC) + self.database.clock_offset
            deadline += timedelta(seconds=POSTGRES_TIMEOUT_SECONDS)
            records = await self.database.fetch(COMMIT_BATCH, *columns, deadline)
            if records[0]["committed_at"] < deadline:
                return records
            # Nothing was done: we were frozen or too busy to send it in time, or a clock was set.
            self.database.clock_offset = records[0]["committed_at"] - datetime.now(UTC)

    async def _cache(self, new: list[NewSecret], claims: list[Claim]) -> None:
        """Once for a batch, however often it is sent to PostgreSQL."""
        counts = self._quota.take_unsent()
        commands: list[RedisCommand] = [("INCRBY", name, kib) for name, kib in counts.items()]
        commands += [("EXPIRE", name, 60) for name in counts]
        commands += [("GETDEL", f"key:{claim.id}") for claim in claims]
        for row in new:
            seconds = settings.cache_seconds
            commands.append(("SET", f"secret:{row.id}", row.ciphertext, "EX", seconds))
            if row.passphrase_scope != "read":  # later than the ciphertext it would open nothing
                seconds = min(row.ttl_seconds, seconds)
                commands.append(("SET", f"key:{row.id}", row.wrapped_key, "EX", seconds))
        answers = await self.redis.exchange(commands)
        for name, kib in zip(counts, answers, strict=False):
            self._quota.learn(name, kib)

    async def _find(self, secret_id: SecretId) -> asyncpg.Record:
        found = await self.database.fetch(FIND_SECRET, secret_id, ATTEMPTS, ATTEMPT_PAUSE_MINUTES)
        return found[0]

    async def find_live(self, secret_id: SecretId) -> LiveSecret:
        """Look without touching. Raises not_found, already_read, deleted or expired."""
        found = await self._find(secret_id)
        status = found["status"]
        if status is None:
            raise ServiceError(Code.NOT_FOUND)
        if status != "unread":
            verb = "expired" if status == "expired" else f"was {status}"
            when = found["ended_at"].isoformat().replace("+00:00", "Z")
            detail = f"This secret {verb} at {when}."
            if status == "read":
                detail += " If that was not you, treat the secret as compromised."
            raise ServiceError(ENDED_CODES[status], detail, ended_at=found["ended_at"])
        return LiveSecret(
            expires_at=found["expires_at"],
            passphrase_scope=found["passphrase_scope"],
            key_fingerprint=found["key_fingerprint"],
            retry_at=found["retry_at"],
            retry_seconds=found["retry_seconds"],
        )

    async def receipt(self, secret_id: SecretId) -> Receipt:
        """What the log has of a secret, for its creator. Raises not_found when it has nothing."""
        found = await self._find(secret_id)
        if found["stored_at"] is None:
            raise ServiceError(Code.NOT_FOUND)
        return Receipt(
            status=found["status"],
            created_at=found["stored_at"],
            expires_at=found["stored_until"],
            events=[ReceiptEvent(**event) for event in json.loads(found["events"])],
        )

    async def health(self) -> bool:
        """Whether Redis answers. Raises Unavailable unless PostgreSQL takes writes."""
        await self.database.fetch("select from encryption_keys where false for update")
        return bool(await self.redis.exchange([("PING",)]))


def _too_many_attempts(live: LiveSecret) -> ServiceError:
    seconds = max(1, live.retry_seconds or 0)
    detail = f"Too many passphrase attempts. Try again in {seconds} seconds."
    headers = {"Retry-After": str(seconds)}
    return ServiceError(Code.TOO_MANY_ATTEMPTS, detail, headers, retry_at=live.retry_at)


def _columns(kind: type[NewSecret | Claim], rows: Sequence[NewSecret | Claim]) -> Iterable[object]:
    """A list for each field, as unnest() takes them."""
    return zip(*rows, strict=True) if rows else [()] * len(kind._fields)


# --- Cleanup ----------------------------------------------------------------------------------

CLEANUP_ROWS: Final = 1000  # in one statement: some 20 ms of work
STORED_MIB: Final = "select pg_database_size(current_database()) / 1048576 as mib"


async def clean_expired_secrets(vault: Vault) -> None:
    """For ever: end and log expired secrets, forget their cached keys, end log rows past their
    retention. After a full batch the next one follows soon, but after a rest: reads go first."""
    key_seconds = settings.max_ttl_seconds + 2 * settings.cleanup_interval_seconds
    fetch = vault.database.fetch
    while True:
        started = time.monotonic()
        expired: Sequence[object] = ()
        old_logs: Sequence[object] = ()
        try:
            await fetch(EXTEND_KEY_RETENTION, vault.newest_key.fingerprint, key_seconds)
            stored = await fetch(STORED_MIB)
            vault.storage_is_full = 0 < settings.max_stored_mib <= stored[0]["mib"]
            expired = await fetch(DELETE_EXPIRED, CLEANUP_ROWS)
            if expired:
                names = [f"key:{row['secret_id']}" for row in expired]
                await vault.redis.exchange([("DEL", *names)])
            old_logs = await fetch(DELETE_OLD_LOGS, CLEANUP_ROWS, settings.log_retention_days)
            if expired or old_logs:
                log.info("cleanup: %d expired, %d old log rows", len(expired), len(old_logs))
        except Exception as error:  # nobody would start it again
            log.warning("cleanup will be tried again: %s", type(error).__name__)
        if max(len(expired), len(old_logs)) == CLEANUP_ROWS:
            await asyncio.sleep(2 * (time.monotonic() - started))
        else:
            await asyncio.sleep(settings.cleanup_interval_seconds)


# --- Start ------------------------------------------------------------------------------------
# What stands in the way of our promises stops the start, with one line that names the remedy.

POSTGRES_WAIT_SECONDS: Final = 30.0  # a database that boots beside us gets this long
TABLES: Final = ["secrets", "secret_logs", "encryption_keys"]

MISSING_GRANTS: Final = """
    select string_agg(privilege || ' on ' || name, ', ') as missing
    from unnest($1::text[]) as name, unnest('{select,insert,update,delete}'::text[]) as privilege
    where not has_table_privilege(name, privilege)
"""
UNSAFE_SETTINGS: Final = """
    select name from pg_settings where name in ('fsync', 'full_page_writes') and setting = 'off'
"""
MISSING_KEYS: Final = """
    select fingerprint from encryption_keys where fingerprint <> all($1) and needed_until > now()
"""


def load_encryption_keys() -> list[EncryptionKey]:
    """From ENCRYPTION_KEY, else from ENCRYPTION_KEY_FILE, which is made if there is none."""
    text = settings.encryption_key.get_secret_value()
    file = settings.encryption_key_file
    name = "ENCRYPTION_KEY" if text else f"ENCRYPTION_KEY_FILE {file}"
    try:
        if not text:
            if not file.exists():
                _make_key_file(file)
            text = file.read_text("ascii", "replace")
        return parse_encryption_keys(text)
    except (OSError, ValueError) as error:
        remedy = "Name a file that can be made, or keys of 32 bytes in base64."
        raise SystemExit(f"{name}: {error}. {remedy}") from None


def _make_key_file(file: Path) -> None:
    """Never overwrite: written under a name that nobody else uses, synced, then linked. Of two
    starts at once both read the same whole key."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.") as aside:  # 0600
        aside.write(Fernet.generate_key())
        aside.flush()
        os.fsync(aside.fileno())
        with suppress(FileExistsError):
            os.link(aside.name, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or a power failure could lose the name, and with it the key
    finally:
        os.close(folder)


async def wait_for_postgres(database: Database, keys: list[EncryptionKey]) -> None:
    """Until it answers and has been checked. Refusals that waiting cannot mend come at once."""
    where = f"{settings.postgres_host}:{settings.postgres_port}"
    give_up_at = time.monotonic() + POSTGRES_WAIT_SECONDS
    while True:
        try:
            connection = await database.connect()
            try:
                return await check_postgres(connection, keys)
            finally:
                connection.terminate()
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            text = "The tables are missing or older than this program. Load schema.sql."
            raise SystemExit(text) from None
        except (
            asyncpg.InvalidAuthorizationSpecificationError,
            asyncpg.InvalidCatalogNameError,
            asyncpg.InsufficientPrivilegeError,
        ) as error:
            name = type(error).__name__
            text = f"PostgreSQL at {where} refuses us ({name}). Check the POSTGRES_ settings."
            raise SystemExit(text) from None
        except Exception as error:
            if time.monotonic() > give_up_at:
                name = type(error).__name__
                text = f"No PostgreSQL at {where} that takes writes ({name})."
                raise SystemExit(f"{text} Check the POSTGRES_ settings.") from None
            await asyncio.sleep(0.5)


async def check_postgres(connection: PostgresConnection, keys: list[EncryptionKey]) -> None:
    for setting in await connection.fetch(UNSAFE_SETTINGS):
        name = setting["name"]
        text = f"PostgreSQL runs with {name} = off: it may lose what it acknowledged. Switch it on."
        raise SystemExit(text)
    for statement in (COMMIT_BATCH, FIND_SECRET, CHARGE_ATTEMPT, EXTEND_KEY_RETENTION):
        await connection.prepare(statement)  # they name every column
    missing = await connection.fetchval(MISSING_GRANTS, TABLES)
    if missing:
        raise SystemExit(f"{settings.postgres_user} lacks {missing}. Grant it.")
    async with connection.transaction():  # of two starts at once, one finds the other's key
        await connection.execute("lock table encryption_keys in exclusive mode")
        fingerprints = [key.fingerprint for key in keys]
        fingerprint = await connection.fetchval(MISSING_KEYS, fingerprints)
        if fingerprint:
            raise SystemExit(
                f"Unread secrets may need the encryption key with fingerprint {fingerprint}: add "
                "it to ENCRYPTION_KEY, behind the newest, or give them up: delete its row of "
                "encryption_keys."
            )
        seconds = float(settings.max_ttl_seconds)
        await connection.execute(EXTEND_KEY_RETENTION, keys[0].fingerprint, seconds)


async def check_redis(redis: Redis) -> None:
    """Redis may be missing, but what it was configured to be must be right."""
    try:
        await redis.converse([("PING",)])
    except (AuthenticationError, ResponseError) as error:  # no such database, a wrong password
        name = type(error).__name__
        raise SystemExit(f"REDIS_URL: Redis refuses this URL ({name})") from None
    except Exception as error:
        log.warning("Redis is missing (%s): the service goes on without it", type(error).__name__)


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[dict[str, Vault]]:
    keys = load_encryption_keys()
    database = Database()
    redis = Redis()
    await wait_for_postgres(database, keys)
    await check_redis(redis)
    await database.open()
    vault = Vault(database, redis, keys)
    cleaning = asyncio.create_task(clean_expired_secrets(vault))
    gc.freeze()  # the imported modules stay: collecting past them costs 40 ms now and then
    try:
        yield {"vault": vault}
    finally:
        cleaning.cancel()
        database.close()
        await redis.close()


# --- HTTP: models -----------------------------------------------------------------------------

EXAMPLE_KEY: Final = "aR8p4mJx0Zk3vQf7TnB1cWyLh5uEoG2d"
MAX_FIELDS_NAMED: Final = 10  # in a 422

KeyText = Annotated[str, Field(repr=False, examples=[EXAMPLE_KEY])]
KeyInPath = Annotated[KeyText, Field(pattern=KEY_PATTERN)]


class Input(BaseModel):
    """Strict: a misspelt `ttl` must not silently become the default, nor "60" a number."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class RawOptions(Input):
    """The query beside a body that is the secret itself."""

    ttl_seconds: Annotated[int, Field(ge=1, le=settings.max_ttl_seconds)] = (
        settings.default_ttl_seconds
    )


class PresentPassphrase(Input):
    passphrase: Annotated[
        str | None, Field(min_length=1, max_length=MAX_PASSPHRASE_CHARACTERS, repr=False)
    ] = None


class SecretRead(BaseModel):
    secret: Annotated[str, Field(repr=False, examples=["correct horse battery staple"])]
    encoding: Annotated[
        Literal["base64"] | None, Field(description="with it, `secret` is the base64 of bytes")
    ] = None


class CreateSecret(SecretRead, PresentPassphrase, RawOptions):
    passphrase_scope: Annotated[
        PassphraseScope, Field(description="what it guards", examples=["read"])
    ] = "delete"


class SecretCreated(BaseModel):
    secret_key: Annotated[KeyText, Field(description="reads the secret, once")]
    receipt_key: Annotated[
        KeyText, Field(description="shows what became of the secret, revokes it, and opens it, too")
    ]
    expires_at: datetime
    url: Annotated[str, Field(repr=False, examples=[f"https://secrets.example.com/#{EXAMPLE_KEY}"])]
    passphrase_scope: PassphraseScope | None = None


class SecretDeleted(BaseModel):
    status: Literal["secret_deleted"] = "secret_deleted"


class SecretStatus(BaseModel):
    status: Literal["unread"] = "unread"
    expires_at: datetime
    passphrase_required: Annotated[bool, Field(description="for reading")]


class Health(BaseModel):
    status: Annotated[Literal["ok", "degraded"], Field(description="degraded: without Redis")]
    postgres: Literal["up"] = "up"
    redis: Literal["up", "down"]


class InvalidField(BaseModel):
    loc: list[str]
    msg: str
    type: str = "value_error"


class Problem(BaseModel):
    """RFC 9457."""

    type: Literal["about:blank"] = "about:blank"
    title: Annotated[str, Field(examples=["Gone"])]
    status: Annotated[int, Field(examples=[410])]
    detail: Annotated[
        str, Field(description="for people", examples=["This secret expired at 2026-11-21T09:00Z."])
    ]
    code: Annotated[Code, Field(description="for programs", examples=["expired"])]
    errors: Annotated[list[InvalidField] | None, Field(description="with invalid")] = None
    ended_at: Annotated[
        datetime | None, Field(description="with already_read, deleted, expired")
    ] = None
    attempts_left: Annotated[int | None, Field(description="with wrong_passphrase")] = None
    retry_at: Annotated[datetime | None, Field(description="with too_many_attempts")] = None


# --- Reading a request ------------------------------------------------------------------------
# A body is bounded before it is read, while it comes, and before it is parsed; what is refused is
# named, never repeated, in an answer that is shorter than the question.

BODY_SECONDS: Final = 30.0  # for a body to arrive ...
BODY_BYTES_PER_SECOND: Final = 64 * 1024  # ... and longer while it comes with at least this
# JSON needs up to six bytes (\u0000) for one of a secret or passphrase.
MAX_PASSPHRASE_BODY_BYTES: Final = 6 * 4 * MAX_PASSPHRASE_CHARACTERS + 1024
MAX_JSON_BYTES: Final = 6 * settings.max_secret_bytes + MAX_PASSPHRASE_BODY_BYTES
# All that we take is one flat object of short names: what stands outside its strings is short. A
# parser would need 20 times the memory of a body that is nothing but brackets or digits.
MAX_MARKUP_BYTES: Final = 4096
JSON_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
MAX_QUERY_BYTES: Final = 256

RAW_TYPES: Final = ("application/octet-stream", "text/plain")
ANSWER_TYPES: Final = dict.fromkeys([*RAW_TYPES, "text/*"], True) | dict.fromkeys(
    ["application/json", "application/*", "*/*"], False
)
ACCEPT_RANGE: Final = re.compile(r"([^\s,;]+)(?:[^,]*?;\s*q=(\d*\.?\d+))?[^,]*")
HOST: Final = re.compile(r"(?i)([a-z0-9._~-]+|\[[0-9a-f:.]+])(:\d{1,5})?")
PREVIEW_BOT: Final = re.compile(
    r"(?i)bot\b|crawler|spider|preview|Slack|WhatsApp|facebook|Facebot|meta-external|"
    r"Microsoft Office|ms-?office|Teams|SafeLinks|Google|Mastodon|Pinterest|vkShare|Viber|"
    r"Iframely|Embedly"
)
JSON_REMEDY: Final = "curl -T FILE stores a file as it is, 'Content-Type: text/plain' a body."

Model = TypeVar("Model", bound=Input)


def invalid(*fields: InvalidField, more: int = 0) -> ServiceError:
    detail = "; ".join(f"{'.'.join(field.loc)}: {field.msg}" for field in fields)
    if more:
        detail += f"; and {more} more"
    return ServiceError(Code.INVALID, detail, errors=fields)


def parse_input(model: type[Model], source: bytes | dict[str, str], remedy: str = "") -> Model:
    """From a JSON body or a query. Raises invalid. `remedy` is for a body that is no object."""
    place = "query"
    try:
        if isinstance(source, dict):
            return model.model_validate_strings(source)
        place = "body"
        if len(source) > MAX_MARKUP_BYTES and len(JSON_STRING.sub(b"", source)) > MAX_MARKUP_BYTES:
            text = f"This is no JSON object of the fields that there are. {remedy}"
            raise invalid(InvalidField(loc=[place], msg=text))
        return model.model_validate_json(source)
    except ValidationError as error:
        items = error.errors(include_url=False, include_input=False, include_context=False)
    fields = []
    for item in items[:MAX_FIELDS_NAMED]:
        names = map(str, item["loc"])  # a name is input, too: told unless it is odd
        path = [name if re.fullmatch(r"(?a)\w{1,32}", name) else "(unknown)" for name in names]
        message = item["msg"] if path else f"{item['msg']}. {remedy}"
        fields.append(InvalidField(loc=[place, *path], msg=message, type=item["type"]))
    raise invalid(*fields, more=len(items) - len(fields))


class SecretRequest(Request):
    """A request, and what is asked of it."""

    def __init__(self, scope: Scope, receive: Receive, stack: ExitStack) -> None:
        super().__init__(scope, receive)
        self._stack = stack  # of what is given back when the request has been answered
        self.vault: Vault = scope["state"]["vault"]
        self._header = dict(scope["headers"])
        self._cycle: Any = getattr(receive, "__self__", None)  # uvicorn's side of this request

    def header(self, name: bytes) -> str:
        """The last one of that name, or nothing."""
        value: bytes = self._header.get(name, b"")
        return value.decode("latin-1")

    def caller(self) -> Caller:
        """With the time that a request may wait, from now on."""
        return Caller(
            ip_address=self._ip_address(),
            user_agent=self.header(b"user-agent")[:200].replace("\x00", ""),  # jsonb has no NUL
            has_left=self.has_left,
            deadline=time.monotonic() + QUEUE_TIMEOUT_SECONDS,
        )

    def _ip_address(self) -> str | None:
        """As uvicorn or a proxy that is believed saw the caller, else the proxy's own."""
        with suppress(AttributeError, IndexError, TypeError, ValueError):
            try:
                return parse_address(self.scope["client"][0])
            except ValueError:
                return parse_address(self._cycle.transport.get_extra_info("peername")[0])
        return None  # by a unix socket

    def has_left(self) -> bool:
        """Whether the connection is closed, by the kernel's word: uvicorn tells a worker that is
        behind too late, and Starlette's is_disconnected() takes 26 us instead of 0.7."""
        try:
            poll = select.poll()
            socket = self._cycle.transport.get_extra_info("socket")
            poll.register(socket.fileno(), select.POLLRDHUP)
            return bool(self._cycle.disconnected or poll.poll(0))
        except (AttributeError, OSError, ValueError) as error:
            return isinstance(error, ValueError)  # its number is -1: closed

    async def bounded_body(self, max_bytes: int) -> bytes:
        """Raises too_large, timeout and, for one that does not come at once, unavailable."""
        length = int(self.header(b"content-length") or max_bytes)  # uvicorn refuses what is none
        if length > max_bytes:
            raise ServiceError(Code.TOO_LARGE)
        if b"content-length" in self._header and not getattr(self._cycle, "more_body", True):
            return await self.body()  # it is there, as usual: an alarm would take 5 us
        charge = max(length, BODY_MIN_CHARGE_BYTES)
        network = network_of(self._ip_address())
        self._stack.enter_context(self.vault.bodies.take(network, charge))
        body = bytearray()
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(BODY_SECONDS) as limit:
                async for chunk in self.stream():
                    body += chunk
                    if len(body) > max_bytes:
                        raise ServiceError(Code.TOO_LARGE)
                    limit.reschedule(started + BODY_SECONDS + len(body) / BODY_BYTES_PER_SECOND)
        except TimeoutError:
            detail = f"The body did not come within {BODY_SECONDS:.0f} seconds, or too slowly."
            # The connection ends, because the rest may yet come.
            raise ServiceError(Code.TIMEOUT, detail, {"Connection": "close"}) from None
        return bytes(body)

    def require_creatable(self) -> None:
        """Raises, before the body is read, what can be refused without it."""
        tokens = settings.api_tokens.get_secret_value().encode()
        scheme, _, shown = self._header.get(b"authorization", b"").partition(b" ")
        known = [token.strip() for token in tokens.split(b",") if token.strip()]
        fits = [hmac.compare_digest(shown.strip(), token) for token in known]
        if tokens and not (scheme.lower() == b"bearer" and any(fits)):
            raise ServiceError(Code.TOKEN_REQUIRED, headers={"WWW-Authenticate": "Bearer"})
        if self.header(b"content-encoding") not in ("", "identity"):
            raise ServiceError(Code.UNSUPPORTED_ENCODING)
        if b"content-range" in self._header:
            detail = "A part of a file would be stored as the secret. Send it without -C and whole."
            raise ServiceError(Code.BAD_REQUEST, detail)
        if not self.public_url():
            raise ServiceError(Code.BAD_REQUEST, "The link needs a Host header that names a host.")

    async def creation(self) -> tuple[Plaintext, CreateSecret]:
        """The secret, and how to keep it. JSON unless PUT or labelled as bytes, because curl labels
        what it sends as a form."""
        self.require_creatable()
        label = self.header(b"content-type").partition(";")[0].strip().lower()
        is_raw = self.method == "PUT" or label in RAW_TYPES
        secret = await self.bounded_body(settings.max_secret_bytes if is_raw else MAX_JSON_BYTES)
        if len(self.scope["query_string"]) > MAX_QUERY_BYTES:
            text = f"This is longer than {MAX_QUERY_BYTES} bytes"
            raise invalid(InvalidField(loc=["query"], msg=text))
        query = dict(self.query_params) if self.scope["query_string"] else {}
        if is_raw:
            options = CreateSecret(
                secret="", ttl_seconds=parse_input(RawOptions, query).ttl_seconds
            )
        else:
            if query:
                parse_input(Input, query)  # refuses ttl_seconds, which JSON itself has
            options = await in_thread_if_large(
                len(secret), parse_input, CreateSecret, secret, JSON_REMEDY
            )
            secret = self._secret_of(options)
        if not secret:
            raise invalid(InvalidField(loc=["body", "secret"], msg="The secret is empty"))
        if len(secret) > settings.max_secret_bytes:
            raise ServiceError(Code.TOO_LARGE)
        return Plaintext(secret), options

    def _secret_of(self, options: CreateSecret) -> bytes:
        if options.passphrase_scope == "read" and options.passphrase is None:
            raise invalid(
                InvalidField(loc=["body", "passphrase"], msg="This is missing"),
                InvalidField(loc=["body", "passphrase_scope"], msg="'read' needs a passphrase"),
            )
        if not options.encoding:
            return options.secret.encode()
        try:
            return base64.b64decode(options.secret, validate=True)
        except ValueError:
            raise invalid(InvalidField(loc=["body", "secret"], msg="This is not base64")) from None

    async def passphrase(self) -> str | None:
        if self.method == "GET":
            return None
        body = await self.bounded_body(MAX_PASSPHRASE_BODY_BYTES)
        if not body:
            return None
        return parse_input(PresentPassphrase, body, 'Expected {"passphrase": "..."}.').passphrase

    def wants_raw(self) -> bool:
        """By the range with the highest weight, of equals the first (RFC 9110, 12.5.1)."""
        accept = self.header(b"accept").lower()
        best = 0.0
        is_raw = False
        for media_range, weight in ACCEPT_RANGE.findall(accept):
            if media_range in ANSWER_TYPES and float(weight or 1) > best:
                best = float(weight or 1)
                is_raw = ANSWER_TYPES[media_range]
        return is_raw

    def wants_page(self) -> bool:
        """A browser's address bar, a prefetch or a link preview: it gets the page, which asks a
        person first. Old Java accepts text/html, too, but nobody else's pages and GIF together."""
        accept = self.header(b"accept")
        is_browser = "text/html" in accept and not (
            "image/gif" in accept and b"sec-fetch-mode" not in self._header
        )
        purposes = self.header(b"sec-purpose") + self.header(b"purpose")
        agent = self.header(b"user-agent")
        return is_browser or "prefetch" in purposes or bool(PREVIEW_BOT.search(agent))

    def public_url(self) -> str:
        """What links begin with; empty where neither PUBLIC_URL nor Host tells."""
        host = self.header(b"host")
        if settings.public_url:
            return settings.public_url.rstrip("/")
        return f"{self.scope['scheme']}://{host}" if HOST.fullmatch(host) else ""


# --- Application ------------------------------------------------------------------------------
# `app` is what uvicorn calls: what every request passes, around FastAPI's router. `Endpoint` is how
# our routes are called. Both stand in place of FastAPI's own wrappers, which took 52 us of a
# request's 150; what these would do and ours do not raises an error where it is declared.

MAX_CONCURRENT_REQUESTS: Final = 1000  # a worker: 0.3 s of work
NO_STORE_HEADERS: Final = (
    (b"cache-control", b"no-cache, no-store, must-revalidate"),
    (b"pragma", b"no-cache"),
    (b"expires", b"0"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-robots-tag", b"noindex"),
    (b"content-security-policy", b"frame-ancestors 'none'; img-src 'self' data:"),
)
PROBLEM_TYPE: Final = "application/problem+json"


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Of uvicorn: not its warnings, one for each request that it refuses."""
    return record.levelno != logging.WARNING


logging.basicConfig(
    format="%(asctime)s %(levelname)s %(message)s", level=settings.log_level.upper()
)
# However the service is started, this file's lines about a request are the only ones: uvicorn's
# hold keys, and asyncio at debug names its selector, beside why a start is refused.
logging.getLogger("asyncio").setLevel(logging.INFO)
logging.getLogger("uvicorn.access").disabled = True
logging.getLogger("uvicorn.asgi").disabled = True
logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)


class Endpoint(APIRoute):
    """Its function takes the request and the path's parameters, and returns a model or a response.
    Route.handle is overridden, because the hook get_route_handler costs 3 to 15 % of all cycles."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        declared = self.dependant
        if (
            declared.dependencies
            or declared.query_params
            or declared.header_params
            or declared.cookie_params
            or declared.body_params
        ):
            text = "an Endpoint runs no dependencies and reads no query, header, cookie or body"
            raise TypeError(f"{path}: {text}")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            raise HTTPException(405, headers={"Allow": allowed_methods(self.path)})
        with ExitStack() as stack:
            request = SecretRequest(scope, receive, stack)
            answer: BaseModel | Response = await self.endpoint(request, **scope["path_params"])
        if not isinstance(answer, Response):  # with a newline, for the sake of terminals
            document = answer.model_dump_json(exclude_none=True) + "\n"
            answer = Response(document, self.status_code or 200, media_type="application/json")
        await answer(scope, receive, send)


class Api(FastAPI):
    def add_middleware(self, *_: Any, **__: Any) -> None:
        raise TypeError("no middleware runs here: see app()")

    def add_exception_handler(self, *_: Any, **__: Any) -> None:
        raise TypeError("no exception handler runs here: see app()")

    def openapi(self) -> dict[str, Any]:
        """FastAPI's, which gives errors the media type of answers and does not know our tokens."""
        document = super().openapi()
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path in document["paths"].values():
            for operation in path.values():
                for status, response in operation["responses"].items():
                    if status >= "400":  # or "default"
                        response["content"] = {PROBLEM_TYPE: response["content"].popitem()[1]}
        return document


api: Final = Api(
    title="One-Time Secrets",
    description="Keeps a secret encrypted and hands it out exactly once.",
    version="1.1.0",
    lifespan=lifespan,
    redirect_slashes=False,
    servers=[{"url": "/"}, {"url": "/api/v1"}],
    root_path_in_servers=False,
    openapi_url=None,  # constant routes, below
)
api.router.route_class = Endpoint


def allowed_methods(path: str) -> str:
    routes = [route for route in api.routes if isinstance(route, APIRoute) and route.path == path]
    return ", ".join(sorted(method for route in routes for method in route.methods or ()))


def problem(error: ServiceError) -> Response:
    """The one writer of errors."""
    status = error.code.status
    document = Problem(
        title=status.phrase,
        status=status,
        detail=error.detail,
        code=error.code,
        **error.members,  # type: ignore[arg-type]  # pydantic checks them
    )
    body = document.model_dump_json(exclude_none=True) + "\n"
    return Response(body, status, error.headers, PROBLEM_TYPE)


def as_service_error(error: Exception) -> ServiceError:
    """What a caller is told of whatever was raised. Of a mistake of ours, nothing: it is logged."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "GET, HEAD")
        detail = f"There are only: {allowed}."
        return ServiceError(Code.METHOD_NOT_ALLOWED, detail, {"Allow": allowed})
    if isinstance(error, HTTPException):
        return ServiceError(Code.NOT_FOUND, "There is no such route.")
    where = traceback.extract_tb(error.__traceback__)[-3:]  # its message may quote a value
    log.error("%s at %s", type(error).__name__, where)
    return ServiceError(Code.INTERNAL)


requests_in_flight: int = 0


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """A limit, an end to connections that want an upgrade, headers that forbid storing, errors made
    answers, and at debug a line with the route's template: the path itself holds the key."""
    global requests_in_flight
    scope["app"] = api
    if scope["type"] != "http":
        await api.router(scope, receive, send)
        return
    if scope["path"].startswith("/api/v1/"):
        scope["root_path"] += "/api/v1"  # the same routes, as behind a proxy that adds a prefix
    names = [name for name, _ in scope["headers"]]
    headers = list(NO_STORE_HEADERS)
    if b"upgrade" in names:
        # uvicorn drops the body of such a request and would run what comes after its first segment
        # as another request (Kludex/uvicorn#2722): this is the connection's last.
        headers.append((b"connection", b"close"))
    started = time.perf_counter()
    status = 0

    async def send_marked(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    requests_in_flight += 1
    try:
        if b"upgrade" in names and has_body(scope):
            raise ServiceError(Code.UPGRADE_REFUSED)
        if requests_in_flight > MAX_CONCURRENT_REQUESTS and scope["path"] != "/":
            raise Unavailable("Too many requests are under way")
        await api.router(scope, receive, send_marked)
    except ClientDisconnect:
        status = 499  # as nginx has it. uvicorn, which may not know yet, wants an answer
        await Response(status_code=status)(scope, receive, send)
    except Exception as error:
        answer = problem(as_service_error(error))
        if not status:
            await answer(scope, receive, send_marked)
    finally:
        requests_in_flight -= 1
    if log.isEnabledFor(logging.DEBUG):
        route = getattr(scope.get("route"), "path", "(no route)")
        milliseconds = (time.perf_counter() - started) * 1000
        log.debug("%s %s %d %.1f ms", scope["method"], route, status, milliseconds)


def has_body(scope: Scope) -> bool:
    header = dict(scope["headers"])
    return header.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in header


HTML: Final = (Path(__file__).parent / "index.html").read_text("utf-8")
CURL_LINES: Final = HTML.partition("<pre>\n")[2].partition("</pre>")[0]  # also without JavaScript
LIMITS: Final = settings.model_dump_json(
    include={"default_ttl_seconds", "max_ttl_seconds", "max_secret_bytes"}
)
PAGE: Final = HTMLResponse(re.sub("""(?<=name="limits" content=)'.*'""", f"'{LIMITS}'", HTML))

# --- Routes -----------------------------------------------------------------------------------
# In the order in which they are asked for. What FastAPI cannot know, because an Endpoint reads it
# itself, is said in openapi_extra.

SCOPE_OF_TTL: Final = {"type": "integer", "minimum": 1, "maximum": settings.max_ttl_seconds}
CREATION_EXTRA: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": "ttl_seconds",
            "in": "query",
            "schema": SCOPE_OF_TTL,
            "description": "not beside JSON",
        }
    ],
    "security": [{}, {"token": []}],
}
BYTES: Final = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
EXAMPLE: Final = {
    "secret": "hello",
    "passphrase": "tell it by telephone",
    "passphrase_scope": "read",
}
JSON_CONTENT: Final = {
    "application/json": {"schema": CreateSecret.model_json_schema(), "example": EXAMPLE}
}
POST_CONTENT: Final = JSON_CONTENT | dict.fromkeys(RAW_TYPES, BYTES)
PUT_CONTENT: Final = {RAW_TYPES[0]: BYTES}
CLAIM_EXTRA: Final = {
    "requestBody": {
        "content": {"application/json": {"schema": PresentPassphrase.model_json_schema()}}
    }
}
BODY_CODES: Final = (Code.TIMEOUT, Code.TOO_LARGE, Code.INVALID)
LOOK_CODES: Final = (
    Code.NOT_FOUND,
    Code.ALREADY_READ,
    Code.DELETED,
    Code.EXPIRED,
    Code.UNAVAILABLE,
)
CLAIM_CODES: Final = (
    *LOOK_CODES,
    Code.OUTCOME_UNKNOWN,
    Code.PASSPHRASE_REQUIRED,
    Code.WRONG_PASSPHRASE,
    Code.TOO_MANY_ATTEMPTS,
)


def errors(*codes: Code) -> dict[int | str, dict[str, Any]]:
    """A route's `responses=`: the errors that it may answer, by status; and what any may meet."""
    responses: dict[int | str, dict[str, Any]] = {
        "default": {"model": Problem, "description": "internal, upgrade_refused"}
    }
    for code in codes:
        names = ", ".join(other for other in codes if other.status == code.status)
        responses[int(code.status)] = {"model": Problem, "description": names}
    return responses


CREATION: Final[dict[str, Any]] = {
    "status_code": 201,
    "responses": errors(
        Code.BAD_REQUEST,
        Code.TOKEN_REQUIRED,
        Code.UNSUPPORTED_ENCODING,
        Code.RATE_LIMITED,
        Code.STORAGE_FULL,
        Code.UNAVAILABLE,
        *BODY_CODES,
    ),
}


@api.post(
    "/secret",
    response_model=SecretCreated,
    openapi_extra={"requestBody": {"required": True, "content": POST_CONTENT}, **CREATION_EXTRA},
    **CREATION,
)
@api.put(
    "/secret",
    response_model=None,
    response_class=PlainTextResponse,
    openapi_extra={"requestBody": {"required": True, "content": PUT_CONTENT}, **CREATION_EXTRA},
    **CREATION,
)
async def create_secret(request: SecretRequest) -> SecretCreated | Response:
    """Store a secret, and get the link that reads it once.

    The body of POST is JSON; labelled text/plain or application/octet-stream, or with PUT, it is
    the secret itself, byte for byte. PUT, and who accepts text/plain, gets the bare url."""
    plaintext, options = await request.creation()
    created = await request.vault.create(
        plaintext,
        request.caller(),
        ttl_seconds=options.ttl_seconds,
        passphrase=options.passphrase,
        passphrase_scope=options.passphrase_scope,
    )
    secret_key = base64.urlsafe_b64encode(created.secret_key).decode()
    url = f"{request.public_url()}/#{secret_key}"  # browsers send no server what is behind the #
    if request.method == "PUT" or request.wants_raw():
        return PlainTextResponse(url + "\n", 201)
    return SecretCreated(
        secret_key=secret_key,
        receipt_key=base64.urlsafe_b64encode(created.receipt_key).decode(),
        expires_at=created.expires_at,
        url=url,
        passphrase_scope=options.passphrase_scope if options.passphrase else None,
    )


@api.get(
    "/secret/{secret_key}", response_model=SecretRead, responses=errors(*CLAIM_CODES, Code.DAMAGED)
)
@api.post(
    "/secret/{secret_key}",
    response_model=SecretRead,
    responses=errors(*CLAIM_CODES, Code.DAMAGED, *BODY_CODES),
    openapi_extra=CLAIM_EXTRA,
)
async def read_secret(request: SecretRequest, secret_key: KeyInPath) -> SecretRead | Response:
    """Read a secret. This ends it: a second read says when the first one was.

    GET from a browser's address bar, a prefetch and a link preview gets a page instead, and ends
    nothing. Who accepts text/plain gets the bare secret."""
    if request.method == "GET" and request.wants_page():
        return PAGE
    key = SecretKey(parse_key(secret_key))
    passphrase = await request.passphrase()
    plaintext = await request.vault.read(key, request.caller(), passphrase)
    secret = plaintext.secret
    try:
        answer = SecretRead(secret=secret.decode())
    except UnicodeDecodeError:
        answer = SecretRead(secret=base64.b64encode(secret).decode(), encoding="base64")
    if request.wants_raw():
        return Response(secret, media_type=RAW_TYPES[0 if answer.encoding else 1])
    return answer


@api.delete(
    "/secret/{secret_key}", responses=errors(*CLAIM_CODES, *BODY_CODES), openapi_extra=CLAIM_EXTRA
)
async def delete_secret(request: SecretRequest, secret_key: KeyInPath) -> SecretDeleted:
    """Destroy a secret unread. A secret with a passphrase needs it."""
    key = SecretKey(parse_key(secret_key))
    passphrase = await request.passphrase()
    await request.vault.delete(key, request.caller(), passphrase)
    return SecretDeleted()


@api.get("/secret/{secret_key}/status", responses=errors(*LOOK_CODES))
async def secret_status(request: SecretRequest, secret_key: KeyInPath) -> SecretStatus:
    """Look whether a secret can still be read, without reading it."""
    live = await request.vault.find_live(secret_id_of(SecretKey(parse_key(secret_key))))
    return SecretStatus(expires_at=live.expires_at, passphrase_required=live.guards("read"))


@api.get("/receipt/{receipt_key}", responses=errors(Code.NOT_FOUND, Code.UNAVAILABLE))
async def show_receipt(request: SecretRequest, receipt_key: KeyInPath) -> Receipt:
    """What became of a secret, for its creator: read when, from which address, by what. Also after
    it is gone."""
    secret_key = secret_key_of(ReceiptKey(parse_key(receipt_key)))
    return await request.vault.receipt(secret_id_of(secret_key))


@api.delete("/receipt/{receipt_key}", responses=errors(*LOOK_CODES, Code.OUTCOME_UNKNOWN))
async def revoke_secret(request: SecretRequest, receipt_key: KeyInPath) -> SecretDeleted:
    """Destroy a secret unread, as its creator: no passphrase is asked for."""
    await request.vault.revoke(ReceiptKey(parse_key(receipt_key)), request.caller())
    return SecretDeleted()


@api.head("/", include_in_schema=False)
@api.get("/", response_class=PlainTextResponse)
async def home(request: SecretRequest) -> Response:
    """curl lines for this very host; a browser gets the page for people. Needs no store: ask here
    whether the service lives."""
    if request.wants_page():
        return PAGE
    return PlainTextResponse(CURL_LINES.replace("URL", request.public_url() or "URL"))


@api.head("/health", include_in_schema=False)
@api.get("/health", responses=errors(Code.UNAVAILABLE))
async def health(request: SecretRequest) -> Health:
    """Whether the service can serve: `degraded` without Redis, 503 without a PostgreSQL that takes
    writes."""
    if await request.vault.health():
        return Health(status="ok", redis="up")
    return Health(status="degraded", redis="down")


# The documentation, without a CDN. Its addresses are relative, so that it works under any prefix.
STATIC: Final = "static-offline-docs"
SWAGGER: Final = get_swagger_ui_html(
    openapi_url="openapi.json",
    title=api.title,
    swagger_js_url=f"{STATIC}/swagger-ui-bundle.js",
    swagger_css_url=f"{STATIC}/swagger-ui.css",
    swagger_favicon_url=f"{STATIC}/favicon.png",
)
REDOC: Final = get_redoc_html(
    openapi_url="openapi.json",
    title=api.title,
    redoc_js_url=f"{STATIC}/redoc.standalone.js",
    redoc_favicon_url=f"{STATIC}/favicon.png",
    with_google_fonts=False,
)
api.router.routes += [
    Route("/openapi.json", JSONResponse(api.openapi()), methods=["GET"]),
    Route("/docs", SWAGGER, methods=["GET"]),
    Route("/redoc", REDOC, methods=["GET"]),
    Mount(f"/{STATIC}", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static")),
]


# --- Main -------------------------------------------------------------------------------------


async def check_start() -> None:
    """What keeps the service from starting is told once, and not by every worker."""
    async with lifespan(api):
        pass


def main() -> None:
    asyncio.run(check_start())
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a connection is a file
    uvicorn.run(
        "main:app",
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=7,  # seconds; orchestrators kill at 10
        timeout_worker_healthcheck=120,  # seconds; a worker that imports slowly is not hung
    )


if __name__ == "__main__":
    main()
