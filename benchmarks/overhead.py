"""An epoch of LightNN learning CIFAR-10 from DeepNN: the callback against the loop of PyTorch's distillation tutorial, with the teacher under no_grad.

Both sides get the same batches from memory, the same weights and PyTorch's Adam. Times: the two in turn, ratios of neighbours. Memory: each side alone in a process,
the largest resident size in an epoch, whole and beyond what the process had before it.
"""
import re, subprocess, sys, time
from functools import partial
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, in_turn, learner, write
from fastai.basics import *
from fastai.optimizer import OptimWrapper
from fasterkd.all import KnowledgeDistillationCallback, SoftTarget
from torch import nn

T,weight,bs = 2,.25,128

def conv(ni, nf): return [nn.Conv2d(ni, nf, 3, padding=1), nn.ReLU()]
def head(ni, nh): return [nn.Flatten(), nn.Linear(ni, nh), nn.ReLU(), nn.Dropout(.1), nn.Linear(nh, 10)]
def deep(): return nn.Sequential(*conv(3, 128), *conv(128, 64), nn.MaxPool2d(2), *conv(64, 64), *conv(64, 32), nn.MaxPool2d(2), *head(2048, 512))
def light(): return nn.Sequential(*conv(3, 16), nn.MaxPool2d(2), *conv(16, 16), nn.MaxPool2d(2), *head(1024, 256))

def cifar(n):
    "The first `n` of CIFAR-10's training images in a fixed random order, as bytes"
    from PIL import Image
    files = sorted((untar_data(URLs.CIFAR)/'train').rglob('*.*'))
    classes = sorted({f.parent.name for f in files})
    files = [files[i] for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:n]]
    x = torch.stack([torch.from_numpy(np.array(Image.open(f).convert('RGB'))).permute(2, 0, 1) for f in files])
    return x,torch.tensor([classes.index(f.parent.name) for f in files])

class Batches:
    "Shuffled batches from memory"
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return (len(self.x)+bs-1)//bs
    def __iter__(self):
        for i in torch.randperm(len(self.x)).split(bs): yield self.x[i].float()/255,self.y[i]

def by_hand(data, teacher):
    torch.manual_seed(0)
    student = light().train()
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
    learn = learner(DataLoaders(data, Batches(data.x[:0], data.y[:0])), light(), loss_func=nn.CrossEntropyLoss(), lr=1e-3, wd=0.,
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
    teacher,data = deep().eval(),Batches(*cifar(args.images))
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
