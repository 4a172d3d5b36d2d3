"""A gcloud that stub_gcloud.sh plays, and workers whose homes are folders."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
STUB_GCLOUD = Path(__file__).with_name("stub_gcloud.sh")

# What stands for Python on a worker: notes its arguments and environment, then does what the worker's behaviour
# file says, a line a start; the last line stays.
PYTHON = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$HOME/arguments"
env -0 >"$HOME/environment"
pwd >"$HOME/folder"
[ "$1" != -c ] || exit 0
line=$(head -n 1 "$STUB/behaviour_$(basename "$HOME")")
[ "$(wc -l <"$STUB/behaviour_$(basename "$HOME")")" -le 1 ] || sed -i 1d "$STUB/behaviour_$(basename "$HOME")"
echo "log line: $line"
case $line in
  exit*) $line ;;
  wait) trap 'echo saved; exit 143' TERM; for _ in {1..100}; do sleep 0.1; done ;;
  deaf) trap '' TERM; for _ in {1..100}; do sleep 0.1; done ;;
esac
"""
UV = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$HOME/uv"
[ "$1" != venv ] || { mkdir -p .venv/bin && cp "$STUB/python" .venv/bin/python; }
"""


@dataclass(frozen=True)
class Cloud:
    """A folder where a played gcloud stands first on PATH, and two workers' homes."""

    folder: Path
    environment: dict[str, str]

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(TPU / f"{script}.sh"), *arguments],
            env={**self.environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def ok(self, script: str, *arguments: str, **environment: str) -> str:
        done = self.run(script, *arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def write(self, name: str, *lines: object) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def behave(self, *lines: str, worker: int | None = None) -> None:
        for i in (0, 1) if worker is None else (worker,):
            self.write(f"behaviour_{i}", *lines)

    def calls(self, verb: str = "") -> list[list[str]]:
        """Every call so far whose words hold these, such as "queued-resources create"."""
        file = self.folder / "calls"
        calls = (
            [c.rstrip("\0").split("\0") for c in file.read_text().split("\036") if c] if file.exists() else []
        )
        return [call for call in calls if verb in " ".join(call)]

    def home(self, worker: int) -> Path:
        return self.folder / "workers" / str(worker)

    def read(self, worker: int, name: str) -> list[str]:
        return (self.home(worker) / name).read_text().rstrip("\0").split("\0")

    def program(self, name: str, text: str) -> None:
        executable(self.folder / "bin" / name, text)

    def set_up(self) -> None:
        """As setup.sh leaves the workers, without the copying."""
        for worker in (0, 1):
            folder = self.home(worker) / "hybrid_jax" / ".venv" / "bin"
            folder.mkdir(parents=True)
            shutil.copy(self.folder / "python", folder / "python")

    def wait_for(self, state: str) -> None:
        """Until every worker's run is in this state."""
        for _ in range(150):
            lines = self.ok("status").splitlines()
            if [line for line in lines if line.startswith("state: ")] == [f"state: {state}"] * 2:
                return
        raise AssertionError(lines)


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cloud(tmp_path):
    programs = tmp_path / "bin"
    for folder in (programs, tmp_path / "workers" / "0", tmp_path / "workers" / "1"):
        folder.mkdir(parents=True)
    shutil.copy(STUB_GCLOUD, programs / "gcloud")
    (programs / "gcloud").chmod(0o755)
    executable(programs / "uv", UV)
    executable(tmp_path / "python", PYTHON)
    (tmp_path / "env").write_text("")
    quick = {name: "0" for name in ("TPU_POLL_SECONDS", "TPU_RETRY_SECONDS", "TPU_BACKOFF_SECONDS")}
    settings = {"TPU_PROJECT": "a-project", "TPU_ZONE": "us-west4-a", "TPU_NAME": "tiny", "TPU_RETRIES": "3"}
    cloud = Cloud(
        tmp_path,
        {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "STUB": str(tmp_path),
            "TPU_ENV": str(tmp_path / "env"),
            "TPU_ACCELERATOR": "v5litepod-16",
            "TPU_STOP_SECONDS": "10",
            **quick,
            **settings,
        },
    )
    cloud.write("states", "ACTIVE")
    cloud.write("node_states", "READY")
    cloud.write("fail_text", "ERROR: (gcloud) UNAVAILABLE")
    cloud.behave("exit 0")
    yield cloud
    for pid in tmp_path.glob("workers/*/hybrid_jax_job/pid"):
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], capture_output=True, check=False)
