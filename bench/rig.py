"""What the scripts of this folder share: the zipapp, a daemon, companions in processes of their own, figures.

Linux alone (it reads /proc), the standard library alone (and psycopg, where there is PostgreSQL). Everything listens on 127.0.0.1, every wait has
a deadline, and only what was started here is ended here.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).absolute().parent.parent
ZIPAPP = PROJECT / "mailproxy.pyz"
SPAWN = multiprocessing.get_context("spawn")  # companions inherit no socket and no thread
START_PATIENCE_S = 60.0
STOP_PATIENCE_S = 60.0
MIB = 1024 * 1024


class BenchError(Exception):
    """The bench itself could not do its work; no figure comes of it."""


def end_cleanly_when_told() -> None:
    """SIGTERM unwinds like Ctrl-C does, so that whatever was started is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


# -- the program


def built_zipapp() -> Path:
    """The zipapp; built when it is missing or older than its source."""
    source = PROJECT / "mailproxy.py"
    if not ZIPAPP.exists() or ZIPAPP.stat().st_mtime < source.stat().st_mtime:
        subprocess.run([PROJECT / "build_zipapp.sh"], check=True, stderr=subprocess.DEVNULL)
    return ZIPAPP


def free_port() -> int:
    """A port nobody listens on just now, of those that Linux gives to no outgoing connection meanwhile."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise BenchError("no free port")


def own_environment() -> dict[str, str]:
    """Ours, without what would configure the daemon behind our back."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAILPROXY_")}


