"Adapters learn as if they stood in the student's head, and are never in the student."
import copy, os, subprocess, sys
from functools import partial

import pytest
import torch
from conftest import After, adapter_weights, assert_untouched, convnet, device, numbers, weights
from fastai.callback.core import Callback, CancelBatchException, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import Learner
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper
from fasterkd.all import *
from torch import nn
from torch.nn import functional as F

def hint(teacher, adapter='auto', weight=.5, **kwargs):
    term = Term(FitNet, 'conv2', 'bn2', adapter=adapter)
    return KnowledgeDistillationCallback(teacher, term, weight=weight, **kwargs)

def groups(model):
    body,head = (model.conv1, model.bn1),[*model.children()][2:]
    return [[p for m in part for p in m.parameters()] for part in (body, head)]

# --- trained like a part of the student's head

class Inside(nn.Module):
    "The student with the projection in it, as one would write it by hand"
    def __init__(self, student, projection, teacher):
        super().__init__()
        self.student = student
        self.projection = projection
        self.frozen = [copy.deepcopy(teacher).eval().requires_grad_(False)]
        student.conv2.register_forward_hook(self.keep)
    def keep(self, m, i, o): self.feature = o.clone()
    def forward(self, x):
        pred = self.student(x)
        if self.training:
            with torch.no_grad(): wide = self.frozen[0][:6](x)
            self.distance = F.mse_loss(self.projection(self.feature), wide)
        return pred

class Double(Callback):
    """All in float64, so that rounding, which Adam makes large where gradients are nearly 0, hides nothing
    (fastai's Recorder and losses take float32 alone)"""
    order = -1
    def before_batch(self): self.learn.xb = (self.x.double(),)

def in_double(make, *args, cbs=(), **kwargs):
    learn = make(*args, cbs=[Double(), *cbs], **kwargs).remove_cb(Recorder)
    learn.loss_func = F.cross_entropy
    return learn

def by_hand(make, teacher, fit, projection, **kwargs):
    torch.manual_seed(0)
    inside = Inside(convnet().double(), projection, teacher)
    def loss(pred, y): return .5*F.cross_entropy(pred, y)+(.5*inside.distance if inside.training else 0)
    def splitter(m): return [(g := groups(m.student))[0], g[1]+[*m.projection.parameters()]]
    learn = in_double(make, inside, splitter=splitter, **kwargs)
    learn.loss_func = loss
    fit(learn, [])
    return inside

def frozen_first(learn, cbs):
    learn.freeze()
    learn.fit(1, cbs=cbs)
    learn.unfreeze()
    learn.fit(1, 5e-3, wd=.1, cbs=cbs)

def with_a_new_optimizer(learn, cbs):
    learn.fit(1, cbs=cbs)
    learn.fit(1, reset_opt=True, cbs=cbs)

fits = {'fit': lambda learn, cbs: learn.fit(2, 1e-2, cbs=cbs),
        'fit_one_cycle with a slice': lambda learn, cbs: learn.fit_one_cycle(2, slice(1e-3, 1e-2), cbs=cbs),
        'fine_tune': lambda learn, cbs: learn.fine_tune(1, 1e-2, cbs=cbs),
        'freeze, unfreeze, wd': frozen_first,
        'a new optimizer': with_a_new_optimizer}

opt_funcs = {'Adam': Adam, 'SGD': SGD, 'AdamW of torch': partial(OptimWrapper, opt=torch.optim.AdamW)}
each_optimizer = pytest.mark.parametrize('opt_func', opt_funcs.values(), ids=[*opt_funcs])

@pytest.mark.parametrize('fit', fits)
@each_optimizer
def test_an_adapter_learns_as_the_same_module_inside_the_students_head(make, teacher, fit, opt_func):
    torch.manual_seed(3)
    teacher,projection = teacher.double(),nn.Conv2d(4, 8, 1).double()
    inside = by_hand(make, teacher, fits[fit], copy.deepcopy(projection), opt_func=opt_func)
    # channels_last=False for the same rounding: Adam makes much of it where gradients vanish
    kd = hint(Teacher(teacher, channels_last=False), adapter=projection)
    start = copy.deepcopy(projection.weight)
    torch.manual_seed(0)
    learn = in_double(make, convnet().double(), splitter=groups, opt_func=opt_func, cbs=[kd])
    fits[fit](learn, [])
    assert (projection.weight-start).abs().max()>1e-4
    hand = numbers(inside.student.state_dict().values())
    assert (weights(learn)-hand).abs().max()<1e-9
    assert (adapter_weights(kd)-numbers(inside.projection.parameters())).abs().max()<1e-9

