"What a comparison promises that its page cannot show: killed processes, loaders that draw, callbacks that save."
import json, linecache, math, random, subprocess, sys, types
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedCos
from fastai.callback.training import GradientAccumulation
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.transforms import ItemTransform
from fastai.learner import CastToTensor, Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy, accuracy_multi, error_rate, mae
from fastai.vision.augment import aug_transforms
from fasterkd.all import *
from fasterkd.cifar import digits32, images_dls
from fasterkd.comparison import unpacked
from fasterkd.descriptions import described
from fasterkd.evaluation import evaluated
from fasterkd.losses import VariationalInformation
from fasterkd.metric_directions import less_is_better
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
path,runs = sys.argv[1],[]
def fit(learn, cbs):
    runs.append(1)
    if len(runs)==int(sys.argv[2]): os._exit(9)
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

two_epochs = partial(Learner.fit, n_epoch=2, lr=1e-2)

def equal(res, a='student alone', b='nothing'): return res.values(a, 'valid_loss')==res.values(b, 'valid_loss')

def test_runs_of_one_seed_see_the_same_augmented_images_where_the_loaders_are_shared_and_new():
    train,test = digits32()
    dls = images_dls(train.subset(range(64)), test.subset(range(32)), bs=16, batch_tfms=aug_transforms(size=32))
    def net(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    def make(): return Learner(dls, net(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    assert equal(compare(make, {'nothing': nothing}, two_epochs, 2, net(), show=False))

@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pytorch_loaders_with_a_generator_give_the_same_batches(workers):
    generator = torch.Generator().manual_seed(3)
    loader = partial(torch.utils.data.DataLoader, TensorDataset(x, y), 20, generator=generator, num_workers=workers)
    loaders = [loader(shuffle=s) for s in (True, False)]
    def make(): return learner(dls=DataLoaders(*loaders))
    assert equal(compare(make, {'nothing': nothing}, two_epochs, 2, nn.Linear(4, 2), show=False))

def test_data_with_random_numbers_of_their_own_are_refused():
    rng = torch.Generator().manual_seed(0)
    class Noisy(TensorDataset):
        def __getitem__(self, i): return x[i]+torch.randn(4, generator=rng),y[i]
    def make(): return learner(dls=DataLoaders.from_dsets(Noisy(x, y), TensorDataset(x, y), bs=20, num_workers=0))
    with pytest.raises(ValueError, match='does not begin as'):
        compare(make, {'nothing': nothing}, 1, 1, nn.Linear(4, 2), show=False)

monitors = [partial(cb, monitor='accuracy') for cb in (SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau)]

@pytest.mark.parametrize('cb', [*monitors[:2], CSVLogger, monitors[2]])
def test_callbacks_that_save_stop_or_log_do_not_take_judging_for_a_fit(cb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def make(): return learner(cb())
    fit = partial(Learner.fit, n_epoch=3, lr=1e-2)
    assert equal(compare(make, {'nothing': nothing}, fit, 2, nn.Linear(4, 2), show=False))
    if cb is CSVLogger: assert len((tmp_path/'history.csv').read_text().splitlines())==1+3

def test_a_run_that_diverged_does_not_load_what_another_has_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):      # as in a fit of its own: SaveModelCallback has saved nothing
        fit = partial(Learner.fit, n_epoch=2, lr=.1)
        compare(lambda: learner(SaveModelCallback()), {'bad': Diverge}, fit, 2, show=False)

def test_a_run_that_diverged_is_shown_as_nan():
    res = compare(learner, {'bad': Diverge}, partial(Learner.fit, n_epoch=2, lr=.1), 2, show=False)
    assert all(math.isnan(v) for v in res.values('bad', 'valid_loss'))
    assert not any(math.isnan(v) for v in res.values('student alone', 'valid_loss'))

def test_an_adapter_that_is_given_as_a_module_starts_anew_in_each_run():
    adapter = nn.Linear(2, 8)
    before = adapter.weight.clone()
    layers = dict(activations_student='0', activations_teacher='0')
    way = partial(KnowledgeDistillationCallback, loss=FitNet, adapter=adapter, **layers)
    def make():
        net = nn.Sequential(nn.Linear(4, 2))
        return Learner(learner().dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    wide = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    res = compare(make, {'a': way, 'b': way}, two_epochs, 2, wide, show=False)
    assert equal(res, 'a', 'b') and torch.equal(adapter.weight, before)

def test_sequences_may_differ_in_length_from_batch_to_batch():
    batches = [(torch.randn(4, n, 3), torch.zeros(4, n, dtype=torch.long)) for n in (5, 7)]
    def make():
        dls = DataLoaders(batches, batches)
        return Learner(dls, nn.Linear(3, 2), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    soft = partial(KnowledgeDistillationCallback, loss=SoftTarget)
    res = compare(make, {'soft': soft}, partial(Learner.fit, n_epoch=1), 2, nn.Linear(3, 2), show=False)
    assert res.names==['teacher', 'student alone', 'soft'] and all(r.agreement is not None for r in res.of('soft'))

def test_a_loss_that_learns_starts_anew_in_each_run():
    loss = VariationalInformation()
    way = partial(KnowledgeDistillationCallback, loss=Term(loss, '0'))
    wide = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    def deep():
        res = learner()
        res.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return res
    fit = partial(Learner.fit, n_epoch=1, lr=.1)
    res = compare(deep, {'a': lambda t: way(t), 'b': lambda t: way(t)}, fit, 2, teacher=wide, show=False)
    assert equal(res, 'a', 'b') and not equal(res, 'student alone', 'a') and loss.parts is None

def separate(n=16, seed=1):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, 0]>0).long())

def little(loss_func=None, valid=None, metrics=accuracy, **kwargs):
    dls = DataLoaders.from_dsets(separate(24, 0), valid or separate(), bs=8, num_workers=0, **kwargs)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    return Learner(dls, net, loss_func=loss_func or CrossEntropyLossFlat(), metrics=metrics)

def knows(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, 2)

def asked(model, x): return model(x).argmax(1)
def right(model, held=None):
    x,y = (held or separate()).tensors
    with torch.no_grad(): return (asked(model, x)==y).float().mean().item()

short = partial(compare, fit=1, show=False)
kd = KnowledgeDistillationCallback
def accuracies(res): return [r.metrics['accuracy'] for r in res.of('teacher')]

def test_a_module_that_has_other_weights_for_each_seed_is_asked_anew():
    model = knows(0)
    def of(seed):
        model.load_state_dict(knows(seed).state_dict())
        return model
    assert accuracies(short(little, {'kd': kd}, seeds=[1, 2, 3], teacher=of))==[right(knows(s)) for s in (1, 2, 3)]

def test_the_teachers_loss_is_that_of_each_seeds_loss_function():
    def make(): return little(CrossEntropyLossFlat(weight=torch.rand(2)*5))
    one,two = (r.metrics['valid_loss'] for r in short(make, {'kd': kd}, seeds=2, teacher=knows(0)).of('teacher'))
    assert one!=two

def still(learn, cbs): learn.fit(1, 0., wd=0, cbs=cbs)       # the student stays as it is

class Shifted:
    def __init__(self, by): self.by = torch.tensor(by)
    def __call__(self, x): return x+self.by

def test_what_a_teacher_sees_through_is_told_apart_by_the_object():
    model,x = knows(0),separate().tensors[0]
    res = short(little, {'kd': kd}, seeds=2, teacher=lambda s: Teacher(model, tfm=Shifted(5.*s)))
    assert accuracies(res)==[right(lambda x: model(x+5*s)) for s in (0, 1)]
    a,b = Teacher(model, tfm=Shifted(0.)),Teacher(model, tfm=Shifted(50.))
    def fit(learn, cbs): learn.fit(1, 0., cbs=cbs)
    res = compare(little, {'a': lambda: kd(a, weight=0), 'b': lambda: kd(b, weight=0)}, fit, seeds=1, show=False)
    agree = asked(model, x)==asked(model, x+50)
    assert (res.of('a')[0].agreement!=res.of('b')[0].agreement) or agree.all()

class Bag:
    "Items that a hash cannot tell apart"
    def __init__(self, x): self.x = x
    def __repr__(self): return 'Bag'

def test_batches_of_objects_are_never_taken_for_each_other():
    class Opened(nn.Linear):
        def forward(self, x): return super().forward(x.x if isinstance(x, Bag) else x)
    class Bagged(ItemTransform):
        def encodes(self, b): return Bag(b[0]),b[1]
    def make():
        learn = little(valid=separate(seed=torch.randint(100, ()).item()), after_batch=[Bagged()])
        learn.model = Opened(4, 2)
        return learn
    def on_its_own(seed): return accuracies(short(make, {'kd': kd}, seeds=[seed], teacher=model))
    model = Opened(4, 2)
    assert accuracies(short(make, {'kd': kd}, seeds=3, teacher=model))==[v for s in range(3) for v in on_its_own(s)]

def test_agreement_is_of_the_same_items_where_validation_is_shuffled():
    def make():
        learn = little()
        learn.dls = DataLoaders(learn.dls.train, learn.dls.valid.new(shuffle=True))
        learn.model = knows(3)
        return learn
    res = compare(make, {'kd': kd}, still, seeds=2, teacher=knows(3), show=False)
    assert [r.agreement for r in res.of('kd')]==[1, 1]

def test_a_teacher_without_parameters_is_judged():
    class Rule(nn.Module):
        def forward(self, x): return torch.stack([-x[:, 0], x[:, 0]], 1)
    assert accuracies(short(little, {'kd': kd}, seeds=1, teacher=Rule()))==[1]

def test_what_a_fit_sets_on_the_learner_does_not_judge_it():
    def smoothed(learn, cbs):
        learn.loss_func = CrossEntropyLossFlat(label_smoothing=.9)
        learn.metrics = []
        still(learn, cbs)
    res = compare(little, {'kd': (lambda: kd(knows(0)), smoothed)}, still, seeds=1, show=False)
    assert equal(res, 'student alone', 'kd') and res.values('kd')==res.values('student alone')

class Types(Callback):
    order = CastToTensor.order+1
    def before_batch(self): seen.append(type(self.x))

class Items(torch.Tensor): pass
seen = []

@pytest.mark.parametrize('casts', [True, False])
def test_a_model_is_judged_with_the_cast_to_tensors_only_if_its_learner_has_it(casts):
    class Typed(ItemTransform):
        def encodes(self, b): return b[0].as_subclass(Items),b[1]
    learn = little(after_batch=[Typed()])
    learn.add_cb(Types())
    if not casts: learn.remove_cb(CastToTensor)
    seen.clear()
    evaluated(learn)
    assert {*seen}=={torch.Tensor if casts else Items}

class Slow(Callback):
    def __init__(self, every):
        self.every = every
        self.n = 0
    def after_batch(self): self.n += 1

def changed(learn, **kwargs):
    for k,v in kwargs.items(): setattr(learn, k, v)
    return learn

def strided(stride=1, act=nn.ReLU()):
    conv = nn.Conv1d(1, 3, 3, stride, 1)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), conv, act, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 2))

