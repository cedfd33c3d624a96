"A teacher with DataLoaders of its own is asked what these would have made of the student's items, or is refused."
import numpy as np, pandas as pd, pytest, torch
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.all import CategoryBlock, ColReader, DataBlock, IndexSplitter, RegressionBlock, TransformBlock
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularPandas, tabular_learner
from fastai.text.all import TextBlock
from fastai.vision.data import MaskBlock
from torch import nn

from conftest import device
from fasterkd.all import CachedTeacher, KnowledgeDistillationCallback, Teacher

def quiet(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)
    return learn

def answers(learn, teacher):
    "What the student of `learn` is taught for the items of its training set that an epoch draws, by dataset index"
    heard = {}
    def spy(pred, teacher_pred, idxs):
        heard.update(zip(idxs, teacher_pred.detach().cpu()))
        return (pred-pred.detach()).pow(2).sum()+0*pred.sum()
    kd = KnowledgeDistillationCallback(teacher, spy, task_weight=1)
    kd.preflight(learn)
    heard.clear()
    quiet(learn, 1, cbs=kd)
    return heard

def same(heard, own):
    "For each item that was drawn, the answer that `own` has at its place"
    torch.testing.assert_close(torch.stack([*heard.values()]),
                               torch.stack([own[i] for i in heard]).to(torch.stack([*heard.values()]).dtype), rtol=1e-4,
                               atol=1e-5)

def refused(learn, teacher, says):
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=says): quiet(learn, 1, cbs=KnowledgeDistillationCallback(teacher))
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k])

def both(teacher): return teacher,CachedTeacher(teacher, dtype=torch.float32)

def exported(learn, tmp_path):
    learn.path = tmp_path
    learn.export('teacher.pkl')
    return tmp_path/'teacher.pkl'

# Tables
def rows(n=80):
    rng = np.random.RandomState(0)
    df = pd.DataFrame({'size': 3*rng.randn(n)+5, 'weight': rng.rand(n),
                       'color': rng.choice(['red', 'blue', 'green', 'white'], n), 'y': rng.choice(['no', 'yes'], n)})
    df.loc[::9, 'size'] = np.nan
    return df

def table(df, procs=None, cats=('color',), conts=('size', 'weight'), y='y', **kwargs):
    df = df[[*cats, *conts, *([y] if isinstance(y, str) else y)]].reset_index(drop=True)
    procs = [Categorify, FillMissing, Normalize] if procs is None else procs
    return TabularPandas(df.copy(), procs, [*cats], [*conts], y, splits=([*range(len(df))], [*range(8)]),
                         **kwargs).dataloaders(bs=16, drop_last=False)

def tabular(dls, seed=0, n=2):
    torch.manual_seed(seed)
    return tabular_learner(dls, layers=[8], n_out=n)

def own_answers(teacher, df):
    with teacher.no_bar(): return teacher.get_preds(dl=teacher.dls.test_dl(df, bs=16), act=lambda x: x)[0]

@pytest.mark.parametrize('kind', ['live', 'cached', 'exported'])
def test_a_table_with_other_codes_and_statistics_is_asked_in_the_teachers(kind, tmp_path):
    df = rows()
    few = df[df.color!='blue'].reset_index(drop=True)
    teacher = quiet(tabular(table(df, y_block=CategoryBlock())), 1)
    given = dict(live=teacher, cached=CachedTeacher(teacher, dtype=torch.float32),
                 exported=exported(teacher, tmp_path) if kind=='exported' else None)[kind]
    heard = answers(tabular(table(few, y_block=CategoryBlock()), 1), given)
    same(heard, own_answers(teacher, few))

def test_columns_in_another_order_and_columns_that_the_teacher_does_not_read_are_matched_by_name():
    df = rows()
    teacher = quiet(tabular(table(df, conts=['weight'], y_block=CategoryBlock())), 1)
    heard = answers(tabular(table(df, conts=['size', 'weight'], y_block=CategoryBlock()), 1), teacher)
    same(heard, own_answers(teacher, df[['color', 'weight']]))

