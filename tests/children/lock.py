"lock.py <url>…: holds the write lock of each until its input ends or it is killed"
import sys
import sqlalchemy as sa

def locked(url):
    if url.get_backend_name() == 'sqlite':
        import sqlite3
        conn = sqlite3.connect(url.database, isolation_level=None)
        conn.execute('BEGIN IMMEDIATE')
    else:
        import psycopg
        conn = psycopg.connect(url.set(drivername='postgresql').render_as_string(hide_password=False))
        conn.execute('LOCK TABLE tenant_jobs IN EXCLUSIVE MODE')
    return conn

conns = [locked(sa.make_url(url)) for url in sys.argv[1:]]
print('locked')
sys.stdin.read()
for conn in conns: conn.close()
