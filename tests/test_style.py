"The rules of the house, read from the files: short cells, narrow lines, docstrings, no import upward, old names."
import ast, importlib, json, re, sys, warnings

from conftest import notebooks, root

width,cell_lines = 120,25
package = root/'fasterkd'
modules = sorted(p for p in package.rglob('*.py') if p.name!='_modidx.py')
pages = [p for p in notebooks if p.parent.name=='nbs']
scripts = [p for folder in ('tests', 'benchmarks', 'tools') for p in sorted((root/folder).glob('*.py'))]

def read(path): return path.read_text(encoding='utf-8')

def name_of(module): return '.'.join(module.relative_to(root).with_suffix('').parts).removesuffix('.__init__')

def code_cells(page): return [''.join(c['source']) for c in json.loads(read(page))['cells'] if c['cell_type']=='code']

def is_directive(line): return re.match(r'#\s?\|', line)

def is_exported(source): return any(re.match(r'#\s?\|\s*exports?i?\b', line) for line in source.split('\n'))

def code_lines(source): return [line for line in source.split('\n') if line.strip() and not is_directive(line)]

def all_of(offenders, rule): return f'{len(offenders)} {rule}:\n' + '\n'.join(offenders)

# --- notebooks and lines

def test_an_export_cell_is_short_or_says_why_not():
    offenders = []
    for page in pages:
        for source in filter(is_exported, code_cells(page)):
            lines = code_lines(source)
            if len(lines)>cell_lines and not lines[0].startswith('# long:'):
                first = next((line for line in lines if line.startswith(('def ', 'class '))), lines[0])
                offenders.append(f'{page.name}: {len(lines)} lines, {first[:60]}')
    assert not offenders, all_of(offenders, f'export cells of over {cell_lines} lines without "# long: <reason>"')

def test_no_line_of_code_is_wide():
    lines = [(f'{page.name}, code cell {i}', line)
             for page in notebooks for i,source in enumerate(code_cells(page)) for line in source.split('\n')]
    lines += [(f'{path.relative_to(root)}:{i}', line)
              for path in [*modules, *scripts] for i,line in enumerate(read(path).split('\n'), 1)]
    # nbdev writes the line of __all__
    wide = [(where, line) for where,line in lines if len(line)>width and not line.startswith('__all__ = [')]
    offenders = [f'{where}: {len(line)}, {line.strip()[:60]}' for where,line in wide]
    assert not offenders, all_of(offenders, f'lines of over {width} characters')

# --- docstrings

def is_public(name): return not name.startswith('_')

def patched_class(function):
    "The classes that `@patch` puts a function into, as they are written; '' where it is a function"
    decorators = [ast.unparse(d) for d in function.decorator_list]
    if not any(re.match(r'patch\b', d) for d in decorators): return ''
    annotation = (function.args.posonlyargs+function.args.args)[0].annotation
    return ast.unparse(annotation) if annotation else ''

def is_setter(function): return any(ast.unparse(d).endswith('.setter') for d in function.decorator_list)

def in_branches(node):
    "The statements of a module or class, also those under `if`, `try` and `with`; not those inside functions"
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)): yield from in_branches(child)

def public_names(node, prefix=''):
    "Pairs of a dotted name and its node: the public functions, classes and methods of a module or class"
    for child in in_branches(node):
        if isinstance(child, ast.ClassDef) and is_public(child.name):
            yield prefix+child.name, child
            yield from public_names(child, f'{prefix}{child.name}.')
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and is_public(child.name):
            owner = patched_class(child)
            if is_public(owner) and not is_setter(child): yield f'{prefix}{owner}{owner and "."}{child.name}', child

def test_every_public_function_class_and_method_has_a_docstring():
    offenders = [f'{name_of(module)}: {name}'
                 for module in modules if is_public(module.name) or module.name=='__init__.py'
                 for name,node in public_names(ast.parse(read(module))) if not ast.get_docstring(node)]
    assert not offenders, all_of(offenders, 'public names without a docstring')

# --- imports

def number_of(page):
    "What its name begins with, to be compared: '04b_preflight' has (4, 'b')"
    number,letter = re.match(r'(\d+)([a-z]*)_', page.stem).groups()
    return int(number),letter

def module_numbers():
    "Each module of a notebook with the number of its notebook; `losses` and `all` come after what they import"
    exported = {page: re.search(r'^#\s?\|\s*default_exp +(\S+)', '\n'.join(code_cells(page)), re.M) for page in pages}
    numbers = {f'fasterkd.{found[1]}': number_of(page) for page,found in exported.items() if found}
    of_losses = max(n for m,n in numbers.items() if m.startswith('fasterkd.losses.'))
    return {**numbers, 'fasterkd.losses': of_losses, 'fasterkd.all': max(numbers.values())}

def imported_by(source):
    "What a cell imports, at the top or inside its functions: modules, and names of modules, which may be modules too"
    code = '\n'.join(line for line in source.split('\n') if not is_directive(line))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom): yield from (node.module, *(f'{node.module}.{a.name}' for a in node.names))

def test_no_import_of_the_package_runs_upward():
    numbers,offenders = module_numbers(),[]
    for page in pages:
        names = {name for source in filter(is_exported, code_cells(page)) for name in imported_by(source)}
        for name in sorted(names & {*numbers}):
            if numbers[name]>=number_of(page): offenders.append(f'{page.stem} imports {name}')
    assert not offenders, all_of(offenders, 'imports of a module whose notebook does not come before')

# --- old names

def deprecations(f, *args):
    "What `f(*args)` returns, None where it has no such attribute, and the words of its DeprecationWarnings"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try: found = f(*args)
        except AttributeError: found = None
    return found, ' '.join(str(w.message) for w in caught if issubclass(w.category, DeprecationWarning))

def test_every_old_module_and_every_old_name_is_found_with_a_deprecation_warning():
    from fasterkd._moved import _moved
    there,offenders = [name_of(module) for module in modules],[]
    for old,moved in ((f'fasterkd.{old}', moved) for old,moved in _moved.items()):
        if old not in there: sys.modules.pop(old, None)
        module,said = deprecations(importlib.import_module, old)
        if old not in there and f'{old} is now fasterkd.' not in said: offenders.append(f'{old}: no warning')
        for to,name in ((to, pair.partition('=')[0]) for to,names in moved for pair in names.split()):
            found,said = deprecations(getattr, module, name)
            if found is None or f'{old}.{name} is now fasterkd.{to}.' not in said:
                offenders.append(f'{old}.{name} from fasterkd.{to}: {said or "no warning"}')
    assert not offenders, all_of(offenders, 'old names that do not lead to new ones')