def test_at_each_step_it_has_the_hypers_of_the_last_group(make, teacher):
    seen = []
    class Watch(Callback):
        order = 50
        def after_step(self): seen.append((dict(self.opt.hypers[-1]), dict(kd.auxiliary.optimizer.opt.hypers[-1])))
    kd = hint(teacher)
    make(splitter=groups, cbs=[kd, Watch()]).fit_one_cycle(2, slice(1e-4, 1e-2))
    assert len(seen)==4 and all(a==b for a,b in seen) and len({a['lr'] for a,_ in seen})==4

def test_accumulated_batches_move_it_like_one_large_batch(make, teacher):
    res = []
    for bs,cbs in ((40, []), (20, [GradientAccumulation(40)])):
        kd = hint(teacher.eval())
        learn = make(bs=bs, opt_func=SGD, cbs=[kd, *cbs])
        # BatchNorm would see batches of two sizes
        learn.add_cb(Callback(before_batch=lambda self: self.model.eval()))
        torch.manual_seed(5)
        learn.fit(1, 1e-2)
        res.append((weights(learn), adapter_weights(kd)))
    assert (res[0][0]-res[1][0]).abs().max()<1e-6 and (res[0][1]-res[1][1]).abs().max()<1e-6

@pytest.mark.parametrize('error', (CancelStepException, CancelBatchException))
def test_it_stays_where_the_students_step_is_left_out(make, teacher, error):
    class Skips(Callback):
        def before_step(self):
            if self.train_iter: raise error()
    once,kd = hint(teacher),hint(teacher)
    kept = []
    make(cbs=[once, After('after_step', lambda learn: kept.append(adapter_weights(once)))]).fit(1)
    make(cbs=[kd, Skips()]).fit(1)
    assert torch.equal(adapter_weights(kd), kept[0])
    if error is CancelStepException: assert all(p.grad.abs().sum()==0 for p in kd.adapters.parameters())

class Scaled(MixedPrecision):
    "float16's loss scaling without its rounding, on any device"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast(device().type, enabled=False)
        self.learn.scaler = torch.amp.GradScaler(device().type, init_scale=2.**10)

def test_its_gradient_is_unscaled_like_the_students(make, teacher):
    plain,scaled = hint(teacher),hint(teacher)
    a = make(cbs=plain, opt_func=SGD)
    a.fit(2)
    b = make(cbs=[scaled, Scaled()], opt_func=SGD)
    b.fit(2)
    assert torch.equal(weights(a), weights(b)) and torch.equal(adapter_weights(plain), adapter_weights(scaled))

def test_an_overflow_leaves_it_where_it_was(make, teacher):
    class Overflows(Callback):
        def after_backward(self):
            if self.train_iter==1: next(self.model.parameters()).grad.fill_(float('inf'))
    kd = hint(teacher)
    seen = []
    watch = After('before_backward', lambda learn: seen.append(adapter_weights(kd)))
    make(cbs=[kd, Scaled(), Overflows(), watch]).fit(2)
    assert len(seen)==4 and [torch.equal(a, b) for a,b in zip(seen, seen[1:])]==[False, True, False]

def dtypes(kd): return {p.dtype for p in kd.adapters.parameters()}

def test_under_bf16_and_in_float64_it_has_the_students_precision(make, teacher):
    kd = hint(teacher)
    class Autocast(MixedPrecision):
        def before_fit(self):
            super().before_fit()
            self.autocast,self.learn.scaler = torch.autocast(device().type, dtype=torch.bfloat16),None
        def before_backward(self): pass
        def before_step(self): pass
        def after_step(self): pass
    make(cbs=[kd, Autocast()]).fit(1)
    assert dtypes(kd)=={torch.float32} and adapter_weights(kd).isfinite().all()
    kd = hint(teacher.double())
    in_double(make, convnet().double(), cbs=[kd]).fit(1)
    assert dtypes(kd)=={torch.float64}

