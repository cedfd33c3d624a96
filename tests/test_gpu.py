"What only a GPU can show: float16 and its scaler, streams, two devices, memory, waiting. Skipped where there is none."
import copy, gc, warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import After, adapter_weights, assert_untouched, convnet, device, numbers, weights
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandTransform, Rotate
from fasterkd.all import *
from fasterkd.teacher_forward import TeacherForward
from fasterkd.cifar import LightNN, digits32, images_dls
from fasterkd.fingerprints import weights_hash
from fasterkd.losses import VariationalInformation
from fasterkd.base_teacher import BaseTeacher
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')

@pytest.fixture(autouse=True)
def _on_a_gpu():
    if device().type!='cuda': pytest.skip('FASTERKD_DEVICE=cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

hint = Term(FitNet, 'conv2', adapter='auto')
learned = Term(VariationalInformation, 'bn2')
def distillation(teacher, **kwargs):
    return KnowledgeDistillationCallback(teacher, [SoftTarget, hint, learned], **kwargs)

# --- half precision

@pytest.mark.parametrize('mode', ('fp16', 'bf16'))
def test_in_half_precision_adapters_and_learned_losses_are_trained_with_the_student(make, teacher, mode):
    kd,first = distillation(teacher),[]
    def look(learn): first.append((adapter_weights(kd), learn.scaler is not None and learn.scaler.is_enabled()))
    learn = make(cbs=[kd, MixedPrecision(mode), After('before_backward', look)])
    learn.fit(4)
    assert first[0][1]==(mode=='fp16')
    assert {p.dtype for p in kd.auxiliary.learned.parameters()}=={torch.float32}
    assert not torch.equal(adapter_weights(kd), first[0][0])
    assert numbers(kd.auxiliary.learned.parameters()).isfinite().all() and weights(learn).isfinite().all()

def test_where_the_scaler_leaves_the_students_step_out_adapters_take_none_either(make, teacher):
    kd,steps = distillation(teacher),[]
    class Overflows(Callback):
        order = MixedPrecision.order+1
        def after_backward(self):
            if self.iter==1: next(self.model.parameters()).grad.fill_(float('inf'))
    def note(learn): steps.append(adapter_weights(kd))
    with_overflow = [kd, MixedPrecision(init_scale=2.**8), Overflows(), After('before_backward', note)]
    make(cbs=with_overflow, bs=10).fit(1)
    assert torch.equal(steps[1], steps[2]) and not torch.equal(steps[2], steps[3])

def test_preflight_advises_channels_last_in_half_precision_and_not_where_they_are(make, teacher):
    def advised(learn):
        notes = KnowledgeDistillationCallback(teacher).preflight(learn).notes
        return sum('to_channelslast' in n for n in notes)
    assert [advised(make()), advised(make().to_fp16()), advised(make().to_channelslast())]==[0, 1, 0]

# --- devices

def test_a_teacher_on_the_cpu_goes_to_the_students_gpu_and_back(make, teacher):
    seen = []
    handle = teacher.head.register_forward_hook(lambda m, x, out: seen.append(out.device.type))
    make(cbs=distillation(teacher)).fit(1)
    handle.remove()
    assert {*seen}=={'cuda'} and {p.device.type for p in teacher.parameters()}=={'cpu'}

def test_a_student_on_the_cpu_has_its_teacher_there(make, teacher):
    learn = make()
    learn.dls.to(torch.device('cpu'))
    learn.model.cpu()
    teacher.to(device())
    learn.fit(1, cbs=distillation(teacher))
    assert {p.device.type for p in learn.model.parameters()}=={'cpu'}
    assert {p.device.type for p in teacher.parameters()}=={'cuda'}

def test_cached_answers_of_a_gpu_are_those_of_the_live_teacher(make, teacher):
    ends = []
    for t in (teacher, CachedTeacher(teacher, dtype=torch.float32, features=['conv2', 'bn2'])):
        learn = make()
        torch.manual_seed(1)
        learn.fit(2, cbs=distillation(t))
        ends.append(weights(learn))
    assert (ends[0]-ends[1]).abs().max()<=1e-5

def test_views_whose_transforms_draw_from_the_gpu_are_replayed():
    train,_ = digits32()
    few = train.subset(range(64))
    class Noise(RandTransform):
        "Draws from the GPU's own generator"
        def encodes(self, x:TensorImage): return x+.1*torch.randn(x.shape, device=x.device)
    dls = images_dls(few, few.subset(range(8)), bs=16, batch_tfms=[Rotate(p=1.), Noise(p=1.)])
    net = LightNN().eval()
    cached = CachedTeacher(net, dtype=torch.float32, views=2)
    before = torch.cuda.get_rng_state()
    cached.fill(dls, show=False)
    assert torch.equal(torch.cuda.get_rng_state(), before) and cached.n_kept==128
    asked = []
    net.register_forward_hook(lambda *_: asked.append(1))
    learn = Learner(dls, LightNN(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, cbs=KnowledgeDistillationCallback(cached))        # refused if an item does not come as it was
    assert len(asked)==1        # about some items again, to see that the model is the same

def test_a_hash_of_weights_is_the_same_on_both_devices(teacher):
    on_cpu = weights_hash(teacher)
    assert weights_hash(teacher.to(device()))==on_cpu
    with torch.no_grad(): teacher.head.bias[0] += 1
    assert weights_hash(teacher)!=on_cpu and weights_hash(teacher)==weights_hash(teacher.cpu())

# --- the teacher's stream

def test_a_teacher_on_its_own_stream_teaches_the_same_as_on_the_students(make, teacher):
    ends = []
    for stream in (True, False):
        learn = make(p=.3, cbs=[distillation(Teacher(teacher, stream=stream)), MixUp()])
        torch.manual_seed(1)
        learn.fit(3)
        ends.append(weights(learn))
        assert_untouched(learn, teacher)
    assert torch.equal(*ends)

class Slow(nn.Module):
    "Its answer comes long after it was asked"
    def forward(self, x):
        torch.cuda._sleep(50_000_000)
        return x.flatten(1)[:, :10]*2

def test_memory_that_is_freed_and_filled_meanwhile_does_not_show_up_in_an_answer():
    with Teacher(Slow()).ready() as t:
        asking = TeacherForward(t, device())
        assert asking.side is not None
        for _ in range(3):
            x = torch.rand(64, 16, device=device())
            right = x[:, :10].clone()*2
            torch.cuda.synchronize()
            asking.ask((x,))
            asking.inputs = [],[]
            del x                                                       # the student has done with its input
            for _ in range(20): torch.full((64, 16), torch.nan, device=device())      # somebody else takes the memory
            answer,_ = asking.read()
            assert torch.equal(answer, right)

def test_an_answer_that_nobody_reads_is_waited_for(make, teacher):
    class Skips(Callback):
        run_valid = False
        def after_pred(self):
            if self.iter%2: raise CancelBatchException
    learn = make(cbs=[distillation(teacher), Skips()], bs=10)
    learn.fit(2)
    assert weights(learn).isfinite().all()
    assert_untouched(learn, teacher)

class Changes(nn.Module):
    "Changes its input in place"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x.mul_(-1))

def test_a_student_that_changes_its_input_in_place_waits_for_the_teacher(make, teacher):
    seen = []
    class Asked(BaseTeacher):
        stream = True
        def models(self): return [teacher]
        def to(self, device): teacher.to(device)
        @contextmanager
        def ready(self, layers=(), learn=None): yield self
        @torch.no_grad()
        def __call__(self, xb, idxs=None):
            torch.cuda._sleep(20_000_000)
            seen.append(xb[0].clone())
            return teacher.eval()(xb[0]),{}
    given = []
    def note(learn):
        if learn.training: given.append(learn.x.clone())
    learn = make(Changes(convnet()), cbs=[KnowledgeDistillationCallback(Asked()), After('before_batch', note)])
    learn.fit(2)
    assert len(seen)==4 and all(torch.equal(a, b) for a,b in zip(seen, given, strict=True))

# --- waiting, memory

def without_waiting(kd, event):
    "`event` of the callback `kd`, which raises if it waits for the GPU after an epoch's first batch"
    def f():
        begun = kd.fit_state is not None and kd.fit_state.first_batch is None
        if begun and kd.learn.training and kd.learn.iter: torch.cuda.set_sync_debug_mode('error')
        try: return event()
        finally: torch.cuda.set_sync_debug_mode('default')
    return f

@pytest.mark.parametrize('kind', ('live', 'ensemble', 'filled'))
def test_no_batch_waits_for_the_gpu_but_in_after_batch_where_the_recorder_does(make, teacher, kind):
    learn = make(bs=10)
    given = teacher
    if kind=='ensemble': given = [teacher, convnet(6)]
    if kind=='filled': given = CachedTeacher(teacher).fill(learn.dls, show=False)
    kd = KnowledgeDistillationCallback(given, [SoftTarget, hint] if kind=='live' else SoftTarget)
    for name in ('_ask', 'before_batch', 'after_loss', 'after_step'):
        setattr(kd, name, without_waiting(kd, getattr(kd, name)))
    learn.fit(2, cbs=kd)
    assert weights(learn).isfinite().all()

def test_a_teacher_that_runs_out_of_memory_says_what_to_do_and_a_smaller_chunk_does_it(make, teacher):
    class Large(nn.Module):
        "Needs more than half of the memory for more than five items"
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(teacher)
        def forward(self, x):
            free = torch.cuda.mem_get_info()[0]
            torch.empty(int(free*.3*len(x)), dtype=torch.uint8, device=x.device)
            return self.net(x)
    learn = make()
    with pytest.raises(torch.OutOfMemoryError, match=r'Teacher\(model, chunk=5\) takes fewer'):
        learn.fit(1, cbs=KnowledgeDistillationCallback(Large()))
    assert_untouched(learn)
    gc.collect()
    torch.cuda.empty_cache()
    learn.fit(1, cbs=KnowledgeDistillationCallback(Teacher(Large(), chunk=1)))

def test_the_teachers_activations_are_gone_before_the_students_are_kept(make):
    "The peak of a fit is that of the student alone, but for what the losses read"
    def wide():
        return nn.Sequential(nn.Conv2d(1, 512, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(512, 10))
    torch.manual_seed(0)
    peaks,net = [],wide().to(device())
    for cbs in ([], [KnowledgeDistillationCallback(net)], [KnowledgeDistillationCallback(Teacher(net, stream=False))]):
        learn = make(wide(), bs=40)
        learn.fit(1, cbs=cbs)       # what is made once is made
        torch.cuda.reset_peak_memory_stats()
        learn.fit(1, cbs=cbs)
        peaks.append(torch.cuda.max_memory_allocated())
    one = 40*512*64*4       # bytes of one of the teacher's maps
    assert peaks[1]-peaks[0]<one and peaks[2]-peaks[0]<one
