"Cached teachers where a notebook cannot look: killed runs, several processes, a full disk, other callbacks, compiled teachers."
import errno, multiprocessing as mp, os, signal
from functools import partial

import pytest
import torch
from conftest import After, assert_untouched, convnet, weights
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders, TfmdDL
from fasterkd.all import CachedTeacher, EnsembleTeacher, FitNet, KnowledgeDistillationCallback, SoftTarget, Teacher, compare
from torch import nn

n_items,bs = 50,8
n_batches = -(-n_items//bs)

class Items:
    split_idx = 0
    def __init__(self): self.x = torch.randn(n_items, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    def __len__(self): return n_items
    def __getitem__(self, i): return self.x[i],torch.tensor(i%10)

def loaders(bs=bs, **kwargs): return DataLoaders(*(TfmdDL(Items(), bs=bs, num_workers=0, **{'shuffle': True, **kwargs}) for _ in range(2)))

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
    for at in range(n_batches*(views or 1)):
        path = tmp_path/f'killed at {at}'
        assert ended(processes(path, at, views))==-signal.SIGKILL
        asked = []
        with pytest.MonkeyPatch.context() as m:
            answer = Teacher._answer
            m.setattr(Teacher, '_answer', lambda *args: asked.append(1) or answer(*args))
            torch.set_num_threads(1)
            fill(path, views=views)
        assert path.read_bytes()==whole.read_bytes() and len(asked)==n_batches*(views or 1)-at

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
    with pytest.raises(ValueError, match='holds no answers of a teacher .it was cut off.: give another path, or remove the file'): fill(tmp_path/'x')

def test_safetensors_reads_the_file(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    fill(tmp_path/'x')
    kept = safetensors.load_file(tmp_path/'x')
    assert kept['done'].all() and kept['pred'].shape==(n_items, 10) and kept['feature conv2'].dtype==torch.float16

@pytest.mark.parametrize('fit', [partial(lambda learn, **kw: learn.fit(2, **kw)), lambda learn, **kw: learn.fit_one_cycle(2, **kw), lambda learn, **kw: learn.fine_tune(1, **kw)],
                         ids=['fit', 'fit_one_cycle', 'fine_tune'])
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
    with torch.autocast('cpu', torch.bfloat16): make().fit(1, cbs=KnowledgeDistillationCallback(low))
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
    for t in (teacher, CachedTeacher(teacher), CachedTeacher(teacher).fill(make().dls, show=False)):
        learn = make(p=.5)
        learn.fit(2, cbs=[KnowledgeDistillationCallback(t), After('after_batch', lambda l: seen.append(l.x.sum().item()) if l.training else None)])
    assert seen[:4]==seen[4:8]==seen[8:]

def test_weight_0_runs_no_cached_teacher_and_preflight_keeps_nothing(make, teacher, tmp_path):
    cached = CachedTeacher(teacher, tmp_path/'x')
    make().fit(1, cbs=KnowledgeDistillationCallback(cached, weight=0))
    KnowledgeDistillationCallback(cached).preflight(make())
    assert cached.rows is None and not [*tmp_path.iterdir()]

def test_compare_judges_the_live_teacher_and_distils_from_the_cached(make, teacher):
    teacher.eval()
    res = compare(lambda: make(), {'kd': partial(KnowledgeDistillationCallback, loss=SoftTarget)}, 1, seeds=1, teacher=CachedTeacher(teacher, dtype=torch.float32), show=False)
    live = compare(lambda: make(), {'kd': partial(KnowledgeDistillationCallback, loss=SoftTarget)}, 1, seeds=1, teacher=teacher, show=False)
    for a,b in zip(res.runs, live.runs, strict=True): assert (a.name, a.metrics)==(b.name, pytest.approx(b.metrics, abs=1e-5))

@pytest.mark.parametrize('settings', [dict(channels_last=True), dict(precision='bf16'), dict(chunk=7), {}], ids=str)
def test_a_crash_gives_the_teacher_back_as_it_came(make, teacher, settings):
    strides = [p.stride() for p in teacher.parameters()]
    def crash(learn): raise RuntimeError('crash')
    learn = make()
    with pytest.raises(RuntimeError, match='crash'): learn.fit(1, cbs=[KnowledgeDistillationCallback(Teacher(teacher, **settings)), After('after_loss', crash)])
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
    class Loader(TfmdDL): pass
    learn = make()
    learn.dls = DataLoaders(TfmdDL(Gone(), bs=bs, shuffle=True, num_workers=0), loaders().valid)
    with pytest.raises(ValueError, match='are some skipped|items that are skipped'): learn.fit(3, cbs=KnowledgeDistillationCallback(CachedTeacher(teacher)))
