"Where outputs, targets or texts of teacher and student do not correspond: compared as they should be, or refused."
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import device
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.all import (CategoryBlock, ColReader, DataBlock, IndexSplitter, RegressionBlock, TransformBlock)
from fastai.data.core import DataLoaders, Pipeline
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, tabular_learner
from fastai.text.all import TextBlock
from fastai.data.transforms import IntToFloatTensor, Normalize as ImageNormalize
from fastai.torch_core import TensorImage
from fastai.vision.data import MaskBlock
from fasterkd.all import *
from fasterkd.inputs import normalization, renormalization
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

def quiet(learn, teacher, loss=None, **kwargs):
    "One epoch, and the warnings that came with it"
    with warnings.catch_warnings(record=True) as warned, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.fit(1, cbs=KnowledgeDistillationCallback(teacher, loss, **kwargs))
    return [str(w.message) for w in warned]

def refused(says, learn, *args, **kwargs):
    "Refused by these words, and nothing of the student has changed"
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=says): quiet(learn, *args, **kwargs)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])

def loaders(x, y, bs=8):
    ds = TensorDataset(x, y)
    return DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device=device())

# --- in which dimension the classes are, under a loss function of one's own

def flat(pred, y): return F.cross_entropy(pred.reshape(-1, 4), y.reshape(-1))
def crossed(pred, y): return F.cross_entropy(pred.transpose(1, 2), y)
def plain(pred, y): return F.cross_entropy(pred, y)

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss()
    def forward(self, pred, y): return self.loss(pred.reshape(-1, 4), y.reshape(-1))

class FlatCrossEntropy(nn.CrossEntropyLoss):
    def forward(self, pred, y): return super().forward(pred.reshape(-1, 4), y.reshape(-1))

class ToSecond(nn.Module):
    def forward(self, x): return x.movedim(-1, 1)

def positions(side=(6,), second=False):
    "A Learner's loaders of one class among 4 at each position, and a model for them"
    torch.manual_seed(0)
    x = torch.randn(16, *side, 5)
    def net(width):
        layers = [nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 4)]
        return nn.Sequential(*layers, *[ToSecond()]*second)
    return loaders(x, x[..., :4].argmax(-1)),net

def over_classes(student, teacher, dls, dim):
    "The column that a fit of one batch shows where the softmax is over dimension `dim`"
    x = dls.train_ds.tensors[0].to(device())
    student,teacher = student.to(device()),teacher.to(device())
    with torch.no_grad(): p,q = student(x),teacher(x)
    kl = F.kl_div(p.log_softmax(dim), q.log_softmax(dim), log_target=True, reduction='none')
    return kl.sum(dim).mean().item()

@pytest.mark.parametrize('side', [(6,), (6, 5)], ids=['tokens', 'pixels'])
@pytest.mark.parametrize('second,loss_func',
                         [(False, flat), (False, Flat()), (False, FlatCrossEntropy()), (True, plain)],
                         ids=['function', 'module', 'subclass', 'second dimension'])
def test_under_a_loss_function_of_ones_own_the_labels_say_where_the_classes_are(side, second, loss_func):
    dls,net = positions(side, second)
    dls.train.bs = 16
    student,teacher = net(7),net(9)
    expected = over_classes(student, teacher, dls, 1 if second else -1)
    learn = Learner(dls, student, loss_func=loss_func, lr=0.)
    quiet(learn, teacher, SoftTarget(T=1))
    assert learn.recorder.values[-1][-1]==pytest.approx(expected, rel=1e-4)

def test_a_loss_function_that_transposes_first_has_its_classes_last():
    dls,net = positions()
    dls.train.bs = 16
    student,teacher = net(7),net(9)
    expected = over_classes(student, teacher, dls, -1)
    learn = Learner(dls, student, loss_func=crossed, lr=0.)
    quiet(learn, teacher, SoftTarget(T=1))
    assert learn.recorder.values[-1][-1]==pytest.approx(expected, rel=1e-4)

def test_where_the_labels_can_be_read_in_two_ways_it_has_to_be_said():
    dls,net = positions((4,))
    both = r'both can be it, the second \(axis=1\) and the last \(axis=-1\).*SoftTarget\(axis='
    refused(both, Learner(dls, net(7), loss_func=flat), net(9), SoftTarget)
    quiet(Learner(dls, net(7), loss_func=flat), net(9), SoftTarget(axis=-1))
    quiet(Learner(dls, net(7), loss_func=flat), net(9), Logits)             # reads no classes
    quiet(Learner(dls, net(7), loss_func=CrossEntropyLossFlat()), net(9), SoftTarget)

