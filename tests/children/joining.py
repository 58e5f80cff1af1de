"Writes orders and their jobs together, without end, until it is killed."
import sys
from itertools import count
import sqlalchemy as sa
from fastsql import Database
from fh_saas.jobs.engine import Engine
from fh_saas.jobs.settings import Settings
from fh_saas.utils_bgtsk import BackgroundTaskManager

def confirm(n): return n

m = BackgroundTaskManager(Database(sys.argv[1]), Engine(Settings(concurrency=0)))
with m.transaction() as tx:
    tx.execute(sa.text('CREATE TABLE IF NOT EXISTS orders (n INTEGER)'))
    first = tx.execute(sa.text('SELECT coalesce(max(n), 0) FROM orders')).scalar() + 1
print('ready', flush=True)
for n in count(first):
    with m.transaction() as tx:
        if n % 2: tx.execute(sa.text('INSERT INTO orders VALUES (:n)'), dict(n=n))
        m.submit('t', confirm, n=n, conn=tx)
        if not n % 2: tx.execute(sa.text('INSERT INTO orders VALUES (:n)'), dict(n=n))
