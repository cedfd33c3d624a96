"Cached teachers where a notebook cannot look: killed runs, several processes, full disks, other callbacks, compiling."
import errno, json, multiprocessing as mp, os, re, shutil, signal, struct
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import After, assert_untouched, convnet, device, weights
from fastai.callback.core import Callback, CancelBatchException, CancelTrainException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import IntToFloatTensor, ItemTransform, Normalize, ToTensor
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import TensorImage, TensorMask
from fastai.vision.augment import RandTransform, Resize
from fastai.vision.core import PILImage, imagenet_stats
from fasterkd import cache_file, cached as cached_module
from fasterkd.all import CachedTeacher, FitNet, KnowledgeDistillationCallback, SoftTarget, Teacher, compare
from torch import nn
from torch.nn import functional as F

n_items,bs = 50,8
n_batches = -(-n_items//bs)

class Items:
    split_idx = 0
    def __init__(self): self.x = torch.randn(n_items, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    def __len__(self): return n_items
    def __getitem__(self, i): return self.x[i],torch.tensor(i%10)

def loaders(bs=bs, **kwargs):
    kwargs = {'shuffle': True, **kwargs}
    return DataLoaders(*(TfmdDL(Items(), bs=bs, num_workers=0, **kwargs) for _ in range(2)))

def a_teacher(kills_at=None):
    "Kills its process when it is asked for the so-manyth time"
    torch.manual_seed(0)
    model,asked = convnet(8),[]
    def die(*_):
        asked.append(1)
        if len(asked)-1==kills_at: os.kill(os.getpid(), signal.SIGKILL)
    model.register_forward_pre_hook(die)
    return model

def fill(path, kills_at=None, views=None):
    torch.set_num_threads(1)
    CachedTeacher(a_teacher(kills_at), path, features=['conv2'], views=views).fill(loaders(), show=False)

@pytest.fixture(scope='module')
def processes():
    if 'forkserver' not in mp.get_all_start_methods(): pytest.skip('no processes that are forked and killed here')
    ctx = mp.get_context('forkserver')
    ctx.set_forkserver_preload(['fastai.basics', 'fasterkd.all', 'conftest'])
    def start(*args):
        p = ctx.Process(target=fill, args=args)
        p.start()
        return p
    return start

def ended(p):
    p.join(120)
    if p.is_alive(): p.kill()
    return p.exitcode

@pytest.mark.parametrize('views', [None, 2])
def test_a_fill_that_was_killed_anywhere_goes_on_to_the_same_file(processes, tmp_path, views):
    whole = tmp_path/'whole'
    assert ended(processes(whole, None, views))==0
    total = n_batches*(views or 1)
    for at in range(total+1):       # the second question is whether the teacher says the same again
        done = at if at<2 else at-1
        path = tmp_path/f'killed at {at}'
        assert ended(processes(path, at, views))==-signal.SIGKILL
        asked = []
        with pytest.MonkeyPatch.context() as m:
            answer = Teacher._answer
            m.setattr(Teacher, '_answer', lambda *args: asked.append(1) or answer(*args))
            torch.set_num_threads(1)
            fill(path, views=views)
        assert path.read_bytes()==whole.read_bytes() and len(asked)==total-done+(done<total)

def test_two_processes_fill_one_file_as_one_does(processes, tmp_path):
    both = [processes(tmp_path/'two') for _ in range(2)]
    assert [ended(p) for p in both]==[0, 0] and ended(processes(tmp_path/'one'))==0
    assert (tmp_path/'two').read_bytes()==(tmp_path/'one').read_bytes()
    assert {p.name for p in tmp_path.iterdir()}=={'one', 'two'}

def test_a_full_disk_is_told_before_anything_is_computed_further(tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    with pytest.raises(ValueError, match='No space left on device. Give another path, or keep less'): fill(tmp_path/'x')
    assert not [*tmp_path.iterdir()]

def test_a_file_that_was_cut_off_is_refused(tmp_path):
    fill(tmp_path/'x')
    os.truncate(tmp_path/'x', (tmp_path/'x').stat().st_size-1)
    says = 'holds no answers of a teacher .it was cut off.: give another path, or remove the file'
    with pytest.raises(ValueError, match=says): fill(tmp_path/'x')

def test_safetensors_reads_the_file(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    fill(tmp_path/'x')
    kept = safetensors.load_file(tmp_path/'x')
    assert kept['done'].all() and kept['pred'].shape==(n_items, 10) and kept['feature conv2'].dtype==torch.float16

def fit(learn, **kwargs): learn.fit(2, **kwargs)
def fit_one_cycle(learn, **kwargs): learn.fit_one_cycle(2, **kwargs)
def fine_tune(learn, **kwargs): learn.fine_tune(1, **kwargs)

@pytest.mark.parametrize('fit', [fit, fit_one_cycle, fine_tune], ids=['fit', 'fit_one_cycle', 'fine_tune'])
def test_a_cached_teacher_trains_as_the_live_one(make, teacher, fit):
    res = {}
    for name,t in dict(live=teacher, cached=CachedTeacher(teacher, dtype=torch.float32, features=['conv2'])).items():
        learn = make()
        learn.splitter = lambda m: [list(m[:5].parameters()), list(m[5:].parameters())]
        fit(learn, cbs=KnowledgeDistillationCallback(t, [SoftTarget, FitNet], 'conv2', adapter='auto'))
        res[name] = weights(learn)
        assert_untouched(learn, teacher)
    assert (res['live']-res['cached']).abs().max()<=1e-5

def test_an_ensemble_can_be_cached(make, teacher):
    live,cached = make(),make()
    both = [teacher, convnet(6)]
    live.fit(2, cbs=KnowledgeDistillationCallback(both))
    cached.fit(2, cbs=KnowledgeDistillationCallback(CachedTeacher(both, dtype=torch.float32)))
    assert (weights(live)-weights(cached)).abs().max()<=1e-5

def test_under_autocast_what_is_kept_is_in_the_teachers_own_precision(make, teacher):
    low,full = CachedTeacher(teacher, dtype=torch.float32),CachedTeacher(teacher, dtype=torch.float32)
    with torch.autocast(device().type, torch.bfloat16): make().fit(1, cbs=KnowledgeDistillationCallback(low))
    full.fill(make().dls, show=False)
    assert (low.rows.columns['pred']-full.rows.columns['pred']).abs().max()<=1e-6

def test_lr_find_with_a_cached_teacher_leaves_all_but_its_answers(make, teacher):
    learn,cached = make(),CachedTeacher(teacher)
    before = weights(learn)
    learn.add_cb(KnowledgeDistillationCallback(cached))
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=4)
    assert torch.equal(weights(learn), before) and cached.n_kept==40
    assert_untouched(learn, teacher)

def test_no_random_number_is_drawn_for_a_cached_teacher(make, teacher):
    seen = []
    def note(learn):
        if learn.training: seen.append(learn.x.sum().item())
    for t in (teacher, CachedTeacher(teacher), CachedTeacher(teacher).fill(make().dls, show=False)):
        learn = make(p=.5)
        learn.fit(2, cbs=[KnowledgeDistillationCallback(t), After('after_batch', note)])
    assert seen[:4]==seen[4:8]==seen[8:]

def test_weight_0_runs_no_cached_teacher_and_preflight_keeps_nothing(make, teacher, tmp_path):
    cached = CachedTeacher(teacher, tmp_path/'x')
    make().fit(1, cbs=KnowledgeDistillationCallback(cached, weight=0))
    KnowledgeDistillationCallback(cached).preflight(make())
    assert cached.rows is None and not [*tmp_path.iterdir()]

def compared(make, teacher, seeds=1, **kwargs):
    ways = {'kd': partial(KnowledgeDistillationCallback, loss=SoftTarget)}
    return compare(lambda: make(), ways, 1, seeds=seeds, teacher=teacher, show=False, **kwargs)

def test_compare_judges_the_live_teacher_and_distils_from_the_cached(make, teacher):
    teacher.eval()
    cached,live = compared(make, CachedTeacher(teacher, dtype=torch.float32)),compared(make, teacher)
    for a,b in zip(cached.runs, live.runs, strict=True):
        assert (a.name, a.metrics)==(b.name, pytest.approx(b.metrics, abs=1e-5))

@pytest.mark.parametrize('settings', [dict(channels_last=True), dict(precision='bf16'), dict(chunk=7), {}], ids=str)
def test_a_crash_gives_the_teacher_back_as_it_came(make, teacher, settings):
    strides = [p.stride() for p in teacher.parameters()]
    def crash(learn): raise RuntimeError('crash')
    learn = make()
    cbs = [KnowledgeDistillationCallback(Teacher(teacher, **settings)), After('after_loss', crash)]
    with pytest.raises(RuntimeError, match='crash'): learn.fit(1, cbs=cbs)
    assert [p.stride() for p in teacher.parameters()]==strides
    assert_untouched(learn, teacher)

def test_a_compiled_teacher_answers_as_the_plain_one_with_and_without_taps(teacher):
    x,compiled = torch.randn(6, 1, 8, 8),Teacher(teacher, compile=True)
    for layers in ([], ['conv2'], []):
        with Teacher(teacher).ready(layers) as t: pred,features = t((x,))
        with compiled.ready(layers) as t: fast,fast_features = t((x,))
        assert (fast-pred).abs().max()<=1e-5*pred.abs().max() and [*fast_features]==layers
        for n in layers: assert (fast_features[n]-features[n]).abs().max()<=1e-5*features[n].abs().max()
    assert not hasattr(teacher, '_orig_mod') and teacher.training

def test_a_skipped_item_is_no_silent_shift(make, teacher):
    class Gone(Items):
        def __getitem__(self, i):
            from fastai.data.load import SkipItemException
            if i==7: raise SkipItemException
            return super().__getitem__(i)
    learn = make()
    learn.dls = DataLoaders(TfmdDL(Gone(), bs=bs, shuffle=True, num_workers=0), loaders().valid)
    with pytest.raises(ValueError, match='are some skipped|items that are skipped'):
        learn.fit(3, cbs=KnowledgeDistillationCallback(CachedTeacher(teacher)))

# --- answers that would be wrong

def student():
    torch.manual_seed(1)
    return convnet(4)

def learner(dls=None, model=None, loss_func=None, **kwargs):
    loss_func = loss_func or CrossEntropyLossFlat()
    learn = Learner(dls or loaders(), model or student(), loss_func=loss_func, lr=1e-2, **kwargs)
    learn.logger = lambda *_: None
    return learn.remove_cb(ProgressCallback)

def distil(cached, dls=None, loss=None, **kwargs):
    learner(dls, **kwargs).fit(1, cbs=KnowledgeDistillationCallback(cached, loss))

def other_activation(m): m.act1 = nn.Tanh()
def other_eps(m): m.bn1.eps = 10.
@pytest.mark.parametrize('change', [other_activation, other_eps])
def test_a_teacher_of_the_same_weights_that_answers_otherwise_is_refused(teacher, change):
    cached = CachedTeacher(teacher).fill(loaders(), show=False)
    change(teacher)
    with pytest.raises(ValueError, match='asked again about some items alone, the teacher gives another answer'):
        distil(cached)

class Random(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(nn.functional.dropout(x, .5, True))
class Dependent(Random):
    def forward(self, x): return self.net(x-x.mean(0))
@pytest.mark.parametrize('kind', [Random, Dependent])
def test_a_teacher_that_is_random_or_depends_on_the_batch_is_refused_in_the_first_batch(teacher, kind):
    with pytest.raises(ValueError, match='is it random, does an answer depend on the other items of a batch'):
        distil(CachedTeacher(kind(teacher)))

def test_which_of_two_equal_logits_is_kept_may_differ():
    class Tied(nn.Module):
        "Its second and third logits are equal but for the rounding, which goes with the size of the batch"
        def forward(self, x):
            z,tie = torch.zeros(len(x), 10),1e-6*(-1)**(len(x)>4)
            z[:, 0],z[:, 1],z[:, 2] = 5.,4.+tie,4.-tie
            return z
    cached = CachedTeacher(Tied(), top_k=2).fill(loaders(), show=False)
    distil(cached)
    assert cached.n_kept==n_items

def test_an_ensemble_that_was_mixed_otherwise_is_refused(teacher, tmp_path):
    class Labels(Items):
        def __getitem__(self, i): return super().__getitem__(i)[0],torch.eye(10)[i%10]
    labels = DataLoaders(*(TfmdDL(Labels(), bs=bs, num_workers=0) for _ in range(2)))
    both = [teacher, convnet(6)]
    CachedTeacher(both, tmp_path/'x').fill(learner(labels, loss_func=BCEWithLogitsLossFlat()), show=False)
    with pytest.raises(ValueError, match='do not fit; settings of the teacher: '):
        distil(CachedTeacher(both, tmp_path/'x'))

def test_top_k_is_along_the_classes_that_the_loss_function_names():
    class Steps(Items):
        def __getitem__(self, i): return self.x[i].flatten()[:8],torch.arange(8)%5
    dls = DataLoaders(*(TfmdDL(Steps(), bs=bs, num_workers=0) for _ in range(2)))
    def net(): return nn.Sequential(nn.Linear(8, 40), nn.Unflatten(1, (5, 8)))
    teacher,seen = net(),[]
    def note(pred, teacher_pred, xb):
        seen.append((xb[0], teacher_pred))
        return nn.functional.mse_loss(pred, teacher_pred)
    cached = CachedTeacher(teacher, top_k=4, dtype=torch.float32)
    distil(cached, dls, note, model=net(), loss_func=nn.CrossEntropyLoss())
    for x,logits in seen:       # of 5 classes the one that is left has the rest to itself
        assert (logits.softmax(1)-teacher(x).softmax(1)).abs().max()<=1e-6

def test_inputs_without_numbers_and_loaders_of_fastais_lowest_kind(teacher):
    from fastai.data.load import DataLoader
    class Two(Items):
        def __getitem__(self, i): return self.x[i],torch.zeros(0),torch.tensor(i%10)
    class First(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
        def forward(self, x, nothing): return self.net(x)
    two = DataLoaders(*(TfmdDL(Two(), bs=bs, num_workers=0) for _ in range(2)))
    cached = CachedTeacher(First(teacher))
    distil(cached, two, model=First(student()))
    plain = CachedTeacher(teacher).fill(DataLoaders(*(DataLoader(Items(), bs=bs) for _ in range(2))), show=False)
    assert cached.n_kept==plain.n_kept==n_items

def test_whoever_asks_the_loader_or_validates_in_mid_epoch_changes_no_place(make, teacher):
    seen,cached = [],CachedTeacher(teacher, dtype=torch.float32)
    def note(pred, teacher_pred, xb, idxs):
        seen.append((xb[0], idxs, teacher_pred))
        return nn.functional.mse_loss(pred, teacher_pred)
    def take_a_batch(learn):
        if learn.training: learn.dls.train.one_batch()
    learn = learner()
    learn.fit(2, cbs=[KnowledgeDistillationCallback(cached, note), After('after_loss', take_a_batch)])
    for x,idxs,_ in seen: assert torch.equal(x, Items().x[idxs])
    assert 'get_idxs' not in vars(learn.dls.train)

def test_an_ensemble_of_cached_teachers_previews_without_keeping_and_refuses_views(teacher):
    both = [CachedTeacher(teacher), CachedTeacher(convnet(6))]
    notes = KnowledgeDistillationCallback(both).preflight(learner()).notes
    assert [t.rows for t in both]==[None, None] and sum('answers' in n for n in notes)==2
    distil(both)
    assert [t.n_kept for t in both]==[n_items]*2
    with pytest.raises(ValueError, match='cache the ensemble'): distil([CachedTeacher(teacher, views=2), convnet(6)])

def test_a_comparison_in_a_file_is_not_continued_with_another_teacher(make, teacher, tmp_path):
    for t in (teacher.eval(), teacher): compared(make, t, path=tmp_path/'x')
    for other in (CachedTeacher(teacher, top_k=2), Teacher(teacher, precision='bf16'), convnet(8)):
        with pytest.raises(ValueError, match='holds runs of other settings: teacher was'):
            compared(make, other, path=tmp_path/'x')

now = {}
def trained_for(seed): return now['teacher']
def test_a_comparison_in_a_file_is_not_continued_where_a_seed_has_another_teacher(make, teacher, tmp_path):
    now['teacher'] = teacher.eval()
    compared(make, trained_for, [0], path=tmp_path/'x')
    (text := tmp_path/'x').write_text(text.read_text().replace('"name": "kd"', '"name": "kd of another time"'))
    now['teacher'] = convnet(8)
    with pytest.raises(ValueError, match='seed 0: this is not the teacher of the runs'):
        compared(make, trained_for, [0], path=tmp_path/'x')

def test_weights_that_another_tensor_holds_keep_their_place(teacher):
    kept,before = teacher.state_dict(),teacher.conv1.weight.data_ptr()
    with Teacher(teacher, channels_last=True).ready() as t:
        t((torch.randn(2, 1, 8, 8),))
        kept['conv1.weight'].mul_(0)
        assert teacher.conv1.weight.abs().sum()==0
    assert teacher.conv1.weight.data_ptr()==before

def test_parts_of_a_batch_need_features_with_the_items_first():
    net = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), nn.Identity(), nn.Flatten())
    net[2].register_forward_hook(lambda m, i, o: o.transpose(0, 1))
    net[3] = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (-1, 4)), nn.Identity())
    net.append(type('Back', (nn.Module,), {'forward': lambda self, x: x[0]})())
    with Teacher(net, chunk=4).ready(['2']) as t:
        with pytest.raises(TypeError, match='does not have them in its first dimension'): t((torch.randn(8, 3),))

def test_under_autocast_preflight_says_that_a_float32_cache_is_exact(teacher):
    kd = KnowledgeDistillationCallback(CachedTeacher(teacher, dtype=torch.float32))
    with torch.autocast(device().type, torch.bfloat16): notes = kd.preflight(learner()).notes
    assert any("logits are up to 0 of the largest" in n for n in notes)

@pytest.mark.parametrize('settings', [dict(top_k=True), dict(top_k=0), dict(views=1.5), dict(dtype='float16')], ids=str)
def test_settings_that_cannot_be_are_refused(teacher, settings):
    with pytest.raises(ValueError, match='is a whole number, at least 1|dtype is torch.float16'):
        CachedTeacher(teacher, **settings)

def of_column(name, **changes):
    "Changes what the header says of a column"
    def change(header): header[name].update(changes)
    return change

def without_column(name):
    def change(header): header.pop(name)
    return change

def metadata(value):
    def change(header): header['__metadata__'] = value
    return change

def without_outputs(header): header['__metadata__'].pop('number of outputs')

damages = [of_column('pred', shape=[n_items, -4]), metadata('x'), without_outputs, without_column('seen'),
           without_column('pred'), of_column('seen', shape=[2*n_items, 1]), of_column('pred', data_offsets=[-16, -8]),
           of_column('done', dtype='U8'), metadata(None)]

def test_a_damaged_file_is_refused_in_words_or_read_whole(tmp_path):
    fill(tmp_path/'x')
    good = (tmp_path/'x').read_bytes()
    size = struct.unpack('<Q', good[:8])[0]
    def bad(change):
        header = json.loads(good[8:8+size])
        change(header)
        head = json.dumps(header).encode()
        return struct.pack('<Q', len(head))+head+good[8+size:]
    torn = [struct.pack('<Q', 2**35)+good[8:], struct.pack('<Q', 100_000)+b'['*100_000, b'', good[:4]]
    for i,content in enumerate([*map(bad, damages), *torn]):
        (tmp_path/f'{i}').write_bytes(content)
        with pytest.raises(ValueError, match='holds no answers of a teacher|are damaged|do not fit'):
            fill(tmp_path/f'{i}')

class Ten:
    "Ten items of four numbers: those of the file below"
    split_idx = 0
    def __init__(self): self.x = torch.arange(40.).view(10, 4)/64
    def __len__(self): return 10
    def __getitem__(self, i): return self.x[i],torch.tensor(i%3)

def test_a_file_of_an_earlier_version_is_used(tmp_path):
    "golden/answers.kd was filled by the version before the names in here were put in order"
    shutil.copy(Path(__file__).parent/'golden'/'answers.kd', tmp_path)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5))
    for p in net.parameters(): p.data = ((torch.arange(p.numel())*5)%7-3.).view(p.shape)/8
    dls = DataLoaders(*(TfmdDL(Ten(), bs=4, shuffle=True, num_workers=0) for _ in range(2)))
    cached = CachedTeacher(net, tmp_path/'answers.kd', top_k=2, features='0')
    seen = asked_of(net)
    learner(dls, nn.Linear(4, 5)).fit(2, cbs=KnowledgeDistillationCallback(cached, SoftTarget))
    assert len(seen)==1         # once a fit, to see that it gives the same
    assert (cached[:][0].topk(2).values-net.cpu()(Ten().x).topk(2).values).abs().max()<=1e-3

