"""What the callback costs beyond the teacher's pass and the loss: host time per batch with an empty teacher and an
empty loss, against the same fit without.

All in turn, many short fits. Whatever else a machine does only adds, so of each the quietest fit counts; the
difference, in microseconds of processor time per batch. With two taps, and with adapters that have no
parameters, likewise.
"""
import time, warnings

import torch
from common import arguments, in_turn, learner, write
from fastai.data.core import DataLoaders
from fasterkd.all import KnowledgeDistillationCallback
from torch import nn

one = torch.tensor(1.)
def empty(pred, **kwargs): return one

class Empty(nn.Module):
    def __init__(self, out, n=2):
        super().__init__()
        self.out = out
        self.layers = nn.ModuleList(nn.Identity() for _ in range(n))
    def forward(self, x):
        for l in self.layers: l(self.out)
        return self.out

def seconds_per_batch(n, cbs):
    batch = torch.randn(8, 10),torch.randint(0, 10, (8,))
    student = nn.Sequential(nn.Linear(10, 10), nn.Identity())
    learn = learner(DataLoaders([batch]*n, []), student, loss_func=nn.CrossEntropyLoss(), lr=1e-3)
    learn.fit(1, cbs=cbs)
    start = time.process_time()
    learn.fit(1, cbs=cbs)
    return (time.process_time()-start)/n

def main():
    args = arguments(__doc__, batches=300, rounds=25).parse_args()
    warnings.simplefilter('ignore')
    teacher = Empty(torch.randn(8, 10))
    taps = ['0', '1'],['layers.0', 'layers.1']
    def kd(*args, **kwargs): return lambda: KnowledgeDistillationCallback(teacher, *args, **kwargs)
    sides = {'without': lambda: None, 'one term': kd(empty), 'three terms': kd({n: empty for n in 'abc'}),
             'one term, two taps': kd(empty, *taps),
             'one term, two taps, two adapters without parameters': kd(empty, *taps, adapter='pool')}
    times = in_turn(args.rounds, sides, lambda cbs: 1e6*seconds_per_batch(args.batches, cbs()))
    plain = min(times['without'])
    added = {f'the callback adds, {n}, µs a batch': min(times[n])-plain for n in sides if n!='without'}
    write({'batches': args.batches, 'rounds': args.rounds, 'fastai alone, µs a batch': plain, **added})

if __name__=='__main__': main()
