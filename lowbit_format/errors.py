"""Every error that lowbit_format raises on purpose, one class for each kind of fault.

All derive from :class:`LowbitError`: ``except LowbitError`` catches what a user can mend, and no bug. A message names
the file, the tensor or module, what was found, what was expected, and what to do.
"""

from __future__ import annotations

MAX_MESSAGE = 1000  # characters: a hostile file cannot fill the screen with its contents


class LowbitError(Exception):
    """Base of all errors of this package."""


# --- the format (spec/FORMAT.md) -------------------------------------------------------------------


class FormatError(LowbitError):
    """A file or directory breaks a rule of the spec.

    Args:
        rule: id of the broken rule, for example ``"HDR-6"``.
        message: what was found, what was expected.
        file: the faulty file or directory, or None.
        tensor: the faulty tensor or module, or None.
    """

    def __init__(self, rule: str, message: str, *, file: object = None, tensor: str | None = None) -> None:
        self.rule, self.file, self.tensor = rule, None if file is None else str(file), tensor
        where = [] if file is None else [str(file)]
        if tensor is not None:
            where.append(f"{tensor!r}")
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} …"
        super().__init__(f"{': '.join(where)}{': ' if where else ''}{message} [{rule}]")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled, as an error of another process is, it keeps its text: the arguments of the class make another."""
        return _again, (type(self), self.args, self.__dict__)


def _again(cls: type[FormatError], args: tuple[object, ...], facts: dict[str, object]) -> FormatError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(facts)
    return error


class DirectoryError(FormatError):
    """The set of files is wrong: missing, ambiguous, or index and shards disagree (DIR rules)."""


class ConfigError(FormatError):
    """``quantization_config`` is ill-formed (CFG and TIE rules)."""


class HeaderError(FormatError):
    """A safetensors header is ill-formed or does not fit its file (HDR rules)."""


class TensorError(FormatError):
    """A module's tensors do not fit its scheme, or hold forbidden values (TEN, BIT, MIX rules)."""


class DigestError(FormatError):
    """A tensor's bytes do not match their digest in the header (DIG rules)."""


class VersionError(FormatError):
    """The file has a version of the format that this reader does not know (VER rules)."""


class PrecisionError(FormatError):
    """The file has no parameters for the requested precision (NST-3)."""


class BundleError(FormatError):
    """A task bundle is ill-formed (TSK rules)."""


class FingerprintError(BundleError):
    """A task bundle belongs to another base (MAT rules)."""


# --- quantizing and converting ---------------------------------------------------------------------


class QuantizationError(LowbitError):
    """A weight cannot be quantized with the given options."""


class NonFiniteWeightError(QuantizationError):
    """A weight holds NaN or an infinity (ENC-4)."""


class SchemeError(QuantizationError):
    """The options do not describe a valid scheme."""


class RecipeError(LowbitError):
    """A recipe file is ill-formed or its patterns match nothing."""


class BudgetError(LowbitError):
    """A size that a conversion cannot reach, or that it has no bits to choose for."""


class FrequencyError(LowbitError):
    """Frequencies of words cannot be read, or do not fit the vocabulary of the model."""


class SourceError(LowbitError):
    """The checkpoint to convert is missing, ill-formed, unsafe or of an unknown architecture."""


class QuantizedSourceError(SourceError):
    """A checkpoint is quantized already, in a way that is not known or cannot be stored without loss."""


class NothingToQuantizeError(SourceError):
    """The plan would quantize no module of the checkpoint."""


class CoverageError(LowbitError):
    """Less of the model would be quantized than requested."""


class ConversionError(LowbitError):
    """A conversion made something else than was meant; it is not published."""


class WorkerError(LowbitError):
    """A process that should take part in a conversion was lost, cannot be reached, or sees another checkpoint."""


class OutputError(LowbitError):
    """The output cannot be written: it exists, the disk is full, a package that makes it is missing, or the interrupted
    run had other settings."""


# --- the torch runtime -----------------------------------------------------------------------------


class LoadError(LowbitError):
    """A model could not be built from a lowbit directory."""


class ShapeError(LowbitError, ValueError):
    """A tensor given to an operator does not fit the matrix or the batch."""


class UnsupportedOperationError(LowbitError):
    """An operation that a weight stored as bit-planes does not support."""


# --- tasks -----------------------------------------------------------------------------------------


class TuningError(LowbitError):
    """A model cannot be prepared for tuning with the given options."""


class DataError(LowbitError):
    """Examples of a task cannot be read, or do not make a task."""


class TaskError(LowbitError):
    """A task is not loaded, its name is taken, or it cannot be used for the rows of a batch."""


class HubError(LowbitError):
    """The Hub refused, could not be reached, or gave something else than before; nothing was published or loaded in
    part."""


class CalibrationError(LowbitError):
    """Data for a calibration cannot be used, or a model cannot be run on it."""
