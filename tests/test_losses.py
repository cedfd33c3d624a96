"What holds of every loss."
import copy, inspect, math, os, subprocess, sys, warnings

import every as suited
import pytest
import torch
from conftest import assert_untouched, device
from fastai.callback.core import Callback
from fasterkd.all import *
from fasterkd.losses import *
from fasterkd.losses.core import Mixed, mixes, used_inputs
from torch import nn

names = [n for n in every() if n not in suited.of_other_data]

@pytest.mark.parametrize('name', names)
def test_each_trains_two_steps_through_a_term_and_moves_the_student_alone(make, name):
    torch.manual_seed(3)
    student,teacher = suited.models(name)
    teacher.train()
    learn = make(student)
    before = copy.deepcopy(teacher.state_dict())
    start = {n: p.detach().clone() for n,p in student.named_parameters()}
    values = []
    class Watch(Callback):
        order = 1000
        def before_backward(self): values.append(self.learn.loss_grad.item())
    learn.fit(1, cbs=[KnowledgeDistillationCallback(teacher, suited.term(name, 40), weight=1), Watch()])
    assert len(values)==2 and all(torch.tensor(values).isfinite())
    moved = [n for n,p in student.named_parameters() if not torch.equal(p, start[n])]
    assert moved, f'{name} has no gradient at the student'
    assert all(torch.equal(v, before[n]) for n,v in teacher.state_dict().items())
    assert_untouched(learn, teacher)

def test_every_public_loss_has_a_paper_and_nothing_else_has_one():
    import fasterkd.losses as all_losses
    no_losses = {'SimilarityPreserving', 'LearnedLoss', 'Fusion', 'Grid', 'Draws', 'ContrastSide'}
    assert {*every()}=={n for n in all_losses.__all__ if n[0].isupper()}-no_losses
    assert all(o.published.paper and 2014<=o.published.year<=2026 for o in every().values())

def test_published_settings_are_settings_of_the_loss():
    for name,loss in every().items():
        assert {*loss.published.settings}<={*inspect.signature(loss).parameters}, name
        if loss.published.weight is None or name in (*suited.of_other_data, 'ContrastiveRepresentation'): continue
        assert Term(loss.published).weight==loss.published.weight

def test_a_loss_of_classes_on_outputs_that_are_none_is_told(make, teacher):
    from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
    def one_hot(learn): learn.learn.yb = (nn.functional.one_hot(learn.y, 10).float(),)
    cases = ((BCEWithLogitsLossFlat(), SoftTarget, 'labels that do not: BinarySoftTarget'),
             (MSELossFlat(), DIST, 'numbers: Logits'),
             (BCEWithLogitsLossFlat(), None, ''),
             (MSELossFlat(), Logits, ''))
    for loss_func,loss,says in cases:
        learn = make(cbs=[Callback(before_batch=one_hot), KnowledgeDistillationCallback(teacher, loss)])
        learn.loss_func = loss_func
        learn.metrics = []
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always')
            learn.fit(1)
        assert [says in str(w.message) for w in warned]==[True]*bool(says)

def test_signs_are_told_where_there_are_none(make):
    for layer,n in (('act2', 1), ('bn2', 0)):
        student,teacher = suited.convs(4),suited.convs(4)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always')
            make(student, cbs=KnowledgeDistillationCallback(teacher, Term(ActivationBoundaries, layer))).fit(1)
        assert sum('reads the signs of pre-activations' in str(w.message) for w in warned)==n

# --- those that draw random numbers

def contrastive(): return ContrastiveRepresentation(40, dim=4, negatives=8)

drawing = dict(MaskedGenerative=MaskedGenerative, ContrastiveRepresentation=contrastive)

@pytest.mark.parametrize('name', drawing)
def test_two_terms_that_are_made_at_once_draw_numbers_of_their_own_and_the_same_in_another_run(make, name):
    def seeds():
        student,teacher = suited.models(name)
        kd = KnowledgeDistillationCallback(teacher, [Term(drawing[name](), layer) for layer in ('bn1', 'bn2')])
        make(student).fit(1, cbs=kd)
        return [t.loss.draws.n.item() for t in kd.terms]
    first = seeds()
    assert len({*first})==2 and seeds()==first