def of(*args, cbs=None, **kwargs):
    learn = Learner(little().dls, strided(*args), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)
    return changed(learn, **kwargs)

def last_item_other():
    x,y = (t.clone() for t in separate().tensors)
    x[-1] += 1
    return of(dls=little(valid=TensorDataset(x, y)).dls)
def last_label_other():
    x,y = (t.clone() for t in separate().tensors)
    y[-1] = 1-y[-1]
    return of(dls=little(valid=TensorDataset(x, y)).dls)

others = dict(stride=(lambda: of(2), 'model was 1: Conv1d'),
              activation=(lambda: of(1, nn.GELU()), 'model was 2: ReLU'),
              frozen=(lambda: of(model=strided().requires_grad_(False)), 'model'),
              callback=(lambda: of(cbs=MixUp(.4)), 'callbacks was without that, and now is MixUp'),
              item=(last_item_other, 'validation items'),
              label=(last_label_other, 'validation items'),
              loss=(lambda: of(loss_func=CrossEntropyLossFlat(label_smoothing=.1)), 'loss function'),
              optimizer=(lambda: of(wd=.1), 'optimizer was wd=None, and now is wd=0.1'))

@pytest.mark.parametrize('make,what', others.values(), ids=others)
def test_a_file_of_runs_is_refused_where_make_gives_something_else_even_if_nothing_is_left_to_run(make, what, tmp_path):
    held = partial(short, distillations={}, seeds=1, path=tmp_path/'runs.json')
    held(of)
    assert len(held(of).runs)==1
    with pytest.raises(ValueError, match=f'make: {what}'): held(make)

