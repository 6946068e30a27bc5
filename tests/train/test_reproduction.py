"""The comparison of methods: what it spends, what its students see, what its report makes of it, and its direction."""

import json

import pytest
import torch
from accelerate import Accelerator

from benchmarks import finish, reproduction, reproduction_report
from benchmarks.reproduction import EQUAL, GROUPS, STUDENTS, Group, RandomJump, Remembering, run_group
from benchmarks.reproduction_report import Results, at_iteration, error, fill, quality, reach
from splam_core import Denoiser, NoiseSchedule, Objective, l2, solver_path
from training.models.load import load_pipeline
from training.run.config import complete
from training.run.distillation import Distillation
from training.run.loop import train

pytestmark = pytest.mark.train


def configs(group: Group, tmp_path):
    given = {**EQUAL, "teacher": "embedded", "output_dir": tmp_path, **group.settings}
    return [complete({**given, **STUDENTS[name]}) for name in group.students + group.once]


@pytest.mark.parametrize("name", GROUPS)
def test_students_of_a_group_take_the_same_jumps_and_cost_the_same(name, tmp_path):
    found = configs(GROUPS[name], tmp_path)
    assert len({(one.skip, one.solver, one.solver_skip, one.guidance_scale, one.timestep_power) for one in found}) == 1
    # By hand: guided teacher steps of k/k_phi count 2 each, student forward 1 and backward 2, target 1.
    assert {one.unet_forwards_per_sample for one in found} == {2 * found[0].skip // found[0].solver_skip + 4}


def test_the_recipes_are_among_the_students(tmp_path):
    recipes = {"splam-embedding": ("k100", "paper"), "splam-default": ("default", "default")}
    names = ("method", "skip", "solver", "solver_skip", "gamma_conditioning", "gamma_one_probability", "timestep_power",
             "gamma_bandwidth", "sigma_level", "loss_type", "huber_c", "ema_decay", "guidance_scale")  # fmt: skip
    for student, (group, recipe) in recipes.items():
        one = configs(Group((student,), GROUPS[group].settings, 1), tmp_path)[0]
        expected = complete({"teacher": "embedded", "recipe": recipe})
        assert {name: getattr(one, name) for name in names} == {name: getattr(expected, name) for name in names}


def test_lockstep_students_learn_what_they_would_alone(tmp_path):
    group = Group(("lcm", "splam-noise-level"), {"train_batch_size": 2, "num_scenes": 8, "skip": 40}, 48)
    rows = run_group(group, 0, tmp_path, samples=2, pictures=0)
    together = {row["method"]: row["endpoint_error"] for row in rows}
    config = complete({**EQUAL, **group.settings, "teacher": "embedded", "output_dir": tmp_path, "max_train_steps": 3,
                       **STUDENTS["lcm"]})  # fmt: skip
    run = Distillation(config, load_pipeline("embedded"), Accelerator(cpu=True))
    steps = train(run)
    for _ in range(3):
        next(steps)
    yardstick = reproduction.Yardstick(tmp_path, 3.0, 2, 0)
    with run.networks.use("target") as unet:
        alone = yardstick.endpoint_error(reproduction.replace(yardstick.teacher, unet=unet))
    assert together["lcm"] == alone != together["splam-noise-level"]
    assert {row["iterations"] for row in rows} == {3} and {row["unet_forwards"] for row in rows} == {48}
    assert {row["teacher_evaluations"] for row in rows} == {3 * 2 * 2 * 2}


def test_a_teacher_is_asked_once_for_each_of_its_steps():
    class Counting(torch.nn.Module):
        dtype, calls = torch.float32, 0

        def forward(self, x, t, **_):
            self.calls += 1
            return reproduction.SimpleNamespace(sample=x + t[:, None])

    unet = Counting()
    teacher, x, t = Remembering(unet), torch.arange(6.0).reshape(2, 3), torch.tensor([5.0, 7.0])  # sums are exact
    first = teacher(x, t).sample
    assert torch.equal(teacher(x.clone(), t.clone()).sample, first) and unet.calls == 1
    assert torch.equal(teacher(x + 1, t).sample, first + 1) and torch.equal(teacher(x, t + 1).sample, first + 1)
    assert unet.calls == 3
    teacher.forget()
    teacher(x, t)
    assert unet.calls == 4 and teacher.seconds > 0


def test_a_random_jump_ends_on_the_teachers_path():
    schedule = NoiseSchedule.scaled_linear()
    t, x = torch.tensor([999, 519, 199]), torch.randn(3, 5)

    def teacher(x, t):
        return torch.cos(x)

    def net(x, t, gamma):
        return torch.tanh(x) + t[:, None] / 1000

    denoiser = Denoiser(schedule)
    random = RandomJump(denoiser, "lcm", 100, 20, l2)
    path = solver_path(teacher, x, t, 100, 20, schedule)
    found = random(net, net, teacher, x, t, torch.tensor([0.0, 0.5, 0.999]))
    for sample, steps in enumerate((1, 3, 5)):
        goal = denoiser(net, path[steps], None, None, t - 20 * steps)
        assert torch.equal(found[sample], l2(denoiser(net, x, None, None, t) - goal)[sample])
    whole = Objective(denoiser, "lcm", 100, 20, l2)(net, net, teacher, x, t, None)
    assert torch.equal(random(net, net, teacher, x, t, torch.full((3,), 0.999)), whole)


def curve(*points):
    return [{"unet_forwards": at, "iterations": at // 10, "endpoint_error": {"999": value}} for at, value in points]


def test_budgets_are_read_off_the_curve():
    falling = curve((100, 0.8), (200, 0.6), (300, 0.5))
    assert reach(falling, 0.7) == pytest.approx(150) and reach(falling, 0.9) == 100 and reach(falling, 0.4) is None
    assert at_iteration(falling, 25) == pytest.approx(0.55) and at_iteration(falling, 31) is None
    assert error({"endpoint_error": {"999": 0.8, "259": 0.2}}) == pytest.approx(0.4)


def synthetic():
    rows = [{"group": "teacher", "method": "teacher", "guidance_scale": 3.0, "seed": None, "unet_forwards": 0,
             "steps": 50, "frechet_distance": 0.4, "attribute_accuracy": 0.9}]  # fmt: skip
    for group, method, better in (("k20", "lcm", 1.0), ("k100", "splam-embedding", 2.0),
                                  ("default", "splam-default", 0.5)):  # fmt: skip
        for seed in (0, 1):
            about = {"group": group, "method": method, "seed": seed, "guidance_scale": 3.0, "seconds": 1.0}
            for at, value in ((24_000, 0.8), (48_000, 0.4)):
                errors = dict.fromkeys(("999", "759", "499", "259"), better * value)
                rows.append({**about, "unet_forwards": at, "iterations": at // 100, "endpoint_error": errors})
            for steps in (1, 2, 4):
                distances = ("frechet_distance", "frechet_distance_clipped", "frechet_distance_teacher")
                scores = dict.fromkeys((*distances, "frechet_distance_teacher_clipped"), better * (1 + seed) / steps)
                rows.append(
                    {
                        **about,
                        "unet_forwards": 48_000,
                        "iterations": 480,
                        "steps": steps,
                        "attribute_accuracy": 0.5,
                        **scores,
                    }
                )
    return rows


def test_recipes_are_judged_seed_by_seed():
    paper, default = quality(Results(synthetic()))
    assert paper["ratio_to_lcm_2"] == 2.0 and default["ratio_to_lcm_2_by_seed"] == [0.5, 0.5]
    assert default["ratio_to_teacher50_4_by_seed"] == [0.5 / 4 / 0.4, 2 * 0.5 / 4 / 0.4]
    assert default["ratio_at_2_to_lcm_at_4"] == 1.0 and default["endpoint_error_to_lcm_999"] == 0.5
    assert paper["compute_to_reach_lcm_best"] is None and default["compute_to_reach_lcm_best"] == 0.5


def test_the_report_renews_tables_and_keeps_words(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    for name in ("teacher", "k20", "k100", "default"):
        rows = [row for row in synthetic() if row["group"] == name]
        (tmp_path / "work" / f"{name}-seed0.json").write_text(json.dumps(rows), encoding="utf-8")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "reproduction.md").write_text("Before\n<!-- quality -->\nold\n<!-- end -->\nAfter\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["report", "--work-dir", str(tmp_path / "work"), "--docs", str(docs)])
    reproduction_report.main()
    page = (docs / "reproduction.md").read_text(encoding="utf-8")
    assert (
        page.startswith("Before\n<!-- quality -->\n|  | `--recipe paper`")
        and page.endswith("<!-- end -->\nAfter\n")
        and "old" not in page
    )
    rows = json.loads((docs / "results" / "reproduction.json").read_text(encoding="utf-8"))
    assert {row["figure"] for row in rows} >= {"table1", "table3", "fig2b"}
    keys = {"method", "k", "multiple_estimation", "steps", "seed", "teacher_evaluations", "iterations"}
    assert all(keys <= row.keys() for row in rows)
    assert fill("no tables", {}) == "no tables"


def test_direction_the_default_recipe_is_ahead_of_the_papers_lcm(tmp_path):
    """docs/reproduction.md, shortened: at an equal budget the default recipe's student is nearer to the path's ends."""
    found = {}
    for name in ("k20", "default"):
        group = GROUPS[name]
        short = Group(group.students[:1], {**group.settings, "num_scenes": 128}, 8_000)
        found[name] = run_group(short, 0, tmp_path, samples=16, pictures=0)[-1]
    ours, lcm = found["default"], found["k20"]
    assert ours["method"] == "splam-default" and lcm["method"] == "lcm"
    assert ours["unet_forwards"] == pytest.approx(lcm["unet_forwards"], rel=0.05)
    assert error(ours) < 0.99 * error(lcm)


@pytest.mark.usefixtures("own_precision")
def test_finished_recipes_spend_what_lcm_does(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "BATCH", 2)
    monkeypatch.setattr(finish, "PLAIN", finish.PLAIN | {"train_batch_size": 2, "num_scenes": 16})
    monkeypatch.setattr(finish.Bench, "pictures", lambda *_: {"accuracy_2": 0.5})
    bench = finish.Bench(tmp_path, None, 120)
    for name in ("lcm", "default", "kept paths"):
        rows = bench.recipe(name, 0)
        stages = [row["stage"] for row in rows if row["ends"]]
        assert stages == ["before finish", "after finish"][: 1 + (name != "lcm")]
        assert rows[-1]["unet_forwards"] == pytest.approx(120, rel=0.15), name
        assert bench.recipe(name, 0) == rows  # kept, not made again


def test_recipes_are_summed_up_over_seeds():
    def run(name, seed, *points):
        rows = [{"unet_forwards": spent, "accuracy_2": right, "stage": stage, "ends": ends}
                for spent, right, stage, ends in points]  # fmt: skip
        for row in rows:
            row |= dict.fromkeys(("accuracy_1", "accuracy_4", "endpoint_error"), row["accuracy_2"])
            row |= {f"frechet_teacher_clipped_{steps}": 0.1 * (seed + 1) for steps in (1, 2, 4)}
        return {(name, seed): rows}

    before, after = "before finish", "after finish"
    found = {}
    for seed, best in ((0, 0.6), (1, 0.8)):
        found |= run("lcm", seed, (100, 0.5, before, False), (200, best, before, True))
        found |= run("default", seed, (50, 0.4, before, True), (150, 0.7, after, False), (200, 0.9, after, True))
    found |= run("nothing", 1, (100, 0.3, after, False), (200, 0.4, after, True))  # a finish alone, of one seed
    lcm, start, end, alone = finish.summary(found, 0.95)
    assert (lcm["recipe"], start["stage"], end["stage"]) == ("lcm", before, after)
    assert (alone["recipe"], alone["stage"], alone["accuracy_2"]["seeds"]) == ("nothing", after, [1])
    assert alone["compute_to_reach_lcm_best"] is None
    assert end["accuracy_2"] == {"mean": 0.9, "low": 0.9, "high": 0.9, "seeds": [0, 1]}
    assert end["lcm_accuracy_2"]["high"] == 0.8 and end["frechet_teacher_clipped_4"]["low"] == 0.1
    # LCM's best of seed 0 was reached at 150 of its 200, that of seed 1 at 200.
    assert end["compute_to_reach_lcm_best"]["low"] == 0.75 and end["compute_to_reach_lcm_best"]["high"] == 1.0