class Daemon:
    """One mailproxy, of the zipapp if nothing else is said, with its config.ini, queue and log in its own folder."""

    def __init__(self, folder: Path, sections: Mapping[str, Mapping[str, object]], program: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._program = program or built_zipapp()
        self.folder = folder
        self.port = free_port()
        self.db = folder / "queue.db"
        self.log = folder / "daemon.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._write_config({"storage": {"db_path": self.db}, "server": {"port": self.port}}, sections)

    def _write_config(self, *parts: Mapping[str, Mapping[str, object]]) -> None:
        merged: dict[str, dict[str, object]] = {}
        for part in parts:
            for section, keys in part.items():
                merged.setdefault(section, {}).update(keys)
        lines: list[str] = []
        for section, keys in merged.items():
            lines += [f"[{section}]", *(f"{key} = {value}" for key, value in keys.items()), ""]
        (self.folder / "config.ini").write_text("\n".join(lines))

    # -- its life

    def launch(self) -> None:
        """Start the process and return at once."""
        command = [sys.executable, self._program, "serve", "--config", self.folder / "config.ini"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=own_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start(self) -> float:
        """Start it; return after how many seconds it served."""
        began = time.monotonic()
        self.launch()
        self.wait_until_serving()
        return time.monotonic() - began

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + START_PATIENCE_S
        while not self.serves():
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"the daemon does not serve; its log ends:\n{self.log_tail()}")
            time.sleep(0.002)

    def serves(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/health", timeout_s=1).get("ok") is True
        return False

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])

    @property
    def running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise BenchError("the daemon is not running")
        return self._process

    def signal(self, number: int) -> None:
        self.running.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: what a power cut is to a process."""
        self.running.kill()
        self.running.wait(STOP_PATIENCE_S)
        self._process = None

    def stop(self) -> int | None:
        """SIGTERM; the exit status, or None when it was not running."""
        if self._process is None:
            return None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise BenchError("the daemon did not stop at SIGTERM") from None
        finally:
            self._process = None

    def __enter__(self) -> Daemon:
        if self._process is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- talking to it

    def ask(self, method: str, path: str, body: object = None, timeout_s: float = 60.0) -> dict[str, Any]:
        """One request, one JSON answer, whatever its status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            encoded = None if body is None else json.dumps(body).encode()
            connection.request(method, path, encoded, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def submit(self, messages: Sequence[Mapping[str, object]]) -> None:
        answer = self.ask("POST", "/commands/add-messages", {"messages": messages})
        if answer.get("queued") != len(messages):
            raise BenchError(f"not all messages were accepted: {str(answer)[:500]}")

    def command(self, name: str) -> None:
        if not self.ask("POST", f"/commands/{name}").get("ok"):
            raise BenchError(f"{name} was refused")

    def status(self) -> dict[str, Any]:
        return self.ask("GET", "/status")

    def wait_for_status(self, holds: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """GET /status every 20 ms until it is as wanted."""
        deadline = time.monotonic() + timeout_s
        while not holds(status := self.status()):
            if time.monotonic() > deadline:
                raise BenchError(f"it did not come to pass within {timeout_s:g} s; status: {status}")
            time.sleep(0.02)
        return status

    # -- what it costs

    def cpu_s(self) -> float:
        """Processor time of all its threads so far, to a hundredth of a second."""
        fields = Path(f"/proc/{self.running.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        return self._memory("VmRSS")

    def peak_rss_mib(self) -> float:
        """The most memory it had since forget_peak()."""
        return self._memory("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.running.pid}/clear_refs").write_text("5")

    def _memory(self, name: str) -> float:
        for line in Path(f"/proc/{self.running.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / MIB
        raise BenchError(f"/proc knows no {name}")


def postgres_programs() -> Path:
    newest = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), default=None)
    return Path(os.environ.get("POSTGRES_BIN", newest or "no-postgresql"))


class Postgres:
    """A PostgreSQL with an empty cluster of its own, as the package sets it up: every commit is on the disk.

    POSTGRES_BIN, a folder of programs, chooses another version than Debian's newest.
    """

    def __init__(self, folder: Path, **settings: object) -> None:
        programs = postgres_programs()
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-", dir=folder))
        self._data = self._folder / "data"
        self._as: dict[str, Any] = {"cwd": self._folder, "stdin": subprocess.DEVNULL}
        if os.getuid() == 0:  # which initdb refuses
            self._as.update(user="nobody", group="nogroup", extra_groups=[])
            shutil.chown(self._folder, "nobody")
            for above in (self._folder, *self._folder.parents):
                if above.owner() == "root" and above.stat().st_mode & 0o001 == 0:
                    above.chmod(above.stat().st_mode | 0o011)
        made = [programs / "initdb", "-D", self._data, "-U", "mailproxy", "-A", "trust", "-E", "UTF8", "--no-locale"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, **self._as)
        where = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", **settings}
        options = [word for name, value in where.items() for word in ("-c", f"{name}={value}")]
        self._command = [programs / "postgres", "-D", self._data, *options]
        self._databases = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, **self._as)
        wait_until(self._answers, START_PATIENCE_S, lambda: "PostgreSQL to start")

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGINT sends its clients away (fast), SIGQUIT is a crash (immediate)."""
        if self._process is not None:
            self._process.send_signal(how)
            try:
                self._process.wait(STOP_PATIENCE_S)
            except subprocess.TimeoutExpired:  # seen once of fast, while connections were held up on the way
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait(STOP_PATIENCE_S)
            self._process = None

    def url(self, database: str, port: int | None = None) -> str:
        """With another port: through whatever listens there."""
        return f"postgresql://mailproxy@127.0.0.1:{port or self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty one; its name."""
        name = f"bench_{next(self._databases)}"
        self.rows("postgres", f"CREATE DATABASE {name}")
        return name

    def rows(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        """What a statement, of ours, gives."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        import psycopg

        assert self._process is not None
        if self._process.poll() is not None:
            raise BenchError(f"PostgreSQL ended: {(self._folder / 'log').read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(psycopg.Error):
            return self.rows("postgres", "SELECT 1") == [(1,)]
        return False

    def __enter__(self) -> Postgres:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGQUIT)


def integrity(db: Path, scratch: Path) -> str:
    """What SQLite says of a copy of the file and its WAL as they lie there ("ok")."""
    copy = scratch / "copy.db"
    for suffix in ("", "-wal"):
        original, target = Path(f"{db}{suffix}"), Path(f"{copy}{suffix}")
        target.unlink(missing_ok=True)
        if original.exists():
            target.write_bytes(original.read_bytes())
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        return "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))


def self_signed(target: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file that is made (openssl is needed)."""
    command = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -subj /CN=127.0.0.1"
    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", target, "-out", target)
    subprocess.run([*command.split(), *names, *files], check=True, stderr=subprocess.DEVNULL)
    return target


# -- companions: sinks and receivers that must not take our processor's turn


class Companion:
    """`serve(numbers, *arguments)` in a process of its own, which shares 16 whole numbers with us.

    It says that it listens by writing its port into numbers[PORT].
    """

    PORT, COUNT, LAST_NS, MODE, OPEN = range(5)

    def __init__(self, serve: Callable[..., None], *arguments: object) -> None:
        self.numbers = SPAWN.RawArray("q", 16)
        self._serve, self._arguments = serve, arguments
        self.start()

    def start(self) -> None:
        """Start it, or start it again on the same port after kill()."""
        arguments = (self.numbers, *self._arguments)
        asked, self.numbers[self.PORT] = self.numbers[self.PORT], -self.numbers[self.PORT]
        self._process = SPAWN.Process(target=self._serve, args=arguments, daemon=True)
        self._process.start()
        deadline = time.monotonic() + START_PATIENCE_S
        while self.numbers[self.PORT] <= 0:
            if not self._process.is_alive() or time.monotonic() > deadline:
                raise BenchError(f"{self._serve.__name__} does not listen (port {asked})")
            time.sleep(0.005)

    @property
    def port(self) -> int:
        return self.numbers[self.PORT]

    @property
    def count(self) -> int:
        return self.numbers[self.COUNT]

    def wait_for(self, count: int, timeout_s: float = 300.0) -> float:
        """Wait until it has counted so many; return when the last one came, on the monotonic clock."""
        wait_until(lambda: self.count >= count, timeout_s, lambda: f"{count} at the sink; {self.count} came")
        return self.numbers[self.LAST_NS] / 1e9

    def kill(self) -> None:
        self._process.kill()
        self._process.join(STOP_PATIENCE_S)

    def __enter__(self) -> Companion:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def wait_until(holds: Callable[[], bool], timeout_s: float, wanted: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {timeout_s:g} s for {wanted()}")
        time.sleep(0.001)


class Elsewhere:
    """One further process that runs load generators, started before anything is timed."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=SPAWN)
        self._pool.submit(os.getpid).result(START_PATIENCE_S)

    def run(self, work: Callable[..., Any], *arguments: object, timeout_s: float = 600.0) -> Any:
        return self._pool.submit(work, *arguments).result(timeout_s)

    def begin(self, work: Callable[..., Any], *arguments: object) -> Any:
        """A future; ask it for its result(timeout)."""
        return self._pool.submit(work, *arguments)

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


class PostfixSink:
    """Debian's smtp-sink: the fast server, in C. It counts aloud; a thread hears it out, lest it blocks."""

    def __init__(self, program: str) -> None:
        self.port, self.count = free_port(), 0
        as_nobody = ("-u", "nobody") if os.getuid() == 0 else ()
        command = [program, "-c", "-4", "-a", *as_nobody, f"127.0.0.1:{self.port}", "200"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._hearing = threading.Thread(target=self._hear, daemon=True)
        self._hearing.start()
        wait_until(self._listens, START_PATIENCE_S, lambda: "smtp-sink to listen")

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def _hear(self) -> None:
        """Take up its "mesg=N" again and again; its lines end with a carriage return. Ends with it."""
        assert self._process.stdout is not None
        said = b""
        while piece := os.read(self._process.stdout.fileno(), 65536):
            heard, _, said = (said + piece).rpartition(b"\r")
            if b"mesg=" in heard:
                self.count = int(heard.rpartition(b"mesg=")[2])
            time.sleep(0.002)  # a line comes with each message: hear many at a time

    def wait_for(self, count: int, timeout_s: float = 300.0) -> float:
        """Wait until it has counted so many; return when that was seen, on the monotonic clock."""
        wait_until(lambda: self.count >= count, timeout_s, lambda: f"{count} at the sink; {self.count} came")
        return time.monotonic()

    def __enter__(self) -> PostfixSink:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(STOP_PATIENCE_S)
        self._hearing.join(STOP_PATIENCE_S)


# -- figures


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))]


def calibration_ms() -> float:
    """The time of a fixed piece of work: what the machine is worth at this moment."""
    began = time.perf_counter()
    words: dict[str, int] = {}
    for number in range(60_000):
        word = str(number % 997)
        words[word] = words.get(word, 0) + number
    return (time.perf_counter() - began) * 1e3


class Spread(NamedTuple):
    """The figures of several rounds: their median, and the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        figures = list(values)
        return cls(statistics.median(figures), min(figures), max(figures))

    def shown(self) -> str:
        return f"{rounded(self.low)} to {rounded(self.high)}"


def rounded(value: float) -> str:
    """Three digits are all that such a figure is good for."""
    if abs(value) >= 1000:
        return f"{round(value, 2 - len(str(int(abs(value)))) + 1):,.0f}"
    return f"{value:.3g}"


def interleaved(rounds: int, contenders: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, list[Any]], Spread]:
    """Run A B A B ...; return what each gave in each round, and the calibration loop's time around them."""
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    calibrations = [calibration_ms()]
    for _ in range(rounds):
        for name, measure in contenders.items():
            results[name].append(measure())
            calibrations.append(calibration_ms())
    return results, Spread.of(calibrations)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """One line about where and when the figures were taken."""
    return (
        f"{processor()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, {datetime.date.today().isoformat()}, load {os.getloadavg()[0]:.1f} at the end"
    )


def postgres_version() -> str:
    """As it tells it, or nothing where there is none."""
    with contextlib.suppress(OSError):
        command = [postgres_programs() / "postgres", "--version"]
        return subprocess.run(command, capture_output=True, text=True).stdout.partition(" (PostgreSQL) ")[2].split()[0]
    return ""


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
