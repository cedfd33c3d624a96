"The page with the sections that are measured: python interim.py OUT HEADING..."
import re,sys
text=open('/tmp/20_when_it_helps.py').read()
head,*rest=re.split(r'(?=^# %% \[markdown\]\n# ## )',text,flags=re.M)
keep=['How it is measured','The teachers',*sys.argv[2:]]
by={re.search(r'^# ## (.*)$',s,re.M)[1]:s for s in rest}
last='\n# %%\npage\n'
body=''.join(by[k].replace('\n# %%\npage\n','\n') for k in keep)
open(sys.argv[1],'w').write(head+body+last)
