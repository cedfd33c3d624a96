"""What `kd.preflight(learn)` costs, in training steps of the same distillation, with one, two and three terms.

ResNet-18 from ResNet-34 at 64 pixels, batches of 32 from memory. A step: the median time of a batch of a fit
with the callback. The two in turn.
"""
import time, warnings
from statistics import median

import torch
from common import arguments, learner, write
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fasterkd.all import *
from torch import nn
from torchvision.models import resnet18, resnet34

class Clock(Callback):
    order = 1000
    def before_fit(self): self.times = []
    def before_batch(self): self.start = time.perf_counter()
    def after_batch(self): self.times.append(time.perf_counter()-self.start)

def main():
    args = arguments(__doc__, batches=4, rounds=5).parse_args()
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    teacher,student = resnet34(num_classes=10),resnet18(num_classes=10)
    batches = [(torch.randn(32, 3, 64, 64), torch.randint(0, 10, (32,))) for _ in range(args.batches)]
    learn = learner(DataLoaders(batches, []), student, loss_func=nn.CrossEntropyLoss(), lr=1e-3)
    terms = {'SoftTarget': SoftTarget, 'Attention': Term(Attention, ['layer1', 'layer2', 'layer3'], weight=100),
             'hint': Term(FitNet, 'layer4', adapter='conv')}
    res = {}
    for k in (1, 2, 3):
        def kd(): return KnowledgeDistillationCallback(teacher, dict([*terms.items()][:k]))
        ratios = []
        for _ in range(args.rounds):
            learn.fit(1, cbs=[kd(), clock := Clock()])
            start = time.perf_counter()
            kd().preflight(learn)
            ratios.append((time.perf_counter()-start)/median(clock.times))
        res[f'preflight in steps, {k} term{"s" if k>1 else ""}: median'] = median(ratios)
        res[f'{k}: all'] = ratios
    write({'rounds': args.rounds, **res})

if __name__=='__main__': main()
