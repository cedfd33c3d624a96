"""What every loss costs a training step, and in how many golden cases it has the authors' value.

A step is the student's and the teacher's forward pass, cross-entropy and the term's loss, and the backward pass, on
batches of 64 images of 3x32x32: two small convolutional nets, or two small transformers. Each loss takes turns with
`SoftTarget` on the same pair, and the ratio of neighbours is taken, its median reported, in seconds of processor time
(one thread).
"""
import os, sys, time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import arguments, write
from fasterkd.layers import Taps
from fasterkd.losses import every

sys.path.insert(0, str(Path(__file__).parent.parent/'tests'))
import every as suited, golden

n_items = 256
helpers = dict(calibrated='SemanticCalibration', prime_aware='PrimeAware', partial_l2='FeatureOverhaul')

class Pair:
    "A student and a teacher, and one training step with a term"
    def __init__(self, name):
        torch.manual_seed(0)
        side = dict(ni=3, side=32, patch=4) if name in suited.attentive else dict(ni=3)
        self.student,self.teacher = suited.models(name, **side)
        self.teacher.eval().requires_grad_(False)
        self.x = torch.randn(64, 3, 32, 32)
        self.y = torch.arange(64)%10
        self.idxs = torch.arange(64)

    def step(self, term):
        "Seconds of the step"
        with Taps(self.student, term.student) as student_taps, Taps(self.teacher, term.teacher) as teacher_taps:
            start = time.process_time()
            pred = self.student(self.x)
            with torch.no_grad(): teacher_pred = self.teacher(self.x)
            inputs = dict(pred=pred, teacher_pred=teacher_pred, target=self.y, idxs=self.idxs, xb=(self.x,),
                          student=self.student, teacher=self.teacher, axis=1, pct_train=0.)
            features = student_taps.read(),teacher_taps.read()
            if not term.adapters: term.adapters = term.make_adapters(*features)
            term.make_loss(inputs, *features)
            (F.cross_entropy(pred, self.y)+term(inputs, *features)).backward()
            took = time.process_time()-start
        self.student.zero_grad()
        return took

def cost(name, rounds):
    "Times the step with `SoftTarget`, and how many parameters the term has"
    pair,term,soft = Pair(name),suited.term(name, n_items),suited.term('SoftTarget', n_items)
    for t in (term, soft): pair.step(t)     # which makes their adapters and parts
    learned = sum(p.numel() for m in (*term.adapters, *term.losses) for p in m.parameters())
    return median(pair.step(term)/pair.step(soft) for _ in range(rounds)),learned

def equals_golden(e, arrays):
    "Has the loss of the case `e` the authors' value and gradients?"
    tensors = {k: torch.tensor(arrays[v]) for k,v in {**e['inputs'], **e['params']}.items()}
    tensors = {k: t.double() if t.is_floating_point() else t for k,t in tensors.items()}
    for g in e['grads']: tensors[g].requires_grad_()
    loss = golden.LOSSES[e['method']](tensors, e['hyperparameters'])
    loss.backward()
    def near(x, y, rel): return abs(x-y).max()<=rel*abs(y).max()+1e-10
    if not near(loss.detach(), torch.tensor(e['expected_loss']), 1e-6): return False
    if e['check']!='loss+grad': return True
    return all(near(tensors[g].grad, torch.tensor(arrays[k]).double(), 1e-5) for g,k in e['grads'].items())

def cases():
    "The golden cases in which each loss has the authors' value and gradients, in float64"
    entries,arrays = golden.load()
    found = {n: dict(cases=0, methods=set()) for n in every()}
    for e in entries:
        if e['method'] not in golden.LOSSES: continue
        called = set()
        def watch(frame, event, arg):
            if event!='call': return
            n,me = frame.f_code.co_name,frame.f_locals.get('self')
            called.update({n, helpers.get(n), type(me).__name__ if n=='forward' else None} & found.keys())
        sys.setprofile(watch)
        try: equal = equals_golden(e, arrays)
        finally: sys.setprofile(None)
        for n in called:
            found[n]['cases'] += bool(equal)
            found[n]['methods'].add(e['method'])
    return {n: dict(cases=o['cases'], methods=sorted(o['methods'])) for n,o in found.items()}

if __name__=='__main__':
    args = arguments(__doc__, rounds=21).parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name,known in cases().items():
        ratio,learned = (None,0) if name in suited.of_other_data else cost(name, args.rounds)
        rows[name] = dict(ratio=ratio and round(ratio, 2), parameters=learned, **known)
        print(f'{name:26} {rows[name]}', flush=True)
    sys.stdout = open(os.devnull, 'w')      # the rows are printed already
    write(rows)
