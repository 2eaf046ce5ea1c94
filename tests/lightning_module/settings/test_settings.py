"""Every setting has a type and a range, which hold for new runs, resumed ones and sweeps."""

import copy
import re

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_module import commands
from lightning_module.data.datamodule import BATCHING
from lightning_module.data.tokenizers import _SPLITS, SHARDS
from lightning_module.errors import DamagedFile, SettingsError
from lightning_module.memory.tasks import TASKS
from lightning_module.model import LAYER_TYPES
from lightning_module.run_config import change, from_yaml, read_config, targets
from lightning_module.run_files import read_metrics
from lightning_module.settings.config_folder import CONFIGS
from lightning_module.settings.former_names import translate_target
from lightning_module.settings.overrides import parse, quoted
from lightning_module.settings.table import SETTINGS, check
from lightning_module.sweeps.jobs import read_description, read_job
from triton_gru.dispatch import BACKENDS

# Keys of conf/ that are no settings: what is instantiated, how, and Hydra's own; a strategy may
# be one's own, and `ranks.World` says which names there are.
NO_SETTINGS = re.compile(
    r"(.*\.)?_\w+_|(.*\.)?defaults.*|hydra\..*|(units|prompts)\..*|trainer\.strategy"
)


def composed(*overrides, command="train"):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(command, list(overrides))


def leaves(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}".lstrip("."))
    else:
        yield path


def test_every_key_of_the_configs_is_declared():
    """Add what this lists to `settings.SETTINGS`, with its type and range."""
    missing = set()
    for file in CONFIGS.rglob("*.yaml"):
        folder = file.parent.relative_to(CONFIGS).as_posix()
        if folder.startswith("hydra"):
            continue
        text = file.read_text()
        package = re.search(r"# @package (\S+)", text)
        package = package[1] if package else folder.replace("/", ".").removesuffix(".common")
        path = "" if package in ("_global_", ".") else package
        command = file.stem if folder == "." else "prepare" if folder == "executor" else "train"
        for key in leaves(yaml.safe_load(text), path):
            if not NO_SETTINGS.fullmatch(key) and key not in SETTINGS[command]:
                missing.add(f"{file.relative_to(CONFIGS)}: {key}")
    assert not missing


def test_every_choice_is_one_there_is():
    train = SETTINGS["train"]
    for key, values in {
        "model.layer_type.name": LAYER_TYPES,
        "data.batching": BATCHING,
        "tokenizer.kind": [*_SPLITS, SHARDS],
    }.items():
        assert all(train[key].holds(value) for value in values), key
        assert len(train[key].expected.replace(" or ", ", ").split(", ")) == len(values), key
    assert train["model.layer_type.backend"].expected.replace(" or ", ", ").split(", ") == list(
        BACKENDS
    )
    shortest = max(task.shortest for task in TASKS.values())
    assert SETTINGS["memory"]["delays"].holds([shortest])
    assert not SETTINGS["memory"]["delays"].holds([shortest - 1])


def test_the_configs_are_within_their_ranges():
    check(composed("experiment=char_best"))
    check(
        composed("averaging=ema", "data=hf", "data.name=a", "tokenizer=bpe", "scheduler=constant")
    )
    check(composed("averaging=swa", "strategy=ddp", "model/layer_type=lstm", "sweep=quick"))
    check(composed(command="memory"), "memory")
    check(composed(command="predict"), "predict")
    check(composed(command="inspect"), "inspect")


