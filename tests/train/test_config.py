"""Settings are refused by name, and everything that follows from them is derived in one place."""

from pathlib import Path

import pytest
import yaml

from moc_train.config import ConfigError, TrainConfig, resolve
from moc_train.deepspeed_config import derive_deepspeed_config, learning_rate_ratio
from moc_train.options import as_mapping, bind, parse_arguments


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.widht=64"], r"unknown key model\.widht \(did you mean width\?\), allowed are layers, width"),
        (["modle.width=64"], r"unknown key modle \(did you mean model\?\), allowed are model, data"),
        (["model.width=wide"], r"model\.width must be int, given 'wide'"),
        (["model.width=250"], r"model\.width must be a multiple of 2 \* model\.heads = 8, given 250"),
        (["model.top_k=17"], r"model\.top_k must be at most model\.experts = 16, given 17"),
        (["model.ep_size=3"], r"model\.ep_size must divide model\.experts = 16, given 3"),
        (["model.moe_layers=[1, 9]"], r"model\.moe_layers must lie in 0\.\.3, given \[9\]"),
        (["model.moe_layers=even"], r"model\.moe_layers must be all, odd, none or a list"),
        (["model.gmm=cublas"], r"model\.gmm must be one of auto, torch, loop, grouped_gemm, given cublas"),
        (
            ["model.gmm=torch", "training.precision=bf16", "model.expert_hidden=12"],
            r"model\.expert_hidden must be a mul",
        ),
        (["model.gmm=grouped_gemm"], r"model\.gmm grouped_gemm needs training\.precision bf16, given fp32"),
        (["data.vocab_size=100"], r"data\.vocab_size must be at least 257 .*, given 100"),
        (["data.corpus=[a.parquet]"], r"data\.corpus paths must end in \.txt or \.jsonl, given a\.parquet"),
        (["training.zero_stage=3"], r"training\.zero_stage must be 1 or 2, given 3"),
        (["training.precision=fp16"], r"training\.precision must be one of fp32, bf16, given fp16"),
        (["training.steps=true"], r"training\.steps must be int, given True"),
        (["training.gradient_dtype=bf16"], r"training\.gradient_dtype must be fp32 or null"),
        (["optimizer.warmup_steps=200"], r"optimizer\.warmup_steps must be less than 200"),
        (["optimizer.kind=lion"], r"optimizer\.kind must be one of adamw, fused_adam, cpu_adam, given lion"),
        (["checkpoint.restore=latest"], r"checkpoint\.restore must be auto, never, weights or a step, given latest"),
        (["checkpoint.mode=some"], r"checkpoint\.mode must be one of full, partial, partial_by_load, given some"),
        (["checkpoint.k_persist=2"], r"checkpoint\.k_persist must be null in mode full, given 2"),
        (
            ["checkpoint.mode=partial", "checkpoint.k_snapshot=2", "checkpoint.k_persist=3"],
            r"checkpoint\.k_persist must be at most checkpoint\.k_snapshot = 2, given 3",
        ),
        (
            ["checkpoint.mode=partial", "checkpoint.k_persist=99"],
            r"checkpoint\.k_persist must be null or lie in 1\.\.model\.experts = 16, given 99",
        ),
        (["faults.kill_rank=0"], r"faults\.kill_rank and faults\.kill_step go together, given 0 and None"),
        (["faults.kill_rank=0", "faults.kill_step=900"], r"faults\.kill_step must be at most training\.steps = 200"),
        (["training.steps"], r"settings are written section\.key=value, given training\.steps"),
        (["model=small"], r"model must be a mapping of settings, given 'small'"),
        (["--config", "/nowhere/job.yaml"], r"--config cannot be read path=/nowhere/job\.yaml"),
    ],
)
def test_a_bad_setting_is_refused_by_name_with_what_is_allowed(words: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_arguments(words)


@pytest.mark.parametrize(
    ("words", "world_size", "named"),
    [
        (["model.ep_size=4"], 2, r"model\.ep_size must divide the number of ranks = 2, given 4"),
        (["training.global_batch=10"], 2, r"training\.global_batch must be a multiple of .* = 8, given 10"),
        (["training.global_batch=16", "training.accumulation=3"], 2, r"training\.accumulation must be null or 2"),
        (["faults.kill_rank=2", "faults.kill_step=1"], 2, r"faults\.kill_rank must be less than .* = 2, given 2"),
    ],
)
def test_what_does_not_fit_the_number_of_ranks_is_refused(words: list[str], world_size: int, named: str) -> None:
    config = parse_arguments(words)

    with pytest.raises(ConfigError, match=named):
        resolve(config, world_size)


@pytest.mark.parametrize(("world_size", "ep_size"), [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (32, 16)])
def test_expert_parallel_size_follows_from_the_ranks(world_size: int, ep_size: int) -> None:
    assert resolve(TrainConfig(), world_size).ep_size == ep_size


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: {width: 64, heads: 2}\ntraining: {steps: 7}\n")

    config = parse_arguments(
        [
            "--local_rank=1",
            "--config",
            str(file),
            "model.width=32",
            "--corpus",
            "a.txt",
            "s3://b/c.jsonl",
            "data.seed=3",
        ]
    )

    assert (config.model.width, config.model.heads, config.training.steps) == (32, 2, 7)
    assert config.data.corpus == ("a.txt", "s3://b/c.jsonl")
    assert config.data.seed == 3


def test_a_printed_configuration_reads_back_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--print-config", "optimizer.lr=3e-4", "model.moe_layers=[3, 1]"])

    printed = yaml.safe_load(capsys.readouterr().out)
    config = bind(TrainConfig, printed)
    assert config.optimizer.lr == 3e-4
    assert config.model.moe_layer_indices() == (1, 3)
    assert as_mapping(config) == printed


def test_the_example_configurations_are_valid() -> None:
    files = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))

    assert files
    for file in files:
        resolve(parse_arguments(["--config", str(file)]), 2)


def test_the_deepspeed_configuration_says_what_the_settings_say() -> None:
    config = parse_arguments(["training.global_batch=48", "training.precision=bf16", "training.zero_stage=1"])

    derived = derive_deepspeed_config(config, resolve(config, 2))

    assert derived["train_batch_size"] == 48
    assert derived["train_micro_batch_size_per_gpu"] == 4
    assert derived["gradient_accumulation_steps"] == 6
    assert derived["zero_optimization"]["stage"] == 1
    assert derived["bf16"] == {"enabled": True}
    assert derived["optimizer"]["params"]["torch_adam"] is True


def test_the_learning_rate_rises_then_falls_to_its_floor() -> None:
    ratios = [learning_rate_ratio(updates, warmup_steps=4, decay_steps=20, min_ratio=0.1) for updates in range(25)]

    assert ratios[:4] == [0.25, 0.5, 0.75, 1.0]
    assert ratios[4:20] == sorted(ratios[4:20], reverse=True)
    assert ratios[20:] == [pytest.approx(0.1)] * 5