@pytest.mark.parametrize('names', [['d', 'c', 'b', 'a'], ['d', 'x', 'b', 'c', 'a']])
def test_classes_at_positions_are_matched_by_name_along_their_dimension(names):
    dls,net = positions((6,))
    dls.vocab = list('abcd')
    teacher,seen = nn.Linear(5, len(names)),[]
    def spy(pred, teacher_pred, xb):
        seen.append((xb[0].cpu(), teacher_pred.cpu()))
        return F.mse_loss(pred, teacher_pred)
    quiet(Learner(dls, net(7), loss_func=flat), Teacher(teacher, names), spy)
    for x,answer in seen:
        own = teacher.cpu()(x)[..., [names.index(n) for n in 'abcd']]
        torch.testing.assert_close(answer, own.detach(), rtol=1e-4, atol=1e-5)

def test_a_loss_function_of_ones_own_that_leaves_out_labels_of_minus_100_is_warned_of():
    dls,net = positions()
    y = dls.train_ds.tensors[1]
    y[:, 4:] = -100
    for loss_func in (flat, Flat()):
        warned = quiet(Learner(dls, net(7), loss_func=loss_func), net(9), SoftTarget)
        assert [w for w in warned if 'labels of -100' in w and 'SoftTarget(ignore_index=-100)' in w]

# --- several targets

def seeded(i): return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(i))

def heads(codes, vocab='ab', order=('mask', 'class')):
    "Loaders of an image, the map of its codes, and its category"
    def mask(i): return np.full((4, 4), i%3, dtype=np.uint8)
    def category(i): return vocab[i%2]
    blocks = dict(mask=MaskBlock(codes=np.array(codes)), **{'class': CategoryBlock(vocab=[*vocab], sort=False)})
    getters = dict(mask=mask, **{'class': category})
    block = DataBlock((TransformBlock, *(blocks[o] for o in order)), n_inp=1, splitter=IndexSplitter(range(4)),
                      getters=[seeded, *(getters[o] for o in order)])
    return block.dataloaders([*range(12)], bs=4, num_workers=0)

class TwoHeads(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.body = nn.Conv2d(3, 5, 3, padding=1)
        self.maps = nn.Conv2d(5, n, 1)
        self.classes = nn.Linear(5, 2)
    def forward(self, x):
        h = self.body(x).relu()
        return self.maps(h),self.classes(h.mean((2, 3)))

def of_both(pred, mask, category): return F.cross_entropy(pred[0], mask.long())+F.cross_entropy(pred[1], category)
def own_of_maps(pred, teacher_pred): return F.mse_loss(pred[0], teacher_pred[0])

codes = ['sky', 'road', 'car']
def two_headed(*args): return Learner(heads(*args), TwoHeads(), loss_func=of_both)

@pytest.mark.parametrize('loss', [Term(SoftTarget, 'maps'), Term(SoftTarget, 'classes'), own_of_maps],
                         ids=['maps', 'classes', 'own'])
def test_the_codes_of_masks_beside_another_target_have_to_stand_in_the_students_order(loss):
    quiet(two_headed(codes), two_headed(codes), loss)
    other = two_headed(codes[::-1])
    if isinstance(loss, Term) and loss.student==['classes']: quiet(two_headed(codes), other, loss)
    else: refused('road.*car', two_headed(codes), other, loss)

def test_a_term_that_compares_the_maps_alone_does_not_ask_for_the_other_targets_classes():
    quiet(two_headed(codes), two_headed(codes, 'xy'), Term(SoftTarget, 'maps'))
    refused('target 1: a', two_headed(codes), two_headed(codes, 'xy'), Term(SoftTarget, 'classes'))

frame = pd.DataFrame(dict(i=range(24), u=range(24), v=range(0, 240, 10), label=[*'abc']*8))
def image_of(row): return seeded(int(row['i']))
class Joint:
    "One tensor of the classes' logits and the numbers, in the order of the targets"
    def __init__(self, classes_first=True): self.classes_first = classes_first
    def __call__(self, pred, *targets):
        category,numbers = targets if self.classes_first else targets[::-1]
        logits,rest = (pred[:, :3], pred[:, 3:]) if self.classes_first else (pred[:, 2:], pred[:, :2])
        return F.cross_entropy(logits, category)+F.mse_loss(rest, numbers.float())

def joint(vocab='abc', columns=('u', 'v'), classes_first=True):
    category = CategoryBlock(vocab=[*vocab], sort=False),ColReader('label')
    numbers = RegressionBlock(n_out=2),ColReader([*columns])
    targets = [category, numbers] if classes_first else [numbers, category]
    block = DataBlock((TransformBlock, *(b for b,_ in targets)), n_inp=1, splitter=IndexSplitter(range(4)),
                      getters=[image_of, *(g for _,g in targets)])
    return Learner(block.dataloaders(frame, bs=4, num_workers=0), flattened(), loss_func=Joint(classes_first))

def flattened(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))

