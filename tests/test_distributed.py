"Two processes, through fastai's `distrib_ctx` and Accelerate on the CPU, learn what one learns from the same batches."
import os, socket, subprocess, sys

import pytest
import torch

pytest.importorskip('accelerate')
if not torch.distributed.is_available(): pytest.skip('this PyTorch has no torch.distributed', allow_module_level=True)

worker = '''
import os, sys, torch
sys.path.insert(0, {tests!r})
from contextlib import nullcontext
from conftest import *
from fasterkd.all import *
from fasterkd.losses import *
from fasterkd.losses import relations
from fastai.data.all import DataLoaders, TfmdDL
from fastai.distributed import *
from fastai.optimizer import SGD
world,out = int(os.environ.get('WORLD_SIZE', 1)),{out!r}
rank = int(os.environ.get('RANK', 0))
torch.set_num_threads(1)
def _broadcast(self, t, rank):      # fastai's calls .cuda()
    t = torch.LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = _broadcast
items = torch.load({items!r})
class Items:
    def __len__(self): return 40
    def __getitem__(self, i): return items[i]
order = [*range(40)] if world>1 else [i for k in (0, 10) for i in (*range(k, k+10), *range(20+k, 30+k))]
loaders = (TfmdDL(Items(), bs=20//world, num_workers=0, get_idxs=lambda: order) for _ in range(2))
dls = DataLoaders(*loaders, device='cpu')
asked = []
class Counts(nn.Sequential):
    def forward(self, x):
        asked.append(len(x))
        return super().forward(x)
def plain(nf, kind=nn.Sequential):
    torch.manual_seed(nf)
    return kind(OrderedDict(
        conv1=nn.Conv2d(1, nf, 3, padding=1), act1=nn.ReLU(), pool=nn.MaxPool2d(2),
        conv2=nn.Conv2d(nf, nf, 3, padding=1), act2=nn.ReLU(), flat=nn.Flatten(), head=nn.Linear(16*nf, 10)))
teacher = plain(8, Counts)
def hint(): return Term(FitNet, 'conv2', adapter='auto')
def three(): return [SoftTarget(T=4), Term(FitNet, 'conv2', adapter='conv'), Term(Attention, 'conv2', weight=10)]
def related(gather):
    features = dict(Similarity=3000, RelationalDistance=25, RelationalAngle=50, DarkRank=1, ProbabilisticTransfer=3e4,
                    CorrelationCongruence=1, MutualInformation=1, SimilarityDirection=1)
    shaped = dict(ConsecutiveCorrelation=1, InformationCorrelation=1)
    def loss(name): return getattr(relations, name)(gather=gather)
    return [*(Term(loss(n), 'flat', weight=w) for n,w in features.items()),
            *(Term(loss(n), 'head', weight=w, adapter='linear') for n,w in shaped.items()),
            *(of_logits(gather=gather) for of_logits in (DIST, ClassAlignment, BatchAlignment))]
cases = dict(soft=lambda: SoftTarget, hint=hint, three=three, learned=lambda: Term(VariationalInformation, 'conv2'),
             cached=lambda: SoftTarget, cached_file=lambda: [SoftTarget, hint()],
             apart=lambda: related(False), gather=lambda: related(True))
def cached(): return CachedTeacher(teacher, dtype=torch.float32)
def cached_file():
    return CachedTeacher(teacher, out+f'/answers-{{world}}', dtype=torch.float32, features=['conv2'])
def wrapped(learn):
    from torch.nn.parallel import DistributedDataParallel as DDP
    assert isinstance(learn.model, DDP)==(world>1) and not any(isinstance(m, DDP) for m in teacher.modules())
    assert not {{*map(id, teacher.parameters())}} & {{*map(id, learn.model.parameters())}}
def fail(learn):
    if rank==1: raise RuntimeError('one of two')
def views():
    learn = Learner(dls, plain(4), loss_func=CrossEntropyLossFlat(), lr=1e-2, opt_func=SGD)
    kd = KnowledgeDistillationCallback(CachedTeacher(teacher, views=2))
    try:
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(1, cbs=kd)
    except ValueError as e: torch.save(str(e), out+f'/views-{{world}}-{{rank}}.pt')
def fill():
    filled = CachedTeacher(teacher, out+f'/filled-{{world}}', dtype=torch.float32).fill(dls, show=False)
    pred,done = (filled.rows.columns[n].clone() for n in ('pred', 'done'))
    torch.save([sum(asked), pred, done], out+f'/fill-{{world}}-{{rank}}.pt')
def run(case):
    asked.clear()
    if case in ('fill', 'views'): return globals()[case]()
    teachers = dict(cached=cached, cached_file=cached_file)
    taught = teachers[case]() if case in teachers else teacher
    learn = Learner(dls, plain(4), loss_func=CrossEntropyLossFlat(), lr=1e-2, opt_func=SGD, metrics=accuracy)
    learn.logger = lambda *_: None
    torch.manual_seed(0 if rank==0 else 99)
    kd = KnowledgeDistillationCallback(taught, cases.get(case, cases['soft'])())
    cbs = [kd, After('after_backward', fail if case=='dies' else wrapped)]
    distributed = learn.distrib_ctx(sync_bn=False, cpu=True) if world>1 else nullcontext()
    with distributed: learn.fit(2, cbs=cbs)
    assert not any('module.' in n for n in learn.model.state_dict())
    assert hooks(learn.model, teacher)==0 and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    parts = torch.cat([torch.zeros(1), *(p.detach().flatten() for p in kd.auxiliary.learned.parameters())])
    values = torch.tensor(learn.recorder.values[-1][3:])
    torch.save([weights(learn), parts, values, sum(asked)], out+f'/{{case}}-{{world}}-{{rank}}.pt')
for case in sys.argv[1:]: run(case)
if world>1: torch.distributed.destroy_process_group()
'''

