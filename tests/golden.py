"Golden numbers: which public loss stands for which method, the cases, and where they are kept."
import json
from pathlib import Path

import numpy as np
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
        w,b = t['conv_weight'],t['conv_bias']
        side_s,side_t = t['student'].shape[2],t['teacher'].shape[2]
        if side_s==2*side_t: y = F.conv2d(s, w, b, 2, 1)
        elif 2*side_s==side_t: y = F.conv_transpose2d(s, w, b, 2, 1)
        else: y = F.conv2d(s, w, b)
        return F.relu(F.batch_norm(y, None, None, t['bn_weight'], t['bn_bias'], training=True))
    return Given(regress)

def ab_multi(t, h):
    "With the scales of the comparison tables' program: a layer counts half of the next; per item and thousand"
    pairs = list(zip(layers(t, 's'), layers(t, 't')))
    def scale(i, s): return 2**(i-len(pairs)+1)*3/(1000*len(s))
    def value(s, f): return ActivationBoundaries(s, f, m=h['margin'], reduction='sum')
    return sum(scale(i, s)*value(s, f) for i,(s,f) in enumerate(pairs))

def learned(make, names, **more):
    "A learned loss with the weights that are given as data: `names` are ours, then that of each"
    def f(t, h):
        loss = make(t, h)
        s = layers(t, 's') or t['student']
        f = layers(t, 't') or t['teacher']
        loss.make(s, f)
        weights = {ours: t[its].squeeze(0) if 'margin' in its else t[its] for ours,its in names(t)}
        return functional_call(loss, weights, (s, f), {k: v(t) for k,v in more.items()})
    return f

def vid_weights(t):
    return [('parts.0.log_scale', 'log_scale'),
            *((f'parts.0.mean.{i}.weight', f'regressor_{i}_weight') for i in (0, 2, 4))]

def factor_weights(t):
    return [(f'parts.0.{side}.{2*i}.{n}', f'{side}_conv{i}_{n}')
            for side in ('translator', 'paraphraser') for i in range(3) for n in ('weight', 'bias')]

def connector_weights(its):
    return [('parts.0.0.weight', f'{its}0_weight'), ('parts.0.1.weight', f'{its}1_weight'),
            ('parts.0.1.bias', f'{its}1_bias')]

def projector_weights(t, prefix='parts.0.'):
    return [(prefix+k.removeprefix('transfer_').replace('_', '.'), k) for k in t if k.startswith('transfer_')]

def embed_weights(t): return [(f'parts.0.project.{n}', f'embed_{n}') for n in ('weight', 'bias')]

def ofd_weights(t):
    ours = {'0.weight': 'conv', '1.weight': 'bn_w', '1.bias': 'bn_b', 'margin': 'margin'}
    return [(f'parts.{i}.{n}', f'{its}{i}') for i in range(len(layers(t, 's'))) for n,its in ours.items()]

def crd_weights(t):
    def of_side(ours, memory):
        its = {'linear.weight': f'embed_{ours}_weight', 'linear.bias': f'embed_{ours}_bias', 'memory': memory}
        return [(f'parts.{ours}.{n}', k) for n,k in its.items()]
    return of_side('s', 'memory_v1')+of_side('t', 'memory_v2')

def classifier(t):
    "The teacher's, with the weights that are given as data"
    fc = nn.Linear(*reversed(t['fc_weight'].shape))
    fc.weight = nn.Parameter(t['fc_weight'].detach())
    fc.bias = nn.Parameter(t['fc_bias'].detach())
    return fc

def new_crd(t, h): return ContrastiveRepresentation(h['n_data'], h['feat_dim'], h['K'], h['T'], h['momentum'])

def table(t, side):
    n,m = t['weight'].shape[1:]
    return [[t[f'{side}{i}{j}'] for j in range(m)] for i in range(n)]

def views(t): return [t[f'{who}_{view}'] for who in ('student', 'teacher') for view in ('weak', 'strong')]

# --- what is called with other settings, or as a sum

def kd_mixed(t, h):
    "Cross-entropy and soft targets, mixed"
    return (1-h['w'])*F.cross_entropy(t['student'], t['labels']) + h['w']*soft_target(t, h)

def soft_target(t, h): return SoftTarget(t['student'], t['teacher'], T=h['T'])

def soft_target_unscaled(t, h):
    "Without the factor T²"
    return soft_target(t, h)/h['T']**2

def weighted_ttm(t, h): return TransformedTeacher(t['student'], t['teacher'], weighted=True, **h)

def rkd(t, h):
    distance = RelationalDistance(t['student'], t['teacher'])
    return h['w_d']*distance + h['w_a']*RelationalAngle(t['student'], t['teacher'])

def dark_rank(t, h):
    return DarkRank(t['student'], t['teacher'], alpha=h['alpha'], beta=h['beta'], n=h['permute_len'])

def mutual_information(t, h):
    if t['student'].shape==t['teacher'].shape: return MutualInformation(t['student'], t['teacher'], **h)
    return adapted(MutualInformation, embedding)(t, h)

def congruence(t, h): return CorrelationCongruence(t['student'], t['teacher'], gamma=h['gamma'], order=h['max_p'])
def congruence_bilinear(t, h): return CorrelationCongruence(t['student'], t['teacher'], gamma=None)
def boundaries(t, h): return ActivationBoundaries(t['student'], t['teacher'], m=h['margin'], reduction='sum')

def srd(t, h):
    distance = LogDistance(t['student_feat'], t['teacher_feat'], exponent=h['exponent'])
    return 2*distance + soft_target_unscaled(t, h)

