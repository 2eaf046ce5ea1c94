import json

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from benchmarks.compare_layer_types import runs, table
from lightning_module.settings.config_folder import CONFIGS


def made_run(folder, number, layer_type, parameters=1000, seconds=60.0):
    run = folder / str(number)
    run.mkdir(parents=True)
    corpus = {"_target_": "lightning_module.data.corpora.shakespeare"}
    model = {"layer_type": {"name": layer_type}, "hidden_size": 7}
    OmegaConf.save({"data": {"corpus": corpus}, "model": model}, run / "config.yaml")
    summary = {"parameters": parameters, "wall_seconds": seconds, "val_loss": 1.5}
    summary |= {"val_bits_per_char": 2.164, "tokens_per_second": 40_000.4}
    (run / "summary.json").write_text(json.dumps(summary))
    first = "== step 5, validation loss 3 nats per token\n> No|se.\n"
    last = "== step 9, validation loss 2 nats per token\n> Enter|\n a | king.\n"
    (run / "samples.txt").write_text(f"{first}\n{last}\n")


def test_the_table_holds_each_run_in_order_and_its_last_sample(tmp_path):
    for number, layer_type in ((0, "rnn"), (1, "gru")):
        made_run(tmp_path, number, layer_type)
    lines = table(runs(tmp_path)).splitlines()
    assert lines[2] == "| Shakespeare | GRU | 7 | 1,000 | 1.500 | 2.164 | 40,000 |"
    assert lines[3].startswith("| Shakespeare | RNN |")
    assert lines[5] == "- Shakespeare, GRU: Enter **a | king.**"


@pytest.mark.parametrize("unequal", [{"parameters": 1020}, {"seconds": 70.0}])
def test_what_is_not_equal_is_refused(tmp_path, unequal):
    made_run(tmp_path, 0, "gru")
    made_run(tmp_path, 1, "lstm", **unequal)
    with pytest.raises(ValueError, match="shakespeare are not equal"):
        runs(tmp_path)
    with pytest.raises(ValueError, match="no finished runs"):
        runs(tmp_path / "0")


@pytest.mark.parametrize("text", ["shakespeare", "sanguo"])
@pytest.mark.parametrize("layer_type", ["gru", "gru_reset_before", "lstm", "rnn"])
def test_every_layer_type_has_its_units_for_every_text(text, layer_type):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(
            "train",
            ["experiment=compare", f"data={text}", f"model/layer_type={layer_type}"],
            return_hydra_config=True,
        )
    HydraConfig.instance().set_config(config)
    assert config.model.hidden_size == config.units[text][layer_type]
