"Losses with parameters of their own learn with the student, and are never in the student."
import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
from conftest import After, assert_untouched, convnet, weights
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper
from fasterkd.all import *
from fasterkd.losses import *
from torch import nn
from torch.nn import functional as F

def pooling_net(nf):
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, nf, 3, padding=1), bn1=nn.BatchNorm2d(nf), act1=nn.ReLU(), conv2=nn.Conv2d(nf, nf, 3, stride=2, padding=1), bn2=nn.BatchNorm2d(nf),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(nf, 10)))

@pytest.fixture
def wide():
    torch.manual_seed(7)
    return pooling_net(8).train()

losses = dict(VariationalInformation=VariationalInformation, FactorTransfer=FactorTransfer, FeatureOverhaul=FeatureOverhaul, ReusedClassifier=ReusedClassifier,
              KnowledgeReview=KnowledgeReview, SemanticCalibration=SemanticCalibration, MaskedGenerative=MaskedGenerative, PrimeAware=PrimeAware,
              ProjectedDistance=ProjectedDistance, SoftmaxRegression=SoftmaxRegression,
              ContrastiveRepresentation=partial(ContrastiveRepresentation, 40, dim=4, negatives=5))

@pytest.fixture(params=losses)
def new(request, wide):
    "Makes a callback with a new loss of one kind"
    return lambda **kwargs: KnowledgeDistillationCallback(wide, Term(losses[request.param](), 'conv2', 'bn2'), **kwargs)

def state(kd): return {k: v.clone() for k,v in kd.state_dict()['losses'].items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v.cpu(), b[k].cpu()) for k,v in a.items())
def student(seed=0): torch.manual_seed(seed); return pooling_net(4)

# --- trained

def test_its_parts_are_made_from_the_first_batch_and_learn_while_the_student_stays_its_own(make, wide, new):
    kd = new()
    learn = make(student())
    first = []
    learn.fit(2, cbs=[kd, After('before_backward', lambda learn: first or first.append(state(kd)))])
    now = state(kd)
    assert any(not torch.equal(v, first[0][k]) for k,v in now.items() if '.parts' in f'.{k}')
    assert set(learn.model.state_dict())==set(pooling_net(4).state_dict())
    assert_untouched(learn, wide)

def test_no_random_number_of_the_users_is_spent(make, new):
    def batches(*cbs):
        seen = []
        make(student()).fit(2, cbs=[*cbs, After('before_batch', lambda learn: seen.append(learn.xb[0].clone())), After('after_batch', lambda learn: seen.append(torch.get_rng_state()))])
        return seen
    assert all(torch.equal(a, b) for a,b in zip(batches(), batches(new()), strict=True))

class Learned(nn.Module):
    "A loss as a user would write it"
    def __init__(self, conv): super().__init__(); self.conv = conv
    def forward(self, fm_s, fm_t, **kwargs): return F.mse_loss(self.conv(fm_s['conv2']), fm_t['bn2'])

@pytest.mark.parametrize('opt_func', (Adam, SGD, partial(OptimWrapper, opt=torch.optim.AdamW)), ids=('Adam', 'SGD', 'AdamW of torch'))
def test_a_users_module_is_trained_as_the_same_module_given_as_adapter(make, wide, opt_func):
    torch.manual_seed(1)
    mine,adapter = nn.Conv2d(4, 8, 1),nn.Conv2d(4, 8, 1)
    adapter.load_state_dict(mine.state_dict())
    a,b = make(student(), opt_func=opt_func),make(student(), opt_func=opt_func)
    a.fit_one_cycle(2, cbs=KnowledgeDistillationCallback(wide, Term(Learned(mine), 'conv2', 'bn2')))
    b.fit_one_cycle(2, cbs=KnowledgeDistillationCallback(wide, Term(FitNet, 'conv2', 'bn2', adapter=adapter)))
    assert torch.equal(weights(a), weights(b)) and torch.equal(mine.weight, adapter.weight)

