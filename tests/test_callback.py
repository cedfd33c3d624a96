"The callback in a fit: which layers meet, what the total is, batches without labels, models of text, what is refused."
import math, random
from functools import partial

import pytest, torch
from conftest import convnet, device, hooks, weights
from fastai.callback.core import Callback, CancelBatchException, CancelTrainException
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import ModelResetter
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.callback.training import ShortEpochCallback
from fastai.losses import CrossEntropyLossFlat
from fasterkd.all import KnowledgeDistillationCallback, Taps, Term
from fasterkd.layers import unique_names
from fasterkd.losses import DecoupledKD, FitNet, Logits, Similarity, SoftTarget
from torch import nn
from torch.nn import functional as F

def fitted(learn, *cbs, epochs=1):
    learn.fit(epochs, cbs=[*cbs])
    return learn

def test_only_the_first_batch_asks_the_teacher_where_the_weight_is_zero(make, teacher):
    calls,learn = [],make()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    learn = fitted(learn, KnowledgeDistillationCallback(teacher, schedule=lambda pct: float(pct>=.5)), epochs=2)
    assert len(calls)==1+len(learn.dls.train)       # the first batch, and the second epoch
    column = list(learn.recorder.metric_names).index('SoftTarget')-1
    assert [math.isnan(v[column]) for v in learn.recorder.values]==[True, False]

@pytest.mark.parametrize('s,t', [(['model.bn1', 'conv2', 'bn1'], ['act1', 'bn1', 'bn1']),
                                 (['conv2', 'conv1'], ['conv1', 'conv2'])])
def test_features_are_those_of_the_named_layers_in_declared_order(make, teacher, s, t):
    got = []
    def reads(fm_s, fm_t, xb, **kwargs):
        got[:] = {n: f.detach() for n,f in fm_s.items()},{n: f.detach() for n,f in fm_t.items()},xb
        return sum(f.mean() for f in fm_s.values())
    learn = fitted(make(), KnowledgeDistillationCallback(teacher, reads, s, t, weight=.2), ShortEpochCallback(0.))
    assert (list(got[0]), list(got[1]))==(unique_names(s), unique_names(t))
    teacher.eval().to(device())
    with Taps(teacher, t) as taps:
        teacher(*got[2])
        again = taps.read()
    for n,f in got[1].items(): torch.testing.assert_close(f, again[n.split('#')[0]])
    assert hooks(learn.model, teacher)==0

class L1(nn.Module):
    def forward(self, pred, teacher_pred): return F.l1_loss(pred, teacher_pred)

forms = {'class': L1, 'module': L1(), 'term': [Term(L1)], 'dict': {'my_loss': L1()}, 'list': [L1, Logits]}

@pytest.mark.parametrize('form', forms)
def test_a_loss_is_given_in_any_form(make, teacher, form):
    fitted(make(), KnowledgeDistillationCallback(teacher, forms[form]))

def test_the_weight_of_a_term_and_that_of_the_callback_are_factors(make, teacher):
    as_term = KnowledgeDistillationCallback(teacher, [Term(L1, weight=.5, schedule=SchedCos(0, 1))], task_weight=.5)
    as_weight = KnowledgeDistillationCallback(teacher, L1, weight=.25, schedule=SchedCos(0, 1), task_weight=.5)
    assert torch.equal(weights(fitted(make(), as_term)), weights(fitted(make(), as_weight)))

def test_a_list_of_one_teacher_is_that_teacher(make, teacher):
    as_list = fitted(make(), KnowledgeDistillationCallback([teacher], Logits))
    assert torch.equal(weights(as_list), weights(fitted(make().distill(teacher, Logits))))

@pytest.mark.parametrize('kwargs', [dict(weight=2, task_weight=0), dict(weight=1)], ids=str)
def test_the_task_loss_may_count_nothing(make, teacher, kwargs):
    fitted(make(), KnowledgeDistillationCallback(teacher, **kwargs))

def test_the_total_is_the_formula(make, teacher):
    record = []
    def answers(x):
        with torch.no_grad(): return teacher.eval()(x)
    class Watch(Callback):
        order,run_valid = 60,False
        def after_loss(self):
            task,term = F.cross_entropy(self.pred, self.y),F.mse_loss(self.pred, answers(self.x))
            record.append([self.pct_train, *(v.item() for v in (self.loss_grad, self.learn.loss, task, term))])
    falling = Term(Logits, weight=2, schedule=lambda pct: 1-pct)
    kd = KnowledgeDistillationCallback(teacher, falling, weight=.7, schedule=SchedLin(.1, 1))
    fitted(make(), kd, Watch(), epochs=2)
    for pct,grad,loss,task,term in record:
        w = .7*(.1+.9*pct)
        assert grad==pytest.approx((1-w)*task+w*2*(1-pct)*term, rel=1e-5) and grad==loss

class Unlabel(Callback):
    run_valid = False
    def __init__(self, every): self.every = every
    def before_batch(self):
        if self.iter%self.every==0: self.learn.yb = ()

class RaisesAfterPred(Callback):
    run_valid = False
    def __init__(self, error, last=True): self.error,self.last = error,last
    def after_pred(self):
        if self.iter==(self.n_iter-1 if self.last else 0): raise self.error

