"The peers by their names, in the order of the tables. A module is imported only in the process that measures it."
import importlib

peers = {
    'raw-sqlite-full': 'raw:RawSqlite', 'raw-sqlite-normal': 'raw:RawSqliteNormal',
    'schema-sqlite-full': 'raw:SchemaSqlite', 'schema-sqlite-normal': 'raw:SchemaSqliteNormal',
    'raw-postgres': 'raw:RawPostgres', 'schema-postgres': 'raw:SchemaPostgres', 'raw-redis': 'raw:RawRedis',
    'ours-full': 'ours:Ours', 'ours-normal': 'ours:OursNormal', 'ours-postgres': 'ours:OursPostgres',
    'ours-full-async': 'ours:OursAsync', 'ours-normal-async': 'ours:OursNormalAsync', 'ours-postgres-async': 'ours:OursPostgresAsync',
    'ours-full-worker': 'ours:OursWorker', 'ours-normal-worker': 'ours:OursNormalWorker', 'ours-postgres-worker': 'ours:OursPostgresWorker',
    'huey': 'huey:Huey', 'pgqueuer': 'pgqueuer:PgQueuer', 'pgqueuer-async': 'pgqueuer:PgQueuerAsync', 'procrastinate': 'procrastinate:Procrastinate',
    'dbos-sqlite': 'dbos:DbosSqlite', 'dbos-postgres': 'dbos:DbosPostgres', 'saq': 'saq:Saq', 'saq-async': 'saq:SaqAsync',
    'celery': 'celery:Celery', 'celery-acks-late': 'celery:CeleryLate', 'dramatiq': 'dramatiq:Dramatiq',
    'fh-saas-0.9.14': 'released:Released', 'starlette': 'starlette:Plain', 'starlette-async': 'starlette:PlainAsync',
}

def load(key, place):
    module, cls = peers[key].split(':')
    return getattr(importlib.import_module(f'.{module}', __name__), cls)(key, place)