def multi_level(t, h): return MultiLevel(*views(t), T=h['T0'], weight=h['kd_weight'])
def multi_level_standardized(t, h): return MultiLevel(*views(t), T=h['T0'], weight=h['kd_weight'], standardize=True)

def new_factor_transfer(t, h):
    rate = len(t['paraphraser_conv2_bias'])/t['teacher'].shape[1]
    return FactorTransfer(rate, h['p'], reconstruction=0)

def srrl(make, prefix):
    "Softmax regression, whose connector is called `prefix`..."
    def weights(t): return connector_weights(prefix)
    return learned(make, weights, teacher_pred=lambda t: t['teacher_logits'], teacher=classifier)

LOSSES = {
    'fitnet_1x1': adapted(FitNet, lambda t, h: Given(lambda s: F.conv2d(s, t['transform_weight']))),
    'regressor_mse': adapted(FitNet, lambda t, h: Given(lambda s: F.conv2d(s, t['weight'], t['bias'], padding=1))),
    'fitnet_convreg': adapted(FitNet, conv_regressor),
    'kd': logits(SoftTarget),
    'mutual': lambda t, h: Mutual(t['student'], t['teacher']),
    'logits_mse': logits(Logits),
    'kd_ce_mix': kd_mixed,
    'dkd': labelled(DecoupledKD),
    'logit_std_kd': without('eps', logits(SoftTarget(standardize=True))),
    'logit_std_dkd': labelled(DecoupledKD(standardize=True)),
    'nkd': labelled(NormalizedKD),
    'wsld': labelled(WeightedSoftLabels),
    'ttm': logits(TransformedTeacher),
    'wttm': weighted_ttm,
    'hard_distill': logits(HardLabels),
    'dist': without('eps', logits(DIST)),
    'mlkd_instance': logits(MultiTemperature),
    'mlkd_class': logits(ClassAlignment),
    'mlkd_batch': logits(BatchAlignment),
    'skd_instance': soft_target_unscaled,
    'fitnet': features(FitNet),
    'at': features(Attention, 'p'),
    'sp': features(Similarity),
    'rkd_distance': logits(RelationalDistance),
    'rkd_angle': logits(RelationalAngle),
    'rkd': rkd,
    'dark_rank': dark_rank,
    'pkt': logits(ProbabilisticTransfer),
    'itrd_correlation': lambda t, h: adapted(InformationCorrelation(**h), embedding)(t, h),
    'itrd_mutual': mutual_information,
    'cc_consecutive': logits(ConsecutiveCorrelation),
    'cckd_gaussian': congruence,
    'cckd_bilinear': congruence_bilinear,
    'ab': boundaries,
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
    'srd': srd,
    'mft': labelled(CorrectedTeacher),
    'skd_direction': logits(SimilarityDirection),
    'mlkd_total': multi_level,
    'mlkd_logit_std_total': multi_level_standardized,
    'vid': learned(lambda t, h: VariationalInformation(h['init_pred_var'], h['eps']), vid_weights),
    'ft_modules': learned(new_factor_transfer, factor_weights),
    'ofd_partial_l2': lambda t, h: partial_l2(t['student'], t['teacher'], t['margin']),
    'ofd_full': learned(lambda t, h: FeatureOverhaul(reduction='sum'), ofd_weights),
    'crd': learned(new_crd, crd_weights, idxs=lambda t: t['idx'], drawn=lambda t: t['contrast_idx']),
    'srrl': srrl(lambda t, h: SoftmaxRegression(h['weight']), 'Connectors_'),
    'srrl_pooled': srrl(lambda t, h: SoftmaxRegression(), 'transfer_'),
    'simkd': learned(lambda t, h: ReusedClassifier(h['factor']), projector_weights),
    'semckd': lambda t, h: calibrated(table(t, 's'), table(t, 't'), t['weight']),
    'pad_l2': lambda t, h: prime_aware(t['student'], t['teacher'], t['logvar']),
    'srd_original': learned(lambda t, h: ProjectedDistance(h['exponent'], h['bn_eps']), embed_weights),
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
    weights = {ours: t[its] for ours,its in projector_weights(t, prefix='1.')}
    return dict(pred=functional_call(loss.head(classifier(t)).train(), weights, (t['student'],)))

EXTRAS = {
    'ofd_margin': lambda t, h: dict(margin=bn_margin(t['gamma'], t['beta'])),
    'crd': crd_after,
    'simkd': simkd_pred,
}

def load():
    "The reference cases of the methods above, and their arrays: the full set where it is there, else the extract"
    folder = full if full.is_dir() else here/'golden'
    arrays = np.load(folder/'data.npz')
    entries = json.loads((folder/'manifest.json').read_text())['entries']
    def wanted(e): return e['method'] in EXTRAS or e['method'] in LOSSES and e['check'] in ('loss', 'loss+grad')
    return [e for e in entries if e['role']=='reference' and wanted(e)],arrays

def extract(largest=1000):
    "Write the extract: of each method the cases with small arrays"
    entries,arrays = load()
    def size(e): return max(arrays[v].size for v in {**e['inputs'], **e['params']}.values())
    small = [e for e in entries if size(e)<=largest]
    parts = ('inputs', 'params', 'grads', 'expected_extra')
    keys = {v for e in small for part in parts for v in e.get(part, {}).values() if isinstance(v, str)}
    (here/'golden').mkdir(exist_ok=True)
    np.savez_compressed(here/'golden'/'data.npz', **{k: arrays[k] for k in sorted(keys)})
    lines = ',\n'.join(json.dumps(e) for e in small)
    (here/'golden'/'manifest.json').write_text('{"entries": [\n'+lines+'\n]}\n')

if __name__=='__main__': extract()
