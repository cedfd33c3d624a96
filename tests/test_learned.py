"Losses with parameters of their own learn with the student, and are never in the student."
import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
from conftest import After, assert_untouched, weights
from fastai.optimizer import SGD, Adam, OptimWrapper
from fasterkd.all import *
from fasterkd.losses import *
from torch import nn
from torch.nn import functional as F

def pooling_net(nf):
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, nf, 3, padding=1), bn1=nn.BatchNorm2d(nf), act1=nn.ReLU(),
        conv2=nn.Conv2d(nf, nf, 3, stride=2, padding=1), bn2=nn.BatchNorm2d(nf),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(nf, 10)))

@pytest.fixture
def wide():
    torch.manual_seed(7)
    return pooling_net(8).train()

classes = (VariationalInformation, FactorTransfer, FeatureOverhaul, ReusedClassifier, KnowledgeReview,
           SemanticCalibration, MaskedGenerative, PrimeAware, ProjectedDistance, SoftmaxRegression)
losses = {**{cls.__name__: cls for cls in classes},
          'ContrastiveRepresentation': partial(ContrastiveRepresentation, 40, dim=4, negatives=5)}

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
    states = []
    learn.fit(2, cbs=[kd, After('before_backward', lambda learn: states.append(state(kd)))])
    first,last = states[0],state(kd)
    assert any(not torch.equal(v, first[k]) for k,v in last.items() if '.parts' in f'.{k}')
    assert set(learn.model.state_dict())==set(pooling_net(4).state_dict())
    assert_untouched(learn, wide)

def test_no_random_number_of_the_users_is_spent(make, new):
    def batches(*cbs):
        inputs,states = [],[]
        add_input = After('before_batch', lambda learn: inputs.append(learn.xb[0].clone()))
        add_state = After('after_batch', lambda learn: states.append(torch.get_rng_state()))
        make(student()).fit(2, cbs=[*cbs, add_input, add_state])
        return inputs+states
    assert all(torch.equal(a, b) for a,b in zip(batches(), batches(new()), strict=True))

class Learned(nn.Module):
    "A loss as a user would write it"
    def __init__(self, conv):
        super().__init__()
        self.conv = conv
    def forward(self, fm_s, fm_t, **kwargs): return F.mse_loss(self.conv(fm_s['conv2']), fm_t['bn2'])

opt_funcs = {'Adam': Adam, 'SGD': SGD, 'AdamW of torch': partial(OptimWrapper, opt=torch.optim.AdamW)}

@pytest.mark.parametrize('opt_func', opt_funcs.values(), ids=opt_funcs)
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
    steps = []
    make(student()).fit(1, cbs=[kd, After('after_step', lambda learn: steps.append(state(kd)['0.conv.weight']))])
    assert steps[0].shape==(8,4,1,1) and not torch.equal(steps[0], steps[1])

# --- saved and restored

def test_it_goes_on_elsewhere_from_its_state_through_a_file(make, new, tmp_path):
    def two(other):
        learn,kd = make(student()),new()
        learn.add_cb(kd)
        torch.manual_seed(0)
        learn.fit(1)
        if other:
            torch.save(kd.state_dict(), tmp_path/'kd.pth')
            learn.remove_cb(kd)
            kd = new()
            kd.load_state_dict(torch.load(tmp_path/'kd.pth'))
            learn.add_cb(kd)
        torch.manual_seed(1)
        learn.fit(1)
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
    for without in (KnowledgeDistillationCallback(wide), KnowledgeDistillationCallback(wide, SoftTarget)):
        with pytest.raises(ValueError, match='no loss of this callback has any'):
            without.load_state_dict(kd.state_dict())
    other = KnowledgeDistillationCallback(wide, Term(PrimeAware, 'conv2', 'bn2'))
    other.load_state_dict(kd.state_dict())
    with pytest.raises(ValueError, match='the saved losses have'): make(student()).fit(1, cbs=other)

