"What `from fasterkd.all import *` brings: the callback, teachers, layers, the best-known losses, and fasterai's names"
from fasterkd.layers import layer_names, get_layer, Taps
from fasterkd.matching import layer_table, match_layers
from fasterkd.losses import (SoftTarget, Mutual, BinarySoftTarget, Logits, DecoupledKD,
                             FitNet, Attention, ActivationBoundaries, Cosine, Similarity)
from fasterkd.teachers import BaseTeacher, Teacher, EnsembleTeacher
from fasterkd.terms import Term
from fasterkd.callback import KnowledgeDistillationCallback
from fasterkd.preflight import Preflight
from fasterkd.cached import CachedTeacher
from fasterkd.comparison import Comparison
from fasterkd.compare import compare
from fasterkd.fasterai import get_model_layers, get_module_by_name, match_feature_layers