def test_a_users_module_that_learns_its_shapes_from_the_first_batch_is_trained_too(make, wide):
    kd = KnowledgeDistillationCallback(wide, Term(Learned(nn.LazyConv2d(8, 1)), 'conv2', 'bn2'))
    seen = []
    make(student()).fit(1, cbs=[kd, After('after_step', lambda learn: seen.append(state(kd)['0.conv.weight']))])
    assert seen[0].shape==(8,4,1,1) and not torch.equal(seen[0], seen[1])

# --- kept

def test_it_goes_on_elsewhere_from_its_state_through_a_file(make, new, tmp_path):
    def two(other):
        learn,kd = make(student()),new()
        learn.add_cb(kd)
        torch.manual_seed(0); learn.fit(1)
        if other:
            torch.save(kd.state_dict(), tmp_path/'kd.pth')
            learn.remove_cb(kd)
            kd = new()
            kd.load_state_dict(torch.load(tmp_path/'kd.pth'))
            learn.add_cb(kd)
        torch.manual_seed(1); learn.fit(1)
        return learn,state(kd)
    (a,mine),(b,its) = two(False),two(True)
    assert torch.equal(weights(a), weights(b)) and same(mine, its)

def test_lr_find_puts_it_back_as_it_was(make, wide, new):
    kd = new()
    learn = make(student(), cbs=kd)
    learn.lr_find(num_it=6, show_plot=False)
    assert kd.terms[0].loss.parts is None
    learn.fit(1)
    before = state(kd)
    learn.lr_find(num_it=6, show_plot=False)
    assert same(state(kd), before)
    assert_untouched(learn, wide)

def test_a_refusal_in_the_first_batch_leaves_it_unmade(make, wide, new):
    kd = new()
    kd.terms.append(Term(lambda **kwargs: torch.zeros(3)))
    learn = make(student())
    before = weights(learn)
    with pytest.raises(TypeError, match='a loss is a scalar tensor'): learn.fit(1, cbs=kd)
    assert kd.terms[0].loss.parts is None and torch.equal(weights(learn), before) and kd.state_dict()=={}
    assert_untouched(learn, wide)

def test_preflight_leaves_it_as_it_was(make, wide, new):
    kd = new()
    learn = make(student())
    report = kd.preflight(learn)
    assert kd.terms[0].loss.parts is None and report.pairs.parameters[0]>0
    learn.fit(1, cbs=kd)
    before = state(kd)
    kd.preflight(learn)
    assert same(state(kd), before)

def test_a_copy_of_the_callback_has_parts_of_its_own(make, new):
    kd = new()
    make(student()).fit(1, cbs=kd)
    other,before = copy.deepcopy(kd),state(kd)
    make(student()).fit(1, cbs=other)
    assert same(state(kd), before) and not same(state(other), before)

# --- refused

def test_a_student_whose_layers_were_replaced_by_others_of_other_channels_is_refused_in_words(make, wide, new):
    kd = new()
    learn = make(student(), cbs=kd)
    learn.fit(1)
    learn.model._modules,learn.opt = pooling_net(5)._modules,None
    with pytest.raises(ValueError, match=r'was made for \[4\] channels of the student'): learn.fit(1)
    assert_untouched(learn, wide)

def test_one_loss_in_two_terms_is_refused_in_words(make, wide):
    loss = VariationalInformation()
    learn = make(student())
    with pytest.raises(ValueError, match='share parameters: each pair needs its own'):
        learn.fit(1, cbs=KnowledgeDistillationCallback(wide, [Term(loss, 'conv2', 'bn2'), Term(loss, 'conv1', 'bn1')]))
    assert loss.parts is None
    assert_untouched(learn, wide)

def test_the_state_of_other_losses_is_refused_in_words(make, wide):
    kd = KnowledgeDistillationCallback(wide, Term(VariationalInformation, 'conv2', 'bn2'))
    make(student()).fit(1, cbs=kd)
    with pytest.raises(ValueError, match='no loss of this callback has any'): KnowledgeDistillationCallback(wide).load_state_dict(kd.state_dict())
    with pytest.raises(ValueError, match='no loss of this callback has any'): KnowledgeDistillationCallback(wide, SoftTarget).load_state_dict(kd.state_dict())
    other = KnowledgeDistillationCallback(wide, Term(PrimeAware, 'conv2', 'bn2'))
    other.load_state_dict(kd.state_dict())
    with pytest.raises(ValueError, match='the saved losses have'): make(student()).fit(1, cbs=other)

