"README.md and its pictures, from nbs/index.ipynb with its saved outputs: `python tools/readme.py [--check]`."
import base64, re, sys
from pathlib import Path

from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent
pictures = root/'README_files'

def links(text):
    "Links to pages beside the notebook, and to what is above it, seen from the top folder"
    text = re.sub(r'\]\((?!https?:|#|/|\.\./)([^)]+\.ipynb[^)]*)\)', r'](nbs/\1)', text)
    return text.replace('](../', '](')

def fenced(text, lang=''): return f'```{lang}\n{text.rstrip()}\n```'

def output(o, files):
    "A cell's output as Markdown; a picture goes to `files`"
    data = o.get('data', {})
    if o['output_type']=='stream': return fenced(''.join(o['text']))
    if 'image/png' in data:
        name = f'figure-{len(files)+1}.png'
        files[name] = base64.b64decode(''.join(data['image/png']))
        return f'![]({pictures.name}/{name})'
    for kind in ('text/markdown', 'text/html'):
        if kind in data: return ''.join(data[kind]).strip()
    return fenced(''.join(data['text/plain'])) if 'text/plain' in data else ''

def render():
    """The text of README.md and its pictures by name

    `#| hide`, `#| echo: false` and `#| output: false` mean what they mean to nbdev and Quarto.
    """
    parts = ['<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook. -->']
    files = {}
    for cell in read_nb(root/'nbs'/'index.ipynb').cells:
        if cell.has_directive('hide'): continue
        if cell.cell_type=='markdown': parts.append(links(cell.source.strip()))
        if cell.cell_type!='code': continue
        echo,shown = cell.directive('echo')!='false',cell.directive('output')!='false'
        cell.remove_directives()
        source = '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|')).strip()
        if echo and source: parts.append(fenced(source, 'python'))
        if shown: parts += [output(o, files) for o in cell.get('outputs', [])]
    return '\n\n'.join(p for p in parts if p)+'\n',files

def main():
    text,files = render()
    present = {p.name: p.read_bytes() for p in pictures.glob('*')} if pictures.is_dir() else {}
    if '--check' in sys.argv:
        same = (root/'README.md').read_text(encoding='utf-8')==text and present==files
        if not same: sys.exit('README.md is not what nbs/index.ipynb gives: run `make prepare`.')
        return
    (root/'README.md').write_text(text, encoding='utf-8')
    for name in present.keys()-files.keys(): (pictures/name).unlink()
    if files: pictures.mkdir(exist_ok=True)
    for name,data in files.items(): (pictures/name).write_bytes(data)

if __name__=='__main__': main()