def test_a_category_or_a_column_that_the_teacher_does_not_know_is_refused_by_name():
    df = rows()
    few = df[df.color!='blue'].reset_index(drop=True)
    for teacher in both(tabular(table(few, y_block=CategoryBlock()))):
        refused(tabular(table(df, y_block=CategoryBlock())), teacher, "does not know 'blue', of the column 'color'")
    refused(tabular(table(df, conts=['size'], y_block=CategoryBlock())), tabular(table(df, y_block=CategoryBlock())),
            "continuous column 'weight'")

def test_a_table_of_the_teachers_own_numbers_is_asked_as_it_stands():
    df = rows()
    dls = table(df, y_block=CategoryBlock())
    teacher,other = tabular(dls),tabular(table(df[df.color!='blue'].reset_index(drop=True), y_block=CategoryBlock()))
    with Teacher(teacher).ready(learn=tabular(dls)) as t: assert t.translate is None
    # a bare module has no numbers of its own
    with Teacher(other.model).ready(learn=tabular(dls)) as t: assert t.translate is None
    with Teacher(other, tfm=None).ready(learn=tabular(dls)) as t: assert t.translate is None

# Users and items
def test_users_and_items_with_other_numbers_are_asked_in_the_teachers_or_refused_by_name():
    rng = np.random.RandomState(0)
    df = pd.DataFrame([(f'u{u:02}', f'i{i:02}', float(rng.rand())) for u in range(12) for i in range(8)],
                      columns=['user', 'item', 'rating'])
    few = df[(df.user>='u04')&(df.item>='i03')].reset_index(drop=True)
    def rated(d): return CollabDataLoaders.from_df(d, valid_pct=.1, seed=0, bs=16, drop_last=False)
    torch.manual_seed(0)
    teacher,dls = quiet(collab_learner(rated(df), n_factors=4), 1),rated(few)
    heard = answers(collab_learner(dls, n_factors=2), teacher)
    own = dls.train.dataset.decode().items
    same(heard, own_answers(teacher, own))
    for t in both(collab_learner(dls, n_factors=2)):
        refused(collab_learner(rated(df), n_factors=2), t, "does not know 'u00', 'u01'.* of the column 'user'")

# Texts
class Mean(nn.Module):
    def forward(self, x): return x.mean(1)

def text_learner(dls, width):
    torch.manual_seed(width)
    return Learner(dls, nn.Sequential(nn.Embedding(len(dls.vocab[0]), width), Mean(), nn.Linear(width, 2)),
                   loss_func=CrossEntropyLossFlat())

def texts(words, n=24):
    rng = np.random.RandomState(0)
    df = pd.DataFrame([(' '.join([*words, *rng.choice(words, 3)]), 'pos' if i%2 else 'neg') for i in range(n)],
                      columns=['text', 'label'])
    block = DataBlock((TextBlock.from_df('text', min_freq=1, n_workers=1), CategoryBlock), get_x=ColReader('text'),
                      get_y=ColReader('label'), splitter=IndexSplitter(range(4)))
    return df,block.dataloaders(df, bs=8, num_workers=0)

def test_words_with_other_numbers_are_asked_in_the_teachers_or_refused_by_name():
    (_,big),(_,small) = texts('good film and a bad book'.split()),texts('bad good book'.split())
    teacher = quiet(text_learner(big, 8), 1)
    heard,place = answers(text_learner(small, 4), teacher),[big.vocab[0].index(w) if w in big.vocab[0] else 0
                                                            for w in small.vocab[0]]
    with torch.no_grad():
        own = [teacher.model.eval()(torch.tensor(place, device=device())[x[None].to(device())])[0].cpu() for x,
               _ in small.train_ds]
    same(heard, torch.stack(own))
    for t in both(text_learner(small, 4)):
        refused(text_learner(big, 4), t, "does not know 'and', 'a', 'film', of the texts or categories of input 0"
                                         "|does not know .*'film'.* of the texts")

# Names of outputs
def noise(i): return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(i))

