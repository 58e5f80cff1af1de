"The full loop: 50 kill -9 over 1,000 jobs in four tenants. Minutes; run it with `python -m pytest tests/soak_kill.py -s`."
import os, time
from test_crash import check, four_tenants, torture  # noqa: F401
import pytest


@pytest.mark.soak
def test_fifty_kills_over_a_thousand_jobs(four_tenants, capsys):
    kills, jobs, seed = int(os.environ.get('FH_SAAS_SOAK_KILLS', 50)), int(os.environ.get('FH_SAAS_SOAK_JOBS', 1000)), time.time_ns()
    figures = check(four_tenants, torture(four_tenants, kills, jobs, seed), jobs)
    with capsys.disabled(): print('', figures, f'seed {seed}')
