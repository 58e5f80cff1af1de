"""Background jobs for FastHTML apps in which every customer has a database of their own

A route answers at once and the slow work goes on behind it: an import, an export, a sync, a scan, a report. The job is a row in the customer's own database. It runs after the response, is repeated when it fails, reports its progress, survives a killed process, and needs no broker.

Modules:

- `fh_saas.db_host`: The one registry of tenants, and the two helpers every row is made with.
- `fh_saas.db_tenant`: One database per tenant: created, found, opened, suspended and deleted by the tenant's id.
- `fh_saas.jobs.arguments`: What a task takes, by its signature: checked when a job is submitted, and given back as the types it names.
- `fh_saas.jobs.asking`: How a job is doing, how it ended, and what it gave.
- `fh_saas.jobs.child`: What runs at the other end of the pipe.
- `fh_saas.jobs.context`: What a running task can say about itself, and learn about its job.
- `fh_saas.jobs.engine`: Claim, attempt, record, in threads of its own.
- `fh_saas.jobs.events`: What happens to jobs, told to whoever wants to know, after it is on the disk.
- `fh_saas.jobs.following`: A job in a transaction that is still open: looked for until it is there, or is known never to be.
- `fh_saas.jobs.isolation`: An attempt in a process of its own: what it breaks is its own, and it can be killed.
- `fh_saas.jobs.joining`: A job that is written into a transaction of the app's: it exists exactly if the rows beside it do.
- `fh_saas.jobs.masking`: Secrets are not shown: not in an error, not in a log line, not on a page.
- `fh_saas.jobs.notice`: What is said around a commit, so that somebody looks after a new job.
- `fh_saas.jobs.pages`: Browse and search any number of jobs, a page at a time, and count them, in a time that does not grow with the table.
- `fh_saas.jobs.registered`: Which processes are alive that run jobs, and which tasks they know, as far as the host can say.
- `fh_saas.jobs.retries`: How long a failed job waits, and how a task says what its failure means.
- `fh_saas.jobs.statistics`: How many jobs wait, for how long, and how long they take: by queue and by task.
- `fh_saas.jobs.steering`: Cancel, retry, rerun, move and delete jobs, one or many.
- `fh_saas.jobs.tasks`: Functions under stable names, checked against what they are called with.
- `fh_saas.jobs.unique`: Two clicks, one job: the same one is not submitted twice, however many submit at once.
- `fh_saas.jobs.waiting`: What keeps a pending job from running now, in words for an operator.
- `fh_saas.ops.cli_jobs`: `fh-saas jobs`, `job`, `stats`, `cancel`, `retry`, `rerun`, `move`, `remove`: a tenant's jobs, seen and steered by an operator.
- `fh_saas.pytest_plugin`: Fixtures for the tests of an app, found by pytest as soon as fh_saas is installed.
- `fh_saas.testing`: Jobs in the tests of an app: nothing runs by itself, nothing sleeps, and the clock is yours.
- `fh_saas.utils_bgtsk`: The door: submit a job from a route, and ask how it is doing.
- `fh_saas.web.access`: Who asks, for which tenant, and what they may do: decided once for every page, call, action and stream.
- `fh_saas.web.api`: Start a task with one POST, watch it at the URL that comes back, and steer it: for scripts, for other programs, and for an app's own JavaScript.
- `fh_saas.web.audit`: Who did what: each act of a person on jobs, queues, workers and tenants, written into the host.
- `fh_saas.web.components`: A job on a page of yours: a button that starts it, a bar that moves, and what has become of it when the user comes back.
- `fh_saas.web.directory`: From a tenant's id to the manager of its jobs, without opening more than is asked for.
- `fh_saas.web.facts`: A job as the API sends it, and in the words that pages use.
- `fh_saas.web.layout`: What all pages of the dashboard have in common: head, navigation, and a content security policy that they live under.
- `fh_saas.web.live`: A page learns of a change when it happens: one stream for all the jobs on it, and a socket for a monitor.
- `fh_saas.web.operations`: What an admin steers: every process that runs jobs, every queue, every tenant.
- `fh_saas.web.parts`: What the components of a page ask for while it is open, and what their buttons do.
- `fh_saas.web.problems`: What a request gets when it cannot have what it asked for: the same few forms everywhere, and a machine can read them.
- `fh_saas.web.serving`: Routes of the job system inside the host app: its Beforeware, its session and its lifespan hold for them, too.
- `fh_saas.web.setup`: One line where a FastHTML app is made: jobs start and stop with it, no task of a response is lost, and there is an API, a dashboard, and all that components need.
- `fh_saas.web.tags`: The elements that pages of jobs are made of: FT like FastHTML's own, and quick enough for a table of fifty jobs.
- `fh_saas.workers.runner`: The engine as a part of the web process: it starts and stops with the app and serves all tenants of a host."""

__version__ = "0.10.0"

# The names that apps use, imported when they are first asked for: `import fh_saas` alone stays light.
_names = {n: m for m, names in dict(
    db_connect='FhSaasError DatabaseBusy DatabaseUnavailable', db_host='HostDatabase SystemJob TenantNotFound timestamp gen_id', utils_bgtsk='BackgroundTaskManager TenantJob',
    db_tenant='get_or_create_tenant_db open_tenant_db delete_tenant suspend_tenant resume_tenant TenantSuspended',
    **{'jobs.tasks': 'task UnknownTask', 'jobs.options': 'Unique InvalidJob', 'jobs.unique': 'NotUnique', 'jobs.retries': 'TaskSignal Permanent RetryAfter Snooze Cancel TimedOut',
    'jobs.states': 'Priority Status', 'jobs.context': 'JobContext current_job', 'jobs.events': 'events Event', 'jobs.settings': 'Settings', 'jobs.store': 'JobNotFound QuotaExceeded',
    'jobs.asking': 'JobFailed StillRunning', 'jobs.control': 'WrongState', 'jobs.arguments': 'BadPayload', 'jobs.masking': 'hide', 'jobs.notice': 'QueueClosed', 'jobs.tenancy': 'rules_of', 'ops.upgrades': 'migrate_tenants', 'ops.copies': 'export_tenant restore_tenant', 'workers.runner': 'Runner', 'web.setup': 'setup_jobs',
    'web.access': 'Access', 'web.components': 'JobButton JobBanner JobProgress JobStatus JobResult JobList'}).items() for n in names.split()}
__all__ = ['__version__', *_names]

def __getattr__(name):
    if name not in _names: raise AttributeError(f"module 'fh_saas' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f'fh_saas.{_names[name]}'), name)

def __dir__(): return __all__
