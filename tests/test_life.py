"A Learner with the callback behaves like one without it, in everything but what the student learns."
import copy, random, subprocess, sys, warnings
from contextlib import contextmanager

import cloudpickle
import numpy as np
import pytest
import torch
from conftest import assert_untouched, convnet, device, hooks, numbers, weights
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import ModelResetter
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fasterkd.all import *
from fasterkd.base_teacher import BaseTeacher
from fasterkd.teachers import Teacher
from fasterkd.losses import ContrastiveRepresentation, VariationalInformation
from torch import nn

cloudpickle.register_pickle_by_value(sys.modules[__name__])   # what is defined here is not where an export is loaded

def distillation(teacher, **kwargs):
    terms = [SoftTarget, Term(Attention, ['bn1', 'conv2'], weight=10)]
    return KnowledgeDistillationCallback(teacher, terms, **kwargs)

# --- what it leaves alone

@pytest.mark.parametrize('fit', ('fit', 'fit_one_cycle', 'fit_flat_cos', 'fine_tune'))
def test_weight_0_is_the_plain_run_bit_for_bit(make, teacher, fit):
    a,b = make(p=.3),make(p=.3)
    torch.manual_seed(1)
    getattr(a, fit)(2)
    torch.manual_seed(1)
    getattr(b, fit)(2, cbs=distillation(teacher, weight=0))
    assert torch.equal(weights(a), weights(b))

def test_distillation_draws_no_random_number_and_takes_no_batch(make, teacher):
    teacher.drop.p = .5
    states = []
    for cbs in ([], [distillation(teacher)]):
        learn = make(p=.3)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        learn.fit(2, cbs=cbs)
        numpy_state = np.random.get_state()[1].tolist()
        states.append((torch.get_rng_state(), random.getstate(), numpy_state, learn.dls.train.rng.getstate()))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1:]==states[1][1:]

def test_the_teacher_is_bitwise_what_it_was_and_answers_in_evaluation_mode(make, teacher):
    teacher.drop.p = .5
    before = copy.deepcopy(teacher.state_dict())
    modes = []
    handle = teacher.head.register_forward_hook(lambda m,*_: modes.append((m.training, torch.is_grad_enabled())))
    make(cbs=distillation(teacher)).fit(1)
    handle.remove()
    assert {*modes}=={(False, False)}
    assert all(torch.equal(v, before[k]) for k,v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())

def test_valid_loss_is_the_task_loss_and_validation_runs_no_teacher(make, teacher):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    learn = make(cbs=distillation(teacher))
    learn.fit(2)
    assert len(calls)==2*len(learn.dls.train)
    recorded = learn.recorder.values[-1][1]
    assert make(learn.model).validate()[0]==learn.validate()[0]==recorded

def test_lr_find_leaves_everything_as_it_was(make, teacher):
    learn = make(cbs=distillation(teacher))
    before = weights(learn)
    learn.lr_find(show_plot=False, num_it=4)
    assert torch.equal(weights(learn), before)
    assert_untouched(learn, teacher)

def test_a_teacher_that_cannot_forget_leaves_no_callback_behind(make, teacher):
    learn = make()
    learn.model.reset = lambda: None
    def fails(): raise RuntimeError('cannot')
    teacher.reset = fails
    cbs = [KnowledgeDistillationCallback(teacher), ModelResetter()]
    with pytest.raises(RuntimeError, match='cannot'): learn.fit(1, cbs=cbs)
    assert not any(isinstance(cb, (KnowledgeDistillationCallback, ModelResetter)) for cb in learn.cbs)
    assert hooks(learn.model, teacher)==0

def test_predictions_need_no_teacher_and_no_labels(make, teacher, items):
    learn = make(cbs=distillation(teacher))
    learn.fit(1)
    handle = teacher.register_forward_hook(lambda *_: 1/0)
    preds,_ = learn.get_preds()
    learn.predict(items[0])
    learn.get_preds(with_loss=True)
    assert torch.equal(learn.get_preds(dl=learn.dls.test_dl(items[40:]))[0], preds)
    learn.validate()
    handle.remove()

