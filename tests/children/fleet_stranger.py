"An app of the same host that knows none of the tasks of `fleet_app`"
import os
from fh_saas.db_host import HostDatabase
from fh_saas.jobs.settings import Settings
from fh_saas.workers.runner import Runner


def host(): return Runner(HostDatabase(os.environ['FLEET_HOST']), Settings(poll=0.5), sweep=5)
