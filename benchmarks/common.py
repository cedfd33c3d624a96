"""What the benchmarks share: their arguments, the order in which sides take turns, where results go, and what they
ran on."""
import argparse, json, os, platform, re, sys
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
    "The machine, and the versions"
    import torch
    gpu = {'gpu': torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    versions = {p: version(p) for p in ('torch', 'fastai', 'fasterkd')}
    return dict(python=platform.python_version(), threads=torch.get_num_threads(), cores=os.cpu_count(),
                machine=platform.machine(), processor=_processor(), **gpu, **versions)

def _processor():
    "Its name, and whether it computes in bfloat16"
    try: info = Path('/proc/cpuinfo').read_text()
    except OSError: return platform.processor()
    names = [line.split(':')[1].strip() for line in info.splitlines() if line.startswith('model name')]
    name = names[0] if names else platform.processor()
    return ' '.join([name, *(flag for flag in ('avx512_bf16', 'amx_bf16') if flag in info)])

def write(rows, keep=True):
    "Print `rows`, and keep them under the name of the script"
    if keep: _keep(rows)
    for k,v in rows.items(): print(f'{k:55} {v}')

def write_table(rows, keep=True, **more):
    "Print `rows`, dicts of the same keys, as a table, and keep them with `more`"
    from fasterkd.display import Table
    print(Table(rows))
    for k,v in more.items(): print(f'{k}: {v}')
    if keep: _keep(dict(more, rows=rows))

def _keep(measured):
    results.mkdir(exist_ok=True)
    (results/f'{Path(sys.argv[0]).stem}.json').write_text(json.dumps(dict(ran_on=ran_on(), **measured), indent=1)+'\n')

def resident(field):
    "What this process holds in memory, in bytes, by a field of its status: 'VmRSS', 'VmHWM', 'RssAnon'"
    return 1024*int(re.search(rf'{field}:\s+(\d+)', Path('/proc/self/status').read_text())[1])

def random_images(n, seed=0):
    "`n` images of 3×32×32 random bytes in 10 classes: for timing, as good as others"
    import torch
    from fasterkd.cifar import Images
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
    y = torch.randint(0, 10, (n,), generator=g)
    return Images(x, y, [*'abcdefghij'])

def learner(dls, model, **kwargs):
    "A Learner that prints nothing"
    from fastai.learner import CastToTensor, Learner, Recorder, TrainEvalCallback
    learn = Learner(dls, model, cbs=[TrainEvalCallback, Recorder, CastToTensor], default_cbs=False, **kwargs)
    learn.logger = lambda *_: None
    return learn
