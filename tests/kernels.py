"""Kernels forked from one process that has imported what stages import, which takes longer than most of them do at
smoke size. `python kernels.py serve SOCKET`; `python kernels.py start SOCKET ARGUMENTS` in a kernel's place.

Each kernel has its own environment, folder, streams and `gad`, as one that starts by itself; `make smoke` has those.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def serve(path: str):
    for name in ("ipykernel.kernelapp", "gad.stages"):
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
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _become(client)
            client.close()


def _become(client):
    """The kernel that `client` asks for; its end closes the connection."""
    data, streams, *_ = socket.recv_fds(client, 1 << 16, 3)
    while not data.endswith(b"\n"):
        data += client.recv(1 << 16)
    asked = json.loads(data)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["ipykernel_launcher", *asked["arguments"]]
    sys.modules["ipykernel.kernelapp"].launch_new_instance()
    os._exit(0)


def start(path: str, *arguments: str):
    with socket.socket(socket.AF_UNIX) as client:
        while client.connect_ex(path):  # it is still importing
            time.sleep(0.1)
        asked = {"folder": os.getcwd(), "environment": dict(os.environ), "arguments": arguments}
        socket.send_fds(client, [json.dumps(asked).encode()], [0, 1, 2])
        client.sendall(b"\n")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        client.recv(1)  # until the kernel is gone


def warm(folder: Path) -> tuple[subprocess.Popen, dict[str, str]]:
    """The process that forks kernels, and the environment in which Jupyter starts them so."""
    from ipykernel.kernelspec import get_kernel_dict  # not there for `start`, which is to be quick

    path, spec = folder / "kernels", folder / "share/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    # Critical: one without a parent of its own says how to connect to it.
    argv = [sys.executable, "-S", "-E", __file__, "start", str(path), "-f", "{connection_file}", "--log-level=50"]
    spec.write_text(json.dumps(get_kernel_dict() | {"argv": argv}))
    root = Path(__file__).resolve().parent.parent
    own = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TOKENIZERS_PARALLELISM": "false",
           "TQDM_DISABLE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "serve", str(path)]
    process = subprocess.Popen(command, cwd=root, env={**os.environ, **own}, start_new_session=True)
    return process, {"JUPYTER_PATH": str(folder / "share")}


if __name__ == "__main__":
    {"serve": serve, "start": start}[sys.argv[1]](*sys.argv[2:])
