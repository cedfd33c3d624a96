"""What fasterai 0.4.1 and fasterkd do in the same situations, each run with both (needs fasterai: `pip install
--no-deps fasterai`).

Small nets, random data, SGD; the time is of LightNN learning from DeepNN, as a ratio to the same student alone,
the three in turn.
"""
import tempfile, time, warnings
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from statistics import median

import torch
from common import arguments, in_turn, learner, write
from fastai.basics import *
from fastai.optimizer import SGD
from torch import nn
from torch.utils.data import TensorDataset
import fasterai.distill.all as theirs
import fasterkd.all as ours
from fasterkd.cifar import DeepNN, LightNN, digits32

warnings.simplefilter('ignore')
sides = {'fasterai': theirs, 'fasterkd': ours}

def net(n=8):
    return nn.Sequential(nn.Conv2d(3, n, 3, padding=1), nn.ReLU(), nn.Conv2d(n, 2*n, 3, padding=1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.5), nn.Linear(2*n, 10))

def seeded(f, seed=0):
    torch.manual_seed(seed)
    return f()

class Data(TensorDataset):
    def new_empty(self): return Data(*(t[:0].clone() for t in self.tensors))

images = Data(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(64)%10)
def learn_with(model, data=images, loss_func=None, bs=16, **kwargs):
    dls = DataLoaders.from_dsets(data, data, bs=bs, shuffle=False, num_workers=0)
    return learner(dls, model, loss_func=loss_func or nn.CrossEntropyLoss(), opt_func=SGD, lr=.1, **kwargs)

def result_or_error(f):
    "What `f` gives, or the error it raises"
    try: return f()
    except Exception as e: return f'{type(e).__name__}: {str(e).strip().splitlines()[-1].strip()}'

def hooks(*models): return sum(len(m._forward_hooks) for model in models for m in model.modules())

def valid_loss(lib):
    learn,teacher = learn_with(seeded(net)),seeded(net, 1)
    alone = learn.validate()[0]
    learn.add_cb(lib.KnowledgeDistillationCallback(teacher, lib.SoftTarget))
    return f'{alone:.3f} alone, {learn.validate()[0]:.3f} with the callback'

def teacher_gradients(lib):
    learn,teacher = learn_with(seeded(net)),seeded(net, 1)
    learn.fit(1, cbs=lib.KnowledgeDistillationCallback(teacher, lib.SoftTarget))
    params = list(teacher.parameters())
    return f'{sum(p.grad is not None for p in params)} of {len(params)} parameters have one'

def teachers_mode(lib):
    learn,teacher = learn_with(seeded(net)),seeded(net, 1).train()
    learn.fit(1, cbs=lib.KnowledgeDistillationCallback(teacher, lib.SoftTarget))
    return 'training, as before' if teacher.training else 'evaluation'

def pairs(lib):
    seen = []
    def loss(fm_s, fm_t, pred, **kwargs):
        seen[:] = list(zip(fm_s, fm_t))
        return pred.sum()*0
    kd = lib.KnowledgeDistillationCallback(seeded(net, 1), loss, ['2', '0'], ['0', '2'])
    learn_with(seeded(net)).fit(1, cbs=kd)
    return ', '.join(f'{s}~{t}' for s,t in seen)

def unequal(lib):
    def loss(fm_s, fm_t, pred, **kwargs): return pred.sum()*0
    def fit():
        kd = lib.KnowledgeDistillationCallback(seeded(net, 1), loss, ['0', '2'], ['0'])
        learn_with(seeded(net)).fit(1, cbs=kd)
    return result_or_error(fit) or 'trains, with one of them'

def typo(lib):
    def fit():
        kd = lib.KnowledgeDistillationCallback(seeded(net, 1), lib.FitNet, ['22'], ['2'])
        learn_with(seeded(net)).fit(1, cbs=kd)
    return result_or_error(fit)

def after_a_crash(lib):
    student,teacher = seeded(net),seeded(net, 1)
    class Stop(Callback):
        order = 80
        def after_batch(self): raise KeyboardInterrupt
    for _ in range(2):
        kd = lib.KnowledgeDistillationCallback(teacher, lib.FitNet, ['0'], ['0'])
        with suppress(KeyboardInterrupt): learn_with(student).fit(1, cbs=[kd, Stop()])
    return f'{hooks(student, teacher)} hooks left'

