"""Background jobs for FastHTML apps in which every customer has a database of their own

A route answers at once and the slow work goes on behind it: an import, an export, a sync, a scan, a report. The job is a row in the customer's own database. It runs after the response, is repeated when it fails, reports its progress, survives a killed process, and needs no broker.

Modules:

- `fh_saas.db_connect`: Every connection of fh_saas is opened here, with its promises set on purpose.
- `fh_saas.db_host`: The one registry of tenants, and the two helpers every row is made with.
- `fh_saas.db_tenant`: One database per tenant: created, found, opened, suspended and deleted by the tenant's id.
- `fh_saas.jobs.agenda`: When an engine looks at which database.
- `fh_saas.jobs.allotment`: How much a database may claim now, and who waits for room.
- `fh_saas.jobs.arguments`: What a task takes, by its signature: checked when a job is submitted, and given back as the types it names.
- `fh_saas.jobs.asking`: How a job is doing, how it ended, and what it gave.
- `fh_saas.jobs.attempt`: One execution of a claimed job, from its arguments to its outcome.
- `fh_saas.jobs.bell`: How a process that runs jobs learns within a millisecond that another has submitted one.
- `fh_saas.jobs.candidates`: Which jobs are due, in which order, and when to look again.
- `fh_saas.jobs.child`: What runs at the other end of the pipe.
- `fh_saas.jobs.claims`: A job becomes one process's, within the limits that hold.
- `fh_saas.jobs.commit`: Short transactions of our own, shared by all who write at the same moment.
- `fh_saas.jobs.connections`: One to write on, a few to read with, to a file or server that may be replaced meanwhile.
- `fh_saas.jobs.context`: What a running task can say about itself, and learn about its job.
- `fh_saas.jobs.control`: What a person may do to a job: cancel it, try it again, move it, delete it.
- `fh_saas.jobs.desk`: What one process knows and does about the jobs of one database.
- `fh_saas.jobs.drivers`: Statements that are compiled once, and where SQLite and PostgreSQL differ.
- `fh_saas.jobs.ends`: What an attempt came to is recorded once, by the one that owns the job.
- `fh_saas.jobs.engine`: Claim, attempt, record, in threads of its own.
- `fh_saas.jobs.events`: What happens to jobs, told to whoever wants to know, after it is on the disk.
- `fh_saas.jobs.following`: A job in a transaction that is still open: looked for until it is there, or is known never to be.
- `fh_saas.jobs.handles`: A job that is awaited by its response, and async jobs in an event loop.
- `fh_saas.jobs.heartbeats`: What a process sees to while its jobs run.
- `fh_saas.jobs.isolation`: An attempt in a process of its own: what it breaks is its own, and it can be killed.
- `fh_saas.jobs.joining`: A job that is written into a transaction of the app's: it exists exactly if the rows beside it do.
- `fh_saas.jobs.lanes`: Jobs that compute in Python leave the interpreter to others.
- `fh_saas.jobs.leases`: While a job runs its process says so; who says nothing loses it.
- `fh_saas.jobs.line`: Jobs that are claimed and wait for a thread, and how many more there is room for.
- `fh_saas.jobs.marks`: How far a database has come, and what of that is on the disk and known to the host.
- `fh_saas.jobs.masking`: Secrets are not shown: not in an error, not in a log line, not on a page.
- `fh_saas.jobs.model`: One definition of the job tables, for new databases and for those of older releases.
- `fh_saas.jobs.notes`: Of many notes that say the same within a few milliseconds, one is written.
- `fh_saas.jobs.notice`: What is said around a commit, so that somebody looks after a new job.
- `fh_saas.jobs.options`: What may be said of a job besides its arguments, and how it is checked.
- `fh_saas.jobs.pages`: Browse and search any number of jobs, a page at a time, and count them, in a time that does not grow with the table.
- `fh_saas.jobs.payload`: What goes into a row is checked before it is written, and fits.
- `fh_saas.jobs.pool`: Threads that never hold up the end of a process.
- `fh_saas.jobs.process`: Managers that were not given an engine share the one of their process.
- `fh_saas.jobs.recorder`: An outcome's way to the disk, which ends well or is known to have ended badly.
- `fh_saas.jobs.registered`: Which processes are alive that run jobs, and which tasks they know, as far as the host can say.
- `fh_saas.jobs.renewal`: A process says that it lives, and hears what became of its jobs.
- `fh_saas.jobs.retries`: How long a failed job waits, and how a task says what its failure means.
- `fh_saas.jobs.ring`: Whose turn is next, when many databases want one.
- `fh_saas.jobs.rounds`: What a thread of the engine does next.
- `fh_saas.jobs.rules`: Limits, weights, quotas and pauses: written in the host while everything runs, and obeyed by every process within two seconds.
- `fh_saas.jobs.settings`: How an engine works, in a handful of numbers.
- `fh_saas.jobs.states`: What a job can be, and which moves between states exist.
- `fh_saas.jobs.statistics`: How many jobs wait, for how long, and how long they take: by queue and by task.
- `fh_saas.jobs.steering`: Cancel, retry, rerun, move and delete jobs, one or many.
- `fh_saas.jobs.stopping`: An engine ends in bounded time, and leaves no job behind.
- `fh_saas.jobs.store`: All SQL of the job system, over SQLite and PostgreSQL, behind one contract.
- `fh_saas.jobs.tasks`: Functions under stable names, checked against what they are called with.
- `fh_saas.jobs.tenancy`: What the host says about a tenant, and whether the tenant's database is the one the host knows.
- `fh_saas.jobs.unique`: Two clicks, one job: the same one is not submitted twice, however many submit at once.
- `fh_saas.jobs.waiting`: What keeps a pending job from running now, in words for an operator.
- `fh_saas.jobs.wake`: The host's note that a tenant has something due.
- `fh_saas.ops.cli`: `fh-saas`: run a worker, and change what it may do while it runs.
- `fh_saas.ops.cli_jobs`: `fh-saas jobs`, `job`, `stats`, `cancel`, `retry`, `rerun`, `move`, `remove`: a tenant's jobs, seen and steered by an operator.
- `fh_saas.ops.copies`: Copy a tenant's database while it is in use, and put a copy back.
- `fh_saas.ops.tenants`: Which tenants there are, and what is wrong with them.
- `fh_saas.ops.terminal`: What the commands of `fh-saas` have in common.
- `fh_saas.ops.upgrades`: Bring the databases of all tenants up to date, while everything runs.
- `fh_saas.pytest_plugin`: Fixtures for the tests of an app, found by pytest as soon as fh_saas is installed.
- `fh_saas.testing`: Jobs in the tests of an app: nothing runs by itself, nothing sleeps, and the clock is yours.
- `fh_saas.utils_bgtsk`: The door: submit a job from a route, and ask how it is doing.
- `fh_saas.web.access`: Who asks, for which tenant, and what they may do: decided once for every page, call, action and stream.
- `fh_saas.web.api`: Start a task with one POST, watch it at the URL that comes back, and steer it: for scripts, for other programs, and for an app's own JavaScript.
- `fh_saas.web.audit`: Who did what: each act of a person on jobs, queues, workers and tenants, written into the host.
- `fh_saas.web.components`: A job on a page of yours: a button that starts it, a bar that moves, and what has become of it when the user comes back.
- `fh_saas.web.directory`: From a tenant's id to the manager of its jobs, without opening more than is asked for.
- `fh_saas.web.facts`: A job as the API sends it, and in the words that pages use.
- `fh_saas.web.joblist`: Find a job among a million, and act on one, on some, or on all that match.
- `fh_saas.web.jobpage`: All there is to know about one job, and what can be done with it.
- `fh_saas.web.layout`: What all pages of the dashboard have in common: head, navigation, and a content security policy that they live under.
- `fh_saas.web.live`: A page learns of a change when it happens: one stream for all the jobs on it, and a socket for a monitor.
- `fh_saas.web.openapi`: What the API takes and gives, for tools that read OpenAPI 3.1: made from the tasks' signatures, so it cannot be out of date.
- `fh_saas.web.operations`: What an admin steers: every process that runs jobs, every queue, every tenant.
- `fh_saas.web.overview`: Is all well? What waits, for how long, and how the last hour has been.
- `fh_saas.web.parts`: What the components of a page ask for while it is open, and what their buttons do.
- `fh_saas.web.problems`: What a request gets when it cannot have what it asked for: the same few forms everywhere, and a machine can read them.
- `fh_saas.web.serving`: Routes of the job system inside the host app: its Beforeware, its session and its lifespan hold for them, too.
- `fh_saas.web.setup`: One line where a FastHTML app is made: jobs start and stop with it, no task of a response is lost, and there is an API, a dashboard, and all that components need.
- `fh_saas.web.tags`: The elements that pages of jobs are made of: FT like FastHTML's own, and quick enough for a table of fifty jobs.
- `fh_saas.workers.fleet`: Every process that runs jobs for a host, as the host knows it.
- `fh_saas.workers.lookout`: One process, ten thousand tenants: it hears of those who have something due, and visits them.
- `fh_saas.workers.runner`: The engine as a part of the web process: it starts and stops with the app and serves all tenants of a host.
- `fh_saas.workers.watch`: A process hears within a millisecond that somebody has submitted a job.
- `fh_saas.workers.worker`: The engine in a process of its own: it runs the jobs of all tenants of a host, and serves no pages."""

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
