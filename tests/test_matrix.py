"""The matrix: each way to train, each callback, each use afterwards, each kind of model, with one loss of logits, one of features with a trained adapter, and three terms at once.

In each cell the run with `weight=0` is the plain run bit for bit, the distilled run draws the same random numbers, learns something else, trains its adapters, and leaves nothing behind.
"""
import copy, pickle, random, warnings
from functools import partial

import matplotlib
import pytest
import torch
from conftest import After, adapter_weights, assert_untouched, convnet, hooks, weights
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, ItemGetter
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import Adam, OptimWrapper, ranger
from fasterkd.all import *
from torch import nn

matplotlib.use('Agg')

losses = dict(soft=lambda: [SoftTarget], hint=lambda: [Term(FitNet, 'conv2', adapter='auto')],
              three=lambda: [SoftTarget(T=4), Term(FitNet, 'conv2', adapter='conv'), Term(Attention, ['bn1', 'conv2'], weight=10)])

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
        assert len(preds)==20 and all(v==v for v in self.learn.validate()[:2])        # in the middle of a fit, columns follow
        self.asking = False

class Exports(Callback):
    order = 100     # after the Recorder, whose loss an export takes away
    def after_batch(self):
        if self.training and self.iter==1: self.learn.export('mid.pkl')

# --- ways to train: a Learner and callbacks for its fits

def fine_tuned(learn, cbs): learn.fine_tune(1, cbs=cbs)
def frozen(learn, cbs): learn.freeze(); learn.fit(1, cbs=cbs()); learn.unfreeze(); learn.fit(1, cbs=cbs())
def found(learn, cbs):
    before = weights(learn)
    learn.add_cbs(cbs())
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=6)
    assert torch.equal(weights(learn), before)
    learn.fit(1)
def recreated(learn, cbs): learn.fit(1, cbs=cbs()); learn.create_opt(); learn.fit(1, cbs=cbs())
def twice(learn, cbs): learn.add_cbs(cbs()); learn.fit(1); learn.fit(1)
def resumed(learn, cbs): learn.add_cbs(cbs()); learn.fit(2); learn.fit(4, start_epoch=2)

ways = dict(
    fit=lambda learn, cbs: learn.fit(2, cbs=cbs()), fit_one_cycle=lambda learn, cbs: learn.fit_one_cycle(2, cbs=cbs()), fit_flat_cos=lambda learn, cbs: learn.fit_flat_cos(2, cbs=cbs()),
    fit_sgdr=lambda learn, cbs: learn.fit_sgdr(1, 2, cbs=cbs()), fine_tune=lambda learn, cbs: learn.fine_tune(1, cbs=cbs()), lr_find=found, freeze_unfreeze=frozen,
    slices=lambda learn, cbs: learn.fit_one_cycle(2, slice(1e-4, 1e-2), cbs=cbs()), recreated=recreated, twice=twice, start_epoch=resumed)
optimizers = dict(AdamW=partial(OptimWrapper, opt=torch.optim.AdamW), ranger=ranger)

# --- callbacks

def with_cbs(*makers): return lambda learn, cbs: learn.fit(2, cbs=[*cbs(), *(m() for m in makers)])
def short(learn, cbs):
    learn.fit(1, cbs=[*cbs(), ShortEpochCallback(.5, short_valid=False)])
def shows(learn, cbs):
    learn.add_cb(ProgressCallback())
    with learn.no_bar() if False else warnings.catch_warnings(): learn.fit(2, cbs=[*cbs(), ShowGraphCallback()])
    learn.remove_cb(ProgressCallback)
def smoothed(learn, cbs):
    learn.loss_func = LabelSmoothingCrossEntropyFlat()
    learn.fit(2, cbs=cbs())
    learn.loss_func = CrossEntropyLossFlat()
def low(learn, cbs):
    with torch.autocast('cpu', torch.bfloat16): learn.fit(2, cbs=cbs())

callbacks = dict(
    MixUp=with_cbs(MixUp), CutMix=with_cbs(CutMix), LabelSmoothing=smoothed, GradientAccumulation=with_cbs(partial(GradientAccumulation, 40)), GradientClip=with_cbs(partial(GradientClip, .1)),
    MixedPrecision=with_cbs(MixedPrecision), MixedPrecision_bf16=with_cbs(partial(MixedPrecision, amp_mode='bf16')), autocast_bf16=low, ChannelsLast=with_cbs(ChannelsLast),
    EarlyStopping=with_cbs(partial(EarlyStoppingCallback, patience=1)), SaveModel=with_cbs(SaveModelCallback), SaveModel_with_opt=with_cbs(partial(SaveModelCallback, with_opt=True)),
    ReduceLROnPlateau=with_cbs(partial(ReduceLROnPlateau, patience=1)), CSVLogger=with_cbs(CSVLogger), ShowGraph=shows,
    ParamScheduler=with_cbs(lambda: ParamScheduler({'lr': SchedCos(1e-2, 1e-4), 'mom': SchedLin(.9, .8)})), average=with_cbs(Average), asks=with_cbs(Asks), export=with_cbs(Exports), ShortEpoch=short,
    BnFreeze=with_cbs(BnFreeze), MixUp_and_accumulation=with_cbs(MixUp, partial(GradientAccumulation, 40)))

@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

def states(): return torch.get_rng_state(),random.getstate()

def trained(make, way, kd, tmp_path, **kwargs):
    "A Learner that was trained so, the random states afterwards, and the adapters as they were in the first batch"
    learn,first = make(splitter=groups, **kwargs),[]
    learn.path = tmp_path
    torch.manual_seed(1); random.seed(1)
    if kd is not None: learn.add_cb(After('before_backward', lambda _: first.append(adapter_weights(kd).clone()) if len(kd.adapters) and not first else None))
    way(learn, lambda: [] if kd is None else [kd])
    return learn,states(),first

@pytest.mark.parametrize('loss', losses)
@pytest.mark.parametrize('way', [*ways, *(f'opt {o}' for o in optimizers), *(f'cb {c}' for c in callbacks)])
def test_cell(make, teacher, tmp_path, way, loss):
    more = dict(opt_func=optimizers[way[4:]]) if way.startswith('opt') else {}
    f = ways['fit'] if way.startswith('opt') else callbacks[way[3:]] if way.startswith('cb') else ways[way]
    def kd(weight): return KnowledgeDistillationCallback(teacher, losses[loss](), weight=weight)
    (plain,then,_),(off,*_) = trained(make, f, None, tmp_path, **more),trained(make, f, kd(0), tmp_path, **more)
    on,now,first = trained(make, f, on_kd := kd(.5), tmp_path, **more)
    assert torch.equal(weights(off), weights(plain)) and not torch.equal(weights(on), weights(plain))
    assert torch.equal(now[0], then[0]) and now[1]==then[1]
    on.remove_cbs([cb for cb in on.cbs if cb is on_kd])
    assert_untouched(on, teacher)
    assert weights(on).isfinite().all() and len(on_kd.adapters)==(loss!='soft')
    assert loss=='soft' or not torch.equal(adapter_weights(on_kd), first[0])
