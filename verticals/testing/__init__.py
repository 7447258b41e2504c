"""What the author of a vertical runs: drive a flow by hand, drive it with real models, and
check a whole vertical against the contract.

::

    assert feed(vertical.infer([example]), torch.tensor([[0.9]])) == [...]
    print(check_vertical(vertical))

or, one test per clause of the contract::

    @pytest.mark.parametrize("check", checks(MyVertical()), ids=str)
    def test_contract(check):
        check()
"""

from plinth.verticals.testing.flows import drive, feed, run_with_models
from plinth.verticals.testing.kit import Check, Outcome, Report, check_vertical, checks
from plinth.verticals.testing.source import devices_named

__all__ = [
    "Check",
    "Outcome",
    "Report",
    "check_vertical",
    "checks",
    "devices_named",
    "drive",
    "feed",
    "run_with_models",
]
