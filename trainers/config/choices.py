"""The values that settings choose from; each is a text in YAML and on a command line. No torch."""

from __future__ import annotations

from enum import StrEnum


class Attention(StrEnum):
    """Attention backends, all of which keep packed documents apart; `auto` is the fastest that model, device and settings allow."""

    auto = "auto"
    varlen = "varlen"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"
    flex = "flex"
    sdpa = "sdpa"
    eager = "eager"


class Experts(StrEnum):
    """How a mixture's experts are computed; `auto` is grouped_mm where sizes and architecture allow it, else eager."""

    auto = "auto"
    grouped_mm = "grouped_mm"
    batched_mm = "batched_mm"
    eager = "eager"


class Layout(StrEnum):
    """Row layouts; `auto` looks at the keys of the first row."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    question_answer = "question_answer"
    prompt_completion = "prompt_completion"
    preference = "preference"
    ranked = "ranked"
    unpaired = "unpaired"
    styles = "styles"
    text = "text"


class Supervise(StrEnum):
    """Which tokens are trained: every assistant turn, only the last one, or all tokens."""

    assistant = "assistant"
    last = "last"
    all = "all"


class DocumentOf(StrEnum):
    """What of a conversation is one document: a whole row, or each assistant turn as the model sees it when it answers."""

    row = "row"
    turn = "turn"


class StyleRows(StrEnum):
    """What a row of texts in several styles becomes: a row for each pair of them in both directions, or one."""

    both = "both"
    one = "one"


class Reasoning(StrEnum):
    """What becomes of reasoning in front of an answer: trained as it is written, in the row without loss, or left out of the row."""

    keep = "keep"
    mask = "mask"
    strip = "strip"  # type: ignore[assignment]  # shadows str.strip, which nobody calls on a member


class TooLong(StrEnum):
    """What becomes of a row longer than `seq_len`; `split` cuts plain text into several rows."""

    truncate = "truncate"
    drop = "drop"
    split = "split"  # type: ignore[assignment]  # shadows str.split, which nobody calls on a member


class DataSource(StrEnum):
    """Where rows come from: files or a hub data set, the running Python's documentation, the larger of two digits, or reasoning-gym."""

    files = "files"
    python_docs = "python_docs"
    digits = "digits"
    reasoning_gym = "reasoning_gym"


class ObjectiveName(StrEnum):
    """Fine-tuning, continued pre-training, preferences, answers wanted or not, scores of documents, a teacher's tokens, or rewards."""

    sft = "sft"
    cpt = "cpt"
    dpo = "dpo"
    simpo = "simpo"
    cpo = "cpo"
    orpo = "orpo"
    reward = "reward"
    classify = "classify"
    kto = "kto"
    distil = "distil"
    grpo = "grpo"
    ppo = "ppo"


class Divergence(StrEnum):
    """How far a model is from its teacher: Kullback-Leibler of the teacher's tokens, of its own, or both against a mixture of the two."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"


class Advantage(StrEnum):
    """How much better than expected an answer is: from the rewards of all answers to its prompt, or of the whole step."""

    grpo = "grpo"
    dr_grpo = "dr_grpo"
    rloo = "rloo"
    reinforce_pp = "reinforce_pp"
    reinforce_pp_baseline = "reinforce_pp_baseline"


class KL(StrEnum):
    """How the divergence from the reference is estimated at a token that was drawn: its log-ratio, or one that is never below 0."""

    k1 = "k1"
    k3 = "k3"


class Average(StrEnum):
    """What a step's policy loss is a mean of: answers, each a mean of its tokens; all tokens; or answers over a constant length."""

    answers = "answers"
    tokens = "tokens"
    constant = "constant"


class Ratio(StrEnum):
    """Of what the policy's probability is compared with the sampler's: of each token, or an answer's geometric mean of them."""

    token = "token"
    sequence = "sequence"


class PreferenceLoss(StrEnum):
    """What a pair's margin is put through: the log-sigmoid, a hinge (SLiC), or the square around 1 / (2 beta) (IPO)."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"


class FDivergence(StrEnum):
    """How far from the reference a model may go is measured by this divergence, whose derivative is what DPO compares."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    jensen_shannon = "jensen_shannon"
    alpha = "alpha"


class PairsOf(StrEnum):
    """Which answers of a ranked list are compared: best and worst, best and one below it, all, or those next to each other by score."""

    best_worst = "best_worst"
    best_random = "best_random"
    all = "all"
    neighbours = "neighbours"


