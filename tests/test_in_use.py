"What users do, and what they are told: heads, padding, schedules, teachers that know nothing, arguments elsewhere."
import copy, warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import convnet, device, weights
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import Learner, SchedCos, SchedLin
from fastai.data.core import DataLoaders
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, TransformBlock
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.vision.core import TensorImage
from fasterkd.all import *
from fasterkd.losses import VariationalInformation
from fasterkd.base_teacher import BaseTeacher
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

def data(x, y, bs=16, **kwargs):
    ds = TensorDataset(x, *(y if isinstance(y, tuple) else (y,)))
    ds.n_inp = 1
    return DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, drop_last=False, device=device(), **kwargs)

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)
    return learn

@contextmanager
def told():
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter('always')
        yield (res := [])
    res += [str(w.message) for w in raised if 'fasterkd' in w.filename]

def mlp(n_in, n_out, width=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n_in, width), nn.ReLU(), nn.Linear(width, n_out))

# --- outputs of several heads, and of other classes

class Heads(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body,self.a,self.b = nn.Linear(6, width),nn.Linear(width, 3),nn.Linear(width, 2)
    def forward(self, x): return self.a(z := self.body(x).relu()),self.b(z)

def two_heads(kind=tuple):
    torch.manual_seed(0)
    x,a,b = torch.randn(40, 6),torch.randint(0, 3, (40,)),torch.randint(0, 2, (40,))
    class Model(Heads):
        def forward(self, x): return kind(super().forward(x))
    def task(pred, a, b):
        pred = [*pred.values()] if isinstance(pred, dict) else pred
        return F.cross_entropy(pred[0], a)+F.cross_entropy(pred[1], b)
    return Learner(data(x, (a, b)), Model(8), loss_func=task),Model(16)

@pytest.mark.parametrize('kind', [tuple, list, lambda o: dict(a=o[0], b=o[1])])
@pytest.mark.parametrize('settings', [{}, dict(chunk=7), dict(precision='bf16')])
def test_a_loss_of_ones_own_receives_what_both_models_return(kind, settings):
    learn,model = two_heads(kind)
    heard = []
    def both(pred, teacher_pred, xb):
        assert type(pred) is type(teacher_pred)
        s,t = ([*o.values()] if isinstance(o, dict) else o for o in (pred, teacher_pred))
        heard.append((xb[0], *t))
        return SoftTarget(s[0], t[0])+SoftTarget(s[1], t[1])
    kd = KnowledgeDistillationCallback(Teacher(model, **settings), both)
    quiet(learn, 1, cbs=kd)
    for x,a,b in heard:
        own = model(x)
        for given,of in zip((a, b), own.values() if isinstance(own, dict) else own):
            torch.testing.assert_close(given, of.detach(), rtol=.05, atol=.05 if settings.get('precision') else 1e-5)
    assert len(kd.preflight(learn).terms)==2

def test_a_term_at_each_head_distils_a_model_of_two_heads_and_the_message_says_so():
    learn,model = two_heads()
    says = r"tuple of 2: name the layer that gives the outputs of one head, Term\(SoftTarget, 'layer of that head'\)"
    with pytest.raises(TypeError, match=says):
        quiet(learn, 1, cbs=KnowledgeDistillationCallback(model, SoftTarget(T=2)))
    quiet(learn, 1, cbs=KnowledgeDistillationCallback(model, [Term(SoftTarget, 'a'), Term(SoftTarget, 'b')]))

def test_several_outputs_are_not_cut_to_one_in_silence():
    learn,model = two_heads()
    def both(pred, teacher_pred, **kwargs): return SoftTarget(pred[0], teacher_pred[0])
    for teacher in (CachedTeacher(model), ):
        with pytest.raises(ValueError, match="keeps one tensor of what its teacher returns"):
            quiet(learn, 1, cbs=KnowledgeDistillationCallback(teacher, both))

@pytest.mark.parametrize('named', [False, True])
def test_a_function_of_ones_own_is_called_with_outputs_of_other_classes(named):
    x,y = torch.randn(40, 6),torch.randint(0, 5, (40,))
    dls = data(x, y)
    if named: dls.vocab = list('abcde')
    def old_only(pred, teacher_pred, **kwargs): return SoftTarget(pred[:, :3], teacher_pred, T=2)
    learn = Learner(dls, mlp(6, 5), loss_func=CrossEntropyLossFlat())
    quiet(learn, 1, cbs=KnowledgeDistillationCallback(Teacher(mlp(6, 3, 16), vocab=list('abc') if named else None),
                                                      old_only))

def test_classes_that_both_name_are_compared_by_name():
    x,y = torch.randn(32, 6),torch.randint(0, 5, (32,))
    dls,model = data(x, y),mlp(6, 4, 16).to(device())
    dls.vocab = list('abcde')
    class Total(Callback):
        order,run_valid = 5.5,False
        def after_loss(self):
            with torch.no_grad(): t = model(*self.xb)
            expected = .5*self.learn.loss_func(self.pred, self.y)+.5*SoftTarget(self.pred[:, [1, 3, 4]],
                                                                                t[:, [2, 0, 3]], T=2)
            torch.testing.assert_close(self.learn.loss_grad, expected)
    learn = Learner(dls, mlp(6, 5), loss_func=CrossEntropyLossFlat(), cbs=Total)
    quiet(learn, 1, cbs=KnowledgeDistillationCallback(Teacher(model, vocab=['d', 'x', 'b', 'e']),
                                                      Term(SoftTarget(T=2), classes='shared')))
    with pytest.raises(ValueError, match="those of the teacher are not known"):
        quiet(learn, 1, cbs=KnowledgeDistillationCallback(model, Term(SoftTarget(T=2), classes='shared')))
    with pytest.raises(ValueError, match=r"classes='shared'"):
        quiet(learn, 1, cbs=KnowledgeDistillationCallback(Teacher(model, vocab=['d', 'x', 'b', 'e'])))

# --- positions that the task loss leaves out

def padded(label, **kwargs):
    torch.manual_seed(0)
    x,inside = torch.randn(32, 7, 6),torch.arange(7)<torch.randint(2, 7, (32, 1))
    return data(x, torch.where(inside, torch.randint(0, 4, (32, 7)), label), **kwargs)

class Padding(Callback):
    "Is the total that of the positions whose label is not `void`?"
    order,run_valid = 5.5,False
    def __init__(self, teacher, void): self.teacher,self.void = teacher,void
    def after_loss(self):
        with torch.no_grad(): t = self.teacher.to(device()).eval()(*self.xb)
        left = self.y!=self.void
        task = self.learn.loss_func(self.pred, self.y)
        torch.testing.assert_close(self.learn.loss_grad, .5*task+.5*SoftTarget(self.pred[left], t[left]))

@pytest.mark.parametrize('void,loss_func', [(-1, CrossEntropyLossFlat(ignore_index=-1)), (-100, CrossEntropyLossFlat()),
                                            (-100, CrossEntropyLossFlat(ignore_index=-100))])
def test_positions_that_the_task_loss_leaves_out_are_not_taught_by_default(void, loss_func):
    teacher = mlp(6, 4, 16)
    quiet(Learner(padded(void), mlp(6, 4), loss_func=loss_func, cbs=Padding(teacher, void)), 1,
          cbs=KnowledgeDistillationCallback(teacher))

def test_items_without_a_class_are_not_taught_by_default():
    y = torch.where(torch.rand(32)<.4, -100, torch.randint(0, 4, (32,)))
    teacher = mlp(6, 4, 16)
    quiet(Learner(data(torch.randn(32, 6), y), mlp(6, 4), loss_func=nn.CrossEntropyLoss(), cbs=Padding(teacher, -100)),
          1, cbs=KnowledgeDistillationCallback(teacher))

def test_a_loss_that_was_given_and_teaches_padding_is_warned_of():
    learn,teacher = Learner(padded(-100), mlp(6, 4), loss_func=CrossEntropyLossFlat()),mlp(6, 4, 16)
    with told() as says: quiet(learn, 1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget(T=2)))
    assert [s for s in says if 'there are labels of -100' in s and 'SoftTarget(ignore_index=-100)' in s]
    for fine in (None, SoftTarget(T=2, ignore_index=-100)):
        with told() as says: quiet(learn, 1, cbs=KnowledgeDistillationCallback(teacher, fine))
        assert not [s for s in says if 'labels of' in s]

