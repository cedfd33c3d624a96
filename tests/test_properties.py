"""Random nets, pairs of layers, batches, weights and schedules.

The total is that of the formula, taps are what the layers gave, nothing leaks, and what is refused has changed nothing.
"""
import os, warnings
from collections import OrderedDict

import torch
from conftest import hooks, weights
from fastai.callback.core import Callback, CancelTrainException
from fastai.callback.schedule import SchedCos, SchedExp, SchedLin, SchedPoly
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fasterkd.all import *
from fasterkd.layers import unique_names
from hypothesis import HealthCheck, given, note, settings, strategies as st
from test_faults import Raises, events
from torch import nn
from torch.nn import functional as F

long = 'slow' in os.environ.get('FLAGS', '')
tried = settings(max_examples=500 if long else 40, deadline=None, derandomize=not long, database=None,
                 suppress_health_check=[*HealthCheck])
n_classes = 3

# --- what is drawn

@st.composite
def nets(draw):
    "A small convolutional net, in training or not"
    layers,n = OrderedDict(),1
    for i in range(draw(st.integers(1, 3))):
        width = draw(st.integers(1, 5))
        layers[f'conv{i}'] = nn.Conv2d(n, width, 3, stride=draw(st.integers(1, 2)) if i==0 else 1, padding=1)
        if draw(st.booleans()): layers[f'bn{i}'] = nn.BatchNorm2d(width)
        if draw(st.booleans()): layers[f'act{i}'] = nn.ReLU(inplace=draw(st.booleans()))
        n = width
    drop = nn.Dropout(draw(st.sampled_from((0., .5))))
    head = OrderedDict(pool=nn.AdaptiveAvgPool2d(2), flat=nn.Flatten(), drop=drop, head=nn.Linear(4*n, n_classes))
    return nn.Sequential(layers|head).train(draw(st.booleans()))

def half(pct): return float(pct<.5)
def never(pct): return 0.

@st.composite
def ramps(draw):
    "One of fastai's schedules, between two numbers"
    f = draw(st.sampled_from((SchedLin, SchedCos, SchedExp)))
    return f(draw(st.floats(.01, 1)), draw(st.floats(.01, 1)))

schedules = st.one_of(st.none(), ramps(), st.sampled_from((half, never, SchedPoly(0, 1, 2))))

def maps(net): return [n for n,m in net.named_children() if n[:2] in ('co', 'bn', 'ac', 'po')]

@st.composite
def terms(draw, student, teacher):
    "A term, its value written out as a function of outputs and features, and its pairs of layers"
    kind = draw(st.sampled_from(('soft', 'logits', 'attention', 'similarity', 'mine')))
    weight,schedule = draw(st.floats(0, 100)),draw(schedules)
    if kind in ('soft', 'logits'):
        loss = SoftTarget(T=draw(st.floats(.5, 20))) if kind=='soft' else Logits
        def of_outputs(pred, teacher_pred, fs, ft): return loss(pred, teacher_pred)
        return Term(loss, weight=weight, schedule=schedule),of_outputs,[]
    pairs_of_maps = st.tuples(st.sampled_from(maps(student)), st.sampled_from(maps(teacher)))
    layers = draw(st.lists(pairs_of_maps, min_size=1, max_size=4))      # crossing, repeated
    loss,features = dict(attention=Attention, similarity=Similarity, mine=None)[kind],[]
    def mine(fm_s, fm_t, **kwargs):
        features[:] = [fm_s, fm_t]
        return sum(s.mean()-t.mean() for s,t in zip(fm_s.values(), fm_t.values(), strict=True)).abs()
    def of_features(pred, teacher_pred, fs, ft):
        ss,ts = [fs[s] for s,_ in layers],[ft[t] for _,t in layers]
        if loss: return loss(ss, ts)
        for fm,names,expected in zip(features, zip(*layers), (ss, ts)):
            assert [*fm]==unique_names(names)
            assert all(torch.equal(a, b) for a,b in zip(fm.values(), expected, strict=True))
        return sum(s.mean()-t.mean() for s,t in zip(ss, ts)).abs()
    return Term(loss or mine, *map(list, zip(*layers)), weight=weight, schedule=schedule),of_features,layers

@st.composite
def distillations(draw):
    "Student and teacher, several terms, and the callback's weight, schedule and task weight"
    student,teacher = draw(nets()),draw(nets())
    weight = draw(st.floats(.01, 1))
    several = draw(st.lists(terms(student, teacher), min_size=1, max_size=3))
    return student,teacher,several,weight,draw(schedules),draw(st.one_of(st.none(), st.floats(0, 2)))

# items, batch size, epochs: a last batch of one too
batches = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 2))

class Items:
    def __init__(self, n):
        self.n = n
        self.x = torch.randn(n, 1, 4, 4)
    def __len__(self): return self.n
    def __getitem__(self, i): return self.x[i],torch.tensor(i%n_classes)

def learner(model, n, bs):
    torch.manual_seed(0)
    dls = DataLoaders(TfmdDL(Items(n), bs=bs, shuffle=True, num_workers=0), TfmdDL(Items(2), bs=2, num_workers=0))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=1e-3)
    learn.logger = lambda *_: None
    return learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else learn

