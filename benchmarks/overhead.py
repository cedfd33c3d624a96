"""An epoch of LightNN learning CIFAR-10 from DeepNN: the callback against the loop of PyTorch's distillation tutorial, with the teacher under no_grad.

Both sides get the same batches from memory, the same weights and PyTorch's Adam. Times: the two in turn, ratios of neighbours. Memory: each side alone in a process,
the largest resident size in an epoch, whole and beyond what the process had before it.
"""
import re, subprocess, sys, time
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from common import arguments, in_turn, learner, write
from fastai.basics import *
from fastai.optimizer import OptimWrapper
from fasterkd.all import KnowledgeDistillationCallback, SoftTarget
from fasterkd.cifar import DeepNN, LightNN, cifar10
from torch import nn

T,weight,bs = 2,.25,128

def cifar(n):
    "The first `n` of CIFAR-10's training images in a fixed random order, as bytes, and their classes"
    train,_ = cifar10()
    some = train.subset(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:n])
    return some.x,some.y

class Batches:
    "Shuffled batches from memory"
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return (len(self.x)+bs-1)//bs
    def __iter__(self):
        for i in torch.randperm(len(self.x)).split(bs): yield self.x[i].float()/255,self.y[i]

def by_hand(data, teacher):
    torch.manual_seed(0)
    student = LightNN().train()
    opt = torch.optim.Adam(student.parameters(), lr=1e-3)
    ce = nn.CrossEntropyLoss()
    start,running = time.perf_counter(),0.
    for x,y in data:
        opt.zero_grad()
        with torch.no_grad(): teacher_logits = teacher(x)
        logits = student(x)
        soft_targets,soft_prob = F.softmax(teacher_logits/T, dim=-1),F.log_softmax(logits/T, dim=-1)
        soft_loss = (soft_targets*(soft_targets.log()-soft_prob)).sum()/len(x)*T**2
        loss = weight*soft_loss+(1-weight)*ce(logits, y)
        loss.backward()
        opt.step()
        running += loss.item()
    return time.perf_counter()-start

def by_callback(data, teacher):
    torch.manual_seed(0)
    learn = learner(DataLoaders(data, Batches(data.x[:0], data.y[:0])), LightNN(), loss_func=nn.CrossEntropyLoss(), lr=1e-3, wd=0.,
                    opt_func=partial(OptimWrapper, opt=torch.optim.Adam))
    start = time.perf_counter()
    learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget(T=T), weight=weight))
    return time.perf_counter()-start

sides = dict(hand=by_hand, callback=by_callback)

def resident(field): return int(re.search(rf'{field}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024

def memory(side, images):
    "One epoch in a fresh process: the largest resident size, in MB, and what the epoch added"
    r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--alone', side, '--images', str(images)], capture_output=True, text=True, check=True)
    return [float(v) for v in r.stdout.split()]

def main():
    p = arguments(__doc__, images=50_000, pairs=3)
    p.add_argument('--alone', choices=list(sides), help='one epoch of one side, for its memory')
    args = p.parse_args()
    torch.manual_seed(1)
    teacher,data = DeepNN().eval(),Batches(*cifar(args.images))
    if args.alone:
        Path('/proc/self/clear_refs').write_text('5')      # the peak so far, of decoding the images, is forgotten
        before = resident('VmRSS')
        sides[args.alone](data, teacher)
        return print(resident('VmHWM'), resident('VmHWM')-before)
    small = Batches(data.x[:1280], data.y[:1280])
    for f in sides.values(): f(small, teacher)
    times = in_turn(args.pairs, sides, lambda f: f(data, teacher))
    ratios = [c/h for c,h in zip(times['callback'], times['hand'])]
    mem = {n: [median(m) for m in zip(*(memory(n, 2_000) for _ in range(3)))] for n in sides}
    write({'images': args.images, 'seconds by hand': times['hand'], 'seconds by callback': times['callback'], 'ratios callback/hand': ratios, 'median ratio': median(ratios),
           'peak memory in MB (whole, added by the epoch), by hand': mem['hand'], 'peak memory in MB, by callback': mem['callback'],
           'memory ratio, whole': mem['callback'][0]/mem['hand'][0], 'memory ratio, added': mem['callback'][1]/mem['hand'][1]})

if __name__=='__main__': main()