def test_the_default_loss_without_padding_is_that_of_before_bit_for_bit(make, teacher):
    runs = []
    for loss in (None, SoftTarget):
        learn = make(p=.3)
        torch.manual_seed(1)
        learn.fit(2, cbs=KnowledgeDistillationCallback(teacher, loss))
        runs.append(weights(learn))
    assert torch.equal(*runs)

# --- probabilities

@pytest.mark.parametrize('end,y,loss_func', [(nn.Softmax(1), torch.randint(0, 4, (48,)), CrossEntropyLossFlat()),
                                             (nn.Sigmoid(), torch.randint(0, 2, (48, 4)).float(),
                                              BCEWithLogitsLossFlat())])
def test_a_teacher_that_ends_in_probabilities_is_warned_of(end, y, loss_func):
    for model,expected in ((nn.Sequential(mlp(6, 4), end), 1), (mlp(6, 4), 0)):
        with told() as says:
            quiet(Learner(data(torch.randn(48, 6), y), mlp(6, 4, seed=1), loss_func=loss_func), 1,
                  cbs=KnowledgeDistillationCallback(model))
        assert len([s for s in says if 'probabilities already' in s and type(end).__name__.lower() in s])==expected

# --- schedules in lr_find

def found(make, teacher, T=4, **kwargs):
    learn = make()
    torch.manual_seed(3)
    kd = KnowledgeDistillationCallback(teacher, [Term(SoftTarget(T=T), schedule=kwargs.pop('term', None))], **kwargs)
    with learn.no_bar():
        learn.add_cb(kd).lr_find(start_lr=1e-6, end_lr=1e-1, num_it=12, show_plot=False, stop_div=False)
    return [float(o) for o in learn.recorder.losses]

