"One of these fails on purpose, and one is skipped: the demo shows both."
import pytest
from prices import shown, with_vat

@pytest.mark.parametrize('cents,expected', [(100, 119), (1000, 1190), (99, 118)])
def test_vat(cents, expected): assert with_vat(cents) == expected

def test_shown(): assert shown(1205) == '12.05'

def test_negative_prices(): assert shown(-50) == '-0.50'

@pytest.mark.skip(reason="the shop sells in one country")
def test_other_countries(): assert with_vat(100, 25) == 125
