"The five tasks of a shop. Each can be killed at any line and run again."
import csv, json, os, subprocess, sys, time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener
from xml.etree import ElementTree
from fastcore.basics import chunked
from fh_saas.jobs.context import JobContext
from fh_saas.jobs.retries import Permanent, RetryAfter
from fh_saas.jobs.tasks import task
from products import COLUMNS, cells, is_header, lines, product
from shops import FEED, SAMPLES, URL, inside, shop_file
from sqlalchemy import text

# --- Products in: the whole file again after a crash, and it does not matter, because a SKU is one row

_upsert = text('''INSERT INTO products (sku, name, price_cents, currency, quantity, first_job, last_job)
    VALUES (:sku, :name, :price_cents, :currency, :quantity, :job, :job)
    ON CONFLICT (sku) DO UPDATE SET name=excluded.name, price_cents=excluded.price_cents, currency=excluded.currency,
        quantity=excluded.quantity, last_job=excluded.last_job''')

def _first(p, skus):
    if p['sku'] in skus: raise ValueError(f"SKU {p['sku']} is in the file a second time; the first line counts")
    skus.add(p['sku'])
    return p

@task('product_import')
def product_import(path:str, job:JobContext, pause:float=.15):
    "Read the shop's product file into its table, with a pause after each 500 lines: long enough to watch it, and to kill it"
    file, skus, counts, n = shop_file(job.tenant, path), set(), Counter(), 1
    if not file.is_file(): raise Permanent(f"there is no file {path!r} in the shop's folder")
    job.details['bytes'] = size = file.stat().st_size
    with file.open('rb') as f:
        numbered = lines(f)
        if not is_header(next(numbered, (1, b''))[1]): raise Permanent(f"{path!r} does not begin with the header {','.join(COLUMNS)}")
        for chunk in chunked(numbered, 500):
            rows = []
            for n, raw in chunk:
                try:
                    if raw.strip(): rows.append(_first(product(cells(raw)), skus) | dict(job=job.id))
                    else: counts['blank'] += 1
                except ValueError as e:
                    counts['skipped'] += 1
                    job.warn(str(e), item=f'line {n}')
            if rows:
                with job.begin() as conn: conn.execute(_upsert, rows)
            job.progress(100*f.tell()//size, f'{n:,} lines read')
            job.give_way()
            time.sleep(pause)
    with job.begin() as conn:
        new, products = conn.execute(text('SELECT count(*) FILTER (WHERE first_job = :job), count(*) FROM products'), dict(job=job.id)).one()
    return dict(lines=n, imported=new, updated=len(skus)-new, skipped=counts['skipped'], blank=counts['blank'], products=products)

# --- Orders in: the page that is done is written with its rows, so a retry goes on where the last attempt stopped

_order = text('''INSERT INTO orders (id, placed_at, customer, total_cents, currency) VALUES (:id, :placed_at, :customer, :total_cents, :currency)
    ON CONFLICT (id) DO UPDATE SET total_cents=excluded.total_cents''')
_done = text('''INSERT INTO order_pages (job, page, pages) VALUES (:job, :page, :pages)
    ON CONFLICT (job) DO UPDATE SET page=excluded.page, pages=excluded.pages''')
_open = build_opener(ProxyHandler({})).open # the marketplace is on this machine, whatever proxy the environment names

def fetch(shop:str, page:int) -> dict:
    "One page of the shop's orders from the marketplace"
    try:
        with _open(f'{URL}/marketplace/{shop}/orders?page={page}', timeout=10) as r: return json.loads(r.read(1_000_000))
    except HTTPError as e:
        if e.code != 503: raise
        wait = e.headers.get('Retry-After') or ''
        raise RetryAfter(min(int(wait), 60) if wait.isdecimal() else 5, f"the marketplace was too busy for page {page}") from None

# A marketplace that is often busy is no reason to give up, and a wait it asked for counts as an attempt.
@task('order_import', max_retries=8)
def order_import(job:JobContext):
    "Fetch the shop's old orders from the marketplace, page by page"
    with job.begin() as conn:
        page, pages = conn.execute(text('SELECT page, pages FROM order_pages WHERE job = :job'), dict(job=job.id)).first() or (0, 1)
    if page: job.details['resumed_after_page'] = page
    while page < pages:
        got = fetch(job.tenant, page+1)
        page, pages = page+1, got['pages']
        with job.begin() as conn:
            conn.execute(_order, got['orders'])
            conn.execute(_done, dict(job=job.id, page=page, pages=pages))
        job.progress(100*page//pages, f'page {page} of {pages}')
        job.give_way()
    with job.begin() as conn: return dict(pages=pages, orders=conn.execute(text('SELECT count(*) FROM orders')).scalar())

# --- Products out: readers see the old feed or the new one, never half of one

def _cell(s): return f"'{s}" if s.startswith(tuple('=+-@\t\r')) else s # a spreadsheet would run it

@task('product_export')
def product_export(job:JobContext):
    "Write the feed of all products, for download"
    feed, last, n = shop_file(job.tenant, FEED), '', 0
    part = feed.with_name(f'.{job.id}.csv')
    with job.begin() as conn: total = conn.execute(text('SELECT count(*) FROM products')).scalar()
    page = text('SELECT sku, name, price_cents, currency, quantity FROM products WHERE sku > :last ORDER BY sku LIMIT 2000')
    with part.open('w', newline='', encoding='utf-8') as f:
        out = csv.writer(f)
        out.writerow(COLUMNS)
        while True:
            with job.begin() as conn: rows = conn.execute(page, dict(last=last)).all()
            if not rows: break
            out.writerows((r.sku, _cell(r.name), f'{r.price_cents//100}.{r.price_cents%100:02}', r.currency, r.quantity) for r in rows)
            n, last = n+len(rows), rows[-1].sku
            job.progress(100*n//max(n, total), f'{n:,} products written')
        f.flush()
        os.fsync(f.fileno())
    part.replace(feed)
    if not n: job.warn("the shop has no products yet: the feed is empty")
    return dict(products=n, bytes=feed.stat().st_size, file=feed.name)

# --- A test run and a code scan over the samples

def _folder(name):
    if not (folder := inside(SAMPLES, name)).is_dir(): raise Permanent(f"there is no folder {name!r} in {SAMPLES.name}")
    return folder

def _need(module):
    if find_spec(module) is None: raise Permanent(f"{module} is not installed: pip install 'fh-saas[demo]'")

def _pytest(folder, report):
    "Run the tests in a child process, away from the settings of this project"
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')} | dict(PYTHONDONTWRITEBYTECODE='1')
    away = ['-p', 'no:cacheprovider', '-c', os.devnull, '--rootdir', folder, '--confcutdir', folder]
    try: p = subprocess.run([sys.executable, '-m', 'pytest', *away, f'--junitxml={report}', folder], cwd=folder, env=env,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace', timeout=60)
    except subprocess.TimeoutExpired: raise Permanent("the tests did not end in 60 seconds") from None
    if p.returncode not in (0, 1): raise Permanent(f"pytest ended with code {p.returncode}: {(p.stdout + p.stderr).strip()[-500:]}")

@task('test_run')
def test_run(job:JobContext, suite:str='tests_sample'):
    "Run pytest on a sample folder; a failing test is a warning"
    _need('pytest')
    with TemporaryDirectory() as tmp:
        report = Path(tmp)/'report.xml'
        _pytest(_folder(suite), report)
        root = ElementTree.parse(report).getroot()
    counts = Counter(passed=0, failure=0, error=0, skipped=0)
    for case in root.iter('testcase'):
        bad = next((o for o in case if o.tag in ('failure', 'error', 'skipped')), None)
        counts[tag := 'passed' if bad is None else bad.tag] += 1
        if tag in ('failure', 'error'): job.warn(bad.get('message', tag).partition('\n')[0], item=f"{case.get('classname')}.{case.get('name')}")
    return dict(passed=counts['passed'], failed=counts['failure'], errors=counts['error'], skipped=counts['skipped'])

class _Findings(list):
    "What pyflakes reports, as (file, line, message)"
    def flake(self, m): self.append((m.filename, m.lineno, m.message % m.message_args))
    def syntaxError(self, filename, msg, lineno, offset, text): self.append((filename, lineno, msg))
    def unexpectedError(self, filename, msg): self.append((filename, 0, msg))

@task('code_quality_scan')
def code_quality_scan(job:JobContext, folder:str='code_sample'):
    "Run pyflakes on a sample folder; a finding is a warning"
    _need('pyflakes')
    from pyflakes.api import checkPath
    files, found = sorted(_folder(folder).rglob('*.py')), _Findings()
    for i, file in enumerate(files):
        checkPath(str(file), found)
        job.progress(100*(i+1)//len(files), file.name)
    for file, n, message in found: job.warn(message, item=f'{Path(file).name}:{n}')
    return dict(files=len(files), findings=len(found))