def test_schedules_stand_still_in_lr_find_where_the_weight_is_highest(make, teacher):
    still = found(make, teacher, weight=.9)
    assert found(make, teacher, weight=.9, schedule=SchedLin(0, 1))==still==found(make, teacher, weight=.9,
                                                                                  schedule=SchedLin(1, 0))
    assert found(make, teacher, weight=.9, term=SchedCos(0, 1))==still
    falling = lambda pct: 4-3*pct            # a temperature stands at that same moment
    assert found(make, teacher, T=falling, weight=.9, schedule=SchedLin(1, 0))==still
    assert found(make, teacher, T=falling, weight=.9, schedule=SchedLin(0, 1))==found(make, teacher, T=1, weight=.9)

# --- teachers that know nothing

def blobs(n=560, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    return torch.randn(n, 6, generator=g)+3*F.one_hot(y, 6),y

def untrained(n_out, scale=3.):
    "Answers at random, with large logits"
    torch.manual_seed(0)
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(1e3*torch.randn(6, n_out))
        def forward(self, x): return scale*(x@self.w).sin()
    return Noise()

def about_teacher(says): return [s for s in says if "of this fit is" in s and 'constant guess' in s]

def watched(dls, student, teacher, loss_func, n=1, **kwargs):
    with told() as says:
        quiet(Learner(dls, student, loss_func=loss_func, **kwargs), n, cbs=KnowledgeDistillationCallback(teacher))
    return about_teacher(says)

tasks = dict(
    classes=(lambda x, y: y, CrossEntropyLossFlat(), 4, lambda x: 2*x[:, :4]),
    rare=(lambda x, y: (y==3).long(), CrossEntropyLossFlat(), 2,
          lambda x: torch.stack([1.5+0*x[:, 3], 1.5*x[:, 3]-2.5], 1)),
    labels=(lambda x, y: F.one_hot(y, 4).float(), BCEWithLogitsLossFlat(), 4, lambda x: 3*x[:, :4]-5),
    numbers=(lambda x, y: torch.stack([x[:, 0]+x[:, 1], x[:, 2]], 1), MSELossFlat(), 2,
             lambda x: torch.stack([x[:, 0]+x[:, 1]+.5*torch.sin(9*x[:, 4]), .7*x[:, 2]], 1)))

class Knows(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, x): return self.f(x)

@pytest.mark.parametrize('task', tasks)
def test_a_teacher_no_better_than_a_guess_is_warned_of_once_and_a_good_one_never(task):
    x,y = blobs()
    of,loss_func,n_out,knows = tasks[task]
    dls = data(x, of(x, y), bs=64)
    assert len(watched(dls, mlp(6, n_out), untrained(n_out), loss_func, n=2))==1
    assert watched(dls, mlp(6, n_out), Knows(knows), loss_func)==[]

def test_it_is_not_warned_of_a_teacher_whose_answers_no_labels_judge():
    x,y = blobs()
    student,noise,noise_of_8 = mlp(6, 4),untrained(4),Knows(lambda h: 5*(1e3*h[:, :4]).sin())
    assert watched(data(x, y, bs=64), student, noise, CrossEntropyLossFlat(), cbs=MixUp())==[]
    ds = TensorDataset(x)
    ds.n_inp = 1
    learn = Learner(DataLoaders.from_dsets(ds, TensorDataset(x, y), bs=64, num_workers=0, device=device()), mlp(6, 4),
                    loss_func=CrossEntropyLossFlat())
    with told() as says: quiet(learn, 1, cbs=KnowledgeDistillationCallback(noise, weight=1))
    assert about_teacher(says)==[]
    with told() as says:
        quiet(Learner(data(x, y, bs=64), mlp(6, 4), loss_func=CrossEntropyLossFlat()), 1,
              cbs=KnowledgeDistillationCallback(nn.Sequential(nn.Linear(6, 8), noise_of_8), FitNet, '0'))
    assert about_teacher(says)==[]

def test_it_is_not_warned_of_a_teacher_that_begins_as_the_student_or_moves():
    x,y = blobs()
    y = y[torch.randperm(len(y))]                # nobody is better than a guess
    student = mlp(6, 4)
    assert watched(data(x, y, bs=64), student, copy.deepcopy(student), CrossEntropyLossFlat())==[]
    teacher = untrained(4)
    class Moves(Callback):
        run_valid = False
        def after_batch(self): teacher.w.data.mul_(.99)
    assert watched(data(x, y, bs=64), mlp(6, 4), teacher, CrossEntropyLossFlat(), cbs=Moves())==[]

def test_a_good_segmentation_with_a_large_background_is_not_warned_of():
    torch.manual_seed(0)
    y = (torch.rand(24, 12, 12)<.08).long()
    x = torch.stack([y+.4*torch.randn(24, 12, 12)]*3, 1)
    class Good(nn.Module):
        def forward(self, x): return torch.stack([2+0*x[:, 0], 3*x[:, 0]-1], 1)
    assert watched(data(x, y, bs=64), nn.Conv2d(3, 2, 1), Good(), CrossEntropyLossFlat(axis=1))==[]
    assert len(watched(data(x, y, bs=64), nn.Conv2d(3, 2, 1),
                       Knows(lambda x: torch.stack([3*x[:, 0]-1, 2+0*x[:, 0]], 1)), CrossEntropyLossFlat(axis=1)))==1

# --- items that are not finite

def broken(where='inputs', n=96):
    torch.manual_seed(0)
    x,y = torch.randn(n, 6),torch.randn(n, 2)
    (x if where=='inputs' else y)[70] = torch.nan
    return DataLoaders.from_dsets(TensorDataset(x, y), TensorDataset(x, y), bs=16, num_workers=0, shuffle=False,
                                  device=device())

@pytest.mark.parametrize('where', ['inputs', 'labels'])
@pytest.mark.parametrize('before', [False, True])
def test_items_that_are_not_finite_are_named_and_end_the_fit(where, before):
    learn = Learner(broken(where), mlp(6, 2), loss_func=MSELossFlat())
    with pytest.raises(FloatingPointError, match=f"the {where} of item .* not finite") as e:
        quiet(learn, 1, cbs=KnowledgeDistillationCallback(mlp(6, 2, 16), check_before_step=before))
    assert 'diverged' not in str(e.value)
    assert all(p.isfinite().all() for p in learn.model.parameters())==before

def test_a_preflight_names_items_that_are_not_finite():
    x,y = torch.randn(32, 6),torch.randn(32, 2)
    x[3] = torch.nan
    learn = Learner(data(x, y, bs=32), mlp(6, 2), loss_func=MSELossFlat())
    with pytest.raises(ValueError, match="the inputs of item .* not finite"):
        KnowledgeDistillationCallback(mlp(6, 2, 16)).preflight(learn)
    class Fills(nn.Module):
        def __init__(self): super().__init__(); self.m = mlp(6, 2)
        def forward(self, x): return self.m(x.nan_to_num())
    learn = Learner(data(x, y, bs=32), Fills(), loss_func=MSELossFlat())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn, 1, cbs=KnowledgeDistillationCallback(Fills()))
        look = KnowledgeDistillationCallback(Knows(lambda x: x[:, :2].nan_to_num())).preflight(learn)
    assert any('inputs of item' in n and 'not finite' in n for n in look.notes)

