"""The matrix: each way to train, each callback, each use afterwards, each kind of model; with one loss of logits, one
of features with a trained adapter, and three terms at once.

In each cell the run with `weight=0` is the plain run bit for bit, and the distilled run draws the same random numbers,
learns something else, trains its adapters, and leaves nothing behind.
"""
import copy, pickle, random, warnings
from functools import partial

import matplotlib
import pytest
import torch
from conftest import After, adapter_weights, assert_untouched, convnet, device, hooks, numbers, weights
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, ItemGetter
from fastai.imports import noop
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import OptimWrapper, ranger
from fastai.metrics import accuracy
from fastai.torch_core import ismin_torch
from fasterkd.all import *
from fasterkd.losses import ContrastiveRepresentation
from torch import nn

matplotlib.use('Agg')

# --- losses, made anew for each callback

def soft_targets():
    "One loss of logits"
    return [SoftTarget]

def hint():
    "One loss of features, with an adapter that learns"
    return [Term(FitNet, 'conv2', adapter='auto')]

def three_terms():
    "Logits, features through an adapter, and features as they are"
    return [SoftTarget(T=4), Term(FitNet, 'conv2', adapter='conv'), Term(Attention, ['bn1', 'conv2'], weight=10)]

losses = dict(soft=soft_targets, hint=hint, three=three_terms)

# --- callbacks of the tests

def groups(model): return [[*model[:5].parameters()], [*model[5:].parameters()]]

class Average(Callback):
    "A moving average of the weights, put in their place at the end"
    def before_fit(self): self.mean = {k: v.clone() for k,v in self.model.state_dict().items() if v.is_floating_point()}
    def after_step(self):
        for k,v in self.mean.items(): v.lerp_(self.model.state_dict()[k], .1)
    def after_fit(self): self.model.load_state_dict(self.mean, strict=False)

class Asks(Callback):
    "Asks for predictions and validates between epochs, as a logger of pictures does"
    order,asking = 70,False
    def after_epoch(self):
        if self.asking: return      # validate has this event too
        self.asking = True
        preds,_ = self.learn.get_preds(ds_idx=1)
        assert len(preds)==20
        assert all(v==v for v in self.learn.validate()[:2])     # in the middle of a fit, columns follow
        self.asking = False

class Exports(Callback):
    "Exports the Learner in the middle of a fit"
    order = 100     # after the Recorder, whose loss an export takes away
    def after_batch(self):
        if self.training and self.iter==1: self.learn.export('mid.pkl')

# --- ways to train: functions of a Learner and of what makes the callbacks of a fit

def fit(learn, cbs):
    "Constant rate"
    learn.fit(2, cbs=cbs())

def one_cycle(learn, cbs):
    "One cycle"
    learn.fit_one_cycle(2, cbs=cbs())

def flat_cos(learn, cbs):
    "Flat, then a cosine"
    learn.fit_flat_cos(2, cbs=cbs())

def sgdr(learn, cbs):
    "Warm restarts"
    learn.fit_sgdr(1, 2, cbs=cbs())

def fine_tuned(learn, cbs):
    "Two fits, the first frozen"
    learn.fine_tune(1, cbs=cbs())

def found(learn, cbs):
    "A fit after the learning rate finder, which puts back the weights"
    before = weights(learn)
    learn.add_cbs(cbs())
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=6)
    assert torch.equal(weights(learn), before)
    learn.fit(1)

def frozen(learn, cbs):
    "A fit that is frozen, and one that is not"
    learn.freeze()
    learn.fit(1, cbs=cbs())
    learn.unfreeze()
    learn.fit(1, cbs=cbs())

def slices(learn, cbs):
    "Discriminative rates"
    learn.fit_one_cycle(2, slice(1e-4, 1e-2), cbs=cbs())

def recreated(learn, cbs):
    "A new optimizer between two fits"
    learn.fit(1, cbs=cbs())
    learn.create_opt()
    learn.fit(1, cbs=cbs())

def twice(learn, cbs):
    "Two fits with one callback"
    learn.add_cbs(cbs())
    learn.fit(1)
    learn.fit(1)

def resumed(learn, cbs):
    "A second fit that begins with the third epoch"
    learn.add_cbs(cbs())
    learn.fit(2)
    learn.fit(4, start_epoch=2)