def test_a_callback_with_another_setting_is_noticed_and_what_a_fit_changes_in_a_shared_one_is_not(tmp_path):
    shared = [Slow(1), SaveModelCallback(monitor='accuracy'), GradientAccumulation(16), MixUp(.4), ReduceLROnPlateau(),
              CSVLogger(tmp_path/'log.csv')]
    held = partial(short, distillations={}, seeds=2, path=tmp_path/'runs.json')
    held(partial(of, cbs=shared))
    assert shared[0].n and len(held(partial(of, cbs=shared)).runs)==2
    with pytest.raises(ValueError, match='make: callbacks was MixUp'):
        held(partial(of, cbs=[*shared[:3], MixUp(.2), *shared[4:]]))

def test_to_describe_what_make_gives_leaves_the_runs_bit_for_bit(tmp_path):
    train,test = digits32()
    dls = images_dls(train.subset(range(32)), test.subset(range(32)), bs=16, batch_tfms=aug_transforms(size=32))
    def make():
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    def values(**kwargs):
        res = compare(make, {}, partial(Learner.fit, n_epoch=1, lr=1e-2), 2, show=False, **kwargs)
        return res.values('student alone', 'valid_loss')
    before = torch.get_rng_state(),random.getstate()
    assert values(path=tmp_path/'runs.json')==values()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate()==before[1]