class PeftMethod(StrEnum):
    """Parameter-efficient methods; `none` trains every parameter."""

    none = "none"
    freeze = "freeze"
    lora = "lora"
    dora = "dora"
    ia3 = "ia3"
    prompt = "prompt"
    prefix = "prefix"
    ptuning = "ptuning"
    adalora = "adalora"
    bottleneck = "bottleneck"


class AdapterActivation(StrEnum):
    """What is between the two matrices of a bottleneck adapter."""

    relu = "relu"
    gelu = "gelu"
    silu = "silu"
    tanh = "tanh"


class AdapterBias(StrEnum):
    """Which biases of the base are trained in addition to LoRA's matrices: none, those of the adapted layers, or all."""

    none = "none"
    adapted = "adapted"
    all = "all"


class AdapterInit(StrEnum):
    """Where adapters begin: peft's own default, a Gaussian, the base (PiSSA), what 4 bits have lost of it (LoftQ), a prompt from words."""

    default = "default"
    gaussian = "gaussian"
    pissa = "pissa"
    loftq = "loftq"
    vocabulary = "vocabulary"


class Quantisation(StrEnum):
    """How a frozen base is stored: in the compute type, or its linear layers in NormalFloat of 4 bits with double quantisation."""

    none = "none"
    nf4 = "nf4"


class EngineName(StrEnum):
    """Sharding engines: PyTorch's fully_shard (FSDP2), and DeepSpeed's ZeRO stage 3."""

    fsdp = "fsdp"
    zero3 = "zero3"


class Offload(StrEnum):
    """Where a part of the training state lives between uses: on the device, in host memory, or in files on NVMe."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OptimizerName(StrEnum):
    """AdamW, and what needs less memory or other steps; `sgd` is without momentum, and keeps no state."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    paged_adamw_32bit = "paged_adamw_32bit"
    adafactor = "adafactor"
    lion = "lion"
    muon = "muon"
    schedule_free_adamw = "schedule_free_adamw"
    sgd = "sgd"


class OptimizerState(StrEnum):
    """Type in which an optimizer keeps its moments between steps; bf16 is rounded stochastically."""

    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(StrEnum):
    """Learning-rate schedules, each after a linear warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class MeshChoice(StrEnum):
    """Who says how ranks are arranged: the settings, or a plan of each arrangement that the run may have."""

    given = "given"
    auto = "auto"


ENCODER_DECODERS = ("t5", "mt5")
"""Values of a config's `model_type` whose models have an encoder for the prompt; Flan-T5 is a t5."""


class Activations(StrEnum):
    """What of a block's forward is kept for its backward: all; attention and matrix products; its input; or that in host memory.

    `auto` takes the first of them, which are in the order of what they cost, with which the run fits.
    """

    keep = "keep"
    selective = "selective"
    block = "block"
    offload = "offload"
    auto = "auto"


class Precision(StrEnum):
    """Compute and storage of activations; master weights and optimizer state are float32 in all."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Float8(StrEnum):
    """Scales of float8 matrix products: none of them, one a row, which is more accurate, or one a matrix, which is faster."""

    none = "none"
    rowwise = "rowwise"
    tensorwise = "tensorwise"


class Metric(StrEnum):
    """What an answer is measured by: what is extracted equals the reference's, ROUGE-L's F with the reference, or it is JSON."""

    exact_match = "exact_match"
    rouge_l = "rouge_l"
    json = "json"


class OnSpike(StrEnum):
    """What follows a step whose loss or gradient norm is far above the last ones'; in each case it updates nothing, but for `none`."""

    none = "none"
    skip = "skip"
    rollback = "rollback"
    stop = "stop"


class Export(StrEnum):
    """Which step a run exports."""

    best = "best"
    last = "last"


class WandbMode(StrEnum):
    """`auto` is online when a key is at hand, otherwise offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class MixBy(StrEnum):
    """What the weights of a mixture are shares of: tokens, padding not counted, or rows."""

    tokens = "tokens"
    rows = "rows"


class MixChange(StrEnum):
    """How the weights of a mixture get from one of `data.mix_steps` to the next: in a straight line, or at once when it is reached."""

    linear = "linear"
    phase = "phase"


class RewardKind(StrEnum):
    """What an answer is rewarded for."""

    exact = "exact"
    math = "math"
    task = "task"
    json = "json"
    length = "length"
    format = "format"  # type: ignore[assignment]  # str has a method of this name
    code = "code"
    model = "model"
    judge = "judge"
    function = "function"


class LengthUnit(StrEnum):
    """What the length of an answer is counted in."""

    tokens = "tokens"
    words = "words"
    characters = "characters"


class Exhausted(StrEnum):
    """What a source of a mixture does once it has run out: begin again, end the run, or leave its share to the others."""

    repeat = "repeat"
    stop = "stop"
    drop = "drop"
