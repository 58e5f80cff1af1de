"""Build a wheel and an sdist, install each into an empty environment, and run a job there.

What the core install pulls in is printed, and must not hold what only development or extras need.
"""
import subprocess, sys, tempfile, venv
from pathlib import Path

root = Path(__file__).resolve().parent.parent
heavy = {'nbdev', 'ipython', 'celery', 'duckdb', 'psycopg', 'pytest'}
job = """
import tempfile
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import get_or_create_tenant_db
from fh_saas.utils_bgtsk import BackgroundTaskManager
from fh_saas.workers.runner import Runner
host = HostDatabase(f'sqlite:///{tempfile.mkdtemp()}/host.db')
def add(a, b): return a + b
with get_or_create_tenant_db('acme', host=host) as db:
    m = BackgroundTaskManager(db)
    job_id, bg_task = m.submit('add', add, a=1, b=2)
    bg_task.func(*bg_task.args)
    assert m.get_job(job_id).result == '3'
"""


def run(*cmd): return subprocess.run([str(c) for c in cmd], check=True, capture_output=True, text=True).stdout


with tempfile.TemporaryDirectory() as tmp:
    tmp = Path(tmp)
    run(sys.executable, '-m', 'build', '--outdir', tmp/'dist', root)
    for dist in sorted((tmp/'dist').iterdir()):
        env = tmp/f'env-{dist.suffix[1:]}'
        venv.create(env, with_pip=True)
        py = env/'bin'/'python'
        run(py, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', dist)
        names = {l.split('==')[0].lower() for l in run(py, '-m', 'pip', 'freeze', '--all').splitlines()}
        assert not names & heavy, f'{dist.name} pulls in {names & heavy}'
        subprocess.run([py, '-c', job], check=True, cwd=tmp)
        print(f'{dist.name}: installed in an empty environment and ran a job; {len(names)} packages')
