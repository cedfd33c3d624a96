"""A training step with a hint through an adapter: the callback against the same projection trained by hand inside
the student.

Student LightNN (fasterkd.cifar), batches of 128 from memory, Adam; the teacher is one convolution, so that its
pass hides nothing. By hand, the student is wrapped in a module that runs the teacher under no_grad and
projects. The two in turn, ratios of neighbours, in seconds of processor time (one thread).
"""
import time
from statistics import median

import torch
from common import arguments, in_turn, learner, write
from fastai.data.core import DataLoaders
from fasterkd.all import FitNet, KnowledgeDistillationCallback, Term
from fasterkd.cifar import LightNN
from torch import nn
from torch.nn import functional as F

class Inside(nn.Module):
    def __init__(self, student, projection, teacher):
        super().__init__()
        self.student = student
        self.projection = projection
        self.teacher = [teacher.eval().requires_grad_(False)]
    def forward(self, x):
        if not self.training: return self.student(x)
        with torch.no_grad(): wide = self.teacher[0](x)
        feature = self.student.features[:5](x)
        self.distance = F.mse_loss(self.projection(feature), wide)
        return self.student.classifier(self.student.features[5:](feature))

def seconds(learn, **kwargs):
    start = time.process_time()
    learn.fit(1, **kwargs)
    return time.process_time()-start

def by_hand(dls, teacher):
    torch.manual_seed(0)
    model = Inside(LightNN(), nn.Conv2d(16, 64, 1), teacher)
    def loss(pred, y): return .5*F.cross_entropy(pred, y)+.5*model.distance
    return seconds(learner(dls, model, loss_func=loss, lr=1e-3))

def by_callback(dls, teacher):
    torch.manual_seed(0)
    kd = KnowledgeDistillationCallback(teacher, Term(FitNet, 'features.4', '1', adapter='auto'))
    return seconds(learner(dls, LightNN(), loss_func=nn.CrossEntropyLoss(), lr=1e-3), cbs=kd)

def main():
    args = arguments(__doc__, batches=30, pairs=21).parse_args()
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.ReLU())
    batches = [(torch.rand(128, 3, 32, 32), torch.randint(0, 10, (128,))) for _ in range(args.batches)]
    sides = dict(hand=by_hand, callback=by_callback)
    for f in sides.values(): f(DataLoaders(batches[:3], []), teacher)
    times = in_turn(args.pairs, sides, lambda f: f(DataLoaders(batches, []), teacher))
    ratios = [c/h for c,h in zip(times['callback'], times['hand'])]
    write({'batches': args.batches, 'seconds by hand': times['hand'], 'seconds by callback': times['callback'],
           'ratios callback/hand': ratios, 'median ratio': median(ratios)})

if __name__=='__main__': main()
