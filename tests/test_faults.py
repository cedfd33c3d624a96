"Whatever ends a fit, at whatever event, nothing of the distillation is left, and the next fit works."
import signal, warnings

import pytest
import torch
from conftest import After, assert_untouched, convnet, device, weights
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException,
                                  CancelFitException, CancelStepException, CancelTrainException, CancelValidException,
                                  _events)
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fasterkd.all import *
from fasterkd.losses import VariationalInformation
from torch import nn

events = [e for e in _events if e!='after_create']
cancels = dict(batch=('after_pred', CancelBatchException),
               backward=('before_backward', CancelBackwardException),
               step=('before_step', CancelStepException),
               train=('before_batch', CancelTrainException),
               validate=('before_validate', CancelValidException),
               epoch=('before_train', CancelEpochException),
               fit=('before_epoch', CancelFitException))

class Raises(Callback):
    "Raises `error` when an event comes for the `nth` time; makes fastai come there first if it is a cancellation's"
    def __init__(self, name, error, order, nth=1):
        self.at = name
        self.error = error
        self.order = order
        self.left = nth
        self.way = cancels.get(name.removeprefix('after_cancel_')) if 'cancel' in name else None
    def __call__(self, name):
        if self.way and name==self.way[0]: raise self.way[1]()
        if name==self.at: self.left -= 1
        if name==self.at and not self.left: raise self.error('on purpose')

def distillation(teacher):
    return KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, ['bn1', 'conv2'])])

hint = Term(FitNet, 'conv2', adapter='auto')
learned = Term(VariationalInformation, 'bn2')

def with_learned_loss(teacher): return KnowledgeDistillationCallback(teacher, [SoftTarget, hint, learned])

def with_settings(teacher):
    return KnowledgeDistillationCallback(Teacher(teacher, precision='bf16', channels_last=True, chunk=7),
                                         [SoftTarget, hint])

def cached(teacher): return KnowledgeDistillationCallback(CachedTeacher(teacher, features='conv2'), [SoftTarget, hint])
def several(teacher): return KnowledgeDistillationCallback([teacher, convnet(4)])
def scheduled(teacher): return KnowledgeDistillationCallback(teacher, [hint], schedule=lambda pct: float(pct>.3))

kinds = dict(learned=with_learned_loss, set=with_settings, cached=cached, several=several, scheduled=scheduled)

def test_all_of_fastais_events_are_tried():
    assert len(events)==len(set(events))>=23
    assert {'before_fit', 'after_loss', 'after_cancel_fit', 'after_fit'}<={*events}

