"""The training of the page "When distillation helps", by sections, so that several processes can share hours of it. A run that is kept is not run again, and the page shows what is kept.

    python benchmarks/when_it_helps.py 'The loss'          # and, in another process,
    python benchmarks/when_it_helps.py 'The number of labels'

Run what the page needs of earlier sections by naming them too; `:0` takes a section's first code cell alone. Each comparison, finished or not, is copied to `results/when_it_helps/`.
"""
import os, re, shutil, sys
from pathlib import Path

from fastcore.nbio import read_nb
from fasterkd.display import without_bars

root = Path(__file__).resolve().parent.parent
always = 'start', 'How it is measured', 'The teachers'

def sections():
    "The page's code by heading"
    res,name = {},'start'
    for cell in read_nb(root/'nbs'/'tutorials'/'20_when_it_helps.ipynb').cells:
        heading = cell.cell_type=='markdown' and re.search('^## (.*)$', cell.source, re.M)
        if heading: name = heading[1]
        if cell.cell_type=='code': res.setdefault(name, []).append(cell.source)
    return res

def main(*names):
    os.environ.setdefault('MPLBACKEND', 'agg')
    without_bars()
    code,found,at = sections(),{},root/'benchmarks'/'results'/'when_it_helps'
    for name,_,which in (o.partition(':') for o in (*always, *names)):
        for i,cell in enumerate(code[name]):
            if not which or str(i) in which.split(','): exec(compile(cell, f'{name} {i}', 'exec'), found)
    at.mkdir(parents=True, exist_ok=True)
    for file in found['folder'].glob('*.json'): shutil.copy(file, at)

if __name__=='__main__': main(*sys.argv[1:])