def test_a_learner_that_was_never_fitted_predicts_without_labels_too(make, teacher, items):
    learn = make(cbs=KnowledgeDistillationCallback(teacher, [DecoupledKD, Term(Attention, 'conv2')]))
    assert learn.get_preds(dl=learn.dls.test_dl(items[:7]))[0].shape==(7, 10)
    learn.validate()
    learn.predict(items[0])
    assert hooks(learn.model, teacher)==0

class Moves(BaseTeacher):
    "A teacher that notes where it is sent, and when it is asked"
    def __init__(self, model):
        self.model = model
        self.did = []
    def models(self): return [self.model]
    def to(self, device): self.did.append(device)
    @contextmanager
    def ready(self, layers=(), learn=None): yield self
    def __call__(self, xb, idxs=None):
        self.did.append('asked')
        with torch.no_grad(): return self.model(*xb),{}

def test_a_teacher_is_sent_to_the_students_device_before_it_is_asked(make):
    teacher = Moves(convnet(8).to(device()))
    learn = make(cbs=KnowledgeDistillationCallback(teacher))
    learn.fit(1)
    where = next(learn.model.parameters()).device
    assert teacher.did[:2]==[where, 'asked'] and where not in teacher.did[2:]

def test_a_model_that_teaches_is_moved_and_given_back_where_it_was(monkeypatch):
    class Elsewhere(nn.Linear):
        at = torch.device('cpu')
        def to(self, device): self.at = device
    monkeypatch.setattr('fasterkd.model_state.device_of', lambda m: m.at)
    model = Elsewhere(2, 2)
    with Teacher(model).ready() as t:
        t.to(torch.device('cuda', 0))
        assert model.at==torch.device('cuda', 0)
    assert model.at==torch.device('cpu')

# --- what it adds

def test_the_students_gradient_is_that_of_the_formula_under_accumulation(make, teacher):
    grads = []
    class Keep(Callback):
        order = 100
        def before_step(self): grads.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]))
    for bs,cbs in ((40, []), (20, [GradientAccumulation(40)])):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        for p in model.parameters(): nn.init.constant_(p, .01)
        make(model, bs=bs, wd=0.).fit(1, cbs=[KnowledgeDistillationCallback(teacher, Logits), Keep(), *cbs])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-6*float(grads[0].abs().max()))

def test_the_teacher_sees_the_batch_that_the_student_saw_under_mixup(make, teacher):
    seen = dict(teacher=[], student=[])
    learn = make(cbs=[distillation(teacher), MixUp()])
    def note_teacher(_, x): seen['teacher'].append(x[0].clone())
    def note_student(_, x):
        if torch.is_grad_enabled(): seen['student'].append(x[0].clone())
    handles = teacher.register_forward_pre_hook(note_teacher),learn.model.register_forward_pre_hook(note_student)
    learn.fit(1)
    for h in handles: h.remove()
    assert len(seen['teacher'])==2
    assert all(torch.equal(a, b) for a,b in zip(seen['teacher'], seen['student'], strict=True))

def test_under_autocast_the_teacher_runs_in_it_and_losses_are_float32(make, teacher):
    got = {}
    class Bf16(Callback):
        order = 10
        def before_batch(self):
            self.autocast = torch.autocast(device().type, torch.bfloat16)
            self.autocast.__enter__()
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.autocast.__exit__(None, None, None)
    def loss(pred, teacher_pred, fm_s, fm_t, **kwargs):
        got.update(teacher=teacher_pred.dtype, feature=fm_t['conv2'].dtype, loss=Similarity(fm_s, fm_t).dtype)
        return Similarity(fm_s, fm_t)+SoftTarget(pred, teacher_pred)
    learn = make(cbs=[KnowledgeDistillationCallback(teacher, Term(loss, 'conv2')), Bf16()])
    learn.fit(1)
    assert got==dict(teacher=torch.bfloat16, feature=torch.bfloat16, loss=torch.float32)
    assert all(v==v for v in learn.recorder.values[-1])

