"Golden numbers: which public loss stands for which method, the cases, and where they are kept."
import json
from pathlib import Path

import numpy as np
import torch
from fasterkd.losses import *

here = Path(__file__).parent
full = here.parent.parent/'shared'/'golden'

def layers(t, side): return [t[n] for n in sorted(t) if n[0]==side and n[1:].isdigit()]
def logits(loss): return lambda t, h: loss(t['student'], t['teacher'], **h)
def labelled(loss): return lambda t, h: loss(t['student'], t['teacher'], t['labels'], **h)
def features(loss, *settings): return lambda t, h: loss(layers(t, 's'), layers(t, 't'), **{k: h[k] for k in settings})

LOSSES = {
    'kd': logits(SoftTarget),
    'mutual': lambda t, h: Mutual(t['student'], t['teacher']),
    'logits_mse': logits(Logits),
    'dkd': labelled(DecoupledKD),
    'fitnet': features(FitNet),
    'at': features(Attention, 'p'),
    'sp': features(Similarity),
    'ab': lambda t, h: ActivationBoundaries(t['student'], t['teacher'], m=h['margin'], reduction='sum'),
    'cosine_hidden': lambda t, h: Cosine(t['student'].flatten(1), torch.nn.functional.avg_pool1d(t['teacher'].flatten(1), h['pool_kernel'])),
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