ways = dict(fit=fit, fit_one_cycle=one_cycle, fit_flat_cos=flat_cos, fit_sgdr=sgdr, fine_tune=fine_tuned, lr_find=found,
            freeze_unfreeze=frozen, slices=slices, recreated=recreated, twice=twice, start_epoch=resumed)
optimizers = dict(AdamW=partial(OptimWrapper, opt=torch.optim.AdamW), ranger=ranger)

# --- callbacks

def with_cbs(*makers):
    "A fit with callbacks of fastai"
    def _fit(learn, cbs): learn.fit(2, cbs=[*cbs(), *(make() for make in makers)])
    return _fit

def shows(learn, cbs):
    "A graph beside the progress bar"
    learn.add_cb(ProgressCallback())
    learn.fit(2, cbs=[*cbs(), ShowGraphCallback()])
    learn.remove_cb(ProgressCallback)

def smoothed(learn, cbs):
    "Another task loss, put back afterwards"
    learn.loss_func = LabelSmoothingCrossEntropyFlat()
    learn.fit(2, cbs=cbs())
    learn.loss_func = CrossEntropyLossFlat()

def low(learn, cbs):
    "Autocast around the whole fit"
    with torch.autocast(device().type, torch.bfloat16): learn.fit(2, cbs=cbs())

def short(learn, cbs):
    "An epoch that ends in the middle"
    learn.fit(1, cbs=[*cbs(), ShortEpochCallback(.5, short_valid=False)])

def schedules():
    "Schedules of the optimizer's hyperparameters"
    return ParamScheduler({'lr': SchedCos(1e-2, 1e-4), 'mom': SchedLin(.9, .8)})

callbacks = dict(
    MixUp=with_cbs(MixUp),
    CutMix=with_cbs(CutMix),
    LabelSmoothing=smoothed,
    GradientAccumulation=with_cbs(partial(GradientAccumulation, 40)),
    GradientClip=with_cbs(partial(GradientClip, .1)),
    MixedPrecision=with_cbs(MixedPrecision),
    MixedPrecision_bf16=with_cbs(partial(MixedPrecision, amp_mode='bf16')),
    autocast_bf16=low,
    ChannelsLast=with_cbs(ChannelsLast),
    EarlyStopping=with_cbs(partial(EarlyStoppingCallback, patience=1)),
    SaveModel=with_cbs(SaveModelCallback),
    SaveModel_with_opt=with_cbs(partial(SaveModelCallback, with_opt=True)),
    ReduceLROnPlateau=with_cbs(partial(ReduceLROnPlateau, patience=1)),
    CSVLogger=with_cbs(CSVLogger),
    ShowGraph=shows,
    ParamScheduler=with_cbs(schedules),
    average=with_cbs(Average),
    asks=with_cbs(Asks),
    export=with_cbs(Exports),
    ShortEpoch=short,
    BnFreeze=with_cbs(BnFreeze),
    MixUp_and_accumulation=with_cbs(MixUp, partial(GradientAccumulation, 40)))

@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

def trained(make, way, kd, tmp_path, **kwargs):
    "A Learner that was trained so, the random states afterwards, and the adapters as they were in the first batch"
    learn,first = make(splitter=groups, **kwargs),[]
    learn.path = tmp_path
    def note_adapters(_):
        if len(kd.adapters) and not first: first.append(adapter_weights(kd).clone())
    torch.manual_seed(1)
    random.seed(1)
    if kd is not None: learn.add_cb(After('before_backward', note_adapters))
    way(learn, lambda: [] if kd is None else [kd])
    return learn,(torch.get_rng_state(),random.getstate()),first

# each way with the settings of its Learner
cells = {**{name: (way, {}) for name,way in ways.items()},
         **{f'opt {name}': (fit, dict(opt_func=o)) for name,o in optimizers.items()},
         **{f'cb {name}': (way, {}) for name,way in callbacks.items()}}

@pytest.mark.parametrize('loss', losses)
@pytest.mark.parametrize('way', cells)
def test_cell(make, teacher, tmp_path, way, loss):
    train,settings = cells[way]
    def kd(weight): return KnowledgeDistillationCallback(teacher, losses[loss](), weight=weight)
    plain,plain_states,_ = trained(make, train, None, tmp_path, **settings)
    off,_,_ = trained(make, train, kd(0), tmp_path, **settings)
    on_kd = kd(.5)
    on,on_states,first = trained(make, train, on_kd, tmp_path, **settings)
    assert torch.equal(weights(off), weights(plain)) and not torch.equal(weights(on), weights(plain))
    assert torch.equal(on_states[0], plain_states[0]) and on_states[1]==plain_states[1]
    on.remove_cbs([cb for cb in on.cbs if cb is on_kd])
    assert_untouched(on, teacher)
    assert weights(on).isfinite().all() and len(on_kd.adapters)==(loss!='soft')
    assert loss=='soft' or not torch.equal(adapter_weights(on_kd), first[0])

