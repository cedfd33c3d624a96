"What a comparison promises that its page cannot show: killed processes, loaders with random numbers of their own, callbacks that save and stop."
import json, math, subprocess, sys
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import aug_transforms
from fasterkd.all import *
from fasterkd.cifar import digits32, images_dls
from torch import nn
from torch.utils.data import TensorDataset

script = '''
import os, sys, json
from functools import partial
from fastai.basics import *
from fastai.callback.schedule import *
from fasterkd.all import *
from torch.utils.data import TensorDataset
x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0]>0).long()
dls = DataLoaders.from_dsets(TensorDataset(x, y), TensorDataset(x, y), bs=20, num_workers=0)
def net(n): return nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Dropout(.5), nn.Linear(n, 2))
def make(): return Learner(dls, net(4), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
torch.manual_seed(7); teacher = net(16)
hint = partial(KnowledgeDistillationCallback, loss=FitNet, activations_student='0', adapter='auto')
path,dies_at,runs = sys.argv[1],int(sys.argv[2]),[]
def fit(learn, cbs):
    runs.append(1)
    if len(runs)==dies_at: os._exit(9)
    learn.fit(2, 1e-2, cbs=cbs)
res = compare(make, {'hint': hint}, fit, 2, teacher, path=path, show=False)
print(json.dumps([len(runs), [[r.name, r.seed, r.metrics, r.agreement] for r in res.runs]]))
'''

def run(path, dies_at=0):
    r = subprocess.run([sys.executable, '-c', script, str(path), str(dies_at)], capture_output=True, text=True)
    return r.returncode,r.stdout.splitlines()[-1:],r.stderr

def test_a_comparison_whose_process_died_goes_on_and_ends_as_one_that_did_not(tmp_path):
    died,_,_ = run(tmp_path/'a.json', dies_at=3)
    assert died==9
    code,again,err = run(tmp_path/'a.json')
    assert code==0, err
    _,whole,_ = run(tmp_path/'b.json')
    (n_again,runs_again),(n_whole,runs_whole) = json.loads(again[0]),json.loads(whole[0])
    assert (n_again, n_whole)==(2, 4) and runs_again==runs_whole

x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
y = (x[:, 0]>0).long()

def learner(*cbs, dls=None):
    dls = dls or DataLoaders.from_dsets(TensorDataset(x, y), TensorDataset(x, y), bs=20, num_workers=0)
    return Learner(dls, nn.Linear(4, 2), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)

class Diverge(Callback):
    def after_loss(self): self.learn.loss_grad = self.loss_grad*float('nan')

def nothing(teacher): return KnowledgeDistillationCallback(teacher, SoftTarget, weight=0)

def equal(res, a='student alone', b='nothing'): return res.values(a, 'valid_loss')==res.values(b, 'valid_loss')

def test_runs_of_one_seed_see_the_same_augmented_images_where_the_loaders_are_shared_and_new():
    train,test = digits32()
    dls = images_dls(train.subset(range(64)), test.subset(range(32)), bs=16, batch_tfms=aug_transforms(size=32))
    def make(): return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    assert equal(compare(make, {'nothing': nothing}, partial(Learner.fit, n_epoch=2, lr=1e-2), 2, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), show=False))

@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pytorch_loaders_with_a_generator_give_the_same_batches(workers):
    generator = torch.Generator().manual_seed(3)
    loaders = [torch.utils.data.DataLoader(TensorDataset(x, y), 20, shuffle=s, generator=generator, num_workers=workers) for s in (True, False)]
    assert equal(compare(lambda: learner(dls=DataLoaders(*loaders)), {'nothing': nothing}, partial(Learner.fit, n_epoch=2, lr=1e-2), 2, nn.Linear(4, 2), show=False))

def test_data_with_random_numbers_of_their_own_are_refused():
    rng = torch.Generator().manual_seed(0)
    class Noisy(TensorDataset):
        def __getitem__(self, i): return x[i]+torch.randn(4, generator=rng),y[i]
    def make(): return learner(dls=DataLoaders.from_dsets(Noisy(x, y), TensorDataset(x, y), bs=20, num_workers=0))
    with pytest.raises(ValueError, match='does not begin as'): compare(make, {'nothing': nothing}, 1, 1, nn.Linear(4, 2), show=False)

@pytest.mark.parametrize('cb', [partial(SaveModelCallback, monitor='accuracy'), partial(EarlyStoppingCallback, monitor='accuracy'), CSVLogger, partial(ReduceLROnPlateau, monitor='accuracy')])
def test_callbacks_that_save_stop_or_log_do_not_take_judging_for_a_fit(cb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert equal(compare(lambda: learner(cb()), {'nothing': nothing}, partial(Learner.fit, n_epoch=3, lr=1e-2), 2, nn.Linear(4, 2), show=False))
    if cb is CSVLogger: assert len((tmp_path/'history.csv').read_text().splitlines())==1+3

def test_a_run_that_diverged_does_not_load_what_another_has_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):      # as in a fit of its own: SaveModelCallback has saved nothing
        compare(lambda: learner(SaveModelCallback()), {'bad': Diverge}, partial(Learner.fit, n_epoch=2, lr=.1), 2, show=False)

def test_a_run_that_diverged_is_shown_as_nan():
    res = compare(learner, {'bad': Diverge}, partial(Learner.fit, n_epoch=2, lr=.1), 2, show=False)
    assert all(math.isnan(v) for v in res.values('bad', 'valid_loss')) and not any(math.isnan(v) for v in res.values('student alone', 'valid_loss'))

def test_an_adapter_that_is_given_as_a_module_starts_anew_in_each_run():
    adapter = nn.Linear(2, 8)
    before = adapter.weight.clone()
    way = partial(KnowledgeDistillationCallback, loss=FitNet, activations_student='0', activations_teacher='0', adapter=adapter)
    def make(): return Learner(learner().dls, nn.Sequential(nn.Linear(4, 2)), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    res = compare(make, {'a': way, 'b': way}, partial(Learner.fit, n_epoch=2, lr=1e-2), 2, nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), show=False)
    assert equal(res, 'a', 'b') and torch.equal(adapter.weight, before)

def test_sequences_may_differ_in_length_from_batch_to_batch():
    batches = [(torch.randn(4, n, 3), torch.zeros(4, n, dtype=torch.long)) for n in (5, 7)]
    def make(): return Learner(DataLoaders(batches, batches), nn.Linear(3, 2), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    res = compare(make, {'soft': partial(KnowledgeDistillationCallback, loss=SoftTarget)}, partial(Learner.fit, n_epoch=1), 2, nn.Linear(3, 2), show=False)
    assert res.names==['teacher', 'student alone', 'soft'] and all(r.agreement is not None for r in res.of('soft'))

def test_a_loss_that_learns_starts_anew_in_each_run():
    from fasterkd.losses import VariationalInformation
    loss = VariationalInformation()
    way = partial(KnowledgeDistillationCallback, loss=Term(loss, '0'))
    wide = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    def deep():
        res = learner()
        res.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return res
    res = compare(deep, {'a': lambda t: way(t), 'b': lambda t: way(t)}, partial(Learner.fit, n_epoch=1, lr=.1), 2, teacher=wide, show=False)
    assert equal(res, 'a', 'b') and not equal(res, 'student alone', 'a') and loss.parts is None