def test_another_process_draws_the_same_numbers():
    code = ("import torch; from fasterkd.losses import *; torch.manual_seed(0); l = MaskedGenerative(); "
            "l.make({'a': torch.ones(2, 3, 4, 4)}, {'a': torch.ones(2, 5, 4, 4)}); print(l.draws.n.item())")
    def drawn(seed):
        env = os.environ|dict(PYTHONHASHSEED=seed)
        python = [sys.executable, '-W', 'ignore', '-c', code]
        return subprocess.run(python, env=env, capture_output=True, text=True, check=True).stdout
    assert drawn('1')==drawn('2')!=''

# --- identical student and teacher

def inputs(name, dtype=torch.float32, shape=None, scale=None):
    "Something that the loss called `name` takes of one side"
    torch.manual_seed(0)
    scale = scale or (.1 if name=='DarkRank' else 1.)
    if shape is not None: return scale*torch.randn(shape).to(dtype)
    if name=='AttentionMaps': return torch.randn(6, 2, 5, 5).softmax(3).to(dtype)
    if name in ('ValueRelations', 'HiddenStates'): return (scale*torch.randn(6, 5, 8)).to(dtype)
    if 'fm_s' not in used_inputs(every()[name]): return (scale*torch.randn(6, 10)).to(dtype)
    return (scale*torch.randn(6, 8, 4, 4)).to(dtype)

def is_function(loss): return not isinstance(loss, type)

functions = [n for n,o in every().items() if is_function(o) and n not in (*suited.of_other_data, 'InputGradient')]
of_logits = [n for n in functions if 'pred' in used_inputs(every()[n])]
relational = ('DIST', 'ClassAlignment', 'BatchAlignment')     # of logits, which compare items with each other
others = dict(
    NormalizedKD='the entropies of the teacher',
    WeightedSoftLabels='the weighted entropy of the teacher',
    TransformedTeacher='the teacher is softened, the student not',
    HardLabels='the cross-entropy with its own decision',
    CorrectedTeacher='the teacher is corrected',
    ActivationBoundaries='a margin to be kept',
    SparsityPattern='a cross-entropy, the less the surer',
    DarkRank='the likelihood of the order',
    InformationCorrelation='correlations with the unbiased deviation fall short of one',
    MutualInformation='the entropy of the similarities',
    LogDistance='minus infinity')

def labels(name, y):
    "`y` as arguments of the loss called `name`, if it reads labels"
    return [y] if 'target' in used_inputs(every()[name]) else []

def value(name, s, t):
    y = torch.arange(len(s))%10
    if name=='FlowOfSolution': s,t = [s, 2*s],[t, 2*t]
    return every()[name](s, t, *labels(name, y))

@pytest.mark.parametrize('name', [n for n in functions if n not in others])
def test_identical_student_and_teacher_give_zero_which_is_the_least(name):
    x = inputs(name, torch.float64)
    near = x+.1*torch.randn_like(x) if name!='AttentionMaps' else (x.log()+.1*torch.randn_like(x)).softmax(3)
    s = x.clone().requires_grad_()
    at_least = value(name, s, x)
    at_least.backward()
    least = 1e-5 if name=='DIST' else 1e-9      # which has an epsilon of 1e-8 beside the norms of its columns
    assert abs(at_least.item())<least and s.grad.isfinite().all() and value(name, near, x)>least

@pytest.mark.parametrize('name', others)
def test_the_others_have_a_value_of_their_own_and_no_nan(name):
    x = inputs(name, torch.float64)
    s = x.clone().requires_grad_()
    at = value(name, s, x)
    assert not at.isnan() and at.abs()>1e-9
    if name!='LogDistance':
        at.backward()
        assert s.grad.isfinite().all()

# --- precision, memory formats, wrong shapes

