"Every notebook runs from top to bottom, each in a process of its own with one thread; as many at once as there are cores."
import multiprocessing, os, sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from threading import Lock

import pytest
from conftest import notebooks, root

# Each in a process of its own, forked from one that has imported what nearly all of them need: to import it costs more than many notebooks.
processes,one_at_a_time = multiprocessing.get_context('forkserver'),Lock()     # to start one asks about all others, and an exit code can be read once
processes.set_forkserver_preload(['fastai.vision.all', 'fasterkd.all', 'nbdev.test'])

def run(path, said):
    "Run a notebook; what it prints goes to a file"
    import torch
    from nbdev.config import get_config
    from nbdev.test import test_nb
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)      # processes of the notebook's own are made as anywhere
    os.chdir(root)
    with open(said, 'w') as f:
        for out in (1, 2): os.dup2(f.fileno(), out)
    passed,_ = test_nb(path, skip_flags=get_config().tst_flags.split(), force_flags=os.environ.get('FLAGS', '').split())
    sys.exit(not passed)

def process(path, said):
    p = processes.Process(target=run, args=(path, said))
    with one_at_a_time: p.start()
    wait([p.sentinel])
    with one_at_a_time: p.join()
    return p.exitcode

@pytest.fixture(scope='module')
def runs(request, tmp_path_factory):
    "The exit codes of those that are to be tested, the longest first, and the files of what they said"
    chosen = [i.callspec.params['path'] for i in request.session.items if getattr(i, 'originalname', '')=='test_runs']
    folder = tmp_path_factory.mktemp('said')
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield {p: (pool.submit(process, p, folder/p.stem), folder/p.stem) for p in sorted(chosen, key=lambda p: (p.stem!='index', p.parent.name!='tutorials'))}

def test_there_are_notebooks(): assert notebooks

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_runs(path, runs):
    code,said = runs[path]
    assert code.result()==0, said.read_text()[-6000:]