# --- gradients

class Keeps(Callback):
    "The gradients that the first step takes, of the student and of the adapters"
    order = 1000
    def __init__(self, kd):
        self.kd = kd
        self.grads = None
    def before_step(self):
        if self.grads is not None: return
        models = self.learn.model,self.kd.adapters
        self.grads = [numbers([*(p.grad for p in m.parameters()), torch.zeros(1)]) for m in models]

class Doubles(Callback):
    "Inputs in float64"
    def before_batch(self): self.learn.xb = (self.x.double(),)

@pytest.mark.parametrize('loss', losses)
def test_accumulated_gradients_are_those_of_the_big_batch(make, teacher, loss):
    first = []
    for bs,cbs in ((40, []), (20, [GradientAccumulation(40)]), (10, [GradientAccumulation(40)])):
        student = convnet().double()        # in float64, so that rounding hides nothing
        student.bn1 = nn.Sequential()       # a BatchNorm would see another batch
        student.bn2 = nn.Sequential()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            for p in student.parameters(): nn.init.normal_(p, std=.2)
        kd = KnowledgeDistillationCallback(teacher.double(), losses[loss]())
        keeps = Keeps(kd)
        make(student, bs=bs, wd=0.).fit(1, cbs=[kd, keeps, Doubles(), *cbs])
        first.append(keeps.grads)
    for grads in first[1:]:
        for a,b in zip(grads, first[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12*float(b.abs().max()))

# --- labels that are mixed

@pytest.mark.parametrize('mix', (MixUp, CutMix))
def test_decoupled_kd_mixes_the_values_of_the_two_labels_by_their_share(make, teacher, mix):
    class Looks(Callback):
        "The gradient's loss, and the sum that it should be"
        order = KnowledgeDistillationCallback.order+1
        def after_loss(self):
            if not self.training: return
            mixed = next(cb for cb in self.learn.cbs if isinstance(cb, mix))
            pred = self.pred.detach()
            with torch.no_grad(): teacher_pred = teacher(self.x)
            def each(y):
                items = ((o[i:i+1] for o in (pred, teacher_pred, y)) for i in range(len(y)))
                return torch.stack([DecoupledKD(*item) for item in items])
            share = torch.as_tensor(mixed.lam).expand(len(pred))
            distilled = (share*each(self.y)+(1-share)*each(mixed.yb1[0])).mean()
            seen.append((self.loss_grad.detach(), .5*self.learn.loss_func(pred, self.y)+.5*distilled))
    seen,learn = [],make(cbs=[KnowledgeDistillationCallback(teacher, DecoupledKD), mix()])
    learn.fit(2, cbs=Looks())
    assert len(seen)==4
    for total,want in seen: torch.testing.assert_close(total, want, rtol=1e-5, atol=0)

def of_labels(pred, teacher_pred, target):
    "A function of the user's own that reads labels"
    return 0*pred.sum()

@pytest.mark.parametrize('mix', (MixUp, CutMix))
@pytest.mark.parametrize('loss', (of_labels, SoftTarget(ignore_index=0), ContrastiveRepresentation(40, negatives=4)),
                         ids=('function', 'ignored', 'by place'))
def test_a_loss_that_cannot_mix_two_labels_refuses_before_the_first_step(make, teacher, mix, loss):
    layers = ['flat'] if isinstance(loss, nn.Module) else []
    learn = make(cbs=[KnowledgeDistillationCallback(teacher, Term(loss, *layers)), mix()])
    before = weights(learn)
    with pytest.raises(ValueError, match=f'under {mix.__name__} an item'): learn.fit(1)
    assert torch.equal(weights(learn), before)

# --- use afterwards: as the plain Learner with the same weights

@pytest.fixture(scope='module')
def pictures():
    "Digits as pictures, through fastai's own blocks"
    import numpy as np
    from fastai.vision.all import ImageBlock, PILImageBW
    from sklearn.datasets import load_digits
    x,y = load_digits(return_X_y=True)
    items = [(np.uint8(15*i.reshape(8, 8)), int(t)) for i,t in zip(x[:60], y[:60])]
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=ItemGetter(0), get_y=ItemGetter(1),
                      splitter=IndexSplitter(range(40, 60)))
    return block.dataloaders(items, bs=20, num_workers=0),items

