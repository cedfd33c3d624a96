"What the tests share: their device, digits, a small convolutional net, and what an untouched Learner looks like."
import os, random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.all import DataBlock, IndexSplitter, ItemGetter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import default_device
from sklearn.datasets import load_digits
from torch import nn

# Where the tests run: where fastai trains by default, or on the CPU with FASTERKD_DEVICE=cpu.
# Nothing is asked of a GPU on import: processes are forked from one that has imported this.
forced = os.environ.get('FASTERKD_DEVICE', '')
if forced not in ('', 'cpu'):
    raise ValueError(
        f"FASTERKD_DEVICE is cpu or left out, not {forced!r}: "
        "an accelerator is chosen by what its driver shows, such as CUDA_VISIBLE_DEVICES=1.")
if forced: default_device(False)

# Runs are compared bit for bit, and with what the CPU computes: no kernels whose sums vary, and no TF32.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
torch.backends.cudnn.deterministic = True
torch.backends.cudnn.benchmark = False
torch.backends.cudnn.allow_tf32 = False

def device(): return default_device()

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)

def pytest_collection_modifyitems(items):
    if 'slow' in os.environ.get('FLAGS', ''): return
    skip = pytest.mark.skip(reason='a long form: FLAGS=slow make test')
    for item in items:
        if item.get_closest_marker('slow'): item.add_marker(skip)

def convnet(nf=4, n_out=10, p=0.):
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, nf, 3, padding=1), bn1=nn.BatchNorm2d(nf), act1=nn.ReLU(inplace=True),
        pool=nn.MaxPool2d(2),
        conv2=nn.Conv2d(nf, nf, 3, padding=1), bn2=nn.BatchNorm2d(nf), act2=nn.ReLU(inplace=True),
        flat=nn.Flatten(), drop=nn.Dropout(p), head=nn.Linear(16*nf, n_out)))

@pytest.fixture(scope='session')
def items():
    x,y = load_digits(return_X_y=True)
    return [(torch.tensor(i).float().view(1, 8, 8)/16, torch.tensor(int(t))) for i,t in zip(x[:60], y[:60])]

@pytest.fixture
def make(items):
    "A function that makes a Learner, the same one at each call: weights, batches and their order"
    def _make(model=None, bs=20, p=0., seed=0, **kwargs):
        torch.manual_seed(seed)
        random.seed(seed)
        block = DataBlock(get_x=ItemGetter(0), get_y=ItemGetter(1), splitter=IndexSplitter(range(40, 60)))
        dls = block.dataloaders(items, bs=bs, num_workers=0)
        model = (model or convnet(p=p)).to(device())
        learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, lr=1e-2, **kwargs)
        learn.logger = lambda *_: None
        learn.recorder.add_time = False
        if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
        return learn
    return _make

@pytest.fixture
def teacher():
    torch.manual_seed(7)
    return convnet(8).train()

class After(Callback):
    "Does `f` after all others at an event"
    order = 1000
    def __init__(self, event, f):
        self.event = event
        self.f = f
    def __call__(self, name):
        if name==self.event: self.f(self.learn)

def numbers(tensors):
    "All of them in one tensor, on the CPU, to be compared wherever they were"
    return torch.cat([t.detach().cpu().flatten().double() for t in tensors])

def weights(learn): return numbers(learn.model.state_dict().values())

def adapter_weights(kd): return numbers(kd.adapters.parameters())

def hooks(*models):
    "How many forward hooks there are on the models' modules"
    return sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for model in models for m in model.modules())

def assert_untouched(learn, *teachers):
    "No hook, flag, column, parameter or attribute of a distillation is left on Learner, student and teachers"
    assert hooks(learn.model, *teachers)==0
    assert all(p.requires_grad for m in (learn.model, *teachers) for p in m.parameters())
    assert all(m.training for t in teachers for m in t.modules())
    assert all(p.grad is None for t in teachers for p in t.parameters())
    assert [m.name for m in learn.metrics]==['accuracy']
    assert not {'remove_cbs', '_do_one_batch'} & {*learn.__dict__}
    assert isinstance(learn.loss_func, CrossEntropyLossFlat) and not learn.lock.locked()
    if learn.opt is not None:
        in_optimizer = {id(p) for p in learn.opt.all_params().itemgot(0)}
        assert in_optimizer=={id(p) for p in learn.model.parameters()}
