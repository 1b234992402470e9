"""`LoraConfig`: what it refuses and what it advises, the choice of k, and what is written to disk."""

import copy
import dataclasses
import importlib.util
import inspect
import json
import re
import warnings
from pathlib import Path

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import EvaConfig, PeftConfig, PeftType
from peft.tuners.lora.config import CordaConfig

from gralora import LoraConfig, fields
from gralora.config import (
    FORMAT,
    FORMAT_MATCHED,
    GRALORA_FIELDS,
    PATTERNS,
    SUPPORTED_VARIANTS,
    auto_k,
    divisors,
    is_set,
    names,
    parse,
    shortest_patterns,
)

law = settings(deadline=None, max_examples=100)


def advice(message: str, field: str) -> list[int]:
    """The values of `field` that an error advises: `field=8 or 12`, or `one of field=[1, 2, 4]`."""
    found = re.search(rf"use .*?{re.escape(field)}=(\[[\d, ]+\]|\d+(?: or \d+)?)", message)
    assert found, f"no advice on {field} in: {message}"
    return [int(n) for n in re.findall(r"\d+", found.group(1))]


# What is refused

REFUSED = {
    "k-zero": ({"gralora_k": 0}, ["gralora_k=0", "positive integer or 'auto'"]),
    "k-negative": ({"gralora_k": -2}, ["gralora_k=-2", "positive integer or 'auto'"]),
    "k-float": ({"gralora_k": 2.0}, ["gralora_k=2.0", "positive integer or 'auto'"]),
    "k-bool": ({"gralora_k": True}, ["gralora_k=True", "positive integer or 'auto'"]),
    "k-word": ({"gralora_k": "many"}, ["gralora_k='many'", "positive integer or 'auto'"]),
    "k-pattern-list": ({"gralora_k_pattern": ["q"]}, ["gralora_k_pattern=['q']", "must be a dict"]),
    "k-pattern-zero": ({"gralora_k_pattern": {"q": 0}}, ["gralora_k_pattern['q']=0", "positive integer"]),
    "k-pattern-auto": ({"gralora_k_pattern": {"q": "auto"}}, ["gralora_k_pattern['q']='auto'", "positive integer"]),
    "k-does-not-divide-r": ({"r": 10, "gralora_k": 4}, ["r=10", "hybrid_r=0", "gralora_k=4", "r=8 or 12"]),
    "k-does-not-divide-grid": ({"r": 8, "hybrid_r": 1, "gralora_k": 2}, ["r=8", "hybrid_r=1", "r=7 or 9"]),
    "k-exceeds-grid": ({"r": 4, "hybrid_r": 2, "gralora_k": 4}, ["r=4", "hybrid_r=2", "gralora_k=4", "r=6"]),
    "hybrid-negative": ({"hybrid_r": -1}, ["hybrid_r=-1", "from 0", "r - 1"]),
    "hybrid-float": ({"hybrid_r": 2.0}, ["hybrid_r=2.0", "integer"]),
    "hybrid-bool": ({"hybrid_r": True}, ["hybrid_r=True", "integer"]),
    "hybrid-equals-r": ({"r": 8, "hybrid_r": 8}, ["hybrid_r=8", "r=8", "smaller", "use_gralora=False"]),
    "hybrid-exceeds-r": ({"r": 8, "hybrid_r": 9}, ["hybrid_r=9", "r=8", "smaller", "use_gralora=False"]),
    "rank-pattern-k": ({"rank_pattern": {"q": 6}, "gralora_k": 4}, ["rank_pattern['q']=6", "gralora_k=4", "=4 or 8"]),
    "rank-pattern-hybrid": ({"rank_pattern": {"q": 2}, "hybrid_r": 2}, ["hybrid_r=2", "rank_pattern['q']=2"]),
    "megatron": ({"megatron_config": {"a": 1}}, ["megatron_config={'a': 1}"]),
}


