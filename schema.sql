-- One-Time Secrets: the tables. Idempotent: loading it again changes nothing.
--
-- Two questions decide everything. `secrets` answers "can this secret still be read?":
-- a row here is a secret that nobody has read yet. `secret_logs` answers "what happened to it?".
-- Neither table holds anything that opens a secret without its link.

create table if not exists secrets (
    id uuid constraint secrets_pkey primary key,        -- one-way from the secret_key in the link; in order of creation
    ciphertext bytea not null,                          -- Fernet token of the secret, under its own data key
    wrapped_key bytea not null,                         -- Fernet token of the data key; opens with link and encryption key
    key_fingerprint text not null,                      -- names the encryption key that wrapped it; not sensitive
    passphrase_salt bytea,                              -- 16 random bytes for Argon2id
    passphrase_verifier bytea,                          -- keyed with the link: offers nothing to guess against
    passphrase_scope text,                              -- what the passphrase guards; null: there is none
    attempts smallint not null default 0,               -- passphrase attempts ever charged; each 5 begin a pause
    attempts_since timestamptz not null default '-infinity',  -- the time of the last one
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,                    -- from this instant on the secret cannot be read
    filename bytea,                                     -- Fernet token, under the same data key; null: none was given

    constraint passphrase_scope_is_known check (passphrase_scope in ('delete', 'read')),
    constraint passphrase_is_whole_or_absent
        check (num_nulls(passphrase_salt, passphrase_verifier, passphrase_scope) in (0, 3)),
    constraint expires_after_creation check (expires_at > created_at)
);

-- Tables made before filename was.
alter table secrets add column if not exists filename bytea;

-- Ciphertext does not compress: do not try, and keep large ones out of the row.
alter table secrets alter column ciphertext set storage external;

-- Read secrets should leave the disk soon, however many unread ones there are.
alter table secrets set (autovacuum_vacuum_scale_factor = 0.01);

-- Serves clean_expired_secrets: the oldest expiry first.
create index if not exists secrets_expires_at on secrets (expires_at);

-- The encryption keys that may have wrapped live secrets, so that a start can tell whether one is missing without reading
-- every secret. An index on secrets.key_fingerprint would do, but made each claim half as slow again (measured).
create table if not exists encryption_keys (
    fingerprint text constraint encryption_keys_pkey primary key,
    needed_until timestamptz not null default now()     -- pushed on by every process that wraps with the key
);
-- Tables made before needed_until was: the secrets themselves say, once.
alter table encryption_keys drop column if exists first_used_at;
alter table encryption_keys add column if not exists needed_until timestamptz;
update encryption_keys set needed_until =
    coalesce((select max(expires_at) from secrets where key_fingerprint = fingerprint), now())
where needed_until is null;
alter table encryption_keys alter column needed_until set default now(), alter column needed_until set not null;

-- What a reader was handed who sent an Idempotency-Key, so that this very reader may ask again when the answer was lost.
-- Swept by clean_expired_secrets. Not for a backup: with the link and the encryption key, a row opens a secret that was
-- read. No foreign key: the row of `secrets` is gone.
create table if not exists replays (
    secret_id uuid constraint replays_pkey primary key, -- one reader each: a second one is never kept
    reader bytea not null,                              -- HMAC of the Idempotency-Key, keyed with the link
    ciphertext bytea not null,                          -- this and the next four: as they were in `secrets`
    wrapped_key bytea not null,
    key_fingerprint text not null,
    passphrase_salt bytea,                              -- null: asking again needs no passphrase
    filename bytea,
    replay_until timestamptz not null                   -- from this instant on nobody is answered again
);
alter table replays alter column ciphertext set storage external;

-- Serves the sweep.
create index if not exists replays_replay_until on replays (replay_until);

-- Append-only; the retention sweep is the only thing that deletes here, oldest id first.
create table if not exists secret_logs (
    id bigint generated always as identity constraint secret_logs_pkey primary key,
    secret_id uuid not null,                            -- no foreign key: history outlives its secret
    action text not null,
    ip_address inet,                                    -- personal data; null when unknown and for 'expired'
    created_at timestamptz not null default now(),
    extra_data jsonb not null default '{}',             -- ttl_seconds, user_agent (personal data), passphrase, by, reason

    constraint action_is_known
        check (action in ('created', 'read', 'replayed', 'deleted', 'expired', 'denied'))
);

-- Tables made before 'replayed' was. Nothing that is there can break it: it is not checked again.
do $$
begin
    if not exists (select from pg_constraint where conname = 'action_is_known'
                   and pg_get_constraintdef(oid) like '%replayed%') then
        alter table secret_logs drop constraint action_is_known, add constraint action_is_known
            check (action in ('created', 'read', 'replayed', 'deleted', 'expired', 'denied')) not valid;
    end if;
end $$;

-- Serves "why is this secret gone?".
create index if not exists secret_logs_secret_id on secret_logs (secret_id);

-- Which tables these are, so that an older program can tell that they are newer than itself. Pushed on, never back.
do $$
begin
    if coalesce(substring(obj_description('secrets'::regclass, 'pg_class') from 'schema ([0-9]+)')::int, 0) < 2 then
        comment on table secrets is 'One-Time Secrets, schema 2';
    end if;
end $$;