@pytest.mark.parametrize('loss', [Logits, Term(SoftTarget, classes='shared')])
@pytest.mark.parametrize('other', [dict(vocab='cab'), dict(columns=('v', 'u')), dict(classes_first=False)], ids=str)
def test_a_category_beside_numbers_has_to_have_the_students_names_in_its_order(other, loss):
    if loss is Logits: quiet(joint(), joint(), loss)
    refused("classes='shared' compares" if loss is not Logits else 'target 0', joint(), joint(**other), loss)

def test_outputs_that_are_not_all_named_are_never_picked_by_name():
    "Two numbers after the three classes, whose columns are not known"
    def learner(vocab):
        block = DataBlock((TransformBlock, CategoryBlock(vocab=[*vocab], sort=False), TransformBlock), n_inp=1,
                          getters=[image_of, ColReader('label'), number_of], splitter=IndexSplitter(range(4)))
        return Learner(block.dataloaders(frame, bs=4, num_workers=0), flattened(), loss_func=Joint())
    refused('target 0: a.*target 1', learner('abc'), learner('cab'), Logits)
    dls = learner('abc').dls
    dls.vocab = list('abc')
    student,teacher = Learner(dls, flattened(), loss_func=Joint()),Teacher(flattened(), list('cab'))
    refused(r"3 classes are matched .* and in its outputs, of the shape \(4, 5\), none has", student, teacher, Logits)

def number_of(row): return torch.tensor([float(row['u']), float(row['v'])])

# --- texts

words = ['film', 'book', 'good', 'bad', 'fine', 'poor', 'long', 'short']

def texts(n=24, step=None, **kwargs):
    rng = np.random.RandomState(0)
    rows = [(' '.join(rng.choice(words, rng.randint(3, 9))), 'pos' if i%2 else 'neg') for i in range(n)]
    df = pd.DataFrame([*rows, (' '.join(words), 'pos')], columns=['text', 'label'])
    text = TextBlock.from_df('text', min_freq=1, n_workers=1, **kwargs)
    if step is not None: text.item_tfms = [*text.item_tfms, step]
    block = DataBlock((text, CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'),
                      splitter=IndexSplitter(range(4)))
    return block.dataloaders(df, bs=8, num_workers=0)

class Reader(nn.Module):
    "Its answer depends on the order of the tokens, and not on padding"
    def __init__(self, n, width=6):
        super().__init__()
        self.emb = nn.Embedding(n, width)
        self.head = nn.Linear(width, 2)
    def hidden(self, x):
        real = (x!=1)
        weight = .8**(real.cumsum(1)-1)*real
        return self.emb(x)*weight[..., None]
    def forward(self, x): return self.head(self.hidden(x).sum(1))

def reader(dls, model=None):
    torch.manual_seed(0)
    return Learner(dls, model or Reader(len(dls.vocab[0])), loss_func=CrossEntropyLossFlat())

def told_of_texts(student, teacher):
    "By dataset index, what a student is taught"
    heard = {}
    def spy(pred, teacher_pred, idxs):
        heard.update(zip(idxs, teacher_pred.detach().cpu()))
        return F.mse_loss(pred, teacher_pred)
    return heard,quiet(student, teacher, spy)

@pytest.mark.parametrize('kind,backwards', [('live', True), ('live', False), ('cached', True), ('several', True)])
def test_a_teacher_that_reads_from_the_other_end_is_asked_so(kind, backwards):
    own,student = texts(backwards=backwards),texts(backwards=not backwards)
    teacher = reader(own)
    given = dict(live=teacher, cached=CachedTeacher(teacher, dtype=torch.float32), several=[teacher, teacher])[kind]
    heard,_ = told_of_texts(reader(student), given)
    model = teacher.model.to('cpu').eval()
    for i,answer in heard.items():
        with torch.no_grad(): expected = model(own.train_ds[int(i)][0][None])[0]
        if kind=='several': expected = expected.log_softmax(-1)
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)