@pytest.mark.parametrize("fields, parts", REFUSED.values(), ids=REFUSED)
def test_error_names_field_value_and_remedy(fields, parts):
    """Fields that do not fit together are refused with a message that says which, and what would work."""
    with pytest.raises(ValueError) as error:
        LoraConfig(use_gralora=True, **fields)
    for part in parts:
        assert part in str(error.value)


VARIANTS = {
    "velora_config": {},
    "monteclora_config": peft.tuners.lora.config.MontecloraConfig(),
    "use_bdlora": {},
    "arrow_config": {},
    "kasa_config": {},
    "use_qalora": True,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_variants_are_refused(name):
    """GraLoRA does not combine with another variant of LoRA; the error names it."""
    if name not in {f.name for f in dataclasses.fields(peft.LoraConfig)}:
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    with pytest.raises(ValueError, match=f"(?s){name}=.*use_gralora=True.*leave {name} at its default"):
        LoraConfig(use_gralora=True, task_type="CAUSAL_LM", **{name: VARIANTS[name]})


def test_table_of_variants_is_complete():
    """Every field that PEFT marks as a variant is in the table above, or supported."""
    marked = {f.name for f in dataclasses.fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")}
    assert marked <= {*VARIANTS, *SUPPORTED_VARIANTS}


@pytest.mark.parametrize("init", ["gauss", "pissa_niter_", "pissa_niter_x", "", None, 1])
def test_unknown_initialisations_are_refused(init):
    """What PEFT does not know is refused, and the error has the names of those that work."""
    with pytest.raises(ValueError, match=f"init_lora_weights={init!r}.*one of True, False, 'gaussian'.*'lora_ga'"):
        LoraConfig(use_gralora=True, init_lora_weights=init)


WRONG_INITIALISATIONS = {
    "rho": ({"init_lora_weights": "eva", "eva_config": EvaConfig()}, r"eva_config.rho=2.0.*EvaConfig\(rho=1.0\)"),
    "pruned": ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, "prune_temporary_fields=False"),
    "no config": ({"init_lora_weights": "lora_ga"}, r"needs lora_ga_config, e.g. LoraGAConfig\(\)"),
    "bits": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2, "loftq_iter": 1}}, "loftq_bits 4 or 8"),
    "aLoRA": ({"init_lora_weights": "pissa", "alora_invocation_tokens": [1]}, "alora_invocation_tokens=.1.*=True"),
}


@pytest.mark.filterwarnings("ignore:aLoRA is currently only")
@pytest.mark.parametrize("case", WRONG_INITIALISATIONS)
def test_fields_of_initialisations_that_do_not_fit_a_grid(case):
    """The error names the field, its value and what would work, and PEFT's own config takes them."""
    fields, message = WRONG_INITIALISATIONS[case]
    with pytest.raises(ValueError, match=message):
        LoraConfig(use_gralora=True, **fields)
    peft.LoraConfig(**fields)


def test_defaults_of_initialisations_fit_a_grid():
    """What the user leaves out is chosen so that it works, and a config from JSON is one again."""
    assert LoraConfig(use_gralora=True, init_lora_weights="eva").eva_config.rho == 1
    config = LoraConfig(use_gralora=True, init_lora_weights="corda")
    assert not config.corda_config.prune_temporary_fields
    assert LoraConfig(**config.to_dict()).corda_config == config.corda_config


