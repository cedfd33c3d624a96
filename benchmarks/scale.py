"""How the cost of a distilled step grows: with the batch, the number of terms, the size of features, the number of
classes. Beside the same loss written by hand in a plain loop.

The nets are nearly nothing, so that what is measured is the callback, the losses and their gradients. Of many
short fits the quietest counts, as in host_time.py; in ms a step, the sides in turn.
"""
import time, warnings

import torch
import torch.nn.functional as F
from common import arguments, in_turn, learner, write_table
from fastai.data.core import DataLoaders
from fasterkd.all import FitNet, KnowledgeDistillationCallback, SoftTarget, Term
from torch import nn

warnings.simplefilter('ignore')

class Net(nn.Module):
    "A feature of `size` numbers for each item, and logits, each a parameter times what was given"
    def __init__(self, bs, classes, size, terms):
        super().__init__()
        self.logits = torch.randn(bs, classes)
        self.feature = torch.randn(bs, size)
        self.gain = nn.Parameter(torch.ones(()))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(terms))
    def forward(self, x):
        for l in self.layers: l(self.gain*self.feature)
        return self.gain*self.logits

def soft(net, teacher, x):
    with torch.no_grad(): t = teacher(x)
    s = net(x)
    return s,F.kl_div((s/4).log_softmax(1), (t/4).log_softmax(1), reduction='batchmean', log_target=True)*16

def hints(net, teacher, x):
    features = {}
    def keep(key): return lambda m, inp, out: features.__setitem__(key, out)
    hooks = [l.register_forward_hook(keep((m is net, i))) for m in (net, teacher) for i,l in enumerate(m.layers)]
    with torch.no_grad(): teacher(x)
    s = net(x)
    for h in hooks: h.remove()
    return s,sum(F.mse_loss(features[True, i], features[False, i]) for i in range(len(net.layers)))

def by_hand(net, teacher, batches, loss):
    opt,ce = torch.optim.SGD(net.parameters(), lr=1e-3),nn.CrossEntropyLoss()
    start = time.process_time()
    for x,y in batches:
        s,kd = loss(net, teacher, x)
        total = .5*kd+.5*ce(s, y)
        total.backward()
        opt.step()
        opt.zero_grad()
        total.item()
    return 1000*(time.process_time()-start)/len(batches)

def fitted(net, batches, cbs):
    learn = learner(DataLoaders(batches, []), net, loss_func=nn.CrossEntropyLoss(), lr=1e-3)
    learn.fit(1, cbs=cbs)
    start = time.process_time()
    learn.fit(1, cbs=cbs)
    return 1000*(time.process_time()-start)/len(batches)

def row(what, bs=64, classes=10, size=1, terms=0, rounds=5, steps=30):
    net,teacher = (Net(bs, classes, size, terms) for _ in range(2))
    batches = [(torch.randn(bs, 1), torch.randint(0, classes, (bs,)))]*steps
    names = [f'layers.{i}' for i in range(terms)]
    loss = [Term(FitNet, n, n) for n in names] or SoftTarget(T=4)
    def kd(): return KnowledgeDistillationCallback(teacher, loss)
    sides = {'fastai alone': lambda: fitted(net, batches, None), 'fasterkd': lambda: fitted(net, batches, kd()),
             'by hand': lambda: by_hand(net, teacher, batches, hints if terms else soft)}
    ms = {n: min(v) for n,v in in_turn(rounds, sides, lambda f: f()).items()}
    return {'what': what, 'fastai alone': ms['fastai alone'], 'fasterkd': ms['fasterkd'],
            'fasterkd beyond fastai': ms['fasterkd']-ms['fastai alone'], 'by hand': ms['by hand']}

def main():
    p = arguments(__doc__, rounds=9, steps=30)
    p.add_argument('--quick', action='store_true', help='under a minute; writes nothing')
    args = p.parse_args()
    more = dict(rounds=2, steps=5) if args.quick else dict(rounds=args.rounds, steps=args.steps)
    rows = [row(f'soft targets, {c:,} classes', classes=c, **more) for c in (10, 100, 1_000, 10_000, 100_000)]
    rows += [row(f'soft targets, 1,000 classes, batch of {bs}', bs=bs, classes=1_000, **more) for bs in (1, 8, 512)]
    def hints(n): return f'{n} hint{"s" if n>1 else ""} of 1,000 numbers an item'
    rows += [row(hints(n), size=1_000, terms=n, **more) for n in (1, 2, 4, 8)]
    rows += [row(f'a hint of {s:,} numbers an item', size=s, terms=1, **more) for s in (10_000, 100_000)]
    write_table(rows, keep=not args.quick, **more)

if __name__=='__main__': main()
