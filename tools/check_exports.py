"""Do notebooks, modules, README.md and llms.txt agree, and are the notebooks clean?

Everything is generated afresh in a copy of the project and compared; the project itself is not touched,
except with --write, which renders README.md from nbs/index.ipynb and derives the site's configuration.
"""
import difflib, re, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
parts = ['nbs', 'fh_saas', 'pyproject.toml', 'settings.ini', 'setup.py', 'README.md', 'llms.txt']


def tool(name, *args, cwd): subprocess.run([str(Path(sys.executable).with_name(name)), *args], cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def linked(text, nbs) -> str:
    "Links to pages of the site, as links to their notebooks; a page that is not there is an error"
    from nbdev.config import nbpath2html
    pages = {nbpath2html(nb).as_posix(): nb.as_posix() for nb in (p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))}
    def notebook(m):
        if m[1] not in pages: sys.exit(f'index.ipynb has a link to {m[1]}, and no notebook makes such a page')
        return f'](nbs/{pages[m[1]]})'
    return re.sub(r'\]\(([\w/]+\.html)\)', notebook, text)


def readme(project) -> str:
    "README.md, rendered from nbs/index.ipynb"
    import nbformat
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import RegexRemovePreprocessor
    hide = RegexRemovePreprocessor(patterns=[r'#\|\s*hide'], enabled=True)
    nb = nbformat.read(project/'nbs'/'index.ipynb', as_version=4)
    nb.metadata.language_info = dict(name='python')  # for the code fences; nbdev-clean removes it from the file
    text, _ = MarkdownExporter(preprocessors=[hide]).from_notebook_node(nb)
    lines = [l.rstrip().replace('](images/', '](nbs/images/') for l in linked(text, project/'nbs').splitlines() if not l.startswith('#|')]
    return '<!-- Rendered from nbs/index.ipynb; edit that, then `make export`. -->\n\n' + '\n'.join(lines).strip() + '\n'


def site(project):
    "The parts of the site's configuration that nbdev derives: nbs/nbdev.yml and nbs/sidebar.yml"
    tool('python', '-c', 'from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml; refresh_quarto_yml(); nbdev_sidebar()', cwd=project)


def texts(folder):
    files = [p for part in parts for p in ([folder/part] if (folder/part).is_file() else (folder/part).rglob('*'))]
    return {str(p.relative_to(folder)): p.read_text() for p in files if p.suffix in ('.py', '.ipynb', '.md', '.txt', '.yml') and '__pycache__' not in p.parts}


def main():
    if '--write' in sys.argv:
        site(root)
        (root/'README.md').write_text(readme(root))
        return 0
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        copy.mkdir()
        for part in parts:
            src = root/part
            if src.is_dir(): shutil.copytree(src, copy/part, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
            elif src.exists(): shutil.copy(src, copy/part)
        tool('nbdev-clean', cwd=copy)
        tool('nbdev-export', cwd=copy)
        site(copy)
        (copy/'README.md').write_text(readme(copy))
        here, fresh = texts(root), texts(copy)
        wrong = sorted(f for f in here.keys() | fresh.keys() if here.get(f) != fresh.get(f))
        for f in wrong:
            diff = difflib.unified_diff(here.get(f, '').splitlines(), fresh.get(f, '').splitlines(), f, f'{f} (generated)', lineterm='', n=1)
            print('\n'.join(list(diff)[:30]))
        if wrong: return print(f"{len(wrong)} files differ from what the notebooks give: {', '.join(wrong)}\nRun `make export` and commit.") or 1
    print('Notebooks, modules, README.md and llms.txt agree.')


sys.exit(main())
