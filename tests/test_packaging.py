"What is installed is what settings.ini and the package say."
import os, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from importlib import metadata

import fasterkd
import pytest
from conftest import root

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
installed = metadata.metadata('fasterkd')

def test_the_version_is_the_packages_own(): assert installed['Version']==fasterkd.__version__

def test_the_fields_are_those_of_settings_ini():
    assert installed['Name']==cfg['lib_name'] and installed['Summary']==cfg['description']
    assert installed['License-Expression']==cfg['license'] and installed['Requires-Python']==f">={cfg['min_python']}"
    assert installed['Author']==cfg['author'] or cfg['author'] in installed['Author-email']
    assert set(installed['Keywords'].replace(',', ' ').split())==set(cfg['keywords'].split())

def test_the_requirements_are_those_of_settings_ini():
    reqs = [r.replace(' ', '') for r in metadata.requires('fasterkd')]
    assert {r for r in reqs if 'extra==' not in r}=={*cfg['requirements'].split()}
    extras = {k.removesuffix('_requirements'): {*v.split()} for k,v in cfg.items() if k.endswith('_requirements')}
    def of(extra): return {r.split(';')[0] for r in reqs if r.replace('"', "'").endswith(f"extra=='{extra}'")}
    assert {n: of(n) for n in extras}=={**extras, 'dev': set.union(*extras.values())}

def test_nbdev_finds_the_index():
    indices = {e.value for e in metadata.entry_points(group='nbdev') if e.name=='fasterkd'}
    assert 'fasterkd._modidx:d' in indices

# --- an editable install, as `pip install -e ./fasterkd` makes it, without the network

def run(*args, cwd):
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    return done.stdout.strip()

@pytest.fixture(scope='module')
def installed_beside(tmp_path_factory):
    "A folder that holds a clone, named `fasterkd` as git names it, and the folder into which that clone is installed"
    above = tmp_path_factory.mktemp('above')
    clone,site = above/'fasterkd',above/'site'
    shutil.copytree(root/'fasterkd', clone/'fasterkd', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy(root/name, clone/name)
    site.mkdir()
    run('-c', f'from setuptools import build_meta; build_meta.build_editable({str(site)!r})', cwd=clone)
    for wheel in site.glob('*.whl'): zipfile.ZipFile(wheel).extractall(site)
    return above,site

def script(site, code):
    "With `python -S`, nothing else is installed"
    return f'import site; site.addsitedir({str(site)!r})\n{code}'

@pytest.mark.parametrize('where', ('.', 'elsewhere', 'fasterkd', 'fasterkd/nbs'))
def test_a_script_in_any_folder_beside_above_or_inside_the_clone_imports_the_package(installed_beside, where):
    above,site = installed_beside
    (above/where).mkdir(exist_ok=True)
    path = above/where/'script.py'
    path.write_text(script(site, 'import fasterkd; print(fasterkd.__version__, fasterkd.__file__)'), encoding='utf-8')
    version,file = run('-S', path, cwd=path.parent).split(' ', 1)
    assert version==fasterkd.__version__ and (above/'fasterkd'/'fasterkd'/'__init__.py').samefile(file)

def test_a_prompt_in_the_folder_above_the_clone_imports_the_package(installed_beside):
    above,site = installed_beside
    version = run('-S', '-c', script(site, 'import fasterkd; print(fasterkd.__version__)'), cwd=above)
    assert version==fasterkd.__version__
