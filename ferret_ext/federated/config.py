"""What a run is made of: dataclasses that presets, files and overrides fill (see `settings`).

Training arguments have the names that Hugging Face gives them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from ferret_ext.federated import compatibility, settings
from ferret_ext.federated.data.sources import EVAL_SPLIT
from ferret_ext.federated.settings import ConfigError, Leaf, Setting, option

LARGEST_DECAY = 0.999999  # optimisers want less than 1
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
ScoreName = Literal["rouge-l", "rougeL", "rougeL-stem", "gsm8k-exact-match"]

# Settings and sections that a run does not depend on: it goes on with others.
FREE_SETTINGS = ("out", "trackers", "federation")

# What an evaluation depends on: names of settings and sections.
EVALUATION_SETTINGS = (
    *("model", "data", "seed", "dtype", "allow_pickle", "device", "num_threads", "full_determinism"),
    *("dataset", "evaluation"),
)


@dataclass(frozen=True)
class DatasetConfig:
    """Which records there are, how they become prompts and responses, and those become tokens."""

    protocol: Literal["none", "natural-instructions", "dolly", "codealpaca", "gsm8k"] = option(
        "none", "the paper's choice of records, with its prompt, partition and number of clients"
    )
    task_lists: str = option(
        "default",
        "natural-instructions: a folder in splits/, or any other, with train_tasks.txt and test_tasks.txt",
    )
    labels_file: str | None = option(
        None, "a file with more columns for the training records, by its column index, which counts from 0"
    )
    columns: str | None = option(
        None, "names for columns that have others, e.g. 'instruction=question, output=answer'"
    )
    config_name: str | None = option(None, "the hub data set's configuration, e.g. main")
    train_split: str = option("train", "split that is divided among the clients")
    eval_split: str = option(
        EVAL_SPLIT, "split that is evaluated; where there is no test split, part of the training split is"
    )
    format: Literal["auto", "gsm8k", "alpaca", "dolly"] = option(
        "auto", "columns and prompt template; auto goes by the columns"
    )
    prompt: str | None = option(
        None, "a prompt template of your own, e.g. 'Q: {question}\\nA: '; \\n ends a line"
    )
    response: str | None = option(None, "the response's template, e.g. '{answer}'; goes with dataset.prompt")
    max_length: int = option(1024, "tokens of prompt and response together; the rest is cut off", at_least=2)
    max_prompt_length: int | None = option(
        None, "records with a longer prompt are dropped; max_length - 1 unless given", at_least=1
    )


@dataclass(frozen=True)
class PartitionConfig:
    """Who holds which training record. The kinds are named as Flower names its partitioners."""

    kind: Literal[
        "auto", "iid", "dirichlet", "natural-id", "pathological", "linear", "square", "exponential"
    ] = option(
        "auto",
        "iid: evenly; dirichlet: skewed by a column's values; natural-id: one client a value; pathological: "
        "a few values a client; linear, square, exponential: sizes grow so; auto: as dataset.protocol has it",
    )
    column: str | None = option(
        None, "column that dirichlet, natural-id and pathological go by; none: the protocol's"
    )
    alpha: float = option(0.5, "dirichlet: the smaller, the more skewed", above=0)
    self_balancing: bool = option(
        True, "dirichlet: a client with the mean number of records gets none of the values after that"
    )
    classes_per_client: int = option(2, "pathological: values a client", at_least=1)
    min_size: int | None = option(
        None,
        "records a client has at least; natural-id leaves out values with fewer; 0: clients may go empty and "
        "take no part; none: 10 for dirichlet, else 1",
        at_least=0,
    )


@dataclass(frozen=True)
class TrainingConfig:
    """A client's local training in one round."""

    max_steps: int = option(10, "optimiser steps T a round", at_least=1)
    num_train_epochs: float | None = option(
        None, "passes over a client's records a round, in place of max_steps", above=0
    )
    gradient_accumulation_steps: int = option(4, "batches a step", at_least=1)
    per_device_train_batch_size: int = option(1, "records a batch", at_least=1)
    optim: Literal["auto", "sgd", "adam", "adamw"] = option(
        "auto", "local optimiser; auto: adam for fedit, fedprompt and fedptuning, else sgd"
    )
    learning_rate: float = option(1e-4, "local learning rate", above=0)
    momentum: float = option(0.0, "of sgd", at_least=0, at_most=LARGEST_DECAY)
    adam_beta1: float = option(0.9, "decay of adam's first moments", at_least=0, at_most=LARGEST_DECAY)
    adam_beta2: float = option(0.999, "decay of adam's second moments", at_least=0, at_most=LARGEST_DECAY)
    adam_epsilon: float = option(1e-8, "added to the root of adam's second moments", above=0)
    weight_decay: float = option(0.0, "L2 penalty; with adamw, decay apart from the gradient", at_least=0)
    max_grad_norm: float | None = option(
        None, "gradients are clipped to this norm; none: no clipping", above=0
    )
    keep_state: bool = option(
        False, "a client's momentum and moments go on in its next round; else they begin at zero"
    )
    gradient_checkpointing: bool = option(False, "less memory: activations are computed a second time")
    start_on_host: bool = option(
        False, "less memory on a GPU: a client's copy of the round's start is in pinned host memory"
    )
    torch_compile: bool = option(False, "compiles the model for local training")


