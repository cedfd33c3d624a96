"""The callback against the loop written by hand, on digits: the largest difference of any weight after 2 epochs of
SGD; and `weight=0` against the plain run."""
import random

import torch
import torch.nn.functional as F
from common import learner, write
from fastai.basics import *
from fastai.losses import CrossEntropyLossFlat
from fasterkd import demo
from fasterkd.all import KnowledgeDistillationCallback, SoftTarget

data = demo.digits()
T,weight,epochs = 4,.9,2

def seeded(seed):
    set_seed(seed)
    model = demo.student_net()
    dls = DataLoaders.from_dsets(data['all'], data['test'], bs=64, num_workers=0)
    dls.train.rng = random.Random(seed)
    return learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.05)

def fitted(seed, cbs=None):
    learn = seeded(seed)
    learn.fit(epochs, cbs=cbs)
    return learn.model

def by_hand(seed, teacher):
    learn = seeded(seed)
    student,opt = learn.model.train(),torch.optim.SGD(learn.model.parameters(), lr=.05)
    for _ in range(epochs):
        for x,y in learn.dls.train:
            with torch.no_grad(): soft = F.softmax(teacher(x)/T, dim=1)
            pred = student(x)
            kd = F.kl_div(F.log_softmax(pred/T, dim=1), soft, reduction='batchmean')*T**2
            loss = (1-weight)*F.cross_entropy(pred, y)+weight*kd
            opt.zero_grad()
            loss.backward()
            opt.step()
    return student

def distance(a, b): return max((p-q).abs().max().item() for p,q in zip(a.parameters(), b.parameters(), strict=True))

teacher = demo.trained_teacher(data, epochs=5).model.eval()
def kd(w): return KnowledgeDistillationCallback(teacher, SoftTarget(T=T), weight=w)
seeds = range(3)
from_hand = [distance(fitted(s, kd(weight)), by_hand(s, teacher)) for s in seeds]
from_plain = [distance(fitted(s, kd(weight)), fitted(s)) for s in seeds]
of_weight_0 = [distance(fitted(s, kd(0)), fitted(s)) for s in seeds]
write({'largest difference of a weight from the loop by hand': from_hand,
       'largest difference from the plain run (not distilled)': from_plain,
       'largest difference of weight=0 from the plain run': of_weight_0})
