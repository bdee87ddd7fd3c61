"""AOTInductor: a program's graphs as native code, compiled once and kept for this user on this machine.

A graph runs layer by layer (`foveate.backends.regions`), and layers that compute the same share their code. Weights are
arguments of it, as activations are: compiled files hold none, and none are copied.
"""

from foveate.backends.aoti.lowering import Built, build, lower, open_saved

__all__ = ["Built", "build", "lower", "open_saved"]
