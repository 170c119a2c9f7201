"""The report shows what a run's files hold, leaves out what they do not, and needs no network."""

import dataclasses
import html.parser
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from pgrpo_jax import charts, cli, config, figures, metrics, report

STEPS, HELD_OUT = 60, 384
SETTINGS = config.Config(
    policy=config.ModelConfig(checkpoint="policy"),
    reward_model=config.ModelConfig(checkpoint="judge"),
)


def training_values(step: int, rng: np.random.Generator) -> dict[str, float]:
    """What one step of P-GRPO may write."""
    done = 1 - math.exp(-step / 25)

    def near(value: float, noise: float = 0.03) -> float:
        return float(np.clip(value + noise * rng.standard_normal(), 0, 1))

    passing = near(0.35 + 0.4 * done)
    return {
        "reward": near(0.9) + passing * 1.7,
        "reward_std": 0.6 - 0.3 * done,
        "frac_reward_zero_std": near(0.05),
        "rewards/format/mean": near(0.9 + 0.1 * done, 0.01),
        "rewards/format/passing": near(0.97 + 0.03 * done, 0.005),
        "rewards/format/failing": near(0.85 + 0.1 * done, 0.02),
        "rewards/outcome/mean": passing,
        "rewards/thinking/mean": near(0.6 + 0.2 * done),
        "rewards/thinking/passing": near(0.6 + 0.2 * done),
        "rewards/thinking/failing": near(0.3 + 0.05 * done, 0.05),
        "rewards/short/mean": near(0.2),
        "groups/all_pass": near(0.1 + 0.4 * done),
        "groups/all_fail": near(0.25 - 0.2 * done),
        "groups/rescued": near(0.05 + 0.35 * done),
        "groups/phantom_advantage": near(0.1 - 0.08 * done, 0.02),
        "groups/all_pass_std": near(0.08, 0.01),
        "completions/mean_length": 44 + 4 * done + rng.standard_normal(),
        "completions/clipped_ratio": near(0.02, 0.01),
        "entropy": near(0.3 - 0.15 * done, 0.01),
        "clip_ratio/high_mean": near(0.004, 0.002),
        "clip_ratio/low_mean": near(0.006, 0.002),
        "mismatch_kl": abs(1e-7 * rng.standard_normal()),
        "grad_norm": 0.4 + 0.1 * rng.random(),
        "learning_rate": 2e-4,
        "oracle/perfect_of_passing": near(0.3 + 0.4 * done),
        "time/rollout_s": 0.6 + 0.05 * rng.random(),
        "time/judge_s": 0.25,
        "time/thinking_s": 0.1,
        "time/update_s": 0.7 + 0.05 * rng.random(),
        "time/step_s": 1.7,
        "tokens_per_s": 5200 + 200 * rng.standard_normal(),
    }


def completion(step: int, sample: int) -> metrics.CompletionRow:
    passes = sample % 2 == 0
    code = "def f(x):\n    x = sorted(x)\n    return [v for v in x if v < 3 and v > 0]\n"
    reasoning = f"a = 7 - 4 = 3.\nsort the list.\nkeep values < 3 & > 0 in step {step}.\n"
    return metrics.CompletionRow(
        problem_id=f"train-0-{step}-{sample}",
        prompt="x is a list.\na is 3 plus 4 minus 4.\nkeep values below a, but first sort.\n",
        completion=f"<think>\n{reasoning}</think>\n<answer>\n{code}</answer>\n",
        reasoning=reasoning,
        code=code,
        verdict="pass" if passes else "timeout",
        verdicts=("pass",) * 6 if passes else ("pass", "pass", "fail", "timeout"),
        tier="landlock",
        rewards={"format": 1.0, "outcome": float(passes), "thinking": 0.83 if passes else None},
        advantage=0.5 if passes else -1.25,
        length=47,
        truncated=False,
    )


def summary(final_metrics: dict[str, float]) -> dict:
    def score(share: float) -> dict[str, float]:
        low, high = metrics.wilson_interval(share * HELD_OUT, HELD_OUT)
        return {"value": share, "low": low, "high": high, "n": HELD_OUT}

    phases = {
        "sft": (140.0, 1_800_000),
        "reward_model": (70.0, 900_000),
        "grpo": (110.0, 560_000),
        "grpo/update": (80.0, 560_000),
    }
    return {
        "pass@1": {
            "before": {"sampled": score(0.349), "greedy": score(0.711)},
            "after": {"sampled": score(0.766), "greedy": score(0.831)},
        },
        "oracle_perfect_of_passing": {"before": 0.31, "after": 0.68},
        "phases": {
            name: {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}
            for name, (seconds, tokens) in phases.items()
        },
        "final_metrics": final_metrics,
        "seed": 0,
        "config_name": "tiny",
    }


