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
import gc
import hmac
import ipaddress
import json
import logging
import os
import re
import select
import socket
import sys
import tempfile
import traceback
import unicodedata
from asyncio import (
    CancelledError,
    Lock,
    Semaphore,
    create_task,
    get_running_loop,
    sleep,
    timeout,
    to_thread,
)
from base64 import b64decode, b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from http import HTTPStatus
from inspect import signature
from itertools import cycle
from logging import getLogger
from math import ceil, inf
from operator import itemgetter
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from time import monotonic, time
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Self, TypeAlias, TypeVar
from urllib.parse import quote

import asyncpg
import uvicorn
from asyncpg import Record
from asyncpg.pgproto.pgproto import UUID  # a uuid.UUID that is made in less time
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from fastapi.utils import deep_dict_update
from hiredis import pack_command
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import to_json
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import AuthenticationError, ResponseError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

log = getLogger("one-time-secrets")

# --- Settings ---------------------------------------------------------------------------------

Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """What the operator configures, by environment variables of these names or a `.env` file."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore")

    # A host or a socket folder; of several, with commas between them, the one that takes writes.
    postgres_host: str = "localhost"
    # One for all hosts, or as many as there are hosts.
    postgres_port: str = "5432"
    postgres_db: str = "secrets"
    postgres_user: str = "secrets"
    postgres_password: SecretStr = SecretStr("")
    postgres_password_file: Path | None = None
    redis_host: str = "localhost"
    redis_port: Port = 6379
    redis_url: SecretStr = SecretStr("")  # wins over host and port; may hold a password
    encryption_key: SecretStr = SecretStr("")  # Fernet keys with commas between them, newest first
    encryption_key_file: Path = Path("encryption_key")  # for encryption_key unset; made if missing
    default_ttl_seconds: PositiveInt = 24 * 3600
    max_ttl_seconds: Annotated[int, Field(ge=1, le=10 * 365 * 86400)] = 7 * 86400
    max_secret_bytes: Annotated[int, Field(ge=1, le=10 * 1024 * 1024)] = 64 * 1024
    max_stored_mib: NonNegativeInt = 10240  # of the whole database; 0: no bound
    replay_seconds: NonNegativeInt = 60  # 0: nothing is kept
    cache_seconds: Annotated[int, Field(ge=300, le=86400)] = 300
    cleanup_interval_seconds: PositiveFloat = 60
    log_retention_days: Annotated[int, Field(ge=1, le=36500)] = 90
    create_quota_kib_per_minute: NonNegativeInt = 16384  # an address; 0: no quota
    api_tokens: SecretStr = SecretStr("")  # with commas between them; creating needs one of them
    api_tokens_file: Path | None = None
    # What links begin with; empty: the address of the request.
    public_url: Annotated[str, Field(pattern=r"""^(https?://[^\s?#"'<>\\]+)?$""")] = ""
    forwarded_allow_ips: str = "127.0.0.1"  # addresses and networks whose X-Forwarded-* count
    host: str = "127.0.0.1"
    port: Port = 8000
    workers: PositiveInt = 1
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.default_ttl_seconds > self.max_ttl_seconds:
            raise ValueError("DEFAULT_TTL_SECONDS is larger than MAX_TTL_SECONDS")
        if self.log_retention_days * 86400 < self.max_ttl_seconds:
            raise ValueError("LOG_RETENTION_DAYS is shorter than MAX_TTL_SECONDS")
        ports = re.fullmatch(r"\d{1,5}(,\d{1,5})*", self.postgres_port)
        if not ports or self.postgres_port.count(",") not in (0, self.postgres_host.count(",")):
            raise ValueError(
                "POSTGRES_PORT needs a port, or one a host (Kubernetes: enableServiceLinks: false)"
            )
        for name in ("postgres_password", "api_tokens"):
            file: Path | None = getattr(self, f"{name}_file")
            try:
                if file:
                    setattr(self, name, SecretStr(file.read_text("utf-8").strip()))
            except (OSError, ValueError):
                raise ValueError(f"{name.upper()}_FILE cannot be read") from None
        try:  # uvicorn takes 172.18.0.1/16, and whatever else it cannot read, for a host's name
            if self.forwarded_allow_ips != "*":
                texts = re.findall(r"[^\s,]+", self.forwarded_allow_ips)
                networks = [ipaddress.ip_network(text, strict=False) for text in texts]
                self.forwarded_allow_ips = ",".join(map(str, networks))
        except ValueError:
            raise ValueError("FORWARDED_ALLOW_IPS has an entry that is no network") from None
        return self


try:
    settings = Settings()
except ValidationError as error:  # one line that names a variable; its value may be a password
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = "".join(f"{part}: ".upper() for part in first["loc"])
    raise SystemExit(f"{name}{first['msg'].removeprefix('Value error, ')}") from None

# --- Errors -----------------------------------------------------------------------------------
# Whatever a caller is refused is a ServiceError, whose Code stands here with its status and its
# sentence. `problem`, under "Application", is the only place that writes one. UNAVAILABLE promises
# that nothing has happened; where a claim was sent and its answer did not come, the code is
# OUTCOME_UNKNOWN instead.


class Code(StrEnum):
    """What went wrong: a name for programs, the status, and a sentence for people."""

    status: HTTPStatus
    sentence: str

    def __new__(cls, name: str, status: int, sentence: str = "{reason}") -> Self:
        code = str.__new__(cls, name)
        code._value_ = name
        code.status = HTTPStatus(status)
        code.sentence = sentence
        return code

    BAD_REQUEST = "bad_request", 400
    UPGRADE = "upgrade_refused", 400, "Use HTTP/1.1: curl --http1.1, HttpClient.Version.HTTP_1_1."
    TOKEN_REQUIRED = "token_required", 401, "Creating needs a token: Authorization: Bearer ..."
    PASSPHRASE_REQUIRED = "passphrase_required", 403, "This needs the secret's passphrase."
    WRONG_PASSPHRASE = "wrong_passphrase", 403, "Wrong passphrase. Attempts left: {attempts_left}."
    NOT_FOUND = "not_found", 404
    METHOD_NOT_ALLOWED = "method_not_allowed", 405
    TIMEOUT = "timeout", 408, "The body did not come in time, or too slowly."
    ALREADY_READ = (
        "already_read",
        410,
        (
            "This secret was read at {ended_at:%Y-%m-%dT%H:%M:%SZ}. If that was not you, treat the "
            "secret as compromised."
        ),
    )
    DELETED = "deleted", 410, "This secret was deleted at {ended_at:%Y-%m-%dT%H:%M:%SZ}."
    EXPIRED = "expired", 410, "This secret expired at {ended_at:%Y-%m-%dT%H:%M:%SZ}."
    LOST = "lost", 410, "This secret is gone, and no read or deletion: its database was restored."
    TOO_LARGE = "too_large", 413, f"A secret may have at most {settings.max_secret_bytes} bytes."
    UNSUPPORTED_ENCODING = "unsupported_encoding", 415, "Send the secret without Content-Encoding."
    INVALID = "invalid", 422
    TOO_MANY_ATTEMPTS = "too_many_attempts", 429, "Too many attempts: wait {retry_seconds} seconds."
    RATE_LIMITED = "rate_limited", 429, "Your address's quota is spent: wait {retry_seconds} s."
    DAMAGED = "damaged", 500, "What is stored of this secret was altered or damaged."
    INTERNAL = "internal", 500, "Something here is broken. It has been logged."
    UNAVAILABLE = "unavailable", 503, "{reason}; nothing has happened."
    OUTCOME_UNKNOWN = (
        "outcome_unknown",
        503,
        "The database did not answer: this call may have ended the secret. Its status tells.",
    )
    STORAGE_FULL = "storage_full", 507, "Nothing more can be stored now; reading goes on."


class ServiceError(Exception):
    """What a caller is told, none of it ever input. `reason` and `members` fill the code's
    sentence; `members` join the problem document, and `retry_seconds` becomes Retry-After."""

    def __init__(
        self,
        code: Code,
        reason: str = "",
        headers: Mapping[str, str] | None = None,
        **members: object,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.detail = code.sentence.format(reason=reason, **members)
        self.headers = dict(headers or {})
        self.members = members
        if code.status == 503:
            members["retry_seconds"] = 2
        if "retry_seconds" in members:
            self.headers["Retry-After"] = str(members["retry_seconds"])


class Unavailable(ServiceError):  # noqa: N818 - it has the code's name
    """Nothing has happened, unless `maybe_executed`: then PostgreSQL may have done it after all."""

    def __init__(
        self, reason: str = "The database cannot answer now", maybe_executed: bool = False
    ) -> None:
        super().__init__(Code.UNAVAILABLE, reason)
        self.maybe_executed = maybe_executed


OUTAGE_CALM_SECONDS = 5.0  # without a failure until an outage is over
outages: dict[str, float] = {}  # when a store last failed, by its name
answered = Counter[str]()  # requests since they were last logged, by route and outcome


def note_answer(store: str, error: BaseException | None = None) -> None:
    """Log an outage when it begins and when it ends, however many requests meet it. Of an error
    only the type: its message may quote a value."""
    if error:
        if store not in outages:
            log.warning("%s cannot answer: %s", store, type(error).__name__)
        outages[store] = monotonic()
    elif store in outages and monotonic() > outages[store] + OUTAGE_CALM_SECONDS:
        del outages[store]
        log.warning("%s answers again", store)


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

KEY_BYTES = 24  # of a secret_key or receipt_key: 32 characters of base64 without padding
KEY_TIME_BYTES = 4  # of those, the second of creation; 20 random bytes are beyond guessing
KEY_PATTERN = "^[A-Za-z0-9_-]{32}$"
SECRET_KEY_LABEL = b"one-time-secrets secret key"  # HKDF labels: each derivation has its
WRAPPING_LABEL = b"one-time-secrets wrapping key"  # own, so that no key is ever used for
VERIFIER_LABEL = b"one-time-secrets passphrase verifier"  # two purposes
FINGERPRINT_LABEL = b"one-time-secrets fingerprint"
READER_LABEL = b"one-time-secrets reader"
ARGON2_MEMORY_KIB = 19 * 1024  # OWASP Password Storage Cheat Sheet, second Argon2id profile
ARGON2_SALT_BYTES = 16

ReceiptKey = NewType("ReceiptKey", bytes)
SecretKey = NewType("SecretKey", bytes)
SecretId = NewType("SecretId", UUID)


@dataclass(frozen=True)
class EncryptionKey:
    """One of the operator's keys, and the fingerprint by which a row refers to it."""

    raw: bytes = field(repr=False)
    fingerprint: str


@dataclass(frozen=True, repr=False)
class Plaintext:
    """What a creator hands in and a reader gets."""

    secret: bytes
    filename: str | None = None


class Sealed(NamedTuple):
    """Fernet tokens: of the secret and its filename under the data_key, and of the data_key."""

    ciphertext: bytes
    wrapped_key: bytes
    filename: bytes | None


class PassphraseKeys(NamedTuple):
    """What the two halves of Argon2id's output become."""

    passphrase_key: bytes
    verifier: bytes  # stored; keyed with the link, so that a dump cannot tell a right guess


def parse_encryption_keys(text: str) -> list[EncryptionKey]:
    """The first wraps, any unwraps. Raises ValueError, without the text, for anything else."""
    keys = []
    for part in re.findall(r"[^\s,]+", text):
        Fernet(part)  # raises for what is no key
        raw = urlsafe_b64decode(part)
        fingerprint = sha256(FINGERPRINT_LABEL + raw).hexdigest()[:16]
        keys.append(EncryptionKey(raw, fingerprint))
    if not keys:
        raise ValueError("There is no key")
    return keys


def new_receipt_key() -> ReceiptKey:
    """Time, then randomness: ids come in order, which halves an insert beside millions."""
    created = int(time()).to_bytes(KEY_TIME_BYTES)
    return ReceiptKey(created + os.urandom(KEY_BYTES - KEY_TIME_BYTES))


def secret_key_of(receipt_key: ReceiptKey) -> SecretKey:
    kdf = HKDF(SHA256(), KEY_BYTES - KEY_TIME_BYTES, salt=None, info=SECRET_KEY_LABEL)
    return SecretKey(receipt_key[:KEY_TIME_BYTES] + kdf.derive(receipt_key))


def secret_id_of(secret_key: SecretKey) -> SecretId:
    """The time, then 12 bytes of SHA-256: names the row, the Redis keys and the log rows."""
    digest = sha256(secret_key).digest()
    return SecretId(UUID((secret_key[:KEY_TIME_BYTES] + digest)[:16]))


def parse_key(text: str) -> bytes:
    """The bytes of a secret_key or receipt_key. Raises not_found for what has not its form."""
    if not re.fullmatch(KEY_PATTERN, text):
        raise ServiceError(Code.NOT_FOUND, "This key is not whole: a key has 32 characters.")
    return urlsafe_b64decode(text)


def key_encryption_key(
    key: EncryptionKey, secret_key: SecretKey, passphrase_key: bytes = b""
) -> Fernet:
    info = WRAPPING_LABEL + secret_id_of(secret_key).bytes
    derived = HKDF(SHA256(), 32, salt=key.raw, info=info).derive(secret_key + passphrase_key)
    return Fernet(urlsafe_b64encode(derived))


def seal(plaintext: Plaintext, kek: Fernet) -> Sealed:
    """Encrypt under a fresh data_key, and that under the key-encryption key."""
    data_key = Fernet.generate_key()
    encrypt = Fernet(data_key).encrypt
    name = plaintext.filename
    name_token = None if name is None else encrypt(name.encode())
    return Sealed(encrypt(plaintext.secret), kek.encrypt(data_key), name_token)


def unseal(sealed: Sealed, kek: Fernet) -> Plaintext:
    """Undo seal(). Raises cryptography.fernet.InvalidToken for a token altered, cut or swapped."""
    decrypt = Fernet(kek.decrypt(sealed.wrapped_key)).decrypt
    name = sealed.filename
    return Plaintext(decrypt(sealed.ciphertext), None if name is None else decrypt(name).decode())


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
SESSION_SETTINGS = """
    set application_name = 'one-time-secrets'; set synchronous_commit = on;
    set statement_timeout = '1000 ms'; set timezone = 'UTC';
    set plan_cache_mode = force_generic_plan; set enable_seqscan = off;
    set enable_hashjoin = off; set enable_mergejoin = off; set jit = off
"""

# The commit point of every creation, read and deletion: inserts the new secrets, ends each claimed
# one for one caller (a row is deleted once), logs both, keeps for $22 seconds what a reader may ask
# for again, and returns the time and, by its number in $20, what each claim was granted: at least
# one row. It skips rows that others hold, because batches that wait for each other deadlock; rows
# under an encryption_key that is not in $21 (a rotation under way); and rows that are larger than
# their claim expects, because a batch of such would not come in its time: all these are submitted
# again. Nothing happens from the deadline, $23, on: a hung server that wakes executes what lies in
# its socket, when nobody hears its answer any more. One statement for both kinds, because a commit
# costs more than all the rest: as two, 16 connections had 0.32 of an echo's cycles instead of 0.39.
COMMIT_BATCH = """
    with new as (
        select * from unnest(
            $1::bytea[], $2::bytea[], $3::bytea[], $4::uuid[], $5::text[], $6::bytea[],
            $7::bytea[], $8::text[], $9::int[], $10::text[], $11::text[]
        ) as new (
            ciphertext, wrapped_key, filename, id, key_fingerprint, passphrase_salt,
            passphrase_verifier, passphrase_scope, ttl_seconds, ip_address, user_agent
        )
        where now() < $23
    ), created as (
        insert into secrets (
            id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
            passphrase_scope, filename, expires_at
        )
        select id, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, passphrase_verifier,
               passphrase_scope, filename, now() + make_interval(secs => ttl_seconds)
        from new
    ), candidate as (
        select claim.* from unnest(
            $12::uuid[], $13::text[], $14::bool[], $15::text[], $16::bytea[], $17::int[],
            $18::text[], $19::text[], $20::int[]
        ) as claim (
            id, action, authorized, by, reader, max_bytes, ip_address, user_agent, number
        )
        cross join lateral (  -- a plain join could come by expires_at's index, past dead rows
            select * from secrets where secrets.id = claim.id for update skip locked
        ) as held
        where now() < $23
          and held.expires_at > now()
          and held.key_fingerprint = any($21::text[])
          and octet_length(held.ciphertext) <= claim.max_bytes
          and (
              claim.authorized
              or held.passphrase_scope is null
              or (held.passphrase_scope = 'delete' and claim.action = 'read')
          )
    ), claimed as (
        delete from secrets using candidate
        where secrets.id = candidate.id
        returning
            candidate.*, secrets.ciphertext, secrets.wrapped_key, secrets.key_fingerprint,
            secrets.passphrase_salt, secrets.passphrase_scope, secrets.filename
    ), kept as (
        insert into replays (
            secret_id, reader, ciphertext, wrapped_key, key_fingerprint, passphrase_salt, filename,
            replay_until
        )
        select id, reader, ciphertext, wrapped_key, key_fingerprint,
               case when passphrase_scope = 'read' then passphrase_salt end, filename,
               now() + make_interval(secs => $22)
        from claimed where reader is not null
        on conflict (secret_id) do nothing  -- a restored secret; its first reader keeps the replay
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
    select now() as committed_at, number, key_fingerprint, ciphertext, wrapped_key, filename
    from (select) as always left join claimed on true
"""


class NewSecret(NamedTuple):
    """A secret to store: $1 to $11 of COMMIT_BATCH, in their order; a Sealed comes first."""

    ciphertext: bytes
    wrapped_key: bytes
    filename: bytes | None
    id: SecretId
    key_fingerprint: str
    passphrase_salt: bytes | None
    passphrase_verifier: bytes | None
    passphrase_scope: "PassphraseScope | None"
    ttl_seconds: int
    ip_address: str | None
    user_agent: str


class Claim(NamedTuple):
    """A secret to end: $12 to $19 of COMMIT_BATCH, in their order."""

    id: SecretId
    action: "Action"
    authorized: bool
    by: "KeyKind"
    reader: bytes | None
    max_bytes: int
    ip_address: str | None
    user_agent: str


# What a reader was handed who asked for a replay in advance, for that reader alone.
FIND_REPLAY = """
    select ciphertext, wrapped_key, key_fingerprint, passphrase_salt, filename
    from replays
    where secret_id = $1 and reader = $2 and replay_until > now() and key_fingerprint = any($3)
"""

LOG_REPLAYED = """
    insert into secret_logs (secret_id, action, ip_address, extra_data) values (
        $1, 'replayed', $2::text::inet, jsonb_build_object('user_agent', $3::text)
    )
"""

# Looks without touching, at the row, if it is still there, and at all that the log has. A secret
# is stored once and ends once: min and max pick that log row. `code` is null for an id that was
# never here, and `lost` for one that a restored database no longer has, though nothing ended it.
# Until retry_at, in retry_seconds, no passphrase is checked. `receipt` and `answer` are JSON, for
# the creator and for whoever asks for a live secret's status.
# $2: attempts before a pause, $3: minutes of the first pause.
FIND_SECRET = """
    select
        case status when 'read' then 'already_read' else status end as code,
        key_fingerprint,
        coalesce(passphrase_scope = 'read', false) as guards_read,
        passphrase_scope is not null as guards_deleted,
        coalesce(ending_at, secrets.expires_at, stored_until) as ended_at,
        retry_at,
        greatest(1, ceil(extract(epoch from retry_at - now()))::int) as retry_seconds,
        case when stored_at is not null then (
            select json_strip_nulls(row_to_json(receipt)) from (select
                status,
                to_char(stored_at, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as created_at,
                to_char(stored_until, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as expires_at,
                to_char(retry_at, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as retry_at,
                events
            ) as receipt
        )::text end as receipt,
        (
            select json_strip_nulls(row_to_json(answer)) from (select
                'unread' as status,
                to_char(secrets.expires_at, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as expires_at,
                coalesce(passphrase_scope = 'read', false) as passphrase_required,
                to_char(retry_at, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as retry_at
            ) as answer
        )::text as answer
    from (
        select
            min(created_at) filter (where action = 'created') as stored_at,
            min(created_at + make_interval(secs => (extra_data ->> 'ttl_seconds')::int))
                as stored_until,
            max(action) filter (where action in ('read', 'deleted', 'expired')) as ending,
            max(coalesce((extra_data ->> 'expires_at')::timestamptz, created_at))
                filter (where action in ('read', 'deleted', 'expired')) as ending_at,
            json_agg(json_strip_nulls((select row_to_json(event) from (select
                action,
                to_char(created_at, 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as created_at,
                host(ip_address) as ip_address,
                extra_data -> 'user_agent' as user_agent,
                extra_data -> 'by' as by,
                extra_data -> 'reason' as reason
            ) as event)) order by id) as events
        from secret_logs where secret_id = $1
    ) as log
    left join secrets on secrets.id = $1
    cross join lateral (
        select
            case
                when secrets.expires_at <= now() then 'expired'
                when secrets.id is not null then 'unread'
                when stored_at is not null then coalesce(ending, 'lost')
                else ending
            end as status,
            case when attempts > 0 and attempts % $2 = 0 then
                attempts_since + make_interval(mins => $3) * power(2, attempts / $2 - 1)
            end as retry_at
    ) as now
"""

# Charges a passphrase attempt *before* it is checked: a hundred at once must not be checked for the
# price of one. No row: the secret is gone, or a pause is on. `attempts` are all that were ever
# charged, `attempts_since` is the time of the last one.
CHARGE_ATTEMPT = """
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

# Only charged attempts are logged, so that nobody can fill the disk with refusals.
LOG_DENIED = """
    insert into secret_logs (secret_id, action, ip_address, extra_data)
    values ($1, 'denied', $2::text::inet, jsonb_build_object(
        'user_agent', $3::text, 'reason', 'wrong_passphrase', 'wanted', $4::text
    ))
"""

# Ends and logs up to $1 expired secrets, past those that a claim or another worker's loop holds;
# ends replays past their time, and up to $1 log rows past their retention of $2 days. The lowest
# ids of the log are the oldest: no index on time is needed, and only rows that are old are locked.
CLEANUP_ROWS = 1000  # some 20 ms of work
CLEAN_UP = """
    with replayed as (
        delete from replays where replay_until <= now()
    ), expired as (
        delete from secrets where id = any(array(
            select id from secrets where expires_at <= now()
            order by expires_at limit $1 for update skip locked
        ))
        returning id, expires_at
    ), logged as (
        insert into secret_logs (secret_id, action, extra_data)
        select id, 'expired', jsonb_build_object('expires_at', expires_at) from expired
    ), old as (
        delete from secret_logs where id = any(array(
            select id from secret_logs
            where id = any(array(select id from secret_logs order by id limit $1))
              and created_at < now() - make_interval(days => $2)
            for update skip locked
        ))
        returning id
    )
    select
        array(select id from expired) as expired,
        greatest((select count(*) from expired), (select count(*) from old)) as most_rows,
        format(
            '%s expired, %s old log rows',
            (select count(*) from expired), (select count(*) from old)
        ) as counts,
        pg_database_size(current_database()) / 1048576 as stored_mib
"""

# Secrets are wrapped with key $1 now: it is needed for $2 seconds from now. Pushed on, never back.
EXTEND_KEY_RETENTION = """
    insert into encryption_keys as known (fingerprint, needed_until)
    values ($1, now() + make_interval(secs => $2))
    on conflict (fingerprint) do update
    set needed_until = greatest(known.needed_until, excluded.needed_until)
"""

# Why a start is refused, in a sentence, or null. $1: the fingerprints at hand, $2: SCHEMA_VERSION.
SCHEMA_VERSION = 2  # as schema.sql notes it; a newer one may hold what this program would lose
FIND_REFUSAL = """
    select case
        when unsafe is not null then format(
            'PostgreSQL runs with %s = off: it may lose what it acknowledged. Switch it on.', unsafe
        )
        when grants is not null then format('%s lacks %s. Grant it.', current_user, grants)
        when version > $2 then 'The tables are newer than this program. Start the newer program.'
        when fingerprint is not null then format(
            'Unread secrets may need the encryption key with fingerprint %s: add it to '
            'ENCRYPTION_KEY, behind the newest, or give them up: delete its row of '
            'encryption_keys.', fingerprint
        )
    end
    from (select
        (select min(name) from pg_settings
         where name in ('fsync', 'full_page_writes') and setting = 'off') as unsafe,
        (select string_agg(privilege || ' on ' || name, ', ')
         from unnest('{secrets,secret_logs,encryption_keys,replays}'::text[]) as name,
              unnest('{select,insert,update,delete}'::text[]) as privilege
         where not has_table_privilege(name, privilege)) as grants,
        substring(obj_description('secrets'::regclass, 'pg_class') from 'schema ([0-9]+)')::int
            as version,
        (select min(encryption_keys.fingerprint) from encryption_keys
         where encryption_keys.fingerprint <> all($1) and needed_until > now()) as fingerprint
    ) as found
"""

# --- PostgreSQL: connections ------------------------------------------------------------------
# A few connections to whichever of the servers takes writes, and one way to ask it. What matters is
# what is known after a failure. An ERROR undoes its statement: nothing has happened. A FATAL ends
# the session and may come after a commit, and so may silence: `maybe_executed`. A statement whose
# answer did not come is cancelled on the server too, because a backend that waits for a lost
# synchronous standby does not notice that its client has gone. The idle ones are a list, because
# asyncpg's pool takes one back in a task of its own before an answer can leave: 15 % of a lone
# request's time, and at 16 connections 4 % of all cycles.

POSTGRES_CONNECTIONS = 8  # a worker: for a batch under way, and a few for everything else
POSTGRES_TIMEOUT_SECONDS = 1.5  # for a statement, and for a connection to one server
LAST_LOOK_SECONDS = 0.05
CANCEL_SECONDS = 1.0  # for a cancel request to reach the server, then the connection is cut

PostgresConnection: TypeAlias = "asyncpg.Connection[Record]"


class Database:
    """PostgreSQL, the one of its servers that takes writes."""

    def __init__(self) -> None:
        ports = cycle(settings.postgres_port.split(","))  # one for all, or one for each
        self._servers = [(host, int(next(ports))) for host in settings.postgres_host.split(",")]
        self.clock_offset = timedelta(0)  # PostgreSQL's clock less ours
        self._places = Semaphore(POSTGRES_CONNECTIONS)
        self._idle: list[PostgresConnection] = []

    async def connect(self) -> PostgresConnection:
        """To the first server that takes writes. Raises what the last one did."""
        failure = Exception()
        for host, port in self._servers.copy():
            try:
                async with timeout(POSTGRES_TIMEOUT_SECONDS):
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
                        server_time = await connection.fetchval("select now()")
                        self.clock_offset = server_time - datetime.now(UTC)
                    except BaseException:
                        connection.terminate()
                        raise
                return connection
            except Exception as error:  # asyncpg's have no class in common
                failure = error
                self._servers.sort(key=(host, port).__eq__)  # it is asked last from now on
        raise failure

    async def fetch(self, statement: str, *arguments: object) -> list[Record]:
        """Run one statement. Raises Unavailable, with `maybe_executed` where that is so."""
        loop = get_running_loop()
        has_place = False
        connection = None
        try:
            async with timeout(POSTGRES_TIMEOUT_SECONDS * (1 + len(self._servers))) as limit:
                has_place = await self._places.acquire()
                self._idle = [idle for idle in self._idle if not idle.is_closed()]
                connection = self._idle.pop() if self._idle else await self.connect()
                # A process that was frozen finds its alarm before the answer that lies in its
                # socket: one last look for that, then the statement is cancelled.
                limit.reschedule(None)
                alarm = loop.call_later(
                    POSTGRES_TIMEOUT_SECONDS,
                    lambda: limit.reschedule(loop.time() + LAST_LOOK_SECONDS),
                )
                try:
                    rows = await connection.fetch(statement, *arguments)
                finally:
                    alarm.cancel()
            self._idle.append(connection)
            note_answer("PostgreSQL")
            return rows
        except Exception as error:  # asyncpg's, the system's, a broken connection's parser's
            note_answer("PostgreSQL", error)
            rolled_back = getattr(error, "severity_en", None) == "ERROR"
            if not rolled_back or isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                self.close_idle()
            maybe_executed = connection is not None and not rolled_back
            raise Unavailable(maybe_executed=maybe_executed) from None
        finally:
            if connection and connection not in self._idle:
                with suppress(Exception):  # it is cut then
                    await connection.close(timeout=CANCEL_SECONDS)
            if has_place:
                self._places.release()

    def close_idle(self) -> None:
        while self._idle:
            self._idle.pop().terminate()


# --- Redis ------------------------------------------------------------------------------------
#     secret:ID          ciphertext, CACHE_SECONDS from creation, even after a read: by then it is
#                        noise, for the key that opens it went with GETDEL
#     key:ID             wrapped_key, until the read or the expiry, at most as long; never where
#                        reading needs a passphrase
#     quota:NET:MINUTE   KiB stored from there in that minute
#
# A circuit breaker around one exchange on one connection. Nothing depends on an answer: after a
# failure Redis is left alone for a while, and everything goes on without it.

REDIS_TIMEOUT_SECONDS = 0.25  # what a request may lose to a hung cache
REDIS_BREAKER_SECONDS = 3.0  # then Redis is left alone so long

RedisCommand = tuple[str | bytes | int, ...]


class Redis:
    """redis-py's connection, without its pool and pipeline, which took 50 to 90 us more a batch."""

    def __init__(self) -> None:
        default = f"redis://{settings.redis_host}:{settings.redis_port}"
        url = settings.redis_url.get_secret_value() or default
        try:
            # No timeout a command: exchange() has one for all.
            pool = ConnectionPool.from_url(url, socket_timeout=None)
            self.connection = pool.make_connection()  # type: ignore[no-untyped-call]
        except Exception:  # of several kinds, whose messages quote the URL
            raise SystemExit("REDIS_URL: redis-py cannot take this URL or its options") from None
        self._turn = Lock()
        self._resume_at = 0.0
        self.failure: Exception | None = None  # why the last exchange failed

    async def exchange(self, commands: Sequence[RedisCommand]) -> list[Any]:
        """Send the commands as one. Returns an answer for each, or none at all."""
        async with self._turn:
            if monotonic() < self._resume_at:
                return []
            packed = b"".join(map(pack_command, commands))  # type: ignore[arg-type]  # see its stub
            try:
                async with timeout(REDIS_TIMEOUT_SECONDS):
                    await self.connection.send_packed_command(packed)  # connects first, if need be
                    answers = [
                        await self.connection.read_response(disable_decoding=True) for _ in commands
                    ]
            except Exception as error:  # whatever it is: PostgreSQL decides meanwhile
                self._resume_at = monotonic() + REDIS_BREAKER_SECONDS
                self.failure = error
                note_answer("Redis", error)
                await self.connection.disconnect(nowait=True)
                return []
            note_answer("Redis")
            return answers


# --- Group commit -----------------------------------------------------------------------------
# A commit costs about the same for one row as for a hundred. Who comes while a batch is being
# written leaves with the next one; a lone request leaves at once. A batch that fails fails its own
# rows only, each with an error of its own. The writer outlives whatever happens to a row or to a
# batch: should it ever end with rows left, these would wait for ever, and health would not show it.

# Loop iterations to wait before writing, so that requests already in a socket's buffer (three
# iterations away) join the batch: 24 of 64 instead of 13.
BATCH_LINGER_TICKS = 5

Row = TypeVar("Row")
Result = TypeVar("Result")


class BatchFailed(Exception):  # noqa: N818 - what happened, not what is wrong
    """Writing this row's batch raised what `args` holds."""


@dataclass(eq=False, repr=False)
class Pending(Generic[Row, Result]):
    """A row that waits for its batch. `check` raises when nobody wants its result any more."""

    row: Row
    weight: int
    check: Callable[[], None]
    result: "asyncio.Future[Result]"


@dataclass(eq=False, repr=False)
class Batcher(Generic[Row, Result]):
    """Writes what arrives together. `write` takes rows, and returns a result for each, in order.
    The row that makes a batch as heavy as `max_weight` is its last."""

    write: Callable[[list[Row]], Awaitable[list[Result]]]
    max_weight: int
    _waiting: deque[Pending[Row, Result]] = field(default_factory=deque)
    _writing: "asyncio.Task[None] | None" = None

    async def submit(self, row: Row, weight: int, check: Callable[[], None]) -> Result:
        """Raises BatchFailed, or what `check` raises: then the row was not written."""
        result: asyncio.Future[Result] = get_running_loop().create_future()
        self._waiting.append(Pending(row, weight, check, result))
        if self._writing is None:
            self._writing = create_task(self._write_batches())
        return await result

    async def _write_batches(self) -> None:
        try:
            while self._waiting:
                for _ in range(BATCH_LINGER_TICKS):
                    await sleep(0)
                batch = list[Pending[Row, Result]]()
                weight = 0
                while self._waiting and weight < self.max_weight:
                    pending = self._waiting.popleft()
                    if pending.result.done():  # its caller was cancelled
                        continue
                    try:
                        pending.check()
                    except Exception as error:
                        pending.result.set_exception(error)
                        continue
                    batch.append(pending)
                    weight += pending.weight
                if batch:
                    await self._write_batch(batch)
        finally:
            self._writing = None

    async def _write_batch(self, batch: list[Pending[Row, Result]]) -> None:
        try:
            results = await self.write([pending.row for pending in batch])
            for pending, result in [*zip(batch, results, strict=True)]:  # all, or none
                if not pending.result.done():
                    pending.result.set_result(result)
        except Exception as error:
            for pending in batch:
                if not pending.result.done():
                    pending.result.set_exception(BatchFailed(error))


# --- Callers, and what each may take ----------------------------------------------------------
# Whatever is scarce is shared by network, so that one caller cannot take all of it: the bytes that
# a minute may store, turns at Argon2id, memory for bodies that are slow to come. A network is an
# IPv4 address, or the /64 that an IPv6 caller usually has.

QUEUE_TIMEOUT_SECONDS = 10.0  # the longest wait for a batch or a turn; then 503, unsent
is_stopping = asyncio.Event()  # the process is to end, when all requests have been answered


@lru_cache(4096)
def parse_address(text: str) -> tuple[str, str]:
    """(address, network). IPv4 over an IPv6 socket is IPv4. Raises ValueError."""
    address = ipaddress.ip_address(text.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return str(address), address.exploded[:19]  # all of IPv4, of IPv6 the first 64 bits


class Caller:
    """Who asks, as far as the operations need to know."""

    ip_address: str | None
    network: str
    user_agent: str
    deadline: float  # of the monotonic clock

    def has_left(self) -> bool:
        raise NotImplementedError

    def check(self) -> None:
        """Raises ClientDisconnect or Unavailable when there is no use in going on."""
        if self.has_left():
            raise ClientDisconnect()
        if monotonic() > self.deadline:
            raise Unavailable("Too much is waiting here")


@dataclass
class Shares:
    """Something scarce that networks share: each has a part at most, but always one piece."""

    name: str
    total: int
    part: int
    _taken: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def take(self, network: str, amount: int = 1) -> Iterator[None]:
        """Raises Unavailable at once where there is no room."""
        own = self._taken[network]
        if self._taken.total() + amount > self.total or (own and own + amount > self.part):
            raise Unavailable(f"Too many {self.name} at once")
        self._taken[network] += amount
        try:
            yield
        finally:
            self._taken[network] -= amount
            self._taken += Counter()  # drops what is zero


@dataclass
class Quota:
    """KiB that each network stored in this minute, by the names of its keys in Redis. Charged
    before anything is sent, and added up in Redis for all workers; the larger count holds, so that
    without Redis it is this worker's own."""

    limit: float
    _minute: int = 0
    known: Counter[str] = field(default_factory=Counter)  # this worker's, or Redis's for all
    unsent: Counter[str] = field(default_factory=Counter)  # what Redis will be told, once

    def charge(self, network: str, size_bytes: int) -> None:
        """Raises rate_limited once the quota is used up; the secret that does so is still taken."""
        minute, seconds = divmod(int(time()), 60)
        if minute != self._minute:
            self._minute = minute
            self.known.clear()
        name = f"quota:{network}:{minute}"
        if self.known[name] >= self.limit:
            raise ServiceError(Code.RATE_LIMITED, retry_seconds=60 - seconds)
        kib = ceil(size_bytes / 1024)
        self.known[name] += kib
        self.unsent[name] += kib


def usable_cores() -> int:
    """For each worker: of those that the process may use, by affinity and by its cgroup's quota."""
    cores: int = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    with suppress(OSError, ValueError):  # no Linux, or no quota: "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, ceil(quota / period))
    return max(1, cores // settings.workers)


# --- Operations -------------------------------------------------------------------------------
# A method for each promise, and the only place where PostgreSQL, Redis and the cryptography meet.
# Nothing here knows HTTP. All raise ServiceError, and ClientDisconnect where nobody waits any more.

MAX_PASSPHRASE_CHARACTERS = 1024
ATTEMPTS = 5  # passphrase attempts until a pause, whoever asks ...
ATTEMPT_PAUSE_MINUTES = 15  # ... which doubles each time: some 50 guesses in 7 days
PASSPHRASES_WAITING = 128  # a core, of readers and again of creators: the last waits 3 s
BODY_BUDGET_BYTES = 64 * 1024 * 1024  # a worker: bodies that are large, or slow to come
SMALL_BYTES = 32 * 1024  # from here on a thread seals, opens and parses: 100 us a time
BATCH_BYTES = 128 * SMALL_BYTES  # of a statement, each row counted as SMALL_BYTES more: 128 at most
SMALL_CIPHERTEXT_BYTES = 4 * SMALL_BYTES  # a claim expects no more, and counts as a quarter ...
MAX_CIPHERTEXT_BYTES = 4 * BATCH_BYTES  # ... until it is told; then it is its batch's last
CLAIM_BACKOFF_SECONDS = (0.02, 0.04, 0.08, 0.16, 0.32, 0.0)  # after another held the row
MAX_WAITING_RECEIPTS = 100  # a worker; each costs a statement a second

PassphraseScope = Literal["delete", "read"]
KeyKind = Literal["secret_key", "receipt_key"]
Action = Literal["read", "deleted"]
Committed = tuple[datetime, Record | None]  # when, and what a claim was granted


async def in_thread_if_large(
    size_bytes: int, work: Callable[..., Result], *arguments: object
) -> Result:
    """The event loop serves everybody, and 10 MiB would hold it for 0.2 s."""
    if size_bytes > SMALL_BYTES:
        return await to_thread(work, *arguments)
    return work(*arguments)


class Vault:
    """What the routes ask for. One for each worker."""

    def __init__(self, database: Database, redis: Redis, keys: list[EncryptionKey]) -> None:
        self.database = database
        self.fetch = database.fetch
        self.redis = redis
        self.newest_key = keys[0]
        self.storage_is_full = False  # as the cleanup loop last saw
        self.bodies = Shares("bodies", BODY_BUDGET_BYTES, BODY_BUDGET_BYTES // 2)
        self.keys = {key.fingerprint: key for key in keys}
        self._quota = Quota(settings.create_quota_kib_per_minute or inf)
        self._batcher = Batcher[NewSecret | Claim, Committed](self._write, BATCH_BYTES)
        self._waiting_receipts = Semaphore(MAX_WAITING_RECEIPTS)
        # Argon2id takes a core and 19 MiB: more at once would only take memory. Readers and
        # creators have places of their own, and one creator at a time comes before the readers.
        cores = usable_cores()
        places = cores * PASSPHRASES_WAITING
        self._cores = Semaphore(cores)
        self._reading = Shares("passphrases", places, places // 4), Semaphore(places)
        self._creating = Shares("passphrases", places, places // 4), Semaphore(1)

    async def create(
        self,
        plaintext: Plaintext,
        caller: Caller,
        options: "CreateSecret",
    ) -> tuple[ReceiptKey, SecretKey, datetime]:
        """(receipt_key, secret_key, expires_at), once the secret is durable in PostgreSQL."""
        if self.storage_is_full:
            raise ServiceError(Code.STORAGE_FULL)
        size_bytes = len(plaintext.secret)
        self._quota.charge(caller.network, size_bytes)
        key = self.newest_key
        receipt_key = new_receipt_key()
        secret_key = secret_key_of(receipt_key)
        salt = verifier = None
        passphrase_key = b""
        passphrase = options.passphrase
        if passphrase is not None:
            salt = os.urandom(ARGON2_SALT_BYTES)
            async with self._argon2_turn(caller, *self._creating):
                derived = await to_thread(derive_passphrase_keys, passphrase, salt, key, secret_key)
            verifier = derived.verifier
            if options.passphrase_scope == "read":
                passphrase_key = derived.passphrase_key
        kek = key_encryption_key(key, secret_key, passphrase_key)
        sealed = await in_thread_if_large(size_bytes, seal, plaintext, kek)
        row = NewSecret(
            *sealed,
            id=secret_id_of(secret_key),
            key_fingerprint=key.fingerprint,
            passphrase_salt=salt,
            passphrase_verifier=verifier,
            passphrase_scope=None if passphrase is None else options.passphrase_scope,
            ttl_seconds=options.ttl_seconds,
            ip_address=caller.ip_address,
            user_agent=caller.user_agent,
        )
        committed_at, _ = await self._submit(row, SMALL_BYTES + size_bytes, caller)
        return receipt_key, secret_key, committed_at + timedelta(seconds=options.ttl_seconds)

    async def claim(
        self,
        secret_key: SecretKey,
        action: Action,
        caller: Caller,
        passphrase: str | None = None,
        by: KeyKind = "secret_key",
        idempotency_key: str = "",
    ) -> Plaintext:
        """End the secret for this caller alone, who gets it if it is read. Raises what the log says
        of one that is gone; after all but outcome_unknown and damaged it is as readable as before.
        """
        claim = Claim(
            id=secret_id_of(secret_key),
            action=action,
            authorized=by == "receipt_key",
            by=by,
            # It names the one who may ask again, and tells a dump neither the link nor the key.
            reader=hmac.digest(secret_key, READER_LABEL + idempotency_key.encode(), "sha256")
            if idempotency_key
            else None,
            max_bytes=SMALL_CIPHERTEXT_BYTES,
            ip_address=caller.ip_address,
            user_agent=caller.user_agent,
        )
        passphrase_key = b""
        for backoff_seconds in CLAIM_BACKOFF_SECONDS:
            _, granted = await self._submit(claim, claim.max_bytes // 4, caller)
            if granted is not None:
                if action == "deleted":
                    return Plaintext(b"")
                try:
                    return await self._open(granted, secret_key, passphrase_key)
                except InvalidToken:
                    log.error("the row of %s was altered or damaged", claim.id)
                    raise ServiceError(Code.DAMAGED) from None
            try:
                live = await self.find_live(claim.id)
            except ServiceError:
                replayed = await self._replay(claim, secret_key, caller, passphrase)
                if not replayed:
                    raise
                return replayed
            if live["key_fingerprint"] not in self.keys:
                raise Unavailable("This secret's encryption key is not at hand here")
            if live[f"guards_{action}"] and not claim.authorized:
                passphrase_key = await self._check_passphrase(
                    live, secret_key, claim, caller, passphrase
                )
                claim = claim._replace(authorized=True)
            else:  # still there: another statement held it, or it is large
                claim = claim._replace(max_bytes=MAX_CIPHERTEXT_BYTES)
                await sleep(backoff_seconds)
        raise Unavailable("This secret is held by another request now")

    async def _open(
        self, stored: Record, secret_key: SecretKey, passphrase_key: bytes
    ) -> Plaintext:
        kek = key_encryption_key(self.keys[stored["key_fingerprint"]], secret_key, passphrase_key)
        sealed = Sealed(*(stored[name] for name in Sealed._fields))
        return await in_thread_if_large(len(sealed.ciphertext), unseal, sealed, kek)

    async def _replay(
        self, claim: Claim, secret_key: SecretKey, caller: Caller, passphrase: str | None
    ) -> Plaintext | None:
        """What this very reader was handed, within REPLAY_SECONDS. None for anybody else, and for
        another passphrase: this is no place to guess at one."""
        if not claim.reader:
            return None
        for kept in await self.fetch(FIND_REPLAY, claim.id, claim.reader, list(self.keys)):
            passphrase_key = b""
            salt = kept["passphrase_salt"]
            if salt:
                key = self.keys[kept["key_fingerprint"]]
                async with self._argon2_turn(caller, *self._reading):
                    derived = await to_thread(
                        derive_passphrase_keys, passphrase or "", salt, key, secret_key
                    )
                passphrase_key = derived.passphrase_key
            with suppress(InvalidToken):
                plaintext = await self._open(kept, secret_key, passphrase_key)
                await self.fetch(LOG_REPLAYED, claim.id, caller.ip_address, caller.user_agent)
                return plaintext
        return None

    @asynccontextmanager
    async def _argon2_turn(
        self, caller: Caller, places: Shares, lane: Semaphore
    ) -> AsyncIterator[None]:
        """Raises Unavailable at once for whoever does not fit into the queue."""
        with places.take(caller.network):
            async with lane, self._cores:
                caller.check()
                yield

    async def _check_passphrase(
        self,
        live: Record,
        secret_key: SecretKey,
        claim: Claim,
        caller: Caller,
        passphrase: str | None,
    ) -> bytes:
        """The passphrase_key that reading needs. An attempt is charged before it is checked, and
        only where it can be; a refusal is logged and burns nothing."""
        if passphrase is None:
            raise ServiceError(Code.PASSPHRASE_REQUIRED)
        key = self.keys[live["key_fingerprint"]]
        async with self._argon2_turn(caller, *self._reading):
            charged = await self.fetch(CHARGE_ATTEMPT, claim.id, ATTEMPTS, ATTEMPT_PAUSE_MINUTES)
            if not charged:
                live = await self.find_live(claim.id)
                raise ServiceError(
                    Code.TOO_MANY_ATTEMPTS,
                    retry_at=live["retry_at"],
                    retry_seconds=live["retry_seconds"],
                )
            salt, verifier, attempts_left = charged[0]
            derived = await to_thread(derive_passphrase_keys, passphrase, salt, key, secret_key)
        if not hmac.compare_digest(derived.verifier, verifier):
            await self.fetch(
                LOG_DENIED, claim.id, caller.ip_address, caller.user_agent, claim.action
            )
            raise ServiceError(Code.WRONG_PASSPHRASE, attempts_left=attempts_left)
        # Should the claim that follows fail, it costs its owner nothing.
        await self.fetch("update secrets set attempts = 0 where id = $1", claim.id)
        return derived.passphrase_key if live["guards_read"] else b""

    async def _submit(self, row: NewSecret | Claim, weight: int, caller: Caller) -> Committed:
        """Have the row committed. A creation that fails is told that nothing has happened, even
        where it may be stored: nobody has its link."""
        try:
            return await self._batcher.submit(row, weight, caller.check)
        except BatchFailed as failed:
            (cause,) = failed.args
            if not isinstance(cause, Unavailable):
                note_answer("A batch", cause)
            if isinstance(row, Claim) and getattr(cause, "maybe_executed", True):
                raise ServiceError(Code.OUTCOME_UNKNOWN) from None
            raise Unavailable() from None

    async def _write(self, rows: list[NewSecret | Claim]) -> list[Committed]:
        """Let PostgreSQL decide, while Redis takes and forgets copies and counts the quota."""
        new = [row for row in rows if isinstance(row, NewSecret)]
        claims = {number: row for number, row in enumerate(rows) if isinstance(row, Claim)}
        columns = [*zip(*new, strict=True)] or [()] * len(NewSecret._fields)
        columns += [*zip(*claims.values(), strict=True)] or [()] * len(Claim._fields)
        caching = create_task(self._cache(new, claims.values()))
        try:
            while True:
                # By PostgreSQL's clock: when fetch() stops waiting for the answer.
                deadline = datetime.now(UTC) + self.database.clock_offset
                deadline += timedelta(seconds=POSTGRES_TIMEOUT_SECONDS)
                records = await self.fetch(
                    COMMIT_BATCH,
                    *columns,
                    [*claims],
                    [*self.keys],
                    settings.replay_seconds,
                    deadline,
                )
                at = records[0]["committed_at"]
                if at < deadline:
                    granted = {record["number"]: record for record in records}
                    return [(at, granted.get(number)) for number in range(len(rows))]
                # Nothing was done: we were frozen or busy and sent it too late, or a clock was set.
                self.database.clock_offset = at - datetime.now(UTC)
        finally:
            await caching

    async def _cache(self, new: list[NewSecret], claims: Iterable[Claim]) -> None:
        """Once for a batch, however often it is sent to PostgreSQL."""
        unsent = self._quota.unsent
        self._quota.unsent = Counter()
        commands: list[RedisCommand] = [("INCRBY", name, kib) for name, kib in unsent.items()]
        commands += [("EXPIRE", name, 60) for name in unsent]
        commands += [("GETDEL", f"key:{claim.id}") for claim in claims]
        for row in new:
            seconds = settings.cache_seconds
            commands.append(("SET", f"secret:{row.id}", row.ciphertext, "EX", seconds))
            if row.passphrase_scope != "read":  # later than the ciphertext it would open nothing
                seconds = min(row.ttl_seconds, seconds)
                commands.append(("SET", f"key:{row.id}", row.wrapped_key, "EX", seconds))
        answers = await self.redis.exchange(commands)
        self._quota.known |= Counter(dict(zip(unsent, answers, strict=False)))  # the larger count

    async def _find(self, secret_id: SecretId, needed: str) -> Record:
        (found,) = await self.fetch(FIND_SECRET, secret_id, ATTEMPTS, ATTEMPT_PAUSE_MINUTES)
        if not found[needed]:
            raise ServiceError(
                Code.NOT_FOUND, "No secret with this key was ever here, or its history has ended."
            )
        return found

    async def find_live(self, secret_id: SecretId) -> Record:
        """Look without touching: a row of FIND_SECRET. Raises not_found, already_read, deleted,
        expired or lost."""
        found = await self._find(secret_id, "code")
        if found["code"] != "unread":
            raise ServiceError(Code[found["code"].upper()], ended_at=found["ended_at"])
        return found

    async def receipt(self, secret_id: SecretId, caller: Caller, wait_seconds: int) -> str:
        """The JSON of what the log has of a secret, for its creator. Answers as soon as the secret
        has ended, or after that time, or at once where too many wait or the process is to stop."""
        if self._waiting_receipts.locked():
            wait_seconds = 0
        wait_until = monotonic() + wait_seconds
        async with self._waiting_receipts if wait_seconds else nullcontext():
            found = await self._find(secret_id, "receipt")
            while (
                found["code"] == "unread" and monotonic() < wait_until and not is_stopping.is_set()
            ):
                await sleep(1)
                if caller.has_left():
                    raise ClientDisconnect()
                found = await self._find(secret_id, "receipt")
        return str(found["receipt"])

    async def health(self) -> bool:
        """Whether Redis answers. Raises Unavailable unless PostgreSQL takes writes."""
        await self.fetch("select from encryption_keys where false for update")
        return bool(await self.redis.exchange([("PING",)]))


# --- Cleanup ----------------------------------------------------------------------------------

REST_SECONDS = 0.05  # after a batch that was full
KEY_RETENTION_SECONDS = settings.max_ttl_seconds + 2 * settings.cleanup_interval_seconds


async def clean_expired_secrets(vault: Vault) -> None:
    """For ever. After a full batch the next one follows soon, but after a rest: reads go first.
    Each turn logs what was answered since the last one."""
    fingerprint = vault.newest_key.fingerprint
    while True:
        rows = 0
        if answered:
            log.info("answered: %s", dict(answered))
            answered.clear()
        try:
            await vault.fetch(EXTEND_KEY_RETENTION, fingerprint, KEY_RETENTION_SECONDS)
            (done,) = await vault.fetch(CLEAN_UP, CLEANUP_ROWS, settings.log_retention_days)
            vault.storage_is_full = 0 < settings.max_stored_mib <= done["stored_mib"]
            names = [f"key:{secret_id}" for secret_id in done["expired"]]
            if names:
                await vault.redis.exchange([("DEL", *names)])
            rows = done["most_rows"]
            if rows:
                log.info("cleanup: %s", done["counts"])
        except Exception as error:  # nobody would start it again
            log.warning("cleanup will be tried again: %s", type(error).__name__)
        await sleep(REST_SECONDS if rows == CLEANUP_ROWS else settings.cleanup_interval_seconds)


# --- Start ------------------------------------------------------------------------------------
# What stands in the way of our promises stops the start, with one line that names the remedy.

POSTGRES_WAIT_SECONDS = 30.0  # a database that boots beside us gets this long


def load_encryption_keys() -> list[EncryptionKey]:
    """From ENCRYPTION_KEY, else from ENCRYPTION_KEY_FILE, which is made if there is none and never
    overwritten: written under a name that nobody else uses, synced, then linked. Of two starts at
    once both read the same whole key."""
    text = settings.encryption_key.get_secret_value()
    file = settings.encryption_key_file
    name = "ENCRYPTION_KEY" if text else f"ENCRYPTION_KEY_FILE {file}"
    try:
        if not text and not file.exists():
            with tempfile.NamedTemporaryFile(  # with mode 0600
                dir=file.parent, prefix=f".{file.name}."
            ) as aside:
                aside.write(Fernet.generate_key())
                aside.flush()
                os.fsync(aside.fileno())
                with suppress(FileExistsError):
                    os.link(aside.name, file)
            os.sync()  # or a power failure could lose the name, and with it the key
        return parse_encryption_keys(text or file.read_text("ascii", "replace"))
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{name}: {error}. Name a file that can be made, or keys of 32 bytes in base64."
        ) from None


async def wait_for_postgres(database: Database, keys: list[EncryptionKey]) -> None:
    """Until it has been checked. What only an operator can mend is told at once."""
    fingerprints = [key.fingerprint for key in keys]
    give_up_at = monotonic() + POSTGRES_WAIT_SECONDS
    while True:
        connection = None
        try:
            connection = await database.connect()
            for statement in (COMMIT_BATCH, CHARGE_ATTEMPT):
                await connection.prepare(statement)  # they name every column
            async with connection.transaction():
                # Of two starts at once, one finds the other's key.
                await connection.execute(
                    "select pg_advisory_xact_lock(hashtext('one-time-secrets'))"
                )
                refusal = await connection.fetchval(FIND_REFUSAL, fingerprints, SCHEMA_VERSION)
                if refusal:
                    raise SystemExit(refusal)
                await connection.execute(
                    EXTEND_KEY_RETENTION, fingerprints[0], KEY_RETENTION_SECONDS
                )
            return
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            raise SystemExit(
                "The tables are missing or older than this program. Load schema.sql: "
                "python main.py schema"
            ) from None
        except Exception as error:
            note_answer("PostgreSQL", error)
            if monotonic() > give_up_at:
                where = f"{settings.postgres_host}:{settings.postgres_port}"
                raise SystemExit(
                    f"No PostgreSQL at {where} takes writes from us ({type(error).__name__}). "
                    "Check the POSTGRES_ settings."
                ) from None
            await sleep(0.5)
        finally:
            if connection:
                connection.terminate()


async def load_schema() -> None:
    connection = await Database().connect()
    await connection.execute("set statement_timeout = 0")
    await connection.execute((HERE / "schema.sql").read_text("utf-8"))


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """uvicorn has a warning for each request that it refuses, and of a WebSocket the path."""
    return record.levelno != logging.WARNING and "websockets" not in record.pathname


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[dict[str, Vault]]:
    # However the service is started, the lines about a request are ours: uvicorn's hold keys.
    getLogger("uvicorn.access").disabled = True
    getLogger("uvicorn.asgi").disabled = True
    getLogger("uvicorn.error").addFilter(is_worth_a_line)
    keys = load_encryption_keys()
    database = Database()
    redis = Redis()
    await wait_for_postgres(database, keys)
    await redis.exchange([("PING",)])
    if isinstance(redis.failure, AuthenticationError | ResponseError):
        raise SystemExit("REDIS_URL: Redis refuses its password or its database number")
    vault = Vault(database, redis, keys)
    cleaning = create_task(clean_expired_secrets(vault))
    gc.freeze()  # the imported modules stay: collecting past them costs 40 ms now and then
    try:
        yield {"vault": vault}
    finally:
        cleaning.cancel()
        database.close_idle()
        await redis.connection.disconnect(nowait=True)


# --- HTTP: models -----------------------------------------------------------------------------
# What is sent, and those answers that FastAPI documents. The others are written elsewhere, a
# receipt by PostgreSQL and an error by problem(): their schemas stand under "Routes".


class Document(BaseModel):
    """Strict: a misspelt `ttl` must not silently become the default, nor "60" a number."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    __repr_args__ = list  # it shows no field, wherever it is shown


class RawOptions(Document):
    """The query beside a body that is the secret itself."""

    ttl_seconds: int = Field(settings.default_ttl_seconds, ge=1, le=settings.max_ttl_seconds)


class ReceiptOptions(Document):
    wait_seconds: int = Field(0, ge=1, le=60)


class PresentPassphrase(Document):
    passphrase: str | None = Field(None, min_length=1, max_length=MAX_PASSPHRASE_CHARACTERS)


class SecretRead(Document):
    """With `encoding`, `secret` is the base64 of bytes."""

    secret: str
    encoding: Literal["base64"] | None = None
    filename: str | None = None


class CreateSecret(SecretRead, PresentPassphrase, RawOptions):
    """`passphrase_scope`: what the passphrase guards, deleting or reading too."""

    passphrase_scope: PassphraseScope = "delete"


class SecretCreated(Document):
    """The secret_key reads the secret, once. The receipt_key shows what became of it, revokes it,
    and opens it, too."""

    secret_key: str
    receipt_key: str
    expires_at: datetime
    url: str
    passphrase_scope: PassphraseScope | None = None


# --- Reading a request ------------------------------------------------------------------------
# A body is bounded before it is read, while it comes, and before it is parsed; what is refused is
# named, never repeated, in an answer that is shorter than the question.

BODY_SECONDS = 30.0  # for a body to arrive ...
BODY_BYTES_PER_SECOND = 64 * 1024  # ... and longer while it comes with at least this
BODY_GRACE_SECONDS = 0.5  # until a small one is slow, and takes memory from BODY_BUDGET_BYTES
SLOW_BODY_BYTES = 128 * 1024  # what each takes at least: of 64 MiB, 512 bodies
MAX_PASSPHRASE_BODY_BYTES = 25 * 1024  # JSON may have two \u0000, twelve bytes, for a character
MAX_JSON_BYTES = 6 * settings.max_secret_bytes + MAX_PASSPHRASE_BODY_BYTES
# All that we take is one flat object of few names: what stands outside its strings is short. A
# parser would need 20 times the memory of a body that is nothing but brackets or digits.
MAX_MARKUP_BYTES = 4096
JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
JSON_REMEDY = "curl -T FILE stores a file as it is, 'Content-Type: text/plain' a body."
MAX_QUERY_BYTES = 2048
# At most 255 bytes, and nothing that leaves a folder or a line (C1 controls begin with C2).
FILENAME = re.compile(rb"(?s)(?=.{1,255}$)(?!\.{1,2}$)([^\x00-\x1f\x7f/\\\xc2]|\xc2[^\x80-\x9f])+")
MAX_FIELDS_NAMED = 10  # in a 422

RAW_TYPES = ("application/octet-stream", "text/plain")
# The media ranges of Accept that say something here, those of raw answers named, with weights.
ACCEPTED = re.compile(
    r"(?:^|,)\s*(?:(text/plain|text/\*|application/octet-stream)|application/json|application/\*"
    r"|\*/\*)\s*(?=[,;]|$)(?:[^,]*?;\s*q=(\d*\.?\d+))?"
)
HOST = re.compile(r"(?i)([a-z0-9._~-]+|\[[0-9a-f:.]+])(:\d{1,5})?")
PREVIEW_BOT = re.compile(
    rb"(?i)bot\b|crawler|spider|preview|Slack|WhatsApp|facebook|Facebot|meta-external|"
    rb"Microsoft Office|ms-?office|Teams|SafeLinks|Google|Mastodon|Pinterest|vkShare|Viber|"
    rb"Iframely|Embedly"
)
TOKENS = re.findall(rb"[^\s,]+", settings.api_tokens.get_secret_value().encode())

Model = TypeVar("Model", bound=Document)


def invalid(place: str, message: str) -> ServiceError:
    error = {"loc": place.split("."), "msg": message, "type": "value_error"}
    return ServiceError(Code.INVALID, f"{place}: {message}", errors=[error])


def parse_input(model: type[Model], source: bytes | dict[str, str], remedy: str = "") -> Model:
    """From a JSON body or a query. Raises invalid. `remedy` is for a body that is no object."""
    place = "query"
    try:
        if isinstance(source, dict):
            return model.model_validate_strings(source)
        place = "body"
        if len(source) > MAX_MARKUP_BYTES < len(JSON_STRING.sub(b"", source)):
            raise invalid(place, f"This is no JSON object of the fields that there are. {remedy}")
        return model.model_validate_json(source)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
    named = []
    for item in found[:MAX_FIELDS_NAMED]:
        names = map(str, item["loc"])  # a name is input, too: told unless it is odd
        path = [name if re.fullmatch(r"(?a)\w{1,32}", name) else "(unknown)" for name in names]
        message = item["msg"] if path else f"{item['msg']}. {remedy}"
        named.append({"loc": [place, *path], "msg": message, "type": item["type"]})
    reasons = [f"{'.'.join(item['loc'])}: {item['msg']}" for item in named]
    reasons += [f"and {len(found) - len(named)} more"] * (len(found) > len(named))
    raise ServiceError(Code.INVALID, "; ".join(reasons), errors=named)


class SecretRequest(Request, Caller):
    """A request, and what is asked of it. It is the operations' Caller."""

    has_warned = False  # that somebody is not believed

    def __init__(self, scope: Scope, receive: Receive) -> None:
        super().__init__(scope, receive)
        self.vault: Vault = scope["state"]["vault"]
        self.held: ExitStack | None = None  # what is given back when it has been answered
        self._header: dict[bytes, bytes] = scope["header"]
        self._cycle: Any = getattr(receive, "__self__", None)  # uvicorn's side of this request
        self.deadline = monotonic() + QUEUE_TIMEOUT_SECONDS
        self.user_agent = self.header(b"user-agent")[:200]
        self.ip_address, self.network = None, "unknown"
        client = scope["client"] or [""]  # a unix socket has none
        with suppress(ValueError):  # a proxy that is believed may pass on anything
            self.ip_address, self.network = parse_address(client[0])
        forwarded = self.header(b"x-forwarded-for")
        if forwarded and client[0] not in forwarded and not self.has_warned:
            SecretRequest.has_warned = True
            log.warning("FORWARDED_ALLOW_IPS lacks %s: X-Forwarded-For is ignored", client[0])

    def header(self, name: bytes) -> str:
        """The last one of that name, or nothing."""
        return self._header.get(name, b"").decode("latin-1")

    def has_left(self) -> bool:
        """Whether the connection is closed, by the kernel's word: uvicorn tells a worker that is
        behind too late, and Starlette's is_disconnected() takes 26 us instead of 0.7."""
        try:
            poll = select.poll()
            peer = self._cycle.transport.get_extra_info("socket")
            poll.register(peer.fileno(), select.POLLRDHUP)
            return bool(self._cycle.disconnected or poll.poll(0))
        except (AttributeError, OSError, ValueError) as error:
            return isinstance(error, ValueError)  # its number is -1: closed

    async def bounded_body(self, max_bytes: int) -> bytes:
        """Raises too_large, timeout and, for one that is slow to come, unavailable."""
        length = int(self.header(b"content-length") or max_bytes)  # uvicorn refuses what is none
        if length > max_bytes:
            raise ServiceError(Code.TOO_LARGE)
        if b"content-length" in self._header and not getattr(self._cycle, "more_body", True):
            return await self.body()  # it is there, as usual: an alarm would take 5 us
        body = bytearray()
        try:
            if length <= SLOW_BODY_BYTES:
                with suppress(TimeoutError):
                    await self._read_into(body, max_bytes, BODY_GRACE_SECONDS)
                    return bytes(body)
            self.held = ExitStack()
            self.held.enter_context(
                self.vault.bodies.take(self.network, max(length, SLOW_BODY_BYTES))
            )
            await self._read_into(body, max_bytes, BODY_SECONDS)
        except TimeoutError:  # the connection ends, because the rest may yet come
            raise ServiceError(Code.TIMEOUT, headers={"Connection": "close"}) from None
        self.deadline = monotonic() + QUEUE_TIMEOUT_SECONDS
        return bytes(body)

    async def _read_into(self, body: bytearray, max_bytes: int, seconds: float) -> None:
        """Raises TimeoutError after so long, and later while enough comes."""
        async with timeout(seconds) as limit:
            async for chunk in self.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise ServiceError(Code.TOO_LARGE)
                limit.reschedule((limit.when() or 0) + len(chunk) / BODY_BYTES_PER_SECOND)

    def query(self) -> dict[str, str]:
        if len(self.scope["query_string"]) > MAX_QUERY_BYTES:
            raise invalid("query", f"This is longer than {MAX_QUERY_BYTES} bytes")
        return dict(self.query_params) if self.scope["query_string"] else {}

    async def creation(self) -> tuple[Plaintext, CreateSecret]:
        """The secret, and how to keep it. JSON unless PUT or labelled as bytes, because curl labels
        what it sends as a form."""
        scheme, _, token = self._header.get(b"authorization", b"").partition(b" ")
        fits = [hmac.compare_digest(token.strip(), one) for one in TOKENS]
        if fits and not (True in fits and scheme.lower() == b"bearer"):
            raise ServiceError(Code.TOKEN_REQUIRED, headers={"WWW-Authenticate": "Bearer"})
        coding = self.header(b"transfer-encoding").lower()
        if b"content-encoding" in self._header or coding not in ("", "chunked"):
            raise ServiceError(Code.UNSUPPORTED_ENCODING)
        if b"content-range" in self._header:
            raise ServiceError(Code.BAD_REQUEST, "Send the secret whole: no Content-Range.")
        label = self.header(b"content-type").partition(";")[0].strip().lower()
        query = self.query()
        if self.method == "PUT" or label in RAW_TYPES:
            secret = await self.bounded_body(settings.max_secret_bytes)
            options = CreateSecret(secret="", **dict(parse_input(RawOptions, query)))
        else:
            body = await self.bounded_body(MAX_JSON_BYTES)
            if query:
                parse_input(Document, query)  # refuses ttl_seconds, which JSON itself has
            options = await in_thread_if_large(
                len(body), parse_input, CreateSecret, body, JSON_REMEDY
            )
            if options.passphrase_scope == "read" and options.passphrase is None:
                raise invalid("body.passphrase", "passphrase_scope 'read' needs a passphrase")
            secret = options.secret.encode()
            if options.encoding:
                try:
                    secret = b64decode(secret, validate=True)
                except ValueError:
                    raise invalid("body.secret", "This is not base64") from None
        name = self.path_params.get("secret_key", options.filename)  # PUT /secret/{filename}
        if name is not None and not FILENAME.fullmatch(name.encode()):
            raise invalid("filename", "1 to 255 bytes, no control characters, no / and no \\")
        if not secret:
            raise invalid("body.secret", "The secret is empty")
        if len(secret) > settings.max_secret_bytes:
            raise ServiceError(Code.TOO_LARGE)
        return Plaintext(secret, name), options

    async def passphrase(self) -> str | None:
        body = b"" if self.method == "GET" else await self.bounded_body(MAX_PASSPHRASE_BODY_BYTES)
        remedy = 'Expected {"passphrase": "..."}.'
        return parse_input(PresentPassphrase, body, remedy).passphrase if body else None

    def wants_raw(self) -> bool:
        """By the range with the highest weight, of equals the first (RFC 9110, 12.5.1)."""
        best = (0.0, "")
        for raw, weight in ACCEPTED.findall(self.header(b"accept").lower()):
            best = max(best, (float(weight or 1), raw), key=itemgetter(0))
        return bool(best[1])

    def public_url(self) -> str:
        """What links begin with; empty where neither PUBLIC_URL nor Host tells."""
        host = self.header(b"host")
        own = f"{self.scope['scheme']}://{host}" if HOST.fullmatch(host) else ""
        return settings.public_url.rstrip("/") or own


def wants_page(header: dict[bytes, bytes]) -> bool:
    """A browser's address bar, a prefetch or a link preview: it gets the page, which asks a person
    first. Old Java accepts text/html, too, but no browser of today asks for GIF beside it."""
    accept = header.get(b"accept", b"")
    purposes = header.get(b"sec-purpose", b"") + header.get(b"purpose", b"")
    return (
        (b"text/html" in accept and (b"image/gif" not in accept or b"sec-fetch-mode" in header))
        or b"prefetch" in purposes
        or bool(PREVIEW_BOT.search(header.get(b"user-agent", b"")))
    )


# --- Application ------------------------------------------------------------------------------
# `app` is what uvicorn calls: what every request passes, around FastAPI's router. `Endpoint` is how
# our routes are called. Both stand in place of FastAPI's own wrappers, which took 52 us of a
# request's 150; what these would do and ours do not raises an error where it is declared.

MAX_CONCURRENT_REQUESTS = 1000  # a worker: 0.3 s of work
KEPT_SECONDS = 2.5  # how long our Caddyfile keeps a connection that is idle, and a little
NO_STORE_HEADERS = re.findall(
    rb"(.+): (.+)",
    b"""cache-control: no-cache, no-store, must-revalidate
pragma: no-cache
expires: 0
referrer-policy: no-referrer
x-content-type-options: nosniff
x-robots-tag: noindex
content-security-policy: frame-ancestors 'none'; img-src 'self' data:""",
)
HERE = Path(__file__).parent
HTML = (HERE / "index.html").read_text("utf-8")
CURL_LINES = re.split("</?pre>\n?", HTML)[1]  # which the page shows without JavaScript, too
LIMITS = settings.model_dump_json(
    include={
        "default_ttl_seconds",
        "max_ttl_seconds",
        "max_secret_bytes",
        "replay_seconds",
        "api_tokens",  # asterisks, or nothing
    }
)
PAGE = re.sub("""(?<=name="limits" content=)'.*'""", f"'{LIMITS}'", HTML)


logging.basicConfig(
    format="%(asctime)s %(levelname)s %(message)s", level=settings.log_level.upper()
)
getLogger("asyncio").setLevel(logging.INFO)  # at debug it speaks beside why a start is refused


methods_of = defaultdict[str, set[str]](set)  # by path


class Endpoint(APIRoute):
    """Its function takes the request and the path's parameters, and returns a model, JSON as text
    or a response. Route.handle is overridden, because the hook get_route_handler costs 3 to 15 % of
    all cycles."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        methods_of[path].update(self.methods or ())
        ignored = {*signature(endpoint).parameters} - {"request", *self.param_convertors}
        if ignored or self.dependencies:
            raise TypeError(f"{path}: an Endpoint gets the request and the path's parameters only")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(methods_of[self.path]))})
        if scope["method"] == "GET" and self.path != "/health" and wants_page(scope["header"]):
            await HTMLResponse(PAGE)(scope, receive, send)
            return
        request = SecretRequest(scope, receive)
        try:
            answer = await self.endpoint(request, **scope["path_params"])
        finally:
            if request.held:
                request.held.close()
        if not isinstance(answer, Response):  # with a newline, for the sake of terminals
            is_json = isinstance(answer, str)  # of PostgreSQL
            document = answer.encode() if is_json else to_json(answer, exclude_none=True)
            answer = Response(
                document + b"\n", self.status_code or 200, media_type="application/json"
            )
        await answer(scope, receive, send)


class Api(FastAPI):
    def _refuse(self, *_: Any, **__: Any) -> None:
        raise TypeError("no middleware and no exception handler runs here: see app()")

    add_middleware = add_exception_handler = _refuse

    def openapi(self) -> dict[str, Any]:
        """FastAPI's, with what it cannot know, because an Endpoint reads and answers it itself."""
        if not self.openapi_schema:
            document = super().openapi()
            deep_dict_update(document, BESIDE_THE_MODELS)
            document["components"]["schemas"]["CreateSecret"] = CreateSecret.model_json_schema()
        return self.openapi_schema or {}


class Connection(HttpToolsProtocol):
    """uvicorn's, which would cut a connection at a stop though its next request is on its way. That
    one is answered, as the last, until no proxy of ours keeps the connection."""

    def shutdown(self) -> None:
        is_stopping.set()
        self.loop.call_later(KEPT_SECONDS, super().shutdown)


api = Api(
    lifespan=lifespan,
    redirect_slashes=False,
    openapi_url=None,  # a constant route, below
    responses={"default": {"$ref": "#/components/responses/problem"}},
)
api.router.route_class = Endpoint


def as_service_error(error: BaseException) -> ServiceError:
    """What a caller is told of whatever was raised. Of a mistake of ours, nothing: it is logged."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, CancelledError):  # by uvicorn, when a stop waits no longer
        return ServiceError(Code.OUTCOME_UNKNOWN)
    if isinstance(error, HTTPException):  # the router's, and that of static files
        allow = (error.headers or {}).get("Allow", "GET, HEAD")
        if error.status_code == 405:
            return ServiceError(Code.METHOD_NOT_ALLOWED, f"Only: {allow}.", {"Allow": allow})
        return ServiceError(Code.NOT_FOUND, "There is no such route.")
    # Its message may quote a value.
    log.error("%s at %s", type(error).__name__, traceback.extract_tb(error.__traceback__)[-3:])
    return ServiceError(Code.INTERNAL)


def problem(error: ServiceError) -> Response:
    """The one writer of errors (RFC 9457)."""
    status = error.code.status
    document = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        **error.members,
    }
    return Response(to_json(document) + b"\n", status, error.headers, "application/problem+json")


requests_in_flight = 0


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
    header = scope["header"] = dict(scope["headers"])
    status = 0
    code = ""

    async def send_marked(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            message["headers"] = [*message["headers"], *NO_STORE_HEADERS]
            # uvicorn drops the body of a request with Upgrade and would run what follows its first
            # segment as another one (Kludex/uvicorn#2722): it is the connection's last. So is
            # whichever comes during a stop.
            if b"upgrade" in header or is_stopping.is_set():
                message["headers"].append((b"connection", b"close"))
        await send(message)

    requests_in_flight += 1
    try:
        if b"upgrade" in header and (
            header.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in header
        ):
            raise ServiceError(Code.UPGRADE)
        if requests_in_flight > MAX_CONCURRENT_REQUESTS and scope["path"] != "/":
            raise Unavailable("Too many requests are under way")
        await api.router(scope, receive, send_marked)
    except ClientDisconnect:
        status = 499  # as nginx has it. uvicorn, which may not know yet, wants an answer
        await Response(status_code=status)(scope, receive, send)
    except (Exception, CancelledError) as raised:
        error = as_service_error(raised)
        code = error.code
        answer = problem(error)
        if error.code.status in (404, 405) and wants_page(header):
            answer = HTMLResponse(PAGE, error.code.status)  # it understands bent links
        if not status:
            await answer(scope, receive, send_marked)
    finally:
        requests_in_flight -= 1
    route = getattr(scope.get("route"), "path", "(no route)")
    line = f"{scope['method']} {route} {status} {code}"
    answered[line] += 1
    log.debug(line)


# --- Routes -----------------------------------------------------------------------------------
# In the order in which they are asked for; of two decorators the lower one comes first.

KeyText = Annotated[str, Field(pattern=KEY_PATTERN)]
NameText = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,255}$")]  # of many, those without %

# What FastAPI cannot know, because an Endpoint reads it, app() writes it, or PostgreSQL does, in
# OpenAPI's own words.
BESIDE_THE_MODELS: dict[str, Any] = json.loads(
    """{
    "info": {
        "title": "One-Time Secrets",
        "version": "1.1.0",
        "description": "Keeps a secret encrypted and hands it out exactly once."
    },
    "servers": [{"url": "/"}, {"url": "/api/v1"}],
    "components": {
        "schemas": {"Problem": {
            "type": "object",
            "description": "RFC 9457: detail is for people, code for programs.",
            "required": ["type", "title", "status", "detail", "code"],
            "properties": {
                "type": {"const": "about:blank"},
                "title": {"type": "string", "examples": ["Gone"]},
                "status": {"type": "integer", "examples": [410]},
                "detail": {"type": "string"},
                "code": {"enum": [
                    "bad_request", "upgrade_refused", "token_required", "passphrase_required",
                    "wrong_passphrase", "not_found", "method_not_allowed", "timeout",
                    "already_read", "deleted", "expired", "lost", "too_large",
                    "unsupported_encoding", "invalid", "too_many_attempts", "rate_limited",
                    "damaged", "internal", "unavailable", "outcome_unknown", "storage_full"
                ]},
                "errors": {"type": "array", "description": "with invalid", "items": {
                    "type": "object",
                    "required": ["loc", "msg", "type"],
                    "properties": {
                        "loc": {"type": "array", "items": {"type": "string"}},
                        "msg": {"type": "string"},
                        "type": {"type": "string"}
                    }
                }},
                "ended_at": {
                    "type": "string", "format": "date-time",
                    "description": "with 410; with lost, when it would have expired"
                },
                "attempts_left": {"type": "integer", "description": "with wrong_passphrase"},
                "retry_at": {
                    "type": "string", "format": "date-time",
                    "description": "with too_many_attempts"
                },
                "retry_seconds": {"type": "integer", "description": "with 429 and 503"}
            }
        }},
        "responses": {"problem": {
            "description": "what is refused, and why",
            "content": {"application/problem+json": {
                "schema": {"$ref": "#/components/schemas/Problem"}
            }}
        }},
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        "parameters": {
            "ttl_seconds": {
                "name": "ttl_seconds", "in": "query", "description": "not beside JSON",
                "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TTL_SECONDS}
            },
            "wait_seconds": {
                "name": "wait_seconds", "in": "query",
                "description": "answers as soon as the secret has ended, or after this time",
                "schema": {"type": "integer", "minimum": 1, "maximum": 60}
            },
            "Idempotency-Key": {
                "name": "Idempotency-Key", "in": "header",
                "description": "lets you ask again when the answer was lost",
                "schema": {"type": "string", "pattern": "^[!-~]{16,200}$"}
            }
        },
        "requestBodies": {
            "bytes": {"required": true, "content": {"application/octet-stream": {
                "schema": {"type": "string", "format": "binary", "minLength": 1}
            }}},
            "passphrase": {"content": {"application/json": {"schema": {
                "type": "object",
                "additionalProperties": false,
                "properties": {"passphrase": {
                    "type": ["string", "null"], "minLength": 1, "maxLength": 1024
                }}
            }}}}
        }
    },
    "paths": {
        "/secret": {
            "post": {
                "parameters": [{"$ref": "#/components/parameters/ttl_seconds"}],
                "requestBody": {"required": true, "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/CreateSecret"},
                        "example": {
                            "secret": "hello",
                            "passphrase": "tell it by telephone",
                            "passphrase_scope": "read"
                        }
                    },
                    "application/octet-stream": {
                        "schema": {"type": "string", "format": "binary", "minLength": 1}
                    },
                    "text/plain": {
                        "schema": {"type": "string", "format": "binary", "minLength": 1}
                    }
                }},
                "security": [{}, {"token": []}]
            },
            "put": {
                "parameters": [{"$ref": "#/components/parameters/ttl_seconds"}],
                "requestBody": {"$ref": "#/components/requestBodies/bytes"},
                "security": [{}, {"token": []}]
            }
        },
        "/secret/{secret_key}": {
            "get": {"parameters": [{"$ref": "#/components/parameters/Idempotency-Key"}]},
            "post": {
                "parameters": [{"$ref": "#/components/parameters/Idempotency-Key"}],
                "requestBody": {"$ref": "#/components/requestBodies/passphrase"}
            },
            "put": {
                "parameters": [{"$ref": "#/components/parameters/ttl_seconds"}],
                "requestBody": {"$ref": "#/components/requestBodies/bytes"},
                "security": [{}, {"token": []}]
            },
            "delete": {
                "requestBody": {"$ref": "#/components/requestBodies/passphrase"},
                "responses": {"200": {"content": {"application/json": {"schema": {
                    "required": ["status"],
                    "properties": {"status": {"const": "secret_deleted"}}
                }}}}}
            }
        },
        "/secret/{secret_key}/status": {"get": {"responses": {"200": {"content": {
            "application/json": {"schema": {
                "type": "object",
                "required": ["status", "expires_at", "passphrase_required"],
                "properties": {
                    "status": {"const": "unread"},
                    "expires_at": {"type": "string", "format": "date-time"},
                    "passphrase_required": {"type": "boolean", "description": "for reading"},
                    "retry_at": {
                        "type": "string", "format": "date-time",
                        "description": "until then no passphrase is checked"
                    }
                }
            }}
        }}}}},
        "/receipt/{receipt_key}": {
            "get": {
                "parameters": [{"$ref": "#/components/parameters/wait_seconds"}],
                "responses": {"200": {"content": {"application/json": {"schema": {
                    "type": "object",
                    "description": "What became of a secret, as far as the log goes back.",
                    "required": ["status", "created_at", "expires_at", "events"],
                    "properties": {
                        "status": {
                            "enum": ["unread", "read", "deleted", "expired", "lost"],
                            "description": "lost: neither here nor ended by anything in the log"
                        },
                        "created_at": {"type": "string", "format": "date-time"},
                        "expires_at": {"type": "string", "format": "date-time"},
                        "retry_at": {"type": "string", "format": "date-time"},
                        "events": {"type": "array", "items": {
                            "type": "object",
                            "required": ["action", "created_at"],
                            "properties": {
                                "action": {"enum": [
                                    "created", "read", "replayed", "deleted", "expired", "denied"
                                ]},
                                "created_at": {"type": "string", "format": "date-time"},
                                "ip_address": {"type": "string", "examples": ["192.0.2.1"]},
                                "user_agent": {"type": "string", "examples": ["curl/8.14.1"]},
                                "by": {
                                    "enum": ["secret_key", "receipt_key"],
                                    "description": "the key that was shown"
                                },
                                "reason": {"type": "string", "description": "why it was denied"}
                            }
                        }}
                    }
                }}}}}
            },
            "delete": {"responses": {"200": {"content": {"application/json": {"schema": {
                "required": ["status"],
                "properties": {"status": {"const": "secret_deleted"}}
            }}}}}}
        },
        "/health": {"get": {"responses": {"200": {"content": {"application/json": {"schema": {
            "required": ["status", "postgres", "redis"],
            "properties": {
                "status": {"enum": ["ok", "degraded"], "description": "degraded: without Redis"},
                "postgres": {"const": "up"},
                "redis": {"enum": ["up", "down"]}
            }
        }}}}}}}
    }
}""".replace("MAX_TTL_SECONDS", f"{settings.max_ttl_seconds}")
)


@api.put("/secret", status_code=201, response_class=PlainTextResponse)
@api.post("/secret", status_code=201, response_model=SecretCreated)
async def create_secret(request: SecretRequest) -> Any:
    """Store a secret, and get the link that reads it once.

    The body of POST is JSON; labelled text/plain or application/octet-stream, or with PUT, it is
    the secret itself, byte for byte. PUT, and who accepts text/plain, gets the bare url."""
    base = request.public_url()
    if not base:
        raise ServiceError(Code.BAD_REQUEST, "A link needs Host to name a host.")
    plaintext, options = await request.creation()
    receipt_key, secret_key, expires_at = await request.vault.create(plaintext, request, options)
    key = urlsafe_b64encode(secret_key).decode()
    url = f"{base}/#{key}"  # browsers send no server what is behind the #
    if request.method == "PUT" or request.wants_raw():
        return PlainTextResponse(url + "\n", 201)
    return SecretCreated(
        secret_key=key,
        receipt_key=urlsafe_b64encode(receipt_key).decode(),
        expires_at=expires_at,
        url=url,
        passphrase_scope=options.passphrase_scope if options.passphrase else None,
    )


@api.post("/secret/{secret_key}", response_model=SecretRead)
@api.get("/secret/{secret_key}", response_model=SecretRead)
async def read_secret(request: SecretRequest, secret_key: KeyText) -> SecretRead | Response:
    """Read a secret. This ends it: a second read says when the first one was.

    With an Idempotency-Key the same request again gets the same answer, for a minute. GET from a
    browser's address bar, a prefetch and a link preview gets a page instead, and ends nothing. Who
    accepts text/plain gets the bare secret."""
    key = SecretKey(parse_key(secret_key))
    again = request.header(b"idempotency-key") if settings.replay_seconds else ""
    if again and not re.fullmatch("[ -~]{16,200}", again):
        raise invalid("header.Idempotency-Key", "16 to 200 printable ASCII characters")
    passphrase = await request.passphrase()
    plaintext = await request.vault.claim(key, "read", request, passphrase, idempotency_key=again)
    secret = plaintext.secret
    name = plaintext.filename
    try:
        answer = SecretRead(secret=secret.decode(), filename=name)
    except UnicodeDecodeError:
        text = b64encode(secret).decode()
        answer = SecretRead(secret=text, encoding="base64", filename=name)
    if not request.wants_raw():
        return answer
    raw = Response(secret, media_type=RAW_TYPES[0 if answer.encoding else 1])
    if name:  # RFC 6266: curl -J reads the first, browsers the second
        plain = re.sub(r'[^ -~]|["%\\]', "_", name)
        disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
        raw.headers["Content-Disposition"] = disposition
    return raw


@api.put("/secret/{secret_key}", status_code=201, response_class=PlainTextResponse)
async def create_named_secret(request: SecretRequest, secret_key: NameText) -> PlainTextResponse:
    """Store a file with its name, which stands in the secret_key's place: curl -T FILE adds it to
    an address that ends in a slash."""
    return await create_secret(request)  # type: ignore[no-any-return]


@api.delete("/secret/{secret_key}")
async def delete_secret(request: SecretRequest, secret_key: KeyText) -> dict[str, str]:
    """Destroy a secret unread. A secret with a passphrase needs it."""
    key = SecretKey(parse_key(secret_key))
    await request.vault.claim(key, "deleted", request, await request.passphrase())
    return {"status": "secret_deleted"}


@api.get("/secret/{secret_key}/status")
async def secret_status(request: SecretRequest, secret_key: KeyText) -> str:
    """Look whether a secret can still be read, without reading it."""
    live = await request.vault.find_live(secret_id_of(SecretKey(parse_key(secret_key))))
    return str(live["answer"])


@api.get("/receipt/{receipt_key}")
async def show_receipt(request: SecretRequest, receipt_key: KeyText) -> str:
    """What became of a secret, for its creator: read when, from which address, by what. Also after
    it is gone. With wait_seconds the answer comes as soon as the secret has ended."""
    secret_id = secret_id_of(secret_key_of(ReceiptKey(parse_key(receipt_key))))
    wait_seconds = parse_input(ReceiptOptions, request.query()).wait_seconds
    return await request.vault.receipt(secret_id, request, wait_seconds)


@api.delete("/receipt/{receipt_key}")
async def revoke_secret(request: SecretRequest, receipt_key: KeyText) -> dict[str, str]:
    """Destroy a secret unread, as its creator: no passphrase is asked for."""
    secret_key = secret_key_of(ReceiptKey(parse_key(receipt_key)))
    await request.vault.claim(secret_key, "deleted", request, by="receipt_key")
    return {"status": "secret_deleted"}


@api.head("/", include_in_schema=False)
@api.get("/", response_class=PlainTextResponse)
async def home(request: SecretRequest) -> Response:
    """curl lines for this very host; a browser gets the page for people. Needs no store: ask here
    whether the service lives."""
    return PlainTextResponse(CURL_LINES.replace("URL", request.public_url() or "URL"))


@api.head("/health", include_in_schema=False)
@api.get("/health")
async def health(request: SecretRequest) -> dict[str, str]:
    """Whether the service can serve: `degraded` without Redis, 503 without a PostgreSQL that takes
    writes."""
    if await request.vault.health():
        return {"status": "ok", "postgres": "up", "redis": "up"}
    return {"status": "degraded", "postgres": "up", "redis": "down"}


# The documentation, without a CDN. Its addresses are relative, so that it works under any prefix.
SWAGGER = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>One-Time Secrets</title>
<link rel="icon" href="static-offline-docs/favicon.png">
<link rel="stylesheet" href="static-offline-docs/swagger-ui.css">
<div id="swagger-ui"></div>
<script src="static-offline-docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui"})</script>
"""
REDOC = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>One-Time Secrets</title>
<link rel="icon" href="static-offline-docs/favicon.png">
<redoc spec-url="openapi.json"></redoc>
<script src="static-offline-docs/redoc.standalone.js"></script>
"""
api.router.routes += [
    Route("/openapi.json", JSONResponse(api.openapi()), methods=["GET"]),
    Route("/docs", HTMLResponse(SWAGGER), methods=["GET"]),
    Route("/redoc", HTMLResponse(REDOC), methods=["GET"]),
    Mount("/static-offline-docs", StaticFiles(packages=[("fastapi_offline", "static")])),
]


# --- Main -------------------------------------------------------------------------------------


async def check_start() -> None:
    """What keeps the service from starting is told once, and not by every worker."""
    async with lifespan(api) as state:
        log.info(
            f"One-Time Secrets {api.openapi()['info']['version']}; encryption keys "
            f"{', '.join(state['vault'].keys)}; X-Forwarded-* of {settings.forwarded_allow_ips}; "
            f"{settings.max_secret_bytes} bytes a secret, {settings.max_stored_mib} MiB in all"
        )


class Workers(Multiprocess):
    def terminate_all(self) -> None:
        """End the listening first: what connects later would find nobody to answer it."""
        with suppress(AttributeError, OSError):  # on macOS, and where it does not listen yet
            (listening,) = self.sockets
            for _ in range(10_000):  # who has connected is accepted: tcpi_unacked is their number
                if not any(listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)[24:]):
                    break
            listening.shutdown(socket.SHUT_RDWR)
        super().terminate_all()


def main() -> None:
    if sys.argv[1:] == ["schema"]:
        asyncio.run(load_schema())
        return
    asyncio.run(check_start())
    _, most_files = getrlimit(RLIMIT_NOFILE)
    setrlimit(RLIMIT_NOFILE, (most_files, most_files))  # a connection is a file
    config = uvicorn.Config(
        "main:app",
        http="main:Connection",
        **settings.model_dump(include={"host", "port", "workers", "forwarded_allow_ips"}),
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=7,  # seconds; orchestrators kill at 10
        # Seconds: a worker that imports slowly is not hung, but one that dies meanwhile is missed.
        timeout_worker_healthcheck=15,
    )
    listening = config.bind_socket()  # of ::, for both families
    if settings.workers > 1:
        Workers(config, sockets=[listening]).run()
    else:
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
