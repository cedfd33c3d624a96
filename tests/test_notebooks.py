"Every notebook runs from top to bottom, each in a process of its own."
import os, subprocess, sys

import pytest
from conftest import notebooks, root

run = '''
import sys
from nbdev.config import get_config
from nbdev.test import test_nb
passed,_ = test_nb(sys.argv[1], skip_flags=get_config().tst_flags.split(), force_flags=sys.argv[2].split())
sys.exit(not passed)
'''

def test_there_are_notebooks(): assert notebooks

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_runs(path):
    r = subprocess.run([sys.executable, '-c', run, str(path), os.environ.get('FLAGS', '')], cwd=root, capture_output=True, text=True)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-4000:]