def scaled_gradient(name, s, t, scale):
    "The loss, and its gradient times `scale`"
    s = s.clone().requires_grad_()
    loss = value(name, s, t)
    (scale*loss).backward()
    return loss.detach(),s.grad

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize('kind', ('spread', 'two values'))
@pytest.mark.parametrize('name', functions)
def test_values_and_gradients_of_low_precision_are_those_of_float32_for_numbers_of_ten_thousand(name, kind, dtype):
    s = inputs(name, scale=1e4)
    if kind=='two values' and name!='AttentionMaps': s = 1e4*s.sign()
    s = s.clamp(-3e4, 3e4).to(dtype)
    t,exact = s.flip(0),s.float()
    largest = scaled_gradient(name, exact, exact.flip(0), 1)[1].abs().max().item()
    # as GradScaler scales a loss whose gradient is beyond float16, or below it
    scale = 2.**round(math.log2(1e3/largest)) if largest else 1.
    loss,grad = scaled_gradient(name, s, t, scale)
    loss32,grad32 = scaled_gradient(name, exact, exact.flip(0), scale)
    assert loss.isfinite() and grad.isfinite().all()
    assert torch.equal(loss, loss32)
    eps = 2*torch.finfo(dtype).eps
    torch.testing.assert_close(grad.float(), grad32, rtol=eps, atol=eps*grad32.abs().max().item())

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize('name', functions)
def test_inside_autocast_values_and_gradients_are_those_outside(name, dtype):
    where = device()
    s,t = inputs(name).to(where),inputs(name).flip(0).to(where)
    if name!='AttentionMaps': s,t = 100*s,100*t     # whose products float16 does not hold
    ends = []
    for on in (False, True):
        x = s.clone().requires_grad_()
        with torch.autocast(where.type, dtype, enabled=on): v = value(name, x, t)
        v.backward()
        ends.append((v.detach(), x.grad))
        assert v.isfinite() and x.grad.isfinite().all()
    for a,b in zip(*ends): assert torch.equal(a, b)

# the weights of WeightedSoftLabels are constants that follow the student
@pytest.mark.parametrize('name', [n for n in functions if n!='WeightedSoftLabels'])
def test_gradients_are_those_of_finite_differences(name):
    s = inputs(name, torch.float64).requires_grad_()
    t = inputs(name, torch.float64).flip(0)+.01
    if name=='AttentionMaps': t = t/t.sum(3, keepdim=True)
    value(name, s, t).backward()
    torch.manual_seed(1)
    d = torch.randn_like(s)
    d = d/d.norm()
    with torch.no_grad(): slope = (value(name, s+1e-6*d, t)-value(name, s-1e-6*d, t))/2e-6
    assert abs(slope-(s.grad*d).sum())<=1e-5*max(1, s.grad.norm().item())

@pytest.mark.parametrize('name', functions)
def test_strides_do_not_matter(name):
    s,t = inputs(name),inputs(name).flip(0)
    def strided(x):
        if x.ndim==4: return x.to(memory_format=torch.channels_last)
        return x.repeat_interleave(2, -1)[..., ::2]
    assert torch.allclose(value(name, strided(s), strided(t)), value(name, s, t), rtol=1e-5)

@pytest.mark.parametrize('name', functions)
def test_one_item_gives_a_number_or_is_refused_in_words(name):
    s,t = inputs(name)[:1],inputs(name)[1:2]
    try: assert value(name, s, t).isfinite()
    except ValueError as e: assert len(str(e))>20

of_maps = ('AttentionMaps', 'HierarchicalContext', 'ClassAttention')

@pytest.mark.parametrize('name', [n for n in functions if n not in (*of_logits, *of_maps)])
def test_tokens_work_wherever_a_map_does(name):
    s,t = torch.randn(6, 9, 8),torch.randn(6, 9, 8)
    assert not value(name, s, t).isnan()

@pytest.mark.parametrize('name', functions)
def test_wrong_shapes_are_told_with_both(name):
    s,t = inputs(name),inputs(name)[:3]
    with pytest.raises(ValueError) as e: value(name, s, t)
    message = str(e.value)
    assert '(6,' in message and '(3,' in message or 'batch' in message, message

@pytest.mark.parametrize('name', [n for n in of_logits if n not in relational])
def test_dense_and_sequence_logits_give_the_mean_over_positions(name):
    torch.manual_seed(0)
    s,t,y = torch.randn(2, 5, 4, 3),torch.randn(2, 5, 4, 3),torch.randint(5, (2, 4, 3))
    loss = every()[name]
    flat = [x.movedim(1, -1).reshape(-1, 5) for x in (s, t)]
    expected = loss(*flat, *labels(name, y.flatten()))
    assert torch.allclose(loss(s, t, *labels(name, y)), expected, rtol=1e-4)
    sequence = [x.movedim(1, -1).reshape(2, 12, 5) for x in (s, t)]
    assert torch.allclose(loss(*sequence, *labels(name, y.reshape(2, 12))), expected, rtol=1e-4)

