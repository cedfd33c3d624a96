# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     split_at_heading: false
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # When distillation helps
#
# > One small student on CIFAR-10, alone and distilled, the student alone as well treated: how many labels, which images, which loss.
#
# Needs the extra `pretrained`: `pip install 'fasterkd[pretrained]'`.

# %% [markdown]
# What it came to:
#
# - **With images that have no labels it helps most**: with 500 labels, and a teacher's answers about all 45,000 images, the student is as good as it is alone with 45,000 labels, in as many epochs.
# - **On the images that have labels it adds one to three points**, and at ten epochs of 20,000 of them hardly more than chance does.
# - **Which loss** then matters less than how much it counts: no loss is better than soft targets, and a hint or decoupled distillation that counts too much costs more than anything gains.

# %%
#| hide
import warnings
from matplotlib import pyplot as plt
from torch.nn import functional as F
from fastai.vision.all import *
from fasterkd.all import *
from fasterkd.cifar import *
from fasterkd.losses import *
from fasterkd.teachers import as_teacher
from fasterkd.comparison import judged
from fastcore.test import *

warnings.simplefilter('ignore')

# %%
#| echo: false
from fasterkd.display import Page, Table

page = Page()       # read page(10, 1) as 10: the second number is for tests of this page, which take digits for CIFAR-10

# %% [markdown]
# ## How it is measured
#
# - **Nothing is chosen on the test images.** 5,000 training images are held out, and all settings are chosen on them. The test images are seen once, in the last section, with seeds that no choice has seen.
# - **The student alone is treated as well as the distilled one**: the same weights to begin with, the same batches for each seed, as many tries with learning rate, length, label smoothing, weight decay and the best epoch kept.
# - **Three seeds**, and the 95 % interval of the paired difference. Where it holds 0, the gain may be noise.
#
# The student is LightNN of [PyTorch's own tutorial](02_cifar10.ipynb), with 267,738 parameters, in batches of 128, by Adam under one-cycle with a learning rate of 5e-3. The standard, from which each section changes one thing: 20,000 labelled images, 10 epochs, soft targets with `T=4` and a weight of 0.9.

# %%
if page.full: path,(train,test) = untar_data(URLs.CIFAR),cifar10()
else: path,(train,test) = None,[o.subset(slice(0, 96)) for o in digits32()]
rest,held = apart(train, page(5000, 32))
few = apart(rest, page(20000, 48))[1]
glance = apart(held, page(500, 16))[1]
len(rest), len(few), len(held), len(test)

# %% [markdown]
# Images are mirrored beforehand, not by chance in each batch: so every view has its place, and the teacher is asked about it once. An epoch is as many images as there are, so half a pass through both.

# %%
def mirrored(images): return Images(torch.cat([images.x, images.x.flip(3)]), images.y.repeat(2), images.vocab)
labelled = mirrored(few)

# %% [markdown]
# `make` gives what all runs share, `fit` what they do: it trains on images of its own, and looks at 500 of those held out after each pass, while `compare` judges on all that `make` has given.

