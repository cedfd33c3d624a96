"A preflight sees what the fit will do, and changes nothing of it."
import copy, random, warnings
from functools import partial

import numpy as np
import pytest
import torch
from conftest import adapter_weights, assert_untouched, convnet, weights
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from fasterkd.all import *
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's")    # here it was never trained

def distillation(teacher, **kwargs):
    terms = [SoftTarget, Term(FitNet, 'conv2', 'bn2', adapter='auto'), Term(Attention, 'conv1', 'conv1')]
    return KnowledgeDistillationCallback(teacher, terms, **kwargs)

def states(learn):
    of_random = [torch.get_rng_state(), random.getstate(), str(np.random.get_state()), learn.dls.train.rng.getstate()]
    return [*of_random, {**learn.__dict__}, [*learn.cbs], [*learn.metrics], copy.deepcopy(learn.model.state_dict())]

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict) and all(isinstance(v, torch.Tensor) for v in a.values()):
        return all(torch.equal(v, b[k]) for k,v in a.items())
    return a==b

cases = dict(plain=[], mixup=[MixUp], cutmix=[CutMix], accumulation=[partial(GradientAccumulation, 40)],
             statistics=[ActivationStats], bf16=[partial(MixedPrecision, 'bf16')], channels_last=[ChannelsLast])

@pytest.mark.parametrize('cbs', cases)
@pytest.mark.parametrize('fitted', (False, True))
@pytest.mark.filterwarnings('ignore')
def test_a_fit_after_a_preflight_is_the_fit_without(make, teacher, cbs, fitted):
    res = []
    for look in (False, True):
        learn,kd = make(p=.3, cbs=[c() for c in cases[cbs]]),distillation(teacher)
        if fitted:
            torch.manual_seed(4)
            learn.fit(1, cbs=kd)
        torch.manual_seed(1)
        if look:
            before = states(learn)
            seen = kd.preflight(learn)
            assert all(same(a, b) for a,b in zip(before, states(learn)))
            assert list(seen.terms.term)==['task_loss', 'SoftTarget', 'FitNet', 'Attention']
            assert_untouched(learn, teacher)
        learn.fit(1, cbs=kd)
        res.append((weights(learn), adapter_weights(kd)))
    assert torch.equal(res[0][0], res[1][0]) and torch.equal(res[0][1], res[1][1])

def test_values_and_gradient_ratios_are_those_worked_out_by_hand(make, teacher):
    x,y = torch.randn(8, 1, 8, 8),torch.randint(0, 10, (8,))
    learn = make()
    learn.dls = DataLoaders([(x, y)], [(x, y)])
    terms = [SoftTarget(T=3), Term(Attention, 'conv1', 'conv1', weight=5)]
    seen = KnowledgeDistillationCallback(teacher, terms, weight=.7).preflight(learn).terms.set_index('term')
    student = copy.deepcopy(learn.model).cpu().train()
    pred = student(x)
    with torch.no_grad(): answer,maps = teacher.eval()(x),teacher.conv1(x)
    soft = F.kl_div(F.log_softmax(pred/3, 1), F.softmax(answer/3, 1), reduction='batchmean')*9
    attention = F.mse_loss(*(F.normalize(f.pow(2).mean(1).flatten(1)) for f in (student.conv1(x), maps)))
    losses = dict(task_loss=F.cross_entropy(pred, y), SoftTarget=soft, Attention=attention)
    def norm(loss):
        grads = torch.autograd.grad(loss, [*student.parameters()], retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None]).norm()
    norms = {n: norm(v) for n,v in losses.items()}
    weights = dict(task_loss=.3, SoftTarget=.7, Attention=3.5)
    for n,v in losses.items():
        ratio = norms[n]/norms['task_loss']
        expected = {'value': v, 'weight in total': weights[n], 'gradient / task': ratio,
                    'as weighted': weights[n]*ratio/.3}
        if n!='task_loss': expected['balancing Term weight'] = .3/(.7*ratio)
        for column,value in expected.items(): assert abs(seen[column][n]-value)<=1e-4*abs(value), (n, column)