def maps(codes):
    def mask(i): return np.full((4, 4), i%len(codes), dtype=np.uint8)
    block = DataBlock((TransformBlock, MaskBlock(codes=np.array(codes))), get_x=noise, get_y=mask,
                      splitter=IndexSplitter(range(4)))
    return block.dataloaders([*range(20)], bs=8, num_workers=0)

def segmenter(codes, seed=0):
    torch.manual_seed(seed)
    return Learner(maps(codes), nn.Conv2d(3, len(codes), 1), loss_func=CrossEntropyLossFlat(axis=1))

@pytest.mark.parametrize('names', [['sky', 'road', 'car'], ['car', 'tree', 'sky', 'road']])
def test_the_codes_of_a_segmentation_are_matched_by_name(names):
    student = segmenter(['sky', 'road', 'car'], 1)
    for teacher in both(segmenter(names)):
        heard = answers(student, teacher)
        model = (teacher.teacher.model if isinstance(teacher, CachedTeacher) else teacher.model).cpu()
        own = torch.stack([model(x[None])[0] for x,_ in student.dls.train_ds]).detach()[:,
                                                                                        [names.index(n)
                                                                                         for n in ['sky', 'road',
                                                                                                   'car']]]
        same(heard, own)
    refused(student, segmenter(['sky', 'road', 'house']), "the teacher does not know car")

@pytest.mark.parametrize('kind,loss_func', [('table', MSELossFlat()), ('table', BCEWithLogitsLossFlat()),
                                            ('datablock', MSELossFlat())])
def test_several_numbers_or_labels_are_matched_by_the_names_of_their_columns(kind, loss_func):
    df = rows().drop(columns='y').assign(u=lambda d: (d.weight>.5).astype('float32'),
                                         v=lambda d: (d.weight>.2).astype('float32'), w=1.)
    def learner(names, seed):
        torch.manual_seed(seed)
        if kind=='table':
            dls = table(df, y=names)
            return tabular_learner(dls, layers=[4], n_out=len(names), loss_func=loss_func)
        dls = DataBlock((TransformBlock, RegressionBlock(len(names))),
                        get_x=lambda r: torch.tensor([r.weight, r.weight**2]).float(), get_y=ColReader(names),
                        splitter=IndexSplitter(range(8))).dataloaders(df, bs=16, num_workers=0)
        return Learner(dls, nn.Linear(2, len(names)), loss_func=loss_func)
    straight,crossed,student = learner(['u', 'v'], 0),learner(['v', 'u', 'w'], 0),learner(['u', 'v'], 1)
    heard = answers(student, crossed)
    in_order = student.dls.train.new(shuffle=False, drop_last=False, get_idxs=lambda: range(student.dls.train.n))
    with torch.no_grad(): own = torch.cat([crossed.model.eval()(*b[:-1]).cpu() for b in in_order])
    same(heard, own[:, [1, 0]])
    refused(learner(['u', 'v', 'w'], 1), straight, "the teacher does not know w")

# Images
def test_stats_say_how_the_images_of_a_bare_modules_training_were_normalised():
    from fastai.data.transforms import Normalize
    from fastai.vision.core import TensorImage
    def images(*tfms):
        block = DataBlock((TransformBlock, CategoryBlock), get_x=lambda i: TensorImage(noise(i)), get_y=lambda i: i%2,
                          splitter=IndexSplitter(range(4)), batch_tfms=[*tfms])
        return block.dataloaders([*range(20)], bs=8, num_workers=0)
    dls = images(Normalize.from_stats([.4]*3, [.2]*3))
    def net(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    model,student = net(),Learner(dls, net(), loss_func=CrossEntropyLossFlat())
    heard = answers(student, Teacher(model, stats=([.5]*3, [.25]*3)))
    own = torch.stack([model.cpu()((x.as_subclass(torch.Tensor)[None]-.5)/.25)[0] for x,_ in dls.train_ds]).detach()
    same(heard, own)
    with pytest.raises(ValueError, match="not how those of this Learner are"):
        quiet(Learner(images(), net(), loss_func=CrossEntropyLossFlat()), 1,
              cbs=KnowledgeDistillationCallback(Teacher(net(), stats=([.5]*3, [.25]*3))))