@pytest.mark.parametrize("fields", [f for f, _ in REFUSED.values()], ids=str)
def test_plain_lora_is_not_checked(fields):
    """Without use_gralora nothing is refused that PEFT accepts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LoraConfig(**fields)


@law
@given(r=st.integers(1, 64), hybrid_r=st.integers(0, 63), k=st.integers(1, 16))
def test_advice_works(r, hybrid_r, k):
    """A config is accepted exactly if k divides r - hybrid_r, and every value that the error advises is accepted."""
    if hybrid_r < r and (r - hybrid_r) % k == 0:
        LoraConfig(use_gralora=True, r=r, hybrid_r=hybrid_r, gralora_k=k)
        return
    with pytest.raises(ValueError) as error:
        LoraConfig(use_gralora=True, r=r, hybrid_r=hybrid_r, gralora_k=k)
    if hybrid_r >= r:
        return
    ranks, ks = advice(str(error.value), "r"), advice(str(error.value), "gralora_k")
    assert ks == [d for d in range(1, r - hybrid_r + 1) if (r - hybrid_r) % d == 0]
    for rank in ranks:
        LoraConfig(use_gralora=True, r=rank, hybrid_r=hybrid_r, gralora_k=k)
    for d in ks:
        LoraConfig(use_gralora=True, r=r, hybrid_r=hybrid_r, gralora_k=d)


UNUSED = [{"gralora_k": 2}, {"hybrid_r": 3}, {"gralora_k": 4, "hybrid_r": 2}, {"gralora_k_pattern": {"q": 2}}]


@pytest.mark.parametrize("fields", UNUSED, ids=str)
def test_unused_fields_warn(fields):
    """gralora_k or hybrid_r without use_gralora=True warn, by name, at the line that made the config."""
    with pytest.warns(UserWarning, match="has no effect without use_gralora=True") as warned:
        LoraConfig(**fields)
    message = str(warned[0].message)
    assert all(f"{name}={value}" in message for name, value in fields.items())
    assert warned[0].filename == __file__


@pytest.mark.parametrize("fields", [{}, {"use_gralora": True}, {"use_gralora": True, "gralora_k": 1}], ids=str)
def test_valid_configs_do_not_warn(fields):
    """Nothing is warned of that is as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraConfig(r=8, **fields)


# The choice of k


@law
@given(r=st.integers(1, 256), sizes=st.lists(st.integers(1, 512), min_size=1, max_size=5))
def test_auto_k_is_the_best_common_divisor(r, sizes):
    """ "auto" is the largest number that divides all sizes and is at most 2 below rank 64, at most 4 from there on."""
    k, limit = auto_k(r, *sizes), 4 if r >= 64 else 2
    fitting = [d for d in range(1, limit + 1) if all(size % d == 0 for size in sizes)]
    assert k == max(fitting)


@pytest.mark.parametrize("r, expected", [(8, 2), (63, 2), (64, 4), (128, 4)])
def test_auto_k_where_everything_divides(r, expected):
    """The paper's choice: 2 below rank 64, 4 from 64."""
    assert auto_k(r, 4096, 11008) == expected


def matches(key: str, name: str) -> bool:
    """PEFT's rule for rank_pattern, written here once more."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


layer_names = st.lists(st.sampled_from(["a", "b", "a+", "0", "10"]), min_size=1, max_size=3).map(".".join)


@law
@given(values=st.dictionaries(layer_names, st.integers(1, 3), min_size=1, max_size=12))
def test_shortest_patterns_give_every_layer_its_value(values):
    """All keys that match a layer give its value, so that their order does not matter; none is longer than needed."""
    default = 2
    pattern = shortest_patterns(values, default)
    for name, value in values.items():
        found = {pattern[key] for key in pattern if matches(key, name)}
        assert found == (set() if value == default else {value})
    for key in pattern:
        last = key.removeprefix("^").split("\\.")[-1]
        if key != last:
            assert len({value for name, value in values.items() if matches(last, name)}) > 1


def test_shortest_patterns_are_short():
    """What kinds of layers share is said once; a name that ends another one's is anchored."""
    ks = {f"layers.{i}.{name}": k for i in range(9) for name, k in [("q", 4), ("v", 2), ("o", 4)]}
    assert shortest_patterns(ks, 4) == {"v": 2}
    assert shortest_patterns(ks | {"layers.3.o": 1}, 4) == {"v": 2, r"3\.o": 1}
    assert shortest_patterns({"x.a": 4, "y.a": 4, "a": 2}, 4) == {"^a": 2}