@dataclass(frozen=True)
class ServerConfig:
    """How the server steps along the clients' mean update: ferret, fedavg and its kin.

    With an optimiser every party keeps its moments, and fedavg relays the mean update in place of the weights
    (arXiv 2003.00295).
    """

    optim: Literal["sgd", "adagrad", "adam", "yogi"] = option(
        "sgd",
        "sgd: server_learning_rate times the mean update; adagrad, adam, yogi: adaptive, about "
        "server_learning_rate for each weight",
    )
    momentum: float = option(0.0, "of sgd", at_least=0, at_most=LARGEST_DECAY)
    beta1: float | None = option(
        None,
        "decay of first moments; none: 0 for adagrad, else 0.9",
        at_least=0,
        at_most=LARGEST_DECAY,
    )
    beta2: float = option(
        0.99, "decay of second moments, of adam and yogi", at_least=0, at_most=LARGEST_DECAY
    )
    epsilon: float = option(
        1e-3, "added to the root of second moments, which begin at its square", at_least=1e-15, at_most=1e15
    )

    @property
    def plain(self) -> bool:
        """Whether steps do not depend on former rounds."""
        return self.optim == "sgd" and self.momentum == 0

    @property
    def chosen_beta1(self) -> float:
        """`beta1`, none resolved."""
        if self.beta1 is None:
            return 0.0 if self.optim == "adagrad" else 0.9
        return self.beta1


Coordinates = Literal[
    "float32", "float16", "int8", "int4", "int2", "int1", "choice4", "choice8", "choice10", "choice12"
]


