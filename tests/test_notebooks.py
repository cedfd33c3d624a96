"Every notebook runs from top to bottom, each in a process of its own with one thread; as many at once as there are cores."
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import notebooks, root

run = '''
import sys
from nbdev.config import get_config
from nbdev.test import test_nb
passed,_ = test_nb(sys.argv[1], skip_flags=get_config().tst_flags.split(), force_flags=sys.argv[2].split())
sys.exit(not passed)
'''

def process(path):
    return subprocess.run([sys.executable, '-c', run, str(path), os.environ.get('FLAGS', '')], cwd=root, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})

@pytest.fixture(scope='module')
def runs(request):
    "The processes of those that are to be tested, the longest first"
    chosen = [i.callspec.params['path'] for i in request.session.items if getattr(i, 'originalname', '')=='test_runs']
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield {p: pool.submit(process, p) for p in sorted(chosen, key=lambda p: (p.stem!='index', p.parent.name!='tutorials'))}

def test_there_are_notebooks(): assert notebooks

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_runs(path, runs):
    r = runs[path].result()
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-4000:]
