"The page with the sections that are measured"
import re,sys
text=open('/tmp/20_when_it_helps.py').read()
def sub(o,n):
    global text
    assert text.count(o)==1,(text.count(o),o); text=text.replace(o,n)
sub("The test images are seen once, [in the end](#in-the-end), with seeds that no choice has seen.","The test images of CIFAR-10 are not used here, and those of CIFAR-100 [judge](#a-hundred-classes) what was chosen on CIFAR-10.")
sub("What is judged in the end is chosen here, with one seed","With one seed")
sub("page((.25, .5, 1, 2, 4), (.5,))","page((.25, .5, 1), (.5,))")
head,*rest=re.split(r'(?=^# %% \[markdown\]\n# ## )',text,flags=re.M)
by={re.search(r'^# ## (.*)$',s,re.M)[1]:s for s in rest}
keep=['How it is measured','The teachers',*sys.argv[2:]]
body=''.join(by[k].replace('\n# %%\npage\n','\n') for k in keep)
open(sys.argv[1],'w').write(head+body+'\n# %%\npage\n')