# --- batches as a fit prepares them

class Typed(Dataset):
    def __len__(self): return 24
    def __getitem__(self, i):
        return TensorImage(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i))),torch.tensor(i%2)

@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss(), F.cross_entropy, lambda pred, y: F.cross_entropy(pred, y),
                                       CrossEntropyLossFlat()])
@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD])
def test_a_preflight_takes_all_that_a_fit_takes(loss_func, loss):
    def net(c):
        return nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 2))
    dls = DataBlock((TransformBlock, CategoryBlock), get_x=lambda i: Typed()[i][0], get_y=lambda i: i%2,
                    splitter=IndexSplitter(range(4))).dataloaders([*range(24)], bs=8, num_workers=0)
    learn = Learner(dls, net(4), loss_func=loss_func)
    quiet(learn, 1, cbs=KnowledgeDistillationCallback(net(8), loss))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(KnowledgeDistillationCallback(net(8), loss).preflight(learn).terms)==2

# --- the teacher's own errors

def smaller(): return nn.Sequential(nn.Flatten(), nn.Linear(75, 2))
def of_channels(n): return nn.Sequential(nn.Conv2d(n, 4, 3), nn.Flatten(), nn.Linear(144, 2))
def of_two_inputs(): return nn.Bilinear(3, 3, 2)

