"lock.py <url>: holds the write lock until its input ends or it is killed"
import sys
import sqlalchemy as sa

url = sa.make_url(sys.argv[1])
if url.get_backend_name() == 'sqlite':
    import sqlite3
    conn = sqlite3.connect(url.database, isolation_level=None)
    conn.execute('BEGIN IMMEDIATE')
else:
    import psycopg
    conn = psycopg.connect(url.set(drivername='postgresql').render_as_string(hide_password=False))
    conn.execute('LOCK TABLE tenant_jobs IN EXCLUSIVE MODE')
print('locked')
sys.stdin.read()
conn.close()
