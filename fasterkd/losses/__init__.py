"All distillation losses, `from fasterkd.losses import SoftTarget`, and what makes a function one"
from .core import logit_loss, feature_loss
from .logits import *
from .features import *
from .relations import *
from .learned import *
