"""Every environment variable the project reads or sets, with default and meaning.

No other file but the launcher reads os.environ.

A variable is read when asked for and never cached, so that a test or a launcher can set it first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ascend_v4.errors import ConfigError

MAX_VALUE_CHARS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable:
    """Name and meaning of one environment variable. An empty value counts as unset."""

    name: str
    meaning: str

    def text(self) -> str | None:
        """The value without surrounding blanks; None where unset. Raises ConfigError if absurdly long."""
        value = os.environ.get(self.name, "").strip()
        if len(value) > MAX_VALUE_CHARS:
            raise ConfigError(
                f"environment variable {self.name} has {len(value)} characters, at most {MAX_VALUE_CHARS} "
                "make sense. Unset it or shorten it."
            )
        return value or None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextVariable(Variable):
    """A variable whose value is used as it stands."""

    default: str | None = None

    def read(self) -> str | None:
        """The value, or the default where unset."""
        return self.text() or self.default


@dataclass(frozen=True, kw_only=True, slots=True)
class FlagVariable(Variable):
    """A switch: 1 true yes on, or 0 false no off."""

    default: bool

    def read(self) -> bool:
        """The switch; the default where unset. Raises ConfigError on any other word."""
        value = self.text()
        if value is None:
            return self.default
        if value.lower() in ("1", "true", "yes", "on"):
            return True
        if value.lower() in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"environment variable {self.name} is {value!r}; it must be 1 or 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CountVariable(Variable):
    """A whole number within bounds; `default` None means that the program decides."""

    low: int
    high: int
    default: int | None = None

    def read(self) -> int | None:
        """The number, or the default where unset. Raises ConfigError outside [low, high]."""
        value = self.text()
        if value is None:
            return self.default
        # isdecimal refuses signs, blanks and underscores; the length check keeps int() off huge literals.
        if (
            not (value.isascii() and value.isdecimal() and len(value) <= 18)
            or not self.low <= int(value) <= self.high
        ):
            raise ConfigError(
                f"environment variable {self.name} is {value[:40]!r}; "
                f"it must be a whole number in [{self.low}, {self.high}]."
            )
        return int(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignVariable:
    """A variable of somebody else's that decides how this program finds their software."""

    name: str
    meaning: str

    def read(self) -> str:
        """The value; empty where unset."""
        return os.environ.get(self.name, "")

    def paths(self) -> list[Path]:
        """The value as a list of folders, first to be searched first."""
        return [Path(part) for part in self.read().split(os.pathsep) if part]

    def prepend(self, folder: Path) -> None:
        """Puts a folder in front, for libraries that this process loads from now on."""
        if folder not in self.paths():
            os.environ[self.name] = os.pathsep.join(filter(None, (str(folder), self.read())))

    def set(self, value: str) -> None:
        """Sets the variable for this process and its children."""
        os.environ[self.name] = value


API_KEY = TextVariable(
    name="ASCEND_V4_API_KEY",
    meaning="Key that `ascend-v4 serve` asks of clients when --api-key is not given; unset asks for none.",
)
CPU_KERNELS = FlagVariable(
    name="ASCEND_V4_CPU_KERNELS",
    default=True,
    meaning="0 leaves out the compiled CPU kernels, so that every operator on the CPU runs in torch.",
)
CPU_THREADS = CountVariable(
    name="ASCEND_V4_CPU_THREADS",
    low=1,
    high=4096,
    meaning="Threads of torch and of the compiled CPU kernels; unset means one per core.",
)

VARIABLES: tuple[Variable, ...] = (API_KEY, CPU_KERNELS, CPU_THREADS)
"""The whole table; tests hold it to be complete, each name once."""

BACKEND_AUTOLOAD = ForeignVariable(
    name="TORCH_DEVICE_BACKEND_AUTOLOAD",
    meaning="0 keeps torch from importing torch_npu while torch itself is imported.",
)
CANN_HOME = ForeignVariable(name="ASCEND_HOME_PATH", meaning="Where CANN is; its set_env.sh sets it.")
CANN_OPERATORS = ForeignVariable(name="ASCEND_OPP_PATH", meaning="Where CANN's operator packages are.")
CUSTOM_OPERATORS = ForeignVariable(
    name="ASCEND_CUSTOM_OPP_PATH", meaning="Operator packages that are not installed into CANN."
)
LIBRARY_PATH = ForeignVariable(name="LD_LIBRARY_PATH", meaning="Where the loader looks for libraries first.")
VISIBLE_NPUS = ForeignVariable(
    name="ASCEND_RT_VISIBLE_DEVICES", meaning="Numbers of the NPUs that this process may see."
)