def test_a_name_that_is_too_long_is_told(teacher, tmp_path):
    with pytest.raises(ValueError, match='could not be made'):
        CachedTeacher(teacher, tmp_path/('x'*300)).fill(loaders(), show=False)

def test_views_go_on_in_later_fits_and_lr_find_uses_none_up(make, teacher):
    cached,learn,seen = CachedTeacher(teacher, views=3),make(),[]
    learn.distill(cached)
    learn.add_cb(After('after_train', lambda l: seen.append(cached.fit.view)))
    learn.fit(1)
    with learn.no_bar(): learn.lr_find(num_it=2, show_plot=False, suggest_funcs=())
    seen[1:] = []
    learn.fit(1)
    learn.fine_tune(1, freeze_epochs=1)
    learn.fit(4, start_epoch=2)
    assert seen==[0, 1, 2, 0, 0, 1]      # the fourth fit is one that goes on after two epochs: 4 are behind it, and 2

@pytest.mark.parametrize('fill', (True, False))
def test_an_answer_of_nan_is_never_kept(make, teacher, tmp_path, fill):
    sick = [True]
    def nan_for_some(m, x, out): return torch.where(x[0].mean((1, 2, 3))[:, None]>.32, torch.nan, out) if sick else out
    teacher.register_forward_hook(nan_for_some)
    learn,cached = make(),CachedTeacher(teacher, tmp_path/'answers.kd')
    says = "the teacher's pred has NaN for [0-9]+ of [0-9]+ items, and no output of this batch is cached"
    with pytest.raises(FloatingPointError, match=says):
        cached.fill(learn.dls, show=False) if fill else learn.fit(3, cbs=KnowledgeDistillationCallback(cached))
    sick.clear()
    assert cached.fill(learn.dls, show=False)[:][0].isfinite().all()

