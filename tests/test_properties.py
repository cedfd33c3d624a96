"Random nets, pairs of layers, batches, weights and schedules: the total is that of the formula, taps are what the layers gave, nothing leaks, and what is refused has moved nothing."
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
tried = settings(max_examples=500 if long else 40, deadline=None, derandomize=not long, database=None, suppress_health_check=[*HealthCheck])
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
    net = nn.Sequential(layers|OrderedDict(pool=nn.AdaptiveAvgPool2d(2), flat=nn.Flatten(), drop=nn.Dropout(draw(st.sampled_from((0., .5)))), head=nn.Linear(4*n, n_classes)))
    return net.train(draw(st.booleans()))

schedules = st.one_of(st.none(), st.sampled_from((SchedLin, SchedCos, SchedExp)).flatmap(lambda f: st.tuples(st.floats(.01, 1), st.floats(.01, 1)).map(lambda o: f(*o))),
                      st.sampled_from((lambda pct: float(pct<.5), lambda pct: 0., SchedPoly(0, 1, 2))))

def maps(net): return [n for n,m in net.named_children() if n[:2] in ('co', 'bn', 'ac', 'po')]

@st.composite
def terms(draw, student, teacher):
    "A term, how its value is computed by hand from `pred, teacher_pred` and the features of both sides, and where it looks"
    kind = draw(st.sampled_from(('soft', 'logits', 'attention', 'similarity', 'mine')))
    weight,schedule = draw(st.floats(0, 100)),draw(schedules)
    if kind in ('soft', 'logits'):
        loss = SoftTarget(T=draw(st.floats(.5, 20))) if kind=='soft' else Logits
        return Term(loss, weight=weight, schedule=schedule),lambda pred, teacher_pred, fs, ft: loss(pred, teacher_pred),[]
    layers = draw(st.lists(st.tuples(st.sampled_from(maps(student)), st.sampled_from(maps(teacher))), min_size=1, max_size=4))      # crossing, repeated
    loss,seen = dict(attention=Attention, similarity=Similarity, mine=None)[kind],[]
    def mine(fm_s, fm_t, **kwargs):
        seen[:] = [fm_s, fm_t]
        return sum(s.mean()-t.mean() for s,t in zip(fm_s.values(), fm_t.values(), strict=True)).abs()
    def by_hand(pred, teacher_pred, fs, ft):
        ss,ts = [fs[s] for s,_ in layers],[ft[t] for _,t in layers]
        if loss: return loss(ss, ts)
        for fm,names,given in zip(seen, zip(*layers), (ss, ts)):
            assert [*fm]==unique_names(names) and all(torch.equal(a, b) for a,b in zip(fm.values(), given, strict=True))
        return sum(s.mean()-t.mean() for s,t in zip(ss, ts)).abs()
    return Term(loss or mine, *map(list, zip(*layers)), weight=weight, schedule=schedule),by_hand,layers

@st.composite
def distillations(draw):
    student,teacher = draw(nets()),draw(nets())
    weight = draw(st.floats(.01, 1))
    return student,teacher,draw(st.lists(terms(student, teacher), min_size=1, max_size=3)),weight,draw(schedules),draw(st.one_of(st.none(), st.floats(0, 2)))

batches = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 2))     # items, batch size, epochs: a last batch of one too

class Items:
    def __init__(self, n): self.n,self.x = n,torch.randn(n, 1, 4, 4)
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
        self.handles = [m.register_forward_hook(lambda m, x, o, n=n: self.gave.__setitem__(n, o.detach().clone())) for n,m in net.named_children()]
    def stop(self):
        for h in self.handles: h.remove()

def state(net): return {k: v.clone() for k,v in net.state_dict().items()},[m.training for m in net.modules()],[p.requires_grad for p in net.parameters()]
def same(a, b): return a[1:]==b[1:] and a[0].keys()==b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])

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
    kd = KnowledgeDistillationCallback(teacher, [t for t,*_ in several], weight=weight, schedule=schedule, task_weight=task_weight)
    note(f'{student} {teacher} {kd.terms} {weight} {schedule} {task_weight} {data}')
    totals = []
    class Checks(Callback):
        order,run_valid = KnowledgeDistillationCallback.order+1,False
        def after_loss(self):
            pct,hears = self.pct_train,Listens(teacher)
            with torch.no_grad(): answers = teacher(self.x)
            hears.stop()
            w = weight*(schedule(pct) if schedule else 1.)
            pred,total = self.pred.detach(),(1-w if task_weight is None else task_weight)*F.cross_entropy(self.pred.detach(), self.y)
            for t,by_hand,_ in several:
                now = w*t.weight*(t.schedule(pct))
                if now: total = total+now*by_hand(pred, answers, heard.gave, hears.gave)
            totals.append((self.loss_grad.detach(), self.learn.loss.detach(), total))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(data[2], cbs=[kd, Checks()])
    heard.stop()
    assert len(totals)==data[2]*len(learn.dls.train)
    for total,shown,by_hand in totals:
        torch.testing.assert_close(total, by_hand, rtol=1e-5, atol=1e-6)
        assert torch.equal(total, shown)
    assert_clean(learn, kd, teacher, before)

@tried
@given(st.data(), batches)
def test_any_two_layers_are_bridged_or_refused_in_words_before_anything_moves(drawn, data):
    student,teacher = drawn.draw(nets()),drawn.draw(nets())
    pairs = drawn.draw(st.lists(st.tuples(*(st.sampled_from([n for n,_ in m.named_children()]) for m in (student, teacher))), min_size=1, max_size=3))
    loss,adapter = drawn.draw(st.sampled_from((FitNet, Attention, Similarity, Cosine))),drawn.draw(st.sampled_from((None, 'auto', 'conv', 'linear', 'pool')))
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
    assert len(kd.adapters)==(len(pairs) if trained and adapter else 0) and [*student.state_dict()]==names
    assert_clean(learn, kd, teacher, before)

@tried
@given(distillations(), batches, st.sampled_from(events), st.integers(1, 3), st.sampled_from((-20, 100)), st.sampled_from((RuntimeError, KeyboardInterrupt)))
def test_whatever_ends_a_fit_nothing_is_left_and_the_next_fit_works(drawn, data, event, nth, order, error):
    student,teacher,several,weight,schedule,task_weight = drawn
    learn,before = learner(student, *data[:2]),state(teacher)
    kd = KnowledgeDistillationCallback(teacher, [t for t,*_ in several], weight=weight, schedule=schedule, task_weight=task_weight)
    learn.add_cb(kd)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: learn.fit(data[2], cbs=Raises(event, error, order, nth))
        except error as e: assert 'on purpose' in str(e)
        except CancelTrainException: assert event=='after_cancel_train'     # raised in a validation, where fastai hears it not
        assert_clean(learn, kd, teacher, before)
        learn.fit(1)
    assert_clean(learn, kd, teacher, before)
