"""Keeping a teacher's answers: what filling costs beside a validation pass of the teacher, how fast they are read,
what room they take, beside a file for each sample.

Filling: DeepNN, the two in turn. Reading: made-up answers for a million items in a mapped file, of which random
batches are asked; each batch goes the whole way, with the look at whether they are the right items. Memory:
what the process has for itself (RssAnon) after reading, beyond what it had before, beside the size of one
batch's logits.
"""
import os, tempfile, time
from statistics import median
from types import SimpleNamespace

import torch
from common import arguments, in_turn, learner, random_images, resident, write_table
from fastai.basics import *
from fasterkd.all import CachedTeacher, Teacher
from fasterkd.fingerprints import fingerprint
from step_time import loaders, teacher
from torch import nn

def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def filling(images, rounds):
    deep,dls = teacher(),loaders(random_images(images))
    dls.loaders[1] = dls.train.new(shuffle=False)
    learn = learner(dls, deep, loss_func=CrossEntropyLossFlat())
    def channels_last():
        deep.to(memory_format=torch.channels_last)
        learn.validate()
        deep.to(memory_format=torch.contiguous_format)
    def fill(): CachedTeacher(deep).fill(dls, show=False)
    def fill_plain(): CachedTeacher(Teacher(deep, channels_last=False)).fill(dls, show=False)
    sides = dict(plain=learn.validate, channels_last=channels_last, fill=fill, fill_plain=fill_plain)
    s = in_turn(rounds, sides, seconds)
    def ratio(a, b): return median(x/y for x,y in zip(s[a], s[b]))
    return [{'what': 'fill / validation pass', 'value': ratio('fill', 'plain')},
            {'what': 'fill / validation pass, both with channels last', 'value': ratio('fill', 'channels_last')},
            {'what': 'fill / validation pass, neither with channels last', 'value': ratio('fill_plain', 'plain')}]

class Many:
    def __init__(self, n): self.x = torch.rand(n, 16)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],0

def reading(items, classes, top_k, bs, batches):
    "Items a second, of mapped answers, and what memory grew by, in batches of logits"
    with tempfile.TemporaryDirectory() as d:
        data = Many(items)
        dls = DataLoaders(*(TfmdDL(data, bs=bs, num_workers=0) for _ in range(2)))
        cached = CachedTeacher(nn.Linear(16, classes), d+'/answers', top_k=top_k)
        learn = SimpleNamespace(dls=dls, cbs=[], loss_func=CrossEntropyLossFlat(), dl=dls.train)
        with cached.ready(learn=learn):
            cached.loader(learn)
            cached((data.x[:bs],), [*range(bs)])        # makes the file
            for rows in torch.arange(bs, items).split(50_000):
                few = cached.rows.read(rows%bs)
                cached.rows.write(rows, {**few, 'seen': fingerprint((data.x[rows],))})
            size = os.path.getsize(d+'/answers')
        cached = CachedTeacher(cached.teacher, d+'/answers', top_k=top_k)       # opened as by another run
        with cached.ready(learn=learn):
            cached.loader(learn)
            # the answers are made up, so the teacher is not asked whether they are its own
            cached.fit.checked = True
            asked = [torch.randint(items, (bs,)) for _ in range(batches)]
            given = [((data.x[i],), i.tolist()) for i in asked]
            cached(*given[0])
            before = resident('RssAnon')
            start,most = time.perf_counter(),0
            for o in given: cached(*o)
            rate = batches*bs/(time.perf_counter()-start)
            for o in given:
                cached(*o)
                most = max(most, resident('RssAnon')-before)
        return rate,most/(bs*classes*4),size/items

def per_sample(items, classes, bs):
    "Items a second from a file for each, as some libraries keep them, and bytes on disk"
    with tempfile.TemporaryDirectory() as d:
        for i in range(items): torch.save(torch.randn(classes), f'{d}/{i}')
        disk = sum(512*os.stat(f'{d}/{i}').st_blocks for i in range(items))/items
        def read(): return torch.stack([torch.load(f'{d}/{i}') for i in torch.randint(items, (bs,)).tolist()])
        took = seconds(lambda: [read() for _ in range(8)])
        return 8*bs/took,disk

def main():
    p = arguments(__doc__, images=2_560, rounds=5, items=1_000_000, bs=1_024, batches=200)
    p.add_argument('--quick', action='store_true', help='under a minute; writes nothing')
    args = p.parse_args()
    if args.quick: args.images,args.rounds,args.items,args.batches = 512,2,50_000,20
    rows = filling(args.images, args.rounds)
    for classes,top_k in ((10, None), (1000, None), (1000, 32)):
        if classes*args.items*2>4e9 or top_k is None and classes>10: n = args.items//10
        else: n = args.items
        rate,memory,each = reading(n, classes, top_k, args.bs, args.batches)
        name = f"{n:,} items, {classes:,} classes{f', top_k={top_k}' if top_k else ''}"
        rows += [{'what': f'{name}: items read a second', 'value': rate},
                 {'what': f'{name}: memory beyond, in batches of logits', 'value': memory},
                 {'what': f'{name}: bytes an item', 'value': each}]
    rate,disk = per_sample(2_000, 1000, args.bs)
    rows += [{'what': 'a file for each sample, 1,000 classes: items read a second', 'value': rate},
             {'what': 'a file for each sample, 1,000 classes: bytes on disk an item', 'value': disk}]
    write_table(rows, keep=not args.quick, images=args.images, rounds=args.rounds, bs=args.bs)

if __name__=='__main__': main()
