"""Python processes that have imported torch and transformers already: forks of one server.

`run_python(code)` is `subprocess.run([sys.executable, "-c", code])` for code whose imports take longer than its work.
A fork ends as any program does, with Python's own exit functions. It has not imported this library.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SERVER = """
import json, os, sys
import torch, transformers.modeling_utils, transformers.models.llama.modeling_llama
for line in sys.stdin:
    job, child = json.loads(line), os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, name in enumerate((os.devnull, job["out"], job["err"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
os.environ.clear()
os.environ.update(job["environment"])
os.chdir(job["folder"])
sys.argv, sys.path[:0] = ["-c", *job["arguments"]], job["path"]
exec(compile(job["code"], "<string>", "exec"))
"""


def _environment() -> dict[str, str]:
    # What forks cannot change: torch and transformers read these when they are imported.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    command, pipe = [sys.executable, "-c", _SERVER], subprocess.PIPE
    # Without buffers: what has been written can be waited for.
    server = subprocess.Popen(
        command, env=_environment(), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0
    )
    atexit.register(server.kill)
    return server


def run_python(
    code: str, *arguments: str, timeout: float = 400.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own.

    Args:
        code: The code.
        *arguments: What it finds in `sys.argv`.
        timeout: Seconds after which the process is killed.
        **environment: More variables, which torch and transformers do not read at their import.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = {
            "code": code,
            "arguments": arguments,
            "environment": {**_environment(), **environment},
            "folder": str(ROOT),
            "path": [str(ROOT), str(ROOT / "tests")],
            "out": str(out),
            "err": str(err),
        }
        server.stdin.write(json.dumps(job).encode() + b"\n")
        child = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.kill(child, signal.SIGKILL)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess([code, *arguments], status, out.read_text(), err.read_text())
