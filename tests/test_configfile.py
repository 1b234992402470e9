"""Settings from a YAML file: the same names, types and checks as the flags'."""

from dataclasses import asdict, fields

import pytest

from gralora.tool import configfile
from gralora.tool.arguments import FinetuneArguments
from gralora.tool.finetune import main, make_parser


@pytest.fixture
def settings(tmp_path):
    """What a file and flags are read as."""

    def parse(text: str, *flags: str) -> dict:
        (tmp_path / "c.yaml").write_text(text)
        return vars(configfile.parse(make_parser(), [*flags, "--config", str(tmp_path / "c.yaml")]))

    return parse


def test_values_have_the_types_of_their_flags(settings):
    """1e-4 is text in YAML; and names of other tools are taken as by the flags."""
    found = settings(
        "model_name_or_path: gpt2\nlearning_rate: 1e-4\nlora_r: 8\nuse_gralora: true\nval_set_size:\n"
        "lora_target_modules: [c_attn, c_proj]\ngralora_k: 4\nload_in_4bit: true\nquiet: true\noutput_dir: 2024\n"
    )
    expected = {"base_model": "gpt2", "learning_rate": 1e-4, "lora_r": 8, "use_gralora": True, "val_set_size": None}
    expected |= {"lora_target_modules": ["c_attn", "c_proj"], "gralora_k": "4", "quantization": "4bit", "quiet": True}
    expected |= {"output_dir": "2024"}
    assert {name: found[name] for name in expected} == expected
    assert found["seed"] == 42, "what is not there has its default"
    assert settings("lora_target_modules: c_attn\n")["lora_target_modules"] == ["c_attn"]
    assert settings("")["lora_r"] == 32


def test_flags_win(settings, tmp_path):
    found = settings("lora_r: 8\nseed: 1\nload_in_8bit: true\n", "--lora_r", "16", "--quantization", "none")
    assert (found["lora_r"], found["seed"], found["quantization"]) == (16, 1, "none")
    first = configfile.parse(make_parser(), [str(tmp_path / "c.yaml"), "--lora_r", "16"])
    assert (first.lora_r, first.seed) == (16, 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lora_rank: 8", "unknown key 'lora_rank'; did you mean .*lora_r"),
        ("model_name_or_pth: x", "did you mean model_name_or_path"),
        ("1: x", "unknown key 1."),
        ("print_config: true", "unknown key 'print_config'"),
        ("base_model: a\nmodel_name_or_path: b", "'base_model' and 'model_name_or_path' are the same setting"),
        ("max_steps: 1.5", "max_steps=1.5: invalid int value: '1.5'"),
        ("bf16: perhaps", "bf16='perhaps': "),
        ("quiet: 3", "quiet=3 must be true or false"),
        ("lora_r: [1, 2]", "lora_r=.1, 2. must be one value"),
        ("lora_target_modules: []", "lora_target_modules=.. must be a list of words"),
        ("lora_target_modules: {a: 1}", "must be a list of words"),
        ("- a", "must hold `name: value` lines, not a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(settings, text, message):
    with pytest.raises(ValueError, match=f"(?s)c.yaml.*{message}"):
        settings(text)


def test_printed_config_is_the_same_settings(settings, capsys):
    flags = ["--use_gralora", "--lora_target_modules", "q", "v", "--learning_rate", "1e-5", "--data_path", "a: b.csv"]
    main([*flags, "--print_config"])
    printed = capsys.readouterr().out
    assert "\n# Total rank.\nlora_r: 32\n" in printed
    found = settings(printed)
    names = [field.name for field in fields(FinetuneArguments)]
    (expected,) = [FinetuneArguments(use_gralora=True, lora_target_modules=["q", "v"], learning_rate=1e-5)]
    expected.data_path = "a: b.csv"
    assert asdict(FinetuneArguments(**{name: found[name] for name in names})) == asdict(expected)
    assert {line.split(":")[0] for line in printed.splitlines() if line[0] not in "#-"} == set(names)
