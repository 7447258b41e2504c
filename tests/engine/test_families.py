"""Model families: from a config to answers, the same on every backend, whatever the padding."""

import re
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plinth.engine import Call, Engine, InputError, ModelError, ModelStore
from plinth.engine.backends import prepare
from plinth.engine.devices.device import pick
from plinth.engine.models.families import families, find, planes, volumes
from plinth.engine.models.signature import apart, check_rows

pytestmark = pytest.mark.cpu
ALL = pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
TEXTS = ("bert", "distilbert", "gpt2", "llama")


@ALL
def test_rows_are_answered_alone_as_beside_others(family):
    model = family.model(family.small)
    answers = check_rows(model.run, dict(model.example), family.name)
    for tensor in model.spec.outputs:
        shape = tuple(answers[tensor.name].shape[1:])
        assert len(shape) == len(tensor.shape)
        assert all(want in (None, size) for want, size in zip(tensor.shape, shape, strict=True))


@ALL
def test_a_model_comes_back_from_the_store(family, tmp_path):
    model = family.model(family.small, name="mine", version="2", seed=7)
    store = ModelStore(tmp_path)
    store.save(model.spec, model.module)
    loaded = store.load("mine")
    assert loaded.spec == model.spec
    for name, want in model.run(model.example).items():
        assert torch.equal(loaded.run(model.example)[name], want)


BACKENDS = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.needs("openvino"))]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "unet3d"])
def test_every_backend_agrees_with_eager(name, backend):
    """Two of them; ``benchmarks/families.py`` holds all families against eager."""
    family = find(name)
    model = family.model(family.small)
    ready = prepare(model, pick("cpu"), "fp32", backend)
    assert ready.backend == backend
    for rows in (1, 3):
        given = model.rows(rows)
        for name, want in model.run(given).items():
            assert apart(ready.run(given)[name], want) <= 1e-4


@pytest.mark.parametrize("widths", [[4, 8], [4, 8, 12]])
@pytest.mark.parametrize("size", [(4, 8, 12), (20, 16, 8), (36, 12, 20)])
def test_a_large_volume_is_computed_a_few_planes_at_a_time(monkeypatch, widths, size):
    net = find("unet3d").model({"widths": widths, "channels": 2}, seed=1).module
    for number, norm in enumerate(each for each in net.modules() if hasattr(each, "running_var")):
        torch.manual_seed(number)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    volume = torch.randn(2, 2, *size)
    seen = []
    convolved = planes.convolved

    def watched(layer, piece, apart=None):
        made = convolved(layer, piece, apart)
        seen.append(made.shape[2])
        return made

    monkeypatch.setattr(planes, "convolved", watched)
    with torch.inference_mode():
        whole = net(volume)
        assert not seen
        monkeypatch.setattr(volumes, "LARGE", 0)
        for part in (1, volumes.PART):  # the smallest parts, and all in one
            monkeypatch.setattr(volumes, "PART", part)
            assert torch.allclose(net(volume), whole, atol=1e-5)
    assert seen
    assert max(seen) <= planes.PLANES


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 9), padding=st.integers(0, 9), seed=st.integers(0, 99))
def test_padding_never_changes_an_answer(name, length, padding, seed):
    """Neither its length nor what stands in it."""
    family = find(name)
    model = family.model(family.small)
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (2, length + padding), generator=noise)
    mask = (torch.arange(length + padding) < length).long().expand(2, -1)
    padded = model.run({"input_ids": ids, "attention_mask": mask})
    alone = model.run({"input_ids": ids[:, :length], "attention_mask": mask[:, :length]})
    for key, want in alone.items():
        got = padded[key] if padded[key].shape == want.shape else padded[key][:, :length]
        assert torch.allclose(got, want, atol=1e-5), key
        assert not padded[key].isnan().any()
        if padded[key].ndim == 3:
            assert not padded[key][:, length:].any()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_series_is_read_up_to_its_mask(cell, length, seed):
    model = find("recurrent").model({**find("recurrent").small, "cell": cell})
    noise = torch.Generator().manual_seed(seed)
    series = torch.randn(2, 6, 4, generator=noise)
    mask = (torch.arange(6) < length).long().expand(2, -1)
    other = torch.where(mask[..., None] != 0, series, torch.randn(2, 6, 4, generator=noise))
    answers = [model.run({"series": s, "mask": mask})["output"] for s in (series, other)]
    assert torch.equal(*answers)
    short = model.module.layers(series[:, :length])[0][:, -1]
    assert torch.allclose(answers[0], model.module.head(short), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_sees_no_later_token(name):
    model = find(name).model(find(name).small)
    ids = torch.randint(0, 60, (1, 8))
    later = ids.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 60
    mask = torch.ones_like(ids)
    before = model.run({"input_ids": ids, "attention_mask": mask})["logits"]
    after = model.run({"input_ids": later, "attention_mask": mask})["logits"]
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_a_family_is_served_and_refuses_tokens_beyond_its_vocabulary():
    model = find("bert").model(find("bert").small)
    rows = model.rows(2)

    def flow(given):
        return (yield Call("bert", given))

    with Engine() as engine:
        engine.add(model)
        assert engine.run(flow(rows)).value["pooled"].shape == (2, 16)
        with pytest.raises(InputError, match="valid are 0 to 59"):
            engine.run(flow(rows | {"input_ids": rows["input_ids"] + 60}))


def test_a_wrong_config_names_what_is_wrong():
    with pytest.raises(ModelError, match=r"no family brt.*bert"):
        find("brt")
    with pytest.raises(ModelError, match=r"no setting widht.*width"):
        find("bert").model({"widht": 3})
    with pytest.raises(ModelError, match="width 16 and heads 3"):
        find("bert").model(find("bert").small | {"heads": 3})
    with pytest.raises(ModelError, match="gru or lstm"):
        find("recurrent").model({"cell": "rnn"})


def bert(t):
    facts = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return t.BertModel(t.BertConfig(**facts, intermediate_size=32, max_position_embeddings=64))


def distilbert(t):
    facts = {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    return t.DistilBertModel(t.DistilBertConfig(**facts, max_position_embeddings=64))


def gpt2(t):
    facts = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return t.GPT2LMHeadModel(t.GPT2Config(**facts, bos_token_id=0, eos_token_id=0))


def llama(t):
    facts = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return t.LlamaForCausalLM(
        t.LlamaConfig(**facts, num_key_value_heads=1, intermediate_size=32, rms_norm_eps=1e-6)
    )


def vit(t):
    facts = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return t.ViTForImageClassification(
        t.ViTConfig(**facts, image_size=16, patch_size=8, num_labels=5)
    )


def resnet(t):
    facts = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "num_labels": 5}
    return t.ResNetForImageClassification(t.ResNetConfig(**facts))


def convnext(t):
    facts = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 5}
    return t.ConvNextForImageClassification(t.ConvNextConfig(**facts))


