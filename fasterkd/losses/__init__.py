"All distillation losses: `from fasterkd.losses import SoftTarget`"
from .logits import *
from .features import *
from .relations import *
