"Every notebook runs from top to bottom, in a process of its own with one thread; as many at once as there are cores."
import multiprocessing, os, sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from threading import Lock

import pytest
from conftest import notebooks, root

# Each in a process of its own, forked from one that has imported what nearly all of them need:
# to import it costs more than many notebooks.
processes = multiprocessing.get_context('forkserver')
one_at_a_time = Lock()      # to start one asks about all others, and an exit code can be read once
processes.set_forkserver_preload(['fastai.vision.all', 'fasterkd.all', 'nbdev.test'])

def run(path, printed):
    "Run a notebook; what it prints goes to a file"
    import torch
    from nbdev.config import get_config
    from nbdev.test import test_nb
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)      # processes of the notebook's own are made as anywhere
    os.chdir(root)
    with open(printed, 'w') as f:
        for out in (1, 2): os.dup2(f.fileno(), out)
    passed,_ = test_nb(path, skip_flags=get_config().tst_flags.split(), force_flags=os.environ.get('FLAGS', '').split())
    sys.exit(not passed)

def process(path, printed):
    "The exit code of a notebook's process"
    p = processes.Process(target=run, args=(path, printed))
    with one_at_a_time: p.start()
    wait([p.sentinel])
    with one_at_a_time: p.join()
    return p.exitcode

@pytest.fixture(scope='module')
def runs(request, tmp_path_factory):
    "The exit codes of those that are to be tested, the longest first, and the files of what they printed"
    chosen = [i.callspec.params['path'] for i in request.session.items if getattr(i, 'originalname', '')=='test_runs']
    chosen.sort(key=lambda p: (p.stem!='index', p.parent.name!='tutorials'))
    folder = tmp_path_factory.mktemp('printed')
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield {p: (pool.submit(process, p, folder/p.stem), folder/p.stem) for p in chosen}

def test_there_are_notebooks(): assert notebooks

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_runs(path, runs):
    code,printed = runs[path]
    assert code.result()==0, printed.read_text()[-6000:]