def no_scalar(pred, **kwargs): return pred
refused = [(FitNet, 'FitNet needs the same shape'), (no_scalar, 'a loss is a scalar tensor')]

@pytest.mark.parametrize('loss,says', refused)
def test_what_the_fit_would_refuse_is_refused_and_leaves_nothing(make, teacher, loss, says):
    learn = make()
    before = states(learn)
    layers = ('conv2', 'conv2') if loss is FitNet else ()
    with pytest.raises((ValueError, TypeError), match=says):
        KnowledgeDistillationCallback(teacher, loss, *layers).preflight(learn)
    assert all(same(a, b) for a,b in zip(before, states(learn)))
    assert_untouched(learn, teacher)

def test_a_callback_of_the_learner_may_look_and_what_prepares_batches_takes_part(make, teacher, items):
    class Tripled(Callback):
        def __init__(self): self.calls = 0
        def before_batch(self):
            self.calls += 1
            self.learn.xb = (torch.cat([self.x]*3, 1),)
    cb,inputs = Tripled(),[]
    student,wide = convnet(),convnet(8)
    student.conv1 = nn.Conv2d(3, 4, 3, padding=1)
    wide.conv1 = nn.Conv2d(3, 8, 3, padding=1)
    wide.register_forward_pre_hook(lambda m,inp: inputs.append(inp[0].shape[1]))
    learn = make(student, cbs=[cb, Callback(before_batch=lambda self: inputs.append(self.learn))]).distill(wide)
    assert len(learn.knowledge_distillation.preflight().terms)==2
    assert cb.calls==0 and {*inputs[1:]}=={3} and inputs[0] is not learn

@pytest.mark.parametrize('opt', ('instance', 'frozen', 'compiled', 'loader of torch', 'smaller part'))
def test_other_learners(make, teacher, opt):
    if opt=='instance':
        model = convnet()
        learn = make(model, opt_func=OptimWrapper(model.parameters(), torch.optim.Adam))
        learn.fit(1)
        before = copy.deepcopy(learn.opt.opt.state_dict()['state'])
        distillation(teacher).preflight(learn)
        after = learn.opt.opt.state_dict()['state']
        assert all(torch.equal(v['exp_avg'], after[k]['exp_avg']) for k,v in before.items()) and before
    elif opt=='frozen':
        learn = make()
        learn.model.requires_grad_(False)
        learn.model.head.requires_grad_(True)
        with pytest.warns(UserWarning, match='have no gradient|has no gradient'):
            seen = distillation(teacher).preflight(learn)
        assert list(seen.terms['gradient / task'].astype(float)>0)==[True, True, False, False]
    elif opt=='compiled':
        learn = make(torch.compile(convnet(), backend='eager'))
        assert len(distillation(teacher).preflight(learn).pairs)==2
    elif opt=='loader of torch':
        learn,gen = make(),torch.Generator().manual_seed(0)
        ds = TensorDataset(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,)))
        learn.dls = DataLoaders(*(DataLoader(ds, 8, shuffle=True, generator=gen) for _ in range(2)))
        before = gen.get_state()
        assert len(distillation(teacher).preflight(learn).pairs)==2
        assert torch.equal(gen.get_state(), before)
    else:
        kd = KnowledgeDistillationCallback(teacher)
        assert len(kd.preflight(make()).pairs)==0 and 'adapter' not in repr(kd.preflight(make()))

def test_in_the_middle_of_a_fit_it_is_refused(make, teacher):
    learn = make(cbs=[kd := distillation(teacher), Callback(after_batch=lambda self: kd.preflight(self.learn))])
    with pytest.raises(RuntimeError, match='cannot be called in the middle of a fit'): learn.fit(1)
    assert_untouched(learn.remove_cb(kd), teacher)

