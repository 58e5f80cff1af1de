"forks_host.py <host url> <tenants>: children of a process that has asked its host ask it too, all at once; prints what was answered wrongly"
import os, sys
from fh_saas.db_host import HostDatabase
from fh_saas.db_tenant import open_tenant_db

host, names = HostDatabase(sys.argv[1]), sys.argv[2].split(',')
with open_tenant_db(names[0], host): assert host.find(names[0]).id == names[0]
children = []
for name in names:
    if (child := os.fork()) == 0:
        try: wrong = [host.find(name).id for _ in range(200)].count(name) - 200
        except Exception as e: wrong = f'{type(e).__name__}: {e}'
        with open_tenant_db(names[0], host) as db: whose = db.q("SELECT value FROM fh_saas_meta WHERE key = 'tenant_id'")[0]['value']
        if wrong or whose != names[0]: sys.stdout.write(f'{name}: {wrong} {whose}\n'); sys.stdout.flush()
        os._exit(0)
    children.append(child)
for c in children: os.waitpid(c, 0)
sys.stdout.write(f'{len(children)} children, {host.find(names[0]).id}\n')