def test_a_frozen_layer_of_the_student_is_told(make, wide):
    learn = make(student())
    for layer in (learn.model.conv1, learn.model.bn1, learn.model.conv2): layer.requires_grad_(False)
    with pytest.warns(UserWarning, match='have no gradient \\(frozen\\?\\), so only the loss learns from it'):
        learn.fit(1, cbs=KnowledgeDistillationCallback(wide, Term(VariationalInformation, 'conv2', 'bn2')))

def test_the_classifier_of_several_teachers_is_refused_in_words(make, wide):
    learn = make(student())
    kd = KnowledgeDistillationCallback([wide, copy.deepcopy(wide)], Term(SoftmaxRegression, 'conv2', 'bn2'))
    with pytest.raises(ValueError, match='features'): learn.fit(1, cbs=kd)
    assert_untouched(learn, wide)

# --- right

def also_read(name, n, teacher, dtype=torch.float32):
    "What else than features the loss called `name` is given, for `n` items"
    if name=='ContrastiveRepresentation': return dict(idxs=torch.arange(n))
    return dict(teacher_pred=torch.randn(n, 10, dtype=dtype), teacher=teacher) if name=='SoftmaxRegression' else {}

@pytest.mark.parametrize('name', losses)
def test_gradients_are_those_of_finite_differences(name, wide):
    torch.manual_seed(0)
    s = torch.randn(5, 4, 4, 4, dtype=torch.float64).requires_grad_()
    t = torch.randn(5, 8, 4, 4, dtype=torch.float64)
    more = also_read(name, 5, wide, torch.float64)
    loss = losses[name]()
    loss.make(s, t)
    def value(s):
        if hasattr(loss, 'draws'): loss.draws.n.zero_()
        return loss(s, t, **more)
    if name=='ContrastiveRepresentation':
        value(s)            # Z is set by the first batch
        loss.eval()         # memories stay
    # the paraphraser's factor is a constant to the student
    params = [p for n,p in loss.named_parameters() if 'paraphraser' not in n]
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

def pair(kind):
    "Features of student and teacher, four items"
    torch.manual_seed(0)
    s,t = torch.randn(4, 3, 8, 8),torch.randn(4, 6, 4, 4)
    if kind=='maps': return s,t
    if kind=='tokens': return s.flatten(2).mT,torch.randn(4, 64, 6)
    if kind=='vectors': return s.mean((2, 3)),t.mean((2, 3))
    return s.to(memory_format=torch.channels_last),t.transpose(2, 3)