# --- across families, with no shape written down

def families():
    from torchvision.models import VisionTransformer, mobilenet_v2, resnet18, squeezenet1_1
    def vit(n, dim): return VisionTransformer(64, 16, n, 2, dim, 2*dim, num_classes=10)
    yield 'resnet to mobilenet',resnet18(num_classes=10),mobilenet_v2(num_classes=10)
    yield 'resnet to squeezenet, other sizes',resnet18(num_classes=10),squeezenet1_1(num_classes=10)
    yield 'transformer to resnet',vit(4, 32),resnet18(num_classes=10)
    yield 'resnet to transformer',resnet18(num_classes=10),vit(4, 16)
    yield 'transformer to transformer',vit(4, 32),vit(2, 16)

@pytest.mark.parametrize('name,big,small', families(), ids=lambda o: o if isinstance(o, str) else '')
def test_layers_are_matched_and_bridged(name, big, small):
    from fastai.data.core import DataLoaders
    x,y = torch.randn(4, 3, 64, 64),torch.randint(0, 10, (4,))
    s,t = match_layers(small, big, x, n=2)
    learn = Learner(DataLoaders([(x, y)]*2, []), small, loss_func=CrossEntropyLossFlat(), lr=1e-3)
    kd,seen = KnowledgeDistillationCallback(big, [SoftTarget, FitNet, Attention, Similarity], s, t, adapter='auto'),[]
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(1, cbs=[kd, After('after_step', lambda learn: seen.append(adapter_weights(kd)))])
    assert len(kd.adapters)==6 and not torch.equal(seen[0], seen[1])
    assert all(bool([*a.parameters()])==(i<2) for i,a in enumerate(kd.adapters))      # FitNet alone compares channels

# --- never in the student

def test_it_is_in_nobodys_state_dict_optimizer_or_export(make, teacher, tmp_path):
    plain,kd = make(path=tmp_path),hint(teacher)
    plain.fit(1)
    learn = make(path=tmp_path, cbs=[kd, SaveModelCallback(with_opt=True, every_epoch=True)])
    learn.fit(1)
    assert len(kd.adapters)==1 and learn.model.state_dict().keys()==plain.model.state_dict().keys()
    saved = torch.load(tmp_path/'models/model_0.pth', weights_only=False)
    assert saved['model'].keys()==plain.model.state_dict().keys()
    assert len(saved['opt']['state'])==len(plain.opt.state_dict()['state'])
    learn.remove_cb(learn.save_model)
    learn.export('kd.pkl'); plain.export('plain.pkl')
    assert b'fasterkd.' not in (tmp_path/'kd.pkl').read_bytes()
    assert (tmp_path/'kd.pkl').stat().st_size<1.01*(tmp_path/'plain.pkl').stat().st_size
    learn.remove_cb(kd)
    assert_untouched(learn, teacher)

def test_making_it_draws_no_random_number(make, teacher):
    teacher.eval()
    runs = []
    for terms in (SoftTarget, [SoftTarget, Term(FitNet, 'conv2', 'bn2', weight=0, adapter='auto')]):
        learn = make(p=.3)
        torch.manual_seed(2)
        learn.fit(2, cbs=KnowledgeDistillationCallback(teacher, terms))
        runs.append(weights(learn))
    assert torch.equal(*runs)

def test_it_begins_as_the_seed_says(make, teacher):
    starts = []
    for seed in (0, 0, 1):
        learn,kd = make(),hint(teacher)
        torch.manual_seed(seed)
        def stop(self):
            starts.append(adapter_weights(kd))
            1/0
        with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[kd, Callback(before_backward=stop)])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])

# --- from fit to fit

