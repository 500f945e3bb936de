"""The errors that users see. Each is raised at the boundary, before anything is allocated."""


class FerrumError(Exception):
    """The base of all errors that are caused by the input and not by ferrum_jax."""


class ModelFileError(FerrumError):
    """A model file is damaged or inconsistent. The message names the file and the tensor or key."""


class UnsupportedModelError(ModelFileError):
    """The file may be valid, but needs something that ferrum_jax does not support. The message names it."""


class ChatTemplateError(FerrumError, ValueError):
    """A valid chat template rejects the messages, fails on them, or takes too much time or memory. The message is the
    template's own, or says what failed."""


class ModelNotFoundError(FerrumError):
    """No source has the model. The message lists the sources that were tried and why each failed."""


class OutOfMemoryError(FerrumError, MemoryError):
    """A device does not have enough memory. The message says how much is needed, how much there is, and what would help."""


class NotFiniteError(FerrumError, ArithmeticError):
    """The model computed NaN or infinity: its weights are damaged, or they exceed the range of the dtype."""