class Listens:
    "What the layers of a net gave at their last call, heard by hooks of our own"
    def __init__(self, net):
        self.gave = {}
        self.handles = [m.register_forward_hook(self.hook(n)) for n,m in net.named_children()]
    def hook(self, name):
        def store(module, inputs, output): self.gave[name] = output.detach().clone()
        return store
    def stop(self):
        for h in self.handles: h.remove()

def state(net):
    tensors = {k: v.clone() for k,v in net.state_dict().items()}
    return tensors,[m.training for m in net.modules()],[p.requires_grad for p in net.parameters()]

def same(a, b):
    return a[1:]==b[1:] and a[0].keys()==b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])

def assert_clean(learn, kd, teacher, before):
    assert kd.fit_state is None and hooks(learn.model, teacher)==0 and same(state(teacher), before)
    assert all(p.requires_grad for p in learn.model.parameters()) and all(p.grad is None for p in teacher.parameters())
    assert not learn.metrics and 'remove_cbs' not in learn.__dict__

# --- what holds

@tried
@given(distillations(), batches)
def test_the_total_is_that_of_the_formula_and_taps_are_what_the_layers_gave(drawn, data):
    student,teacher,several,weight,schedule,task_weight = drawn
    heard,learn,before = Listens(student),learner(student, *data[:2]),state(teacher)
    kd = KnowledgeDistillationCallback(teacher, [t for t,*_ in several], weight=weight, schedule=schedule,
                                       task_weight=task_weight)
    note(f'{student} {teacher} {kd.terms} {weight} {schedule} {task_weight} {data}')
    totals = []
    class Checks(Callback):
        order,run_valid = KnowledgeDistillationCallback.order+1,False
        def after_loss(self):
            pct,hears = self.pct_train,Listens(teacher)
            with torch.no_grad(): teacher_pred = teacher(self.x)
            hears.stop()
            w = weight*(schedule(pct) if schedule else 1.)
            pred = self.pred.detach()
            total = (1-w if task_weight is None else task_weight)*F.cross_entropy(pred, self.y)
            for t,written_out,_ in several:
                term_weight = w*t.weight*(t.schedule(pct))
                if term_weight: total = total+term_weight*written_out(pred, teacher_pred, heard.gave, hears.gave)
            totals.append((self.loss_grad.detach(), self.learn.loss.detach(), total))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(data[2], cbs=[kd, Checks()])
    heard.stop()
    assert len(totals)==data[2]*len(learn.dls.train)
    for total,shown,written_out in totals:
        torch.testing.assert_close(total, written_out, rtol=1e-5, atol=1e-6)
        assert torch.equal(total, shown)
    assert_clean(learn, kd, teacher, before)

@tried
@given(st.data(), batches)
def test_any_two_layers_are_bridged_or_refused_in_words_before_anything_moves(drawn, data):
    student,teacher = drawn.draw(nets()),drawn.draw(nets())
    def names_of(net): return st.sampled_from([n for n,_ in net.named_children()])
    pairs = drawn.draw(st.lists(st.tuples(names_of(student), names_of(teacher)), min_size=1, max_size=3))
    loss = drawn.draw(st.sampled_from((FitNet, Attention, Similarity, Cosine)))
    adapter = drawn.draw(st.sampled_from((None, 'auto', 'conv', 'linear', 'pool')))
    learn,before,names = learner(student, *data[:2]),state(teacher),[*student.state_dict()]
    kd = KnowledgeDistillationCallback(teacher, loss, *map(list, zip(*pairs)), adapter=adapter)
    unmoved,trained = weights(learn),False
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            learn.fit(data[2], cbs=kd)
            trained = True
        except ValueError as e:
            assert loss.__name__ in str(e) and 'layer' in str(e), e
            assert torch.equal(weights(learn), unmoved)
    note(f'{pairs} {loss.__name__} {adapter} {trained}')
    assert len(kd.adapters)==(len(pairs) if trained and adapter else 0)
    assert [*student.state_dict()]==names
    assert_clean(learn, kd, teacher, before)

errors = st.sampled_from((RuntimeError, KeyboardInterrupt))

@tried
@given(distillations(), batches, st.sampled_from(events), st.integers(1, 3), st.sampled_from((-20, 100)), errors)
def test_whatever_ends_a_fit_nothing_is_left_and_the_next_fit_works(drawn, data, event, nth, order, error):
    student,teacher,several,weight,schedule,task_weight = drawn
    learn,before = learner(student, *data[:2]),state(teacher)
    kd = KnowledgeDistillationCallback(teacher, [t for t,*_ in several], weight=weight, schedule=schedule,
                                       task_weight=task_weight)
    learn.add_cb(kd)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: learn.fit(data[2], cbs=Raises(event, error, order, nth))
        except error as e: assert 'on purpose' in str(e)
        except CancelTrainException: assert event=='after_cancel_train'     # in a validation fastai does not catch it
        assert_clean(learn, kd, teacher, before)
        learn.fit(1)
    assert_clean(learn, kd, teacher, before)