def exported(lib):
    learn = learn_with(seeded(net))
    learn.add_cb(lib.KnowledgeDistillationCallback(seeded(partial(net, 64), 1), lib.SoftTarget))
    with tempfile.TemporaryDirectory() as d:
        learn.path = Path(d)
        learn.export('x.pkl')
        size = (Path(d)/'x.pkl').stat().st_size
    return f'{size/1e3:.0f} kB'

def one_logit(lib):
    p,t = torch.tensor([[.5], [2.]], requires_grad=True),torch.tensor([[3.], [-1.]])
    loss = lib.SoftTarget if lib is theirs else lib.BinarySoftTarget
    return f'{loss(pred=p, teacher_pred=t).item():.3f}' + (' (BinarySoftTarget)' if lib is ours else '')

def per_pixel(lib):
    s,t = (torch.randn(2, 5, 32, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    flat_s,flat_t = (o.movedim(1, -1).reshape(-1, 5) for o in (s, t))
    whole,pixel = lib.SoftTarget(pred=s, teacher_pred=t),lib.SoftTarget(pred=flat_s, teacher_pred=flat_t)
    return f'{whole/pixel:.0f} times the value of a pixel'

def teacher_as_learner(lib):
    def fit():
        kd = lib.KnowledgeDistillationCallback(learn_with(seeded(net, 1)), lib.SoftTarget)
        learn_with(seeded(net)).fit(1, cbs=kd)
    return result_or_error(fit) or 'trains'

def columns(lib):
    learn = learn_with(seeded(net))
    learn.fit(1, cbs=lib.KnowledgeDistillationCallback(seeded(net, 1), lib.SoftTarget))
    return ', '.join(learn.recorder.metric_names[1:-1])

def width(lib):
    more = dict(adapter='auto') if lib is ours else {}
    kd = lib.KnowledgeDistillationCallback(seeded(partial(net, 16), 1), lib.FitNet, ['0'], ['0'], **more)
    return result_or_error(lambda: learn_with(seeded(net)).fit(1, cbs=kd)) or "trains, with adapter='auto'"

situations = {
    'valid_loss of an untrained student': valid_loss,
    "gradients on the teacher's parameters after a fit": teacher_gradients,
    'the mode of a teacher that came in training mode': teachers_mode,
    'pairs asked: 2~0, 0~2; pairs that the loss gets': pairs,
    "two of the student's layers, one of the teacher's": unequal,
    "a layer '22' that does not exist": typo,
    'after two interrupted fits': after_a_crash,
    'exported file, callback in the Learner, a teacher of 300 kB': exported,
    'soft targets for a single logit': one_logit,
    'soft targets for 32 × 32 pixels': per_pixel,
    'the teacher is a Learner': teacher_as_learner,
    'FitNet, 8 against 16 channels': width,
    'what is recorded': columns}

def losses(lib):
    "Each loss that both have, as it is set by itself, on the same random answers and features"
    def some(i, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(i))
    given = dict(pred=some(0, 8, 10), teacher_pred=some(1, 8, 10), target=torch.arange(8),
                 fm_s={'a': some(2, 8, 6, 7, 7)}, fm_t={'b': some(3, 8, 6, 7, 7)})
    names = 'SoftTarget', 'Logits', 'Mutual', 'DecoupledKD', 'Attention', 'ActivationBoundaries', 'FitNet', 'Similarity'
    return {n: getattr(lib, n)(**given).item() for n in names}

def seconds(images):
    data,_ = digits32()
    x,y = data.x[:images],data.y[:images]
    data = Data(x.float()/255, y)
    def run(lib):
        learn,teacher = learn_with(seeded(LightNN), data, bs=128),seeded(DeepNN, 1)
        start = time.perf_counter()
        learn.fit(1, cbs=lib and lib.KnowledgeDistillationCallback(teacher, lib.SoftTarget))
        return time.perf_counter()-start
    return run

def main():
    args = arguments(__doc__, images=640, rounds=5).parse_args()
    measured = {n: {side: f(lib) for side,lib in sides.items()} for n,f in situations.items()}
    times = in_turn(args.rounds, {'alone': None, **sides}, seconds(args.images))
    ratios = {n: median(a/b for a,b in zip(times[n], times['alone'])) for n in sides}
    measured['training time, LightNN alone = 1, teacher DeepNN'] = {n: f'{r:.1f}' for n,r in ratios.items()}
    values = {side: losses(lib) for side,lib in sides.items()}
    by_loss = {n: {side: values[side][n] for side in sides} for n in values['fasterai']}
    write({'fasterai': version('fasterai'), 'rows': measured, 'losses': by_loss, 'seconds': times})

if __name__=='__main__': main()
