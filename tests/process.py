"""Scripts in processes of their own, without the seconds in which each would import torch and transformers.

They are forks of a process that has imported the two and nothing of this repository: multiprocessing's fork server.
"""

import atexit
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

REPO = Path(__file__).parent.parent
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["numpy", "peft", "torch", "transformers", "tyro"])


def execute(argv, cwd, environment, output):
    """In the fork: what `python ARGV` does in that folder, a script's path or -c and code, its end included."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first = "" if argv[0] == "-c" else str(Path(argv[0]).resolve().parent)
    sys.path[:] = [first, *(path for path in sys.path if path and Path(path) not in (REPO, REPO / "tests"))]
    status = 0
    try:
        if argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(argv)
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        status = 1
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Script:
    """One or several processes of a script, as torchrun starts them, without its agent that ends the others."""

    def __init__(self, argv, *, cwd, processes=1, **environment):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.folders, self.processes = [], []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            ranks = ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": port} if processes > 1 else {}
            own = {name: str(value) for name, value in {**os.environ, **ranks, **environment}.items()}
            self.folders.append(tempfile.mkdtemp())
            arguments = [str(argument) for argument in argv], str(cwd), own, self.folders[-1]
            self.processes.append(SERVER.Process(target=execute, args=arguments, daemon=True))
            self.processes[-1].start()

    def send_signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def poll(self):
        return self.processes[0].exitcode

    def wait(self, timeout=100):
        """The first status that is not 0, and what all have printed, when all have ended."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        if late:
            raise TimeoutError(f"{len(late)} of {len(self.processes)} processes ran for more than {timeout} s")
        printed = ["".join(Path(folder, name).read_text() for folder in self.folders) for name in ("stdout", "stderr")]
        statuses = [process.exitcode for process in self.processes if process.exitcode]
        return SimpleNamespace(returncode=statuses[0] if statuses else 0, stdout=printed[0], stderr=printed[1])


def run_python(*argv, cwd, **settings):
    return Script(argv, cwd=cwd, **settings).wait()
