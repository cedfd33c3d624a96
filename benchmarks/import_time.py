"What the first `import fasterkd.all` adds to `from fastai.vision.all import *`, each time in a fresh process."
import subprocess, sys
from statistics import median

from common import write

code = '''
import time
start = time.perf_counter()
from fastai.vision.all import *
fastai = time.perf_counter()
import fasterkd.all
print(fastai-start, time.perf_counter()-fastai)
'''
def run():
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    return [float(t) for t in r.stdout.split()]

runs = [run() for _ in range(7)]
write({'seconds, fastai.vision.all (median of 7)': median(a for a,_ in runs),
       'seconds, fasterkd.all after it (median of 7)': median(b for _,b in runs)})
