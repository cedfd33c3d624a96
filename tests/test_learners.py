"Any Learner that fastai makes distils: its applications' data, models and losses. A missing data set is skipped."
import warnings

import pytest
import torch
from conftest import convnet, hooks, numbers, weights
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.torch_core import to_device
from fasterkd.all import *
from fasterkd.dataset_indices import unshuffled_indices, loader_of
from torch import nn
from torch.utils.data import TensorDataset

def data(url):
    from fastai.data.external import URLs, fastai_cfg, untar_data
    url = getattr(URLs, url)
    folder = fastai_cfg().path('data')/url.split('/')[-1].split('.')[0]
    if not folder.exists(): pytest.skip(f'{url} is not in {folder.parent}')
    return untar_data(url)

def distilled(learn, teacher, *args, **kwargs):
    "One short epoch; the names and values of what it recorded"
    from fastai.callback.training import ShortEpochCallback
    learn.logger = lambda *_: None
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    own,before = hooks(learn.model),numbers(learn.model.parameters())
    kd = KnowledgeDistillationCallback(teacher, *args, **kwargs)
    report = kd.preflight(learn)
    assert all(0<v<float('inf') for v in report.terms['gradient / task']) and report.models.shape==(3, 5)
    assert torch.equal(numbers(learn.model.parameters()), before) and hooks(learn.model)==own
    learn.fit(1, cbs=[kd, ShortEpochCallback(0., short_valid=False)])
    assert not torch.equal(numbers(learn.model.parameters()), before)
    assert hooks(learn.model)==own      # a unet has hooks of its own
    names = [n for n in learn.recorder.metric_names if n!='time']
    # from the end: a cancelled epoch has no train_loss
    return dict(zip(names[::-1], learn.recorder.values[-1][::-1]))

def check_cached(learn, teacher, **settings):
    "What is cached of some items is the live output, also in another batch; the live teacher is asked once"
    cached,asked = CachedTeacher(teacher, dtype=torch.float32, **settings),[]
    four = unshuffled_indices(learn.dls.train)[:4]        # texts are sorted
    def batch(idxs):
        dl = loader_of(learn.dls.train, idxs, bs=len(idxs), num_workers=0)
        return to_device(dl.one_batch()[:dl.n_inp], learn.dls.device)       # fastai's tables come on the CPU
    with cached.ready(learn=learn):
        cached.to(learn.dls.device)
        first,_ = cached(batch(four), four)
        hook = cached.model.register_forward_hook(lambda *_: asked.append(1))
        again,_ = cached(batch(four[1::2]), four[1::2])
        hook.remove()
        with pytest.raises(ValueError, match='did not come as it was'):
            cached(batch(four[1::2]), four[3::-2])
            cached.loader(learn)        # on a GPU it is looked for when the next epoch begins
        live,_ = cached.live(batch(four))
    assert not asked and torch.equal(first[1::2], again) and first.shape==live.shape
    axis = 1 if live.ndim>3 else -1
    top = live.topk(settings.get('top_k', 1), axis)
    assert (first.gather(axis, top.indices)-top.values).abs().max()<=1e-5*live.abs().max()

def check_finite(row, *names):
    assert all(row[n]==row[n] and abs(row[n])<float('inf') and row[n]!=0 for n in names), row

@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

def test_vision_with_a_head_of_fastai():
    from fastai.vision.all import ImageDataLoaders, resnet18, vision_learner
    dls = ImageDataLoaders.from_folder(data('MNIST_TINY'), bs=8, num_workers=0)
    teacher,learn = (vision_learner(dls, resnet18, pretrained=False) for _ in range(2))
    row = distilled(learn, teacher, [SoftTarget, Attention], ['model.0.6', '0.7'], ['0.6', '0.7'])
    check_finite(row, 'task_loss', 'SoftTarget', 'Attention')
    check_cached(learn, teacher)

def test_segmentation_is_per_pixel():
    from fastai.vision.all import SegmentationDataLoaders, get_image_files, resnet18, unet_learner
    import numpy as np
    path = data('CAMVID_TINY')
    def mask_of(image): return path/'labels'/f'{image.stem}_P{image.suffix}'
    dls = SegmentationDataLoaders.from_label_func(
        path, bs=2, fnames=get_image_files(path/'images'), label_func=mask_of,
        codes=np.loadtxt(path/'codes.txt', dtype=str), num_workers=0)
    teacher,learn = (unet_learner(dls, resnet18, pretrained=False) for _ in range(2))
    row = distilled(learn, teacher)
    check_finite(row, 'task_loss', 'SoftTarget')
    assert row['SoftTarget']<1000       # 9,216 pixels: a sum over them would not be
    check_cached(learn, teacher, top_k=3)