@pytest.mark.parametrize("pattern", [{"q": 4, "0.q": 2}, {"q": 2, "z": 4}, {}], ids=str)
@pytest.mark.parametrize("field, name", PATTERNS.items())
def test_layers_keep_their_values_when_patterns_are_sorted(pattern, field, name, tmp_path):
    """PEFT sorts a pattern's keys when it saves it; a layer that several match keeps the value of the first."""
    config = LoraConfig(use_gralora=True, r=8, gralora_k=1, **{name: pattern})
    values = {layer: config.of_layer(field, layer) for layer in ["0.q", "1.q", "z"]}
    settled = config.settled({layer: config.of_layer("gralora_k", layer) for layer in values})
    assert (settled is config) == (pattern != {"q": 4, "0.q": 2}), "it is copied only where that is needed"
    settled.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert {layer: loaded.of_layer(field, layer) for layer in values} == values
    assert getattr(config, name) == pattern and getattr(settled, field) == getattr(config, field)


@law
@given(n=st.integers(1, 500))
def test_divisors(n):
    """All divisors, ascending."""
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


# Reading and writing

GRALORA = {"use_gralora": True, "gralora_k": 4, "hybrid_r": 4, "r": 12, "lora_alpha": 5, "target_modules": ["q", "v"]}


@pytest.mark.parametrize("reader", [PeftConfig, LoraConfig, peft.LoraConfig], ids=lambda cls: cls.__module__)
def test_saved_config_is_read_back(tmp_path, reader):
    """Any of PEFT's ways to read a config gives the same `gralora.LoraConfig` again."""
    config = LoraConfig(**GRALORA)
    config.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text()).items()
        >= {
            "use_gralora": True,
            "gralora_k": 4,
            "hybrid_r": 4,
            "gralora_format": FORMAT,
            "peft_type": "LORA",
            "r": 12,
        }.items()
    )
    loaded = reader.from_pretrained(tmp_path)
    assert type(loaded) is LoraConfig and loaded == config


def test_plain_config_is_saved_as_peft_saves_it(tmp_path):
    """With use_gralora=False the file is byte for byte that of `peft.LoraConfig`, and reading it back is silent."""
    fields = {"r": 4, "target_modules": ["q"], "rank_pattern": {"q": 2}, "lora_dropout": 0.1}
    for name, cls in [("ours", LoraConfig), ("stock", peft.LoraConfig)]:
        cls(**fields).save_pretrained(tmp_path / name)
    ours, stock = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("ours", "stock"))
    assert ours == stock
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftConfig.from_pretrained(tmp_path / "stock")
    assert type(loaded) is LoraConfig and not loaded.use_gralora


