"Teachers that want other inputs, give other things, and name other classes than the student's."
import copy, random, warnings

import numpy as np
import pytest
import torch
from conftest import After, convnet, device, weights
from fastai.callback.progress import ProgressCallback
from fastai.data.all import CategoryBlock, DataBlock, IndexSplitter, ItemGetter, Normalize
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.vision.all import ImageBlock, PILImageBW
from fasterkd.all import *
from sklearn.datasets import load_digits
from torch import nn

letters = list('abcdefghij')

def known_as(learn, names=letters):
    learn.dls.vocab = names
    return learn

def rearranged(teacher, places):
    "The teacher with its outputs in these places among as many as are needed; the others are large"
    res = copy.deepcopy(teacher)
    head = nn.Linear(res.head.in_features, max(places)+1)
    nn.init.constant_(head.weight, 0.); nn.init.constant_(head.bias, 9.)
    with torch.no_grad():
        head.weight[places],head.bias[places] = teacher.head.weight,teacher.head.bias
    res.head = head
    return res

orders = dict(reversed=[*range(10)][::-1], among_others=[3, 0, 12, 5, 6, 1, 9, 14, 2, 8])
def names_of(places):
    res = [f'other {i}' for i in range(max(places)+1)]
    for name,i in zip(letters, places): res[i] = name
    return res

def learnt(make, taught, loss_func=None, loss=None):
    learn = known_as(make(opt_func=SGD))     # Adam makes much of what little rounding leaves of a gradient
    if loss_func is not None: learn.loss_func = loss_func
    if isinstance(loss_func, BCEWithLogitsLossFlat):
        learn.metrics = []
        learn.add_cb(After('before_batch', lambda l: setattr(l, 'yb', (nn.functional.one_hot(l.y, 10).float(),))))
    learn.fit(2, cbs=KnowledgeDistillationCallback(taught, loss))
    return weights(learn)

@pytest.mark.parametrize('places', orders.values(), ids=orders)
@pytest.mark.parametrize('way', ('plain', 'bf16', 'chunk', 'cached', 'cached file', 'several', 'sigmoid'))
def test_a_teacher_whose_classes_stand_elsewhere_teaches_as_one_in_the_students_order(make, teacher, tmp_path, way,
                                                                                      places):
    other,loss_func = rearranged(teacher, places),BCEWithLogitsLossFlat() if way=='sigmoid' else None
    def taught(model, names):
        kwargs = dict(bf16=dict(precision='bf16'), chunk=dict(chunk=7)).get(way, {})
        t = Teacher(model, names, **kwargs)
        if way.startswith('cached'):
            return CachedTeacher(t, tmp_path/f'{len(names)}{names[0]}' if way=='cached file' else None,
                                 dtype=torch.float32)
        return [t, Teacher(copy.deepcopy(teacher), letters)] if way=='several' else t
    ends = [learnt(make, taught(m, n), loss_func) for m,n in ((teacher, letters), (other, names_of(places)))]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)

def test_kept_answers_are_those_of_one_order(make, teacher, tmp_path):
    learnt(make, CachedTeacher(Teacher(teacher, letters), tmp_path/'answers'))
    with pytest.raises(ValueError, match=r'do not fit; settings of the teacher: none then, order=\[9, 8'):
        learnt(make, CachedTeacher(Teacher(teacher, letters[::-1]), tmp_path/'answers'))

@pytest.mark.parametrize('names', (letters[:9]+['k'], letters[:9]))
def test_a_teacher_that_lacks_a_class_is_refused_with_both_lists(make, teacher, names):
    teacher = rearranged(teacher, [*range(10)]) if len(names)==10 else convnet(8, n_out=9)
    learn = known_as(make())
    before = weights(learn)
    for t in (Teacher(teacher, names), [Teacher(teacher, names), Teacher(convnet(8), letters)]):
        says = rf'the teacher does not know j \(teacher: {", ".join(names)}; student: {", ".join(letters)}\)'
        other_shapes = 'the teachers answer in different shapes'
        with pytest.raises(ValueError, match=says if isinstance(t, Teacher) or len(names)==10 else other_shapes):
            learn.fit(1, cbs=KnowledgeDistillationCallback(t))
    assert torch.equal(weights(learn), before)
    # features have no classes
    learn.fit(1, cbs=KnowledgeDistillationCallback(Teacher(teacher, names), Similarity, 'conv2'))

def test_where_no_names_are_known_outputs_are_taken_as_they_stand(make, teacher):
    ends = []
    for names in (None, letters[::-1]):
        learn = make()
        learn.fit(1, cbs=KnowledgeDistillationCallback(Teacher(teacher, names)))
        ends.append(weights(learn))
    assert torch.equal(*ends)

def test_a_teacher_of_ones_own_that_answers_in_its_own_order_is_refused(make, teacher):
    from contextlib import contextmanager
    from fasterkd.base_teacher import BaseTeacher
    class Own(BaseTeacher):
        vocab = letters[::-1]
        @contextmanager
        def ready(self, layers=(), learn=None): yield self
        def __call__(self, xb, idxs=None): return torch.zeros(len(xb[0]), 10),{}
    with pytest.raises(ValueError, match="does not answer in the student's"):
        known_as(make()).fit(1, cbs=KnowledgeDistillationCallback(Own()))

# --- images of other statistics