@pytest.mark.parametrize('when', ('before its first call', 'after its first call', 'after a twin was compiled'))
def test_a_compiled_student_is_tapped(make, teacher, when):
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        learn = make()
        if compiled:
            x = torch.zeros(20, 1, 8, 8, device=device())
            if when=='after a twin was compiled': torch.compile(convnet().to(device()), backend='eager')(x)
            learn.model = torch.compile(learn.model, backend='eager')
            if when=='after its first call': learn.model.eval()(x)
        learn.fit(2, cbs=distillation(teacher))
        ends.append(weights(learn))
        assert hooks(learn.model)==0
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)

def test_a_module_replaced_after_before_fit_is_tapped_in_its_new_form(make, teacher):
    class Converts(Callback):
        order = 11
        def before_fit(self): self.learn.model.conv2 = copy.deepcopy(self.learn.model.conv2)
    got = []
    def loss(fm_s, fm_t, **kwargs):
        got.append(fm_s['conv2'])
        return got[-1].mean()
    make(cbs=[KnowledgeDistillationCallback(teacher, loss, 'conv2'), Converts()]).fit(1)
    assert len(got)==2

def test_a_loss_is_given_what_it_names(make, teacher, items):
    got = []
    def loss(idxs, xb, student, teacher, axis, target):
        got.append((idxs, xb, student, teacher, axis, target))
        return xb[0].mean()
    learn = make()
    learn.fit(2, cbs=KnowledgeDistillationCallback(teacher, loss))
    for idxs,xb,s,t,axis,target in got:
        assert s is learn.model and t is teacher and axis==-1
        for x,y,i in zip(xb[0], target, idxs, strict=True):
            assert torch.equal(x.cpu(), items[i][0]) and y.cpu()==items[i][1]

def test_optimizer_groups_and_discriminative_rates_are_untouched(make, teacher):
    def of(*modules): return [p for m in modules for p in m.parameters()]
    def split(m): return [of(m.conv1, m.bn1), of(m.conv2, m.bn2, m.head)]
    learn = make(splitter=split, cbs=distillation(teacher))
    learn.fit_one_cycle(1, slice(1e-4, 1e-2))
    assert [len(g) for g in learn.opt.param_lists]==[4, 6]
    learn.freeze()
    learn.fit(1)
    learn.unfreeze()
    learn.fit(1)
    assert_untouched(learn, teacher)

def test_saved_checkpoints_have_no_key_of_ours(make, teacher, tmp_path):
    learn = make(cbs=distillation(teacher), path=tmp_path)
    learn.fit(2, cbs=[SaveModelCallback(monitor='SoftTarget', with_opt=True), CSVLogger()])
    state = torch.load(tmp_path/'models'/'model.pth', weights_only=False)
    assert set(state['model'])==set(convnet().state_dict())
    assert len(state['opt']['state'])==len(list(learn.model.parameters()))
    columns = (tmp_path/'history.csv').read_text().splitlines()[0]
    assert columns=='epoch,train_loss,valid_loss,accuracy,task_loss,SoftTarget,Attention'

# --- stopped and resumed

class Seeds(Callback):
    "Each epoch has its own order of batches and its own dropout, whether or not there were others before"
    order = -100
    def before_epoch(self):
        torch.manual_seed(self.epoch)
        self.dls.train.rng.seed(self.epoch)

class Keeps(Callback):
    "Saves what the distillation has learnt beside each of SaveModelCallback's checkpoints"
    order = SaveModelCallback.order+1
    def __init__(self, kd): self.kd = kd
    def after_epoch(self): torch.save(self.kd.state_dict(), self.learn.path/f'kd_{self.epoch}.pth')

