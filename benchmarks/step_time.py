"""What a step of distilling LightNN from DeepNN costs (batches of 128, 32×32 images), beside the loop written by
hand and beside the student alone.

All sides in turn, several rounds; of each pair of sides the median of the rounds' ratios. The loop by hand is
that of PyTorch's distillation tutorial, its teacher under no_grad. All take their batches from the same fastai
loader. Sides that ask the teacher run for --heavy images, the others for --images. With `--alone NAME` one side
runs once.
"""
import random, time, warnings
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch
import torch.nn.functional as F
from common import arguments, in_turn, learner, random_images, write_table
from fastai.basics import *
from fastai.optimizer import OptimWrapper
from fastai.vision.augment import aug_transforms
from fasterkd.all import (Attention, CachedTeacher, FitNet, KnowledgeDistillationCallback, Similarity, SoftTarget,
                          Teacher, Term)
from fasterkd.cifar import DeepNN, LightNN, images_dls
from torch import nn
from torch.utils.data import RandomSampler, TensorDataset

warnings.simplefilter('ignore')
T,weight,bs = 2,.25,128

def loaders(images, augmented=False):
    random.seed(0)
    return images_dls(images, images.subset(range(bs)), bs=bs, batch_tfms=aug_transforms() if augmented else ())

def student():
    torch.manual_seed(0)
    return LightNN().train()

def teacher():
    torch.manual_seed(1)
    return DeepNN().eval()

def plain(dl):
    "Its batches without fastai's own kinds of tensor"
    for b in dl: yield [o.as_subclass(torch.Tensor) for o in b]

# By hand

def soft_targets(logits, teacher_logits):
    soft_targets,soft_prob = F.softmax(teacher_logits/T, dim=-1),F.log_softmax(logits/T, dim=-1)
    return (soft_targets*(soft_targets.log()-soft_prob)).sum()/len(logits)*T**2

def by_hand(dls, teacher):
    model,ce = student(),nn.CrossEntropyLoss()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    running = 0.
    start = time.perf_counter()
    for x,y in plain(dls.train):
        opt.zero_grad()
        with torch.no_grad(): teacher_logits = teacher(x)
        logits = model(x)
        loss = weight*soft_targets(logits, teacher_logits)+(1-weight)*ce(logits, y)
        loss.backward()
        opt.step()
        running += loss.item()
    return time.perf_counter()-start

pairs = [('features.2', 'features.4'), ('features.5', 'features.9'), ('features.5', 'features.9')]

def by_hand_three(dls, teacher):
    model,ce = student(),nn.CrossEntropyLoss()
    regressor = nn.Conv2d(16, 32, 1)
    features = {}
    def keep(key): return lambda m, inp, out: features.__setitem__(key, out)
    hooks = [m.get_submodule(n).register_forward_hook(keep((m is model, n)))
             for m,names in ((model, {s for s,_ in pairs}), (teacher, {t for _,t in pairs})) for n in names]
    opt = torch.optim.Adam([*model.parameters(), *regressor.parameters()], lr=1e-3)
    running = 0.
    start = time.perf_counter()
    for x,y in plain(dls.train):
        opt.zero_grad()
        with torch.no_grad(): teacher(x)
        logits = model(x)
        def at(f): return F.normalize(f.pow(2).mean(1).flatten(1))
        def gram(f): return F.normalize(f.flatten(1)@f.flatten(1).T)
        (s1,t1),(s2,t2) = [(features[True, s], features[False, t]) for s,t in pairs[:2]]
        terms = (at(s1)-at(t1)).pow(2).mean()+(gram(s2)-gram(t2)).pow(2).mean()+F.mse_loss(regressor(s2), t2)
        loss = weight*terms+(1-weight)*ce(logits, y)
        loss.backward()
        opt.step()
        running += loss.item()
    seconds = time.perf_counter()-start
    for h in hooks: h.remove()
    return seconds

# By fasterkd, and by others

def by_learner(dls, cb):
    learn = learner(dls, student(), loss_func=nn.CrossEntropyLoss(), lr=1e-3, wd=0.,
                    opt_func=partial(OptimWrapper, opt=torch.optim.Adam))
    dls.loaders[1] = dls.train.new(dls.train.dataset.subset([]))
    start = time.perf_counter()
    learn.fit(1, cbs=cb)
    return time.perf_counter()-start

def distilled(dls, teacher):
    return by_learner(dls, KnowledgeDistillationCallback(teacher, SoftTarget(T=T), weight=weight))

def distilled_three(dls, teacher):
    terms = [Term(Attention, *pairs[0]), Term(Similarity, *pairs[1]), Term(FitNet, *pairs[2], adapter='conv')]
    return by_learner(dls, KnowledgeDistillationCallback(teacher, terms, weight=weight))