class AtEachWord(Reader):
    def forward(self, x): return self.head(self.hidden(x))

def per_word(pred, y): return F.cross_entropy(pred.mean(1), y)

def test_what_a_teacher_gives_for_each_position_from_the_other_end_is_refused():
    own,student = texts(backwards=True),texts()
    refused("reads texts from their other end than the student, and its layer 'emb' gives a feature for each position",
            reader(student), reader(own), Term(FitNet, 'emb', 'emb'))
    learners = [reader(d, AtEachWord(len(d.vocab[0]))) for d in (student, own)]
    for learn in learners: learn.loss_func = per_word
    refused('and it gives an output for each position', *learners, Logits)

def shorter(x): return x[:3] if x.ndim else x

def test_a_text_that_cannot_be_reversed_exactly_is_refused_by_name():
    refused('reads the text of input 0 from its end, and the student from its start, and a batch cannot be reversed',
            reader(texts(step=shorter)), reader(texts(backwards=True)), SoftTarget)
    heard,_ = told_of_texts(reader(texts(step=shorter)), reader(texts()))
    assert heard

def test_tokens_that_the_teachers_own_tokenizer_would_not_have_made_are_warned_of():
    _,warned = told_of_texts(reader(texts(rules=[])), reader(texts()))
    assert len([w for w in warned if 'with the rules fix_html' in w and 'with no rules' in w])==1
    _,warned = told_of_texts(reader(texts()), reader(texts()))
    assert not [w for w in warned if 'tokens' in w]

# --- numbers, probabilities, meanings, columns

def test_numbers_of_one_more_dimension_are_refused_with_what_helps():
    rng = np.random.RandomState(0)
    rated = [(f'u{u}', f'i{i}', float(rng.rand())) for u in range(8) for i in range(6)]
    df = pd.DataFrame(rated, columns=['user', 'item', 'rating'])
    dls = CollabDataLoaders.from_df(df, valid_pct=.1, seed=0, bs=16)
    def learner(**kwargs): return collab_learner(dls, y_range=(0, 1), loss_func=MSELossFlat(), **kwargs)
    deep,dot = learner(use_nn=True, layers=[8]),learner(n_factors=3)
    refused(r'give Teacher\(model, output=lambda o: o\.squeeze\(-1\)\)', dot, deep)
    quiet(dot, Teacher(deep, output=lambda o: o.squeeze(-1)))
    refused(r'give Teacher\(model, output=lambda o: o\.unsqueeze\(-1\)\)', deep, dot)
    quiet(deep, Teacher(dot, output=lambda o: o.unsqueeze(-1)))

@pytest.mark.parametrize('kind', ['float32', 'bf16', 'cached'])
def test_a_teacher_that_ends_in_a_softmax_is_warned_of_in_any_precision(kind):
    torch.manual_seed(0)
    dls = loaders(torch.randn(32, 6), torch.randint(0, 5, (32,)))
    def given(model):
        return dict(float32=model, bf16=Teacher(model, precision='bf16'), cached=CachedTeacher(model))[kind]
    def net(*end): return nn.Sequential(nn.Linear(6, 5), *end)
    for model,n in ((net(nn.Softmax(1)), 1), (net(), 0)):
        warned = quiet(Learner(dls, net(), loss_func=CrossEntropyLossFlat()), given(model))
        assert len([w for w in warned if 'probabilities already' in w])==n