def write_config(path, **changes):
    config = LoraConfig(**GRALORA)
    content = config.to_dict() | {"target_modules": ["q"]} | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (path / "adapter_config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("value", [..., None], ids=["missing", "null"])
def test_file_without_format_is_refused(tmp_path, value):
    """A config with use_gralora that gralora did not write is refused, and the error names the conversion."""
    write_config(tmp_path, gralora_format=value)
    with pytest.raises(ValueError, match=r"no gralora_format.*gralora convert ADAPTER OUT"):
        PeftConfig.from_pretrained(tmp_path)


def test_file_of_a_newer_format_is_refused(tmp_path):
    """A format that this version does not know is refused by number."""
    write_config(tmp_path, gralora_format=FORMAT_MATCHED + 1)
    message = f"gralora_format={FORMAT_MATCHED + 1} .*which reads {FORMAT} and {FORMAT_MATCHED}; update gralora"
    with pytest.raises(ValueError, match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_plain_file_needs_no_format(tmp_path):
    """A plain LoRA's file has no gralora_format and is accepted."""
    write_config(tmp_path, use_gralora=False, gralora_k=..., hybrid_r=..., gralora_format=...)
    assert PeftConfig.from_pretrained(tmp_path).use_gralora is False


@pytest.mark.parametrize(
    "make_copy",
    [copy.copy, copy.deepcopy, dataclasses.replace, lambda c: LoraConfig(**c.to_dict())],
    ids=["copy", "deepcopy", "replace", "dict"],
)
@pytest.mark.parametrize("fields", [GRALORA, {"r": 4}], ids=["gralora", "plain"])
def test_copies_are_equal(make_copy, fields):
    """Every way to copy a config gives an equal one, in which the fields are still checked."""
    config = LoraConfig(**fields)
    assert make_copy(config) == config
    if config.use_gralora:
        with pytest.raises(ValueError, match="hybrid_r=12"):
            dataclasses.replace(make_copy(config), hybrid_r=12)


def test_config_is_a_lora_config():
    """It is PEFT's LoRA with a few fields more and a format, so whatever handles a LoRA handles it."""
    config = LoraConfig(use_gralora=True)
    assert isinstance(config, peft.LoraConfig) and config.peft_type is PeftType.LORA
    fields = {"use_gralora", "gralora_k", "gralora_k_pattern", "hybrid_r", "gralora_scaling", "gralora_format"}
    fields |= {"accelerate"}
    assert set(GRALORA_FIELDS) == fields
    assert all(f.metadata["help"] for f in dataclasses.fields(LoraConfig) if f.name in GRALORA_FIELDS)


def test_as_plain_lora_has_scaling_one():
    """The plain counterpart has the given rank for all layers, scaling 1, and the other fields unchanged."""
    config = LoraConfig(
        **GRALORA, use_rslora=True, rank_pattern={"q": 8}, alpha_pattern={"v": 3}, lora_dropout=0.1, bias="all"
    )
    plain = config.as_plain_lora(52)
    assert (plain.r, plain.lora_alpha, plain.use_rslora, plain.use_gralora) == (52, 52, False, False)
    assert plain.rank_pattern == plain.alpha_pattern == {}
    assert (plain.target_modules, plain.lora_dropout, plain.bias) == ({"q", "v"}, 0.1, "all")
    assert not set(GRALORA_FIELDS) & set(plain.to_dict())
    assert config.r == 12 and config.use_gralora  # the original is untouched


# What is known of the fields, said once

DERIVED = {  # what each tool goes by, as written out before it was derived
    "not beside the factors": (
        lambda f: not f.beside_factors,
        "use_gralora gralora_format gralora_scaling r lora_alpha lora_dropout peft_type init_lora_weights use_rslora "
        "rank_pattern alpha_pattern gralora_k_pattern exclude_modules task_type auto_mapping peft_version "
        "base_model_name_or_path revision inference_mode target_modules fan_in_fan_out layers_to_transform "
        "layers_pattern gralora_k hybrid_r accelerate loftq_config eva_config corda_config lora_ga_config",
    ),
    "merge": (
        lambda f: f.beside_factors and f.mergeable,
        "bias modules_to_save lora_bias trainable_token_indices use_dora ensure_weight_tying",
    ),
    "export": (
        lambda f: f.beside_factors and f.in_lora,
        "bias lora_bias modules_to_save trainable_token_indices layer_replication ensure_weight_tying use_dora "
        "alora_invocation_tokens",
    ),
    "PEFT's tuner": (
        lambda f: f.in_peft_tuner,
        "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
        "fan_in_fan_out modules_to_save layers_to_transform layers_pattern gralora_k hybrid_r",
    ),
    "hotswap": (lambda f: f.hotswap, "use_gralora gralora_k gralora_k_pattern hybrid_r gralora_scaling"),
    "resume": (
        lambda f: f.resume,
        "r lora_alpha lora_dropout use_rslora target_modules use_gralora gralora_k gralora_k_pattern hybrid_r "
        "gralora_scaling",
    ),
    "flags": (
        lambda f: f.flag,
        "use_gralora r lora_alpha use_rslora lora_dropout target_modules gralora_k hybrid_r gralora_scaling",
    ),
    "saved": (lambda f: f.saved_as, "r lora_alpha gralora_k hybrid_r"),
}


@pytest.mark.parametrize("has, expected", DERIVED.values(), ids=DERIVED)
def test_derived_lists_of_fields(has, expected):
    """Each list of fields that a tool goes by is the one that was written by hand there."""
    assert names(has) == set(expected.split())


def test_facts_name_fields_that_exist():
    """A field that PEFT renames or drops is noticed here; one that it adds gets the cautious answers."""
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    assert known >= fields.PEFT_FACTS.keys()
    assert fields.facts(dataclasses.field(default=None)) == fields.Facts()
    assert fields.Facts().beside_factors and not (fields.Facts().mergeable or fields.Facts().in_lora)
    peft_tuner = {f.name for f in dataclasses.fields(peft.GraloraConfig)}
    assert names(lambda f: f.in_peft_tuner) == known & peft_tuner - {"r", "bias", "peft_type"}


NOT_SET = {  # what PEFT, Axolotl, ms-swift and people write for a field that they leave alone
    "fan_in_fan_out": [None, False],
    "target_parameters": [None, []],
    "exclude_modules": [None, [], set()],
    "modules_to_save": [None, []],
    "layers_to_transform": [None, []],
    "layers_pattern": [None, [], ""],
    "rank_pattern": [None, {}],
    "alpha_pattern": [None, {}],
    "gralora_k_pattern": [None, {}],
    "use_rslora": [None, False],
    "use_dora": [None, False],
    "lora_bias": [None, False],
    "lora_dropout": [None, 0, 0.0],
    "loftq_config": [None, {}],
    "megatron_config": [None, {}],
    "megatron_core": ["megatron.core", None, ""],
    "qalora_group_size": [16, None],
    "trainable_token_indices": [None, [], {}],
    "alora_invocation_tokens": [None, []],
    "layer_replication": [None, []],
    "ensure_weight_tying": [None, False],
    "bias": ["none", None],
    "init_lora_weights": [True, None],
    "hybrid_r": [None, 0],
    "gralora_k": ["auto"],
    "gralora_scaling": ["lora", None],
    "runtime_config": [{"ephemeral_gpu_offload": False}, None, {}],
    "a_field_of_a_newer_peft": [None, False, [], {}, ""],
}
SET = {
    "fan_in_fan_out": [True],
    "target_parameters": [["experts.gate_up_proj"]],
    "layers_to_transform": [0, [0]],
    "use_bdlora": [{}, {"nblocks": 2}],
    "arrow_config": [{}],
    "kasa_config": [{}],
    "velora_config": [{}],
    "megatron_config": [{"a": 1}],
    "trainable_token_indices": [[1], {"embed": [1]}],
    "lora_dropout": [0.1],
    "bias": ["all"],
    "qalora_group_size": [32],
    "init_lora_weights": [False, "gaussian"],
    "r": [None, 4],
    "lora_alpha": [None, 16],
    "gralora_k": [1, 2, None],
    "gralora_scaling": ["matched"],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "a_field_of_a_newer_peft": [True, 1, 0.5, "x", [1], {"a": 1}],
}


@pytest.mark.parametrize("name", {**NOT_SET, **SET})
def test_a_field_is_set_by_its_meaning(name):
    """What is empty means the default, but for the fields that a saved adapter must have; False and 0 often do not."""
    if name == "kasa_config" and name not in {f.name for f in dataclasses.fields(peft.LoraConfig)}:
        pytest.skip(f"PEFT {peft.__version__} has no {name}")  # is_set takes it for a newer PEFT's field
    assert not any(is_set(name, value) for value in NOT_SET.get(name, []))
    assert all(is_set(name, value) for value in SET.get(name, []))


def test_every_default_is_not_set():
    """No field of a config that is made without it is set, as it is and as it is saved."""
    config = LoraConfig(use_gralora=True)
    for name, value in config.to_dict().items():
        assert is_set(name, value) == (name in ("use_gralora", "gralora_format", "peft_type", "peft_version")), name


@pytest.mark.parametrize(
    "name", [name for name in NOT_SET if name in {f.name for f in dataclasses.fields(LoraConfig)}]
)
def test_what_is_not_set_is_not_refused(name):
    """No check of the config takes an empty value for a set field."""
    for value in NOT_SET[name]:
        if name in (
            "rank_pattern",
            "alpha_pattern",
            "lora_dropout",
            "init_lora_weights",
            "runtime_config",
        ):
            continue  # PEFT or gralora take no None there, and say so
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # aLoRA without a task
            LoraConfig(use_gralora=True, r=8, **{name: value})


PARSED = [
    ("gralora_k", "4", 4),
    ("gralora_k", "auto", "auto"),
    ("hybrid_r", "0", 0),
    ("gralora_scaling", "matched", "matched"),
    ("use_gralora", "True", True),
    ("use_gralora", "false", False),
]


@pytest.mark.parametrize("name, text, value", PARSED)
def test_text_is_read_as_a_field(name, text, value):
    """A flag or a variable becomes the value that the config takes."""
    assert parse(name, text) == value and type(parse(name, text)) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("gralora_k", "many", "gralora_k='many' must be a whole number or 'auto'"),
        ("hybrid_r", "1.5", "hybrid_r='1.5' must be a whole number"),
        ("gralora_scaling", "big", "gralora_scaling='big' must be one of lora, matched"),
        ("use_gralora", "maybe", "use_gralora='maybe' must be one of true, false"),
    ],
)
def test_text_that_no_field_takes(name, text, message):
    """The error names the field and what it takes."""
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(name, text)