@pytest.fixture
def learners(pictures, teacher, tmp_path, request):
    "One that was distilled and still has the callback; a plain one with its weights"
    def _make():
        torch.manual_seed(0)
        random.seed(0)
        learn = Learner(pictures[0], convnet(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=1e-2,
                        path=tmp_path)
        learn.logger = lambda *_: None
        learn.recorder.add_time = False
        return learn.remove_cb(ProgressCallback)
    on,plain = _make(),_make()
    on.distill(teacher, losses[request.param]())
    on.fit(1)
    plain.model.load_state_dict(on.model.state_dict())
    return on,plain,pictures[1]

def validated(learn, items):
    "Loss and metric of the validation set"
    return torch.tensor(learn.validate())

def predicted(learn, items):
    "Predictions, targets and losses"
    return torch.cat([o.flatten().float() for o in learn.get_preds(with_loss=True)])

def unlabelled(learn, items):
    "Predictions of items without labels"
    return learn.get_preds(dl=learn.dls.test_dl(items[:7]))[0]

def one(learn, items):
    "The prediction of one item"
    with learn.no_bar(): return learn.predict(items[3])[2]

def shown(learn, items):
    "A picture, of which it is tested that there is one"
    with learn.no_bar(): learn.show_results(max_n=4)
    return torch.zeros(1)

def topped(learn, items):
    "The largest losses"
    from fastai.interpret import Interpretation
    with learn.no_bar():
        interpretation = Interpretation.from_learner(learn)
        interpretation.plot_top_losses(3)
        return interpretation.top_losses(5)[0]

def confused(learn, items):
    "The confusion matrix"
    from fastai.interpret import ClassificationInterpretation
    with learn.no_bar(): return torch.tensor(ClassificationInterpretation.from_learner(learn).confusion_matrix())

def summed(learn, items):
    "The summary of the model"
    return torch.tensor([*map(ord, learn.summary().split('Optimizer')[0])])

def exported(learn, items):
    "What a loaded export predicts"
    learn.export('x.pkl')
    again = load_learner(learn.path/'x.pkl')
    with again.no_bar(): return again.predict(items[3])[2]

def saved(learn, items):
    "Loss and metric after saving, a fit, and loading"
    learn.save('x')
    before = weights(learn)
    learn.fit(1)
    learn.load('x')
    assert torch.equal(weights(learn), before)
    return validated(learn, items)

def copied(learn, items):
    "Loss and metric of a deep copy"
    return validated(copy.deepcopy(learn), items)

def pickled(learn, items):
    "Loss and metric of what was pickled"
    learn.logger = noop
    return validated(pickle.loads(pickle.dumps(learn)), items)

uses = dict(validate=validated, get_preds=predicted, test_dl=unlabelled, predict=one, show_results=shown,
            plot_top_losses=topped, confusion_matrix=confused, summary=summed, export=exported, save_load=saved,
            deepcopy=copied, pickle=pickled)

@pytest.mark.parametrize('learners', losses, indirect=True)
@pytest.mark.parametrize('use', uses)
def test_use_afterwards(learners, teacher, use):
    on,plain,items = learners
    assert torch.equal(uses[use](on, items), uses[use](plain, items))
    assert hooks(on.model, teacher)==0 and all(p.requires_grad for p in on.model.parameters())

@pytest.mark.parametrize('learners', losses, indirect=True)
def test_onnx_takes_the_student_as_it_is(learners, tmp_path):
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    if not ismin_torch('2.7'):
        pytest.skip('the exporter of PyTorch 2.6 fails on any BatchNorm with a present onnxscript')
    on,plain,_ = learners
    for learn,name in ((on, 'on.onnx'), (plain, 'plain.onnx')):
        model,x = copy.deepcopy(learn.model).cpu().eval(),torch.randn(2, 1, 8, 8)
        torch.onnx.export(model, (x,), tmp_path/name, dynamo=True, verbose=False)
    a,b = (onnx.load(tmp_path/n).graph for n in ('on.onnx', 'plain.onnx'))
    assert [n.op_type for n in a.node]==[n.op_type for n in b.node] and len(a.initializer)==len(b.initializer)

# --- models

class Tupled(nn.Module):
    "Gives its logits first in a tuple, and takes what else there is"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x),x

