"""Configuration: presets compose, words and files fill the schema, and every mistake is one line that names its key."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from gptoss_ft.config.catalog import CONFIGS, choices, groups, keys, presets, summary
from gptoss_ft.config.commands import InitCommand, VerifyCommand
from gptoss_ft.config.load import check_paths, compose_train_config, load_command, load_train_config, to_yaml
from gptoss_ft.config.schema import TrainConfig, TrainerConfig
from gptoss_ft.config.values import AttnImplementation, BuiltinTool, Dtype, LossPolicy, Optim, Schedule, Shape, Target
from gptoss_ft.errors import ConfigError

REQUIRED = ["run.dir=run", "model.path=base", "data.path=rows.jsonl"]


def refused(*words: str) -> str:
    """The one line that refuses `words`."""
    with pytest.raises(ConfigError) as caught:
        load_train_config(list(words))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder; nothing may be left in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", presets())
def test_preset_composes_with_the_command_on_its_first_line(name):
    program, command, *words = summary(name).split()
    assert (program, command) == ("gptoss-ft", "train")
    config = compose_train_config(words)
    assert config.data.path
    assert len((CONFIGS / f"{name}.yaml").read_text().splitlines()) <= 15


@pytest.mark.parametrize("word", [f"{group}={choice}" for group in groups() for choice in choices(group)])
def test_section_preset_composes_and_is_explained(word):
    compose_train_config([*REQUIRED, word])
    group, choice = word.split("=")
    assert (CONFIGS / group / f"{choice}.yaml").read_text().startswith("# ")


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested values by dotted name."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_preset_says_nothing_that_is_so_anyway(path):
    section = "" if path.parent == CONFIGS else f"{path.parent.name}."
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"))["defaults"]
    if {section.rstrip("."): path.stem} in defaults:
        pytest.skip("the default of its section spells out what is so anyway")
    known = keys(TrainConfig)
    values = OmegaConf.to_container(OmegaConf.load(path)) or {}
    values.pop("defaults", None)
    for name, value in flat(values, section).items():
        assert value != known[name].default, f"{name} is {value} by default"


def test_quickstart_needs_nothing_but_the_package(here):
    config = load_train_config(["config=quickstart"])
    assert config.model.init == "tiny"
    assert config.model.path == f"{config.run.dir}/base"
    assert config.model.dtype is Dtype.float32
    assert all(Path(path).is_absolute() for path in config.data.path)


def test_words_win_over_section_presets_over_named_presets():
    config = compose_train_config(
        ["adapter.r=4", "config=quickstart", "trainer=default", "adapter=experts", "trainer.max_steps=3"]
    )
    assert config.adapter.r == 4
    assert config.adapter.targets == [Target.experts]
    assert config.trainer.gradient_accumulation_steps == 8
    assert config.trainer.max_steps == 3


def test_own_file_builds_on_presets_and_reads_its_neighbours(here):
    folder = here / "a folder, it's =odd"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "small.yaml").write_text("r: 2\n")
    (folder / "mine.yaml").write_text(
        "defaults: [quickstart, {override adapter: small}, _self_]\nrun: {dir: elsewhere}\ntrainer:\n"
    )
    config = compose_train_config([f"config={folder}/mine.yaml", "data=messages", "data.path=rows.jsonl"])
    assert (config.adapter.r, config.run.dir, config.data.path) == (2, "elsewhere", ["rows.jsonl"])
    assert config.model.path == "elsewhere/base"


def test_own_file_without_defaults_starts_from_the_schema(here):
    (here / "mine.yaml").write_text(
        "run: {dir: r}\nmodel: {path: m}\ndata: {path: [a, b]}\ntrainer: {max_steps: 2e3}\n"
    )
    config = compose_train_config(["config=mine.yaml"])
    assert config.trainer == TrainerConfig(max_steps=2000)
    assert config.data.path == ["a", "b"]


def test_written_config_reads_back_the_same(here):
    config = compose_train_config(["config=quickstart", "adapter.layers=[0,3]", "run.dir=a=b c", "seed=7"])
    (here / "config.yaml").write_text(to_yaml(config))
    assert compose_train_config(["config=./config.yaml"]) == config


def test_defaults_written_by_hand_equal_the_loaded_ones():
    config = compose_train_config(REQUIRED)
    assert config.trainer == TrainerConfig()
    assert dataclasses.is_dataclass(config) and config.adapter.targets == [Target.attention, Target.experts]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run.dir=a=b c (1), {d}", "a=b c (1), {d}"),
        ("run.dir=C:\\runs\\1e3", "C:\\runs\\1e3"),
        ("run.dir=2024", "2024"),
        ("run.dir='quoted text'", "quoted text"),
        ("run.dir=${seed}/x", "0/x"),
        ("data.path=one.jsonl", ["one.jsonl"]),
        ("data.path=[one.jsonl,two.jsonl]", ["one.jsonl", "two.jsonl"]),
        ("data.eval_path=null", None),
        ("data.policy=all", LossPolicy.all),
        ("data.knowledge_cutoff=2024-06", "2024-06"),
        ("data.current_date=2025-06-28", "2025-06-28"),
        ("data.identity=null", None),
        ("data.builtin_tools=python", [BuiltinTool.python]),
        ("adapter.layers=3", [3]),
        ("adapter.layers=null", None),
        ("adapter.alpha=16", 16.0),
        ("trainer.learning_rate=2e-4", 2e-4),
        ("trainer.max_steps=1e3", 1000),
        ("trainer.report_to=wandb", ["wandb"]),
        ("trainer.optim=paged_adamw_8bit", Optim.paged_adamw_8bit),
        ("export.formats=[]", []),
        ("model.init=tiny", Shape.tiny),
    ],
)
def test_values_take_the_type_of_their_key(word, value):
    config = compose_train_config([*REQUIRED, word])
    for part in word.partition("=")[0].split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer.learnig_rate=1", "unknown key 'trainer.learnig_rate': did you mean 'trainer.learning_rate'?"),
        ("learning_rate=1", "unknown key 'learning_rate': did you mean 'trainer.learning_rate'?"),
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate': did you mean 'trainer.learning_rate'?"),
        ("zzz=1", "unknown key 'zzz': --help lists them"),
        ("hydra.run.dir=x", "unknown key 'hydra.run.dir': did you mean 'run.dir'?"),
        ("run=x", "'run' is a section: set run.dir and the like"),
        ("trainer.max_steps=many", "trainer.max_steps must be an integer, got many"),
        ("trainer.max_steps=1.5", "trainer.max_steps must be an integer, got 1.5"),
        ("trainer.max_steps=", "trainer.max_steps must be an integer, got nothing"),
        ("trainer.max_steps=1,2", "trainer.max_steps takes one value, got 1,2"),
        ("trainer.max_steps=[", "trainer.max_steps must be an integer, got ["),
        ("trainer.gradient_checkpointing=7.5", "trainer.gradient_checkpointing must be true or false, got 7.5"),
        ("seed=null", "seed must be an integer, got null"),
        ("run.dir=", "run.dir must be text, got nothing"),
        ("run.dir=${oops", "run.dir must be text, got ${oops"),
        ("run.dir=${oops}", "run.dir: Interpolation key 'oops' not found"),
        (
            "trainer.optim=adam_torch",
            "trainer.optim must be one of adamw_torch, adamw_8bit, paged_adamw_8bit, got adam_torch: "
            "did you mean 'adamw_torch'?",
        ),
        ("model=tinny", "model=tinny: no such preset of 'model': did you mean 'tiny'?"),
        ("model={path: x}", "model={path: x}: no such preset of 'model': the presets are "),
        ("+seed=1", "'+seed=1' is not of the form key=value"),
        ("--seed", "'--seed' is not of the form key=value"),
        ("quickstart", "'quickstart' is not of the form key=value: did you mean config=quickstart?"),
        ("config=quickstrat", "config=quickstrat: no such preset: did you mean 'quickstart'?"),
        ("config=", "config=: no such preset: the presets are attention_20b, "),
        ("config=./none.yaml", "config=none.yaml: no such file"),
        ("config=./", "config=.: it is a folder, not a file"),
        *(
            (
                f"model.attn_implementation={name}",
                "model.attn_implementation must be one of gptoss_ft, eager, got ",
            )
            for name in ("flashy", "sdpa", "flex_attention")
        ),
        ("model.dtype=auto", "model.dtype must be one of bfloat16, float32, got auto"),
    ],
)
def test_mistake_in_a_word_is_named(here, word, message):
    assert refused(*REQUIRED, word).startswith(message)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adapter.r=0", "adapter.r must be 1 or more, got 0"),
        ("adapter.alpha=0", "adapter.alpha must be above 0"),
        ("adapter.dropout=1", "adapter.dropout must be in [0, 1)"),
        ("adapter.targets=[]", "adapter.targets must be at least one name"),
        ("adapter.layers=[0,0]", "adapter.layers must be null or different numbers from 0 up, got [0, 0]"),
        ("adapter.experts=[-1]", "adapter.experts must be null or different numbers from 0 up, got [-1]"),
        ("data.path=[]", "data.path must be at least one file"),
        ("data.eval_fraction=1", "data.eval_fraction must be in [0, 1)"),
        ("data.max_length=1", "data.max_length must be 2 or more"),
        ("data.final_weight=-1", "data.final_weight must be 0 or more and finite, got -1"),
        ("data.current_date=2025-02-30", "data.current_date must be null or a day as YYYY-MM-DD, got 2025-02-30"),
        ("data.current_date=20250228", "data.current_date must be null or a day as YYYY-MM-DD, got 20250228"),
        ("trainer.max_steps=0", "trainer.max_steps must be -1 or above 0, got 0"),
        ("trainer.learning_rate=0", "trainer.learning_rate must be above 0"),
        ("trainer.learning_rate=1e38", "trainer.learning_rate must be above 0 and at most 1 (AdamW moves each weight "),
        ("trainer.eval_steps=-1", "trainer.eval_steps must be 0 or more, got -1"),
        ("trainer.warmup_steps=-1", "trainer.warmup_steps must be 0 or more"),
        ("trainer.logging_steps=0", "trainer.logging_steps must be 1 or more"),
        ("trainer.report_to=[none,wandb]", "trainer.report_to must be none or other names, got none, wandb"),
        ("seed=-1", "seed must be from 0 to 4294967295, got -1"),
        ("seed=4294967296", "seed must be from 0 to 4294967295, got 4294967296"),
    ],
)
def test_value_out_of_range_is_named(word, message):
    assert refused(*REQUIRED, word).startswith(message)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", [key.name for key in keys(TrainConfig).values() if key.kind is float])
def test_numbers_are_finite(name, value):
    assert refused(*REQUIRED, f"{name}={value}").startswith(f"{name} must be ")


def test_largest_seed_is_one_that_every_generator_takes():
    config = compose_train_config([*REQUIRED, "seed=4294967295"])
    transformers.set_seed(config.seed)
    with pytest.raises(ValueError, match="Seed must be between"):
        transformers.set_seed(config.seed + 1)


def test_values_that_exclude_each_other_are_named():
    rows = ["data.eval_path=held_out.jsonl", "data.eval_fraction=0.1"]
    assert "data.eval_fraction must be 0 when data.eval_path" in refused(*REQUIRED, *rows)
    assert "data.share_prefixes needs data.packing=true" in refused(*REQUIRED, "data.share_prefixes=true")
    channels = ["data.analysis_weight=0", "data.commentary_weight=0", "data.final_weight=0"]
    assert "are all 0: nothing would learn" in refused(*REQUIRED, *channels)
    assert "adapter.dropout must be 0" in refused(*REQUIRED, "adapter.dropout=0.1", "adapter.targets=[router,experts]")


def test_missing_keys_are_named_and_explained():
    message = refused("config=lora_20b")
    assert message == "missing data.path (rows: files, folders, patterns such as rows/*.jsonl, or hf://owner/name)"
    assert refused("seed=1").startswith("missing run.dir (")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {learnig_rate: 1}", "mine.yaml: unknown key 'trainer.learnig_rate': did you mean 'trainer.learn"),
        ("trainer: {max_steps: many}", "mine.yaml: trainer.max_steps must be an integer, got many"),
        ("trainer: 3", "mine.yaml: 'trainer' is a section"),
        ("run: {_target_: os.system, dir: x}", "mine.yaml: unknown key 'run._target_'"),
        ("run: {dir: '${seeed}'}\nmodel: {path: m}\ndata: {path: d}", "mine.yaml: run.dir: Interpolation key 'seeed'"),
        ("hydra: {run: {dir: x}}", "config=mine.yaml: it must be a mapping of this program's keys"),
        ("[a, b]", "config=mine.yaml: it must be a mapping"),
        ("run: {dir: ]", "config=mine.yaml: while parsing"),
        (
            "defaults: [trian, _self_]",
            "config=mine.yaml: In 'mine.yaml': Could not load 'trian': did you mean 'train'?",
        ),
        (
            "defaults: [train, {override model: tinny}, _self_]",
            "config=mine.yaml: In 'train': Could not find 'model/tinny': did you mean 'tiny'?",
        ),
        ("defaults: [mine, _self_]", "config=mine.yaml: its defaults include themselves"),
    ],
)
def test_mistake_in_a_file_is_named(here, text, message):
    (here / "mine.yaml").write_text(text)
    assert refused("config=mine.yaml").startswith(message)
    assert [path.name for path in here.iterdir()] == ["mine.yaml"]


def test_section_preset_needs_a_file_with_defaults(here):
    (here / "mine.yaml").write_text("run: {dir: x}")
    assert "model=tiny needs 'defaults: [train, _self_]'" in refused("config=mine.yaml", "model=tiny")


def test_missing_inputs_are_named_with_the_nearest_name(here):
    (here / "base").mkdir()
    (here / "rows.jsonl").write_text(json.dumps({"messages": []}))
    load_train_config(REQUIRED)
    assert refused(*REQUIRED, "model.path=bse") == "model.path=bse: no such folder: did you mean 'base'?"
    message = refused(*REQUIRED, "data.path=[rows.jsonl,row.jsonl]")
    assert message == "data.path=row.jsonl: no such file: did you mean 'rows.jsonl'?"
    assert refused(*REQUIRED, "data.path=*.parquet") == "data.path=*.parquet: no file matches"
    for rows in ("*.jsonl", "base", "hf://owner/name"):
        load_train_config([*REQUIRED, f"data.path={rows}"])
    assert refused(*REQUIRED, "model.path=rows.jsonl") == "model.path=rows.jsonl: it is a file, not a folder"
    shutil.rmtree(here / "base")
    check_paths(compose_train_config([*REQUIRED, "model.init=tiny"]))


@pytest.mark.parametrize(
    ("written", "there", "hint"),
    [
        ("missing.jsonl", ["role.jsonl"], ""),
        ("role.jsonl", ["rows.jsonl"], ""),
        ("rows.json", ["rows.txt", "rows.jsonl"], ": did you mean 'deep/rows.jsonl'?"),
        ("row.jsonl", ["rows/"], ""),
        ("row.jsonl", [], ""),
    ],
)
def test_only_near_names_are_suggested(here, written, there, hint):
    (here / "deep").mkdir()
    for name in there:
        path = here / "deep" / name
        path.mkdir() if name.endswith("/") else path.touch()
    (here / "base").mkdir()
    assert refused(*REQUIRED, f"data.path=deep/{written}") == f"data.path=deep/{written}: no such file{hint}"


def test_commands_take_words_too():
    command = load_command(InitCommand, ["model=tiny", "out=x"])
    assert command == InitCommand(model=Shape.tiny, out="x")
    with pytest.raises(ConfigError, match=r"^missing out \(folder to create\)$"):
        load_command(InitCommand, ["model=tiny"])
    with pytest.raises(ConfigError, match="unknown key 'modle': did you mean 'model'"):
        load_command(InitCommand, ["modle=tiny", "out=x"])


def test_verify_finds_a_base_that_has_moved(here):
    (here / "run").mkdir()
    (here / "moved").mkdir()
    assert load_command(VerifyCommand, ["run=run", "path=run", "base=moved"]).base == "moved"
    with pytest.raises(ConfigError, match="base=gone: no such folder"):
        load_command(VerifyCommand, ["run=run", "path=run", "base=gone"])


@pytest.mark.parametrize("implementation", AttnImplementation)
def test_attention_implementations_run_gpt_oss(implementation):
    import gptoss_ft.model.attention  # noqa: F401  registers ours

    with torch.device("meta"):
        model = transformers.GptOssForCausalLM._from_config(small_shape(), attn_implementation=implementation.value)
    assert model.config._attn_implementation == implementation.value


def test_scaled_dot_product_attention_does_not():
    with pytest.raises(ValueError, match="does not support"), torch.device("meta"):
        transformers.GptOssForCausalLM._from_config(small_shape(), attn_implementation="sdpa")


def small_shape() -> transformers.GptOssConfig:
    return transformers.GptOssConfig(num_hidden_layers=1, num_local_experts=2, hidden_size=64, intermediate_size=64)


def test_trainer_keys_are_those_of_training_arguments():
    names = {name.removeprefix("trainer.") for name in keys(TrainConfig) if name.startswith("trainer.")}
    assert names - {item.name for item in dataclasses.fields(TrainingArguments)} == {"loss_chunk_size"}


@pytest.mark.parametrize("schedule", Schedule)
def test_schedules_are_those_of_transformers_that_need_nothing_more(schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(SchedulerType(schedule.value), optimizer, num_warmup_steps=2, num_training_steps=8)
    assert scheduler.get_last_lr()