class Broken(Items):
    "Two of its items are not finite"
    value = torch.nan
    def __init__(self):
        super().__init__()
        self.x[[3, 5], 0, 2, 2] = self.value
class Infinite(Broken): value = torch.inf

@pytest.mark.parametrize('settings', [{}, dict(top_k=2), dict(views=2)], ids=str)
@pytest.mark.parametrize('fill', (True, False), ids=['fill', 'fit'])
@pytest.mark.parametrize('dataset', (Broken, Infinite))
def test_inputs_that_are_not_finite_are_named_before_anything_is_cached(teacher, capsys, dataset, fill, settings):
    in_one_batch = DataLoaders(*(TfmdDL(dataset(), bs=n_items, num_workers=0) for _ in range(2)))
    learn,cached = learner(in_one_batch),CachedTeacher(teacher, **settings)
    says = "the inputs of items 3, 5 of the training set are not finite: take them out, or fill what is missing"
    with pytest.raises(ValueError, match=says):
        if fill: cached.fill(learn, show=False)
        else: learn.fit(1, cbs=KnowledgeDistillationCallback(cached))
    assert cached.rows is None and 'CachedTeacher keeps' not in capsys.readouterr().out

def test_a_teacher_that_takes_inputs_that_are_not_finite_may_do_so(teacher):
    class Fills(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = teacher
        def forward(self, x): return self.net(x.nan_to_num(0., 0., 0.))
    assert CachedTeacher(Fills()).fill(of(Broken), show=False)[:][0].isfinite().all()

# --- a batch as the fit has it

def asked_of(model):
    "What the model is asked about from now on"
    seen = []
    model.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach().clone()))
    return seen