class Named(Tupled):
    "Gives its logits in a dict"
    def forward(self, x): return dict(logits=self.net(x), loss=None)

class Untupled(Callback):
    "Takes the logits out of a tuple or dict"
    def after_pred(self):
        if isinstance(self.pred, tuple): self.learn.pred = self.pred[0]
        elif isinstance(self.pred, dict): self.learn.pred = self.pred['logits']

class Two(nn.Module):
    "Of two inputs"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, a, b): return self.net(a+b)

class Doubled(Callback):
    "Two inputs instead of one"
    def before_batch(self): self.learn.xb = (self.x, self.x)

class Shared(nn.Module):
    "Runs one convolution twice"
    def __init__(self, nf):
        super().__init__()
        self.net = convnet(nf)
    def forward(self, x):
        n = self.net
        x = n.pool(n.act1(n.bn1(n.conv1(x))))
        x = n.conv2(n.act2(n.bn2(n.conv2(x))))
        return n.head(n.flat(x))

def tuples(nf):
    "A model that returns a tuple"
    return Tupled(convnet(nf))

def dicts(nf):
    "A model that returns a dict"
    return Named(convnet(nf))

def two_inputs(nf):
    "A model of two inputs"
    return Two(convnet(nf))

def channels_last(nf):
    "A model whose weights lie in another order in memory"
    return convnet(nf).to(memory_format=torch.channels_last)

# each model, made from its width, with the callbacks that it needs
models = dict(in_place=(convnet, []), tuples=(tuples, [Untupled]), dicts=(dicts, [Untupled]),
              two_inputs=(two_inputs, [Doubled]), shared=(Shared, []), channels_last=(channels_last, []))

@pytest.mark.parametrize('loss', losses)
@pytest.mark.parametrize('model', models)
def test_model(make, model, loss):
    net,cbs = models[model]
    where = '' if model in ('in_place', 'channels_last') else 'net.'
    def named(t):
        t.student,t.teacher = ([where+n for n in names] for names in (t.student, t.teacher))
        return t
    torch.manual_seed(0)
    student,teacher = net(4),net(8).train()
    learn = make(student, cbs=[c() for c in cbs])
    terms = [named(t) if isinstance(t, Term) else t for t in losses[loss]()]
    kd = KnowledgeDistillationCallback(teacher, terms)
    before = weights(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, cbs=kd)
    assert not torch.equal(weights(learn), before) and weights(learn).isfinite().all()
    assert all(v==v for v in learn.recorder.values[-1])
    assert_untouched(learn, teacher)

class Synchronized(Callback):
    "Replaces each BatchNorm as `distrib_ctx` does"
    order = 11
    def before_fit(self): self.learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.learn.model)

@pytest.mark.parametrize('loss', losses)
def test_batchnorms_that_are_made_syncbn_when_a_fit_begins_are_tapped(make, teacher, loss):
    ends = []
    for cbs in ([], [Synchronized()]):
        learn = make(cbs=cbs)
        learn.fit(2, cbs=KnowledgeDistillationCallback(teacher, [*losses[loss](), Term(Attention, 'bn2')]))
        ends.append(weights(learn))
        assert hooks(learn.model, teacher)==0
    assert isinstance(learn.model.bn2, nn.SyncBatchNorm) and torch.equal(*ends)

@pytest.mark.parametrize('loss', losses)
def test_a_layer_that_is_replaced_between_fits_is_found_anew(make, teacher, loss):
    learn,kd = make(),KnowledgeDistillationCallback(teacher, losses[loss]())
    learn.add_cb(kd)
    learn.fit(1)
    learn.model.conv2 = nn.Conv2d(4, 4, 3, padding=1)
    learn.create_opt()
    before = learn.model.conv2.weight.clone()
    learn.fit(1)
    assert not torch.equal(learn.model.conv2.weight.cpu(), before)

def test_a_layer_that_is_replaced_in_the_middle_of_a_fit_is_told(make, teacher):
    learn = make()
    def replace(l):
        if l.training and l.iter==0: l.model.conv2 = nn.Conv2d(4, 4, 3, padding=1).to(l.x.device)
    cbs = [KnowledgeDistillationCallback(teacher, losses['hint']()), After('after_batch', replace)]
    with pytest.raises(ValueError, match="the student's layer 'conv2' did not run"): learn.fit(1, cbs=cbs)
    assert hooks(learn.model, teacher)==0
