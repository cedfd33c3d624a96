"""What a step of distilling costs on a GPU, in time and in memory, beside the loop written by hand and beside the
student alone: in float32, in float16, and in float16 with channels last.

ResNet-18 from ResNet-34 (128 images of 224 pixels) and LightNN from DeepNN (128 of 32). All sides in turn,
several rounds; each round is a fit of its own. Its steps are timed from the eleventh on, and what the fit takes
beyond that many steps of this length is shown apart. The loop by hand asks the teacher after the student, on
the same stream. Memory is that of a short fit after another one, without cuDNN's search for the fastest
kernels, and with the teacher's weights on the device on all sides. One call is meant to take under 3 minutes on
an H100, which has not been tried. Without a GPU: a trial on the CPU, float32 alone, with small images; it
writes nothing.
"""
import gc, random, time, warnings
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from common import arguments, in_turn, learner, random_images, write_table
from fastai.basics import *
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper
from fasterkd.all import CachedTeacher, FitNet, KnowledgeDistillationCallback, SoftTarget, Term
from fasterkd.cifar import DeepNN, Images, LightNN, images_dls
from torch import nn
from torchvision.models import resnet18, resnet34

warnings.simplefilter('ignore')
T,weight,bs,skipped = 4,.5,128,10
sgd = partial(torch.optim.SGD, lr=1e-3, momentum=.9)

class Pair:
    "A student, a teacher, images of a size, and where hints come from"
    def __init__(self, name, student, teacher, size, hints, device):
        self.name = name
        self.student = student
        self.hints = hints
        self.device = device
        torch.manual_seed(1)
        self.teacher = teacher().to(device).eval()
        images = random_images(10*bs)
        if size!=32: images = Images(F.interpolate(images.x, size=size), images.y, images.vocab)
        self.images = Images(images.x.to(device), images.y.to(device), images.vocab)

    def dls(self):
        random.seed(0)
        dls = images_dls(self.images, self.images.subset([0]), bs=bs)
        dls.loaders[1] = dls.train.new(dls.train.dataset.subset([]))
        return dls

    def new_student(self, channels_last):
        torch.manual_seed(0)
        model = self.student().to(self.device).train()
        return model.to(memory_format=torch.channels_last) if channels_last else model

def now(device):
    if device.type!='cpu': torch.accelerator.synchronize(device)
    return time.perf_counter()

class Stopwatch(Callback):
    "Milliseconds a step, from the eleventh on"
    order,run_valid = 1000,False
    def before_fit(self): self.done = 0
    def after_batch(self):
        self.done += 1
        if self.done==skipped: self.start = now(self.learn.dls.device)
        if self.done==self.n_epoch*self.n_iter:
            self.ms = 1000*(now(self.learn.dls.device)-self.start)/(self.done-skipped)

# The sides: each trains for `epochs`, in a precision, and gives milliseconds a step

