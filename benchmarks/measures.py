"""The measures, each of them alike for all peers. Each runs in a process of its own, and starts the workers it needs.

A figure is only given when the counts are right: all jobs are stored, or done with their result. Anything else is a `Wrong`."""
import random, re, shutil, signal, socket, subprocess, sys, time
from contextlib import contextmanager
from .tasks import said

class Wrong(Exception): "The peer did not do what was measured."
class Missing(Exception): "The peer has no such thing."

def check(what, got, wanted):
    if got != wanted: raise Wrong(f'{what}: {got} instead of {wanted}')

def wait_for(what, test, limit=60, pause=0.005):
    "Seconds until `test()` is true"
    start = time.perf_counter()
    while not test():
        if time.perf_counter() - start > limit: raise Wrong(f'{what}: not within {limit} s')
        time.sleep(pause)
    return time.perf_counter() - start

def spread(values, digits=3):
    "p50, p99 and the greatest, in milliseconds"
    v = sorted(values)
    at = lambda q: round(v[min(len(v)-1, int(q*len(v)))]*1000, digits)
    return dict(p50=at(0.5), p99=at(0.99), max=at(1))

def child(*args, **kw): return subprocess.Popen([sys.executable, '-m', 'benchmarks.child', *map(str, args)], **kw)

