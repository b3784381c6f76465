"""Make .venv ready: torch first, then the project, then what is only nice to have.

Standard library only: it runs with the machine's own Python, before anything is installed. A finished step is
stamped with a digest of what it depends on, so that a second run does nothing and an interrupted one goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if platform.system() == "Windows" else "bin/python")
STAMP = VENV / "ascend-v4-setup.json"
OLDEST = (3, 10)
ORACLE = "transformers>=5.23"
ORACLE_OLDEST = (3, 11)
PROBE_VENV = "import sys, pip; print('%d.%d.%d' % sys.version_info[:3])"
PROBE_TORCH = """
import torch
hip = getattr(torch.version, "hip", None)
cuda = torch.version.cuda
print(torch.__version__, f"CUDA-{cuda}" if cuda else f"HIP-{hip}" if hip else "CPU")
"""


class SetupError(Exception):
    """Something the person at the terminal has to mend; printed as one line."""


def main() -> int:
    """Run every step that is not done yet; 0 when the environment is ready, 1 when a step failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-version", required=True)
    parser.add_argument("--torch-args", default="", help="extra pip options for torch, as one string")
    parser.add_argument("--dev", action="store_true", help="linters and type checker too")
    options = parser.parse_args()
    try:
        prepare(options)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again, finished steps are kept", file=sys.stderr)
        return 130
    return 0


def prepare(options: argparse.Namespace) -> None:
    """The steps in order. Raises SetupError at the first that cannot be done."""
    if sys.version_info < OLDEST:
        raise SetupError(
            f"{sys.executable} is Python {platform.python_version()}; 3.10 or newer is needed. "
            "Name one: make PYTHON=python3.12 ..."
        )
    steps = Steps()
    extras = "dev" if options.dev or steps.done("project", project_digest("dev")) else "test,tokenizer"
    torch_pins = [f"torch=={options.torch_version}", *shlex.split(options.torch_args)]
    python_version = ensure_venv()
    steps.run("torch", digest(python_version, *torch_pins), lambda: install_torch(torch_pins))
    steps.run("project", project_digest(extras), lambda: pip("-e", f".[{extras}]"))
    if not options.dev:
        install_oracle(steps, python_version)
    steps.close()


class Steps:
    """What is already installed, kept in a file inside the environment it speaks of."""

    def __init__(self) -> None:
        try:
            self.digests: dict[str, str] = json.loads(STAMP.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.digests = {}
        self.started = time.monotonic()
        self.ran = 0

    def done(self, name: str, wanted: str) -> bool:
        """Whether the step was finished for exactly these inputs."""
        return self.digests.get(name) == wanted

    def run(self, name: str, wanted: str, act: Callable[[], None]) -> None:
        """Do the step unless it is done, then stamp it."""
        if self.done(name, wanted):
            return
        self.ran += 1
        print(f"[setup {self.elapsed()}] {name} ...", flush=True)
        # A step that fails or is interrupted must not look done.
        self.digests.pop(name, None)
        self.save()
        act()
        self.digests[name] = wanted
        self.save()
        print(f"[setup {self.elapsed()}] {name}: done", flush=True)

    def save(self) -> None:
        """Write the stamp so that a reader sees the old or the new one, never half."""
        fresh = STAMP.with_suffix(".new")
        fresh.write_text(json.dumps(self.digests, indent=1) + "\n", encoding="utf-8")
        fresh.replace(STAMP)

    def elapsed(self) -> str:
        """Seconds since the start, for the progress lines."""
        return f"{time.monotonic() - self.started:5.1f} s"

    def close(self) -> None:
        """Say which torch this environment has."""
        built = output_of(PROBE_TORCH)
        if built is None:
            self.digests.pop("torch", None)
            self.save()
            raise SetupError("torch is installed but does not import. Run the command again to reinstall it.")
        version, device = built.split()
        print(f"[setup {self.elapsed()}] ready: torch {version} ({device} build)", flush=True)


def ensure_venv() -> str:
    """Python version of .venv, made anew where it is missing or does not run."""
    found = output_of(PROBE_VENV)
    if found is None:
        print(f"[setup] making .venv with {sys.executable} (Python {platform.python_version()})", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
        found = output_of(PROBE_VENV)
        if made.returncode != 0 or found is None:
            raise SetupError(
                f"'{sys.executable} -m venv' gave no working .venv with pip. On Debian and Ubuntu install "
                f"python{sys.version_info[0]}.{sys.version_info[1]}-venv; elsewhere name another Python: "
                "make PYTHON=..."
            )
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise SetupError(
            f".venv holds Python {found}; 3.10 or newer is needed. Run 'make clean' and try again."
        )
    return found


def install_torch(pins: list[str]) -> None:
    """Exactly the torch asked for, before anything that would pull in another."""
    pip(*pins)
    wanted = pins[0].partition("==")[2]
    built = output_of(PROBE_TORCH)
    if built is None:
        raise SetupError(
            f"torch {wanted} installed but does not import here: try TORCH_ARGS for another build."
        )
    if built.split()[0].split("+")[0] != wanted.split("+")[0]:
        raise SetupError(f"pip left torch {built.split()[0]} where {wanted} was asked for. Check TORCH_ARGS.")


def install_oracle(steps: Steps, python_version: str) -> None:
    """transformers, the oracle of some tests; without it those tests skip, so a failure here is no error."""
    if tuple(int(part) for part in python_version.split(".")[:2]) < ORACLE_OLDEST:
        print(f"[setup] transformers needs Python 3.11, this is {python_version}: its oracle tests will skip")
        return
    try:
        steps.run("oracle", digest(python_version, ORACLE), lambda: pip(ORACLE))
    except SetupError as error:
        print(
            f"[setup] warning: {error}\n[setup] going on: the transformers oracle tests will skip",
            file=sys.stderr,
        )


def project_digest(extras: str) -> str:
    """Changes when the metadata, the tool settings or a native source does, or the project moves."""
    native = sorted((ROOT / "operators" / "native").rglob("*"))
    sources = [path for path in native if path.suffix in (".cpp", ".h", ".hpp")]
    parts = [path.read_bytes().hex() for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *sources)]
    return digest(str(ROOT), extras, *parts)


def digest(*parts: str) -> str:
    """Short digest of some texts in order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def pip(*arguments: str) -> None:
    """pip install, its progress shown. Raises SetupError when it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    print(f"[setup] pip install {shlex.join(arguments)}", flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SetupError(
            f"'pip install {shlex.join(arguments)}' ended with {done.returncode}; its own message is above. "
            "Check the network, or point pip at an index you reach; run again: finished steps are kept."
        )


def output_of(program: str) -> str | None:
    """What a line of Python prints in .venv; None where it does not run."""
    try:
        done = subprocess.run([str(PYTHON), "-c", program], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    raise SystemExit(main())
