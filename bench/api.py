"""Does the API keep what its openapi.json says? schemathesis with all its checks, stateful tests included.

    python3 bench/api.py [--examples 100] [--seed 1]                    # a daemon of its own, with an SMTP sink
    python3 bench/api.py --url http://127.0.0.1:8000 --token TOKEN ...  # a running one: changes its accounts, deletes

Messages go to example.com alone. The suite runs it with 1 example for each operation; the coverage phase, which
tries what is at and beyond each limit of the schema, is the same. Prints what schemathesis prints; exit status 1
when it found something, or when the daemon's log has an error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import rig
import sinks

FOLDER = Path(__file__).absolute().parent


def look(url: str, token: str, examples: int, seed: int, folder: Path) -> int:
    """Run schemathesis against a daemon; its exit status."""
    command = [
        Path(sys.executable).with_name("schemathesis"), "--config-file", FOLDER / "schemathesis.toml",
        "run", f"{url}/openapi.json", "--max-examples", str(examples), "--seed", str(seed),
        "--header", f"X-API-Token: {token}", "--generation-database", "none", "--no-color",
    ]  # fmt: skip
    environment = {**rig.own_environment(), "SCHEMATHESIS_HOOKS": "api_hooks", "PYTHONPATH": str(FOLDER)}
    return subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def look_at_own(examples: int, seed: int, folder: Path) -> int:
    with rig.Companion(sinks.serve_smtp, sinks.Manner()) as sink:
        smtp = {"host": "127.0.0.1", "port": sink.port}
        with rig.Daemon(folder, {"smtp": smtp, "server": {"api_token": "t0ken"}}) as daemon:
            status = look(f"http://127.0.0.1:{daemon.port}", "t0ken", examples, seed, folder)
        print(f"{sink.count} messages arrived at the sink")
        log = daemon.log.read_text()
    mistakes = [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]
    print("\n".join(mistakes))
    return 1 if status or mistakes else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--examples", type=int, default=100, help="of each operation, in the fuzzing phase")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url")
    parser.add_argument("--token", default=os.environ.get("MAILPROXY_TOKEN", ""))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.url:
            return look(options.url, options.token, options.examples, options.seed, Path(folder))
        return look_at_own(options.examples, options.seed, Path(folder))


if __name__ == "__main__":
    rig.end_cleanly_when_told()
    sys.exit(main())