# --- what any loss of logits can be given, in a fit

def test_a_temperature_that_is_a_schedule_follows_the_fit(make, teacher):
    shares = []
    def T(pct):
        shares.append(pct)
        return 8-7*pct
    learn = make()
    learn.fit(2, cbs=KnowledgeDistillationCallback(teacher, SoftTarget(T=T)))
    assert shares==[0., .25, .5, .75]
    assert_untouched(learn, teacher)

def test_a_schedule_changes_the_result_as_the_temperature_itself_does(make, teacher):
    def after(**settings):
        learn = make()
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget(**settings)))
        return torch.cat([p.flatten() for p in learn.model.parameters()])
    assert torch.equal(after(T=lambda pct: 3.), after(T=3.))
    assert not torch.equal(after(T=lambda pct: 3.-2*pct), after(T=3.))

def test_weights_and_ignored_labels_reach_the_loss_in_a_fit(make, teacher):
    targets = []
    def right(teacher_pred, target):
        targets.append(target.clone())
        return (teacher_pred.argmax(1)==target).float()
    learn = make()
    learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, [SoftTarget(weights=right), SoftTarget(ignore_index=3)]))
    assert len(targets)==2 and all(len(y)==20 for y in targets)
    assert_untouched(learn, teacher)

def test_weights_that_read_labels_are_refused_with_mixed_labels(make, teacher):
    from fastai.callback.mixup import MixUp
    def fit(loss): make(cbs=MixUp()).fit(1, cbs=KnowledgeDistillationCallback(teacher, loss))
    def by_label(target): return target>0
    def by_teacher(teacher_pred): return teacher_pred.softmax(1).amax(1)
    for loss in (SoftTarget(ignore_index=3), SoftTarget(weights=by_label)):
        with pytest.raises(ValueError, match='reads the label, and under MixUp an item has two'): fit(loss)
    fit(SoftTarget(weights=by_teacher))

def test_a_published_loss_trains_with_its_weight_and_settings(make, teacher):
    def after(loss, **kwargs):
        learn = make()
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, loss, **kwargs))
        return torch.cat([p.flatten() for p in learn.model.parameters()])
    both = dict(weight=1, task_weight=1, activations_student='conv2', activations_teacher='bn2')
    assert torch.equal(after(Attention.published, **both), after(Term(Attention(p=2), weight=1000), **both))
    as_mix = dict(weight=1, task_weight=.1)
    assert torch.equal(after(SoftTarget.published(T=2.), **as_mix), after(Term(SoftTarget(T=2.), weight=.9), **as_mix))

@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', [n for n in of_logits if n not in relational])
def test_a_weight_for_each_item_makes_the_weighted_mean_of_the_items_own_losses(name):
    s = inputs(name, torch.float64).requires_grad_()
    t = inputs(name, torch.float64).flip(0)
    w = torch.rand(6, dtype=torch.float64)
    y = torch.arange(6)
    loss = every()[name]
    def of_item(i): return loss(s[i:i+1], t[i:i+1], *labels(name, y[i:i+1]))
    by_item = sum(w[i]*of_item(i) for i in range(6))/6
    weighted = loss(s, t, *labels(name, y), weights=w)
    assert torch.allclose(weighted, by_item)
    gradient, = torch.autograd.grad(weighted, s, retain_graph=True)
    assert torch.allclose(gradient, torch.autograd.grad(by_item, s)[0])

@pytest.mark.parametrize('name', relational)
def test_a_loss_that_compares_items_refuses_a_weight_for_each(name):
    with pytest.raises(TypeError, match='compares items with each other, so that none has a loss, and a weight'):
        every()[name](inputs(name), inputs(name), weights=torch.ones(6))