wrong_teachers = {'another size': (smaller, RuntimeError, 'tfm='),
                  'other channels': (lambda: of_channels(1), RuntimeError, 'tfm='),
                  'two inputs': (of_two_inputs, TypeError, 'inputs='),
                  'half precision': (lambda: of_channels(3).half(), RuntimeError, 'precision=')}

@pytest.mark.parametrize('what', wrong_teachers)
@pytest.mark.parametrize('where', ['fit', 'preflight', 'fill'])
def test_an_error_of_the_teachers_says_so_what_it_was_given_and_what_helps(what, where):
    make,error,helps = wrong_teachers[what]
    learn = Learner(data(torch.rand(32, 3, 8, 8), torch.randint(0, 2, (32,))),
                    nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), loss_func=CrossEntropyLossFlat())
    with pytest.raises(error) as e:
        if where=='fit': quiet(learn, 1, cbs=KnowledgeDistillationCallback(make()))
        elif where=='preflight': KnowledgeDistillationCallback(make()).preflight(learn)
        else: CachedTeacher(make()).fill(learn, show=False)
    for part in ('the teacher, a', 'float32 (', '3, 8, 8)', helps): assert part in str(e.value)

# --- a Learner's cells, run again; paths; arguments

def test_distilling_again_replaces(make, teacher):
    learn = make().distill(teacher).distill(teacher, SoftTarget(T=2), weight=.7)
    kds = [cb for cb in learn.cbs if isinstance(cb, KnowledgeDistillationCallback)]
    assert len(kds)==1 and kds[0].weight==.7
    learn.fit(1)
    with pytest.raises(TypeError): learn.distill(3)
    # what is refused replaces nothing
    assert [cb for cb in learn.cbs if isinstance(cb, KnowledgeDistillationCallback)]==kds