class Scaled(Callback):
    "Changes the batch, with what it found when the fit began, and does what other callbacks do besides"
    def __init__(self): self.batches,self.log = 0,[]
    def before_fit(self):
        self.mean,self.handle = .5,self.model.register_forward_hook(lambda *_: None)
        self.opt.set_hyper('lr', 1.)
    def before_batch(self):
        self.batches += 1
        self.log.append(self.iter)
        self.model.eval()
        for p in self.model.parameters(): p.data.mul_(1+1e-3)
        self.learn.xb = (2*(self.x-self.mean),)
    def after_batch(self): self.loss.item()
    def after_fit(self):
        self.handle.remove()
        self.recorder.values[-1]

def test_fill_asks_about_what_callbacks_make_of_a_batch_and_changes_nothing(teacher):
    learn,filled = learner(cbs=Scaled()),CachedTeacher(teacher, dtype=torch.float32)
    before,own,state,scaled = weights(learn),dict(vars(learn)),torch.get_rng_state(),learn.scaled
    filled.fill(learn, show=False)
    assert torch.equal(weights(learn), before) and torch.equal(torch.get_rng_state(), state)
    assert learn.model.training and not learn.model._forward_hooks
    assert {k: id(v) for k,v in vars(learn).items()}=={k: id(v) for k,v in own.items()} and scaled.learn is learn
    assert (scaled.batches, scaled.log, hasattr(scaled, 'handle'))==(0, [], False)
    with Teacher(teacher.cpu()).ready() as t: right = t((2*(Items().x-.5),))[0]
    assert (filled[:][0]-right).abs().max()<=1e-4
    seen = asked_of(teacher)
    distil(filled, cbs=Callback(before_batch=lambda self: setattr(self.learn, 'xb', (2*(self.x-.5),))))
    assert len(seen)==1         # once a fit, to see that it answers so