def by_teacher(make, teacher, *cbs, **kwargs):
    return fitted(make(), KnowledgeDistillationCallback(teacher, SoftTarget(T=2), **kwargs), *cbs, epochs=2)

def test_some_batches_without_labels_leave_the_loss_function_and_a_finite_train_loss(make, teacher):
    half,whole = (by_teacher(make, teacher, *cbs, weight=.5) for cbs in ([Unlabel(2)], []))
    assert type(half.loss_func) is CrossEntropyLossFlat
    assert weights(half).ne(weights(whole)).any() and math.isfinite(half.recorder.values[-1][0])

@pytest.mark.parametrize('error', [CancelBatchException, CancelTrainException], ids=lambda e: e.__name__)
def test_validation_has_the_learners_own_loss_after_a_cancelled_batch_without_labels(make, teacher, error):
    ended = by_teacher(make, teacher, Unlabel(1), RaisesAfterPred(error), weight=1)
    assert type(ended.loss_func) is CrossEntropyLossFlat
    assert min(abs(v-ended.validate()[0]) for v in ended.recorder.values[-1])<1e-5

@pytest.mark.parametrize('error', [CancelBatchException, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_the_loss_function_is_the_learners_own_however_a_batch_without_labels_ends(make, teacher, error):
    learn = make(cbs=[KnowledgeDistillationCallback(teacher, weight=1), Unlabel(1), RaisesAfterPred(error, last=False)])
    try: learn.fit(1)
    except KeyboardInterrupt: pass
    assert type(learn.loss_func) is CrossEntropyLossFlat

@pytest.mark.parametrize('cbs,times', [([], 0), ([ModelResetter], 3)], ids=['not', 'reset'])
def test_a_teacher_of_text_is_reset_where_the_student_is(make, cbs, times):
    class Forgets(nn.Module):     # as fastai's models of text do
        def __init__(self):
            super().__init__()
            self.net,self.forgot = convnet(8),0
        def forward(self, x): return self.net(x)
        def reset(self): self.forgot += 1
    of_text,learn = Forgets(),make()
    learn.model.reset = lambda: None
    fitted(learn, KnowledgeDistillationCallback(of_text), *(cb() for cb in cbs), epochs=2)
    assert of_text.forgot==times      # each of two epochs begins anew, and nothing is remembered afterwards

def unlabelled(self): self.learn.yb = ()

def without_labels(): return Callback(before_batch=unlabelled)
def below_zero(t, learn): return t,Term(SoftTarget, schedule=lambda pct: -1)
def reads_labels(t, learn): return t,DecoupledKD
def student_inside(t, learn): return nn.Sequential(learn.model, nn.Identity()),
def features_of_an_ensemble(t, learn): return [t, convnet(4)],FitNet,'conv2'
def unknown_setting(t, learn): return t,partial(SoftTarget, temperature=3)
def the_teacher_alone(t, learn): return t,

# what is given → error, message, settings of the callback, another callback
refusals = {
    the_teacher_alone: (ValueError, "there is nothing else to learn from", dict(weight=0), without_labels),
    reads_labels: (ValueError, "DecoupledKD reads labels, and this training batch has none", {}, without_labels),
    below_zero: (ValueError, "the weight of SoftTarget by its schedule is finite and not negative, not -1", {}, None),
    student_inside: (ValueError, "the student is its own teacher, or shares", {}, None),
    features_of_an_ensemble: (ValueError, "an ensemble has no features", {}, None),
    unknown_setting: (TypeError, "SoftTarget has no setting 'temperature'", {}, None),
}

@pytest.mark.parametrize('given', refusals, ids=lambda f: f.__name__)
def test_is_refused_before_the_student_has_moved(make, teacher, given):
    error,says,settings,cb = refusals[given]
    learn = make(cbs=cb and cb())
    before = weights(learn)
    with pytest.raises(error, match=says):
        fitted(learn, KnowledgeDistillationCallback(*given(teacher, learn), **settings))
    assert torch.equal(weights(learn), before) and hooks(learn.model, teacher)==0

def test_a_teacher_that_shares_a_dropout_with_the_student_is_refused(make):
    learn,halves = make(),convnet(8)
    halves.drop = learn.model.drop
    with pytest.raises(ValueError, match="the student is its own teacher, or shares"):
        fitted(learn, KnowledgeDistillationCallback(halves))

def test_a_loss_without_a_gradient_is_warned_of(make, teacher):
    def detached(pred, teacher_pred, **kwargs): return (pred-teacher_pred).detach().abs().mean()
    kd = KnowledgeDistillationCallback(teacher, detached)
    with pytest.warns(UserWarning, match='no gradient'): fitted(make(), kd)

def test_plain_soft_targets_learn_under_mixup(make, teacher):
    random.seed(0)
    fitted(make(cbs=MixUp()), KnowledgeDistillationCallback(teacher))

def test_the_number_of_classes_matters_to_losses_of_logits_alone(make):
    kd = KnowledgeDistillationCallback(convnet(4, 7), Similarity, 'conv2')
    fitted(make(), kd)
