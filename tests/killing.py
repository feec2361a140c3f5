"""Processes that write until they are killed: both ends.

A script of writers runs as ``script.py MODE PATH ...``; it imports once and forks, so that killing
it is cheap.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.getenv("PYTHONPATH")])
    ),
}


def command(script, *words):
    return [sys.executable, str(script), *map(str, words)]


def start(script, *words, **options):
    """Start a script of writers, which is told by lines and answers by lines."""
    return subprocess.Popen(
        command(script, *words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **options,
    )


def say(log, words):
    os.write(log, (json.dumps(words) + "\n").encode())


def forked(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def kill_after(pid, ms):
    time.sleep(float(ms) / 1000)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    said = "killed" if os.WIFSIGNALED(status) else f"ended by itself: {status}"
    sys.stdout.write(f"{said}\n")
    sys.stdout.flush()


def kill_for_each_line(path, write_for_ever):
    """For every line ``seed [steps] ms`` fork a writer, and kill it so long after it began them."""
    for line in sys.stdin:
        seed, *steps, ms = line.split()
        log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        pid = forked(lambda seed=int(seed), log=log: write_for_ever(path, seed, log))
        while not os.fstat(log).st_size:
            time.sleep(0.001)
        while steps and Path(f"{path}.log").read_text().count("begin") < int(steps[0]):
            time.sleep(0.001)
        kill_after(pid, ms)
        os.close(log)


def main(**modes):
    warnings.filterwarnings("ignore", "lance is not fork-safe")  # nothing of Lance runs before
    modes[sys.argv[1]](*sys.argv[2:])
