"What pages say to each other and to their reader: links, the order of the site, and outputs that are those of the full form."
import re

import pytest, yaml
from conftest import notebooks as pages, root
from fastcore.nbio import read_nb

nbs = root/'nbs'
texts = [*pages, root/'README.md', *(root/'benchmarks').glob('*.md')]

def cells(path, kind): return [c for c in read_nb(path).cells if c.cell_type==kind]
def markdown(path):
    text = '\n\n'.join(c.source for c in cells(path, 'markdown')) if path.suffix=='.ipynb' else path.read_text(encoding='utf-8')
    return re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)

def anchors(path): return {re.sub(r'[^\w\- ]', '', h).strip().lower().replace(' ', '-') for h in re.findall(r'^#+ (.*)', markdown(path), re.M)}

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
    listed = files(yaml.safe_load((nbs/'sidebar.yml').read_text())['website']['sidebar']['contents'])
    assert sorted(listed)==sorted(str(p.relative_to(nbs)) for p in pages)

def test_the_front_page_links_to_every_page():
    assert not [p.name for p in pages if p.name!='index.ipynb' and str(p.relative_to(nbs)) not in markdown(nbs/'index.ipynb')]

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
            assert o.output_type!='error' and '\r' not in text and '<progress' not in text, f'{path.name}: {cell.source[:80]}'
