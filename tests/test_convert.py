"""Official checkpoints: read without running code, fitted or refused with reasons, and written back."""

import argparse
import itertools
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditfast.convert import (
    LABELS,
    ConvertError,
    export_official,
    fit_state_dict,
    infer_config,
    load_official,
    official_keys,
)
from ditfast.layers import NormForm
from ditfast.presets import PUBLISHED
from ditfast.reference import DiT, DiT_models

TINY = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 10}


def tiny(**changes):
    torch.manual_seed(0)
    return DiT(**TINY | changes)


@pytest.fixture(scope="module")
def state():
    """A tiny DiT's state dict without zeros, so that a forgotten weight shows."""
    model = tiny()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model.state_dict()


def assert_same(result, expected):
    assert list(result) == list(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


class TestLoad:
    def test_bare_state_dict(self, tmp_path, state):
        torch.save(state, tmp_path / "bare.pt")
        loaded, info = load_official(tmp_path / "bare.pt")
        assert_same(loaded, state)
        assert info == {"which": "bare", "args": None}

    @pytest.mark.parametrize(("which", "sign"), [(None, -1), ("ema", -1), ("model", 1)])
    def test_training_checkpoint_prefers_ema(self, tmp_path, state, which, sign):
        optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
        content = {
            "model": {f"module.{name}": value for name, value in state.items()},
            "ema": {name: -value for name, value in state.items()},
            "opt": optimizer,
            "args": argparse.Namespace(model="DiT-XL/2", image_size=256),
        }
        torch.save(content, tmp_path / "train.pt")
        loaded, info = load_official(tmp_path / "train.pt", which)
        assert_same(loaded, {name: sign * value for name, value in state.items()})
        assert info == {"which": which or "ema", "args": {"model": "DiT-XL/2", "image_size": 256}}

    def test_model_only(self, tmp_path, state):
        torch.save({"model": state, "ema": None}, tmp_path / "x.pt")
        assert load_official(tmp_path / "x.pt")[1]["which"] == "model"

    def test_safetensors(self, tmp_path, state):
        save_file(state, tmp_path / "x.safetensors")
        loaded, _ = load_official(tmp_path / "x.safetensors")
        assert_same({name: loaded[name] for name in state}, state)

    def test_old_format_of_torch(self, tmp_path, state):
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        assert_same(load_official(tmp_path / "old.pt")[0], state)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_prefixes_are_removed(self, tmp_path, state, prefix):
        torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "x.pt")
        assert_same(load_official(tmp_path / "x.pt")[0], state)