@pytest.mark.parametrize('dtype', (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize('kind', ('maps', 'tokens', 'vectors', 'strided'))
@pytest.mark.parametrize('name', losses)
def test_numbers_of_ten_thousand_of_any_precision_and_format_have_a_finite_loss_and_gradient(name, kind, dtype):
    s,t = ((1e4*f).to(dtype).requires_grad_() for f in pair(kind))
    loss,more = losses[name](),also_read(name, 4, nn.Linear(6, 10))
    random_state = torch.get_rng_state()
    value = loss(s, t, **more)
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all() and s.grad.abs().sum()>0
    assert t.grad is None and torch.equal(torch.get_rng_state(), random_state)
    assert {p.dtype for p in loss.parameters()}=={torch.float32}
    with torch.autocast('cpu', torch.bfloat16): assert loss(s, t, **more).dtype==torch.float32

@pytest.mark.parametrize('name', losses)
def test_a_loss_that_has_loaded_the_state_of_another_goes_on_as_that_does(name):
    s,t = pair('maps')
    first,again = losses[name](),losses[name]()
    more = also_read(name, 4, nn.Linear(6, 10))
    again.make(s, t)
    first(s, t, **more)
    again.load_state_dict(first.state_dict())
    assert again(s, t, **more)==first(s, t, **more)

@pytest.mark.parametrize('name', losses)
def test_features_that_are_missing_or_do_not_pair_are_refused_in_words(name):
    s,t = pair('maps')
    more = also_read(name, 4, nn.Linear(6, 10))
    with pytest.raises(ValueError, match='none are named: give it layers'): losses[name]()({}, {}, **more)
    with pytest.raises(ValueError, match='2 of the student and 1 of the teacher'): losses[name]()([s, s], [t], **more)

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
    def __init__(self):
        super().__init__()
        self.inner = VariationalInformation()
    def forward(self, fm_s, fm_t, **kwargs): return self.inner(fm_s, fm_t)

wrapped = {'partial': lambda: partial(VariationalInformation()),
           'partial of a class': lambda: partial(VariationalInformation, variance=2.),
           'bound method': lambda: VariationalInformation().forward,
           'inside another': Around,
           'lazy': lambda: Learned(nn.LazyConv2d(8, 1))}

@pytest.mark.parametrize('how', wrapped)
def test_it_is_trained_kept_and_put_back_however_it_is_wrapped(make, wide, how, tmp_path):
    def new(): return KnowledgeDistillationCallback(wide, Term(wrapped[how](), 'conv2', 'bn2'))
    kd,states = new(),[]
    learn = make(student(), cbs=[kd])
    before = weights(learn)
    kd.preflight(learn)
    learn.lr_find(num_it=4, show_plot=False)
    assert kd.state_dict()=={} and torch.equal(weights(learn), before)
    torch.manual_seed(0)
    learn.fit(1, cbs=After('after_step', lambda learn: states.append(state(kd))))
    assert not same(states[0], states[-1])
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
        torch.manual_seed(0)
        learn.fit(1)
        if other:
            saved = copy.deepcopy(kd.state_dict())
            learn.remove_cb(kd)
            kd = KnowledgeDistillationCallback(wide, Term(Learned(nn.Conv2d(4, 8, 1)), 'conv2', 'bn2'))
            kd.load_state_dict(saved)
            assert kd.state_dict()['opt'] is not None
            learn.add_cb(kd)
        torch.manual_seed(2)
        learn.fit(1)
        return learn,state(kd)
    (a,mine),(b,its) = two(False),two(True)
    assert torch.equal(weights(a), weights(b)) and same(mine, its)

def test_a_users_net_in_evaluation_stays_there(make, wide):
    class Perceptual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).eval().requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(()))
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
        terms = [Term(loss, 'conv2', 'bn2'), WeightMatching('conv1')]
        make(student()).fit(1, cbs=KnowledgeDistillationCallback(teacher, terms))
        return loss.parts[0].margin
    assert torch.equal(margins(wide), margins(torch.compile(wide, backend='eager')))

def test_memories_of_items_are_refused_with_mixed_items(make, wide):
    from fastai.callback.mixup import MixUp
    kd = KnowledgeDistillationCallback(wide, Term(ContrastiveRepresentation(40, dim=4, negatives=5), 'conv2'))
    with pytest.raises(ValueError, match='remembers items by their places'): make(student(), cbs=MixUp()).fit(1, cbs=kd)

def test_a_schedule_is_no_setting_of_a_loss_with_parameters(make, wide):
    scheduled = ProjectedDistance(exponent=lambda pct: 2+pct)
    kd = KnowledgeDistillationCallback(wide, Term(scheduled, 'conv2', 'bn2'))
    with pytest.raises(TypeError, match='its exponent stays as it is'): make(student()).fit(1, cbs=kd)

def test_runs_of_other_settings_are_told_apart():
    from fasterkd.descriptions import described
    pairs = ((KnowledgeReview(levels=(4,)), KnowledgeReview(levels=(2,))),
             (ContrastiveRepresentation(40), ContrastiveRepresentation(60)),
             (ContrastiveRepresentation(40), ContrastiveRepresentation(torch.arange(40)%3)),
             (VariationalInformation(), VariationalInformation(variance=2.)))
    for a,b in pairs:
        assert described(a)!=described(b) and described(a)==described(copy.deepcopy(a))
