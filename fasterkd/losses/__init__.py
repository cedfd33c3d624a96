"All distillation losses, `from fasterkd.losses import SoftTarget`, and what makes a function one"
from . import features, gradients_and_weights, learned, logits, relations, transformers
from .core import feature_loss, given_loss, logit_loss
from .logits import *
from .features import *
from .relations import *
from .learned import *
from .transformers import *
from .gradients_and_weights import *

_modules = logits, features, relations, learned, transformers, gradients_and_weights
_losses = [n for module in _modules for n in module.__all__ if n[0].isupper()]
__all__ = [*_losses, 'every', 'feature_loss', 'given_loss', 'logit_loss']     # their building blocks: in the modules

def every()->dict:
    "All losses by name; an alias stands under the name of what it is an alias of"
    return {o.__name__: o for o in (globals()[n] for n in __all__) if hasattr(o, 'published')}
