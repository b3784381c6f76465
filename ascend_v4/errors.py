"""Every exception the project raises on purpose.

AscendV4Error
  ConfigError               config.json or a flag: missing, contradictory, out of bounds
    UnsupportedModelError   a model this code would run wrongly (deepseek_v41, a ratio of 8, ...)
  CheckpointError           files: missing shard, truncated, wrong dtype, a scale that does not fit
  ContractError             an operator was declared, implemented or called against its contract
    NoImplementationError   nothing usable for an operator on a device; lists every refusal
    SimulatorError          a call that the simulated chip would refuse, or answer with anything
  DeviceError               what this machine lacks
  CacheFullError            no free cache pages for the work asked
  CompletionFormatError     a completion that breaks the chat grammar
  ChatFormatError           messages that cannot be rendered as a prompt
  TokenizerError            no tokenizer, or one that does not fit the model
  RequestError              a request to the server or engine that cannot be served

Messages say what is wrong, the value, the bound, then what to do. The command line prints them and exits with
2; the server turns them into an HTTP body.
"""

from __future__ import annotations


class AscendV4Error(Exception):
    """Root of the tree: anything a user, a file or a machine can cause."""


class ConfigError(AscendV4Error):
    """A configuration value is missing, contradictory or out of bounds."""


class UnsupportedModelError(ConfigError):
    """The configuration is well formed but describes a model this code would run wrongly."""


class CheckpointError(AscendV4Error):
    """Checkpoint files differ from what the configuration says must be there."""


class ContractError(AscendV4Error):
    """An operator was declared, implemented or called against its contract."""


class NoImplementationError(ContractError):
    """No implementation of an operator is usable here; the message lists every refusal."""


class SimulatorError(ContractError, RuntimeError):
    """A call that the simulated chip would refuse, or whose result would be undefined there.

    A RuntimeError too, which is what torch raises for the same call on the chip.
    """


class DeviceError(AscendV4Error):
    """The machine lacks a device, driver or package that was asked for."""


class CacheFullError(AscendV4Error):
    """The cache pools have no free page for the work asked of them."""


class CompletionFormatError(AscendV4Error):
    """A completion does not follow the chat grammar."""


class ChatFormatError(AscendV4Error):
    """Messages cannot be rendered as a prompt."""


class TokenizerError(AscendV4Error):
    """No tokenizer is at hand, or it does not fit the model."""


class RequestError(AscendV4Error):
    """A request cannot be served; `field` names the offending parameter where there is one."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