def test_a_frozen_layer_of_the_student_is_told(make, wide):
    learn = make(student())
    learn.model.conv1.requires_grad_(False); learn.model.bn1.requires_grad_(False); learn.model.conv2.requires_grad_(False)
    with pytest.warns(UserWarning, match='have no gradient \\(frozen\\?\\), so only the loss learns from it'):
        learn.fit(1, cbs=KnowledgeDistillationCallback(wide, Term(VariationalInformation, 'conv2', 'bn2')))

def test_the_classifier_of_several_teachers_is_refused_in_words(make, wide):
    learn = make(student())
    with pytest.raises(ValueError, match='features'): learn.fit(1, cbs=KnowledgeDistillationCallback([wide, copy.deepcopy(wide)], Term(SoftmaxRegression, 'conv2', 'bn2')))
    assert_untouched(learn, wide)

# --- right

@pytest.mark.parametrize('name', losses)
def test_gradients_are_those_of_finite_differences(name, wide):
    torch.manual_seed(0)
    s,t = torch.randn(5, 4, 4, 4, dtype=torch.float64).requires_grad_(),torch.randn(5, 8, 4, 4, dtype=torch.float64)
    more = dict(SoftmaxRegression=dict(teacher_pred=torch.randn(5, 10).double(), teacher=wide), ContrastiveRepresentation=dict(idxs=torch.arange(5))).get(name, {})
    loss = losses[name]()
    loss.make(s, t)
    def value(s):
        if hasattr(loss, 'draws'): loss.draws.n.zero_()
        return loss(s, t, **more)
    if name=='ContrastiveRepresentation': value(s); loss.eval()      # Z is set by the first batch, and memories stay
    params = [p for n,p in loss.named_parameters() if 'paraphraser' not in n]      # whose factor is a constant to the student
    grads = torch.autograd.grad(value(s), [s, *params], allow_unused=True)
    directions = [torch.randn_like(x) for x in (s, *params)]
    slope = sum((g*d).sum() for g,d in zip(grads, directions) if g is not None)
    def at(h):
        with torch.no_grad():
            for p,d in zip(params, directions[1:]): p.add_(h*d)
            v = value(s+h*directions[0])
            for p,d in zip(params, directions[1:]): p.sub_(h*d)
        return v
    assert abs((at(1e-6)-at(-1e-6))/2e-6-slope)<=1e-4*max(1, abs(slope))

def test_the_student_with_the_teachers_classifier_answers_as_the_projector_and_the_teacher_do(make, wide):
    loss = ReusedClassifier()
    learn = make(student())
    learn.fit(1, cbs=KnowledgeDistillationCallback(wide, Term(loss, 'bn2'), weight=1))
    x = learn.dls.one_batch()[0]
    body = learn.model[:5].eval()
    reused = nn.Sequential(body, loss.head(wide))
    loss.eval()
    with torch.no_grad(): assert torch.allclose(reused(x), wide.eval().head(loss.parts[0](body(x)).mean((2, 3))))

# --- modules in every wrapping

class Around(nn.Module):
    "A user's module with one of ours in it"
    def __init__(self): super().__init__(); self.inner = VariationalInformation()
    def forward(self, fm_s, fm_t, **kwargs): return self.inner(fm_s, fm_t)

wrapped = {'partial': lambda: partial(VariationalInformation()), 'partial of a class': lambda: partial(VariationalInformation, variance=2.), 'bound method': lambda: VariationalInformation().forward,
           'inside another': Around, 'lazy': lambda: Learned(nn.LazyConv2d(8, 1))}

@pytest.mark.parametrize('how', wrapped)
def test_it_is_trained_kept_and_put_back_however_it_is_wrapped(make, wide, how, tmp_path):
    def new(): return KnowledgeDistillationCallback(wide, Term(wrapped[how](), 'conv2', 'bn2'))
    kd,seen = new(),[]
    learn = make(student(), cbs=[kd])
    before = weights(learn)
    kd.preflight(learn)
    learn.lr_find(num_it=4, show_plot=False)
    assert kd.state_dict()=={} and torch.equal(weights(learn), before)
    watch = After('after_step', lambda learn: seen.append(state(kd)))
    torch.manual_seed(0); learn.fit(1, cbs=watch)
    assert not same(seen[0], seen[-1])
    other = new()
    other.load_state_dict(copy.deepcopy(kd.state_dict()))
    then = state(kd)
    learn.lr_find(num_it=4, show_plot=False)
    assert same(state(kd), then)