def test_adapters_that_were_loaded_are_those_that_it_looks_at(make, teacher):
    batch = torch.randn(8, 1, 8, 8),torch.randint(0, 10, (8,))
    def learner():
        learn = make()
        learn.dls = DataLoaders([batch]*5, [batch])
        return learn
    kd,again,fresh = distillation(teacher.eval()),distillation(teacher),distillation(teacher)
    learn = learner()
    learn.fit(3, 1e-1, cbs=kd)
    again.load_state_dict(copy.deepcopy(kd.state_dict()))
    hints = [k.preflight(learn).terms.value[2] for k in (kd, again, fresh)]
    assert hints[0]==hints[1]!=hints[2]
    assert again.auxiliary.pending_state is not None and len(again.adapters)==0

def test_a_second_callback_and_a_schedule_out_of_bounds_are_refused_too(make, teacher):
    with pytest.raises(ValueError, match='this Learner has 2'):
        distillation(teacher).preflight(make(cbs=distillation(teacher)))
    with pytest.raises(ValueError, match='give task_weight=1'):
        distillation(teacher, schedule=lambda pct: 3.).preflight(make())
    with pytest.raises(TypeError, match='looks at a Learner with its data and its loss, not at a Sequential'):
        distillation(teacher).preflight(convnet())

def test_of_a_teacher_with_other_outputs_nothing_is_said(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        seen = KnowledgeDistillationCallback(convnet(8, 7), Similarity, 'conv2').preflight(make())
    score = seen.models.accuracy[0]
    assert not [w for w in caught if "the teacher's" in str(w.message)]
    assert score is None or score!=score

class Rebinds(nn.Module):
    "A buffer that a forward replaces"
    def __init__(self):
        super().__init__()
        self.register_buffer('ema', torch.zeros(()))
    def forward(self, x):
        self.ema = self.ema*.9+.1*x.detach().mean()+1
        return x

def test_buffers_that_are_replaced_are_put_back_too(make, teacher):
    student = convnet()
    student.act1 = Rebinds()
    learn = make(student)
    distillation(teacher).preflight(learn)
    layer_table(student, torch.randn(2, 1, 8, 8))
    with pytest.raises(ValueError): learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, FitNet, 'conv2'))
    assert student.act1.ema==0

def test_a_module_given_as_adapter_is_not_moved(make, teacher):
    mine = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    before = copy.deepcopy(mine.state_dict())
    KnowledgeDistillationCallback(teacher, Term(FitNet, 'conv2', 'bn2', adapter=mine)).preflight(make())
    assert all(torch.equal(v, before[k]) for k,v in mine.state_dict().items())

def test_what_callbacks_gather_is_theirs_alone(make, teacher):
    class Gathers(Callback):
        def __init__(self): self.log,self.seen = [],{1: 2}
        def before_batch(self): self.log.append(1)
        def after_fit(self): self.seen.clear()
    cb = Gathers()
    distillation(teacher).preflight(make(cbs=cb))
    assert cb.log==[] and cb.seen=={1: 2}

def test_it_is_the_learner_itself_but_for_what_trains(make, teacher):
    class Own(type(make())):
        def _split(self, b):
            super()._split(b)
            self.xb = (self.xb[0]*self.noise,)
    def add_noise(self): self.learn.xb = (self.x+self.noise+0*self.recorder.add_time,)
    learn = make()
    learn.__class__,learn.noise = Own,.5
    learn.add_cb(Callback(before_batch=add_noise))
    inputs = []
    learn.model.register_forward_pre_hook(lambda m,i: inputs.append(i[0].min().item()))
    distillation(teacher).preflight(learn)
    assert {*inputs}=={.5}

def test_a_vocab_on_the_loaders_is_seen(make, teacher):
    learn = make()
    learn.dls.vocab = list('abcdefghij')
    def notes(letters):
        return KnowledgeDistillationCallback(Teacher(teacher, vocab=list(letters))).preflight(learn).notes
    with pytest.raises(ValueError, match='the teacher does not know a, b, c'): notes('jihgfedxyz')
    given = notes('jihgfedcba')
    assert "The teacher's 10 outputs are matched by name with the student's 10." in given
    assert any('No loss was given: SoftTarget is taken' in n for n in given)
