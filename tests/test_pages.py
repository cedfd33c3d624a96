"What pages say to each other and to their reader: links, the order of the site, and outputs of the full form."
import json, re

import pytest
import yaml
from conftest import notebooks as pages, root
from fastcore.nbio import read_nb

nbs = root/'nbs'
texts = [*pages, root/'README.md', *(root/'benchmarks').glob('*.md')]

def cells(path, kind): return [c for c in read_nb(path).cells if c.cell_type==kind]

def outputs(path): return [o for c in cells(path, 'code') for o in c.outputs]

def shown_by(path):
    "The tables and words that a page shows"
    return [''.join(o.data.get('text/markdown', '')) for o in outputs(path) if 'data' in o]

def markdown(path):
    "The prose of a page, without code"
    if path.suffix=='.ipynb': text = '\n\n'.join(c.source for c in cells(path, 'markdown'))
    else: text = path.read_text(encoding='utf-8')
    return re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)

def anchors(path):
    "What links can name on a page"
    headings = re.findall(r'^#+ (.*)', markdown(path), re.M)
    return {re.sub(r'[^\w\- ]', '', h).strip().lower().replace(' ', '-') for h in headings}

@pytest.mark.parametrize('path', texts, ids=lambda p: p.stem)
def test_every_internal_link_leads_somewhere(path):
    for target in re.findall(r'\]\(([^)\s]+)\)', markdown(path)):
        if re.match(r'https?:|mailto:', target): continue
        file,_,anchor = target.partition('#')
        to = (path.parent/file).resolve() if file else path
        assert to.exists(), f'{path.name} links to {target}'
        assert not anchor or anchor in anchors(to), f'{path.name} links to {target}: {sorted(anchors(to))}'

def test_the_site_lists_every_page_once():
    def files(contents): return [f for o in contents for f in (files(o['contents']) if isinstance(o, dict) else [o])]
    listed = files(yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents'])
    assert sorted(listed)==sorted(p.relative_to(nbs).as_posix() for p in pages)

def test_the_front_page_links_to_every_page():
    front = markdown(nbs/'index.ipynb')
    assert not [p.name for p in pages if p.name!='index.ipynb' and p.relative_to(nbs).as_posix() not in front]

tutorials = sorted((nbs/'tutorials').glob('*.ipynb'))

@pytest.mark.parametrize('path', tutorials, ids=lambda p: p.stem)
def test_the_saved_outputs_of_a_tutorial_are_those_of_its_full_form(path):
    import fasterkd
    last = ''.join(cells(path, 'code')[-1].outputs[-1].data['text/markdown'])
    assert last.startswith('This page ran in full in ') and f'fasterkd {fasterkd.__version__}' in last

@pytest.mark.parametrize('path', pages, ids=lambda p: p.stem)
def test_no_output_holds_an_error_or_the_frames_of_a_bar(path):
    for cell in cells(path, 'code'):
        for o in cell.outputs:
            text = ''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/html', ''))
            bad = o.output_type=='error' or '\r' in text or '<progress' in text
            assert not bad, f'{path.name}: {cell.source[:80]}'

def run_again(page):
    "What to do where a page no longer shows what there is"
    return f'FASTERKD_FULL=1 nbdev-test --save --n-workers 0 --cell-timeout 0 nbs/tutorials/{page}'

def test_the_overview_of_tasks_shows_what_their_pages_came_to(monkeypatch):
    monkeypatch.chdir(root)
    path,found = nbs/'tutorials'/'00_tasks.ipynb',{}
    for cell in cells(path, 'code')[:2]: exec(cell.source, found)
    table = found['Table'](found['rows'])._repr_markdown_()
    assert table==shown_by(path)[0], f'a page was run anew: {run_again(path.name)}'

tasks = ('_pretrained', '_vit', '_segmentation', '_multilabel', '_regression', '_tabular', '_text', '_transformers',
         '_detection', '_unlabelled', '_collab')

@pytest.mark.parametrize('path', [p for p in tutorials if p.stem.endswith(tasks)], ids=lambda p: p.stem)
def test_a_page_of_a_task_ends_with_what_it_came_to(path):
    lines = [line for o in outputs(path) for line in ''.join(o.get('text', '')).splitlines()]
    rows = [json.loads(line) for line in lines if line.startswith('{"task"')]
    wanted = {'task', 'items', 'parameters', 'ms', 'teacher', 'alone', 'distilled', 'gain', 'seconds', 'metric',
              'distillation', 'seeds'}
    assert rows and all(wanted<={*r} and r['seeds']>=3 for r in rows)

measured = sorted((root/'benchmarks'/'results'/'when_it_helps').glob('*.json'))

@pytest.mark.parametrize('path', measured, ids=lambda p: p.stem)
def test_the_page_on_when_it_helps_shows_what_its_files_hold(path):
    from fasterkd.comparison import Comparison
    held = Comparison.from_json(path)
    page = '\n'.join(shown_by(nbs/'tutorials'/'20_when_it_helps.ipynb'))
    best = {held.best(), held.best([n for n in held.names if 'alone' in n])}
    means = [f'{100*sum(held.values(n))/len(held.values(n)):.2f}' for n in best]
    missing = [m for m in means if m not in page]
    assert not missing, f'{path.name} was measured anew: {run_again("20_when_it_helps.ipynb")}'