def test_it_is_kept_from_fit_to_fit_with_its_optimizer(make, teacher):
    def two(*between):
        learn,kd = make(),hint(teacher)
        learn.add_cb(kd)
        torch.manual_seed(0); learn.fit(1)
        first = kd.adapters[0]
        for f in between: kd = f(learn, kd)
        torch.manual_seed(1); learn.fit(1)
        return learn,kd,first
    def lr_find(learn, kd): learn.lr_find(num_it=6, show_plot=False); return kd
    def elsewhere(learn, kd):
        state = copy.deepcopy(kd.state_dict())
        learn.remove_cb(kd)
        other = hint(teacher)
        other.load_state_dict(state); learn.add_cb(other)
        assert all(torch.equal(v, state['adapters'][k]) for k,v in other.state_dict()['adapters'].items())
        return other
    a,kd,first = two()
    assert kd.adapters[0] is first
    b,other,_ = two(elsewhere)
    assert torch.equal(weights(a), weights(b)) and torch.equal(adapter_weights(kd), adapter_weights(other))

@each_optimizer
def test_its_state_goes_through_a_file_like_weights(make, teacher, tmp_path, opt_func):
    kd = hint(teacher)
    make(cbs=kd, opt_func=opt_func).fit_one_cycle(1)
    torch.save(kd.state_dict(), tmp_path/'kd.pth')
    other = hint(teacher)
    other.load_state_dict(torch.load(tmp_path/'kd.pth'))
    learn = make(cbs=other, opt_func=opt_func)
    seen = []
    learn.add_cb(After('before_backward', lambda learn: seen.append(adapter_weights(other))))
    learn.fit(1)
    assert torch.equal(seen[0], adapter_weights(kd)) and not torch.equal(seen[0], seen[1])

def test_a_state_of_other_adapters_is_refused_in_words(make, teacher):
    kd = hint(teacher)
    make(cbs=kd).fit(1)
    for adapter in ('pool', nn.Linear(16, 16)):
        other = hint(teacher, adapter=adapter)
        other.load_state_dict(kd.state_dict())
        learn = make()
        with pytest.raises(ValueError, match='the saved adapters have 0.project'): learn.fit(1, cbs=other)
        assert_untouched(learn, teacher)

def test_lr_find_puts_it_back_as_it_was(make, teacher):
    kd = hint(teacher)
    learn = make(cbs=kd)
    learn.lr_find(num_it=6, show_plot=False)
    assert len(kd.adapters)==0 and kd.state_dict()=={}
    learn.fit(1)
    before = copy.deepcopy(kd.state_dict())
    learn.lr_find(num_it=6, show_plot=False)
    after = kd.state_dict()
    def same(a, b): return torch.equal(a, b) if isinstance(a, torch.Tensor) else a==b
    assert all(torch.equal(v, after['adapters'][k]) for k,v in before['adapters'].items())
    for a,b in zip(before['opt']['state'], after['opt']['state']):
        assert a.keys()==b.keys() and all(same(v, b[k]) for k,v in a.items())
    assert_untouched(learn, teacher)

def test_lr_find_puts_back_a_module_that_was_given_too(make, teacher):
    mine = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    before = copy.deepcopy(mine.state_dict())
    make(cbs=hint(teacher, adapter=mine)).lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(v.cpu(), before[k]) for k,v in mine.state_dict().items())

def test_lr_find_leaves_no_gradient_that_waits_for_a_step(make, teacher):
    kd = hint(teacher)
    learn = make(cbs=kd)
    learn.fit(1)
    learn.add_cb(GradientAccumulation(60))
    learn.lr_find(num_it=7, show_plot=False)
    assert all(p.grad is None or p.grad.abs().sum()==0 for p in kd.adapters.parameters())

def test_an_optimizer_that_is_cleared_or_made_anew_in_the_middle_is_followed(make, teacher):
    for change in (lambda self: self.learn.unfreeze(), lambda self: self.learn.create_opt()):
        kd = hint(teacher)
        steps = []
        def step(opt): return {s['step'] for s in opt.state.values() if 'step' in s}
        def note(learn): steps.append((step(learn.opt), step(kd.auxiliary.optimizer.opt)))
        second_epoch = Callback(before_epoch=lambda self: change(self) if self.epoch==1 else None)
        make(splitter=groups, cbs=[kd, second_epoch, After('after_step', note)]).fit(2)
        assert len(steps)==4 and all(a==b for a,b in steps) and steps[2][0]=={1}

