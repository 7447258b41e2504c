"""Send payments to a topic and read the decisions, each exactly once.

plinth stream finance --input-topic payments --output-topic decisions
python examples/kafka_client.py payment.json
"""

import json
import sys
import time
from pathlib import Path

from kafka import KafkaConsumer, KafkaProducer

BROKERS = "kafka-1:9092"
COUNT = 10
SECONDS = 60.0


def main() -> None:
    """Send ten payments under new ids; print the decision of each."""
    payment = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else "payment.json").read_text())
    run = f"{time.time():.0f}"
    wanted = {f"{run}-{number}" for number in range(COUNT)}
    producer = KafkaProducer(bootstrap_servers=BROKERS, enable_idempotence=True)
    for name in sorted(wanted):
        record = json.dumps(payment | {"transaction_id": name}).encode()
        producer.send("payments", record, key=payment["card"].encode())  # one card, one order
    producer.flush(30)
    producer.close()

    # Decisions of aborted transactions are not decisions: read committed ones only.
    consumer = KafkaConsumer(
        "decisions",
        bootstrap_servers=BROKERS,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
    )
    until = time.monotonic() + SECONDS
    while wanted and time.monotonic() < until:
        for records in consumer.poll(timeout_ms=500).values():
            for record in records:
                decision = json.loads(record.value)
                if decision["transaction_id"] in wanted:
                    wanted.remove(decision["transaction_id"])
                    print(decision["transaction_id"], decision["decision"])
    consumer.close()
    if wanted:
        sys.exit(f"{len(wanted)} payments were not answered in {SECONDS:g} s")


if __name__ == "__main__":
    main()