@pytest.mark.parametrize('wrap', [lambda t: t, CachedTeacher, lambda t: [t, t]], ids=['live', 'cached', 'several'])
def test_a_teacher_whose_outputs_mean_something_else_is_warned_of(wrap):
    x,y = torch.randn(32, 6),torch.randint(0, 2, (32, 4)).float()
    def net(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    def student(): return Learner(loaders(x, y), net(), loss_func=BCEWithLogitsLossFlat())
    for loss_func,loss,n in ((CrossEntropyLossFlat(), None, 1), (BCEWithLogitsLossFlat(), None, 0), (plain, None, 0),
                             (CrossEntropyLossFlat(), Similarity, 0)):
        layers = {} if loss is None else dict(activations_student='0', activations_teacher='0')
        teacher = Learner(loaders(x, y), net(), loss_func=loss_func)
        if layers and wrap(teacher) is not teacher: continue
        warned = quiet(student(), wrap(teacher), loss, **layers)
        says = "the teacher's outputs are classes that exclude each other, and the student's are labels that do not"
        assert len([w for w in warned if says in w])==n

def test_a_continuous_column_that_is_missing_is_named_as_what_it_is():
    df = pd.DataFrame(dict(c=[*'ab']*10, u=[*range(19), np.nan], v=range(20), y=[*'no']*10))
    def learner(conts):
        table = TabularPandas(df[['c', *conts, 'y']].copy(), [Categorify, FillMissing, Normalize], ['c'], [*conts], 'y',
                              splits=([*range(20)], [*range(4)]), y_block=CategoryBlock())
        return tabular_learner(table.dataloaders(bs=8), layers=[4], n_out=2)
    refused("the teacher reads the continuous column 'u'", learner(['v']), learner(['u', 'v']))

# --- a loss function of one's own, and a distillation loss that says what outputs mean

def own_softmax(pred, y): return F.cross_entropy(pred, y)
def own_sigmoid(pred, y): return F.binary_cross_entropy_with_logits(pred, y)

def separable(sigmoid=False):
    "Loaders of 3 classes that follow from the inputs"
    torch.manual_seed(0)
    x = torch.randn(128, 3)
    y = x.argmax(1)
    return loaders(x, F.one_hot(y, 3).float() if sigmoid else y, bs=64)

@pytest.mark.parametrize('sigmoid', [False, True], ids=['softmax', 'sigmoid'])
def test_probabilities_are_warned_of_under_a_loss_function_of_ones_own(sigmoid):
    learn = Learner(separable(sigmoid), nn.Linear(3, 3).to(device()), loss_func=own_sigmoid if sigmoid else own_softmax)
    teacher = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid() if sigmoid else nn.Softmax(1))
    warned = quiet(learn, teacher, BinarySoftTarget if sigmoid else SoftTarget)
    assert any('probabilities already' in w for w in warned)

def test_a_useless_teacher_is_warned_of_under_a_loss_function_of_ones_own():
    learn = Learner(separable(), nn.Linear(3, 3).to(device()), loss_func=own_softmax)
    against = nn.Linear(3, 3)
    with torch.no_grad():
        against.weight.copy_(-torch.eye(3))
        against.bias.zero_()
    assert any('a constant guess has' in w for w in quiet(learn, against, SoftTarget))

def test_the_advice_on_ignored_labels_names_the_loss_and_not_its_column():
    learn = Learner(separable(), nn.Linear(3, 3).to(device()), loss_func=CrossEntropyLossFlat(ignore_index=0))
    warned = quiet(learn, nn.Linear(3, 3), {'kd': SoftTarget(T=1)})
    assert any('SoftTarget(ignore_index=0) leaves them out' in w for w in warned)

@pytest.mark.parametrize('student,teacher', [(1., 255.), (255., 127.5), (127.5, 1.)])
@pytest.mark.parametrize('normalised', [False, True], ids=['', 'normalised'])
def test_images_of_another_scale_are_brought_to_the_teachers(student, teacher, normalised):
    "What `IntToFloatTensor(div=)` divides by is part of the statistics"
    def pipeline(div, *stats):
        tfms = [IntToFloatTensor(div=div), *([ImageNormalize.from_stats(*stats, cuda=False)] if normalised else [])]
        return SimpleNamespace(train=SimpleNamespace(after_batch=Pipeline(tfms)))
    images = TensorImage(torch.randint(0, 256, (2, 3, 4, 4)))
    own,theirs = pipeline(student, [.5]*3, [.2]*3),pipeline(teacher, [.4]*3, [.3]*3)
    seen,wanted = own.train.after_batch(images.clone()),theirs.train.after_batch(images.clone())
    brought = renormalization(normalization(own), normalization(theirs))(seen)
    torch.testing.assert_close(torch.Tensor(brought), torch.Tensor(wanted), rtol=1e-4, atol=1e-4)