BAD = {
    "trainer.log_every_n_steps=0": "a whole number of at least 1; got 0",
    "trainer.max_steps=abc": "a whole number of at least -1; got 'abc'",
    "trainer.max_steps=1.5": "a whole number of at least -1; got 1.5",
    "trainer.max_steps=true": "got true",
    "trainer.max_steps=[1]": r"got \[1\]",
    "trainer.max_steps=": "got ''",
    "trainer.max_steps=null": "got null",
    "trainer.max_time=10": "days:hours:minutes:seconds.*; got 10",
    "trainer.max_time=00:00:00:00": "days:hours:minutes:seconds",
    "trainer.gradient_clip_val=-1": "a number of at least 0, or null; got -1",
    "trainer.val_check_interval=1.5": "a share above 0.0 and up to 1.0, or a whole number",
    "trainer.val_check_interval=0": "got 0",
    "trainer.limit_train_batches=0": "got 0",
    "trainer.accumulate_grad_batches=0": "at least 1",
    "trainer.precision=8": "16-true, .*; got 8",
    "optimizer.lr=abc": "a number of at least 0; got 'abc'",
    "optimizer.lr=nan": "got nan",
    "optimizer.lr=inf": "got inf",
    "optimizer.betas=[0.9]": r"a list of two.*got \[0.9\]",
    "optimizer.fused=1": "true or false, or null; got 1",
    "scheduler.warmup=2": "from 0 to 1; got 2",
    "model.dropout=1": "at least 0 and below 1; got 1",
    "model.layer_type.name=x": "gru, gru_reset_before, lstm or rnn; got 'x'",
    "data.batch_size=0": "at least 1",
    "seed=-1": "from 0 to 4294967295; got -1",
    "callbacks.best.monitor=val_acc": "or val_bits_per_char; got 'val_acc'",
    "compile=maybe": "true or false; got 'maybe'",
    "run_dir=": "a path",
    f"run_dir={'a' * 300}": r"at most 255 bytes.*\(302 characters\)",
    "model.layer_type=lstm": r"has settings of its own.*model/layer_type=NAME",
    "tokenizer.vocab_size=${nothing}": "cannot be read: Interpolation key 'nothing'",
    "~optimizer": "optimizer cannot be left out",
    "~seed": "seed cannot be left out",
}


@pytest.fixture(scope="module")
def default():
    return composed()


@pytest.mark.parametrize("setting", BAD)
def test_a_wrong_value_is_named_with_what_is_expected(default, setting):
    (override,) = parse([setting])
    key = override.key_or_group
    config = copy.deepcopy(default)
    OmegaConf.set_struct(config, False)
    if override.is_delete():
        del config[key]
    else:
        OmegaConf.update(config, key, override.value())
    with pytest.raises(SettingsError, match=BAD[setting]) as refused:
        check(config)
    assert str(refused.value).startswith(key)
    assert "\n" not in str(refused.value)


def test_values_become_what_the_program_takes():
    config = composed("data=text_files", "data.paths=a.txt", "trainer.max_steps=1e4")
    check(config)
    assert config.data.paths == ["a.txt"]
    assert config.trainer.max_steps == 10_000
    assert isinstance(config.trainer.max_steps, int)
    # 1.0 is all of a pass and 1 a step: not the same.
    assert isinstance(config.trainer.val_check_interval, float)


REFUSED = {
    "experiment=quikstart": "no experiment=quikstart; did you mean experiment=quickstart",
    "model/layer_type=gruu": "did you mean model/layer_type=gru",
    "modle/layer_type=gru": "did you mean model/layer_type",
    "dta=sanguo": "did you mean data",
    "trainer.max_stepz=9": "did you mean trainer.max_steps",
    "data.paths=a.txt": "it is one of data=records and data=text_files",
    "callbacks.early_stopping.patience=3": "it is one of callbacks=early_stopping",
    "callbacks.averaging.decay=0.9": "it is one of averaging=ema",
    "experiment": "settings are KEY=VALUE",
    "optimizer.lr=1,2": "to train with each of them add -m",
    r"callbacks.samples.prompts=['the cat\\'s']": "quotes of the other kind",
    "foo=[": "foo=. cannot be read",
    "run_dir=${nothing": "run_dir",
    "--config-dir=nowhere": "not found",
    "callbacks=null": "callbacks is a group of settings .* one of default, early_stopping",
    "optimizer.lr=abc": "optimizer.lr must be a number",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_the_command_refuses_in_one_line(fails, tmp_path, argument):
    errors = fails(commands.train, argument)
    assert re.search(REFUSED[argument], errors)
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -- a run that is resumed ---------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """The config.yaml of a run, as training writes it."""
    config = composed("data=text_files", "data.paths=[a.txt]", f"run_dir={tmp_path / 'run'}")
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(config, resolve=True))
    return path


def changed(file, *changes):
    config = read_config(file)
    change(config, changes, file, [CONFIGS])
    return config


@given(
    st.text(
        st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"])
        | st.sampled_from("${}\\:'\"#")
    )
)
def test_texts_come_back_from_a_config_as_they_were(text):
    config = from_yaml(yaml.safe_dump({"a": [{"b": text}]}, default_style='"'))  # 0E0 is a text too
    assert OmegaConf.to_container(config, resolve=True) == {"a": [{"b": text}]}
    written = OmegaConf.to_yaml(config, resolve=True)
    assert OmegaConf.to_container(from_yaml(written), resolve=True) == {"a": [{"b": text}]}


