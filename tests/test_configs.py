"""The configs that ship: complete, built without memory, and learning what the paper says they learn."""

import functools
import json
from pathlib import Path

import pytest

from magma_jax.config import ConfigError, config_name, load_config_file, to_dict
from magma_jax.families import family_of, run_config
from magma_jax.nn.modules import abstract, parameter_count
from magma_jax.training.run.config import RunConfig
from magma_jax.training.run.program import create_model
from magma_jax.training.step.optim import label_parameters, partition

FOLDER = Path(__file__).parent.parent / "configs"
TABLE1, TODAY = "paper_table1.py", "magma_today.py"
FINETUNING = ("vqa", "okvqa", "gqa", "vizwiz", "snli_ve", "nocaps", "coco")
GPTJ, V2 = 6_050_301_152, 383_936_912
MAGVLT_QUICKSTART = (3_158_400, 712_672)
F16 = 76_073_859  # the image tokenizer with 16,384 codes
PATCHGAN = 2_765_633

# How many parameters learn, and how many are frozen.
COUNTS = {
    "quickstart.py": (668_928, 7_575_553),
    "own_data.py": (668_928, 7_575_553),
    "quickstart_lm.py": (4_204_545, 0),
    "smollm2_quickstart.py": (45_610_848, 137_886_016),
    "finetune_quickstart.py": (668_928 + 2 * 256 + 2, 7_575_553),
    "cm3leon_350m.py": (373_295_104, 0),
    "cm3leon_760m.py": (786_435_072, 0),
    "cm3leon_7b.py": (6_727_671_808, 0),
    "cm3leon_quickstart.py": (2_021_890, 712_672),
    "cm3leon_edit_quickstart.py": (2_021_890, 712_672),
    "cm3leon_paper_quickstart.py": (1_327_360, 712_672),
    "argvlt_base.py": (371_533_056, F16),
    "finetune_magvlt_coco.py": (371_533_056, F16),
    # A classifier of 3,129 answers.
    "finetune_magvlt_vqa.py": (371_533_056 + 1025 * 3129, F16),
    "magvlt_base.py": (371_533_056, F16),
    "magvlt_large.py": (795_228_672, F16),
    "magvlt_quickstart.py": MAGVLT_QUICKSTART,
    "magma_v1.py": (383_822_224, GPTJ),
    "magma_v2.py": (V2, GPTJ),
    "magma_base.py": (V2, GPTJ),
    "magma_long.py": (V2, GPTJ),
    "vqgan_quickstart.py": (712_672, 0),
    "vqgan_f16.py": (76_073_859 + PATCHGAN, 0),
    "vqgan_f8.py": (66_890_627 + PATCHGAN, 0),
    **{f"finetune_{name}.py": (V2 + (3 * 4096 + 3) * (name == "snli_ve"), GPTJ) for name in FINETUNING},
    # SigLIP so400m without its head has 412,987,248 parameters.
    f"{TODAY}:llama-3.1-8b": (327_991_296, 8_030_261_248 + 412_987_248),
    f"{TODAY}:qwen3-8b": (361_582_592, 8_190_735_360 + 412_987_248),
    f"{TODAY}:gemma-3-12b": (408_883_200, 11_766_034_176 + 412_987_248),
    f"{TABLE1}:adapters-none": (148_797_840, GPTJ),
    f"{TABLE1}:adapters-ff2": (618_731_920, GPTJ),
    f"{TABLE1}:adapters-ff4": (383_822_224, GPTJ),
    f"{TABLE1}:adapters-attn8-ff8": (V2, GPTJ),
    f"{TABLE1}:adapters-attn12-ff6": (383_707_508, GPTJ),
    f"{TABLE1}:adapters-parallel-ff4": (383_822_224, GPTJ),
    f"{TABLE1}:adapters-scaled-attn8-ff8": (V2 + 56, GPTJ),
    f"{TABLE1}:encoder-nf_resnet": (275_326_016, GPTJ),
    f"{TABLE1}:encoder-vit": (325_638_400, GPTJ),
    f"{TABLE1}:encoder-rn50x4": (311_142_072, GPTJ),
    f"{TABLE1}:encoder-rn50x16": (383_822_224, GPTJ),
    f"{TABLE1}:frozen": (40_293_440, GPTJ),
}
# The paper's column Params: relative to ff4.
ADAPTERS = {"none": 0, "ff2": 2, "ff4": 1, "attn8-ff8": 1, "attn12-ff6": 1, "parallel-ff4": 1, "scaled-attn8-ff8": 1}


def load(name: str) -> RunConfig:
    return run_config(load_config_file(f"{FOLDER}/{name}"))


def learning_and_frozen(config: RunConfig):
    _, shapes, types = abstract(functools.partial(create_model, family_of(config.model), config))
    return partition(shapes, label_parameters(types, config.optim.groups))[:2]


def test_every_file_is_tested():
    # tests/test_names.py has from_names.py, whose sizes are the hub's.
    files = {path.name for path in FOLDER.glob("*.py")} - {"from_names.py"}
    assert {name.split(":")[0] for name in COUNTS} == files
    with pytest.raises(ConfigError, match=r"paper_table1\.py:ff3: unknown run 'ff3'; rows: adapters-none"):
        load(f"{TABLE1}:ff3")
    with pytest.raises(ConfigError, match=r"paper_table1\.py: describes several runs; choose one"):
        load(TABLE1)
    with pytest.raises(ConfigError, match=r"describes one run; leave out :long"):
        load("magma_base.py:long")


@pytest.mark.parametrize("name", COUNTS)
def test_complete_and_built_without_memory(name):
    config = load(name)
    assert run_config(json.loads(json.dumps(to_dict(config)))) == config
    assert tuple(map(parameter_count, learning_and_frozen(config))) == COUNTS[name]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_opens_with_the_command_that_runs_it(path):
    command = "python train.py" if path.stem == "quickstart" else f"python train.py --config configs/{path.name}"
    assert command in path.read_text().split('"""')[1]


@pytest.mark.parametrize("row", ADAPTERS)
def test_adapters_of_table_1_have_the_papers_sizes(row):
    learning, _ = learning_and_frozen(load(f"{TABLE1}:adapters-{row}"))
    adapters = sum(leaf.size for path, leaf in learning.items() if "_adapter/" in path)
    assert adapters / 235_024_384 == pytest.approx(ADAPTERS[row], abs=1e-3)


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_uses_the_papers_rates_and_stops_early(name):
    config = load(f"finetune_{name}.py")
    assert config.optim.learning_rate == (3e-4 if name == "snli_ve" else 7e-4)
    assert config.optim.groups["encoder"].learning_rate == 1.5e-6
    assert config.validation.every
    assert config.validation.patience


def test_positions_of_a_row_fill_256():
    config = load("magma_v2.py")
    assert config.model.encoder.positions + config.data.length - 1 == 256


def test_runs_of_one_file_have_names_of_their_own():
    assert config_name("configs/magma_v1.py") == "magma_v1"
    assert config_name(f"configs/{TABLE1}:adapters-ff4") == "paper_table1-adapters-ff4"
