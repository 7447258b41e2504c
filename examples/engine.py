"""Score payments in your own process: a vertical and an engine, no server.

python examples/engine.py
"""

from plinth import Engine, InputError
from plinth.finance import FraudScoring


def main() -> None:
    """Score two payments in one call and tell what was decided, and where the time went."""
    vertical = FraudScoring()
    small = vertical.example()
    large = small.model_copy(update={"transaction_id": "x2", "amount": 7500.0})
    with Engine() as engine:
        for model in vertical.models():
            engine.add(model, sla=vertical.sla)
        answer = engine.run(vertical.infer([small, large]), vertical.sla)
    for decision in answer.value:
        if isinstance(decision, InputError):  # one that is wrong leaves the others alone
            print("refused:", decision)
        else:
            print(decision.transaction_id, decision.decision, decision.score)
    print(answer.timing.as_dict())


if __name__ == "__main__":
    main()