class Evil:
    """Unpickled, it makes the folder that its argument names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestRefusal:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("place", ["args", "model", "top"])
    def test_malicious_pickle_runs_nothing(self, tmp_path, state, place, zipped):
        evil = Evil(tmp_path / "pwned")
        content = {
            "args": {"model": state, "args": evil},
            "model": {"model": {**state, "x": evil}},
            "top": evil,
        }[place]
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ConvertError, match=r"x.pt was refused: .*could run code") as caught:
            load_official(tmp_path / "x.pt")
        assert not (tmp_path / "pwned").exists()
        assert not zipped or "posix.mkdir" in str(caught.value)
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert (tmp_path / "pwned").exists(), "the file was harmless, so the test proved nothing"

    def test_bare_malicious_pickle(self, tmp_path):
        (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil(tmp_path / "pwned"), protocol=2))
        with pytest.raises(ConvertError, match="refused"):
            load_official(tmp_path / "x.pt")
        assert not (tmp_path / "pwned").exists()

    def test_namespace_is_not_left_allowed(self, tmp_path, state):
        torch.save(state, tmp_path / "x.pt")
        load_official(tmp_path / "x.pt")
        assert argparse.Namespace not in torch.serialization.get_safe_globals()

    @pytest.mark.parametrize("suffix", ["pt", "safetensors"])
    @pytest.mark.parametrize("keep", [0, 100, 20000])
    def test_truncated_file(self, tmp_path, state, suffix, keep):
        path = tmp_path / f"x.{suffix}"
        (torch.save if suffix == "pt" else save_file)(state, path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ConvertError, match=f"x.{suffix}.*damaged"):
            load_official(path)

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
    def test_damaged_pickle_of_any_kind(self, tmp_path):
        """Every opcode and its neighbours in a pickle make the unpickler fail in ways of their own."""
        torch.save({"a": 1.0}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
        sound, failures = (tmp_path / "x.pt").read_bytes(), 0
        for position, byte in itertools.product(range(0, len(sound), 2), b"R.0tdK\x85"):
            (tmp_path / "x.pt").write_bytes(sound[:position] + bytes([byte]) + sound[position + 1 :])
            try:
                load_official(tmp_path / "x.pt")
            except ConvertError:
                failures += 1
        assert failures > 100

    @pytest.mark.parametrize("error", [IndexError, AssertionError, TypeError, AttributeError])
    @pytest.mark.parametrize(("suffix", "reader"), [("pt", "torch.load"), ("safetensors", "ditfast.convert.load_file")])
    def test_whatever_a_reader_raises(self, tmp_path, monkeypatch, error, suffix, reader):
        def fail(*args, **kwargs):
            raise error

        (tmp_path / f"x.{suffix}").touch()
        monkeypatch.setattr(reader, fail)
        with pytest.raises(ConvertError, match=f"x.{suffix} cannot be read, it is damaged.*{error.__name__}"):
            load_official(tmp_path / f"x.{suffix}")

    @pytest.mark.parametrize(
        ("content", "which", "message"),
        [
            ([1, 2], None, "holds a list, expected a state dict"),
            ({"a": torch.zeros(1), "b": 3}, None, "'b' is a int, not a tensor"),
            ({}, None, "it is empty"),
            ({3: torch.zeros(1)}, None, "3 is a int, not a name"),
            ({"model": {("a",): torch.zeros(1)}}, None, "is a tuple, not a name"),
            ({"model": {"a": torch.zeros(1)}}, "ema", "has no 'ema'; it has model"),
            ({"a": torch.zeros(1)}, "ema", "bare state dict, so it has no 'ema'"),
            ({"a": torch.zeros(1)}, "best", "which is 'best'"),
        ],
    )
    def test_other_content(self, tmp_path, content, which, message):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ConvertError, match=message):
            load_official(tmp_path / "x.pt", which)

    def test_missing_file(self, tmp_path):
        with pytest.raises(ConvertError, match=r"nowhere.pt is missing"):
            load_official(tmp_path / "nowhere.pt")


class TestInferConfig:
    def test_rebuilds_the_model(self, state):
        config = infer_config(state)
        assert config.pop("preset") is None and config.pop("num_heads") is None
        DiT(**config, num_heads=4).load_state_dict(state)

    @pytest.mark.parametrize("name", ["DiT-S/8", "DiT-B/4", "DiT-L/2", "DiT-XL/2"])
    def test_names_the_preset(self, name):
        with torch.device("meta"):
            config = infer_config(DiT_models[name](input_size=64).state_dict())
        assert (config["preset"], config["input_size"], config["num_classes"]) == (name, 64, 1000)
        assert config["num_heads"] == {"S": 6, "B": 12, "L": 16, "XL": 16}[name[4:-2]]

    @pytest.mark.parametrize("name, options, found", [
        ("LightningDiT-XL/1", {"use_qknorm": True}, {"input_size": 16, "in_channels": 32, "learn_sigma": False}),
        ("LightningDiT-B/2", {"input_size": 32}, {"input_size": 32, "num_classes": 1000}),
        ("LargeDiT-tiny/2", {"num_classes": 9}, {"input_size": None, "num_classes": 9, "learn_sigma": True}),
        ("LargeDiT-600M/2", {}, {"in_channels": 4}),
    ])  # fmt: skip
    def test_names_the_preset_of_other_families(self, name, options, found):
        with torch.device("meta"):
            state = PUBLISHED[name](**options).state_dict()
        config = infer_config(state)
        assert config["preset"] == name and {key: config[key] for key in found} == found
        assert ("qk_norm" in config) == bool(options.get("use_qknorm"))
        with pytest.raises(ConvertError, match=f"LightningDiT: {LABELS} missing"):
            infer_config({key: value for key, value in state.items() if key != LABELS})
        wider = state | {"x_embedder.proj.weight": torch.zeros(7, 4, 2, 2)}
        assert infer_config(wider)["preset"] is None

    @pytest.mark.parametrize("name, option", [("LargeDiT-3B/2", "qk_norm"), ("LightningDiT-XL/1", "use_qknorm")])
    def test_a_qk_norm_that_its_preset_lacks(self, name, option):
        with torch.device("meta"):
            model = PUBLISHED[name](**{option: True})
        assert NormForm(**infer_config(model.state_dict())["qk_norm"]) == model.architecture.qk_norm

    @pytest.mark.parametrize("name, patch", [("DiT-B/8", 1), ("DiT-XL/2", 16)])
    def test_a_patch_size_that_is_not_published_has_no_preset(self, name, patch):
        with torch.device("meta"):
            config = infer_config(PUBLISHED[name](input_size=64, patch_size=patch).state_dict())
        assert (config["preset"], config["patch_size"]) == (None, patch)

    @pytest.mark.parametrize("changes", [{"learn_sigma": False}, {"mlp_ratio": 2.0}, {"in_channels": 3}])
    def test_reads_options(self, changes):
        config = infer_config(tiny(**changes).state_dict())
        assert {name: config[name] for name in changes} == changes

    def test_tokens_that_are_no_square(self, state):
        assert infer_config(state | {"pos_embed": torch.zeros(1, 12, 48)})["input_size"] is None

    @pytest.mark.parametrize("name", ["pos_embed", LABELS, "blocks.1.attn.qkv.bias", "x_embedder.proj.weight"])
    def test_missing_key_is_named(self, state, name):
        with pytest.raises(ConvertError, match=f"{name} missing"):
            infer_config({key: value for key, value in state.items() if key != name})

    def test_something_else(self):
        with pytest.raises(ConvertError, match=r"pos_embed, .* and 18 more missing; found conv1"):
            infer_config({"conv1": torch.zeros(3)})

    @pytest.mark.parametrize(
        "name",
        [
            "x_embedder.proj.weight",
            "pos_embed",
            LABELS,
            "blocks.0.mlp.fc1.weight",
            "final_layer.linear.weight",
            "blocks.0.adaLN_modulation.1.weight",
        ],
    )
    @pytest.mark.parametrize("shape", [(), (5,), (0, 0, 0), (0, 0), (0, 4, 2, 2)])
    def test_wrong_rank_is_named(self, state, name, shape):
        with pytest.raises(ConvertError, match=re.escape(f"{name} is {shape}, expected")):
            infer_config(state | {name: torch.zeros(shape)})

    def test_block_without_gates(self, state):
        with pytest.raises(ConvertError, match=r"not an adaLN-Zero DiT: .*\(192, 48\), expected \(288, 48\)"):
            infer_config(state | {"blocks.0.adaLN_modulation.1.weight": torch.zeros(192, 48)})


class TestFit:
    def test_same_model_is_kept_in_its_order(self, state):
        shuffled = dict(sorted(state.items(), reverse=True))
        fitted, notes = fit_state_dict(shuffled, tiny())
        assert_same(fitted, state)
        assert notes == []

    @pytest.mark.parametrize("classes", [3, 300])
    def test_other_classes_remake_the_label_table_only(self, state, classes):
        target = tiny(num_classes=classes)
        fitted, notes = fit_state_dict(state, target.state_dict())
        target.load_state_dict(fitted)
        assert_same({n: v for n, v in fitted.items() if n != LABELS}, {n: v for n, v in state.items() if n != LABELS})
        assert fitted[LABELS].std().item() == pytest.approx(0.02, rel=0.2)
        assert notes == [f"label table made anew for {classes} classes (the checkpoint has 10); all other weights kept"]

    def test_remade_table_follows_the_generator_not_the_global_state(self, state):
        target = tiny(num_classes=3).state_dict()
        drawn = [fit_state_dict(state, target, generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
        assert torch.equal(drawn[0][LABELS], drawn[1][LABELS])
        assert not torch.equal(drawn[0][LABELS], drawn[2][LABELS])
        before = torch.get_rng_state()
        fit_state_dict(state, target)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"hidden_size": 96},
                r"pos_embed: checkpoint \(1, 16, 48\), model \(1, 16, 96\).*and \d+ more.*hidden_size=48",
            ),
            ({"depth": 3}, r"blocks.2.attn.qkv.weight: checkpoint has none, model \(144, 48\).*depth=2"),
            ({"depth": 1}, r"blocks.1.attn.qkv.weight: checkpoint \(144, 48\), model has none.*depth=2"),
            (
                {"patch_size": 4},
                r"x_embedder.proj.weight: checkpoint \(48, 4, 2, 2\), model \(48, 4, 4, 4\).*patch_size=2",
            ),
            ({"input_size": 16}, r"pos_embed: checkpoint \(1, 16, 48\), model \(1, 64, 48\).*input_size=8"),
            ({"in_channels": 3}, r"model \(48, 3, 2, 2\).*in_channels=4"),
            ({"learn_sigma": False}, r"final_layer.linear.weight: .*learn_sigma=True"),
            ({"num_classes": 3, "depth": 3}, r"embedding_table.weight: checkpoint \(11, 48\), model \(4, 48\)"),
        ],
    )
    def test_other_models_are_refused_with_the_one_that_fits(self, state, changes, message):
        with pytest.raises(ConvertError, match=message):
            fit_state_dict(state, tiny(**changes))

    def test_the_error_names_the_preset(self, state):
        with torch.device("meta"):
            checkpoint = DiT_models["DiT-S/8"]().state_dict()
        with pytest.raises(ConvertError, match=r"The checkpoint is for DiT-S/8: input_size=32"):
            fit_state_dict(checkpoint, state)

    def test_a_cast_is_noted(self, state):
        _, notes = fit_state_dict({name: value.half() for name, value in state.items()}, tiny())
        assert notes == ["loading casts torch.float16 to torch.float32"]


class TestExport:
    def test_official_keys_are_those_of_the_oracle(self, state):
        assert official_keys(2) == list(state)

    def test_bare_dict_loads_officially(self, tmp_path, state):
        export_official(tmp_path / "new" / "x.pt", {f"module.{n}": v.bfloat16() for n, v in reversed(state.items())})
        loaded = torch.load(tmp_path / "new" / "x.pt", weights_only=True)
        assert_same(loaded, {name: value.bfloat16().float() for name, value in state.items()})
        tiny().load_state_dict(loaded)

    def test_ema_goes_where_the_official_sampler_looks(self, tmp_path, state):
        export_official(tmp_path / "x.pt", state, {name: -value for name, value in state.items()})
        content = torch.load(tmp_path / "x.pt", weights_only=True)
        assert_same(content["model"], state)
        assert_same(content["ema"], {name: -value for name, value in state.items()})
        assert load_official(tmp_path / "x.pt")[1]["which"] == "ema"

    def test_slices_do_not_drag_their_storage_along(self, tmp_path, state):
        big = torch.zeros(1_000_000)
        export_official(tmp_path / "x.pt", state | {"pos_embed": big[: 16 * 48].view(1, 16, 48)})
        assert (tmp_path / "x.pt").stat().st_size < 1_000_000

    def test_extra_weights_are_refused(self, tmp_path, state):
        with pytest.raises(ConvertError, match=r"no blocks.0.cross.q.weight; only adaLN-Zero"):
            export_official(tmp_path / "x.pt", state | {"blocks.0.cross.q.weight": torch.zeros(2)})

    def test_failed_write_keeps_the_former_file(self, tmp_path, state, monkeypatch):
        export_official(tmp_path / "x.pt", state)
        former = (tmp_path / "x.pt").read_bytes()

        def full(content, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            export_official(tmp_path / "x.pt", state)
        assert (tmp_path / "x.pt").read_bytes() == former
        assert len(list(tmp_path.iterdir())) == 1


def test_golden_state_dict_is_recognized():
    golden = load_file(os.path.join(os.path.dirname(__file__), "golden", "dit_tiny.safetensors"))
    config = infer_config({name[6:]: value for name, value in golden.items() if name.startswith("state/")})
    assert (config["hidden_size"], config["depth"], config["num_classes"], config["input_size"]) == (144, 2, 10, 8)