@pytest.mark.parametrize('name', of_logits)
def test_items_whose_label_is_ignored_are_as_if_they_were_not_there(name):
    s,t,y = inputs(name),inputs(name).flip(0),torch.tensor([0, 1, 3, 2, 3, 4])
    left = y!=3
    expected = every()[name](s[left], t[left], *labels(name, y[left]))
    assert torch.allclose(every()[name](s, t, target=y, ignore_index=3), expected)

@pytest.mark.parametrize('name', [n for n in of_logits if labels(n, 0)])
def test_labels_that_are_no_classes_are_refused_unless_they_are_left_out(name):
    s,t,y = inputs(name),inputs(name).flip(0),torch.tensor([0, 1, 2, -100, 3, 4])
    with pytest.raises(ValueError, match='none of the 10 classes; those of padding'): every()[name](s, t, y)
    left = y>=0
    assert torch.allclose(every()[name](s, t, y, ignore_index=-100), every()[name](s[left], t[left], y[left]))

@logit_loss
def Gap(pred, teacher_pred, power:float=2., n:int=10):
    "How far the largest of the first logits are apart"
    return (pred[:, :n].amax(1)-teacher_pred[:, :n].amax(1)).abs().pow(power).mean()

@logit_loss
def Right(pred, teacher_pred, target):
    "How probable the student finds the label"
    return pred.softmax(1).gather(1, target.unsqueeze(1)).mean()

@pytest.fixture
def maps():
    "Logits of two maps of four by five positions and three classes, and labels"
    torch.manual_seed(0)
    s = torch.randn(2, 3, 4, 5)
    return s,s.flip(0),torch.randint(3, (2, 4, 5))

def test_weights_of_items_and_of_positions_are_those_of_maps_and_sequences(maps):
    s,t,_ = maps
    first = torch.tensor([1., 0.])
    half = Gap(s[:1], t[:1])/2
    assert torch.allclose(Gap(s, t, weights=first), half)
    assert torch.allclose(Gap(s.flatten(2).mT, t.flatten(2).mT, weights=first), half)
    assert torch.allclose(Gap(s, t, weights=torch.ones(2, 4, 5)), Gap(s, t))
    def size(**kwargs): return kwargs['pred'][:, 0].abs()
    assert torch.allclose(Gap(s, t, weights=size), Gap(s, t, weights=s[:, 0].abs()))
    with pytest.raises(ValueError, match=r'weights are one for each item, \(3,\), or position, \(3,\); these have'):
        Gap(torch.eye(3), torch.eye(3), weights=lambda teacher_pred: teacher_pred)

def test_ignored_positions_of_a_map_are_left_out(maps):
    s,t,y = maps
    gaps = (s.amax(1)-t.amax(1)).pow(2)
    assert torch.allclose(Gap(s, t, target=y, ignore_index=2), gaps[y!=2].mean())

def test_mixed_labels_count_as_they_were_mixed_in_maps_and_with_weights_and_not_where_none_is_read(maps):
    s,t,y = maps
    apart = Mixed(y, y.flip(0), torch.tensor([1., 0.]))
    assert torch.allclose(Right(s, t, apart), (Right(s[:1], t[:1], y[:1])+Right(s[1:], t[1:], y[:1]))/2)
    one,other = s[:1],Mixed(y, y.flip(0), torch.tensor(.3))
    expected = (.3*Right(one, one, y[:1])+.7*Right(one, one, y[1:]))/2
    assert torch.allclose(Right(s, t, other, weights=torch.tensor([1., 0.])), expected)
    assert torch.equal(Gap(s, t, target=other), Gap(s, t))
    reads_label,reads_none = Right(weights=lambda target: target>0),Right(weights=lambda pred: pred[:, 0])
    assert not mixes(reads_label) and mixes(reads_none)

def test_a_whole_number_that_is_a_schedule_is_rounded(maps):
    s,t,_ = maps
    assert torch.equal(Gap(s, t, n=lambda pct: 1+pct, pct_train=1.), Gap(s, t, n=2))

@pytest.mark.parametrize('name', ['SoftTarget', 'Mutual', 'JensenShannon', 'MultiTemperature'])
def test_classes_that_the_teacher_masks_by_minus_infinity_leave_all_finite(name):
    s,t = inputs(name),inputs(name).flip(0).clone()
    t[:, 8:] = -torch.inf
    loss = every()[name](s.requires_grad_(), t)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()