def by_hand(pair, epochs, half, channels_last):
    model,dls,device = pair.new_student(channels_last),pair.dls(),pair.device
    if channels_last: pair.teacher.to(memory_format=torch.channels_last)
    opt = sgd(model.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    done = 0
    for _ in range(epochs):
        for x,y in dls.train:
            x,y = x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor)
            opt.zero_grad()
            with torch.autocast(device.type, torch.float16) if half else nullcontext():
                logits = model(x)
                with torch.no_grad(): teacher_logits = pair.teacher(x)
            log_p,q = F.log_softmax(logits.float()/T, 1),F.softmax(teacher_logits.float()/T, 1)
            soft = F.kl_div(log_p, q, reduction='batchmean')*T*T
            loss = weight*soft+(1-weight)*F.cross_entropy(logits.float(), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            loss.item()
            done += 1
            if done==skipped: start = now(device)
    ms = 1000*(now(device)-start)/(done-skipped)
    pair.teacher.to(memory_format=torch.contiguous_format)
    return ms

def by_learner(pair, epochs, half, channels_last, kd=None):
    learn = learner(pair.dls(), pair.new_student(channels_last), loss_func=nn.CrossEntropyLoss(), lr=1e-3, wd=0.,
                    opt_func=partial(OptimWrapper, opt=sgd))
    if half: learn.to_fp16()
    watch = Stopwatch()
    learn.fit(epochs, cbs=[watch, *([] if kd is None else [kd()])])
    return watch.ms

def sides(pair):
    def kd(teacher, loss): return partial(KnowledgeDistillationCallback, teacher, loss, weight=weight)
    cached = CachedTeacher(pair.teacher).fill(pair.dls(), show=False)
    hints = [SoftTarget(T=T), *(Term(FitNet, s, t, adapter='auto') for s,t in pair.hints)]
    return {'student alone': by_learner, 'by hand': by_hand,
            'fasterkd': partial(by_learner, kd=kd(pair.teacher, SoftTarget(T=T))),
            'fasterkd, hints': partial(by_learner, kd=kd(pair.teacher, hints)),
            'fasterkd, cached': partial(by_learner, kd=kd(cached, SoftTarget(T=T)))}

def timed(side, pair, epochs, *how):
    "Milliseconds a step, and what the fit takes beyond its steps"
    start = now(pair.device)
    ms = side(pair, epochs, *how)
    return ms,1000*(now(pair.device)-start)-10*epochs*ms

def peak(side, pair, *how):
    "MiB allocated, and reserved, at most"
    module = torch.get_device_module(pair.device)
    side(pair, 2, *how)
    gc.collect(); module.empty_cache(); module.reset_peak_memory_stats()
    side(pair, 2, *how)
    return module.max_memory_allocated()/2**20,module.max_memory_reserved()/2**20

def rows_of(pair, name, how, epochs, rounds, memory):
    ways = sides(pair)
    for side in ways.values(): side(pair, 2, *how)      # warm
    times = in_turn(rounds, ways, lambda side: timed(side, pair, epochs, *how))
    peaks = {n: peak(side, pair, *how) if memory else (None, None) for n,side in ways.items()}
    def ratio(n, m): return median(a/b for (a,_),(b,_) in zip(times[n], times[m]))
    for n in ways:
        mib,reserved = peaks[n]
        yield {'pair': pair.name, 'precision': name, 'side': n, 'ms a step': median(ms for ms,_ in times[n]),
               'of the loop by hand': ratio(n, 'by hand'), 'of the student alone': ratio(n, 'student alone'),
               'ms once a fit': median(once for _,once in times[n]), 'MiB allocated': mib, 'MiB reserved': reserved,
               'MiB, of the student alone': mib and mib/peaks['student alone'][0]}

def main():
    p = arguments(__doc__, epochs=10, rounds=3)
    p.add_argument('--quick', action='store_true', help='two rounds of two epochs; writes nothing')
    args = p.parse_args()
    device = default_device()
    gpu = device.type!='cpu'
    if args.quick or not gpu: args.epochs,args.rounds = 2,2
    torch.backends.cudnn.benchmark = False
    precisions = {'float32': (False, False)}
    if gpu: precisions.update({'float16': (True, False), 'float16, channels last': (True, True)})
    pairs = [Pair('LightNN from DeepNN', LightNN, DeepNN, 32, [('features.5', 'features.9')], device)]
    resnets = partial(resnet18, num_classes=10),partial(resnet34, num_classes=10)
    hints = [('layer2', 'layer2'), ('layer3', 'layer3')]
    if gpu: pairs.append(Pair('ResNet-18 from ResNet-34', *resnets, 224, hints, device))
    rows = [row for pair in pairs for name,how in precisions.items()
            for row in rows_of(pair, name, how, args.epochs, args.rounds, gpu)]
    write_table(rows, keep=gpu and not args.quick, steps=10*args.epochs, rounds=args.rounds, batch=bs)

if __name__=='__main__': main()
