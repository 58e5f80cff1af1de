"The wake protocol with more processes than the suite has time for: 4.4 million states."
import pytest
from test_wake import Search, wakes

@pytest.mark.parametrize('submitters,visitors', [(3, 2), (2, 3)])
def test_no_interleaving_and_no_crash_hides_a_job(wakes, submitters, visitors): assert Search(wakes, submitters, visitors).run() > 1_000_000