class Joined(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, image, mask): return self.net(torch.cat([image, mask], 1).mean(1, keepdim=True))

@pytest.mark.parametrize('of', [DataLoaders, Learner], ids=['DataLoaders', 'Learner'])
def test_fill_casts_typed_inputs_as_a_fit_does(teacher, of):
    class Typed(Items):
        def __getitem__(self, i): return TensorImage(self.x[i]),TensorMask((self.x[i]>0).float()),torch.tensor(i%10)
    dls = DataLoaders(*(TfmdDL(Typed(), bs=bs, num_workers=0) for _ in range(2)))
    data = dls if of is DataLoaders else learner(dls, Joined(student()))
    filled = CachedTeacher(Joined(teacher)).fill(data, show=False)
    distil(filled, dls, model=Joined(student()))
    assert filled.n_kept==n_items

cancels = [(CancelBatchException, n_items-bs), (CancelTrainException, bs)]
@pytest.mark.parametrize('ends,kept', cancels, ids=['batch', 'epoch'])
def test_what_a_callback_cancels_is_left_unanswered(teacher, ends, kept):
    def cancel(self):
        if self.iter==1: raise ends()
    assert CachedTeacher(teacher).fill(learner(cbs=Callback(before_batch=cancel)), show=False).n_kept==kept