def three(make, loss, metric, seeds=3):
    return compare(partial(make, metrics=metric), {'kd': loss}, 1, seeds, nn.Linear(4, 2), show=False)

def of_targets(f, loss_func, metrics):
    x = separate(24).tensors[0]
    dls = DataLoaders.from_dsets(*[TensorDataset(x, f(x[:, :2]))]*2, bs=8, num_workers=0)
    return Learner(dls, nn.Linear(4, 2), loss_func=loss_func, metrics=metrics)

multi = partial(of_targets, lambda x: (x>0).float(), BCEWithLogitsLossFlat())
numbers = partial(of_targets, lambda x: x, MSELossFlat())
of_classes = [(little, SoftTarget, accuracy, 16), (little, SoftTarget, error_rate, 16),
              (multi, BinarySoftTarget, accuracy_multi, 48)]

@pytest.mark.parametrize('make,loss,metric,n', of_classes)
def test_an_interval_is_never_narrower_than_the_metric_can_show(make, loss, metric, n):
    res = three(make, loss, metric)
    g,least = res.gain('kd'),4.302*(1/n)/6**.5/3**.5
    assert g.high-g.mean>=least and g.mean-g.low>=least
    assert f'the choice of the {res.runs[0].items} validation items' in res.note

def test_what_is_right_of_each_item_is_kept_and_its_mean_is_the_metric():
    for make,loss,metric in ((little, SoftTarget, accuracy), (multi, BinarySoftTarget, accuracy_multi)):
        for r in three(make, loss, metric, 1).runs:
            assert abs(unpacked(r.right, r.items).mean()-r.metrics[metric.__name__])<1e-6

def test_the_note_says_that_validation_items_are_not_covered_where_the_metric_is_no_mean_of_what_is_right():
    res = three(numbers, Logits, mae)
    assert not res.runs[0].right and res.gain('kd').low<res.gain('kd').high
    assert 'The choice of validation items is not covered' in res.note

@pytest.mark.parametrize('seeds', [1, 2])
def test_fewer_than_three_seeds_have_no_interval(seeds):
    res = three(little, SoftTarget, accuracy, seeds)
    assert math.isnan(res.gain('kd').low) and math.isnan(res.gain('kd').high) and '[' not in repr(res.table)
    assert json.loads(res.row('t', 1, 'kd'))['gain'][1:]==[None, None]

def test_items_are_compared_one_by_one_where_validation_is_shuffled():
    def make(metrics):
        learn = little(metrics=metrics)
        learn.dls = DataLoaders(learn.dls.train, learn.dls.valid.new(shuffle=True))
        learn.model = knows(3)
        return learn
    res = compare(partial(make, metrics=accuracy), {}, still, seeds=3, show=False)
    assert len({r.right for r in res.runs})==1

class Learns(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)
    def forward(self, pred, teacher_pred, **kwargs): return nn.functional.mse_loss(self.head(pred), teacher_pred)

def own(pred, teacher_pred, **kwargs): return nn.functional.mse_loss(pred, teacher_pred)

losses = dict(function=SoftTarget, settings=SoftTarget(T=4), partial=partial(SoftTarget, T=4),
              published=SoftTarget.published, own=own, term=Term(FitNet, '0', adapter=nn.Linear(3, 3)),
              module=Learns(), list=[SoftTarget, Term(FitNet, '0')],
              dict={'a': SoftTarget, 'b': own}, fit=(Learns(), partial(Learner.fit, n_epoch=1)))

@pytest.mark.parametrize('loss', losses.values(), ids=losses)
def test_compare_takes_what_distill_takes_as_a_loss_and_each_run_begins_anew(loss):
    wide = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    res = short(little, {'a': loss, 'b': loss}, seeds=1, teacher=wide)
    assert equal(res, 'a', 'b') and res.of('a')[0].agreement is not None