class Stops(Callback):
    "Interrupts the fit in the third epoch"
    def before_batch(self):
        if self.training and self.epoch==2 and self.iter==1: raise KeyboardInterrupt

def no_parameters():
    "Nothing that learns"
    return [SoftTarget, Term(Attention, 'conv2', weight=10)]

def adapter():
    "An adapter that learns"
    return [SoftTarget, Term(FitNet, 'conv2', adapter='auto')]

def learned():
    "A loss that learns"
    return [SoftTarget, Term(VariationalInformation, 'conv2')]

def memory():
    "A loss that learns and has a memory of all items"
    return [Term(ContrastiveRepresentation(40, negatives=16), 'flat')]

parts = dict(no_parameters=no_parameters, adapter=adapter, learned=learned, memory=memory)

@pytest.mark.parametrize('terms', parts)
@pytest.mark.parametrize('fit', ('fit', 'fit_one_cycle'))       # fastai's fit_flat_cos does not heed start_epoch
def test_a_run_that_was_stopped_and_resumed_ends_where_one_ends_that_was_not(make, teacher, tmp_path, fit, terms):
    def run(stop, **kwargs):
        learn = make(p=.3, path=tmp_path)
        kd = KnowledgeDistillationCallback(teacher, parts[terms](), schedule=lambda pct: 1-.5*pct)
        if kwargs:
            learn.load('model_1', with_opt=True)
            kd.load_state_dict(torch.load(tmp_path/'kd_1.pth'))
        cbs = [kd, Seeds(), Keeps(kd), SaveModelCallback(every_epoch=True, with_opt=True)]
        if stop:
            with pytest.raises(KeyboardInterrupt): getattr(learn, fit)(4, cbs=[*cbs, Stops()])
        else: getattr(learn, fit)(4, cbs=cbs, **kwargs)
        return weights(learn),numbers([torch.zeros(1), *kd.auxiliary.learned.parameters()])
    whole = run(False)
    run(True)
    for a,b in zip(run(False, start_epoch=2), whole, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

# --- where it is not

@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

elsewhere = '''
import sys
from pathlib import Path
sys.modules['fasterkd'] = None
from fastai.learner import load_learner
import torch
for d in map(Path, sys.argv[1:]):
    learn = load_learner(d/'student.pkl')
    torch.save(learn.model.eval()(torch.load(d/'x.pt')), d/'y.pt')
    assert [m.name for m in learn.metrics]==['accuracy'] and all(m.training is False for m in learn.model.modules())
'''

class Exports(Callback):
    "Exports the Learner in the middle of a fit, as it is at an event"
    order = 100
    def __init__(self, at):
        self.at = at
        self.done = False
    def __call__(self, name):
        if name!=self.at or self.done: return
        self.done = True
        learn = self.learn
        state = dict(learn.__dict__)
        learn.dls = learn.dls.new_empty()                            # what `export` does, but without ending the batch
        learn.dl = learn.opt = learn.pred = learn.loss = learn.loss_grad = None
        learn.xb = learn.yb = (None,)
        torch.save(learn, learn.path/'student.pkl', pickle_module=cloudpickle)
        learn.__dict__.update(state)

exported = ('before_fit', 'before_batch', 'after_pred', 'after_loss', 'after_step', 'after_train', 'after_epoch',
            'after_fit', 'the end', 'a crash')

@pytest.fixture(scope='module')
def exports(tmp_path_factory): return tmp_path_factory.mktemp('exports')

@pytest.mark.parametrize('at', exported)
def test_an_export_at_any_time_holds_nothing_of_ours(make, teacher, exports, at):
    path = exports/at.replace(' ', '_')
    path.mkdir()
    def soft(pred, teacher_pred, **kwargs): return (pred-teacher_pred).pow(2).mean()
    learn = make(cbs=KnowledgeDistillationCallback(teacher, dict(soft=soft, at=Term(Attention, 'bn1'))), path=path)
    with no_warnings():
        if at=='a crash':
            with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=Callback(after_step=lambda self: 1/0))
        else: learn.fit(1, cbs=Exports(at))
        if at in ('the end', 'a crash'): learn.export('student.pkl')
    saved = (path/'student.pkl').read_bytes()
    assert not any(m.encode() in saved for m in sys.modules if m.startswith('fasterkd.'))
    torch.save(torch.randn(3, 1, 8, 8), path/'x.pt')
    preds = learn.model.cpu().eval()(torch.load(path/'x.pt'))       # on the CPU, as where it is loaded
    torch.save(preds, path/'at the end.pt')