class Low(MixedPrecision):
    def before_fit(self): self.autocast = torch.autocast(device().type, torch.bfloat16)

@pytest.mark.parametrize('cls', [MixedPrecision, Low])
def test_mixed_precision_of_the_student_is_not_that_of_kept_answers(teacher, cls):
    plain,mixed = (CachedTeacher(teacher, dtype=torch.float32) for _ in range(2))
    plain.fill(loaders(), show=False)
    mixed.fill(learner(cbs=cls()), show=False)
    assert torch.equal(plain[:][0], mixed[:][0]) and not torch.is_autocast_enabled(device().type)

def test_a_callback_that_is_random_is_refused_when_an_item_comes_again(teacher):
    def add_noise(self): self.learn.xb = (self.x+torch.randn(1, device=self.x.device),)
    filled = CachedTeacher(teacher).fill(learner(cbs=Callback(before_batch=add_noise)), show=False)
    learn = learner(cbs=Callback(before_batch=add_noise))
    with pytest.raises(ValueError, match='a callback that changes the batch'):
        learn.fit(2, cbs=KnowledgeDistillationCallback(filled))

# --- a teacher that is changed

def follow(model, how):
    def step(self):
        with torch.no_grad():
            for p,q in zip(model.parameters(), self.learn.model.parameters()): how(p, q)
    return Callback(after_step=step)

def in_place(p, q): p.lerp_(q, .1)
def of_data(p, q): p.data.lerp_(q.data, .1)
def other_data(p, q): p.data = p.data.lerp(q.data, .1)

@pytest.mark.parametrize('how', [in_place, of_data, other_data])
@pytest.mark.parametrize('filled', [False, True])
def test_a_teacher_that_is_changed_in_a_fit_is_refused_and_what_was_kept_is_dropped(how, filled):
    moving = student()
    cached = CachedTeacher(moving)
    if filled: cached.fill(loaders(), show=False)
    with pytest.raises(ValueError, match="teacher's weights were changed during this fit.*give the teacher itself"):
        learner().fit(2, cbs=[KnowledgeDistillationCallback(cached), follow(moving, how)])
    assert cached.n_kept==(n_items if filled else 0)        # those are of the teacher as it was

@pytest.mark.parametrize('how', [in_place, of_data, other_data])
def test_a_teacher_that_is_changed_is_told_at_the_end_of_the_fit_at_the_latest(how, tmp_path):
    moving = student()
    cached = CachedTeacher(moving, tmp_path/'x')
    with pytest.warns(UserWarning, match="teacher's weights were changed during this fit"):
        distil(cached, cbs=follow(moving, how))
    assert cached.n_kept==0

kinds = [{}, dict(channels_last=True), dict(precision='bf16'), dict(compile=True)]
@pytest.mark.parametrize('settings', kinds, ids=str)
def test_a_teacher_that_is_only_moved_is_no_other(teacher, settings, recwarn):
    def move(self):
        teacher.double().float()
        teacher.load_state_dict({k: v.clone() for k,v in teacher.state_dict().items()})
    cached = CachedTeacher(Teacher(teacher, **settings))
    for moves in ([Callback(after_epoch=move)], []):
        learner().fit(3, cbs=[KnowledgeDistillationCallback(cached), *moves])
    assert cached.n_kept==n_items and not any('were changed' in str(w.message) for w in recwarn)

# --- what the teacher is given

class Either(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, *images): return self.net(sum(images))
class Noisy(Items):
    "Its first input is random, its second is not"
    def __getitem__(self, i): return self.x[i]+torch.randn(1),self.x[i],torch.tensor(i%10)
class Jitter(RandTransform):
    def encodes(self, x:TensorImage): return x+torch.randn(1)
