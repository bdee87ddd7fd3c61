"""What goes wrong on the command line alone."""

from foveate.errors import FoveateError


class UseError(FoveateError):
    """A command was given something it cannot work with: a name, a file, a folder, a size."""
