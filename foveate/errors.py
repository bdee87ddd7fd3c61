"""Every error foveate raises on purpose. Each message says what is wrong, where, and what would be right."""


class FoveateError(Exception):
    """Base of all errors that a user can cause or mend; the command line prints it as one line, exit code 2."""


class UnsupportedModelError(FoveateError):
    """The model, or a part of its configuration, is outside what foveate can trace."""


class TraceError(FoveateError):
    """A traced graph holds an op that foveate cannot place; names the node, its module path and the op."""


class VerifyError(FoveateError):
    """A program breaks a rule of `foveate.ir.rules`; names the graph, the node and the rule."""


class PassError(FoveateError):
    """A pass has a bad option, or does not fit the program it is applied to."""


class InputError(FoveateError):
    """Inputs to a program do not fit together or do not fit the program."""


class ArtifactError(FoveateError):
    """A saved program or file is damaged, foreign, or not what its manifest says, or it cannot be written."""


class BackendError(FoveateError):
    """A backend is unknown, not installed, or cannot lower this program."""


class ParityError(BackendError):
    """What a backend computes is not what eager torch computes; nothing was written."""


class FoveateWarning(UserWarning):
    """Category of the warnings foveate issues, such as a pass that changed nothing."""