def image(x): return TensorImage(x)
def jittered(): return Datasets([*Items().x], [[image, Jitter()], [image], [lambda x: 0]], n_inp=2, split_idx=0)
def of(dataset): return DataLoaders(*(TfmdDL(dataset(), bs=bs, num_workers=0) for _ in range(2)))
def second(noisy, x): return x

@pytest.mark.parametrize('dataset', [Noisy, jittered])
@pytest.mark.parametrize('inputs', [1, [1], {'input': 1}, second], ids=['place', 'places', 'by argument', 'function'])
def test_an_input_that_the_teacher_is_not_given_need_not_come_again(teacher, dataset, inputs):
    for t in (Teacher(teacher, inputs=inputs), [Teacher(teacher, inputs=inputs), Teacher(convnet(6), inputs=inputs)]):
        cached = CachedTeacher(t)
        learner(of(dataset), Joined(student())).fit(2, cbs=KnowledgeDistillationCallback(cached))
        cached.fill(learner(of(dataset), Joined(student())), show=False)
        assert cached.n_kept==n_items

@pytest.mark.parametrize('dataset,name', [(Noisy, r'the dataset itself \(Noisy\)'), (jittered, 'Jitter')])
@pytest.mark.parametrize('inputs', [0, [1, 0], None], ids=str)
def test_what_makes_an_input_of_the_teacher_random_is_named(teacher, dataset, name, inputs):
    cached = CachedTeacher(Teacher(Either(teacher), inputs=inputs))
    with pytest.raises(ValueError, match=f'what makes them vary: {name}'):
        distil(cached, of(dataset), model=Joined(student()))

def test_inputs_that_are_picked_by_a_callback_are_those_that_must_come_again(teacher):
    def pick(i): return Callback(before_batch=lambda self: setattr(self.learn, 'xb', (self.xb[i],)))
    for dataset in (Noisy, jittered):
        filled = CachedTeacher(teacher).fill(learner(of(dataset), cbs=pick(1)), show=False)
        learner(of(dataset), cbs=pick(1)).fit(2, cbs=KnowledgeDistillationCallback(filled))
        assert filled.n_kept==n_items
    with pytest.raises(ValueError, match='what makes them vary: '):
        CachedTeacher(teacher).fill(learner(of(Noisy), cbs=pick(0)), show=False)

def test_functions_of_the_inputs_are_not_called_for_each_batch(teacher):
    calls = []
    def inputs(x):
        calls.append(1)
        return 2*x
    cached = CachedTeacher(Teacher(teacher, inputs=inputs)).fill(loaders(), show=False)
    calls.clear()
    learner().fit(3, cbs=KnowledgeDistillationCallback(cached))
    assert len(calls)==2        # which inputs it takes, and what it answers

def noise(b): return b[0]+torch.randn(1, device=b[0].device),b[1]
def own(b, rng=np.random.default_rng()): return b[0]+float(rng.random()),b[1]
def pile(items): return torch.stack([x for x,_ in items])+torch.randn(1),torch.stack([y for _,y in items])

sources = [('noise', dict(after_batch=[ItemTransform(noise)])), ('own', dict(after_item=[ItemTransform(own)])),
           ('the making of a batch', dict(create_batch=pile))]
@pytest.mark.parametrize('name,kwargs', sources, ids=[name for name,_ in sources])
def test_what_is_random_in_a_loader_is_named(teacher, name, kwargs):
    with pytest.raises(ValueError, match=f'what makes them vary: {name}.*views=5'):
        CachedTeacher(teacher).fill(loaders(**kwargs), show=False)

def test_views_need_random_numbers_that_come_again(teacher):
    dls = loaders(after_batch=[ItemTransform(noise), ItemTransform(own)])
    with pytest.raises(ValueError, match='vary: own. Its random numbers are not those of torch, numpy or random'):
        CachedTeacher(teacher, views=2).fill(dls, show=False)

def images(width, size=8, method='crop', stats=None):
    "Of 20 rows and so many columns, resized"
    def item(i): return PILImage.create(np.random.RandomState(i).randint(0, 255, (20, width(i), 3), dtype=np.uint8))
    data = Datasets(range(n_items), [[item], [lambda i: i%10]], split_idx=0)
    tfms = dict(after_item=[Resize(size, method=method), ToTensor()],
                after_batch=[IntToFloatTensor(), *([Normalize.from_stats(*stats, cuda=False)] if stats else [])])
    return DataLoaders(*(TfmdDL(data, bs=bs, num_workers=0, **tfms) for _ in range(2)))
class Grey(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x.mean(1, keepdim=True))
def square(i): return 20
def oblong(i): return 30
def last(i): return 30 if i==n_items-1 else 20

def test_resize_is_accepted_where_items_come_the_same_again(teacher):
    for dls in (images(square), images(square, method='pad'), images(oblong, method='squish')):
        cached = CachedTeacher(Grey(teacher)).fill(dls, show=False)
        learner(dls, Grey(student())).fit(2, cbs=KnowledgeDistillationCallback(cached))
        assert cached.n_kept==n_items

