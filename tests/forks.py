"""Python processes forked from one that has imported what stages import, which takes longer than most of them do at
smoke size. `python forks.py serve SOCKET`; `python forks.py start SOCKET ARGUMENTS` in the place of `python ARGUMENTS`.

Each has its own environment, folder, streams and `gad`, as one that starts by itself; it ends with the process in whose
place it is, and as that does. `make smoke` has none of them.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path


def serve(path: str):
    for name in ("ipykernel.kernelapp", "torch.distributed.run", "gad.stages"):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "gad"]:
        del sys.modules[name]  # that of a copy is its own
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _keep(client)
            client.close()


def _keep(client):
    """Fork what `client` asks for, end it if `client` does, and tell `client` how it ended."""
    data, streams, *_ = socket.recv_fds(client, 1 << 16, 3)
    while not data.endswith(b"\n"):
        data += client.recv(1 << 16)
    if (process := os.fork()) == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _become(**json.loads(data))
    for stream in streams:
        os.close(stream)
    if client in select.select([client, os.pidfd_open(process)], [], [])[0]:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(str(code).encode())
    os._exit(0)


def _become(folder, environment, arguments):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[:0] = arguments[1:], [folder]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = arguments, [os.path.dirname(arguments[0])]
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            code = print(code, file=sys.stderr) or 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def start(path: str, *arguments: str):
    with socket.socket(socket.AF_UNIX) as client:
        began = time.monotonic()
        while client.connect_ex(path):  # it is still importing
            if time.monotonic() - began > 300:
                sys.exit("tests/forks.py: what forks does not answer")
            time.sleep(0.1)
        asked = {"folder": os.getcwd(), "environment": dict(os.environ), "arguments": arguments}
        socket.send_fds(client, [json.dumps(asked).encode()], [0, 1, 2])
        client.sendall(b"\n")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Jupyter sends it before a kernel is to end
        code = int(client.recv(16) or -signal.SIGKILL)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


class Forks:
    """The process that forks, in `folder`; the first of several that ask for it starts it. `python`: what to start in
    Python's place. `jupyter`: where Jupyter finds that such kernels are to be started."""

    def __init__(self, folder: Path):
        path, self.jupyter = folder / "socket", folder / "share"
        self.python = [sys.executable, "-S", "-E", __file__, "start", str(path)]
        own = folder / f"share-{os.getpid()}"
        self._specify(own / "kernels/python3/kernel.json")
        try:
            own.rename(self.jupyter)
        except OSError:  # another was there first
            return
        root = Path(__file__).resolve().parent.parent
        environment = {
            "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        command = [sys.executable, "-W", "ignore", __file__, "serve", str(path)]
        process = subprocess.Popen(command, cwd=root, env=os.environ | environment, start_new_session=True)
        (folder / "pid").write_text(str(process.pid))

    def _specify(self, file: Path):
        from ipykernel.kernelspec import get_kernel_dict  # not there for `start`, which is to be quick

        # Critical: one without a parent of its own says how to connect to it.
        argv = [*self.python, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"]
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(get_kernel_dict() | {"argv": argv}))


def stop(folder: Path):
    """All that was forked, too."""
    if (file := folder / "pid").exists():
        os.killpg(int(file.read_text()), signal.SIGKILL)


if __name__ == "__main__":
    {"serve": serve, "start": start}[sys.argv[1]](*sys.argv[2:])