# %%
def make(valid=held, net=LightNN): return Learner(images_dls(glance, valid), net().to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def fit(epochs, images=labelled, lr=5e-3, wd=.01, smooth=0., best=False, each=2, tfms=()):
    def train(learn, cbs):
        learn.dls = images_dls(images, held if best else glance, batch_tfms=tfms)
        if smooth: learn.loss_func = LabelSmoothingCrossEntropyFlat(smooth)
        keep = [SaveModelCallback(monitor='accuracy')] if best else []
        learn.fit_one_cycle(max(1, epochs//each), lr, wd=wd, cbs=[*cbs, *keep])
    return train

# %% [markdown]
# Each comparison is kept in a file, so that a run that was stopped goes on where it was.

# %%
folder = page.full and path/'models'/'when_it_helps'

def measured(name, tries, make=make, seeds=page((10, 11, 12), (10,))):
    res = compare(make, tries, seeds=seeds, path=page.full and folder/f'{name}.json' or None)
    page.trained += sum(r.seconds or 0 for r in res.runs)
    return res

def asked(teacher, images, name, **kwargs):
    "The teacher's answers to `images`"
    return CachedTeacher(teacher, path=page.full and folder/f'{name}.answers' or None, **kwargs).fill(Learner(images_dls(images, glance), LightNN(), loss_func=CrossEntropyLossFlat()))

# %% [markdown]
# And these draw gains with their intervals, in points.

# %%
def in_points(gains):
    mean,low,high = (np.array([100*getattr(g, n) for g in gains]) for n in ('mean', 'low', 'high'))
    return mean,np.nan_to_num([mean-low, high-mean])

def draw(ax, x, gains, label=None, color=None):
    "By number"
    mean,around = in_points(gains)
    ax.errorbar(x, mean, yerr=around, label=label, color=color, marker='o', capsize=3)
    ax.axhline(0, color='0.6', lw=1); ax.set_ylabel('gain, points'); ax.spines[['top', 'right']].set_visible(False)

def draw_names(comparison):
    "By name"
    names = [n for n in comparison.names if n not in ('teacher', comparison.plain)][::-1]
    mean,around = in_points([comparison.gain(n) for n in names])
    _,ax = plt.subplots(figsize=(6, .6+.3*len(names)), layout='constrained')
    ax.errorbar(mean, names, xerr=around, fmt='o', capsize=3)
    ax.axvline(0, color='0.6', lw=1); ax.set_xlabel('gain, points'); ax.spines[['top', 'right']].set_visible(False)

# %% [markdown]
# ## The teachers
#
# EfficientNet-Lite0 with the weights of ImageNet, fine-tuned for three epochs at 96 pixels on the 45,000 images. It has seen labels that some of its students will not have: there it stands for a teacher that comes from elsewhere.

# %%
def standing(learn):
    "A model at 96 pixels, for batches of 32"
    return Teacher(learn, tfm=partial(F.interpolate, size=page(96, 32), mode='bilinear'))

set_seed(0)
learn = lite0_learner(*page((rest, held), (few, few)), size=page(96, 32), pretrained=page(True, False))
if page.full: learn.path = path
page.once(learn, 'efficientnet_lite0', lambda learn: learn.fit_one_cycle(page(3, 1), slice(1e-3, 5e-3)))
from_elsewhere = standing(learn)


# %%
everything = mirrored(rest)
lite0,lite0_all = (asked(from_elsewhere, images, name, features=['_blocks.15']) for images,name in ((labelled, 'lite0'), (everything, 'lite0_all')))

# %%
def soft(teacher=lite0, T=4, weight=.9): return partial(KnowledgeDistillationCallback, teacher, loss=SoftTarget(T=T), weight=weight)

# %% [markdown]
# ## Temperature and weight

# %%
softness = {(T, w): f'T={T}, weight {w:g}' for T in page((1, 2, 4, 5, 8), (4,)) for w in page((.5, .9, 1.), (.9,)) if T!=5 or w==.5}       # T=5, weight 0.5: what the callback takes if nothing is said
soft_or_not = measured('softness', {'alone': (None, fit(10)), **{n: (soft(T=T, weight=w), fit(10)) for (T,w),n in softness.items()}})

# %%
#| echo: false
_,ax = plt.subplots(figsize=(5, 3), layout='constrained')
for w in dict.fromkeys(w for _,w in softness):
    mine = {T: n for (T,v),n in softness.items() if v==w}
    draw(ax, [str(T) for T in mine], [soft_or_not.gain(n) for n in mine.values()], f'weight {w:g}')
ax.set_xlabel('T'); ax.legend();

# %%
soft_or_not

# %% [markdown]
# ## The length of training

# %%
epochs = page((4, 10, 20, 40, 100), (2,))
lengths = measured('lengths', {f'{e} epochs: {n}': (kd, fit(e)) for e in epochs for n,kd in {'alone': None, 'distilled': soft()}.items()})

# %%
#| echo: false
_,(left,right) = plt.subplots(1, 2, figsize=(8, 3), layout='constrained')
for n in ('alone', 'distilled'): left.plot(epochs, [100*np.mean(lengths.values(f'{e} epochs: {n}')) for e in epochs], marker='o', label=n)
left.set(xscale='log', xlabel='epochs', ylabel='accuracy, %'); left.legend(); left.spines[['top', 'right']].set_visible(False)
draw(right, epochs, [lengths.against(f'{e} epochs: alone').gain(f'{e} epochs: distilled') for e in epochs])
right.set(xscale='log', xlabel='epochs');

# %%
lengths

# %% [markdown]
# ## The number of labels
#
# The student has the labels of some images, and the teacher's answers about the same images, or about all 45,000: minus 100 is a label that the task loss leaves out. The student alone and the one distilled on the same images each have two lengths, and the better one counts.

# %%
def labels_of(n): return apart(rest, n)[1]
def hidden(n):
    "All images, and the labels of those `n` alone"
    known = apart(Images(torch.arange(len(rest)), rest.y, rest.vocab), n)[1].x
    y = torch.full_like(rest.y, -100)
    y[known] = rest.y[known]
    return mirrored(Images(rest.x, y, rest.vocab))

# %%
amounts = page({500: (20, 80), 1000: (20, 80), 5000: (10, 40), 20000: (10,), 45000: (10,)}, {32: (2,)})

def by_labels(n):
    images = mirrored(labels_of(n)) if n<len(rest) else everything
    same = lite0_all if images is everything else lite0 if n==len(few) else asked(from_elsewhere, images, f'lite0_{n}')
    tries = {f'{e} epochs: {name}': (kd, fit(e, images)) for name,kd in {'alone': None, 'same images': soft(same)}.items() for e in amounts[n]}
    return measured(f'labels-{n}', {**tries, **({'and the rest': (soft(lite0_all), fit(10, hidden(n)))} if n<len(rest) else {})})

def better(comparison, name):
    "The name of the length that did best"
    return comparison.best([n for n in comparison.names if n.endswith(name)])

labels = {n: by_labels(n) for n in amounts}

# %%
#| echo: false
_,(left,right) = plt.subplots(1, 2, figsize=(9, 3), layout='constrained')
for name,label,color in (('alone', 'alone', 'tab:orange'), ('same images', 'distilled, on the same images', 'tab:blue'), ('and the rest', 'distilled, on all images', 'tab:green')):
    mine = {n: c for n,c in labels.items() if any(o.endswith(name) for o in c.names)}
    left.plot([*mine], [100*np.mean(c.values(better(c, name))) for c in mine.values()], marker='o', label=label, color=color)
    if name!='alone': draw(right, [*mine], [c.against(better(c, 'alone')).gain(better(c, name)) for c in mine.values()], color=color)
left.set_ylabel('accuracy, %'); left.legend(); left.spines[['top', 'right']].set_visible(False)
for ax in (left, right): ax.set(xscale='log', xlabel='labels', xticks=[*labels], xticklabels=[f'{n:,}' for n in labels]); ax.minorticks_off()

# %%
#| echo: false
def spread(c, name): return f'{100*np.mean(c.values(name)):.2f} ± {100*np.std(c.values(name), ddof=1) if len(c.seeds)>1 else 0:.2f}'
def line(n, c):
    a,(same,rest_too) = better(c, 'alone'),[[o for o in c.names if o.endswith(e)] for e in ('same images', 'and the rest')]
    return {'labels': n, 'alone, %': spread(c, a), 'same images': spread(c, better(c, 'same images')), 'gain': f"{100*c.against(a).gain(better(c, 'same images')):.2f}",
            'and the rest': spread(c, rest_too[0]) if rest_too else '', 'gain ': f'{100*c.against(a).gain(rest_too[0]):.2f}' if rest_too else ''}
Table([line(n, c) for n,c in labels.items()])

# %% [markdown]
# On all images the number of labels hardly matters: what the student learns is in the teacher's answers, and these are worth as much as all labels. On the same images the teacher adds little. It is right about nearly all of them, as the labels are; what its doubts add
# shows where the student sees its images often.

# %% [markdown]
# ## What the teacher sees
#
# The standard's teacher sees what the student sees. Here also: images as they are, none mirrored; images mirrored and shifted by chance, of which the teacher answers two views that all epochs replay (`views=2`); and a teacher that sees another view, mirrored and shifted by 4 pixels against the student's.

# %%
shifted = [*aug_transforms(size=32, max_rotate=0, max_zoom=1.1, max_lighting=0, max_warp=0, p_affine=1.)]
plain = asked(from_elsewhere, few, 'lite0_plain')
views = CachedTeacher(from_elsewhere, path=page.full and folder/'lite0_views.answers' or None, views=2).fill(images_dls(few, glance, batch_tfms=shifted))
def elsewhere(x): return F.interpolate(F.pad(x, (4, 4, 4, 4), mode='reflect')[..., :32, :32].flip(-1), size=page(96, 32), mode='bilinear')
apart_view = asked(Teacher(learn, tfm=elsewhere), labelled, 'lite0_apart')

seen = {'as they are': (soft(plain), fit(10, few, each=1)), 'shifted and mirrored': (soft(views), fit(10, few, each=1, tfms=shifted)), 'mirrored': (soft(), fit(10)), 'mirrored, the teacher sees another view': (soft(apart_view), fit(10))}
unseen = {'as they are: alone': (None, fit(10, few, each=1)), 'shifted and mirrored: alone': (None, fit(10, few, each=1, tfms=shifted)), 'mirrored: alone': (None, fit(10))}
views_of = measured('views', {**unseen, **seen})

# %%
views_of

# %% [markdown]
# ## The loss
#
# A loss of logits takes the place of soft targets, beside labels of weight 0.1; a loss of features stands beside the labels' own loss, with a third, a tenth or a thirtieth of the weight at which its gradient is as large as theirs at the start; with the whole of it a hint does harm (59.9 %). The weight is chosen with one seed, which then judges nothing.

# %%
layers = 'features.5','_blocks.15'
of_logits = {'soft targets, standardised': SoftTarget(T=2, standardize=True), 'DKD': DecoupledKD, 'DIST': DIST}
of_features = {'hint': partial(Term, FitNet, *layers, adapter='auto'), 'attention': partial(Term, Attention, *layers), 'relations': partial(Term, Similarity, *layers)}

def balancing(term):
    "The weight at which a term's gradient is as large as the labels'"
    set_seed(0)
    learn = make()
    learn.dls = images_dls(labelled, glance)
    weight = KnowledgeDistillationCallback(lite0, term(weight=1.), weight=1, task_weight=1).preflight(learn).terms['balancing Term weight'].iloc[-1]
    return float(f'{weight or 1:.1g}')

# %%
def with_labels(term): return partial(KnowledgeDistillationCallback, lite0, loss=term, weight=1, task_weight=1)
def in_place(loss, weight=.9): return partial(KnowledgeDistillationCallback, lite0, loss=loss, weight=weight)

scales = {n: balancing(t) for n,t in of_features.items()}
weights = {f'{n}, weight {w:g}': (in_place(loss, w), fit(10)) for n,loss in of_logits.items() for w in page((.1, .5, .9), (.9,))}
weights |= {f'{n}, weight {k*scales[n]:.1g}': (with_labels(t(weight=float(f'{k*scales[n]:.1g}'))), fit(10)) for n,t in of_features.items() for k in page((1/30, 1/10, 1/3), (1,))}
weights |= {f'soft targets, T={T}': (soft(T=T), fit(10)) for T in (2, 4)}
weighed = measured('weighed', {'alone': (None, fit(10)), **weights}, seeds=[9])
weighed

# %%
chosen = {n: weighed.best([o for o in weights if o.startswith(n)]) for n in {'soft targets, T=2': 0, 'soft targets, T=4': 0, **of_logits, **of_features}}
losses = measured('losses', {'alone': (None, fit(10)), **{o: weights[o] for o in chosen.values()}})

# %%
#| echo: false
draw_names(losses)

# %%
losses

# %% [markdown]
# The best two together, one of logits and one of features:

# %%
best_loss,best_hint = (losses.best([o for n,o in chosen.items() if (n in of_features)==features]) for features in (False, True))
a,b = weights[best_loss][0].keywords,weights[best_hint][0].keywords
two = partial(KnowledgeDistillationCallback, lite0, loss=[Term(a['loss'], weight=a['weight']), b['loss']], weight=1, task_weight=1-a['weight'])
together = measured('together', {'alone': (None, fit(10)), best_loss: weights[best_loss], f'{best_loss}, and {best_hint}': (two, fit(10))})
together

# %% [markdown]
# Ten epochs are too few for any of them: the best gains half a point. Losses of features gain nothing at any weight that was tried, alone or beside soft targets, and do harm where they count more. Decoupled distillation with its published settings (`beta=8`, `T=4`) is worse the more it counts, at 64.6 % with half of the weight: its authors warm it up over twenty epochs.

# %% [markdown]
# ## The student's size

# %%
def light(width, n_out=10):
    "LightNN, with so many times its channels"
    a,h = int(16*width),int(256*width)
    def net():
        body = nn.Sequential(nn.Conv2d(3, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(a, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(OrderedDict(features=body, classifier=nn.Sequential(nn.Flatten(), nn.Linear(64*a, h), nn.ReLU(), nn.Dropout(.1), nn.Linear(h, n_out))))
    return net

widths = page((.5, 1, 2), (.5,))
sizes = {w: measured(f'width-{w:g}', {'alone': (None, fit(10)), 'distilled': (soft(), fit(10))}, make=partial(make, net=light(w))) for w in widths}

# %%
#| echo: false
def n_of(c): return c.of('alone')[0].parameters
_,ax = plt.subplots(figsize=(5, 3), layout='constrained')
draw(ax, [n_of(c) for c in sizes.values()], [c.gain('distilled') for c in sizes.values()])
ax.set(xscale='log', xlabel='parameters of the student');

# %%
#| echo: false
Table([{'width': w, 'parameters': n_of(c), 'alone, %': spread(c, 'alone'), 'distilled, %': spread(c, 'distilled'), 'gain': f"{100*c.gain('distilled'):.2f}"} for w,c in sizes.items()])

# %% [markdown]
# ## The teacher
#
# DeepNN is the teacher of PyTorch's own tutorial. As there: Adam with 1e-3, ten epochs, images as they are; and trained well: one-cycle, on mirrored images. Four LightNNs, each trained as the student alone, are an ensemble.

# %%
def trained(name, net, fit, images):
    "A model, trained or loaded, and whether it knows its images by heart"
    set_seed(0)
    learn = Learner(images_dls(images, glance), net().to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    if page.full: learn.path = path
    page.once(learn, name, fit)
    return learn

by_heart = trained('deepnn_by_heart', DeepNN, lambda learn: learn.fit(page(10, 1), 1e-3), few)
well = trained('deepnn_well', DeepNN, lambda learn: learn.fit_one_cycle(page(5, 1), 3e-3), labelled)
def member(i): return trained(f'lightnn_{i}', LightNN, lambda learn: [set_seed(100+i), learn.fit_one_cycle(page(5, 1), 5e-3)], labelled)
four = [member(i).model for i in range(page(4, 2))]
of_teachers = {'DeepNN by heart': by_heart, 'DeepNN trained well': well, 'four LightNNs': four, 'EfficientNet-Lite0': from_elsewhere}

# %%
answered = {n: lite0 if t is from_elsewhere else asked(t, labelled, n.replace(' ', '_')) for n,t in of_teachers.items()}
teachers = measured('teachers', {'alone': (None, fit(10)), **{n: (soft(t), fit(10)) for n,t in answered.items()}})
teachers

# %%
#| echo: false
def share_right(t, images):
    "How often a teacher is right about `images`, %"
    asked = Learner(images_dls(glance, images), LightNN(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    return f"{100*judged(asked, as_teacher(t)).metrics['accuracy']:.1f}"
some = apart(few, page(5000, 16))[1]
Table([{'teacher': n, 'right about images that it has seen, %': share_right(t, some), 'about those held out, %': share_right(t, held), 'gain': f'{100*teachers.gain(n):.2f}'} for n,t in of_teachers.items()])

# %% [markdown]
# ## With all labels
#
# What is judged in the end is chosen here, with one seed: ten tries each, of ten epochs and longer.

# %%
def by(teacher, kd): return partial(kd.func, teacher, **kd.keywords)
def all_of_them(epochs, **kwargs): return fit(page(epochs, 2), everything, **kwargs)

alone_all = {'alone: 10 epochs': (None, all_of_them(10)), 'alone: 10 epochs, lr 0.002': (None, all_of_them(10, lr=2e-3)), 'alone: 10 epochs, lr 0.01': (None, all_of_them(10, lr=1e-2)), 'alone: 10 epochs, smoothing 0.1': (None, all_of_them(10, smooth=.1)), 'alone: 10 epochs, wd 0.3': (None, all_of_them(10, wd=.3)),
             'alone: 20 epochs, wd 0.3': (None, all_of_them(20, wd=.3)), 'alone: 20 epochs, smoothing 0.1, wd 0.3': (None, all_of_them(20, smooth=.1, wd=.3)), 'alone: 30 epochs, the best one kept': (None, all_of_them(30, best=True)),
             'alone: 10 epochs, smoothing 0.1, wd 0.3': (None, all_of_them(10, smooth=.1, wd=.3)), 'alone: 40 epochs, smoothing 0.1, wd 0.3': (None, all_of_them(40, smooth=.1, wd=.3)),
             'alone: 100 epochs, smoothing 0.1, wd 0.3': (None, all_of_them(100, smooth=.1, wd=.3))}
taught_all = {'10 epochs, T=2': (soft(lite0_all, 2), all_of_them(10)), '10 epochs, T=2, lr 0.01': (soft(lite0_all, 2), all_of_them(10, lr=1e-2)), '10 epochs, T=2, wd 0.3': (soft(lite0_all, 2), all_of_them(10, wd=.3)),
              '10 epochs, T=2, weight 1': (soft(lite0_all, 2, 1.), all_of_them(10)), '10 epochs, T=4': (soft(lite0_all), all_of_them(10)), f'10 epochs, {best_loss}': (by(lite0_all, weights[best_loss][0]), all_of_them(10)),
              '30 epochs, T=4': (soft(lite0_all), all_of_them(30)), '30 epochs, T=4, wd 0.3': (soft(lite0_all), all_of_them(30, wd=.3)), '30 epochs, T=4, weight 1, wd 0.3': (soft(lite0_all, weight=1.), all_of_them(30, wd=.3)),
              '100 epochs, T=4, wd 0.3': (soft(lite0_all), all_of_them(100, wd=.3))}
if not page.full: alone_all,taught_all = ({n: d[n] for n in [*d][::7]} for d in (alone_all, taught_all))
tries_all = {**alone_all, **taught_all}
tried_all = measured('all-labels', tries_all, seeds=[9])
tried_all

# %% [markdown]
# ## With 5,000 labels
#
# The student alone; distilled on the same images; and on all of them, by the teacher that comes from elsewhere, or by one that has been fine-tuned on the same 5,000 labels.

# %%
labelled5 = mirrored(labels_of(page(5000, 32)))
learn5 = lite0_learner(labels_of(page(5000, 32)), held, size=page(96, 32), pretrained=page(True, False))
if page.full: learn5.path = path
page.once(learn5, 'efficientnet_lite0_5000', lambda learn: learn.fit_one_cycle(page(6, 1), slice(1e-3, 5e-3)))
same5,own5 = asked(from_elsewhere, labelled5, f'lite0_{len(labelled5)//2}'),asked(standing(learn5), everything, 'lite0_5000_all')

# %%
def of_labelled(epochs, **kwargs): return fit(page(epochs, 2), labelled5, **kwargs)
def of_all(epochs, **kwargs): return fit(page(epochs, 2), hidden(len(labelled5)//2), **kwargs)

alone5 = {'alone: 10 epochs': (None, of_labelled(10)), 'alone: 20 epochs': (None, of_labelled(20)), 'alone: 20 epochs, lr 0.01': (None, of_labelled(20, lr=1e-2)), 'alone: 20 epochs, smoothing 0.1': (None, of_labelled(20, smooth=.1)),
          'alone: 40 epochs': (None, of_labelled(40)), 'alone: 40 epochs, wd 0.3': (None, of_labelled(40, wd=.3)), 'alone: 40 epochs, smoothing 0.1, wd 0.3': (None, of_labelled(40, smooth=.1, wd=.3)), 'alone: 40 epochs, the best one kept': (None, of_labelled(40, best=True))}
taught5 = {f'same images: {e} epochs, T={T}, weight {w:g}, wd {wd:g}': (soft(same5, T, w), of_labelled(e, wd=wd)) for e,T,w,wd in ((20, 4, .9, .01), (40, 4, .9, .01), (40, 4, 1., .01), (40, 4, .9, .3), (80, 4, .9, .01), (80, 4, .9, .3), (80, 8, 1., .3), (160, 4, 1., .3))}
rest5 = {f'and the rest: T={T}, weight {w:g}': (soft(lite0_all, T, w), of_all(10)) for T,w in ((2, .9), (2, 1.), (4, 1.))}
rest5 |= {'and the rest: 30 epochs, T=4, weight 1, wd 0.3': (soft(lite0_all, 4, 1.), of_all(30, wd=.3))}
own = {f'and the rest, by its own teacher: T={T}, weight {w:g}': (soft(own5, T, w), of_all(10)) for T,w in ((2, .9), (2, 1.), (4, 1.))}
if not page.full: alone5,taught5,rest5,own = ({n: d[n] for n in [*d][:1]} for d in (alone5, taught5, rest5, own))
tries5 = {**alone5, **taught5, **rest5, **own}
tried5 = measured('5000-labels', tries5, seeds=[9])
tried5

# %% [markdown]
# ## In the end
#
# The test images, three seeds that nothing was chosen with.

# %%
def best_of(tried, tries, names): return (name := tried.best(names)),tries[name]
def ten(names): return [n for n in names if '10 epochs' in n] or [*names]

pairs_all = dict(best_of(tried_all, tries_all, ns) for ns in (ten(alone_all), alone_all, ten(taught_all), taught_all))
end_all = measured('end-all', pairs_all, make=partial(make, test), seeds=page((0, 1, 2), (0,)))
end_all

# %%
pairs5 = dict(best_of(tried5, tries5, ns) for ns in (alone5, taught5, rest5, own))
end5 = measured('end-5000', pairs5, make=partial(make, test), seeds=page((0, 1, 2), (0,)))
end5

# %% [markdown]
# ## A hundred classes
#
# CIFAR-100: as many images, a tenth as many of each class, and a teacher made in the same way.

# %%
if page.full: path100,(train100,test100) = untar_data(URLs.CIFAR_100),cifar100()
else: path100,(train100,test100) = None,(train, test)
rest100,held100 = apart(train100, page(5000, 32))
few100,glance100 = apart(rest100, page(20000, 48))[1],apart(held100, page(500, 16))[1]

set_seed(0)
learn100 = lite0_learner(*page((rest100, held100), (few100, few100)), size=page(96, 32), pretrained=page(True, False))
if page.full: learn100.path = path100
page.once(learn100, 'efficientnet_lite0', lambda learn: learn.fit_one_cycle(page(3, 1), slice(1e-3, 5e-3)))
lite0_100 = asked(standing(learn100), mirrored(rest100), 'lite0_100')
lite0_few100 = asked(standing(learn100), mirrored(few100), 'lite0_few100')

# %%
def make100(valid=held100): return Learner(images_dls(glance100, valid), light(1, len(train100.vocab))().to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
def fit100(epochs, images, lr=5e-3, wd=.01):
    def train(learn, cbs):
        learn.dls = images_dls(images, glance100)
        learn.fit_one_cycle(max(1, epochs//2), lr, wd=wd, cbs=cbs)
    return train

ten_epochs = fit100(page(10, 2), mirrored(few100))
softness100 = measured('hundred-softness', {'alone': (None, ten_epochs), **{f'T={T}': (soft(lite0_few100, T), ten_epochs) for T in page((1, 2, 4, 8), (4,))}}, make=make100)
softness100

# %%
page
