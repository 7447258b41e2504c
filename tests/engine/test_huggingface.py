"""Folders that transformers wrote come into the store without their code."""

import json

import pytest
import torch

from plinth.engine import Call, Engine, ModelError, ModelStore
from plinth.engine.models.convert import Options, convert

pytestmark = [pytest.mark.cpu, pytest.mark.slow, pytest.mark.needs("transformers")]
SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))


def decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1))


def image():
    from transformers import ViTConfig, ViTForImageClassification

    facts = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")}
    return ViTForImageClassification(ViTConfig(**facts, image_size=16, patch_size=8, num_labels=4))


def saved(model, folder):
    torch.manual_seed(0)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture
def store(tmp_path):
    return ModelStore(tmp_path / "store")


def served(store, name, rows):
    def flow():
        return (yield Call(name, rows))

    with Engine() as engine:
        engine.add(store.load(name))
        return engine.run(flow()).value


@pytest.mark.parametrize("make", [bert, decoder])
def test_a_model_of_texts_is_served_at_any_length(store, tmp_path, make):
    model = saved(make(), tmp_path / "hub")
    found = convert(tmp_path / "hub", store, name="text")
    assert found.spec.inputs[0].bounds == (0, 59)
    assert found.report["largest_difference"] <= 1e-5
    assert found.report["padding_difference"] <= 1e-5
    ids = torch.randint(0, 60, (3, 20))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        want = model(**given).logits
    assert torch.allclose(served(store, "text", given), want, atol=1e-5)


def test_a_model_of_images_is_served(store, tmp_path):
    model = saved(image(), tmp_path / "hub")
    found = convert(tmp_path / "hub", store, name="image")
    assert found.report["classes"] == [f"LABEL_{i}" for i in range(4)]
    pixels = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        want = model(pixels).logits
    assert torch.allclose(served(store, "image", pixels), want, atol=1e-5)


def test_weights_that_are_missing_are_never_filled_with_noise(store, tmp_path):
    from safetensors.torch import load_file, save_file

    saved(bert(), tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    weights = load_file(file)
    del weights["classifier.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys: \['classifier.weight'\].*noise"):
        convert(tmp_path / "hub", store, name="text")
    file.write_bytes(b"\x00" * 40)
    with pytest.raises(ModelError, match="cannot be loaded"):
        convert(tmp_path / "hub", store, name="text")


def test_an_unknown_architecture_and_an_unknown_output_are_named(store, tmp_path):
    saved(bert(), tmp_path / "hub")
    with pytest.raises(ModelError, match="no output nonsense"):
        convert(tmp_path / "hub", store, name="text", options=Options(outputs=["nonsense"]))
    config = tmp_path / "hub" / "config.json"
    facts = json.loads(config.read_text()) | {"architectures": ["NoSuchModel"]}
    config.write_text(json.dumps(facts))
    with pytest.raises(ModelError, match="is a NoSuchModel, which transformers"):
        convert(tmp_path / "hub", store, name="text")
    assert store.list() == []