def test_a_lazy_module_draws_no_random_number_either(make, teacher):
    runs = []
    for adapter in ('auto', lambda s, t: nn.LazyConv2d(t[1], 1)):
        learn = make(p=.3)
        torch.manual_seed(2)
        term = Term(FitNet, 'conv2', 'bn2', weight=0, adapter=adapter)
        kd = KnowledgeDistillationCallback(teacher.eval(), [SoftTarget, term])
        learn.fit(2, cbs=kd)
        runs.append(weights(learn))
    assert torch.equal(*runs)

def test_a_fit_with_weight_0_leaves_it_alone(make, teacher):
    kd = hint(teacher)
    learn = make(cbs=kd)
    learn.fit(1)
    before,kd.weight = adapter_weights(kd),0
    learn.fit(1)
    assert torch.equal(adapter_weights(kd), before)

def test_a_deep_copy_goes_on_with_its_own(make, teacher):
    learn = make(cbs=(kd := hint(teacher)))
    learn.fit(1)
    twin = copy.deepcopy(learn)
    other,before = twin.knowledge_distillation,adapter_weights(kd)
    assert torch.equal(adapter_weights(other), before) and other.auxiliary.optimizer.student_opt is twin.opt
    twin.fit(1)
    assert torch.equal(adapter_weights(kd), before) and not torch.equal(adapter_weights(other), before)
    assert {id(p) for p in other.auxiliary.optimizer.params}=={id(p) for p in other.adapters.parameters()}

# --- refused and undone

def test_what_is_refused_in_the_first_batch_keeps_no_adapter(make, teacher):
    mine = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    before = copy.deepcopy(mine.state_dict())
    first = Term(FitNet, 'conv1', 'bn1', adapter=mine)
    misfit = Term(FitNet, 'conv2', 'conv1', name='misfit')
    def no_scalar(pred, **kwargs): return pred
    refused = (([first, misfit], "misfit needs the same shape: the student's layer 'conv2' gives"),
               ([first, no_scalar], 'a loss is a scalar tensor'))
    for terms,says in refused:
        kd,learn = KnowledgeDistillationCallback(teacher, terms),make()
        with pytest.raises((ValueError, TypeError), match=says): learn.fit(1, cbs=kd)
        assert len(kd.adapters)==0 and kd.auxiliary.optimizer is None
        assert_untouched(learn, teacher)
    kd,learn = KnowledgeDistillationCallback(teacher, terms[0]),make()
    learn.fit(1, cbs=kd)
    moved = copy.deepcopy(mine.state_dict())
    kd.terms[0].loss = lambda **kwargs: 1/0
    with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=kd)
    assert all(torch.equal(v, moved[k]) for k,v in mine.state_dict().items())
    assert before['1.num_batches_tracked']==0 and moved['1.num_batches_tracked']==2

@pytest.mark.parametrize('where', ('before_batch', 'after_loss', 'before_step', 'after_step', 'after_epoch'))
def test_after_an_interruption_the_next_fit_goes_on_with_it(make, teacher, where):
    def stop(self):
        there = self.train_iter==(2 if where=='before_batch' else 1)
        if there or where=='after_epoch': raise KeyboardInterrupt('on purpose')
    learn = make(cbs=(kd := hint(teacher)))
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Callback(**{where: stop}))
    made = kd.adapters[0]
    learn.fit(1)
    assert kd.adapters[0] is made
    learn.remove_cb(kd)
    assert_untouched(learn, teacher)

def test_a_frozen_layer_is_told_as_the_adapter_alone_would_learn(make, teacher):
    learn = make()
    for m in (learn.model.conv1, learn.model.bn1): m.requires_grad_(False)
    says = r"FitNet: the student's layers \['bn1'\] have no gradient \(frozen\?\), so only the adapters learn"
    with pytest.warns(UserWarning, match=says):
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, FitNet, 'bn1', 'bn1', adapter='auto'))

shared = nn.Conv2d(4, 8, 1)
def one_for_all(s, t): return shared
def a_tensor(s, t): return nn.Conv2d(1, 1, 1)(s)

@pytest.mark.parametrize('adapter,says', (
    ('the head of the student', 'an adapter, or a loss, shares parameters with the student'),
    (one_for_all, 'two adapters, or losses, share parameters'),
    (nn.LSTM(4, 8), "does not take what the student's layer|gives a tuple"),
    (a_tensor, 'the adapter factory')))
