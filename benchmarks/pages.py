"""The web face: pages over a million jobs, an app with two hundred open live pages, and one whose jobs compute. `python -m benchmarks.pages`.

The app is one uvicorn process on SQLite at FULL. Live pages are 200 connections of another process: each holds a stream and, when it is told that a
job's state has changed, asks for its part on a connection of its own, as a browser does. `wrk` asks a route of the app's own meanwhile; the same jobs run in both cases."""
import argparse, asyncio, json, os, socket, statistics, subprocess, sys, tempfile, time
from contextlib import contextmanager
from http.client import HTTPConnection
from .measures import wrk
from .report import folder

TENANT = 'acme'

def app_of(url):
    "The app that is measured"
    from fasthtml.common import FastHTML, P
    from fh_saas import HostDatabase, BackgroundTaskManager, get_or_create_tenant_db, setup_jobs
    host, app = HostDatabase(url), FastHTML(secret_key='a benchmark')
    setup_jobs(app, host, tenant=lambda req: TENANT, role=lambda req: 'operator')
    @app.route('/', methods=['GET'])
    def own(): return P('a route of its own')
    @app.route('/start/{n}', methods=['POST'])
    async def start(n:int):
        with get_or_create_tenant_db(TENANT, host=host) as db: return ' '.join(BackgroundTaskManager(db).submit_many('ticking', ticking, [dict(n=i) for i in range(n)]))
    @app.route('/compute/{n}/{ms}', methods=['POST'])
    async def compute(n:int, ms:int):
        with get_or_create_tenant_db(TENANT, host=host) as db: return str(len(BackgroundTaskManager(db).submit_many('computing', computing, [dict(ms=ms)]*n)))
    return app

def computing(ms:int):
    "So many milliseconds of Python, if nobody else wants the interpreter"
    until = time.thread_time() + ms/1000
    while time.thread_time() < until: pass

async def ticking(n:int, job):
    "Reports progress twice a second, for as long as anybody measures"
    for i in range(100_000):
        job.progress(i % 100, f'step {i}')
        await asyncio.sleep(0.5)

def serve(url, fd):
    import uvicorn
    os.environ['FH_SAAS_CONCURRENCY'] = '32'
    uvicorn.Server(uvicorn.Config(app_of(url), log_level='warning')).run(sockets=[socket.socket(fileno=int(fd))])

def fill(path, n):
    "A million jobs, by one statement: most are done, some failed, a few wait for a moment far ahead"
    import sqlite3
    with sqlite3.connect(path) as db:
        db.execute('''WITH RECURSIVE k(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM k WHERE i < ? - 1)
            INSERT INTO tenant_jobs (id, job_type, task, status, payload, result, max_retries, retry_count, queue, priority, attempt, lost, created_at, started_at, completed_at, run_at, error_message)
            SELECT printf('0100%028x', i), 'type_' || (i % 5), 'ticking', CASE WHEN i % 200 = 0 THEN 'failed' WHEN i % 1000 = 1 THEN 'pending' ELSE 'completed' END, printf('{"path":"files/%d.csv","mode":"full"}', i), '{"rows":1}', 3, 0, 'default', 2, 1, 0,
                '2026-01-01T00:00:00.000000', '2026-01-01T00:00:01.000000', CASE WHEN i % 1000 = 1 AND i % 200 != 0 THEN NULL ELSE '2026-01-01T00:00:02.000000' END, CASE WHEN i % 1000 = 1 THEN '2100-01-01T00:00:00.000000' ELSE '2026-01-01T00:00:00.000000' END,
                CASE WHEN i % 200 = 0 THEN 'TimeoutError: it took too long' END FROM k''', [n])

class App:
    "The app in a process of its own"
    def __init__(self, url):
        self.sock = socket.create_server(('127.0.0.1', 0), backlog=1000)
        self.port = self.sock.getsockname()[1]
        self.proc = subprocess.Popen([sys.executable, '-m', 'benchmarks.pages', 'serve', url, str(self.sock.fileno())], pass_fds=[self.sock.fileno()])
        self.conn = HTTPConnection('127.0.0.1', self.port, timeout=60)
        self.get('/')
    def get(self, path, method='GET'):
        self.conn.request(method, path, headers={'Origin': f'http://127.0.0.1:{self.port}'} if method == 'POST' else {})
        r = self.conn.getresponse()
        body = r.read()
        assert r.status in (200, 202), (path, r.status, body[:300])
        return body
    def timed(self, path, n=30):
        took = []
        for _ in range(n + 3):
            at = time.perf_counter()
            self.get(path)
            took.append((time.perf_counter() - at)*1000)
        took = sorted(took[3:])
        return {f'p{q}': round(took[int(len(took)*q/100)], 2) for q in (50, 95, 99)}
    def close(self): self.proc.kill(); self.proc.wait(); self.sock.close()