def test_the_optimizer_of_a_users_module_goes_on_elsewhere_too(make, wide):
    def two(other):
        torch.manual_seed(1)
        mine = Learned(nn.Conv2d(4, 8, 1))
        learn,kd = make(student()),KnowledgeDistillationCallback(wide, Term(mine, 'conv2', 'bn2'))
        learn.add_cb(kd)
        torch.manual_seed(0); learn.fit(1)
        if other:
            kept = copy.deepcopy(kd.state_dict())
            learn.remove_cb(kd)
            kd = KnowledgeDistillationCallback(wide, Term(Learned(nn.Conv2d(4, 8, 1)), 'conv2', 'bn2'))
            kd.load_state_dict(kept)
            assert kd.state_dict()['opt'] is not None
            learn.add_cb(kd)
        torch.manual_seed(2); learn.fit(1)
        return learn,state(kd)
    (a,mine),(b,its) = two(False),two(True)
    assert torch.equal(weights(a), weights(b)) and same(mine, its)

def test_a_users_net_in_evaluation_stays_there(make, wide):
    class Perceptual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.scale = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).eval().requires_grad_(False),nn.Parameter(torch.ones(()))
        def forward(self, fm_s, fm_t, **kwargs): return F.mse_loss(self.scale*self.net(fm_s['conv2']), fm_t['bn2'])
    loss = Perceptual()
    before = copy.deepcopy(loss.net.state_dict())
    make(student()).fit(1, cbs=KnowledgeDistillationCallback(wide, Term(loss, 'conv2', 'bn2')))
    assert not loss.net.training and same(loss.net.state_dict(), before) and loss.scale!=1

def test_one_term_in_two_callbacks_has_parts_in_each(make, wide):
    term = Term(VariationalInformation, 'conv2', 'bn2')
    first,second = (KnowledgeDistillationCallback(wide, term) for _ in range(2))
    make(student()).fit(1, cbs=first)
    assert second.terms[0].loss.parts is None and term.loss.parts is None and first.terms[0].loss.parts is not None

def test_a_compiled_teacher_is_read_as_the_model_that_it_is(make, wide):
    def margins(teacher):
        loss = FeatureOverhaul()
        make(student()).fit(1, cbs=KnowledgeDistillationCallback(teacher, [Term(loss, 'conv2', 'bn2'), WeightMatching('conv1')]))
        return loss.parts[0].margin
    assert torch.equal(margins(wide), margins(torch.compile(wide, backend='eager')))

def test_memories_of_items_are_refused_with_mixed_items(make, wide):
    from fastai.callback.mixup import MixUp
    with pytest.raises(ValueError, match='remembers items by their places'):
        make(student(), cbs=MixUp()).fit(1, cbs=KnowledgeDistillationCallback(wide, Term(ContrastiveRepresentation(40, dim=4, negatives=5), 'conv2')))

def test_a_schedule_is_no_setting_of_a_loss_with_parameters(make, wide):
    with pytest.raises(TypeError, match='its exponent stays as it is'):
        make(student()).fit(1, cbs=KnowledgeDistillationCallback(wide, Term(ProjectedDistance(exponent=lambda pct: 2+pct), 'conv2', 'bn2')))

def test_runs_of_other_settings_are_told_apart():
    from fasterkd.descriptions import described
    for a,b in ((KnowledgeReview(levels=(4,)), KnowledgeReview(levels=(2,))), (ContrastiveRepresentation(40), ContrastiveRepresentation(60)),
                (ContrastiveRepresentation(40), ContrastiveRepresentation(torch.arange(40)%3)), (VariationalInformation(), VariationalInformation(variance=2.))):
        assert described(a)!=described(b) and described(a)==described(copy.deepcopy(a))