@dataclass(frozen=True)
class FerretConfig:
    """How an update is projected (arXiv 2409.06277, section 3)."""

    mode: Literal["paper", "reference-code"] = option(
        "paper", "as the paper states the method, or as its authors' code runs it"
    )
    K: int = option(
        4096, "coordinates an update, over all blocks; reference-code: seeds in the pool", at_least=1
    )
    granularity: int | Literal["auto", "tensor", "packed"] = option(
        "auto",
        "blocks: one a tensor, packed to about the median tensor, or of N elements; auto: of some tens of "
        "coordinates, small tensors joined and large ones cut, for reference-code packed",
        at_least=1,
    )
    allocation: Literal["size", "sqrt-size", "equal", "norm", "sqrt-norm", "mse", "curvature"] = option(
        "curvature",
        "how K is shared out among the blocks; norms are those of the last round, and before the "
        "first one sqrt-size",
    )
    basis: Literal["auto", "rademacher", "uniform", "gaussian"] = option(
        "auto", "entries of the random bases; auto: rademacher, for reference-code uniform"
    )
    coordinates: Literal["auto", Coordinates] = option(
        "auto",
        "how a client sends its coordinates: intB as levels of B bits; choiceC as the sign and the number, "
        "in C + 1 bits, of the largest of 2^C candidates, of which 2^C times as many are projected; auto: "
        "choice8, for shared-round int8, for reference-code float32; under secure_aggregation integers",
    )
    seeds: Literal["per-client", "shared-round"] = option(
        "per-client",
        "per-client: a basis for each client and round; shared-round: one for all clients of a round, so "
        "that the server relays their mean alone, and robust.rule can be median or trimmed-mean",
    )
    secure_aggregation: bool = option(
        False,
        "the server learns the sum of a round's updates and no single one; needs seeds=shared-round and the "
        "extra secure",
    )
    secure_threshold: float = option(
        0.5,
        "secure_aggregation: share of a round's clients that must stay to its end; always more than half",
        at_least=0.5,
        at_most=1,
    )
    secure_range: float = option(
        1.0,
        "secure_aggregation: what round 1's updates must stay within, roughly the largest change of a "
        "weight; later rounds go by the last one's mean",
        above=0,
    )
    server_warmup: int | None = option(
        None,
        "rounds in which the server's step rises linearly to server_learning_rate; the first updates are the "
        "largest, and so is their noise; none: 3, for reference-code 0",
        at_least=0,
    )
    rounding: Literal["nearest", "stochastic"] = option(
        "nearest",
        "how the server's step leaves bfloat16 and float16 weights: to nearest, where steps below half of a "
        "weight's last place are lost, or by chance, so that the mean is right; the same on every machine",
    )
    slr_schedule: Literal["none", "linear", "cosine"] = option(
        "linear", "reference-code: how server_learning_rate falls to slr_min over the rounds"
    )
    slr_min: float = option(0.0, "reference-code: where server_learning_rate falls to", at_least=0)
    pool_momentum: float = option(
        0.0,
        "reference-code: what is kept of the pool's coefficients; the authors' default is 0.9",
        at_least=0,
    )

    @property
    def chosen_granularity(self) -> int | Literal["tensor", "packed", "joined"]:
        """`granularity`, auto resolved; joined blocks are divided (`ferret.first_plan`)."""
        if self.granularity == "auto":
            return "joined" if self.mode == "paper" else "packed"
        return self.granularity

    @property
    def chosen_coordinates(self) -> Coordinates:
        """`coordinates`, auto resolved."""
        if self.coordinates != "auto":
            return self.coordinates
        if self.mode == "reference-code" or self.secure_aggregation:
            return "float32"
        return "choice8" if self.seeds == "per-client" else "int8"

    @property
    def chosen_server_warmup(self) -> int:
        """`server_warmup`, none resolved."""
        if self.server_warmup is None:
            return 3 if self.mode == "paper" else 0
        return self.server_warmup

    @property
    def chosen_basis(self) -> Literal["rademacher", "uniform", "gaussian"]:
        """`basis`, auto resolved."""
        if self.basis == "auto":
            return "rademacher" if self.mode == "paper" else "uniform"
        return self.basis


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained in place of the model's own weights, with the numbers of FedIT and its kin."""

    type: Literal["auto", "none", "lora", "prompt-tuning", "p-tuning"] = option(
        "auto", "PEFT adapter; auto: that of fedit, fedprompt or fedptuning, none for other algorithms"
    )
    lora_r: int = option(8, "rank of LoRA's matrices", at_least=1)
    lora_alpha: int = option(16, "LoRA's product is multiplied by this over its rank", at_least=1)
    lora_dropout: float = option(0.05, "dropout in front of LoRA's matrices", at_least=0, at_most=1)
    num_virtual_tokens: int = option(20, "tokens that prompt-tuning and p-tuning put in front", at_least=1)
    encoder_hidden_size: int | None = option(
        None, "width of p-tuning's MLP; none: that of the embeddings", at_least=1
    )
    encoder_dropout: float = option(
        0.1, "p-tuning's dropout, which PEFT's MLP does not have", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class ZerothOrderConfig:
    """Training by losses alone: fedzo, fedkseed, fedkseed-pro, decomfl, feedsign.

    Of the training section these take per_device_train_batch_size and nothing else. What is none here is what
    the algorithm's authors publish (`zeroth_order.PUBLISHED`).
    """

    steps: int | None = option(
        None, "local steps T a round; none: 200 for fedzo and fedkseed, else 1", at_least=1
    )
    perturbations: int | None = option(
        None, "directions P a step, of which the mean is taken; none: 1", at_least=1
    )
    learning_rate: float | None = option(
        None, "step along a direction; none: 3e-7 for fedzo and fedkseed, else 1e-4", above=0
    )
    eps: float | None = option(
        None,
        "how far off the weights losses are taken; none: 5e-4 for fedzo and fedkseed, else 1e-3",
        above=0,
    )
    candidate_seeds: int = option(
        4096, "fedkseed: directions that all clients draw from", at_least=1, at_most=2**24
    )
    clip: float = option(1000.0, "fedkseed-pro: slopes count up to this magnitude for the odds", above=0)
    basis: Literal["rademacher", "uniform", "gaussian"] = option(
        "gaussian", "elements of a direction; all have mean 0 and variance 1"
    )
    generator: Literal["streams", "torch"] = option(
        "streams", "where directions come from; torch: its generator, as in other implementations"
    )
    perturbation: Literal["auto", "layerwise", "in_place"] = option(
        "auto",
        "layerwise: each module computes with a perturbed copy of its own parameters; in_place: all of them "
        "move there and back, rounded each time; auto: layerwise with the streams, in_place with torch",
    )
    snapshot: Literal["memory", "disk"] = option(
        "memory",
        "where the weights stand that are gone back to; disk: in TMPDIR, so that memory holds the model once",
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """How the global model is evaluated: its loss after each round, and scores of the texts it generates."""

    max_samples: int | None = option(200, "records evaluated, the first of the split; none: all", at_least=1)
    per_device_eval_batch_size: int = option(8, "records a batch", at_least=1)
    scores: tuple[ScoreName, ...] = option(
        (), "scores of generated text; rouge-l is of the package rouge, rougeL of rouge_score"
    )
    generate_every: int = option(
        0, "text is generated before round 1 and after each of so many rounds; 0: after the last", at_least=0
    )
    max_generated_samples: int | None = option(
        None, "of the records evaluated, how many get text generated, the first ones; none: all", at_least=1
    )
    max_new_tokens: int = option(128, "tokens of a generated text at most", at_least=1)


@dataclass(frozen=True)
class RobustConfig:
    """Which updates a round takes, and how it adds them up."""

    rule: Literal["mean", "norm-clip", "median", "trimmed-mean"] = option(
        "mean",
        "mean: by the clients' weights; norm-clip: of updates scaled down to the round's median norm; "
        "median, trimmed-mean: coordinate by coordinate, where clients share them, all clients alike",
    )
    clip_ratio: float = option(1.0, "norm-clip: the multiple of the median norm that is clipped to", above=0)
    trim: float = option(
        0.1,
        "trimmed-mean: share of the clients left out at either end; of three or more at least one, unless 0",
        at_least=0,
        at_most=0.49,
    )
    max_norm_ratio: float = option(
        1000.0, "updates are rejected whose norm is more than this times the median's", at_least=1
    )
    max_weight_ratio: float = option(
        1000.0, "updates are rejected whose weight is more than this times the median's", at_least=1
    )
    quorum: int = option(1, "updates that a round must have taken in order to count", at_least=1)
    on_dissent: Literal["stop", "reject"] = option(
        "stop", "what happens if a client says that its weights are not the server's; reject goes on without"
    )


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of whole clients: what a client sends is clipped and hidden in normal noise."""

    noise: Literal["none", "central", "distributed", "local"] = option(
        "none",
        "who adds it: the server, to the clients' sum; every client its part, so that the sum has enough; "
        "every client all of it, to its own update; none: nobody, and nothing is promised",
    )
    clip_norm: float = option(
        1.0,
        "updates are scaled down to this norm: of coordinates for ferret, of parameters for fedavg",
        above=0,
    )
    noise_multiplier: float | None = option(
        None,
        "the noise's standard deviation over clip_norm; none: as much as target_epsilon takes",
        at_least=0.3,
    )
    target_epsilon: float | None = option(
        None, "what all rounds may spend; with a noise_multiplier, the run ends when it is spent", above=0
    )
    delta: float = option(
        1e-5, "what epsilon is told at; much less than one over the clients", above=0, at_most=0.5
    )
    sampling: Literal["public", "secret"] = option(
        "public",
        "public: everybody can work out who is drawn, by the run's seed; secret: every client is drawn by a "
        "coin that the server alone knows, so that less noise is needed (central)",
    )
    noise_seed: int | None = option(
        None,
        "none: noise from the operating system, never the same again; a number, for experiments: noise that "
        "repeats, and hides nothing from those who know it",
        at_least=0,
        at_most=2**63 - 1,
    )

    @property
    def of_sums(self) -> bool:
        """Whether sums are protected, and single updates are not."""
        return self.noise in ("central", "distributed")


@dataclass(frozen=True)
class LedgerConfig:
    """What a run writes down so that it can go on after a crash."""

    snapshot_every: int = option(
        10, "rounds between snapshots of the weights, from which resuming is quicker; 0: none", at_least=0
    )
    keep_snapshots: int = option(2, "snapshots kept, the newest ones", at_least=1)
    verify_weights: bool = option(
        True,
        "server and clients compare digests of their weights each round, and the run stops if they differ",
    )


@dataclass(frozen=True)
class FederationConfig:
    """How a server deals with clients elsewhere (`ferret serve`); a simulation heeds over_selection alone.

    A round's deadline is deadline_factor times the 0.9 quantile of the reply times of the last five rounds,
    within min_deadline and max_deadline; until there are any it is max_deadline.
    """

    over_selection: float = option(
        0.0, "clients drawn beyond client_fraction, as a share; the first replies count", at_least=0
    )
    deadline_factor: float = option(3.0, "of the deadline that adapts to reply times", at_least=1)
    min_deadline: float = option(30.0, "seconds that a round waits for replies at least", above=0)
    max_deadline: float = option(
        3600.0, "seconds at most; with fewer replies than robust.quorum then, the run stops", above=0
    )
    join_timeout: float = option(
        600.0, "seconds that the first round waits for its clients to connect", at_least=0
    )
    poll: float = option(0.2, "seconds between looks for replies", at_least=0.01, at_most=60)


@dataclass(frozen=True)
class SimulationConfig:
    """A federated run."""

    model: str = option("", "folder or hub name of a causal language model, or builtin:tiny-llama")
    data: str = option(
        "",
        "a .jsonl, .json, .parquet, .csv or .tsv file, a folder with train and test files, a hub name, or "
        "builtin:NAME",
    )
    out: str = option("", "folder for the run's results")
    trackers: tuple[TrackerName, ...] = option(
        (), "where each round's numbers go beside metrics.jsonl; each is an extra of the same name"
    )
    algorithm: Literal[
        "ferret",
        "fedavg",
        "fedit",
        "fedit-sgd",
        "fedprompt",
        "fedptuning",
        "fedzo",
        "fedkseed",
        "fedkseed-pro",
        "decomfl",
        "feedsign",
    ] = option("ferret", "what clients send and how the server adds it up")
    rounds: int = option(20, "communication rounds", at_least=1, at_most=2**32 - 1)
    num_clients: int | None = option(
        None,
        "clients that share the training data; none: as many as natural-id finds values, else as "
        "dataset.protocol has it: 200 for dolly, 3 for others",
        at_least=1,
        at_most=2**32 - 1,
    )
    client_fraction: float = option(1.0, "share of the clients drawn in each round", above=0, at_most=1)
    client_weights: Literal["auto", "uniform", "examples", "batches"] = option(
        "auto", "what a client counts by in the mean; auto: as the algorithm was published"
    )
    server_learning_rate: float = option(1.0, "step along the clients' mean update", above=0)
    seed: int = option(0, "every random choice of the run follows from it", at_least=0, at_most=2**63 - 1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "the model's dtype; auto: as stored"
    )
    allow_pickle: bool = option(
        False, "models with weights in other files than safetensors are opened, which may run code in them"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one")
    num_threads: int | None = option(
        None,
        "CPU threads of torch; none: its own choice. Runs repeat to the bit for equal numbers",
        at_least=1,
    )
    full_determinism: bool = option(True, "kernels that repeat to the bit only; false allows faster ones")
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    ferret: FerretConfig = field(default_factory=FerretConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    zeroth_order: ZerothOrderConfig = field(default_factory=ZerothOrderConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)

    def save(self, path: Path) -> None:
        """Writes the config as YAML, which `read_yaml` takes back."""
        path.write_text(
            yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True), "utf-8"
        )


def leaves() -> Iterator[Leaf]:
    """All settings of a run, in the order of the fields."""
    return settings.leaves(SimulationConfig)


def build(given: Iterable[Setting], required: Iterable[str] = ("model", "data", "out")) -> SimulationConfig:
    """The config with these settings; a later one wins over an earlier one. Raises ConfigError."""
    config = settings.fill(SimulationConfig, given)
    for key in required:
        if not getattr(config, key):
            raise ConfigError(f"{key}: expected a value, got none; give {key}=..")
    compatibility.check(config)
    return config