def run(cases, world, items, path):
    "Start `world` processes; their exit codes and what they wrote to stderr"
    torch.save(items[:40], path/'items.pt')
    code = worker.format(tests=os.path.dirname(__file__), items=str(path/'items.pt'), out=str(path))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    def start(rank):
        env = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1',
                   MASTER_PORT=str(port), ACCELERATE_USE_CPU='true') if world>1 else {}
        return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, *cases], env={**os.environ, **env},
                                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    ps = [start(rank) for rank in range(world)]
    try: errors = [p.communicate(timeout=200)[1] for p in ps]
    finally:
        for p in ps: p.kill()
    return [p.returncode for p in ps],errors

cases = ['soft', 'hint', 'three', 'learned', 'cached', 'cached_file', 'gather']

@pytest.fixture(scope='module')
def trained(items, tmp_path_factory):
    "All cases, by one process and by two"
    path = tmp_path_factory.mktemp('distributed')
    for world in (1, 2):
        codes,errors = run([*cases, 'apart', 'fill', *(['views'] if world>1 else [])], world, items, path)
        assert codes==[0]*world, errors
    return path

def loaded(path, case): return [torch.load(path/f'{case}-{w}.pt') for w in ('1-0', '2-0', '2-1')]

@pytest.mark.parametrize('case', cases)
def test_two_processes_learn_as_one(trained, case):
    one,*two = loaded(trained, case)
    for w,parts,*_ in two:
        assert (w-one[0]).abs().max()<=1e-5 and (parts-one[1]).abs().max()<=1e-5

def test_gathered_relations_have_the_values_of_the_whole_batch_and_others_do_not(trained):
    one,*two = loaded(trained, 'gather')
    for _,_,values,_ in two:        # the first value is the task's
        torch.testing.assert_close(values[1:], one[2][1:], rtol=1e-4, atol=1e-5)
    (w,_,values,_),(_,_,halves,_),(half,*_) = one,*loaded(trained, 'apart')[1:]
    assert (half-w).abs().max()>1e-4 and ((halves-values).abs()>1e-3*values.abs())[1:].all()

def test_views_are_refused_in_words(trained):
    for rank in (0, 1):
        message = torch.load(trained/f'views-2-{rank}.pt')
        assert 'views are replayed in one process, and this run has several' in message

def test_a_file_of_answers_is_filled_once_between_processes(trained):
    _,*two = loaded(trained, 'cached_file')
    assert [asked for *_,asked in two]==[20+5]*2     # its own half, and once a fit half a batch again
    (n,pred,done),*two = loaded(trained, 'fill')
    # of two, one may be at work on what the other has to do last; and each makes sure with up to 10
    assert n==40+10 and done.all() and 40<=sum(o[0] for o in two)<=40+20+2*10
    for _,p,d in two:
        assert d.all()
        torch.testing.assert_close(p, pred)

def test_a_process_that_dies_ends_the_run_with_its_error(items, tmp_path):
    codes,errors = run(['dies'], 2, items, tmp_path)
    assert 0 not in codes and any('one of two' in e for e in errors)
