"Taps in a fit: a model that is copied, saved or exported in the middle of it is the model alone; checkpointed layers."
import copy, io, pickle

import pytest
import torch
from conftest import After, assert_untouched, convnet, device, hooks, numbers, weights
from fastai.callback.core import Callback
from fasterkd.all import *
from fasterkd.losses import *
from torch.utils.checkpoint import checkpoint

def loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)

def pickled(model): return pickle.loads(pickle.dumps(model))

def pickled_and_copied(model): return copy.deepcopy(pickled(model))
def averaged(model): return torch.optim.swa_utils.AveragedModel(model).module

ways = dict(deepcopy=copy.deepcopy, copy=copy.copy, pickle=pickled, save=loaded, twice=pickled_and_copied,
            averaged=averaged)

def features(teacher, **kwargs):
    terms = [SoftTarget, Term(Attention, ['conv1', 'conv2'], ['conv1', 'bn2']), Term(Similarity, 'bn2')]
    return KnowledgeDistillationCallback(teacher, terms, **kwargs)

def x(): return torch.zeros(4, 1, 8, 8, device=device())

@pytest.mark.parametrize('event', ('before_batch', 'after_pred', 'after_backward', 'after_step', 'after_epoch'))
@pytest.mark.parametrize('way', ways)
def test_a_copy_made_in_the_middle_of_a_fit_has_no_hook_of_ours_and_feeds_no_tap(make, teacher, way, event):
    copied = []
    untouched = []
    def calls(learn): return [tap.calls for tap in learn.knowledge_distillation.fit_state.taps or ()]
    def copies(learn):
        copied.append(ways[way](learn.model))
        before = calls(learn)
        if way!='copy': copied[-1](x())       # a shallow copy has the very layers of the original
        untouched.append(before==calls(learn))
    learn = make(cbs=features(teacher))
    learn.fit(1, cbs=After(event, copies))
    assert copied and all(untouched)
    for model in copied if way!='copy' else ():
        assert hooks(model)==0
        assert [{*vars(m)} for m in model.modules()]==[{*vars(m)} for m in learn.model.modules()]
    assert_untouched(learn, teacher)

def test_the_original_trains_as_it_would_without_a_copy(make, teacher):
    ends = []
    for cbs in ([], [After('after_pred', lambda learn: (copy.deepcopy(learn.model), pickled(learn.model)))]):
        learn = make(cbs=features(teacher))
        learn.fit(2, cbs=cbs)
        ends.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*ends)

def test_a_copy_keeps_the_hooks_that_are_not_ours_and_their_handles_work(make, teacher):
    made,seen = [],[]
    learn = make(cbs=features(teacher))
    before = learn.model.conv2.register_forward_hook(Notes(seen))
    def copies(learn): made or made.append(copy.deepcopy(learn.model))
    learn.fit(1, cbs=[After('after_pred', copies), After('before_batch', lambda learn: before.remove())])
    assert not made[0].conv2._forward_hooks and hooks(learn.model)==0
    handle = learn.model.conv2.register_forward_hook(Notes(seen))
    made.clear()
    learn.fit(1, cbs=After('after_pred', copies))
    assert [type(h) for h in made[0].conv2._forward_hooks.values()]==[Notes] and hooks(learn.model)==1
    handle.remove()
    assert_untouched(learn, teacher)

class Notes:
    def __init__(self, seen): self.seen = seen
    def __call__(self, module, inp, out): self.seen.append(out.shape)

class Hooking(Callback):
    "Hooks a layer for the length of a fit"
    def __init__(self, order): self.order = order
    def before_fit(self): self.handle = self.model.conv2.register_forward_hook(Notes([]))
    def after_fit(self): self.handle.remove()

@pytest.mark.parametrize('order', (-30, 100))
def test_with_another_callback_that_hooks_the_same_layer_nothing_is_left(make, teacher, order):
    made,learn = [],make(cbs=[features(teacher), Hooking(order)])
    learn.fit(2, cbs=After('after_pred', lambda learn: made.append(copy.deepcopy(learn.model))))
    assert {type(h) for model in made for m in model.modules() for h in m._forward_hooks.values()}=={Notes}
    assert_untouched(learn, teacher)

@pytest.mark.parametrize('how', ('in place', 'wrapped', 'a layer'))
def test_a_copy_of_a_compiled_student_has_no_hook_either(make, teacher, how):
    torch._dynamo.reset()
    made,learn = [],make(cbs=features(teacher))
    if how=='in place': learn.model.compile(backend='eager')
    elif how=='wrapped': learn.model = torch.compile(learn.model, backend='eager')
    else: learn.model.conv2 = torch.compile(learn.model.conv2, backend='eager')
    learn.fit(1, cbs=After('after_step', lambda learn: made.append(copy.deepcopy(learn.model))))
    assert len(made)==2 and all(hooks(model)==0 for model in made) and hooks(learn.model)==0
    made[0](x())

# --- activation checkpointing

class Checkpointed(torch.nn.Module):
    "A student whose first layers run in `torch.utils.checkpoint` in training"
    def __init__(self, reentrant):
        super().__init__()
        self.net = convnet()
        self.reentrant = reentrant
    def forward(self, x):
        if self.reentrant is None or not self.training: return self.net(x)
        return self.net[4:](checkpoint(self.net[:4], x.clone().requires_grad_(), use_reentrant=self.reentrant))

def trained(make, teacher, reentrant, layer):
    torch.manual_seed(0)
    learn = make(Checkpointed(reentrant))
    learn.fit(2, cbs=KnowledgeDistillationCallback(teacher, Attention, layer, 'bn2', adapter='auto'))
    return numbers(learn.model.parameters())

def test_a_student_with_activation_checkpointing_trains_as_without(make, teacher):
    def equal(layer, a, b): return torch.equal(trained(make, teacher, a, layer), trained(make, teacher, b, layer))
    assert equal('net.bn1', None, False) and equal('net.conv2', None, False)
    assert equal('net.conv2', None, True)       # outside of what is checkpointed

def test_the_older_form_of_checkpointing_is_refused_by_name_before_anything_moves(make, teacher):
    learn = make(Checkpointed(True))
    before = weights(learn)
    kd = KnowledgeDistillationCallback(teacher, Attention, 'net.bn1', 'bn2', adapter='auto')
    says = ("the student's layer 'net.bn1' ran in this batch without a gradient, "
            ".* use_reentrant=True.*use_reentrant=False")
    with pytest.raises(ValueError, match=says): kd.preflight(learn)
    with pytest.raises(ValueError, match=says): learn.fit(1, cbs=kd)
    assert torch.equal(weights(learn), before)
    assert_untouched(learn, teacher)
