"""The command line: what goes to which stream, exit statuses, and that it does what the functions do."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from cli_helpers import check_error, runner, write_model

import optjax
from optjax.cli.arguments import COMMANDS, parse
from optjax.cli.models import default_dtype
from optjax.cli.stop import StopBefore
from optjax.cli.terminal import report

POSITIONS = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=POSITIONS)


@pytest.fixture
def run(monkeypatch, capsys):
    return runner(monkeypatch, capsys)


def spawn(*words: str | Path, cache: Path, **options) -> subprocess.Popen:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    environment.pop("OPTJAX_DEBUG", None)
    command = [sys.executable, "-m", "optjax", *map(str, words)]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1], **(pipes | options))
    finally:
        signal.signal(signal.SIGINT, before)


def expected_texts(model: Path, prompts: list[str], n: int, seed: int | None = None, **options) -> list[str]:
    """What `generate` continues the prompts with."""
    params, tokenizer = optjax.load(model)
    ids, mask = tokenizer(prompts)
    key = None if seed is None else jax.random.key(seed)
    if "negative_prompt" in options:
        negative = tokenizer([options.pop("negative_prompt")] * len(prompts))
        options |= dict(zip(("negative_prompt_ids", "negative_prompt_attention_mask"), negative, strict=True))
    options |= {"suppress_tokens": tokenizer.unused_ids(340), "do_sample": seed is not None}
    made = optjax.generate(params, ids, mask, max_new_tokens=n, key=key, **options)
    return [tokenizer.decode(row[ids.shape[1] :]) for row in np.asarray(made)]


DEFAULTS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--greedy --ignore-eos", {"eos_token_id": []}),
        ("--seed 5", {"seed": 5, **DEFAULTS}),
        ("--seed 5 --temperature 2 --top-k 0 --top_p=0.9", {"seed": 5, "temperature": 2.0, "top_k": 0, "top_p": 0.9}),
        (
            "--seed 6 --min-p 0.1 --typical-p 0.9 --repetition-penalty 1.3 --no-repeat-ngram-size 2 --min-new-tokens 3",
            {"seed": 6, **DEFAULTS, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.3}
            | {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
        ),
        (
            "--num-beams 3 --length-penalty 2 --early-stopping true",
            {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        ),
        ("--num-beams 2 --do-sample --seed 3", {"num_beams": 2, "do_sample": True, "seed": 3, **DEFAULTS}),
        ("--penalty-alpha 0.5", {"penalty_alpha": 0.5, "top_k": 4}),
        (
            "--seed 9 --guidance-scale 1.5 --negative-prompt dog",
            {"seed": 9, **DEFAULTS, "guidance_scale": 1.5, "negative_prompt": "dog"},
        ),
    ],
)  # fmt: skip
def test_text_is_what_generate_gives(run, model, words, options):
    prompt = "naïve 😀 日本語"
    result = run("generate", "--model", model, prompt, "-n", 40, *words.split())
    assert result.status == 0, result.err
    [text] = expected_texts(model, [prompt], 40, **options)
    assert result.out == prompt + text + "\n"
    # The random model writes bytes that are no characters, and the stream holds them back until they are certain.
    assert "\ufffd" in text
    assert "the first after" not in result.err and str(model) in result.err
    searches = [name for name in ("num_beams", "penalty_alpha") if name in options]
    assert f"seed {options.get('seed')}" in result.err or (searches or ["greedy"])[0] in result.err


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            "--seed 4 --epsilon-cutoff 0.001 --eta-cutoff 0.002 --encoder-repetition-penalty 1.2 "
            "--encoder-no-repeat-ngram-size 2 --exponential-decay-length-penalty 10 1.01",
            {"epsilon_cutoff": 0.001, "eta_cutoff": 0.002, "encoder_repetition_penalty": 1.2}
            | {"encoder_no_repeat_ngram_size": 2, "exponential_decay_length_penalty": (10, 1.01)},
        ),
        ("--greedy --assistant-model {model} --num-assistant-tokens 3", {"num_assistant_tokens": 3}),
        (
            "--greedy --cache-dtype int8 --prefill-chunk-size 128 --attn-implementation eager",
            {"cache_dtype": "int8", "prefill_chunk_size": 128, "attn_implementation": "eager"},
        ),
        (
            "--greedy --prompt-lookup-num-tokens 4 --max-matching-ngram-size 1",
            {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
        ),
    ],
)  # fmt: skip
def test_options_reach_generate(run, model, monkeypatch, words, options):
    """They are checked by the real `stream`, which runs nothing until its first token is asked for."""
    real, told = optjax.stream, {}

    def stream(*arguments, **options):
        real(*arguments, **options)
        told.update(options)
        return iter([np.array([265])])

    monkeypatch.setattr(optjax, "stream", stream)
    result = run("generate", "--model", model, "the", "-n", 9, *words.format(model=model).split())
    assert result.status == 0, result.err
    assert {name: told[name] for name in options} == options
    if "assistant" in words:
        assert f"greedy, assistant_model {model}, num_assistant_tokens 3" in result.err
        assistant = told["assistant_model"]
        jax.tree.map(np.testing.assert_array_equal, assistant, optjax.load_params(model))


def test_only_the_continuation_and_the_speed(run, model):
    jax.clear_caches()  # a program says once which attention it has
    result = run("generate", "--model", model, "the", "--greedy", "-n", 5, "--no-echo", "--stats")
    assert result.err.endswith("; attention eager\n")
    assert result.out == expected_texts(model, ["the"], 5)[0] + "\n"
    assert re.search(r"5 tokens: the first after [\d.]+ s, then [\d,]+ tokens/s", result.err)
    assert run("generate", "--model", model, "the", "--greedy", "-n", 5, "--quiet").err == ""


def test_ids_without_text_never_come(run, model):
    """Rows of the embedding that the tokenizer lacks are probable, and are suppressed (Hugging Face #18268)."""
    params, tokenizer = optjax.load(model)
    free = optjax.generate(
        params, *tokenizer("the"), max_new_tokens=64, key=jax.random.key(1), do_sample=True, top_k=0, eos_token_id=[]
    )
    assert (np.asarray(free) >= tokenizer.vocab_size).any()
    words = ("--seed", 1, "--top-k", 0, "--top-p", 1, "--temperature", 1, "-n", 64, "--ignore-eos")
    result = run("generate", "--model", model, "the", *words)
    assert result.status == 0, result.err
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": []}
    assert result.out == "the" + expected_texts(model, ["the"], 64, 1, **options)[0] + "\n"


def test_a_new_seed_each_time_gives_the_same_text_again(run, model):
    first = run("generate", "--model", model, "the", "-n", 20)
    seed = re.search(r"seed (\d+)", first.err)[1]
    assert run("generate", "--model", model, "the", "-n", 20, "--seed", seed).out == first.out
    other = run("generate", "--model", model, "the", "-n", 20)
    assert re.search(r"seed (\d+)", other.err)[1] != seed


def test_prompts_from_pipes_and_files(run, model, tmp_path):
    greedy = ("--model", model, "--greedy", "-n", 8)
    piped = run("generate", *greedy, stdin="the dög\nand\n".encode())
    assert piped.out == "the dög\nand" + expected_texts(model, ["the dög\nand"], 8)[0] + "\n"
    assert run("generate", "the", *greedy, stdin=b"not read").out.startswith(
        "the" + expected_texts(model, ["the"], 8)[0]
    )

    prompts = ["the", "the old house stood", "dög\u2028x"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffthe\r\n\nthe old house stood\n  \ndög\u2028x".encode())
    expected = expected_texts(model, prompts, 8)
    result = run("generate", *greedy, "--file", file, "--batch-size", 2)
    texts = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    assert result.out == "".join(f"==> {i} of 3 <==\n{text}\n" for i, text in enumerate(texts, 1))

    result = run("generate", *greedy, "--file", "-", "--jsonl", stdin=file.read_bytes())
    lines = [json.loads(line) for line in result.out.split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == prompts
    assert [line["text"] for line in lines] == expected
    assert all(line["tokens"] == 8 and line["finish_reason"] == "length" for line in lines)


def test_texts_end_at_eos(run, model):
    """Every continuation that --min-new-tokens does not hold back ends in </s> here, some sooner than others."""
    words = ("--model", model, "--seed", 3, "--temperature", 1, "--top-k", 0, "--num-return-sequences", 40, "-n", 64)
    lines = [json.loads(line) for line in run("generate", "the", *words, "--jsonl").out.split("\n")[:-1]]
    options = {"temperature": 1.0, "top_k": 0, "top_p": 0.95, "num_return_sequences": 40}
    assert [line["text"] for line in lines] == expected_texts(model, ["the"], 64, 3, **options)
    assert {line["finish_reason"] for line in lines} == {"eos", "length"}
    assert all(line["tokens"] == 64 for line in lines if line["finish_reason"] == "length")
    assert any(line["tokens"] < 64 for line in lines)
    lines = [
        json.loads(line) for line in run("generate", "the", *words, "--jsonl", "--ignore-eos").out.split("\n")[:-1]
    ]
    assert {(line["finish_reason"], line["tokens"]) for line in lines} == {("length", 64)}


def test_stop(run, model):
    """Texts end before the string that comes first, in JSON lines and as they come; and not without it."""
    words = ("generate", "the", "--model", model, "--seed", 3, "-n", 64, "--ignore-eos", "-q")
    [line] = run(*words, "--jsonl").out.split("\n")[:-1]
    whole = json.loads(line)["text"]
    pieces = re.findall("[!-[]{2}", whole)
    late, soon = pieces[-1], pieces[len(pieces) // 2]
    assert whole.find(soon) < whole.find(late)
    for options in (["--stop", late], ["--stop", late, "--stop", soon], ["--stop", "not there"]):
        stops = [word for word in options if word != "--stop"]
        end = min((at + len(stop), at) for stop in [*stops, whole] if (at := whole.find(stop)) >= 0)[1] or len(whole)
        [line] = run(*words, *options, "--jsonl").out.split("\n")[:-1]
        line = json.loads(line)
        assert line["text"] == whole[:end] and line["finish_reason"] == ("stop" if end < len(whole) else "length")
        assert run(*words, *options).out == "the" + whole[:end] + "\n"
    assert run("generate", "the", "--stop", "").status == 2


def test_stop_before_by_brute_force():
    """Pieces of a text of few letters: nothing is shown that might be cut off, and nothing is lost."""
    rng = np.random.default_rng(0)
    cuts = 0
    for _ in range(500):
        text = "".join(rng.choice(list("ab\n"), 20))
        stops = ["".join(rng.choice(list("ab\n"), rng.integers(1, 6))) for _ in range(rng.integers(1, 4))]
        begin = int(rng.integers(0, 6))
        cut, shown, at = StopBefore(stops, text[:begin]), "", begin
        while at < len(text):
            step = int(rng.integers(1, 4))
            shown += cut.push(text[at : at + step])
            at += step
        shown += cut.finish()
        ends = [(end, -len(stop)) for end in range(begin + 1, 21) for stop in stops if text[:end].endswith(stop)]
        ends = [(end, size) for end, size in ends if end + size >= 0]
        expected = text[begin : max(begin, sum(min(ends)))] if ends else text[begin:]
        assert (shown, cut.stopped) == (expected, bool(ends)), (text, stops, begin)
        cuts += cut.stopped
    assert 100 < cuts < 490


def test_without_a_prompt_there_is_a_sample(run):
    """With opt-mini, which is what --model is by default."""
    result = run("generate", "-n", 8, "--seed", 1)
    assert result.status == 0, result.err
    assert result.out.startswith("The old house")
    assert "no prompt is given" in result.err
    assert re.search(r"^opt-mini: [\d.]+M parameters, float32 on \w+; it ships with optjax", result.err, re.MULTILINE)


def test_what_lacks_memory(capsys):
    """XLA says RESOURCE_EXHAUSTED of a GPU's memory, and of that of its cores, where a smaller model helps nobody."""
    small = "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 114688, available: 101376"
    for words, said in (("RESOURCE_EXHAUSTED: Out of memory while allocating", "a smaller model"), (small, small)):
        assert report(RuntimeError(words)) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "capability", "dtype"),
    [("cpu", None, "float32"), ("gpu", "7.5", "float16"), ("gpu", "8.0", "bfloat16"), ("gpu", "gfx942", "bfloat16"),
     ("tpu", None, "bfloat16")],
)  # fmt: skip
def test_the_dtype_is_one_that_the_device_has(monkeypatch, backend, capability, dtype):
    """A T4 has no bfloat16: XLA would copy every weight to float32 at each step."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability or "")])
    assert default_dtype() == dtype


@pytest.mark.parametrize(
    ("words", "stdin", "status", "said"),
    [
        (["generate", "--temprature", "1"], None, 2, ["--temprature", "did you mean --temperature?"]),
        (["genrate"], None, 2, ["genrate", "generate"]),
        (["generate", "the", "old", "house"], None, 2, ['"the old house"']),
        (["generate", "the", "--file", "x"], None, 2, ["--file"]),
        (["generate", "--file", "no/such"], None, 1, ["no/such"]),
        (["generate", "--file", "-"], b"\n \n", 2, ["standard input"]),
        (["generate"], b"", 2, ["standard input"]),
        (["generate"], b"\xff\xfe", 1, ["UTF-8"]),
        (["generate", "the", "--greedy", "--seed", "1", "--top-p", ".5"], None, 2, ["--top-p, --seed"]),
        (["generate", "the", "--greedy", "--num-return-sequences", "2"], None, 2, ["--num-return-sequences"]),
        (["generate", "the", "--num-beams", "2", "--seed", "1"], None, 2, ["--num-beams", "--seed"]),
        (["generate", "the", "--penalty-alpha", ".5", "--num-return-sequences", "2"], None, 2, ["--penalty-alpha"]),
        (["generate", "the", "--length-penalty", "2"], None, 1, ["length_penalty", "num_beams"]),
        (["generate", "the", "--negative-prompt", "a"], None, 2, ["--negative-prompt", "--guidance-scale"]),
        (["generate", "the", "--num-assistant-tokens", "2"], None, 2, ["--assistant-model"]),
        (["generate", "the", "--exponential-decay-length-penalty", "1.5", "2"], None, 2, ["whole number", "1.5"]),
        (["generate", "the", "--exponential-decay-length-penalty", "inf", "2"], None, 2, ["whole number", "inf"]),
        (["generate", "the", "--prompt-lookup-num-tokens", "2", "--num-beams", "2"], None, 1, ["num_beams"]),
        (["generate", "the", "-n", "0"], None, 2, ["-n", "'0'"]),
        (["generate", "the", "--seed", "-1"], None, 2, ["--seed"]),
        (["generate", "the", "--temperature", "0"], None, 1, ["temperature", "above 0"]),
        (["generate", "the", "--top-p", "7"], None, 1, ["top_p"]),
        (["generate", "the", "-n", str(POSITIONS)], None, 1, [f"--max-new-tokens {POSITIONS - 2} or less"]),
        (["generate", "dog " * POSITIONS], None, 1, ["shorten the prompt", str(POSITIONS)]),
        (["generate", "lone \udcff surrogate"], None, 1, ["UTF-8"]),
        (["convert", "x"], None, 2, ["DEST"]),
        (["convert", "no/such/model", "{tmp}/new"], None, 1, ["no/such/model"]),
        (["info", "opt-35m"], None, 1, ["did you mean opt-350m?"]),
        (["info", "{tmp}"], None, 1, ["holds no checkpoint"]),
    ],
)  # fmt: skip
def test_errors_are_one_line(run, model, tmp_path, words, stdin, status, said):
    words = [word.format(tmp=tmp_path) for word in words]
    if words[0] == "generate":
        words += ["--model", str(model)]
    check_error(run(*words, stdin=stdin), status, *said)


def test_a_model_without_a_tokenizer(run, model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    check_error(run("generate", "the", "--model", tmp_path), 1, "no tokenizer", "tokenizer.json", "--tokenizer")
    result = run("generate", "the", "--model", tmp_path, "--tokenizer", model, "--greedy", "-n", 5)
    assert result.out == "the" + expected_texts(model, ["the"], 5)[0] + "\n"


def test_unexpected_failures_name_the_way_to_the_traceback(run, model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("something broke")

    monkeypatch.setattr(optjax, "stream", fail)
    check_error(run("generate", "the", "--model", model), 1, "RuntimeError: something broke", "--debug")
    with pytest.raises(RuntimeError, match="something broke"):
        run("generate", "the", "--model", model, "--debug")
    monkeypatch.setenv("OPTJAX_DEBUG", "1")
    with pytest.raises(RuntimeError, match="something broke"):
        run("generate", "the", "--model", model)


def test_help(run):
    for words in ([], *([command] for command in COMMANDS)):
        result = run(*words, "--help")
        assert result.status == 0 and result.err == ""
        assert "examples:" in result.out and max(map(len, result.out.split("\n"))) <= 100
    assert run().status == 2


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_the_examples_of_the_help_are_possible(run, command):
    examples = re.findall(
        r"^  .*?\boptjax ((?:generate|score|convert|info|plan).*)$", run(*command, "--help").out, re.MULTILINE
    )
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(re.split(r" {2,}| [>|] ", example)[0])
        assert parse(words).command == words[0]


def test_help_and_published_sizes_do_without_jax():
    program = "import sys; from optjax.cli import main; main(sys.argv[1:]); sys.exit('jax' in sys.modules)"
    for words in (
        ["--help"],
        ["generate", "--help"],
        ["score", "--help"],
        ["--version"],
        ["info"],
        ["info", "opt-175b", "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, cwd=Path(__file__).parents[1]
        )
        assert done.returncode == 0, f"{words}: {done.stderr.decode()}"


def test_version(run):
    assert run("--version").out.startswith(f"optjax {optjax.__version__} (jax {jax.__version__}, Python 3.")


# As processes of their own: signals, pipes, bytes, and what is kept from one run to the next.


def test_process_writes_utf8_and_keeps_compiled_programs(model, tmp_path):
    words = ("generate", "--model", model, "--seed", 5, "-n", 40)
    results = []
    for _ in range(2):
        process = spawn(*words, cache=tmp_path)
        out, err = process.communicate("naïve 日本語".encode())
        assert process.returncode == 0, err.decode()
        results.append((out, sorted((tmp_path / "optjax" / "compiled").rglob("*-cache"))))
    [text] = expected_texts(model, ["naïve 日本語"], 40, 5, **DEFAULTS)
    assert results[0][0].decode() == "naïve 日本語" + text + "\n"
    assert results[0] == results[1] and results[0][1]
    assert oct(results[0][1][0].parent.stat().st_mode & 0o777) == "0o700"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Compiled programs for the tests that follow, which make the same text."""
    return tmp_path_factory.mktemp("cache")


def test_interrupt_ends_quietly(model, cache):
    process = spawn("generate", "the", "--model", model, "-n", 2000, "--ignore-eos", cache=cache)
    assert process.stdout.read(6)  # text has begun to come
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in err and b"error" not in err


def test_a_reader_that_goes_away_is_no_error(model, cache):
    process = spawn("generate", "the", "--model", model, "-n", 2000, "--ignore-eos", cache=cache)
    assert process.stdout.read(6)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 141
    assert b"Traceback" not in err and b"rror" not in err
    process.stdin.close()
    process.stderr.close()


def test_generate_over_a_mesh(run, model):
    words = ("generate", "--model", model, "--greedy", "-n", "8", "the old house", "--no-compile-cache")
    alone = run(*words)
    spread = run(*words, "--mesh", "fsdp=4,tensor=2")
    assert alone.status == spread.status == 0
    assert spread.out == alone.out
    assert "fsdp=4,tensor=2" in spread.err
    wrong = run(*words, "--mesh", "tensor=3")
    assert wrong.status == 1 and "mesh tensor=3 is for 3 devices, and there are 8" in wrong.err