def fasterai(dls, teacher):
    from fasterai.distill.all import KnowledgeDistillationCallback, SoftTarget
    return by_learner(dls, KnowledgeDistillationCallback(teacher, partial(SoftTarget, T=T), weight=weight))

def torchdistill(dls, teacher):
    from torchdistill.core.distillation import get_distillation_box
    x,y = dls.train.dataset.x.float()/255,dls.train.dataset.y
    kd = dict(student_module_path='.', student_module_io='output', teacher_module_path='.', teacher_module_io='output',
              temperature=T, alpha=1-weight, reduction='batchmean')
    loader = dict(dataset_id='train', sampler=dict(class_or_func=RandomSampler),
                  kwargs=dict(batch_size=bs, num_workers=0))
    terms = dict(kd=dict(criterion=dict(key='KDLoss', kwargs=kd), weight=1.))
    half = dict(forward_proc='forward_batch_only', sequential=[], wrapper=None)
    config = dict(num_epochs=1, train_data_loader=loader, teacher={**half, 'requires_grad': False}, student=half,
                  optimizer=dict(key='Adam', kwargs=dict(lr=1e-3)),
                  criterion=dict(key='WeightedSumLoss', kwargs=dict(sub_terms=terms)))
    box = get_distillation_box(teacher, student(), {'train': TensorDataset(x, y)}, config, torch.device('cpu'), None,
                               False, 1)
    start = time.perf_counter()
    box.pre_epoch_process(epoch=0)
    for batch,targets,supp in box.train_data_loader:
        box.pre_forward_process()
        loss = box.forward_process(batch, targets, supp)
        box.post_forward_process(loss=loss)
    box.post_epoch_process()
    seconds = time.perf_counter()-start
    box.clean_modules()
    teacher.requires_grad_(True).eval()
    return seconds

def main():
    p = arguments(__doc__, images=12_800, heavy=1_280, rounds=7, views=5, threads=torch.get_num_threads())
    p.add_argument('--quick', action='store_true', help='under a minute; writes nothing')
    args = p.parse_args()
    if args.quick: args.images,args.heavy,args.rounds,args.views = 1_280,256,2,2
    torch.set_num_threads(args.threads)
    many,few = random_images(args.images),random_images(args.heavy)
    deep = teacher()
    def filled(views):
        cached = CachedTeacher(Teacher(deep, precision='bf16'), views=views)
        return cached.fill(loaders(many, views is not None), show=False)
    cached,viewed = filled(None),filled(args.views)
    def in_bf16(dls, t): return distilled(dls, Teacher(t, precision='bf16'))
    others = {n: f for n,f in dict(fasterai=fasterai, torchdistill=torchdistill).items() if find_spec(n)}
    heavy = {'by hand': by_hand, 'fasterkd': distilled, "fasterkd, precision='bf16'": in_bf16,
             'by hand, three features': by_hand_three, 'fasterkd, three features': distilled_three, **others}
    light = {'student alone': (False, None), 'fasterkd, cached': (False, cached),
             'student alone, augmented': (True, None),
             f'fasterkd, {args.views} views cached, augmented': (True, viewed)}
    def one(f): return lambda: 1000*f(loaders(few), deep)/(args.heavy/bs)
    def another(augmented, t):
        def kd(): return KnowledgeDistillationCallback(t, SoftTarget(T=T), weight=weight) if t else None
        return lambda: 1000*by_learner(loaders(many, augmented), kd())/(args.images/bs)
    sides = {**{n: one(f) for n,f in heavy.items()}, **{n: another(*o) for n,o in light.items()}}
    for f in heavy.values(): f(loaders(few.subset(range(2*bs))), deep)
    ms = in_turn(args.rounds, sides, lambda f: f())
    beside = {'fasterkd, three features': 'by hand, three features', 'fasterkd, cached': 'student alone',
              [*light][3]: [*light][2]}
    def ratio(n, m, of=median): return of([a/b for a,b in zip(ms[n], ms[m])])
    def row(n):
        m = beside.get(n)
        return {'side': n, 'ms a step': median(ms[n]), 'of the loop by hand': ratio(n, 'by hand'),
                'of the student alone': ratio(n, 'student alone'), 'beside': m or '',
                'ratio': ratio(n, m) if m else None, 'least': ratio(n, m, min) if m else None,
                'most': ratio(n, m, max) if m else None}
    rows = [row(n) for n in sides]
    write_table(rows, keep=not args.quick, images=args.images, heavy=args.heavy, rounds=args.rounds, views=args.views)

if __name__=='__main__': main()