def test_all_of_them_load_and_predict_where_fasterkd_is_not(exports):
    paths = [p for at in exported if (p := exports/at.replace(' ', '_')).exists()]
    command = [sys.executable, '-W', 'ignore', '-c', elsewhere, *map(str, paths)]
    r = subprocess.run(command, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    for p in paths:
        if p.name in ('after_fit', 'the_end'): assert torch.equal(torch.load(p/'y.pt'), torch.load(p/'at the end.pt'))

def test_an_export_is_as_small_as_one_without_a_teacher(make, teacher, tmp_path):
    sizes = []
    for cbs in ([], [distillation(teacher)]):
        learn = make(cbs=cbs, path=tmp_path)
        with no_warnings():
            learn.fit(1)
            learn.export('x.pkl')
        sizes.append((tmp_path/'x.pkl').stat().st_size)
    assert sizes[1]<1.01*sizes[0]

def test_a_pickle_in_the_middle_of_a_batch_trains_on(make, teacher, tmp_path):
    learn = make(cbs=distillation(teacher), path=tmp_path)
    with no_warnings(): learn.fit(1, cbs=Exports('after_loss'))
    with no_warnings(): again = load_learner(tmp_path/'student.pkl')
    assert [m.name for m in again.metrics]==['accuracy']
    again.cbs = again.cbs.filter(lambda cb: not isinstance(cb, Exports))
    again.dls = learn.dls
    again.distill(teacher).fit(1)
    assert again.recorder.metric_names[-1]=='SoftTarget'

def test_a_deep_copy_distils_like_the_original_also_one_made_in_a_fit(make, teacher):
    made = []
    class Copies(Callback):
        def after_step(self):
            if not made: made.append(copy.deepcopy(self.learn.model))
    learn = make(cbs=distillation(teacher))
    twin = copy.deepcopy(learn)
    for l in (learn, twin):
        torch.manual_seed(0)
        l.dls.train.rng.seed(0)
        l.fit(1)
    assert torch.equal(weights(learn), weights(twin)) and twin.knowledge_distillation.learn is twin
    learn.fit(1, cbs=Copies())
    made[0](torch.zeros(2, 1, 8, 8, device=device()))
    assert_untouched(learn, teacher)

# --- teachers of all sorts

def test_a_teacher_of_higher_precision_or_in_torchscript_or_in_an_L(make, teacher):
    from fastcore.foundation import L
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(teacher).double()
        def forward(self, x): return self.net(x.double())
    traced = torch.jit.trace(copy.deepcopy(teacher).eval(), torch.zeros(2, 1, 8, 8))
    for t in (Double(), traced, L(teacher, convnet(4))):
        learn = make(cbs=KnowledgeDistillationCallback(t))
        learn.fit(1)
        assert all(v==v for v in learn.recorder.values[-1])

def test_columns_in_validation_say_nothing_where_training_has_its_own(make, teacher):
    learn = make(cbs=KnowledgeDistillationCallback(teacher))
    learn.recorder.train_metrics = True
    learn.fit(1)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['train_SoftTarget']==row['train_SoftTarget']
    assert row['valid_SoftTarget']!=row['valid_SoftTarget']     # not a number
    assert row['valid_loss']==row['valid_loss']
