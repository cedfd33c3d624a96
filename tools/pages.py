"""All pages as HTML, with their saved outputs, where Quarto is not installed: `python tools/pages.py [folder]`
(needs `pip install nbconvert`). Default folder: _docs."""
import re, sys
from pathlib import Path

from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'

def shown(nb):
    "What a reader of the site sees: nbdev's `hide`, `echo: false` and `output: false` at work"
    nb.cells = [c for c in nb.cells if not (c.has_directive('hide') or c.has_directive('default_exp'))]
    for cell in nb.cells:
        cell.metadata.pop('execution', None)
        if cell.directive('output')=='false': cell.outputs = []
        if cell.directive('echo')=='false': cell.metadata['transient'] = dict(remove_source=True)
        cell.remove_directives()
        cell.source = '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|')).strip()
        if cell.cell_type=='markdown':
            cell.source = re.sub(r'(\]\((?!https?:)[^)#\s]+)\.ipynb', r'\1.html', cell.source)
    return nb

style = '<style>pre {white-space: pre-wrap !important}</style>'

def main(folder=root/'_docs'):
    import nbformat
    from nbconvert import HTMLExporter
    exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    for file in sorted(nbs.rglob('*.ipynb')):
        if any(p.startswith(('.', '_')) for p in file.relative_to(nbs).parts): continue
        nb = nbformat.from_dict(shown(read_nb(file)))
        out = (Path(folder)/file.relative_to(nbs)).with_suffix('.html')
        out.parent.mkdir(parents=True, exist_ok=True)
        html = exporter.from_notebook_node(nb)[0]
        out.write_text(html.replace('</head>', f'{style}</head>'), encoding='utf-8')
        print(out)

if __name__=='__main__': main(*sys.argv[1:2])