def write_run(workdir: pathlib.Path) -> None:
    """A run's folder as the stages would leave it."""
    rng = np.random.default_rng(0)
    with metrics.Log(workdir, "sft") as log:
        for step in range(200):
            loss = 0.3 + 2.5 * math.exp(-step / 30) + 0.02 * rng.standard_normal()
            log.metrics(step, {"loss": loss, "tokens_per_s": 13_000})
    held_out = {"": 0.9, "/accuracy": 0.84, "/rigor": 0.97, "/coherence": 0.9}
    with metrics.Log(workdir, "reward_model") as log:
        for step in range(80):
            fit = 1 - math.exp(-step / 25)
            values = {"loss": 0.69 - 0.4 * fit, "accuracy": 0.5 + 0.42 * fit}
            if step == 79:
                values |= {f"eval/accuracy{name}": value for name, value in held_out.items()}
            log.metrics(step, values)
    with metrics.Log(workdir, "grpo") as log:
        for step in range(STEPS):
            values = training_values(step, rng)
            log.metrics(step, values)
            log.completions(step, [completion(step, sample) for sample in range(4)])
    with metrics.Log(workdir, "evaluate") as log:
        for step in (0, 20, 40, STEPS):
            done = 1 - math.exp(-step / 20)
            log.metrics(
                step,
                {
                    "eval/pass@1": 0.349 + 0.43 * done,
                    "eval/pass@1_greedy": 0.711 + 0.12 * done,
                    "eval/oracle/perfect_of_passing": 0.31 + 0.37 * done,
                },
            )
    (workdir / "config.json").write_text(cli.to_json(SETTINGS))
    metrics.write_json(workdir / "summary.json", summary(values))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "fixture"
    write_run(workdir)
    report.report(workdir)
    return workdir


class Page(html.parser.HTMLParser):
    """What a browser sees: titles, code blocks, what is fetched, which tags were not closed."""

    VOID = ("meta",)

    def __init__(self, page: str):
        super().__init__()
        self.open, self.titles, self.blocks, self.fetched = [], [], [], []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "pre":
            self.blocks.append("")
        names = ("src", "href", "xlink:href", "srcset", "data")
        self.fetched += [value for name, value in attrs if name in names]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.titles.append(data)
        if self.open and self.open[-1] == "pre":
            self.blocks[-1] += data


def page_of(workdir: pathlib.Path) -> Page:
    return Page((workdir / "report.html").read_text())


def test_the_page_is_well_formed_and_fetches_nothing(run):
    page = page_of(run)
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "base"}
    assert page.fetched and all(target.startswith("#") for target in page.fetched)
    text = (run / "report.html").read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_every_part_of_a_whole_run_has_its_place(run):
    assert page_of(run).titles == [
        *("Held-out problems", "pass@1", "Oracle-perfect reasonings"),
        *("Rewards", "Thinking reward", "Format reward", "Outcome reward", "Total reward"),
        "Reward: short",
        *("Groups", "What became of the groups", "Rescued by the process reward"),
        *("Advantage in all-failing groups", "Standard deviation in all-passing groups"),
        *("Policy", "Completion length", "Completions cut at the length limit", "Entropy"),
        *("Clipped tokens", "Sampler against trainer", "Gradient norm", "Learning rate"),
        *("Reward model", "Bradley-Terry loss", "Accuracy on training pairs"),
        "Accuracy on held-out pairs",
        *("Warm-up", "Loss", "Time", "Time by phase", "Seconds a training step"),
        *("Tokens a second", "Sample completions", "Behind the run"),
    ]


def test_what_has_no_data_is_left_out(tmp_path):
    (tmp_path / "config.json").write_text(cli.to_json(SETTINGS))
    with metrics.Log(tmp_path, "sft") as log:
        log.metrics(0, {"loss": 2.0})
        log.metrics(1, {"loss": math.nan})
    report.report(tmp_path)
    assert page_of(tmp_path).titles == ["Warm-up", "Loss", "Behind the run"]
    assert "not finished" in (tmp_path / "report.html").read_text()


