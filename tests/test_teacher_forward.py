"The teacher runs before the student's forward pass: once a batch, on what the student gets, and on nothing else."
import copy, gc, pickle, warnings, weakref

import pytest
import torch
from conftest import After, assert_untouched, convnet, device, hooks, weights
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.mixup import CutMix, MixUp
from fastai.learner import Learner
from fasterkd.all import *
from fasterkd.teacher_forward import streams_of
from fasterkd.base_teacher import BaseTeacher
from torch import nn

@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

@pytest.fixture
def calls(teacher):
    "Who was called with what, in order: the teacher at any time, and in training the models that `listen` is given"
    class Calls(list):
        def listen(self, who, model):
            def note(m, x):
                if who=='teacher' or m.training: self.append((who, x[0].detach().clone()))
            return model.register_forward_pre_hook(note)
        names = property(lambda self: [who for who,_ in self])
    res = Calls()
    res.listen('teacher', teacher)
    return res

def both(learn): return 2*len(learn.dls.train)

# --- when, and about what

of_fastai = [], [MixUp], [CutMix], [ChannelsLast], [MixUp, ChannelsLast]
def names_of(cbs): return '+'.join(c.__name__ for c in cbs) or 'plain'

@pytest.mark.parametrize('cbs', of_fastai, ids=names_of)
def test_each_batch_the_teacher_is_asked_first_and_about_what_the_student_gets(make, teacher, calls, cbs):
    learn = make(cbs=[KnowledgeDistillationCallback(teacher), *(cb() for cb in cbs)])
    calls.listen('student', learn.model)
    learn.fit(2)
    assert calls.names==['teacher', 'student']*both(learn)
    for (_,asked),(_,given) in zip(calls[::2], calls[1::2], strict=True): assert torch.equal(asked, given)

@pytest.mark.parametrize('order', (-100, 0, 100, 10_000))
def test_whatever_a_callback_does_to_the_batch_at_whatever_order_the_teacher_sees_it(make, teacher, calls, order):
    class Doubles(Callback):
        def before_batch(self): self.learn.xb = (2*self.x,)
    Doubles.order = order
    learn = make(cbs=[KnowledgeDistillationCallback(teacher), Doubles()])
    calls.listen('student', learn.model)
    learn.fit(1)
    for (_,asked),(_,given) in zip(calls[::2], calls[1::2], strict=True): assert torch.equal(asked, given)

def test_it_is_asked_under_the_autocast_that_the_student_computes_in(make, teacher):
    seen = []
    teacher.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    class Autocast(Callback):
        order = 10
        def before_batch(self):
            self.autocast = torch.autocast(device().type, torch.bfloat16)
            self.autocast.__enter__()
        def after_pred(self): self.learn.pred = self.pred.float()
        def after_loss(self): self.autocast.__exit__(None, None, None)
    make(cbs=[KnowledgeDistillationCallback(teacher), Autocast()]).fit(1)
    assert {*seen}=={torch.bfloat16}

def test_the_teachers_activations_are_gone_when_the_student_begins(make, teacher):
    alive,left = [],[]
    teacher.conv1.register_forward_hook(lambda m, x, out: alive.append(weakref.ref(out)))
    learn = make(cbs=KnowledgeDistillationCallback(Teacher(teacher), SoftTarget))
    def look(m, x):
        if m.training: left.extend(r for r in alive if r() is not None)
    learn.model.register_forward_pre_hook(look)
    gc.disable()
    try: learn.fit(1)
    finally: gc.enable()
    assert len(alive)==2 and not left

def test_a_batch_that_is_left_out_asks_nobody_and_one_that_is_left_out_later_leaves_nothing(make, teacher, calls):
    class Skips(Callback):
        run_valid = False
        def before_batch(self):
            if self.iter==0: raise CancelBatchException
        def after_pred(self):
            if self.iter==1: raise CancelBatchException
    learn = make(bs=10, cbs=[KnowledgeDistillationCallback(teacher), Skips()])
    learn.fit(1)
    assert len(calls)==3 and weights(learn).isfinite().all()
    assert_untouched(learn)

def test_while_nothing_counts_nobody_is_asked_but_in_the_first_batch(make, teacher, calls):
    make(bs=10, cbs=KnowledgeDistillationCallback(teacher, schedule=lambda pct: float(pct>=.5))).fit(1)
    assert len(calls)==1+2

def test_a_model_that_is_called_several_times_in_a_batch_asks_once(make, teacher, calls):
    class CallsAgain(Callback):
        run_valid = False
        def before_batch(self): self.model(self.x)
        def after_pred(self): self.model(self.x)
    make(cbs=[KnowledgeDistillationCallback(teacher), CallsAgain()]).fit(1)
    assert calls.names==['teacher']*2

def test_a_learner_with_a_loop_of_its_own_asks_when_the_loss_is_known(make, teacher, calls):
    class Own(Learner):
        def one_batch(self, i, b):
            self.iter = i
            self._split(self._set_device(b))
            self._with_events(lambda: type(self)._do_one_batch(self), 'batch', CancelBatchException)
    learn = make(cbs=KnowledgeDistillationCallback(teacher))
    learn.__class__ = Own
    learn.fit(1)
    assert len(calls)==2 and learn.recorder.values[-1][-1]==learn.recorder.values[-1][-1]

