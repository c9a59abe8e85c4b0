"""Run many command lines in one process, each to its exit, because importing megatron takes longer than all of them.

Reads the cases (``argv``, ``env``) from one JSON file and writes the outcomes to another.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path


class Exited(BaseException):
    """Exception that replaces ``os._exit``."""


def run(argv: list[str], env: dict[str, str]) -> dict:
    """Return the exit status of ``megaprune prune`` and everything written to stderr."""
    from megaprune.cli import main as cli
    from megaprune.mcore import parallel

    def leave(status: int) -> None:
        raise Exited(status)

    cli.os._exit = leave  # the module's own, os's: nothing else here calls it
    on_sigterm, before = signal.getsignal(signal.SIGTERM), dict(os.environ)
    os.environ.update(env)
    with tempfile.TemporaryFile() as captured:
        stderr = os.dup(2)
        os.dup2(captured.fileno(), 2)
        status = 0
        try:
            cli.main("prune", argv)
        except (Exited, SystemExit) as exited:
            status = exited.args[0]
        except BaseException:
            status = "crash"
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            signal.signal(signal.SIGTERM, on_sigterm)
            os.environ.clear()
            os.environ.update(before)
            parallel.finish()
            parallel.leave()
        captured.seek(0)
        return {"status": status, "stderr": captured.read().decode()}


if __name__ == "__main__":
    cases, results = map(Path, sys.argv[1:])
    done = {name: run(**case) for name, case in json.loads(cases.read_text()).items()}
    results.write_text(json.dumps(done))
