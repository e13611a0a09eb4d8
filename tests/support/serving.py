"""The server as a process of its own."""

import os
import pathlib
import signal
import subprocess
import sys
import time

from support.processes import ROOT

LIMIT = 900  # seconds to compile on a busy machine


class Server:
    """`python -m blip3o_jax.app` with a small checkpoint, ready; its output is in `directory`."""

    def __init__(self, directory: pathlib.Path, *flags: str):
        self._log = directory / "server.log"
        command = [sys.executable, "-m", "blip3o_jax.app", "--port=0", *flags]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LIMIT
        while "ready: " not in self.output and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "ready: " in self.output, self.output
        self.url = self.output.split("ready: ")[1].split()[0]

    @property
    def output(self) -> str:
        return self._log.read_text()

    def stop(self) -> int:
        """Exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