def test_modules_that_cannot_be_adapters_are_refused(make, teacher, adapter, says):
    learn = make()
    if isinstance(adapter, str): adapter = learn.model.conv2
    layers = (['conv1', 'conv2'],)*2 if callable(adapter) and not isinstance(adapter, nn.Module) else ('conv2', 'conv2')
    before = weights(learn)
    kd = KnowledgeDistillationCallback(teacher, FitNet, *layers, adapter=adapter)
    with pytest.raises((ValueError, TypeError), match=says): learn.fit(1, cbs=kd)
    assert torch.equal(weights(learn), before)
    assert_untouched(learn, teacher)

def test_an_opt_func_that_ignores_its_parameters_is_refused(make, teacher):
    learn = make()
    learn.opt_func = lambda params, **kwargs: OptimWrapper(learn.model.parameters(), torch.optim.SGD, lr=1e-2)
    with pytest.raises(ValueError, match='does not take the parameters that it is given'):
        learn.fit(1, cbs=hint(teacher))
    assert_untouched(learn, teacher)

def test_a_state_is_what_it_was_when_it_was_given(make, teacher):
    first,second = hint(teacher),hint(teacher)
    learn = make(cbs=first)
    learn.fit(1)
    then = adapter_weights(first)
    second.load_state_dict(first.state_dict())
    learn.fit(1)
    seen = []
    make(cbs=[second, After('before_backward', lambda learn: seen.append(adapter_weights(second)))]).fit(1)
    assert torch.equal(seen[0], then)

# --- in two processes

worker = '''
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from conftest import *
from fasterkd.all import *
from fastai.optimizer import SGD
rank,world = int(sys.argv[1]),int(sys.argv[2])
torch.set_num_threads(1)
items = torch.load({items!r})
torch.manual_seed(7)
teacher = convnet(8).eval()
class Wrap(Callback):
    order = 11
    def before_fit(self): self.learn.model = nn.parallel.DistributedDataParallel(self.learn.model)
    def after_fit(self): self.learn.model = self.learn.model.module
def mine(b): return [b[i] for i in range(rank, len(b), world)]
batches = [[items[i] for i in range(k, k+20)] for k in (0, 20)]
batches = [(torch.stack([x for x,_ in mine(b)]), torch.stack([y for _,y in mine(b)])) for b in batches]
if world>1: dist.init_process_group('gloo', init_method='file://{file}', rank=rank, world_size=world)
from fastai.data.core import DataLoaders
torch.manual_seed(0)
no_batchnorm = Callback(before_batch=lambda self: self.model.eval())
learn = Learner(DataLoaders(batches, batches), convnet(), loss_func=CrossEntropyLossFlat(), lr=1e-2, opt_func=SGD,
                cbs=no_batchnorm)
learn.logger = lambda *_: None
learn.remove_cb(learn.progress)
torch.manual_seed(0 if rank==0 else 99)
kd = KnowledgeDistillationCallback(teacher, Term(FitNet, 'conv2', 'bn2', adapter='auto'), weight=.5)
learn.fit(2, cbs=[kd]+([Wrap()] if world>1 else []))
torch.save([weights(learn), adapter_weights(kd)], {out!r}+f'/{{world}}-{{rank}}.pt')
'''

@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason='this PyTorch has no torch.distributed')
def test_in_two_processes_on_the_cpu_it_learns_as_in_one(items, tmp_path):
    torch.save(items, tmp_path/'items.pt')
    code = worker.format(tests=os.path.dirname(__file__), items=str(tmp_path/'items.pt'), file=tmp_path/'meet',
                         out=str(tmp_path))
    env = dict(os.environ, FASTERKD_DEVICE='cpu')
    def started(rank, world):
        command = [sys.executable, '-W', 'ignore', '-c', code, str(rank), str(world)]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for world in (1, 2):
        ps = [started(rank, world) for rank in range(world)]
        for p in ps: assert p.wait(timeout=200)==0, p.stderr.read()[-3000:]
    one,*two = (torch.load(tmp_path/f) for f in ('1-0.pt', '2-0.pt', '2-1.pt'))
    for w,a in two: assert (w-one[0]).abs().max()<1e-6 and (a-one[1]).abs().max()<1e-6
