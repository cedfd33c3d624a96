"""Forward and backward of each loss, beside its plain formula in PyTorch; and what `SoftTarget` holds for the backward pass.

Plain is the formula as a textbook writes it, or, where none is given here, the bare function inside the loss, without what the lift does (checks, precision, pairing). Logits are (256, 1000), features (64, 64, 16, 16), vectors
(256, 512). The two take turns, and the ratio of neighbours is taken, its median told, in seconds of processor time (one thread).
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

textbook = dict(SoftTarget=lambda s, t: kl(s, t, 5.), Mutual=lambda s, t: kl(s, t, 1.), Logits=F.mse_loss, HardLabels=lambda s, t: F.cross_entropy(s, t.argmax(1)), ReverseKL=reverse,
                DecoupledKD=decoupled, DIST=dist, FitNet=F.mse_loss, Attention=lambda s, t: F.mse_loss(attention(s), attention(t)), ActivationBoundaries=boundaries,
                Cosine=lambda s, t: (1-F.cosine_similarity(s.flatten(1), t.flatten(1))).mean(), ChannelWise=channel_wise, Similarity=lambda s, t: (gram(s)-gram(t)).pow(2).mean(),
                SparsityPattern=lambda s, t: F.binary_cross_entropy_with_logits(s, (t>0).float()))

def inputs(name):
    torch.manual_seed(0)
    def two(*shape): return torch.randn(shape),torch.randn(shape)
    if name=='AttentionMaps': return [f.softmax(3) for f in two(64, 4, 64, 64)]
    if name=='ValueRelations': return two(64, 64, 64)
    if name=='RelationalAngle': return two(64, 64)      # B³ times the dimensions
    if 'fm_s' not in used_inputs(every()[name]): return [*two(256, 1000), *([torch.arange(256)] if 'target' in used_inputs(every()[name]) else [])]
    return two(256, 512) if name in ('RelationalDistance', 'RelationalAngle', 'DarkRank', 'ConsecutiveCorrelation', 'InformationCorrelation', 'LogDistance') else two(64, 64, 16, 16)

def seconds(f, s, *more):
    s = s.detach().requires_grad_()
    start = time.process_time()
    f(s, *more).backward()
    return time.process_time()-start

def ratio(name, rounds):
    loss,given = every()[name],inputs(name)
    if name=='FlowOfSolution': given = [torch.stack([x, 2*x]) for x in given]
    plain = textbook.get(name) or loss.__wrapped__
    value = (lambda s, *o: loss([*s], [*o[0]])) if name=='FlowOfSolution' else loss
    for f in (value, plain): seconds(f, *given)
    one = seconds(value, *given)
    n = max(1, min(50, round(.005/max(one, 1e-5))))      # short ones several times in a measurement
    def several(f): return sum(seconds(f, *given) for _ in range(n))
    return median(several(value)/several(plain) for _ in range(rounds))

def held(f, s, t):
    "Bytes that are kept for the backward pass, beyond the inputs, in units of the logits"
    kept = {}
    def pack(x):
        if x.untyped_storage().data_ptr() not in (s.untyped_storage().data_ptr(), t.untyped_storage().data_ptr()): kept[x.untyped_storage().data_ptr()] = x
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): f(s.requires_grad_(), t)
    return sum(x.untyped_storage().nbytes() for x in kept.values())/s.untyped_storage().nbytes()

if __name__=='__main__':
    args = arguments(__doc__, rounds=25).parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name,loss in every().items():
        if isinstance(loss, type) or name in (*suited.of_other_data, 'InputGradient'): continue
        rows[f"{name}, beside its {'formula' if name in textbook else 'bare function'}"] = round(ratio(name, args.rounds), 3)
    s,t = torch.randn(256, 1000),torch.randn(256, 1000)
    rows['logits held by SoftTarget'] = held(SoftTarget, s, t)
    rows["logits held by F.kl_div's own form"] = held(lambda s, t: kl(s, t, 5.), s, t)
    write(rows)