async def live_page(port, job_id, told):
    "A browser's part: a stream, and on each piece of news the part anew"
    async def ask(reader, writer, path):
        writer.write(f'GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHX-Request: true\r\n\r\n'.encode())
        head = await reader.readuntil(b'\r\n\r\n')
        size = next(int(l.split(b':')[1]) for l in head.lower().split(b'\r\n') if l.startswith(b'content-length'))
        return await reader.readexactly(size)
    stream, parts = await asyncio.open_connection('127.0.0.1', port), await asyncio.open_connection('127.0.0.1', port)
    stream[1].write(f'GET /jobs/-/stream?jobs={job_id} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n'.encode())
    head = await stream[0].readuntil(b'\r\n\r\n')
    assert head.startswith(b'HTTP/1.1 200'), head + await stream[0].read(300)
    async for line in stream[0]:
        if line.startswith(b'event: step'): told.append(time.time())
        elif line.startswith(b'event: job'): told.append(time.time()); await ask(*parts, f'/jobs/-/progress/{job_id}?live=1')

async def live_pages(port, ids, n):
    told = []
    pages = [asyncio.create_task(live_page(port, ids[i % len(ids)], told)) for i in range(n)]
    for _ in range(1000):
        await asyncio.sleep(1)
        if failed := [p for p in pages if p.done()]: failed[0].result(); raise RuntimeError('a stream ended')
        print(len(told), flush=True)

def live(url, pages, seconds, rounds):
    "Answers per second of the app's own route, without and with open live pages"
    app, rates = App(url), dict(without=[], with_pages=[])
    try:
        ids = app.get('/start/20', 'POST').decode().split()
        for _ in range(rounds):
            wrk(app.port, 1)
            rates['without'].append(wrk(app.port, seconds)[1])
            watching = subprocess.Popen([sys.executable, '-m', 'benchmarks.pages', 'watch', str(app.port), str(pages), *ids], stdout=subprocess.PIPE, text=True)
            for _ in range(8): told = int(watching.stdout.readline())
            rates['with_pages'].append(wrk(app.port, seconds)[1])
            assert watching.poll() is None and told >= pages, 'not all pages were told'
            watching.kill(); watching.wait()
            time.sleep(2)
    finally: app.close()
    ratios = [b/a for a, b in zip(rates['without'], rates['with_pages'])]
    return dict(pages=pages, **{k: [round(v) for v in vs] for k, vs in rates.items()}, ratio=round(statistics.median(ratios), 3))

def pages(url, path, n):
    "Milliseconds of pages of the dashboard and the API, over so many jobs"
    fill(path, n)
    app = App(url)
    try:
        ids = app.get('/start/1', 'POST').decode().split()
        each = dict(list='/jobs/list', failed='/jobs/list?q=status:failed', type='/jobs/list?q=type:type_3', search='/jobs/list?q=777.csv', overview='/jobs', api_list='/api/v1/admin/background-tasks',
            job=f'/jobs/job/{ids[0]}', status_poll=f'/jobs/-/status/{ids[0]}', progress_poll=f'/jobs/-/progress/{ids[0]}', api_status=f'/api/v1/admin/background-tasks/{ids[0]}', own_route='/')
        return dict(jobs=n) | {k: app.timed(p) for k, p in each.items()}
    finally: app.close()

@contextmanager
def fresh():
    "A new host with a tenant: its URL, and the tenant's file"
    from fh_saas import BackgroundTaskManager, HostDatabase, get_or_create_tenant_db
    from fh_saas.jobs.process import default_engine
    with tempfile.TemporaryDirectory() as tmp:
        host = HostDatabase(url := f'sqlite:///{tmp}/host.db')
        with get_or_create_tenant_db(TENANT, host=host) as db: BackgroundTaskManager(db).list_jobs()
        path = host.url_of(host.find(TENANT)).database
        default_engine().stop(0); host.close()
        yield url, path

def busy(ms):
    "Milliseconds of the app's own route while more jobs than it can run compute in its process, so many milliseconds each"
    with fresh() as (url, _):
        app = App(url)
        try:
            if ms: app.get(f'/compute/{60_000//ms}/{ms}', 'POST'); time.sleep(3)
            return app.timed('/', 300)
        finally: app.close()

def measure(kind, o):
    if kind == 'busy': return {ms: busy(ms) for ms in (0, 5, 100)}
    with fresh() as (url, path): return live(url, o.pages, o.seconds, o.rounds) if kind == 'live' else pages(url, path, o.jobs)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    for name, default in dict(jobs=1_000_000, pages=200, seconds=8, rounds=5).items(): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--only', default='live,busy,pages')
    o, out = p.parse_args(), folder/'pages.json'
    found = json.loads(out.read_text())['results'] if out.exists() else {}
    for kind in o.only.split(','):
        found[kind] = measure(kind, o)
        print(json.dumps({kind: found[kind]}, indent=1), flush=True)
    out.write_text(json.dumps(dict(options=vars(o), results=found), indent=1) + '\n')

if __name__ == '__main__':
    if sys.argv[1:2] == ['serve']: serve(*sys.argv[2:])
    elif sys.argv[1:2] == ['watch']: asyncio.run(live_pages(int(sys.argv[2]), sys.argv[4:], int(sys.argv[3])))
    else: main()
