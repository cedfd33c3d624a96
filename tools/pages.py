"All pages as HTML, with their saved outputs, where Quarto is not installed: `python tools/pages.py [folder]` (needs `pip install nbconvert`). Default folder: _docs."
import re, sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'

def directives(source): return {k: v for k,v in re.findall(r'^#\|\s*([\w-]+)(?::\s*(\S+))?', source, re.M)}

def shown(nb):
    "What a reader of the site sees: nbdev's `hide`, `echo: false` and `output: false` at work"
    cells = []
    for cell in nb.cells:
        d = directives(cell.source) if cell.cell_type=='code' else {}
        if 'hide' in d or 'default_exp' in d: continue
        cell.metadata.pop('execution', None)
        if d.get('output')=='false': cell.outputs = []
        if d.get('echo')=='false': cell.metadata['transient'] = dict(remove_source=True)
        if cell.cell_type=='code': cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        else: cell.source = re.sub(r'(\]\((?!https?:)[^)#\s]+)\.ipynb', r'\1.html', cell.source)
        cells.append(cell)
    return dict(nb, cells=cells)

def main(folder=root/'_docs'):
    from nbconvert import HTMLExporter
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    for file in sorted(nbs.rglob('*.ipynb')):
        if any(p.startswith(('.', '_')) for p in file.relative_to(nbs).parts): continue
        nb = nbformat.from_dict(shown(nbformat.read(file, 4)))
        out = (Path(folder)/file.relative_to(nbs)).with_suffix('.html')
        out.parent.mkdir(parents=True, exist_ok=True)
        html = exporter.from_notebook_node(nb)[0].replace('</head>', '<style>pre {white-space: pre-wrap !important}</style></head>')
        out.write_text(html, encoding='utf-8')
        print(out)

if __name__=='__main__': main(*sys.argv[1:2])