class Worker:
    "A worker process: ready when its imports are done, working after `go`"
    def __init__(self, peer): self.proc = child('work', peer.key, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    def ready(self):
        if self.proc.stdout.readline() != b'ready\n': raise Wrong('the worker did not start')
        return self
    def go(self):
        self.proc.stdin.write(b'go\n'); self.proc.stdin.flush()
        return self
    def kill(self):
        self.proc.kill()
        self.proc.wait()

@contextmanager
def workers(peer, n=1):
    started = [Worker(peer) for _ in range(n)]
    try:
        for w in started: w.ready()
        yield started
    finally:
        for w in started: w.kill()


def submit(peer, o):
    "Enqueue one by one, by one client: jobs per second, all of them stored at the end"
    n = max(50, int(o.jobs*peer.share/4))
    peer.submit('noop', 0)
    start = time.perf_counter()
    peer.submit_each('noop', range(n))
    took = time.perf_counter() - start
    check('jobs stored', peer.stored(), n + 1)
    return dict(value=n/took, jobs=n)

def bulk(peer, o, at_once=1000):
    "Enqueue in bulk, a thousand in one call: jobs per second, all of them stored at the end"
    n = max(at_once, int(o.jobs*peer.share)//at_once*at_once)
    start = time.perf_counter()
    for i in range(0, n, at_once): peer.submit_many('noop', range(i, i + at_once))
    took = time.perf_counter() - start
    check('jobs stored', peer.stored(), n)
    return dict(value=n/took, jobs=n)

def drain(peer, o, processes=1):
    "Run no-op jobs that wait in the queue, from the start of the first until the last one's result is stored: jobs per second"
    n = max(200, int(o.jobs*peer.share))
    peer.fill('noop', range(n))
    with workers(peer, processes) as ws:
        for w in ws: w.go()
        wait_for('the first job', lambda: said('began'))
        wait_for('all jobs done', lambda: peer.over(n), o.limit)
        end = time.time()
    settled(peer)
    check('jobs done', peer.done(), n)
    return dict(value=n/(end - min(at for _, at in said('began'))), jobs=n, processes_that_ran=len(said('began')))

def drain2(peer, o):
    "The same by two processes"
    return drain(peer, o, 2)

def latency(peer, o, jobs=200, warm=5):
    "One job at a time, 10 to 20 ms apart, submitted by one process and run by another: from the call of submit to the first line of the task, in ms"
    with workers(peer) as [w]:
        w.go()
        return lone(peer.submit, jobs, warm)

def inside(peer, o, jobs=200, warm=5):
    "The same in one process, which submits the jobs and runs them itself"
    peer.begin()
    return lone(peer.submit_here, jobs, warm)

def lone(submit, jobs, warm):
    "The waits of lone jobs"
    called = {}
    def call(n):
        time.sleep(random.uniform(0.01, 0.02))
        called[n] = time.time()
        submit('stamp', n)
    for n in range(-warm, 0):
        call(n)
        wait_for('a first job', lambda: len(said('ran')) > n + warm, 20)
    for n in range(jobs): call(n)
    wait_for('all jobs run', lambda: len(said('ran')) >= jobs + warm, 30)
    ran = {n: at for n, at in said('ran') if n >= 0}
    check('jobs run', sorted(ran), list(range(jobs)))
    s = spread(ran[n] - called[n] for n in range(jobs))
    return dict(value=s['p50'], **s, jobs=jobs)

def crash(peer, o, jobs=300):
    "A worker is killed (kill -9) after a third of 300 jobs of 5 ms, another is started at once: jobs lost, jobs run twice, seconds from the kill to the last one's end"
    peer.fill('nap', range(jobs))
    with workers(peer, 2) as [first, second]:
        first.go()
        wait_for('a third of the jobs', lambda: len(said('end')) >= jobs//3, 60, 0.001)
        first.kill()
        killed, done_before = time.time(), len(said('end'))
        if done_before == jobs: raise Wrong('all jobs had ended before the worker was killed')
        second.go()
        try: wait_for('all', lambda: len({n for n, _ in said('end')}) == jobs and peer.over(jobs), o.crash_limit, 0.02)
        except Wrong: pass
    ends, starts = {n: at for n, at in said('end')}, [n for n, _ in said('start')]
    lost, twice = jobs - len(ends), len(starts) - len(set(starts))
    recorded = peer.over(jobs)
    healed = max(ends.values()) - killed if not lost and recorded else None
    return dict(value=healed, lost=lost, twice=twice, recorded=recorded, note='' if healed else f'not within {o.crash_limit} s')

def wrk(port, seconds):
    if not shutil.which('wrk'): raise Missing('wrk is not installed')
    out = subprocess.run(['wrk', '-t1', '-c32', f'-d{seconds}', '--latency', f'http://127.0.0.1:{port}/'], capture_output=True, text=True, timeout=seconds + 30).stdout
    number = lambda pattern: (m := re.search(pattern, out)) and float(m[1])
    value, unit = re.search(r'99%\s+([\d.]+)(us|ms|s)\b', out).groups()
    p99 = float(value)*dict(us=0.001, ms=1, s=1000)[unit]
    errors = {k: int(n) for k, n in re.findall(r'(connect|read|write|timeout) (\d+)', out)}
    requests, refused, late = int(number(r'(\d+) requests in')), int(number(r'Non-2xx or 3xx responses: (\d+)') or 0), errors.pop('timeout', 0)
    if refused or any(errors.values()): raise Wrong(f'{refused} of {requests} requests were answered with an error, and {sum(errors.values())} connections broke')
    return requests, number(r'Requests/sec:\s+([\d.]+)'), p99, f'{late} requests took longer than 2 s' if late else ''

def listening(port):
    try: socket.create_connection(('127.0.0.1', port), 0.2).close()
    except OSError: return False
    return True

def web(peer, o):
    "`wrk -t1 -c32`: a route of one uvicorn process that submits one job for each request: answers per second, and seconds until the last job has run"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = child('serve', peer.key, port, stdout=subprocess.DEVNULL)
    try:
        with workers(peer, int(peer.web_worker)) as ws:
            for w in ws: w.go()
            wait_for('the server', lambda: listening(port), 20)
            wrk(port, 1)
            wait_for('jobs of the first second', lambda: settled(peer), 60, 0.2)
            warm = peer.done()
            requests, rate, p99, late = wrk(port, o.seconds)
            try: behind = round(wait_for('jobs', lambda: peer.done() - warm >= requests, 30, 0.05), 2)
            except Wrong: behind = None
            done = peer.done() - warm
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
    return dict(value=rate, p99=p99, behind=behind, requests=requests, done=done, note=late if behind is not None else f'{requests - done} of {requests} jobs not run 30 s later')

def settled(peer, pause=0.3):
    before = peer.done()
    time.sleep(pause)
    return peer.done() == before

measures = dict(submit=submit, bulk=bulk, drain=drain, drain2=drain2, latency=latency, inside=inside, crash=crash, web=web)