def test_a_loss_without_a_teacher_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r'compare was given no teacher: compare\(..., teacher=...\)'):
        short(little, {'s': SoftTarget(T=4)}, seeds=1)

def test_best_asks_where_the_name_of_a_metric_does_not_tell_and_the_answer_is_kept(tmp_path):
    def regret(pred, y): return (pred.argmax(1)!=y).float().mean()
    held = partial(short, partial(little, metrics=regret), {'kd': SoftTarget}, seeds=1, teacher=nn.Linear(4, 2),
                   path=tmp_path/'runs.json')
    with pytest.raises(ValueError, match='less_is_better='): held().best()
    res = held(less_is_better=True)
    assert res.less and held().less and Comparison.from_json(tmp_path/'runs.json').less and res.against('kd').less
    assert less_is_better('regret') is None and 'is better' not in held(less_is_better=False).note

# --- what is read by name

def deep(act):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 2))

def in_a_notebook(T=1, scale='x'):
    "A way to distil as a cell defines it, which reads globals; it has no source"
    cell = types.ModuleType('cell')
    exec(f"""
from fasterkd.all import KnowledgeDistillationCallback, SoftTarget
T = {T}
def helper(x): return {scale}
def loss(pred, teacher_pred, **kwargs): return helper((pred-teacher_pred).pow(2).mean())
def soft(teacher): return KnowledgeDistillationCallback(teacher, SoftTarget(T=T))
def own(teacher): return KnowledgeDistillationCallback(teacher, loss)
""", vars(cell))
    return cell

def test_a_resumed_comparison_notices_globals_helpers_schedules_and_the_structure_of_the_teacher(tmp_path):
    def held(name, way, act=nn.ReLU()):
        return short(of, distillations={'s': way}, seeds=1, path=tmp_path/f'{name}.json', teacher=deep(act))
    def rising(*ends): return Term(SoftTarget, schedule=SchedCos(*ends))
    pairs = dict(globals=(in_a_notebook().soft, in_a_notebook(T=8).soft, 'globals of'),
                 helpers=(in_a_notebook().own, in_a_notebook(scale='3*x').own, 'globals of'),
                 schedules=(rising(0, 1), rising(1, 0), "distillation 's' was .*start=0"))
    for name,(a,b,where) in pairs.items():
        held(name, a)
        assert len(held(name, a).runs)==3
        with pytest.raises(ValueError, match=where): held(name, b)
    held('teacher', SoftTarget)
    with pytest.raises(ValueError, match='teacher was 1: ReLU'): held('teacher', SoftTarget, nn.Tanh())

def test_a_resumed_comparison_notices_other_training_items(tmp_path):
    def held(seeds, shift=0):
        def make():
            items = [(x, (y+shift)%2) for x,y in separate(24, 0)]
            dls = DataLoaders.from_dsets(items, separate(), bs=8, num_workers=0)
            return Learner(dls, nn.Linear(4, 2), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        return short(make, {}, seeds=seeds, path=tmp_path/'runs.json')
    assert len(held(1).runs)==1 and len(held(2).runs)==2
    with pytest.raises(ValueError, match='make: training items was'): held(3, shift=1)

def test_a_file_whose_functions_were_described_by_their_bytecode_is_shown_and_not_continued(tmp_path):
    held = partial(short, little, {}, seeds=1, path=tmp_path/'runs.json')
    held(fit=two_epochs)
    content = json.loads((tmp_path/'runs.json').read_text())
    content['settings'] = {'fit': 'train a4fd071b'}
    (tmp_path/'runs.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match='written by an earlier version.*Give another path'): held(fit=two_epochs)
    assert len(Comparison.from_json(tmp_path/'runs.json').runs)==1

# --- what a function does is known by its source

def test_two_lambdas_on_one_line_are_told_apart_with_or_without_columns():
    names = (lambda t: t.sum(), lambda t: t.mean())
    assert described(names[0])!=described(names[1])
    if sys.version_info>=(3, 11):
        same_names = (lambda t: t+1, lambda t: t-1, lambda t: lambda t: t-1)
        assert len({described(f) for f in same_names})==3

def test_layout_comments_and_docstrings_change_no_description():
    def of_source(text):
        name = f'<{hash(text)}>'
        linecache.cache[name] = len(text),None,text.splitlines(True),name
        names = {}
        exec(compile(text, name, 'exec'), names)
        return described(names['f'])
    assert of_source('def f(x): return x+1')==of_source('# more\n\ndef f(x):\n    "Docs"\n    return (x +\n   1)')
    assert of_source('def f(x): return x+1')!=of_source('def f(x): return x-1')
