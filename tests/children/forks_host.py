"forks_host.py <host url> <tenants>: children of a process that has asked its host ask it too, all at once, on what their parent had open; prints what was answered wrongly"
import os, sys
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import open_tenant_db
from fh_saas.web.audit import Audit
from fh_saas.workers.fleet import Fleet

host, names = HostDatabase(sys.argv[1]), sys.argv[2].split(',')
with open_tenant_db(names[0], host): assert host.find(names[0]).id == names[0]
audit, fleet, server = Audit(host), Fleet(host), host.url.get_backend_name() == 'postgresql'
audit.note('parent', names[0], 'fork')
mine = server and open_tenant_db(names[0], host)  # SQLite's have to be closed
def handles(): return [mine, host.db] if server else []

def said(db, n): return db.q(f'SELECT {n} AS n')[0]['n']
def wrong(n, name):
    global mine
    if server and n % 2:  # in the middle of a transaction of its parent's
        if n == 1: mine.close()
        del mine
        host.close()
        mine = open_tenant_db(names[0], host)
    for _ in range(200):
        if (there := host.find(name).id) != name: return f'find: {there}'
        for db in handles():
            if (there := said(db, n)) != n: return f'{db}: {there}'
        if {e.by for e in audit.entries()} > {'parent', *names}: return 'audit'
        if fleet.workers(): return 'fleet'
    audit.note(name, names[0], 'fork')
    with open_tenant_db(names[0], host) as db: whose = db.q("SELECT value FROM fh_saas_meta WHERE key = 'tenant_id'")[0]['value']
    return whose != names[0] and whose

assert [said(db, 9) for db in handles()] == [9]*len(handles())
if server: audit.db._turn.acquire()  # a thread is in the middle of a write
children = []
for n, name in enumerate(names):
    if (child := os.fork()) == 0:
        try: odd = wrong(n, name)
        except Exception as e: odd = f'{type(e).__name__}: {e}'
        if odd: sys.stdout.write(f'{name}: {odd}\n'); sys.stdout.flush()
        if server: mine.close(); host.close()
        sys.exit() if server else os._exit(0)
    children.append(child)
if server: audit.db._turn.release()
for c in children: os.waitpid(c, 0)
assert all(said(db, 9) == 9 for db in handles())
sys.stdout.write(f"{len(children)} children, {host.find(names[0]).id}, {len({e.by for e in audit.entries()} - {'parent'})} notes\n")