@pytest.mark.parametrize('order', (-20, 100), ids=('first', 'last'))
@pytest.mark.parametrize('error', (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize('name', events)
def test_an_exception_at_any_event_leaves_nothing(make, teacher, name, error, order):
    for in_learner in (True, False):
        learn,kd = make(),distillation(teacher)
        if in_learner: learn.add_cb(kd)
        with pytest.raises(error): learn.fit(1, cbs=[Raises(name, error, order)]+([] if in_learner else [kd]))
        assert kd.fit_state is None
        assert_untouched(learn, teacher)
        learn.fit(1, cbs=[] if in_learner else kd)
        assert_untouched(learn, teacher)
        assert learn.recorder.metric_names[-2:]==['SoftTarget', 'Attention']

often = [e for e in events if 'cancel' not in e and 'fit' not in e]

@pytest.mark.slow
@pytest.mark.parametrize('error', (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('name,nth', [*((e, 1) for e in events), *((e, 2) for e in often)])
def test_an_exception_at_any_event_leaves_nothing_of_any_kind_of_distillation(make, teacher, kind, name, error, nth):
    learn,kd = make(),kinds[kind](teacher)
    learn.add_cb(kd)
    before = [w.stride() for w in teacher.parameters()]
    with pytest.raises(error): learn.fit(2, cbs=Raises(name, error, 100, nth))
    assert kd.fit_state is None and [w.stride() for w in teacher.parameters()]==before
    assert_untouched(learn, teacher)
    learn.fit(1)
    assert params(learn).isfinite().all() and all(v==v for v in learn.recorder.values[-1][:4])
    assert_untouched(learn, teacher)

@pytest.mark.parametrize('what', cancels)
def test_fastais_own_cancellations_leave_nothing(make, teacher, what):
    at,error = cancels[what]
    class Cancels(Callback):
        def __call__(self, name):
            if name==at and (self.learn.training or what in ('validate', 'epoch', 'fit')): raise error()
    learn = make(cbs=distillation(teacher))
    learn.fit(1, cbs=Cancels())
    assert_untouched(learn, teacher)

@pytest.fixture
def ctrl_c():
    "Python's own answer to Ctrl-C, which a process that was started in the background lacks"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

@pytest.mark.usefixtures('ctrl_c')
@pytest.mark.parametrize('where', ('teacher', 'student', 'loss', 'data'))
def test_an_error_or_ctrl_c_in_the_middle_of_a_batch_leaves_nothing(make, teacher, where):
    for stop in (lambda: signal.raise_signal(signal.SIGINT), lambda: 1/0):
        n = [0]
        def count(*args):
            n[0] += 1
            if n[0]==(25 if where=='data' else 2): stop()
        def counting(pred, teacher_pred, **kwargs):
            count()
            return (pred-teacher_pred).pow(2).mean()
        terms = [counting if where=='loss' else SoftTarget, Term(Attention, 'bn1')]
        learn = make(cbs=KnowledgeDistillationCallback(teacher, terms))
        handles = []
        models = dict(teacher=teacher, student=learn.model)
        if where in models: handles.append(models[where].head.register_forward_hook(count))
        if where=='data':
            dl,item = learn.dls.train,learn.dls.train.create_item
            dl.create_item = lambda i: (count(), item(i))[1]
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)): learn.fit(1)
        for h in handles: h.remove()
        assert_untouched(learn, teacher)

def test_an_exception_that_is_being_handled_outside_the_fit_ends_nothing(make, teacher):
    class TakesOff(Callback):
        def after_step(self):
            with self.learn.removed_cbs(self): pass
    try: raise ValueError('outside')
    except ValueError:
        learn = make(cbs=distillation(teacher))
        learn.fit(2, cbs=TakesOff())
    assert len([v for v in learn.recorder.values if v[-1]==v[-1]])==2
    assert_untouched(learn, teacher)

def test_a_validation_that_fails_and_is_caught_ends_nothing(make, teacher):
    class Tries(Callback):
        def after_train(self):
            try: self.learn.validate(cbs=Raises('after_pred', RuntimeError, 0))
            except RuntimeError: pass
            self.learn.training = True
    learn,calls = make(cbs=distillation(teacher)),[]
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    learn.fit(2, cbs=Tries())
    handle.remove()
    assert len(calls)==2*len(learn.dls.train)
    assert_untouched(learn, teacher)

def test_a_callback_that_joins_in_the_middle_is_told_so_and_never_silent(make, teacher):
    class Adds(Callback):
        def after_step(self):
            if not hasattr(self.learn, 'knowledge_distillation'): self.learn.distill(teacher)
    learn = make()
    with pytest.raises(RuntimeError, match='joins a fit at its beginning'): learn.fit(1, cbs=Adds())

def test_a_refusal_in_the_first_batch_leaves_the_whole_state_dict_as_it_was(make, teacher):
    for loss in (FitNet, Cosine, lambda **kwargs: torch.zeros(3), lambda **kwargs: None):
        learn = make()
        before = weights(learn)
        kd = KnowledgeDistillationCallback(teacher, Term(loss, 'conv2'))
        with pytest.raises((ValueError, TypeError)): learn.fit(1, cbs=kd)
        assert torch.equal(weights(learn), before)
        assert_untouched(learn, teacher)

@pytest.mark.parametrize('how', ('remove_cb', 'remove_cbs'))
def test_a_callback_taken_off_in_the_middle_leaves_nothing_at_the_end(make, teacher, how):
    class TakesOff(Callback):
        def after_step(self):
            for cb in list(self.learn.cbs):
                if isinstance(cb, KnowledgeDistillationCallback): getattr(self.learn, how)(cb)
    learn = make(cbs=distillation(teacher))
    learn.fit(1, cbs=TakesOff())
    assert_untouched(learn, teacher)

def test_given_to_the_learner_and_to_the_fit_it_is_refused_in_words_each_time(make, teacher):
    kd = distillation(teacher)
    learn = make(cbs=kd)
    with pytest.raises(ValueError, match='is given twice, to the Learner'): learn.fit(1, cbs=kd)
    with pytest.raises(ValueError, match='make a new one'): learn.fit(1)
    learn.remove_cb(KnowledgeDistillationCallback).distill(teacher).fit(1)
    assert_untouched(learn, teacher)

def test_batchnorm_statistics_stay_where_another_callback_cancels_every_batch(make, teacher):
    class Recalibrates(Callback):
        def after_pred(self):
            if self.learn.training: raise CancelBatchException
    ends = []
    for cbs in ([], [distillation(teacher)]):
        learn = make()
        learn.fit(1, cbs=[Recalibrates(), *cbs])
        ends.append(weights(learn))
    assert torch.equal(*ends)

def test_a_weight_raised_from_0_in_the_middle_is_told_not_ignored(make, teacher):
    class Raises(Callback):
        def after_step(self): self.learn.knowledge_distillation.weight = .5
    learn = make(cbs=KnowledgeDistillationCallback(teacher, weight=0))
    with pytest.raises(ValueError, match='let a schedule start at 0'): learn.fit(1, cbs=Raises())
    assert_untouched(learn, teacher)

# --- what a teacher or a loss gives in the middle of a fit

class Turns(nn.Module):
    "A teacher that answers `otherwise` from its third batch on"
    def __init__(self, otherwise):
        super().__init__()
        self.net = convnet(8)
        self.otherwise = otherwise
        self.n = 0
    def forward(self, x):
        self.n += 1
        return self.otherwise(self.net(x)) if self.n>2 else self.net(x)

def raises(_): raise ZeroDivisionError('the teacher')
def all_nan(o): return o*torch.nan
def one_inf(o): return o.index_fill(0, torch.tensor([3]), torch.inf)
def fewer_classes(o): return o[:, :7]
def fewer_items(o): return o[:7]
def nothing(o): return ()
def too_large(o): return o+torch.empty(len(o)*10**14)

turns = dict(
    raises=(raises, ZeroDivisionError, 'the teacher'),
    nan=(all_nan, FloatingPointError, "in epoch 1, iteration 0 .*, SoftTarget is nan, "
                                      "and the teacher's output is not finite for 20 of 20 items"),
    inf=(one_inf, FloatingPointError, "the teacher's output is not finite for 1 of 20 items"),
    fewer_classes=(fewer_classes, ValueError,
                   r"SoftTarget compares like with like: the student's output has the shape \(20, 10\), "
                   r"the teacher's \(20, 7\)"),
    fewer_items=(fewer_items, ValueError, 'SoftTarget compares like with like'),
    a_tuple_of_nothing=(nothing, TypeError, 'the teacher returns a tuple'),
    no_memory=(too_large, torch.OutOfMemoryError,
               r"there is not the memory for the teacher's answer to 20 items at a time: Teacher\(model, chunk=5\)"))

@pytest.mark.parametrize('turn', turns)
def test_a_teacher_that_turns_in_the_middle_is_told_and_leaves_nothing(make, turn):
    otherwise,error,says = turns[turn]
    teacher = Turns(otherwise)
    learn = make(cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
    with pytest.raises(error, match=says): learn.fit(3)
    assert_untouched(learn, teacher)
    learn.model.load_state_dict(convnet().state_dict())
    learn.create_opt()
    learn.remove_cb(KnowledgeDistillationCallback).distill(convnet(8)).fit(1)
    assert params(learn).isfinite().all()

def test_a_teachers_layer_that_changes_its_shape_in_the_middle_is_told(make):
    teacher = Turns(lambda o: o)
    learn,n = make(cbs=KnowledgeDistillationCallback(teacher, Term(Attention, 'conv2', 'net.conv2'))),[]
    def cut(m, x, o):
        n.append(1)
        return o if len(n)<3 else o.flatten(2)
    handle = teacher.net.conv2.register_forward_hook(cut)
    teacher.net.bn2 = nn.Identity()     # takes maps alone
    says = (r"Attention needs two maps .*: the student's layer 'conv2' gives \(20, 4, 4, 4\) "
            r"but the teacher's layer 'net.conv2' \(20, 8, 16\)")
    with pytest.raises(ValueError, match=says): learn.fit(3)
    handle.remove()
    assert_untouched(learn, teacher)

@pytest.mark.parametrize('early', (False, True), ids=('after the step', 'before the step'))
@pytest.mark.parametrize('loss', ('function', 'feature'))
def test_a_loss_of_nan_is_told_by_term_layer_and_iteration(make, teacher, early, loss):
    n = []
    def sour(pred, teacher_pred, **kwargs):
        n.append(1)
        return (pred-teacher_pred).pow(2).mean()*(torch.nan if len(n)==4 else 1)
    def spoil(m, x, o):
        n.append(1)
        return o*torch.nan if len(n)==4 else o
    if loss=='function':
        term = sour
        says = 'in epoch 1, iteration 1 .*, sour is nan, and what it reads is finite'
    else:
        term = Term(Similarity, 'conv2')
        says = ("in epoch 1, iteration 1 .*, Similarity is nan, "
                "and the teacher's layer 'conv2' is not finite for 20 of 20 items")
    handle = teacher.conv2.register_forward_hook(spoil) if loss=='feature' else None
    kd = KnowledgeDistillationCallback(teacher, [Term(Attention, 'bn1'), term], check_before_step=early)
    learn = make(cbs=kd)
    before = []
    learn.add_cb(After('after_pred', lambda l: before.append(params(l))))
    with pytest.raises(FloatingPointError, match=says): learn.fit(3)
    if handle: handle.remove()
    assert torch.equal(params(learn), before[-1]) if early else not params(learn).isfinite().all()
    learn.remove_cb(After)
    assert_untouched(learn, teacher)

def params(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_a_student_that_diverges_by_itself_trains_on_as_without_a_teacher(make, teacher):
    class Spoils(Callback):
        def before_batch(self):
            if self.training and self.epoch==1 and self.iter==0: self.learn.model.conv1.weight.data.fill_(torch.nan)
    for cbs in ([], [KnowledgeDistillationCallback(teacher)]):
        learn = make(cbs=cbs)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            learn.fit(3, cbs=Spoils())
        assert len(learn.recorder.values)==3
        assert sum('the student itself has diverged' in str(w.message) for w in told)==len(cbs)

def nan_at(n, value=torch.nan):
    "A loss that is `value` at its `n`-th call"
    calls = []
    def sour(pred, teacher_pred):
        calls.append(1)
        return (pred-teacher_pred).pow(2).mean()*(value if len(calls)==n else 1)
    return sour

def told_by(learn, *args, **kwargs):
    "What is warned of in a fit"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(*args, **kwargs)
    return [str(w.message) for w in told]

def test_a_task_loss_of_weight_0_has_no_part_in_the_total_even_as_nan(make, teacher):
    def unlabelled(learn): learn.learn.yb = (torch.full((len(learn.x), 10), torch.nan, device=learn.x.device),)
    kd = KnowledgeDistillationCallback(teacher, Logits, weight=1, task_weight=0)
    learn = make(cbs=[Callback(before_batch=unlabelled), kd])
    learn.loss_func,learn.metrics = nn.MSELoss(),[]
    learn.fit(2)
    names = learn.recorder.metric_names[1:]
    row = dict(zip(names, learn.recorder.values[-1]))
    assert params(learn).isfinite().all()
    assert row['Logits']==row['Logits']==pytest.approx(row['train_loss']) and row['task_loss']!=row['task_loss']

def test_a_student_without_a_task_loss_still_takes_part_with_all_its_parameters(make, teacher):
    learn = make(cbs=KnowledgeDistillationCallback(teacher, Term(Attention, 'conv1'), task_weight=0))
    learn.add_cb(After('after_backward', lambda l: seen.append(all(p.grad is not None for p in l.model.parameters()))))
    seen = []
    learn.fit(1)
    assert seen==[True]*2

@pytest.mark.parametrize('n', (2, 3, 4))
def test_nan_in_a_batch_whose_end_is_cancelled_is_told_too(make, teacher, n):
    learn = make(bs=10, cbs=KnowledgeDistillationCallback(teacher, nan_at(n)))
    says = 'in epoch {}, iteration {} '.format(*divmod(n-1, 3))
    with pytest.raises(FloatingPointError, match=says): learn.fit(3, cbs=ShortEpochCallback(.5))
    assert_untouched(learn.remove_cb(After), teacher)

def test_where_another_callback_ends_the_fit_at_nan_the_term_is_named(make, teacher):
    told = told_by(make(cbs=KnowledgeDistillationCallback(teacher, nan_at(3))), 2, cbs=TerminateOnNaNCallback())
    assert sum('sour is nan, and what it reads is finite' in t for t in told)==1

def test_weights_that_make_a_total_infinite_are_told(make, teacher):
    def large(pred, teacher_pred): return 1e35*(pred-teacher_pred).pow(2).mean()
    learn = make(cbs=KnowledgeDistillationCallback(teacher, Term(large, weight=1e10), task_weight=1))
    before = weights(learn)
    says = 'with their weights they are too large for a sum. The student has not taken this step'
    with pytest.raises(FloatingPointError, match=says): learn.fit(1)
    assert torch.equal(weights(learn), before)

def test_accumulated_gradients_that_are_nan_are_cleared_so_that_the_next_fit_works(make, teacher):
    learn = make(bs=10, cbs=KnowledgeDistillationCallback(teacher, nan_at(3)))
    says = 'has not taken a step with it, and the gradients that it waited for are cleared'
    with pytest.raises(FloatingPointError, match=says): learn.fit(2, cbs=GradientAccumulation(40))
    learn.remove_cb(KnowledgeDistillationCallback).distill(teacher).fit(1)
    assert params(learn).isfinite().all()

class Scaled(Callback):
    "A scaler on any device, as MixedPrecision has one on a GPU"
    order = 10
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler(device().type, init_scale=2.**4)
    def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.learn.loss_grad)
    def before_step(self):
        self.learn.scaler.step(self.learn.opt.opt if hasattr(self.learn.opt, 'opt') else self)
        self.learn.scaler.update()
        raise CancelStepException()
    param_groups = property(lambda self: [dict(params=[p for p in self.learn.model.parameters()])])
    def step(self): self.learn.opt.step()

class Skips(Callback):
    "Leaves out batches whose loss is not finite"
    order = 8
    def after_loss(self):
        if not self.learn.loss.isfinite(): raise CancelBatchException()

class Cleans(Callback):
    def before_step(self):
        for p in self.learn.model.parameters(): p.grad.nan_to_num_(0., 0., 0.)

@pytest.mark.parametrize('guard', (Scaled, Skips, Cleans))
def test_an_overflow_that_did_no_harm_is_told_and_does_not_end_the_fit(make, teacher, guard):
    learn = make(cbs=KnowledgeDistillationCallback(teacher, nan_at(3, torch.inf)))
    told = told_by(learn, 3, cbs=guard())
    assert len(learn.recorder.values)==3 and params(learn).isfinite().all()
    assert sum('in epoch 1, iteration 0' in t and 'The student is unharmed' in t for t in told)==1

def test_a_loss_that_turns_into_something_else_is_told_in_any_batch(make, teacher):
    others = ((0., 'sour gave 0.0'), (None, 'sour gave None'),
              (torch.ones(3, requires_grad=True), r'sour gave the shape \(3,\)'))
    for value,says in others:
        calls = []
        def sour(pred, teacher_pred):
            calls.append(1)
            return value if len(calls)==3 else (pred-teacher_pred).pow(2).mean()
        learn = make(cbs=KnowledgeDistillationCallback(teacher, sour))
        with pytest.raises(TypeError, match=says+': a loss is a scalar tensor'): learn.fit(2)
        assert_untouched(learn, teacher)

def test_a_callback_that_handles_an_error_of_its_own_in_the_middle_ends_nothing(make, teacher):
    class Handles(Callback):
        def after_step(self):
            try: raise KeyError('x')
            except KeyError:
                with self.learn.removed_cbs(self): pass
    learn = make(cbs=distillation(teacher))
    learn.fit(2, cbs=Handles())
    assert all(v==v for v in learn.recorder.values[-1])
    assert_untouched(learn, teacher)

@pytest.mark.parametrize('first', (0, 1))
def test_a_mixup_that_mixes_some_batches_only_trains_on(make, teacher, first):
    class Sometimes(MixUp):
        def before_batch(self):
            self.mixes = self.iter%2==first
            if self.mixes: super().before_batch()
        def lf(self, pred, *yb):
            if self.training and not self.mixes: return self.old_lf(pred, *yb)
            return super().lf(pred, *yb)
    make(cbs=distillation(teacher)).fit(1, cbs=Sometimes())

def test_lr_find_goes_on_where_the_student_diverges(make, teacher):
    learn = make(cbs=KnowledgeDistillationCallback(teacher, [SoftTarget, Term(FitNet, 'conv2', adapter='auto')]))
    before = weights(learn)
    with learn.no_bar(): learn.lr_find(start_lr=1e5, end_lr=1e30, num_it=20, stop_div=False, show_plot=False)
    assert torch.equal(weights(learn), before)
    assert_untouched(learn, teacher)

# --- paths of an exported Learner

def a_directory(path): path.mkdir()
def weights_alone(path): torch.save(convnet().state_dict(), path)
def a_model(path): torch.save(nn.Linear(1, 1), path)
def text(path): path.write_text('not a pickle')
def empty(path): path.touch()

@pytest.mark.parametrize('what', (a_directory, weights_alone, a_model, text, empty, None))
def test_a_path_that_holds_no_learner_is_told_at_once(tmp_path, what):
    path = tmp_path/'teacher.pkl'
    if what: what(path)
    says = 'there is no file' if what in (None, a_directory) else 'could not be loaded as an exported Learner'
    with pytest.raises(ValueError, match=says): KnowledgeDistillationCallback(path)

def test_an_export_that_was_cut_off_anywhere_is_told_at_once(make, tmp_path):
    learn = make(path=tmp_path)
    learn.export('whole.pkl')
    whole = (tmp_path/'whole.pkl').read_bytes()
    for share in (.1, .5, .99):
        (tmp_path/'part.pkl').write_bytes(whole[:int(share*len(whole))])
        with pytest.raises(ValueError, match="part.pkl', which was to be the teacher, could not be loaded"):
            KnowledgeDistillationCallback(tmp_path/'part.pkl')
    KnowledgeDistillationCallback(tmp_path/'whole.pkl')
