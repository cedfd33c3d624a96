"""The largest resident size of an epoch of LightNN learning from DeepNN, each side alone in a process, several times in turn; the medians, in MB, whole and beyond what the process had before."""
import subprocess, sys, tempfile
from pathlib import Path
from statistics import median

import torch
from common import arguments, in_turn, random_images, resident, write_table
from step_time import by_hand, by_hand_three, by_learner, distilled, distilled_three, loaders, teacher
from fasterkd.all import CachedTeacher, Teacher

def cached(dls, deep):
    with tempfile.TemporaryDirectory() as d: distilled(dls, CachedTeacher(deep, d+'/answers'))

sides = {'student alone': lambda dls, t: by_learner(dls, None), 'by hand': by_hand, 'fasterkd': distilled, "fasterkd, precision='bf16'": lambda dls, t: distilled(dls, Teacher(t, precision='bf16')),
         'fasterkd, chunk=32': lambda dls, t: distilled(dls, Teacher(t, chunk=32)), 'fasterkd, cached, first epoch': cached,
         'by hand, three features': by_hand_three, 'fasterkd, three features': distilled_three}
beside = {n: 'by hand, three features' if 'three' in n else 'by hand' for n in sides if n!='student alone'}

def alone(side, images):
    r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--alone', side, '--images', str(images)], capture_output=True, text=True, check=True)
    return [float(v) for v in r.stdout.splitlines()[-1].split()]

def main():
    p = arguments(__doc__, images=2_000, rounds=5)
    p.add_argument('--alone', choices=list(sides), help='one epoch of one side')
    p.add_argument('--quick', action='store_true', help='two sides, once; writes nothing')
    args = p.parse_args()
    if args.alone:
        dls,deep = loaders(random_images(args.images)),teacher()
        Path('/proc/self/clear_refs').write_text('5')      # the peak so far is forgotten
        before = resident('VmRSS')
        sides[args.alone](dls, deep)
        return print(resident('VmHWM')/2**20, (resident('VmHWM')-before)/2**20)
    mb = in_turn(1 if args.quick else args.rounds, {n: n for n in (['by hand', 'fasterkd'] if args.quick else sides)}, lambda n: alone(n, args.images))
    rows = [{'side': n, 'whole': median(w for w,_ in m), 'added': median(a for _,a in m), 'beside': beside.get(n, ''),
             'ratio, whole': median(a[0]/b[0] for a,b in zip(m, mb[beside[n]])) if n in beside else None,
             'ratio, added': median(a[1]/b[1] for a,b in zip(m, mb[beside[n]])) if n in beside else None} for n,m in mb.items()]
    write_table(rows, keep=not args.quick, images=args.images, rounds=args.rounds)

if __name__=='__main__': main()
