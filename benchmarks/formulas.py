"""Forward and backward of each loss and of its plain formula in PyTorch; what `SoftTarget` holds for the backward pass.

Plain is the formula as a textbook writes it, or, where none is given here, the bare function inside the loss, without
what the wrapping does (checks, precision, pairing). Logits are (256, 1000), features (64, 64, 16, 16), vectors
(256, 512). The two take turns, and the ratio of neighbours is taken, its median reported, in seconds of processor time
(one thread).
"""
import sys, time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import arguments, write
from fasterkd.losses import *
from fasterkd.losses.core import used_inputs

sys.path.insert(0, str(Path(__file__).parent.parent/'tests'))
import every as suited

def kl(s, t, T): return F.kl_div(F.log_softmax(s/T, 1), F.softmax(t/T, 1), reduction='batchmean')*T*T
def attention(f): return F.normalize(f.pow(2).mean(1).flatten(1))
def gram(f): return F.normalize(f.flatten(1)@f.flatten(1).T)
def channel_wise(s, t): return kl(s.flatten(0, 1).flatten(1), t.flatten(0, 1).flatten(1), 4.)
def reverse(s, t):
    p,q = F.log_softmax(t, 1),F.log_softmax(s, 1)
    return (q.exp()*(q-p)).sum(1).mean()
def decoupled(s, t, y, T=4.):
    "As in the authors' program"
    own = F.one_hot(y, s.shape[1]).bool()
    def two(z): return torch.stack([(p := F.softmax(z/T, 1)).masked_select(own), 1-p.masked_select(own)], 1)
    target = F.kl_div(two(s).log(), two(t), reduction='batchmean')
    others = F.kl_div(F.log_softmax(s/T-1000*own, 1), F.softmax(t/T-1000*own, 1), reduction='batchmean')
    return T*T*(target+8*others)
def pearson(a, b): return F.cosine_similarity(a-a.mean(1, keepdim=True), b-b.mean(1, keepdim=True))
def dist(s, t):
    s,t = s.softmax(1),t.softmax(1)
    return 2-pearson(s, t).mean()-pearson(s.T, t.T).mean()
def boundaries(s, t, m=2.): return (((s+m)**2*((s>-m)&(t<=0))) + ((s-m)**2*((s<=m)&(t>0)))).mean()
def z(x): return (x-x.mean(1, keepdim=True))/(x.std(1, keepdim=True)+1e-7)

def soft_target(s, t): return kl(s, t, 5.)
def mutual(s, t): return kl(s, t, 1.)
def hard_labels(s, t): return F.cross_entropy(s, t.argmax(1))
def attention_transfer(s, t): return F.mse_loss(attention(s), attention(t))
def cosine(s, t): return (1-F.cosine_similarity(s.flatten(1), t.flatten(1))).mean()
def similarity(s, t): return (gram(s)-gram(t)).pow(2).mean()
def sparsity(s, t): return F.binary_cross_entropy_with_logits(s, (t>0).float())

textbook = dict(SoftTarget=soft_target, Mutual=mutual, Logits=F.mse_loss, HardLabels=hard_labels, ReverseKL=reverse,
                DecoupledKD=decoupled, DIST=dist, FitNet=F.mse_loss, Attention=attention_transfer,
                ActivationBoundaries=boundaries, Cosine=cosine, ChannelWise=channel_wise, Similarity=similarity,
                SparsityPattern=sparsity)
of_vectors = ('RelationalDistance', 'DarkRank', 'ConsecutiveCorrelation', 'InformationCorrelation', 'LogDistance')

def inputs(name):
    torch.manual_seed(0)
    def two(*shape): return torch.randn(shape),torch.randn(shape)
    if name=='AttentionMaps': return [f.softmax(3) for f in two(64, 4, 64, 64)]
    if name=='ValueRelations': return two(64, 64, 64)
    if name=='RelationalAngle': return two(64, 64)      # B³ times the dimensions
    used = used_inputs(every()[name])
    if 'fm_s' in used: return two(256, 512) if name in of_vectors else two(64, 64, 16, 16)
    return [*two(256, 1000), *([torch.arange(256)] if 'target' in used else [])]

def seconds(f, s, *more):
    s = s.detach().requires_grad_()
    start = time.process_time()
    f(s, *more).backward()
    return time.process_time()-start

def ratio(name, rounds):
    loss,tensors = every()[name],inputs(name)
    plain,value = textbook.get(name) or loss.__wrapped__,loss
    if name=='FlowOfSolution':
        tensors = [torch.stack([x, 2*x]) for x in tensors]
        def value(s, t): return loss([*s], [*t])
    for f in (value, plain): seconds(f, *tensors)
    one = seconds(value, *tensors)
    n = max(1, min(50, round(.005/max(one, 1e-5))))      # short ones several times in a measurement
    def several(f): return sum(seconds(f, *tensors) for _ in range(n))
    return median(several(value)/several(plain) for _ in range(rounds))

def held(f, s, t):
    "Bytes that are held for the backward pass, beyond the inputs, in units of the logits"
    def storage(x): return x.untyped_storage()
    inputs = storage(s).data_ptr(),storage(t).data_ptr()
    saved = {}
    def pack(x):
        at = storage(x).data_ptr()
        if at not in inputs: saved[at] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): f(s.requires_grad_(), t)
    return sum(storage(x).nbytes() for x in saved.values())/storage(s).nbytes()

if __name__=='__main__':
    args = arguments(__doc__, rounds=25).parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name,loss in every().items():
        if isinstance(loss, type) or name in (*suited.of_other_data, 'InputGradient'): continue
        plain = 'formula' if name in textbook else 'bare function'
        rows[f'{name}, beside its {plain}'] = round(ratio(name, args.rounds), 3)
    s,t = torch.randn(256, 1000),torch.randn(256, 1000)
    rows['logits held by SoftTarget'] = held(SoftTarget, s, t)
    rows["logits held by F.kl_div's own form"] = held(soft_target, s, t)
    write(rows)