def mobilenet(t):
    return t.MobileNetV2ForImageClassification(t.MobileNetV2Config(tf_padding=False, num_labels=5))


PEERS = [bert, distilbert, gpt2, llama, vit, resnet, convnext, mobilenet]


def block_of(entry) -> str:
    """The number of its block, of those that hold a transformer's parts."""
    found = re.search(r"(?:h|layer|layers)\.(\d+)\.", entry[0])
    return found[1] if found else ""


def place(entry) -> int:
    """Norms that come before a part are kept after it, as in blocks whose norms come after."""
    first = ("ln_1", "layernorm_before"), ("ln_2", "layernorm_after")
    if any(key in entry[0] for key in first[1]):
        return 3
    if any(key in entry[0] for key in first[0]):
        return 1
    return 0 if "attention" in entry[0] or ".attn." in entry[0] else 2 * bool(block_of(entry))


def copied(ours, theirs) -> None:
    """Weights of theirs into ours: both keep their layers in the order in which they run."""
    mine = [v for k, v in ours.state_dict(keep_vars=True).items() if "num_batches" not in k]
    yours = [(k, v) for k, v in theirs.state_dict().items() if "num_batches" not in k]
    if any(key in name for name, _ in yours for key in ("ln_1", "layernorm_before")):
        groups = groupby(yours, block_of)
        yours = [entry for _, group in groups for entry in sorted(group, key=place)]
    parts = []
    for key, value in yours:
        if "attn.c_attn" in key:  # GPT-2 keeps the three as one, and all transposed
            parts += [part.T if value.ndim == 2 else part for part in value.chunk(3, -1)]
        elif value.ndim == 2 and any(k in key for k in ("c_proj", "c_fc")):
            parts.append(value.T)
        elif not key.endswith("position_ids"):
            parts.append(value)
    pools = {}
    for tensor in parts:
        pools.setdefault(tuple(tensor.shape), []).append(tensor)
    assert len(parts) == len(mine)
    with torch.no_grad():
        for tensor in mine:
            tensor.copy_(pools[tuple(tensor.shape)].pop(0))


@pytest.mark.slow
@pytest.mark.needs("transformers")
@pytest.mark.parametrize("make", PEERS, ids=lambda make: make.__name__)
def test_answers_are_those_of_transformers(make):
    import transformers

    family = find(make.__name__)
    torch.manual_seed(0)
    theirs = make(transformers).eval()
    with torch.no_grad():  # norms and positions that differ, so that none may be mixed up
        for tensor in theirs.parameters():
            tensor.add_(torch.randn(tensor.shape) * 0.05)
        for name, buffer in theirs.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape))
    config = {"classes": 5} if make is mobilenet else family.small
    model = family.model(config)
    copied(model.module, theirs)
    if make.__name__ in TEXTS:
        ids = torch.randint(0, 60, (3, 9))
        mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
        rows = {"input_ids": ids, "attention_mask": mask}
    else:
        side = 16 if make is vit else 64
        rows = {"pixels": torch.randn(2, 3, side, side)}
    with torch.inference_mode():
        given = {"pixel_values" if k == "pixels" else k: v for k, v in rows.items()}
        want = theirs(**given)
    found = model.run(rows)
    if "tokens" in found:
        hidden = want.last_hidden_state * mask[..., None]
        assert torch.allclose(found["tokens"], hidden, atol=1e-5)
        if "pooled" in found:
            assert torch.allclose(found["pooled"], want.pooler_output, atol=1e-5)
        return
    logits = want.logits * mask[..., None] if make.__name__ in TEXTS else want.logits
    assert apart(found["logits"], logits) <= 1e-5
