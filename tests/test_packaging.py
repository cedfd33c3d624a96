"What is installed is what settings.ini and the package say."
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import fasterkd

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
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

def test_nbdev_finds_the_index(): assert 'fasterkd._modidx:d' in {e.value for e in metadata.entry_points(group='nbdev') if e.name=='fasterkd'}