def test_where_resize_crops_at_random_it_is_named_with_what_makes_it_the_same_each_time(teacher):
    with pytest.raises(ValueError, match=r"what makes them vary: Resize \(not with method='squish'\)"):
        CachedTeacher(Grey(teacher)).fill(images(oblong), show=False)
    few = CachedTeacher(Grey(teacher)).fill(images(last), show=False)       # the first items are square
    says = "did not come as it was.*a random transform, such as Resize .not with method='squish'"
    with pytest.raises(ValueError, match=says):
        learner(images(last), Grey(student())).fit(4, cbs=KnowledgeDistillationCallback(few))

def test_of_other_transforms_only_the_difference_is_told(teacher, tmp_path):
    CachedTeacher(Grey(teacher), tmp_path/'x').fill(images(square, stats=imagenet_stats), show=False)
    def refused(dls, **settings):
        with pytest.raises(ValueError, match='do not fit') as e:
            CachedTeacher(Teacher(Grey(teacher), **settings), tmp_path/'x').fill(dls, show=False)
        return str(e.value)
    resized = refused(images(square, 6, stats=imagenet_stats))
    assert "'size': (8, 8)" in resized and "'size': (6, 6)" in resized
    assert 'Normalize' not in resized and 'ToTensor' not in resized
    bare = refused(images(square))
    assert "transforms: Normalize -- {" in bare and "then, none now. Give another path" in bare and 'Resize' not in bare
    low = refused(images(square, stats=imagenet_stats), precision='bf16')
    assert 'settings of the teacher: none then, precision=bf16 now. Give another path' in low

# --- room and time

def test_where_there_is_not_the_room_it_is_told_before_anything_is_written(teacher, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=100))
    says = "need [0-9.]+ kB, and on the disk of .* 100 bytes are free: give another path, or"
    with pytest.raises(ValueError, match=says):
        CachedTeacher(teacher, tmp_path/'new'/'x').fill(loaders(), show=False)
    assert not [*tmp_path.iterdir()] and 'CachedTeacher keeps 50 answers' in capsys.readouterr().out
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: namedtuple('Memory', 'available')(100))
    with pytest.raises(ValueError, match="need 1.6 kB, and 100 bytes of memory are free: give a path, or keep less"):
        CachedTeacher(teacher).fill(loaders(), show=False)

def test_how_long_a_fill_takes_is_told_after_a_few_batches_where_it_is_long(teacher, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 300))
    monkeypatch.setattr(cached_module.time, 'perf_counter', lambda: next(clock))        # 300 s for three batches
    monkeypatch.setattr(cached_module.fastprogress, 'NO_BAR', True)
    CachedTeacher(teacher).fill(loaders(), show=True)
    size,time = capsys.readouterr().out.splitlines()
    assert 'CachedTeacher keeps 50 answers' in size and time=='CachedTeacher has 3 batches to go: about 5 minutes.'
    CachedTeacher(teacher).fill(loaders(), show=False)
    assert 'to go' not in capsys.readouterr().out

def test_outside_of_notebooks_a_bar_shows_how_much_time_is_left(teacher, monkeypatch, capsys):
    monkeypatch.setattr(cached_module.fastprogress, 'NO_BAR', False)
    CachedTeacher(teacher).fill(loaders())
    size,bar = capsys.readouterr().out.split('\n')
    assert 'answers of 33 bytes in memory' in size and re.search(r'\[2/3 \d\d:\d\d<\d\d:\d\d\]', bar)

def test_where_files_cannot_be_linked_and_another_run_was_faster_its_file_is_taken(tmp_path, monkeypatch):
    "As on Windows, where no file that is open can be replaced"
    def link(*_): raise OSError(errno.EPERM, 'no links here')
    def rename(self, target): raise FileExistsError(errno.EEXIST, 'it is there')
    fields,link_files = dict(pred=(torch.float16, (3,))),os.link
    monkeypatch.setattr(os, 'link', link)
    rows = cache_file.CacheRows.in_file(tmp_path/'x', 4, fields, {'teacher': 'first'})
    rows.write(torch.tensor([2]), dict(pred=torch.ones(1, 3).half()))
    def faster(part, path):
        link_files(tmp_path/'x', path)
        raise OSError(errno.EPERM, 'no links here')
    monkeypatch.setattr(os, 'link', faster)
    monkeypatch.setattr(type(tmp_path), 'rename', rename)
    again = cache_file.CacheRows.in_file(tmp_path/'y', 4, fields, {'teacher': 'second'})
    assert again.key=={'teacher': 'first'} and again.have(torch.tensor([2]))
    assert {p.name for p in tmp_path.iterdir()}=={'x', 'y'}

def test_the_largest_logits_are_not_kept_where_the_dimension_of_the_classes_is_not_known():
    "Outputs (B, L, C), and a loss function of the user's own"
    items = [(torch.randn(4, 3), torch.arange(4)%5) for _ in range(8)]
    def flattened(pred, y): return F.cross_entropy(pred.reshape(-1, 5), y.reshape(-1))
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0)
    learn = Learner(dls, nn.Linear(3, 5).to(device()), loss_func=flattened)
    few = CachedTeacher(nn.Linear(3, 5), top_k=2)
    with pytest.raises(ValueError, match='does not say in which dimension they are: leave top_k out'), learn.no_bar():
        learn.fit(1, cbs=KnowledgeDistillationCallback(few, SoftTarget))
    with learn.no_bar(): learn.fit(1, cbs=KnowledgeDistillationCallback(CachedTeacher(nn.Linear(3, 5)), SoftTarget))
