"Golden numbers: which public loss stands for which method, the cases, and where they are kept."
import json
from pathlib import Path

import numpy as np
import torch
from fasterkd.losses import *
from fasterkd.losses.learned import bn_margin, calibrated, partial_l2, prime_aware
from fasterkd.terms import Term
from torch import nn
from torch.func import functional_call
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

def learned(make, names, **more):
    "A learned loss with the weights that are given as data: `names` are ours, then that of each"
    def f(t, h):
        loss,(s,f) = make(t, h),(layers(t, 's') or t['student'], layers(t, 't') or t['teacher'])
        extra = {k: v(t) for k,v in more.items()}
        loss.make(s, f)
        return functional_call(loss, {ours: t[its].squeeze(0) if 'margin' in its else t[its] for ours,its in names(t)}, (s, f), extra)
    return f

def sequential(prefix, layers, its): return [(f'{prefix}{i}.{n}', f'{its}{j}_{n}') for i,j in layers for n in ('weight', 'bias')]
def factor_weights(t): return [p for side in ('translator', 'paraphraser') for p in sequential(f'parts.0.{side}.', ((0, 0), (2, 1), (4, 2)), f'{side}_conv')]
def connected(t, its): return [('parts.0.0.weight', f'{its}0_weight'), ('parts.0.1.weight', f'{its}1_weight'), ('parts.0.1.bias', f'{its}1_bias')]

def ofd_weights(t):
    ours = {'0.weight': 'conv', '1.weight': 'bn_w', '1.bias': 'bn_b', 'margin': 'margin'}
    return [(f'parts.{i}.{n}', f'{its}{i}') for i in range(len(layers(t, 's'))) for n,its in ours.items()]

def crd_weights(t):
    return [(f'parts.{ours}.{n}', its) for ours,v in (('s', 'v1'), ('t', 'v2'))
            for n,its in (('linear.weight', f'embed_{ours}_weight'), ('linear.bias', f'embed_{ours}_bias'), ('memory', f'memory_{v}'))]

def classifier(t):
    "The teacher's, with the weights that are given as data"
    fc = nn.Linear(*reversed(t['fc_weight'].shape))
    fc.weight,fc.bias = nn.Parameter(t['fc_weight'].detach()),nn.Parameter(t['fc_bias'].detach())
    return fc

def new_crd(t, h): return ContrastiveRepresentation(h['n_data'], h['feat_dim'], h['K'], h['T'], h['momentum'])

def table(t, side): return [[t[f'{side}{i}{j}'] for j in range(t['weight'].shape[2])] for i in range(t['weight'].shape[1])]
def views(t): return [t[f'{who}_{view}'] for who in ('student', 'teacher') for view in ('weak', 'strong')]

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
    'mft': labelled(CorrectedTeacher),
    'skd_direction': logits(SimilarityDirection),
    'mlkd_total': lambda t, h: MultiLevel(*views(t), T=h['T0'], weight=h['kd_weight']),
    'mlkd_logit_std_total': lambda t, h: MultiLevel(*views(t), T=h['T0'], weight=h['kd_weight'], standardize=True),
    'vid': learned(lambda t, h: VariationalInformation(h['init_pred_var'], h['eps']),
                   lambda t: [('parts.0.log_scale', 'log_scale'), *((f'parts.0.mean.{i}.weight', f'regressor_{i}_weight') for i in (0, 2, 4))]),
    'ft_modules': learned(lambda t, h: FactorTransfer(len(t['paraphraser_conv2_bias'])/t['teacher'].shape[1], h['p'], reconstruction=0), factor_weights),
    'ofd_partial_l2': lambda t, h: partial_l2(t['student'], t['teacher'], t['margin']),
    'ofd_full': learned(lambda t, h: FeatureOverhaul(reduction='sum'), ofd_weights),
    'crd': learned(new_crd, crd_weights, idxs=lambda t: t['idx'], drawn=lambda t: t['contrast_idx']),
    'srrl': learned(lambda t, h: SoftmaxRegression(h['weight']), lambda t: connected(t, 'Connectors_'), teacher_pred=lambda t: t['teacher_logits'], teacher=classifier),
    'srrl_pooled': learned(lambda t, h: SoftmaxRegression(), lambda t: connected(t, 'transfer_'), teacher_pred=lambda t: t['teacher_logits'], teacher=classifier),
    'simkd': learned(lambda t, h: ReusedClassifier(h['factor']), lambda t: [(f'parts.0.{k[9:].replace("_", ".")}', k) for k in t if k.startswith('transfer_')]),
    'semckd': lambda t, h: calibrated(table(t, 's'), table(t, 't'), t['weight']),
    'pad_l2': lambda t, h: prime_aware(t['student'], t['teacher'], t['logvar']),
    'srd_original': learned(lambda t, h: ProjectedDistance(h['exponent'], h['bn_eps']), lambda t: [('parts.0.project.weight', 'embed_weight'), ('parts.0.project.bias', 'embed_bias')]),
    'cosine_hidden': adapted(Cosine, lambda t, h: 'pool'),
}

def crd_after(t, h):
    "The memories, which a functional call changes in place, and the constants of the scores"
    loss = new_crd(t, h)
    loss.make(t['student'], t['teacher'])
    loss.load_state_dict({ours: t[its] for ours,its in crd_weights(t)}, strict=False)
    loss(t['student'], t['teacher'], t['idx'], t['contrast_idx'])
    its = loss.parts
    return dict(memory_v1_after=its['s'].memory, memory_v2_after=its['t'].memory, Z_v1=its['s'].Z, Z_v2=its['t'].Z)

def simkd_pred(t, h):
    loss = ReusedClassifier(h['factor'])
    loss.make(t['student'], t['teacher'])
    names = {k: f'1.{k[9:].replace("_", ".")}' for k in t if k.startswith('transfer_')}
    return dict(pred=functional_call(loss.head(classifier(t)).train(), {ours: t[its] for its,ours in names.items()}, (t['student'],)))

EXTRAS = {
    'ofd_margin': lambda t, h: dict(margin=bn_margin(t['gamma'], t['beta'])),
    'crd': crd_after,
    'simkd': simkd_pred,
}

def load():
    "The reference cases of the methods above, and their arrays: all of them, or the extract kept here where the full set is not there"
    folder = full if full.is_dir() else here/'golden'
    arrays = np.load(folder/'data.npz')
    entries = json.loads((folder/'manifest.json').read_text())['entries']
    return [e for e in entries if e['role']=='reference' and (e['method'] in LOSSES and e['check'] in ('loss', 'loss+grad') or e['method'] in EXTRAS)], arrays

def extract(largest=1000):
    "Write the extract: of each method the cases with small arrays"
    entries,arrays = load()
    def size(e): return max(arrays[v].size for v in {**e['inputs'], **e['params']}.values())
    small = [e for e in entries if size(e)<=largest]
    keys = {v for e in small for part in ('inputs', 'params', 'grads', 'expected_extra') for v in e.get(part, {}).values() if isinstance(v, str)}
    (here/'golden').mkdir(exist_ok=True)
    np.savez_compressed(here/'golden'/'data.npz', **{k: arrays[k] for k in sorted(keys)})
    lines = ',\n'.join(json.dumps(e) for e in small)
    (here/'golden'/'manifest.json').write_text('{"entries": [\n'+lines+'\n]}\n')

if __name__=='__main__': extract()
