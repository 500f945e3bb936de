"""The errors a user meets, each raised at the boundary, before anything is allocated."""


class FerrumError(Exception):
    """Base of every error that is the input's fault and not ours."""


class ModelFileError(FerrumError):
    """A model file is damaged or inconsistent. The message names the file and the tensor or key."""


class UnsupportedModelError(ModelFileError):
    """The file may be sound, but needs something that ferrum_jax does not do. The message names it."""


class ChatTemplateError(FerrumError, ValueError):
    """A chat template, which is sound by itself, refuses the messages it is given, fails on them or takes too much time or
    memory over them. The message is the template's own or says what failed."""


class ModelNotFoundError(FerrumError):
    """No source has the model. The message lists what was tried and why each attempt failed."""


class OutOfMemoryError(FerrumError, MemoryError):
    """A device has not the memory for what was asked. The message counts what is needed and what there is, and says what
    would help."""


class NotFiniteError(FerrumError, ArithmeticError):
    """What the model computed is NaN or infinite where a number is needed: damaged weights, or a dtype whose range they
    leave."""
