"Golden numbers: which public loss stands for which method, the cases, and where they are kept."
import json
from pathlib import Path

import numpy as np
import torch
from fasterkd.losses import *
from fasterkd.terms import Term
from torch import nn
from torch.nn import functional as F

here = Path(__file__).parent
full = here.parent.parent/'shared'/'golden'

def layers(t, side): return [t[n] for n in sorted(t) if n[0]==side and n[1:].isdigit()]
def logits(loss): return lambda t, h: loss(t['student'], t['teacher'], **h)
def labelled(loss): return lambda t, h: loss(t['student'], t['teacher'], t['labels'], **h)
def without(name, f): return lambda t, h: f(t, {k: v for k,v in h.items() if k!=name})
def features(loss, *settings): return lambda t, h: loss(layers(t, 's'), layers(t, 't'), **{k: h[k] for k in settings})

class Given(nn.Module):
    "A module whose weights are given as data"
    def __init__(self, f): super().__init__(); self.forward = f

def adapted(loss, adapter):
    "`loss` of one pair through what `adapter(tensors, settings)` gives"
    def f(t, h):
        term = Term(loss, 's', 't', adapter=adapter(t, h))
        features = {'s': t['student']},{'t': t['teacher']}
        term.adapters = term.make_adapters(*features)
        return term({}, *features)
    return f

def embedding(t, h):
    "The linear map that is given as data; the mutual information has it only where dimensions differ"
    return Given(lambda s: F.linear(s, t['embed_linear_weight'], t['embed_linear_bias']))

def conv_regressor(t, h):
    "The regressor of CRD's program: a convolution that meets the size, BatchNorm, ReLU"
    def regress(s):
        w,b,(sh,th) = t['conv_weight'],t['conv_bias'],(t['student'].shape[2], t['teacher'].shape[2])
        y = F.conv2d(s, w, b, 2, 1) if sh==2*th else F.conv_transpose2d(s, w, b, 2, 1) if 2*sh==th else F.conv2d(s, w, b)
        return F.relu(F.batch_norm(y, None, None, t['bn_weight'], t['bn_bias'], training=True))
    return Given(regress)

def ab_multi(t, h):
    "The scales of the comparison tables' program: a third term counts half of the second to last, and so on; per item and thousand"
    pairs = list(zip(layers(t, 's'), layers(t, 't')))
    return sum(2**(i-len(pairs)+1)*3/(1000*len(s))*ActivationBoundaries(s, f, m=h['margin'], reduction='sum') for i,(s,f) in enumerate(pairs))

LOSSES = {
    'fitnet_1x1': adapted(FitNet, lambda t, h: Given(lambda s: F.conv2d(s, t['transform_weight']))),
    'regressor_mse': adapted(FitNet, lambda t, h: Given(lambda s: F.conv2d(s, t['weight'], t['bias'], padding=1))),
    'fitnet_convreg': adapted(FitNet, conv_regressor),
    'kd': logits(SoftTarget),
    'mutual': lambda t, h: Mutual(t['student'], t['teacher']),
    'logits_mse': logits(Logits),
    'kd_ce_mix': lambda t, h: (1-h['w'])*F.cross_entropy(t['student'], t['labels']) + h['w']*SoftTarget(t['student'], t['teacher'], T=h['T']),
    'dkd': labelled(DecoupledKD),
    'logit_std_kd': without('eps', logits(SoftTarget(standardize=True))),
    'logit_std_dkd': labelled(DecoupledKD(standardize=True)),
    'nkd': labelled(NormalizedKD),
    'wsld': labelled(WeightedSoftLabels),
    'ttm': logits(TransformedTeacher),
    'wttm': lambda t, h: TransformedTeacher(t['student'], t['teacher'], weighted=True, **h),
    'hard_distill': logits(HardLabels),
    'dist': without('eps', logits(DIST)),
    'mlkd_instance': logits(MultiTemperature),
    'mlkd_class': logits(ClassAlignment),
    'mlkd_batch': logits(BatchAlignment),
    'skd_instance': lambda t, h: SoftTarget(t['student'], t['teacher'], T=h['T'])/h['T']**2,
    'fitnet': features(FitNet),
    'at': features(Attention, 'p'),
    'sp': features(Similarity),
    'rkd_distance': logits(RelationalDistance),
    'rkd_angle': logits(RelationalAngle),
    'rkd': lambda t, h: h['w_d']*RelationalDistance(t['student'], t['teacher']) + h['w_a']*RelationalAngle(t['student'], t['teacher']),
    'dark_rank': lambda t, h: DarkRank(t['student'], t['teacher'], alpha=h['alpha'], beta=h['beta'], n=h['permute_len']),
    'pkt': logits(ProbabilisticTransfer),
    'itrd_correlation': lambda t, h: adapted(InformationCorrelation(**h), embedding)(t, h),
    'itrd_mutual': lambda t, h: (adapted(MutualInformation, embedding) if t['student'].shape!=t['teacher'].shape else logits(MutualInformation))(t, h),
    'cc_consecutive': logits(ConsecutiveCorrelation),
    'cckd_gaussian': lambda t, h: CorrelationCongruence(t['student'], t['teacher'], gamma=h['gamma'], order=h['max_p']),
    'cckd_bilinear': lambda t, h: CorrelationCongruence(t['student'], t['teacher'], gamma=None),
    'ab': lambda t, h: ActivationBoundaries(t['student'], t['teacher'], m=h['margin'], reduction='sum'),
    'nst': features(NeuronSelectivity),
    'fsp': features(FlowOfSolution),
    'ab_multi': ab_multi,
    'reviewkd_hcl': features(HierarchicalContext, 'levels'),
    'cwd': logits(ChannelWise),
    'cwd_spatial': lambda t, h: ChannelWise(t['student'], t['teacher'], over='channels', **h),
    'cat_kd': logits(ClassAttention),
    'ickd': logits(InterChannel),
    'pkd': logits(PearsonCorrelation),
    'ft_factor': logits(Factors),
    'kta': without('q', logits(Factors)),
    'srd': lambda t, h: 2*LogDistance(t['student_feat'], t['teacher_feat'], exponent=h['exponent']) + SoftTarget(t['student'], t['teacher'], T=h['T'])/h['T']**2,
    'cosine_hidden': adapted(Cosine, lambda t, h: 'pool'),
}

def load():
    "The reference cases of the methods above, and their arrays: all of them, or the extract kept here where the full set is not there"
    folder = full if full.is_dir() else here/'golden'
    arrays = np.load(folder/'data.npz')
    entries = json.loads((folder/'manifest.json').read_text())['entries']
    return [e for e in entries if e['method'] in LOSSES and e['role']=='reference' and e['check'] in ('loss', 'loss+grad')], arrays

def extract(largest=1000):
    "Write the extract: of each method the cases with small arrays"
    entries,arrays = load()
    def size(e): return max(arrays[v].size for v in {**e['inputs'], **e['params']}.values())
    small = [e for e in entries if size(e)<=largest]
    keys = {v for e in small for part in ('inputs', 'params', 'grads') for v in e[part].values()}
    (here/'golden').mkdir(exist_ok=True)
    np.savez_compressed(here/'golden'/'data.npz', **{k: arrays[k] for k in sorted(keys)})
    lines = ',\n'.join(json.dumps(e) for e in small)
    (here/'golden'/'manifest.json').write_text('{"entries": [\n'+lines+'\n]}\n')

if __name__=='__main__': extract()
