"""The largest resident size of an epoch of LightNN learning from DeepNN, each side alone in a process, several
times in turn; the medians, in MB, whole and beyond what the process had before."""
import subprocess, sys, tempfile
from pathlib import Path
from statistics import median

from common import arguments, in_turn, random_images, resident, write_table
from step_time import by_hand, by_hand_three, by_learner, distilled, distilled_three, loaders, teacher
from fasterkd.all import CachedTeacher, Teacher

def cached(dls, deep):
    with tempfile.TemporaryDirectory() as d: distilled(dls, CachedTeacher(deep, d+'/answers'))

def student_alone(dls, deep): by_learner(dls, None)
def in_bf16(dls, deep): distilled(dls, Teacher(deep, precision='bf16'))
def in_chunks(dls, deep): distilled(dls, Teacher(deep, chunk=32))

sides = {'student alone': student_alone, 'by hand': by_hand, 'fasterkd': distilled,
         "fasterkd, precision='bf16'": in_bf16, 'fasterkd, chunk=32': in_chunks,
         'fasterkd, cached, first epoch': cached,
         'by hand, three features': by_hand_three, 'fasterkd, three features': distilled_three}
beside = {n: 'by hand, three features' if 'three' in n else 'by hand' for n in sides if n!='student alone'}

def alone(side, images):
    command = [sys.executable, '-W', 'ignore', __file__, '--alone', side, '--images', str(images)]
    r = subprocess.run(command, capture_output=True, text=True, check=True)
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
    rounds,names = (1, ['by hand', 'fasterkd']) if args.quick else (args.rounds, sides)
    mb = in_turn(rounds, {n: n for n in names}, lambda n: alone(n, args.images))
    def ratio(n, i): return median(a[i]/b[i] for a,b in zip(mb[n], mb[beside[n]])) if n in beside else None
    rows = [{'side': n, 'whole': median(w for w,_ in m), 'added': median(a for _,a in m), 'beside': beside.get(n, ''),
             'ratio, whole': ratio(n, 0), 'ratio, added': ratio(n, 1)} for n,m in mb.items()]
    write_table(rows, keep=not args.quick, images=args.images, rounds=args.rounds)

if __name__=='__main__': main()