def test_a_path_is_looked_for_where_export_writes_it(make, teacher, tmp_path):
    learn = make(model=teacher)
    learn.path = tmp_path
    learn.export('teacher.pkl')
    student = make()
    student.path = tmp_path
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert student.distill('teacher.pkl').knowledge_distillation.teacher.models()
    with pytest.raises(ValueError, match=r"learn.export\(name\)` writes to `learn.path/name"):
        KnowledgeDistillationCallback('teacher.pkl')

def test_the_callback_shows_what_it_does(make, teacher):
    two_terms = KnowledgeDistillationCallback(teacher, [SoftTarget(T=4), Term(FitNet, 'conv2', 'bn2')], weight=.7)
    assert repr(two_terms)==("KnowledgeDistillationCallback(Teacher(Sequential), Term(SoftTarget(T=4)), "
                             "Term(FitNet, conv2~bn2), weight=0.7)")

# --- a validation in the middle of a fit

def test_a_validation_inside_a_fit_gives_what_it_gives_without_a_distillation(make, teacher):
    class Validates(Callback):
        order = 60
        def __init__(self): self.got = []
        def after_epoch(self):
            if not self.learn.lock.locked(): self.got.append([*self.learn.validate()])
    rows = []
    for cbs in ([], [KnowledgeDistillationCallback(teacher)]):
        learn = make(cbs=(validates := Validates()))
        learn.fit(2, cbs=cbs)
        rows.append([len(o) for o in validates.got])
        assert len(learn.recorder.metric_names)==4+2*bool(cbs)
        assert [m.name for m in learn.metrics]==['accuracy']
    assert rows[0]==rows[1]==[2, 2]

# --- one callback for one Learner after another

@pytest.mark.parametrize('loss', [Term(FitNet, 'conv2', 'conv2', adapter='conv'),
                                  Term(VariationalInformation, 'conv2', 'conv2')])
def test_what_was_made_for_another_student_begins_anew(make, loss):
    torch.manual_seed(7)
    teacher = convnet(nf=12)
    def fold(kd):
        torch.manual_seed(5)
        learn = make(convnet(nf=6))
        torch.manual_seed(1)
        learn.fit(1, cbs=kd)
        return weights(learn)
    kd = KnowledgeDistillationCallback(teacher, loss)
    first,second = fold(kd),fold(kd)
    assert torch.equal(first, second)                        # as with a new callback for each

def test_modules_of_the_users_that_were_trained_beside_another_student_are_refused(make, teacher):
    kd = KnowledgeDistillationCallback(teacher, Term(FitNet, 'conv2', 'conv2', adapter=nn.Conv2d(4, 8, 1)))
    first = make()
    first.fit(1, cbs=kd)
    first.fit(1, cbs=kd)
    with pytest.raises(ValueError, match="has trained Conv2d beside another student"): make().fit(1, cbs=kd)
    first.fit(1, cbs=kd)
    state = kd.state_dict()
    kd.load_state_dict(state)
    make().fit(1, cbs=kd)                                   # asked for

# --- a teacher of one's own

def test_a_teacher_of_ones_own_needs_no_more_than_to_answer(make, teacher):
    class Rule(BaseTeacher):
        def __call__(self, xb, idxs=None): return 5*F.one_hot((xb[0].flatten(1).sum(1)%10).long(), 10).float(),{}
    quiet(make(), 1, cbs=KnowledgeDistillationCallback(Rule()))
    class Bare(BaseTeacher):
        def __call__(self, xb, idxs=None): return torch.zeros(len(xb[0]), 10, device=xb[0].device)
    with pytest.raises(TypeError, match="a teacher answers with its prediction and a dict of features"):
        quiet(make(), 1, cbs=KnowledgeDistillationCallback(Bare()))

# --- losses that draw

def test_two_terms_alike_draw_numbers_of_their_own(make, teacher):
    from fasterkd.losses import MaskedGenerative
    torch.manual_seed(7)
    wide,seeds = convnet(nf=8),[]
    for _ in range(2):
        kd = KnowledgeDistillationCallback(wide, [Term(MaskedGenerative(), 'conv2'), Term(MaskedGenerative(), 'conv2')])
        learn = make()
        torch.manual_seed(1)
        learn.fit(1, cbs=kd)
        seeds.append([int(t.loss.draws.n) for t in kd.terms])
    assert seeds[0]==seeds[1] and seeds[0][0]!=seeds[0][1]