def pictures(*batch_tfms):
    x,y = load_digits(return_X_y=True)
    items = [(np.uint8(15*i.reshape(8, 8)), int(t)) for i,t in zip(x[:60], y[:60])]
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=ItemGetter(0), get_y=ItemGetter(1),
                      splitter=IndexSplitter(range(40, 60)), batch_tfms=[*batch_tfms])
    return block.dataloaders(items, bs=20, num_workers=0)

def stats(mean, std): return Normalize.from_stats([mean], [std], cuda=device().type!='cpu')

def learner(dls, model=None, **kwargs):
    torch.manual_seed(0); random.seed(0)
    dls.train.rng = random.Random(0)
    learn = Learner(dls, model or convnet(), loss_func=CrossEntropyLossFlat(), lr=1e-2, **kwargs)
    learn.logger = lambda *_: None
    return learn.remove_cb(ProgressCallback)

@pytest.mark.parametrize('way', ('Learner', 'path', 'cached', 'several'))
@pytest.mark.parametrize('its,ours', (((.5, .05), (.3, .3)), ((.5, .05), None), (None, (.3, .3))),
                         ids=('both', 'the teacher', 'the student'))
def test_a_teacher_sees_images_as_in_its_own_training(teacher, tmp_path, way, its, ours):
    def normalised(s): return [] if s is None else [stats(*s)]
    trained,dls = learner(pictures(*normalised(its)), teacher, path=tmp_path),pictures(*normalised(ours))
    trained.export('t.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        taught = dict(Learner=trained, path=str(tmp_path/'t.pkl'), several=[trained, trained],
                      cached=CachedTeacher(trained, dtype=torch.float32))[way]
        kd,seen = KnowledgeDistillationCallback(taught, lambda pred, teacher_pred,
                                                xb: seen.append((xb[0],
                                                                 teacher_pred)) or (pred-teacher_pred).pow(2).mean()),[]
        learner(dls).fit(1, cbs=kd)
    (mean,std),(m,s) = its or (0., 1.),ours or (0., 1.)
    for x,pred in seen:
        with torch.no_grad(): own = teacher.eval()((x.as_subclass(torch.Tensor).cpu()*s+m-mean)/std)
        torch.testing.assert_close(pred.as_subclass(torch.Tensor).cpu(), own.log_softmax(1) if way=='several' else own,
                                   rtol=0, atol=2e-5*float(own.abs().max()))

def test_preflight_tells_that_images_are_normalised_anew_and_the_same_statistics_change_nothing(teacher):
    for its,n in (((.5, .05), 1), ((.3, .3), 0)):
        notes = KnowledgeDistillationCallback(learner(pictures(stats(*its)),
                                                      teacher)).preflight(learner(pictures(stats(.3, .3)))).notes
        says = "The teacher's images are normalised anew, as in its own training: Renormalize([0.3] ± [0.3] to"
        assert sum(says in t for t in notes)==n

def test_tfm_none_leaves_images_as_they_are_and_a_function_changes_them(teacher):
    for tfm,of in ((None, lambda x: x), (lambda x: x.flip(-1), lambda x: x.flip(-1))):
        seen = []
        kd = KnowledgeDistillationCallback(Teacher(learner(pictures(stats(.5, .05)), teacher), tfm=tfm), lambda pred,
                                           teacher_pred,
                                           xb: seen.append((xb[0], teacher_pred)) or (pred-teacher_pred).pow(2).mean())
        learner(pictures(stats(.3, .3))).fit(1, cbs=kd)
        for x,pred in seen:
            with torch.no_grad(): torch.testing.assert_close(pred.cpu(), teacher.eval()(of(x.cpu())))

# --- what a Learner's loss function says

def test_a_loss_function_of_ones_own_says_nothing_of_the_distillation_loss(make, teacher):
    smooth = nn.CrossEntropyLoss(label_smoothing=.1)
    def caught(pred, y): return smooth(pred, y)
    def with_penalty(pred, y): return nn.functional.cross_entropy(pred, y)+.1*pred.pow(2).mean()
    for f in (caught, with_penalty):
        learn = make()
        learn.loss_func = f
        with pytest.raises(ValueError, match='which distillation loss fits .* is not known: give one'):
            learn.fit(1, cbs=KnowledgeDistillationCallback(teacher))
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, SoftTarget))
        assert learn.recorder.metric_names[-1]=='SoftTarget'

class Viewing(nn.Module):
    "Flattens as PyTorch's tutorials and fastai's `Flatten` do"
    def __init__(self):
        super().__init__()
        self.conv,self.head = nn.Conv2d(1, 3, 3, padding=1),nn.Linear(3*64, 10)
    def forward(self, x):
        x = self.conv(x).relu()
        return self.head(x.view(x.size(0), -1))

@pytest.mark.parametrize('layers', [[], ['conv']], ids=['', 'tapped'])
def test_a_teacher_that_flattens_by_view_answers_in_its_own_memory_format(layers):
    model,x = Viewing(),torch.randn(4, 1, 8, 8)
    with torch.no_grad(): wanted = model(x)
    with warnings.catch_warnings(), Teacher(model).ready(layers) as t:
        warnings.simplefilter('error')
        for _ in range(2):
            pred,features = t((x,))
            torch.testing.assert_close(pred, wanted)
            assert [*features]==layers
    assert model.conv.weight.is_contiguous()
