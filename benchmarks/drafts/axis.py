"python axis.py SECTION[:cells]...: the setup, the teachers, then these sections of the page"
import sys,re,time,os
os.environ['MPLBACKEND']='agg'
text=open('/tmp/20_when_it_helps.py').read()
if os.environ.get('LITE'): text=text.replace("lite0,lite0_all = (asked(from_elsewhere, images, name, features=['_blocks.15']) for images,name in ((labelled, 'lite0_few'), (everything, 'lite0_all')))","lite0,lite0_all = asked(from_elsewhere, labelled, 'lite0', features=['_blocks.15']),None")
cells=re.split(r'^# %%',text,flags=re.M)[1:]
sections,name={},'setup'
for c in cells:
    if c.startswith(' [markdown]'):
        m=re.search(r'^# ## (.*)$',c,re.M)
        if m: name=m[1].strip()
    else: sections.setdefault(name,[]).append('\n'.join(l for l in c.split('\n')[1:] if not l.startswith('#|')))
from fasterkd.display import without_bars
without_bars()
def go(code,what):
    t=time.perf_counter(); lines=code.strip().split('\n'); last=lines[-1]
    exec(compile(code,'page','exec'),globals())
    print(f'{time.strftime("%H:%M:%S")} {what}: {time.perf_counter()-t:.0f} s',flush=True)
    if re.fullmatch(r'\w+',last.strip()) and last.strip()!='page': print(eval(last.strip()),flush=True)
for n in ['setup','How it is measured','The teachers']:
    for i,c in enumerate(sections[n]): go(c,f'{n} {i}')
for a in sys.argv[1:]:
    n,_,k=a.partition(':')
    for i,c in enumerate(sections[n]):
        if not k or i in map(int,k.split(',')): go(c,f'{n} {i}')