# What a newcomer sees


@pytest.mark.parametrize(
    "name, meant",
    [
        ("gralora_K", "gralora_k"),
        ("use_gralra", "use_gralora"),
        ("alpha", "lora_alpha"),
        ("dropout", "lora_dropout"),
        ("target_module", "target_modules"),
        ("rank", "r"),
        ("k", "gralora_k"),
    ],
)
def test_a_name_that_is_no_field_gets_a_suggestion(name, meant):
    with pytest.raises(TypeError, match=rf"got an unexpected keyword argument '{name}'; did you mean {meant}\?"):
        LoraConfig(**{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'zzzzzzz'$"):
        LoraConfig(zzzzzzz=1)


def test_every_field_is_documented():
    """In help(), and on the page of the API."""
    sections = inspect.getdoc(LoraConfig).split("\n\n")
    listed = next(section for section in sections if section.startswith("Attributes"))
    assert re.findall(r"^    (\w+): \S", listed, re.M) == list(GRALORA_FIELDS)
    docs = Path(__file__).parents[1] / "docs"
    spec = importlib.util.spec_from_file_location("hooks", docs / "hooks.py")
    spec.loader.exec_module(hooks := importlib.util.module_from_spec(spec))
    page = hooks.with_references((docs / "api.md").read_text())
    assert re.findall(r"^\| `(\w+)` \| \S", page, re.M) == list(GRALORA_FIELDS)


def test_dir_lists_what_is_public():
    import gralora

    names = [name for name in dir(gralora) if not name.startswith("__")]
    assert names == sorted(gralora.__all__) and all(getattr(gralora, name).__doc__ for name in names)
    assert {"__doc__", "__name__", "__path__"} <= set(dir(gralora))


def test_constructor_is_still_that_of_the_dataclass():
    """PEFT reads its signature, to leave out the fields of a newer version."""
    parameters = list(inspect.signature(LoraConfig.__init__).parameters)
    assert parameters == ["self", *(f.name for f in dataclasses.fields(LoraConfig) if f.init)]
    with pytest.warns(UserWarning, match="'of_a_newer_peft'"):
        config = PeftConfig.from_peft_type(peft_type="LORA", of_a_newer_peft=1, use_gralora=True, gralora_format=1)
    assert config.use_gralora