def test_a_resumed_run_reads_changes_as_a_fresh_run_does(file):
    config = changed(
        file,
        "trainer.max_time=1:00:00:00",
        "callbacks.samples.prompts=[No,it's,你好,2024]",
        "data.val_fraction=0.2",
        "data.paths=三国,(1).txt",
        "+trainer.benchmark=true",
    )
    assert config.trainer.max_time == "1:00:00:00"
    assert config.callbacks.samples.prompts == ["No", "it's", "你好", "2024"]
    assert config.data.val_fraction == 0.2
    assert config.data.paths == ["三国,(1).txt"]
    assert config.trainer.benchmark is True


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("trainer.max_stepz=9", "did you mean trainer.max_steps"),
        ("trainer.max_steps=abc", "trainer.max_steps must be a whole number.*config.yaml"),
        ("trainer.max_steps=1,2", "single run"),
        ("model/layer_type=lstm", "cannot be changed in a resumed run"),
        ("experiment=quickstart", "cannot be changed in a resumed run"),
        ("trainer=default", "cannot be changed in a resumed run"),
        ("~optimizer.lr", "cannot be changed in a resumed run"),
        ("run_dir=other", "copy the run"),
        ("foo=[", "cannot be read"),
    ],
)
def test_changes_that_a_resumed_run_cannot_take_are_refused(file, setting, expected):
    with pytest.raises(SettingsError, match=expected) as refused:
        changed(file, setting)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"- a\n- b\n", b"abc", b"a: [", b"\xff\xfe", b"a: !!python/object/apply:os.getcwd []\n",
     b"\x00\x00\x00", "cut", "directory"],
)  # fmt: skip
def test_a_damaged_config_is_called_damaged(file, content):
    if content == "directory":
        file.unlink()
        file.mkdir()
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(SettingsError, match=r"config\.yaml (is damaged|cannot be read)") as refused:
        changed(file, "trainer.max_steps=3")
    assert "\n" not in str(refused.value)


STRANGE = {
    "the optimizer": {"optimizer": {"_target_": "os.system", "command": "true"}},
    "as an argument": {"trainer": {"callbacks": [{"a": {"_target_": "builtins.eval"}}]}},
    "partial": {"scheduler": {"_target_": "hydra.utils.get_method", "_partial_": True}},
    "positional": {"logger": {"csv": {"_args_": [{"_target_": "torch.load"}]}}},
    "torch.load": {"model": {"layer_type": {"_target_": "torch.load", "weights_only": False}}},
    "no text": {"logger": {"csv": {"_target_": 3}}},
    "a longer name": {"logger": {"csv": {"_target_": "lightning.Trainer.fit"}}},
    "an own module": {"logger": {"csv": {"_target_": "lightning_module.train.subprocess.run"}}},
    "an interpolation": {"logger": {"csv": {"_target_": "${oc.env:HOME}"}}},
    "its own trust": {"trust": ["os"], "optimizer": {"_target_": "os.system"}},
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_run_that_names_code_of_others_is_refused_by_name(file, case):
    config = yaml.safe_load(file.read_text())
    strange = STRANGE[case]
    file.write_text(yaml.safe_dump(OmegaConf.to_container(OmegaConf.merge(config, strange))))
    with pytest.raises(SettingsError, match="which is not this project's") as refused:
        changed(file)
    assert "trust=[" in str(refused.value)


def test_trusted_code_is_named_by_who_resumes(file):
    config = OmegaConf.load(file)
    config.optimizer = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}
    file.write_text(OmegaConf.to_yaml(config))
    for trust in ("trust=[torch.optim.SGD]", "trust=torch.optim", "trust=[other,torch]",
                  "optimizer._target_=torch.optim.SGD"):  # fmt: skip
        assert changed(file, trust).optimizer._target_ == "torch.optim.SGD"
    for trust in ("trust=[torch.opt]", "trust=[torch.optim.SG]", "trust=[]", "trust=['']"):
        with pytest.raises(SettingsError, match=r"trust=\[torch.optim.SGD\]"):
            changed(file, trust)
    assert "trust" not in changed(file, "trust=[torch]")  # it is not kept


