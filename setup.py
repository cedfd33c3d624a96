"The package's metadata, read from settings.ini: edit it there."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read_string((root/'settings.ini').read_text(encoding='utf-8'))
cfg = ini['DEFAULT']
lib = cfg['lib_path']
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}

setup(
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'],
    keywords=cfg['keywords'].split(),
    license_expression=cfg['license'],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={**extras, 'dev': sum(extras.values(), [])},
    entry_points={'nbdev': [f'{lib} = {lib}._modidx:d']},
    packages=find_packages(include=[lib, f'{lib}.*']),
    # said outright, so that an editable install puts this folder on sys.path and the folder above hides nothing
    package_dir={'': '.'},
    classifiers=['Programming Language :: Python :: 3', 'Programming Language :: Python :: 3 :: Only'],
)
