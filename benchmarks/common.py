"What the benchmarks share: their arguments, the order in which sides take turns, where results go, and what they ran on."
import argparse, json, os, platform, sys
from importlib.metadata import version
from pathlib import Path

results = Path(__file__).parent/'results'

def arguments(doc, **counts):
    "A parser with a whole number for each of `counts`"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for n,default in counts.items(): p.add_argument(f'--{n}', type=int, default=default)
    return p

def in_turn(rounds, sides, measure):
    "`measure(side)` of all `sides`, forth and back in turn, as often as `rounds` says: {name: list}"
    res = {n: [] for n in sides}
    for i in range(rounds):
        for n in list(sides)[::1 if i%2==0 else -1]: res[n].append(measure(sides[n]))
    return res

def ran_on():
    import torch
    return dict(python=platform.python_version(), threads=torch.get_num_threads(), cores=os.cpu_count(), machine=platform.machine(),
                **{p: version(p) for p in ('torch', 'fastai', 'fasterkd')})

def write(rows):
    "Print `rows`, and keep them under the name of the script"
    name = Path(sys.argv[0]).stem
    results.mkdir(exist_ok=True)
    (results/f'{name}.json').write_text(json.dumps(dict(ran_on=ran_on(), **rows), indent=1)+'\n')
    for k,v in rows.items(): print(f'{k:55} {v}')

def learner(dls, model, **kwargs):
    "A Learner that prints nothing"
    from fastai.learner import Learner, Recorder, TrainEvalCallback
    learn = Learner(dls, model, cbs=[TrainEvalCallback, Recorder], default_cbs=False, **kwargs)
    learn.logger = lambda *_: None
    return learn
