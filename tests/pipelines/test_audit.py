"""Every decision has an audit record, and none can be removed, changed or moved unseen."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import KafkaProducer
from kafka_fixtures import KafkaNode
from serving import running, until
from tally import started_engine

from plinth.engine import ConfigError, InputError
from plinth.pipelines.cli.main import main
from plinth.pipelines.stream import audit
from plinth.pipelines.stream.audit import AuditTrail, Checked, check_trail
from plinth.pipelines.stream.chunks import Chunk, Layout, Message, Outputs, Partition
from plinth.pipelines.stream.history import follow
from plinth.pipelines.stream.history.rebuild import committed_records
from plinth.pipelines.stream.worker import StreamConfig, StreamError, run
from plinth.verticals.contract import Evidence, Written
from plinth.verticals.finance import FraudScoring, FraudSettings

KEY = b"a key of sixteen bytes or more"
CARD = "4111111111111111"
PAGE = "/ui/desk/finance"


def outputs(first: int, count: int, partition: int = 0, **answer: Any) -> Outputs:
    """A chunk of answers, the last a refusal."""
    records: list[Any] = [
        SimpleNamespace(topic="t", partition=partition, offset=n, timestamp=1_756_728_000_000)
        for n in range(first, first + count)
    ]
    value = json.dumps({"decision": "approve"} | answer).encode()
    messages = [Message(record, b"k", value, evidence={"x": 1.5}) for record in records]
    messages[-1] = Message(records[-1], error=InputError("no", field="f", reason="missing"))
    place = Partition("t", partition)
    return Outputs(Chunk(records, {place: first}, {place: first + count}), messages)


def trail(chunks: int = 3, key: bytes | None = None) -> list[bytes]:
    maker, made = AuditTrail("tests", key), []
    for number in range(chunks):
        chunk = outputs(number * 4, 4)
        maker.add(chunk)
        made += [raw for _, raw in chunk.audit]
    return made


def checked(records: list[bytes], key: bytes | None = None, known: Any = None) -> Checked:
    return check_trail(((str(n), raw) for n, raw in enumerate(records)), key, known)


def made_by(maker: AuditTrail) -> list[bytes]:
    chunk = outputs(0, 4)
    maker.add(chunk)
    return [raw for _, raw in chunk.audit]


TRAIL = trail(6)


def test_a_whole_trail_is_right_and_says_what_was_decided() -> None:
    found = checked(TRAIL)
    assert (found.records, found.wrong) == (24, 0)
    assert found.begins == {"t[0]": 0}
    first, last = json.loads(TRAIL[0]), json.loads(TRAIL[-1])
    assert (first["chain"], first["number"], first["offset"]) == ("t[0]", 0, 0)
    assert (first["answer"], first["evidence"]) == ({"decision": "approve"}, {"x": 1.5})
    assert last["refused"] == {"reason": "missing", "field": "f"}


@given(st.integers(0, 23), st.integers(0, 23), st.data())
def test_whatever_is_removed_changed_moved_or_repeated_is_found(
    one: int, other: int, data: st.DataObject
) -> None:
    known = {"t[0]": checked(TRAIL).ends["t[0]"]}
    assert checked(TRAIL[:one] + TRAIL[one + 1 :], known=known).wrong or one == 0
    assert checked(TRAIL[: one + 1] + TRAIL[one:]).wrong
    swapped = list(TRAIL)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    assert bool(checked(swapped).wrong) == (one != other)
    at = data.draw(st.integers(0, len(TRAIL[one]) - 1))
    other_byte = data.draw(st.integers(0, 255).filter(lambda b: b != TRAIL[one][at]))
    changed = TRAIL[one][:at] + bytes([other_byte]) + TRAIL[one][at + 1 :]
    assert checked([*TRAIL[:one], changed, *TRAIL[one + 1 :]]).wrong


def test_a_beginning_that_is_missing_is_told_and_an_end_only_by_what_was_noted() -> None:
    assert checked(TRAIL[4:]).begins == {"t[0]": 4}
    known = checked(TRAIL).ends
    assert not checked(TRAIL[:-1]).wrong
    assert "is not there" in checked(TRAIL[:-1], known=known).faults[0]
    grown = AuditTrail("tests", None)
    whole = [raw for _ in range(6) for raw in made_by(grown)]
    ends = checked(whole).ends
    assert not checked(whole + made_by(grown), known=ends).wrong
    assert "is not the one noted before" in checked(trail(7), known=ends).faults[0]


def test_without_the_key_nobody_writes_a_chain_anew() -> None:
    keyed = trail(key=KEY)
    assert not checked(keyed, KEY).wrong
    assert checked(trail(), KEY).wrong == 12
    assert checked(keyed).wrong == 12


def test_a_trail_goes_on_behind_what_was_committed() -> None:
    first, second = AuditTrail("tests", None), AuditTrail("tests", None)
    one, lost, again = outputs(0, 4), outputs(4, 4), outputs(4, 4)
    first.add(one)
    first.add(lost)  # its transaction was given up
    note = f"{Layout(4, 0).note()} {one.notes[Partition('t', 0)]}"
    second.resume({Partition("t", 0): note, Partition("t", 1): Layout(4, 0).note()})
    second.add(again)
    assert not checked([raw for part in (one, again) for _, raw in part.audit]).wrong
    assert Layout.read(note) == Layout(4, 0)


@pytest.mark.parametrize(
    "text",
    [
        *(CARD, f"order {CARD}", "4111-1111-1111-1111", f"m1:{CARD}", f'say "{CARD}", he said'),
        *(f"card {CARD}.", f"x.{CARD}", "4111.1111.1111.1111", "4111/1111/1111/1111"),
        *("4111 1111 1111 1111 123", "12 4111 1111 1111 1111", "4111  1111  1111  1111"),
        *(f"\x01{CARD}", f"caf\u00e9{CARD}"),
    ],
)
def test_what_looks_like_a_card_number_is_not_kept(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By the clock, one record in a thousand has these digits in its time or its hash.
    monkeypatch.setattr(audit, "time", SimpleNamespace(time=lambda: 1_756_728_000.0))
    maker, chunk = AuditTrail("tests", None), outputs(0, 2, note=text)
    maker.add(chunk)
    raw = chunk.audit[0][1].decode()
    assert "1111" not in raw
    assert "****" in json.loads(raw)["answer"]["note"]


PIECES = ('":0.5,', '":0.', "x", '"', "\\", ":", "},", "{", "say ", "\n")


@given(st.lists(st.sampled_from(PIECES)), st.lists(st.sampled_from(PIECES)))
def test_a_card_number_is_found_whatever_stands_around_it(
    before: list[str], after: list[str]
) -> None:
    text = "".join(before).removesuffix("0.") + CARD + "".join(after)
    maker, chunk = AuditTrail("tests", None), outputs(0, 2, note=text, score=0.25)
    maker.add(chunk)
    assert CARD not in chunk.audit[0][1].decode()


def test_measures_are_kept_as_they_are_and_their_names_are_looked_at() -> None:
    maker, chunk = AuditTrail("tests", None), outputs(0, 3)
    measures = {"sum_7d": 0.30000001192092896, "sum_30d": 41111111.11111111}
    chunk.messages[0] = replace(chunk.messages[0], evidence={"id": CARD, "features": measures})
    chunk.messages[1] = replace(chunk.messages[1], evidence={"features": {CARD: 0.5}})
    maker.add(chunk)
    first, second = (json.loads(raw)["evidence"] for _, raw in chunk.audit[:2])
    assert first == {"id": "*" * 16, "features": measures}
    assert second == {"features": {"*" * 16: 0.5}}


def test_numbers_times_and_ids_that_are_no_card_numbers_stay() -> None:
    told = {"at": 1764126000123456, "score": 0.4111111111111111, "id": "4111111111111112"}
    told["when"] = "2026-11-26 03:14:15.926535"
    maker, chunk = AuditTrail("tests", None), outputs(0, 2, **told)
    maker.add(chunk)
    assert json.loads(chunk.audit[0][1])["answer"] == {"decision": "approve"} | told


def test_a_number_below_one_hides_no_card_number_beside_it() -> None:
    maker, chunk = AuditTrail("tests", None), outputs(0, 3)
    value = b'{"score":0.4111111111111111,"card":%b,"told":":0.1 %b","n":0.5}'
    for message in chunk.messages[:2]:
        message.value = value % (CARD.encode(), CARD.encode())
    maker.add(chunk)
    told = json.loads(chunk.audit[0][1])["answer"]
    stars = "*" * len(CARD)
    assert told == {"score": 0.4111111111111111, "card": stars, "told": f":0.1 {stars}", "n": 0.5}


@pytest.mark.parametrize("pan", [int(CARD), float(CARD), -int(CARD), -float(CARD)])
def test_a_card_number_as_a_number_is_not_kept(pan: float) -> None:
    maker, chunk = AuditTrail("tests", None), outputs(0, 2, pan=pan, pans=[pan, 5])
    maker.add(chunk)
    told = json.loads(chunk.audit[0][1])["answer"]
    assert told["pan"] == "*" * 16
    assert told["pans"] == ["*" * 16, 5]


def test_a_text_of_many_card_numbers_is_read_once() -> None:
    """Each hit once cost a look at all that stood before it: 43 s for a megabyte."""
    maker, chunk = AuditTrail("tests", None), outputs(0, 2, note=f"{CARD}," * 20_000)
    begun = time.process_time()
    maker.add(chunk)
    assert time.process_time() - begun < 5
    assert CARD not in chunk.audit[0][1].decode()


@pytest.mark.clock
@pytest.mark.parametrize("text", [f"{CARD},", CARD, "411 ", '"', "\\", "0123456789abcdef-"])
def test_the_time_to_clean_grows_with_the_length_alone(text: str) -> None:
    def seconds(size: int) -> float:
        took = []
        for _ in range(3):
            maker, chunk = AuditTrail("tests", None), outputs(0, 2, note=text * (size // len(text)))
            started = time.process_time()
            maker.add(chunk)
            took.append(time.process_time() - started)
        return min(took)

    assert seconds(640_000) < 100 * seconds(40_000)


@given(st.text("0123456789abcdef", min_size=48, max_size=48))
def test_digests_stay_as_they_are(middle: str) -> None:
    digest = f"a{CARD}{middle[:47]}"
    maker, chunk = AuditTrail("tests", None), outputs(0, 2, digest=digest)
    maker.resume({Partition("t", 0): f"plinth 1 0 7:{digest}"})
    maker.add(chunk)
    told = json.loads(chunk.audit[0][1])
    assert (told["answer"]["digest"], told["previous"]) == (digest, digest)


def test_what_a_vertical_wrote_itself_is_searched_where_a_sender_could_have_written() -> None:
    maker, chunk = AuditTrail("tests", None), outputs(0, 4)
    plain = b'{"score":0.4111111111111111,"id":"%b"}'
    numbers = b'"features":{"sum":41111111111111.5}'
    for place, own in enumerate((b"x1", CARD.encode(), b"")):
        told = Evidence(b'"terminal":"%b"' % own, numbers, b'%b"%b' % (own, own))
        chunk.messages[place] = replace(chunk.messages[place], value=plain % own, evidence=told)
    maker.add(chunk)
    found = [json.loads(raw) for _, raw in chunk.audit[:3]]
    for one, clean in zip(found, ("x1", "*" * 16, ""), strict=True):
        assert one["answer"] == {"score": 0.4111111111111111, "id": clean}
        assert one["evidence"] == {"terminal": clean, "features": {"sum": 41111111111111.5}}
    assert checked([raw for _, raw in chunk.audit]).wrong == 0


def test_finance_says_features_thresholds_and_versions_but_no_card() -> None:
    from plinth.verticals.testing.flows import drive

    vertical = FraudScoring(FraudSettings(rates={"EUR": 1.0}))
    vertical.audited = True
    models = {model.spec.name: model.run for model in vertical.models()}
    request, chunk = vertical.example(), outputs(0, 2)
    (made,) = drive(
        vertical.answers([request]),
        lambda call: next(iter(models[call.model]({"features": call.rows}).values())),
    )
    assert isinstance(made, Written)
    chunk.messages[0] = Message(chunk.messages[0].record, made.key, made.value, None, (), made[2])
    AuditTrail("tests", None).add(chunk)
    told = json.loads(chunk.audit[0][1])
    evidence = told["evidence"]
    assert evidence["features"]["amount"] == 42.5
    assert evidence["thresholds"].keys() == {"review", "decline"}
    assert len(evidence["model_digest"]) >= 32
    assert evidence["record"]["terminal_id"] == request.terminal_id
    assert request.card not in json.dumps(told)


# -- on a real Kafka -----------------------------------------------------------------------
def payments(count: int) -> list[tuple[bytes, bytes]]:
    base = json.loads(FraudScoring().example().model_dump_json())
    made = []
    for n in range(count):
        record = base | {"transaction_id": f"x{n}", "card": f"tok_{n % 7}", "amount": 10.0 + n}
        made.append((record["card"].encode(), json.dumps(record).encode()))
    return made


def stream(config: StreamConfig, **settings: Any) -> None:
    vertical = FraudScoring(FraudSettings(card_numbers_in_ids="allow", **settings))
    with started_engine(vertical) as engine:
        run(vertical, engine, config, threading.Event())


@pytest.mark.slow
@pytest.mark.kafka
def test_a_stream_keeps_one_trail_over_its_restarts(
    kafka_node: KafkaNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("AUDIT_KEY", KEY.decode())
    config = kafka_node.config(
        partitions=2, max_events=150, audit_topic="audit-of-restarts", audit_key_env="AUDIT_KEY"
    )
    numbered = json.loads(payments(1)[0][1]) | {"transaction_id": CARD}
    odd = [(b"k", b"{oops"), (b"k", json.dumps(numbered).encode())]
    kafka_node.fill(config, payments(298) + odd)
    for _ in range(2):
        stream(config)
    raws = [record.value for record in committed_records(config, "audit-of-restarts")]
    found = check_trail(((str(n), raw) for n, raw in enumerate(raws)), KEY)
    assert (found.records, found.wrong, len(found.ends)) == (300, 0, 2)
    told = [json.loads(raw) for raw in raws]
    answers = {a["transaction_id"]: a for a in kafka_node.answers(config)}
    audited = {t["answer"]["transaction_id"]: t for t in told if "answer" in t}
    hidden = audited.pop("*" * 16)
    assert hidden["answer"]["score"] == answers.pop(CARD)["score"]
    assert {name: one["answer"] for name, one in audited.items()} == answers
    assert [t["refused"]["reason"] for t in told if "refused" in t] == ["malformed_json"]
    assert CARD not in b"".join(raws).decode()
    assert not any(b"tok_" in raw for raw in raws)

    monkeypatch.chdir(tmp_path)
    table = {"audit_key_env": "AUDIT_KEY", "audit_topic": "audit-of-restarts",
             "bootstrap_servers": kafka_node.servers, "input_topic": config.input_topic,
             "output_topic": config.output_topic}  # fmt: skip
    lines = "\n".join(f'{name} = "{value}"' for name, value in table.items())
    Path("plinth.toml").write_text(f"[stream]\n{lines}\n")

    def audit(*words: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["audit", *words])
        return int(end.value.code or 0)

    assert audit("export", "audit.jsonl") == 0
    assert audit("verify", "audit.jsonl", "--heads", "heads.json") == 0
    assert audit("verify", "--heads", "heads.json") == 0
    whole = Path("audit.jsonl").read_text().splitlines()
    Path("audit.jsonl").write_text("\n".join(whole[:10] + whole[11:]))
    assert audit("verify", "audit.jsonl", "--heads", "heads.json") == 1
    assert "records were removed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.kafka
def test_an_audit_topic_with_too_few_partitions_is_said(kafka_node: KafkaNode) -> None:
    config = kafka_node.config(partitions=2, audit_topic="narrow", max_events=40)
    kafka_node.create("narrow", 1)
    kafka_node.fill(config, payments(40))
    with pytest.raises(StreamError, match="narrow has 1 partitions"):
        stream(config)
    assert kafka_node.answers(config) == []


def test_a_trail_needs_transactions_and_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = {"input_topic": "a", "output_topic": "b", "audit_topic": "c"}
    with pytest.raises(ValueError, match="exactly_once"):
        StreamConfig(**topics, guarantee="at_least_once")
    with pytest.raises(ValueError, match="must differ"):
        StreamConfig(**topics | {"audit_topic": "b"})
    monkeypatch.delenv("AUDIT_KEY", raising=False)
    config = StreamConfig(**topics, audit_key_env="AUDIT_KEY")
    with pytest.raises(ConfigError, match="AUDIT_KEY"):
        stream(config)


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.needs("jinja2")
def test_a_desk_shows_what_workers_decided_and_they_hear_its_labels(
    kafka_node: KafkaNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come as they are committed, with the customer's history; a key press is a record."""
    monkeypatch.setattr(follow, "AGAIN_SECONDS", (0.05, 0.05))
    config = kafka_node.config(partitions=1, audit_topic="audit-of-a-desk", max_events=40)
    looked_at = {"review_threshold": 1e-7, "decline_threshold": 1.0}
    table = config.model_dump(mode="json", exclude_unset=True)
    vertical = FraudScoring(FraudSettings(**looked_at))
    with running({"finance": vertical}, serve={"web": True}, stream=table) as server:

        def ask(path: str, **query: Any) -> Any:
            return server.client.get(f"/v1/finance/{path}", params=query).json()

        def tape() -> str:
            with server.client.stream("GET", f"{PAGE}/live") as events:
                return next(text for text in events.iter_text() if "stream workers" in text)

        until(lambda: "are not read now: there is no topic audit-of-a-desk" in tape())
        kafka_node.fill(config, payments(40))
        stream(config, **looked_at)
        until(lambda: "With 40 decisions of stream workers" in tape())
        alerts = ask("alerts", limit=500)["alerts"]
        assert [one["transaction_id"] for one in alerts] == [f"x{n}" for n in range(39, -1, -1)]
        case = ask(f"alerts/{alerts[0]['id']}")
        assert (case["decided_by"], case["card"]) == ("stream", None)
        assert case["features"]["amount"] == alerts[0]["amount"] == 49.0
        assert [past["transaction_id"] for past in case["history"]] == [
            one["transaction_id"] for one in alerts
        ]
        page = server.client.get(PAGE, params={"alert": alerts[0]["id"]}).text
        assert "decided by a stream worker" in page
        assert "tok_" not in page + json.dumps(case)

        label = server.post(f"/v1/finance/alerts/{alerts[0]['id']}/label", json={"fraud": True})
        assert label.json()["label"] == "fraud", label.text
        assert ask("alerts", labelled=True)["alerts"][0]["id"] == alerts[0]["id"]
        sent = json.loads(kafka_node.read(config.input_topic)[-1].value)
        assert (sent["transaction_id"], sent["fraud"]) == ("x39", True)
        genuine = sent | {"transaction_id": "x38", "fraud": False}
        kafka_node.fill(config, [(None, json.dumps(genuine).encode())])
        stream(config.model_copy(update={"max_events": 2}), **looked_at)
        assert [one["decision"] for one in kafka_node.answers(config)[-2:]] == ["noted", "noted"]
        until(lambda: ask(f"alerts/{alerts[1]['id']}")["alert"]["label"] == "genuine")

    monkeypatch.setattr(follow, "MOST", 30)
    late = follow.Follower(config, {"finance": vertical})
    late.start(lambda take: take())
    until(lambda: late.told.heard > 20)
    late.close(60)
    assert late.told.heard <= 30, "what is older is not read at a start"

    monkeypatch.setattr(follow, "MOST", 5_000)
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.1)
    again = follow.Follower(config, {"finance": FraudScoring(FraudSettings(**looked_at))})
    again.start(lambda take: take())
    kept = len(kafka_node.read("audit-of-a-desk"))
    until(lambda: again.told.heard + again.told.unusable == kept)
    heard, unusable = again.told.heard, again.told.unusable
    kafka_node.grow("audit-of-a-desk", 2)
    with contextlib.closing(KafkaProducer(bootstrap_servers=kafka_node.servers)) as producer:
        producer.send("audit-of-a-desk", b"no record", partition=1).get(60)
    until(lambda: again.told.unusable > unusable)
    again.close(60)
    assert again.told.heard == heard, "the next consumer hears nothing again"