# As stored by runs so far, under the names of their version: these must resume, wherever the code
# goes.
STORED = [
    "lightning.Trainer",
    "torch.optim.AdamW",
    "lightning.pytorch.callbacks.EMAWeightAveraging",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning_module.averaging.StochasticWeightAveraging",
    "lightning_module.corpora.hf",
    "lightning_module.corpora.sanguo",
    "lightning_module.corpora.shakespeare",
    "lightning_module.corpora.text_files",
    "lightning_module.data.SentenceDataModule",
    "lightning_module.guards.EarlyStopping",
    "lightning_module.guards.LastCheckpoint",
    "lightning_module.guards.StopOnSignal",
    "lightning_module.guards.StopWhenDiverged",
    "lightning_module.guards.ValidateAtEnd",
    "lightning_module.metrics_log.MetricsLogger",
    "lightning_module.progress.RunProgress",
    "lightning_module.progress.Throughput",
    "lightning_module.reports.RunReport",
    "lightning_module.reports.SampleWriter",
    "lightning_module.schedules.constant",
    "lightning_module.schedules.cosine",
    "lightning_module.slowdown.NoteSlowdown",
    "lightning_module.tokenizers.TokenizerSettings",
    "lightning_module.trackers.MLflowTracker",
    "lightning_module.trackers.WandbTracker",
]


def test_targets_of_runs_so_far_have_a_present_name():
    present = targets(CONFIGS)
    assert {translate_target(name) for name in STORED} <= present
    assert {translate_target(name) for name in present} == present
    for name in present:
        assert callable(get_object(name))


def test_a_run_with_former_names_is_resumed(file):
    former = {translate_target(name): name for name in STORED}
    expected = read_config(file)
    text = re.sub(r"(?<=_target_: )[\w.]+", lambda m: former.get(m[0], m[0]), file.read_text())
    text = text.replace("  _target_: lightning_module.model.SentencePredictor\n", "", 1)
    text = text.replace("  _convert_: all\n", "", 1)
    text = text.replace("  layer_type:\n", "  core:\n")
    text = text.replace("  batch_size:", "  lanes:").replace("val_batch_size:", "val_lanes:")
    assert "lightning_module.guards.StopOnSignal" in text
    assert "SentencePredictor" not in text
    file.write_text(text)
    assert changed(file) == expected
    assert changed(file, "data.lanes=9").data.batch_size == 9
    assert "  core:" in text and expected.model.layer_type.name == "gru"


@pytest.mark.parametrize("argument", ["data.lanes=7", "+data.lanes=7", "++data.lanes=7"])
def test_the_former_name_of_a_setting_is_an_alias_with_a_warning(argument, capsys):
    assert quoted(argument) == argument.replace("lanes", "batch_size")
    assert "data.lanes is called data.batch_size now" in capsys.readouterr().err
    assert quoted("data.batch_size=7") == "data.batch_size=7"
    assert quoted("model.layer_type.name=gru") == "model.layer_type.name=gru"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("key", ["model/core", "model.core.name", "+model.core.name"])
def test_the_former_name_of_a_group_is_an_alias_with_a_warning(key, capsys):
    assert quoted(f"{key}=lstm") == f"{key}=lstm".replace("core", "layer_type")
    assert "core is called" in capsys.readouterr().err


def test_a_config_of_ones_own_may_hold_the_former_name_of_a_group(capsys):
    config = composed("+model.core.backend=torch")
    check(config)
    assert config.model.layer_type.backend == "torch" and config.model.layer_type.name == "gru"
    assert "core" not in config.model
    assert capsys.readouterr().err.count("warning") == 1


def test_a_config_of_ones_own_may_hold_a_former_name(capsys):
    config = composed("data=text_files", "data.paths=[a.txt]", "+data.lanes=7", "+data.val_lanes=3")
    check(config)
    assert (config.data.batch_size, config.data.val_batch_size) == (7, 3)
    assert "lanes" not in config.data
    assert capsys.readouterr().err.count("warning") == 2


def test_a_former_name_in_a_folder_of_configs_is_trusted(file, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.yaml").write_text("_target_: lightning_module.guards.Mine\n")
    file.write_text(file.read_text() + "extra:\n  _target_: lightning_module.guards.Mine\n")
    with pytest.raises(SettingsError, match=r"trust=\[lightning_module.callbacks.stopping.Mine\]"):
        changed(file)
    config = read_config(file)
    change(config, [], file, [CONFIGS, folder])
    assert config.extra._target_ == "lightning_module.callbacks.stopping.Mine"


@pytest.mark.parametrize(
    "content", [b"step,val_loss\n1,abc\n", b"\xff\xff\n", b"a,b\n1,2\n", b"step\n1,2,3\n"]
)
def test_damaged_metrics_are_called_damaged(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"metrics\.csv is damaged"):
        read_metrics(tmp_path / "metrics.csv")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"sweeper": 3}', b"null"])
def test_damaged_records_of_a_sweep_are_called_damaged(tmp_path, content):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "3.json").write_bytes(content)
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"3\.json is damaged"):
        read_job(tmp_path, 3)
    with pytest.raises(DamagedFile, match=r"sweep\.json is damaged"):
        read_description(tmp_path)