# --- in the middle of a fit

class InTheMiddle(Callback):
    "Does `f` in the second batch, between the student's answer and the loss"
    run_valid = False
    def __init__(self, f): self.f = f
    def after_pred(self):
        if self.iter==1: self.f(self.learn)

def test_what_is_copied_or_pickled_asks_no_teacher_and_has_no_hook(make, teacher, calls):
    made = []
    def copies(learn): made.extend([copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))])
    kd = KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, 'conv2')])
    make(cbs=[kd, InTheMiddle(copies)]).fit(1)
    asked = len(calls)
    for model in made: model.train()(torch.zeros(4, 1, 8, 8, device=device()))
    assert len(calls)==asked==2

def test_a_learner_copied_in_the_middle_trains_on_with_one_question_a_batch(make, teacher, calls):
    twins = []
    def copy_once(learn):
        if not twins: twins.append(copy.deepcopy(learn))
    make(cbs=[KnowledgeDistillationCallback(teacher), After('before_epoch', copy_once)]).fit(1)
    twin = twins[0]
    twin.remove_cb(After)
    calls.clear()
    twin.fit(1)
    assert calls.names==['teacher']*2
    assert_untouched(twin)

def test_a_program_that_is_exported_is_the_students_alone(make, teacher, calls):
    programs = []
    def exports(learn):
        student = copy.deepcopy(learn.model).cpu().eval()
        programs.append(torch.export.export(student, (torch.zeros(4, 1, 8, 8),)))
    make(cbs=[KnowledgeDistillationCallback(teacher), InTheMiddle(exports)]).fit(1)
    student = torch.export.export(convnet().eval(), (torch.zeros(4, 1, 8, 8),))
    assert len(calls)==2 and [n.target for n in programs[0].graph.nodes]==[n.target for n in student.graph.nodes]

def test_predictions_of_another_callback_in_the_middle_ask_nobody_and_change_nothing(make, teacher, calls):
    ends = []
    for cbs in ([], [After('after_epoch', lambda learn: None if learn.lock.locked() else learn.get_preds())]):
        calls.clear()
        learn = make(cbs=[KnowledgeDistillationCallback(teacher), *cbs])
        learn.fit(2)
        ends.append(weights(learn))
        assert len(calls)==both(learn)
    assert torch.equal(*ends)

@pytest.mark.parametrize('when', ('in place', 'in place, after a call', 'wrapped'))
def test_a_compiled_student_trains_as_the_plain_one_and_asks_once_a_batch(make, teacher, calls, when):
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        learn = make(cbs=KnowledgeDistillationCallback(teacher, [SoftTarget, Term(Attention, 'conv2', weight=10)]))
        calls.clear()
        if compiled and when=='wrapped': learn.model = torch.compile(learn.model, backend='eager')
        elif compiled: learn.model.compile(backend='eager')
        if compiled and 'after a call' in when: learn.model.eval()(torch.zeros(20, 1, 8, 8, device=device()))
        learn.fit(2)
        ends.append(weights(learn))
        assert len(calls)==both(learn) and hooks(learn.model)==0
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)

# --- a student that changes its input

class Changes(nn.Module):
    "Changes its input in place"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x.mul_(-1))

def test_of_an_input_that_the_student_changes_in_place_the_teacher_sees_the_original(make, teacher, calls):
    given = []
    def note(learn):
        if learn.training: given.append(learn.x.clone())
    make(Changes(convnet()), cbs=[KnowledgeDistillationCallback(teacher), After('before_batch', note)]).fit(2)
    assert len(calls)==4 and all(torch.equal(asked, x) for (_,asked),x in zip(calls, given, strict=True))

def test_a_teacher_that_changes_its_input_in_place_leaves_the_students_alone(make, teacher):
    ends = []
    for t in (nn.Sequential(Negative(), teacher), Changes(teacher)):
        learn = make(cbs=KnowledgeDistillationCallback(t))
        learn.fit(2)
        ends.append(weights(learn))
    assert torch.equal(*ends)

class Negative(nn.Module):
    def forward(self, x): return -x

# --- who may be asked on a stream of its own

def test_a_stream_is_a_teachers_own_choice():
    net,other = nn.Linear(2, 2),nn.Linear(2, 2)
    assert Teacher(net).stream and not Teacher(net, stream=False).stream and not BaseTeacher.stream
    assert EnsembleTeacher([Teacher(net), Teacher(other)]).stream
    assert not EnsembleTeacher([Teacher(net), Teacher(other, stream=False)]).stream
    assert CachedTeacher(Teacher(net)).stream and not CachedTeacher(Teacher(net, stream=False)).stream
    with pytest.raises(ValueError, match="stream is True or False, not 'side'"): Teacher(net, stream='side')

def test_the_cpu_has_no_streams(): assert streams_of(torch.device('cpu')) is None and streams_of(None) is None