def test_tabular_with_two_inputs():
    from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
    path = data('ADULT_SAMPLE')
    dls = TabularDataLoaders.from_csv(
        path/'adult.csv', path=path, y_names='salary', cat_names=['workclass', 'education'],
        cont_names=['age', 'fnlwgt'], procs=[Categorify, FillMissing, Normalize], bs=64)
    teacher,learn = (tabular_learner(dls, layers=l) for l in ([200, 100], [20]))
    check_finite(distilled(learn, teacher), 'task_loss', 'SoftTarget')
    check_finite(distilled(learn, [teacher, tabular_learner(dls, layers=[30])]), 'SoftTarget')
    check_cached(learn, teacher)

def test_text_whose_models_return_tuples():
    from fastai.text.all import AWD_LSTM, TextDataLoaders, text_classifier_learner
    import pandas as pd
    path = data('IMDB_SAMPLE')
    df = pd.read_csv(path/'texts.csv').head(60).assign(text=lambda d: d.text.str[:300])
    dls = TextDataLoaders.from_df(df, path=path, text_col='text', label_col='label', valid_pct=.2, bs=8, seq_len=20,
                                  num_workers=0)
    teacher,learn = (text_classifier_learner(dls, AWD_LSTM, pretrained=False, metrics=accuracy) for _ in range(2))
    check_finite(distilled(learn, teacher), 'task_loss', 'SoftTarget')
    check_cached(learn, teacher)
    filled = CachedTeacher(teacher, dtype=torch.float32).fill(dls, show=False)
    # a shuffled loader of texts, whose dataset indices are an iterator, and which pads otherwise than filling did
    learn.fit(1, cbs=KnowledgeDistillationCallback(filled))
    assert filled.n_kept==len(dls.train_ds)

def test_regression_and_several_labels_choose_their_loss():
    x = torch.randn(32, 5)
    def labels(n): return torch.randint(0, 2, (32, n)).float()
    for y,loss_func,name in ((torch.randn(32, 2), MSELossFlat(), 'Logits'),
                             (labels(2), BCEWithLogitsLossFlat(), 'BinarySoftTarget'),
                             (labels(1), BCEWithLogitsLossFlat(), 'BinarySoftTarget')):
        dls = DataLoaders.from_dsets(TensorDataset(x, y), TensorDataset(x, y), bs=8, num_workers=0)
        models = [nn.Sequential(nn.Linear(5, n), nn.ReLU(), nn.Linear(n, y.shape[1])) for n in (16, 4, 8)]
        check_finite(distilled(Learner(dls, models[1], loss_func=loss_func), models[0]), 'task_loss', name)
        check_finite(distilled(Learner(dls, models[1], loss_func=loss_func), [models[0], models[2]]), name)

def test_a_single_logit_is_never_softmaxed():
    ds = TensorDataset(torch.randn(16, 5), torch.randint(0, 2, (16, 1)).float())
    dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0)
    learn = Learner(dls, nn.Linear(5, 1), loss_func=BCEWithLogitsLossFlat())
    with pytest.raises(ValueError, match='use BinarySoftTarget'): distilled(learn, nn.Linear(5, 1), SoftTarget)

def test_outputs_without_a_dimension_of_classes():
    class Squeezed(nn.Linear):
        def __init__(self): super().__init__(5, 1)
        def forward(self, x): return super().forward(x).squeeze(-1)
    labels = torch.randint(0, 2, (16,)).float()
    for y,loss_func,name in ((torch.randn(16), nn.MSELoss(), 'Logits'),
                             (labels, nn.BCEWithLogitsLoss(), 'BinarySoftTarget')):
        ds = TensorDataset(torch.randn(16, 5), y)
        dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0)
        check_finite(distilled(Learner(dls, Squeezed(), loss_func=loss_func), Squeezed()), 'task_loss', name)
        ensemble = [Squeezed(), [Squeezed(), Squeezed()]]
        check_finite(distilled(Learner(dls, Squeezed(), loss_func=loss_func), ensemble), name)

def test_a_training_set_without_labels_is_learnt_from_the_teacher_alone(teacher, items):
    from fastai.data.all import DataBlock, IndexSplitter, ItemGetter, TransformBlock
    def dls(**blocks):
        block = DataBlock(get_x=ItemGetter(0), splitter=IndexSplitter(range(40, 60)), **blocks)
        return block.dataloaders(items, bs=20, num_workers=0)
    labelled = dls(get_y=ItemGetter(1))
    bare = DataLoaders(dls(blocks=TransformBlock).train, labelled.valid)
    assert len(bare.train.one_batch())==1
    for make_teacher in (lambda: teacher, lambda: CachedTeacher(teacher)):
        torch.manual_seed(0)
        learn = Learner(bare, convnet(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        before = weights(learn)
        kd = KnowledgeDistillationCallback(make_teacher(), weight=1)
        with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2, cbs=kd)
        row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
        assert not torch.equal(weights(learn), before)
        assert row['train_loss']==pytest.approx(row['SoftTarget']) and row['valid_loss']>0
        assert row['task_loss']!=row['task_loss']       # not a number
