__version__ = "0.0.1"

from . import _moved     # old names of modules