def test_terminal_and_page_give_the_same_headline(run, capsys):
    report.report(run)
    shown, page = capsys.readouterr().out, (run / "report.html").read_text()
    # 134 of 384 is 34.9 %, 294.1 of 384 is 76.6 %; intervals by Wilson, checked by hand elsewhere.
    for word in ("34.9 % [30.3, 39.8]", "76.6 % [72.1, 80.6]", "+41.7", "12,857", "320.0"):
        assert word in shown and word in page


def test_a_completion_cannot_become_markup(tmp_path):
    (tmp_path / "config.json").write_text(cli.to_json(SETTINGS))
    attack = "</pre><script>alert(1)</script><b onclick=x>"
    texts = dict.fromkeys(("prompt", "completion", "reasoning", "code", "problem_id"), attack)
    with metrics.Log(tmp_path, "grpo") as log:
        log.metrics(0, {"reward": 1.0})
        log.completions(0, [dataclasses.replace(completion(0, 0), **texts)])
    report.report(tmp_path)
    page = page_of(tmp_path)
    assert not page.tags & {"script", "b"}
    assert page.blocks[:3] == [attack] * 3


def test_samples_are_of_the_first_the_middle_and_the_last_step_passing_and_failing(run):
    samples = report.read(run).samples
    expected = [(s, v) for s in (0, 30, 59) for v in ("pass", "timeout")]
    assert [(row["step"], row["verdict"]) for row in samples] == expected
    reasonings = [block for block in page_of(run).blocks if "sort the list" in block]
    assert reasonings == [row["reasoning"] for row in samples]


def test_a_completion_without_parts_is_shown_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(cli.to_json(SETTINGS))
    plain = dataclasses.replace(completion(0, 1), reasoning="", code="", completion="I give up.")
    with metrics.Log(tmp_path, "grpo") as log:
        log.metrics(0, {"reward": 0.0})
        log.completions(0, [plain])
    report.report(tmp_path)
    assert page_of(tmp_path).blocks[:2] == [plain.prompt, "I give up."]


def test_evaluations_of_all_stages_are_one_curve_in_the_order_of_steps():
    stages = {
        "evaluate": {"eval/pass@1": ([60, 0], [0.8, 0.3])},
        "grpo": {"eval/pass@1": ([20], [0.5])},
    }
    drawn = {}

    def lines(given, *, percent):
        drawn.update({line.label: line for line in given})
        return "<svg></svg>"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "lines", lines)
        figures.evaluation(stages, summary({}))
    assert drawn["sampled"].x == [0, 20, 60] and drawn["sampled"].y == [0.3, 0.5, 0.8]
    assert drawn["sampled"].high[1] == metrics.wilson_interval(192, 384)[1]  # half of 384


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path):
    command = [sys.executable, "-m", "pgrpo_jax.report", str(tmp_path)]
    root = pathlib.Path(__file__).parent.parent
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith(
        f"{tmp_path} is not a run's folder: it holds no config.json"
    )
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_chart_takes_every_colour_from_the_page_and_is_the_same_each_time():
    line = charts.Line("a", "teal", range(50), [0.5, math.nan] * 25, [0.4] * 50, [0.6] * 50)
    bars = {"long": 140.0, "short": 70.0}
    for draw in (
        lambda: charts.lines([line], percent=True),
        lambda: charts.stacked(range(3), {"a": [1, 2, 3], "b": [1, 1, 1]}, ("blue", "red")),
        lambda: charts.bars(bars, percent=False, unit=" s"),
    ):
        assert draw() == draw()
        assert not re.search(r"#[0-9a-fA-F]{6}\b", draw())
    assert "var(--teal)" in charts.lines([line], percent=True)
    assert ">140 s<" in charts.bars(bars, percent=False, unit=" s")


def test_moving_mean_by_hand():
    y = np.array([4.0, 1.0, 1.0, 7.0, math.nan, 3.0, 5.0, 100.0])
    # 3 to each side, fewer towards an end: 4; (4+1+1)/3; (4+1+1+7)/4, the NaN left out;
    # (4+1+1+7+3+5)/6; (1+1+7+3+5+100)/6; (7+3+5+100)/4; (3+5+100)/3; 100.
    expected = [4, 2, 13 / 4, 21 / 6, 117 / 6, 115 / 4, 108 / 3, 100]
    np.testing.assert_allclose(charts.moving_mean(y), expected)
    assert math.isnan(charts.moving_mean(np.array([math.nan]))[0])