# --- found by attack

def test_a_loss_that_was_given_as_a_class_begins_anew_for_another_student(make, teacher):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(1))
        def forward(self, pred, teacher_pred): return ((pred-teacher_pred)*self.p).pow(2).mean()
    def fold(kd):
        torch.manual_seed(5)
        learn = make(convnet())
        torch.manual_seed(1)
        learn.fit(1, cbs=kd)
        return weights(learn)
    kd = KnowledgeDistillationCallback(teacher, Scaled)
    assert torch.equal(fold(kd), fold(kd))

def test_a_module_that_learnt_nothing_may_serve_another_student(make, teacher):
    class Weighs(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('w', torch.full((10,), .5))
        def forward(self, pred, teacher_pred): return ((pred-teacher_pred).pow(2)*self.w).mean()
    kd = KnowledgeDistillationCallback(teacher, Weighs())
    make().fit(1, cbs=kd)
    make().fit(1, cbs=kd)

def test_what_was_taken_off_in_the_middle_of_a_fit_has_no_values_from_there_on(make, teacher):
    class TakesOff(Callback):
        def after_epoch(self):
            if self.epoch==0 and not self.learn.lock.locked(): self.learn.remove_cb(KnowledgeDistillationCallback)
    learn = make().distill(teacher)
    learn.fit(2, cbs=TakesOff())
    columns = learn.recorder.metric_names[1:].index('SoftTarget')
    first,second = (values[columns] for values in learn.recorder.values[:2])
    assert first==first and second!=second

def test_a_fit_inside_of_another_may_ask_the_same_teacher(make, teacher):
    class TrialFit(Callback):
        def after_epoch(self):
            if self.epoch==0 and not hasattr(self.learn, 'is_trial'):
                trial = copy.deepcopy(self.learn)
                trial.is_trial = True
                trial.fit(1)
    runs = []
    for cbs in ([], [TrialFit()]):
        learn = make().distill(Teacher(teacher), [SoftTarget, Term(FitNet, 'conv2', 'bn2', adapter='conv')])
        torch.manual_seed(1)
        learn.dls.train.rng.seed(0)
        learn.fit(2, cbs=cbs)
        runs.append(len(learn.recorder.values))
    assert runs==[2, 2]

def test_every_image_among_several_inputs_is_normalised_as_in_the_teachers_training():
    from fastai.data.all import Normalize
    def noise(i): return TensorImage(torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(i)))
    def pairs(*stats):
        block = DataBlock((TransformBlock, TransformBlock, CategoryBlock), n_inp=2,
                          getters=[noise, lambda i: noise(99-i), lambda i: i%2],
                          splitter=IndexSplitter(range(4)), batch_tfms=[Normalize.from_stats(*stats)])
        return block.dataloaders([*range(20)], bs=16, num_workers=0, shuffle=False)
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Linear(96, 2)
        def forward(self, a, b): return self.m(torch.cat([a.flatten(1), b.flatten(1)], 1))
    own,other = pairs([.4]*3, [.2]*3),pairs([.5]*3, [.25]*3)
    teacher,heard = Learner(other, Siamese(), loss_func=CrossEntropyLossFlat()),[]
    def spy(pred, teacher_pred, idxs):
        heard.append((teacher_pred, idxs))
        return 0*pred.sum()
    quiet(Learner(own, Siamese(), loss_func=CrossEntropyLossFlat()), 1,
          cbs=KnowledgeDistillationCallback(teacher, spy, task_weight=1))
    xs = [torch.stack([other.train_ds[i][k].as_subclass(torch.Tensor) for i in heard[0][1]]).to(device())
          for k in (0, 1)]
    with torch.no_grad(): expected = teacher.model.to(device())(*((x-.5)/.25 for x in xs))
    torch.testing.assert_close(heard[0][0], expected, rtol=1e-4, atol=1e-4)
