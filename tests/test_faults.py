"Whatever ends a fit, at whatever event, nothing of the distillation is left, and the next fit works."
import signal

import pytest
import torch
from conftest import assert_untouched, convnet, weights
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
                                  CancelTrainException, CancelValidException, _events)
from fasterkd.all import *

events = [e for e in _events if e!='after_create']
cancels = dict(batch=('after_pred', CancelBatchException), backward=('before_backward', CancelBackwardException), step=('before_step', CancelStepException),
               train=('before_batch', CancelTrainException), validate=('before_validate', CancelValidException), epoch=('before_train', CancelEpochException),
               fit=('before_epoch', CancelFitException))

class Raises(Callback):
    "Raises `error` at an event; before it, makes fastai come there if it is one of its cancellations"
    def __init__(self, name, error, order):
        self.at,self.error,self.order = name,error,order
        self.way = cancels.get(name.removeprefix('after_cancel_')) if 'cancel' in name else None
    def __call__(self, name):
        if self.way and name==self.way[0]: raise self.way[1]()
        if name==self.at: raise self.error('on purpose')

def distillation(teacher): return KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, ['bn1', 'conv2'])])

def test_all_of_fastais_events_are_tried(): assert len(events)==len(set(events))>=23 and {'before_fit', 'after_loss', 'after_cancel_fit', 'after_fit'}<={*events}

@pytest.mark.parametrize('order', (-20, 100), ids=('first', 'last'))
@pytest.mark.parametrize('error', (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize('name', events)
def test_an_exception_at_any_event_leaves_nothing(make, teacher, name, error, order):
    for in_learner in (True, False):
        learn,kd = make(),distillation(teacher)
        if in_learner: learn.add_cb(kd)
        with pytest.raises(error): learn.fit(1, cbs=[Raises(name, error, order)]+([] if in_learner else [kd]))
        assert kd.live is None
        assert_untouched(learn, teacher)
        learn.fit(1, cbs=[] if in_learner else kd)
        assert_untouched(learn, teacher)
        assert learn.recorder.metric_names[-2:]==['SoftTarget', 'Attention']

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
        learn = make(cbs=KnowledgeDistillationCallback(teacher, [counting if where=='loss' else SoftTarget, Term(Attention, 'bn1')]))
        handles = []
        if where in ('teacher', 'student'): handles.append((teacher if where=='teacher' else learn.model).head.register_forward_hook(count))
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
        with pytest.raises((ValueError, TypeError)): learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, Term(loss, 'conv2')))
        assert torch.equal(weights(learn), before)
        assert_untouched(learn, teacher)

@pytest.mark.parametrize('how', ('remove_cb', 'remove_cbs'))
def test_a_callback_taken_off_in_the_middle_leaves_nothing_at_the_end(make, teacher, how):
    class TakesOff(Callback):
        def after_step(self):
            for cb in [cb for cb in self.learn.cbs if isinstance(cb, KnowledgeDistillationCallback)]: getattr(self.learn, how)(cb)
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
