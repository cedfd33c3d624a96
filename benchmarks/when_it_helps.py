"""The training of the page "When distillation helps", by sections, so that several processes can share hours of it.
A run that is stored is not run again, and the page shows what is stored.

    python benchmarks/when_it_helps.py 'The loss'          # and, in another process,
    python benchmarks/when_it_helps.py 'The number of labels'

Run what the page needs of earlier sections by naming them too; `:0` takes a section's first code cell alone.
Each comparison, finished or not, is copied to `results/when_it_helps/`.
"""
import linecache, os, re, shutil, sys
from pathlib import Path

from fastcore.nbio import read_nb
from fasterkd.display import without_bars

root = Path(__file__).resolve().parent.parent
results = root/'benchmarks'/'results'/'when_it_helps'
always = 'start', 'How it is measured', 'The teachers'

def sections():
    "The page's code cells by heading"
    found = {}
    name = 'start'
    for cell in read_nb(root/'nbs'/'tutorials'/'20_when_it_helps.ipynb').cells:
        heading = cell.cell_type=='markdown' and re.search('^## (.*)$', cell.source, re.M)
        if heading: name = heading[1]
        if cell.cell_type=='code': found.setdefault(name, []).append(cell.source)
    return found

def run_cell(source, name, names):
    "As a notebook does: functions have a source, by which `compare` knows them, and are in `__main__`"
    linecache.cache[name] = len(source),None,source.splitlines(True),name
    exec(compile(source, name, 'exec'), names)

def main(*asked):
    "Run the sections that are asked for, and those that all need"
    os.environ.setdefault('MPLBACKEND', 'agg')
    without_bars()
    code = sections()
    names = {'__name__': '__main__'}
    for name,_,which in (o.partition(':') for o in (*always, *asked)):
        for i,cell in enumerate(code[name]):
            if not which or str(i) in which.split(','): run_cell(cell, f'{name} {i}', names)
    results.mkdir(parents=True, exist_ok=True)
    for file in names['folder'].glob('*.json'): shutil.copy(file, results)

if __name__=='__main__': main(*sys.argv[1:])
