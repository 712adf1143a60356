"""Write `docs/truths.md`: what each stage is compared with, and how far it was from it.

    python -m docs.truths_page

It runs the tests of `TRUTHS`, in minutes on one core, and notes their comparisons in float64. The
draws of Hypothesis are fixed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import pytest

from docs.measuring import Comparison, Recorder

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "truths.md"
STAGES, CORE, PEERS = "tests/kfactk_stages", "tests/kfactk", "tests/peers"
SHAPES = ("square", "tall", "wide", "kernel")
FAMILIES = {
    "curvature": "Curvatures",
    "basis": "Bases",
    "fisher": "Fisher estimators",
    "likelihood": "Likelihoods",
    "link": "Links",
    "clip": "Clips",
    "update": "Update rules",
    "controller": "Controllers",
    "pace": "Paces, lag and running means",
}
"""The families of the page, in its order: a placement says who computes, a tracker nothing."""
HEAD = """\
# Table of truths

What each layer and each method is compared with, the tests that do it, and the largest deviation
that they saw. A truth comes from outside of kfactk: dense float64 algebra, autograd on one example
at a time, a loop written by hand, or another library.

Both sides are in float64, on the CPU. A deviation is `|found - expected| / |expected|`, norms over
all entries of a tensor; where zero is expected, it is `|found|`. *Allowed* is what the test lets
pass in that comparison, as the same ratio. Another processor or version of torch changes the digits
of what is near rounding. Zero means bit for bit. Placements say who computes, and have no row:
[the equivalence over ranks](testing.md#on-several-ranks) compares each with one process. Trackers
compute nothing.
"""
FOOT = """
This page is made by `python -m docs.truths_page`, which runs these tests and notes every comparison
that they make. A test checks that each named test exists, and that each stage has a row; it
measures nothing.
"""


@attrs.frozen
class Truth:
    """A row of the page.

    Args:
        family: Of the stage.
        stages: Registered names of the stages that it shows.
        what: What it shows of them, "" for all.
        truth: What they are compared with.
        file: The file of the tests.
        tests: Their names, perhaps after that of a class, perhaps with the id of parameters.
    """

    family: str
    stages: tuple[str, ...]
    what: str
    truth: str
    file: str
    tests: tuple[str, ...]

    def ids(self) -> list[str]:
        """Return the ids of its tests."""
        return [f"{self.file}::{test}" for test in self.tests]

    def cells(self) -> str:
        """Return the cells that are not measured."""
        names = ", ".join(f"`{stage}`" for stage in self.stages)
        what = ", ".join(filter(None, (names, self.what)))
        tests = ", ".join(f"`{test.replace('::', '.')}`" for test in self.tests)
        return f"| {what} | {self.truth} | `{self.file}`: {tests} |"


def curvatures() -> list[Truth]:
    """Return the rows of curvatures."""
    alone, folder = "autograd, one example at a time", f"{STAGES}/curvature"
    conv, dense = f"{folder}/test_conv_kfac.py", "dense algebra on gradients of autograd"
    exact = "test_one_example_through_convolutions_with_one_position"

    def row(stage: str, what: str, truth: str, file: str, *tests: str) -> Truth:
        path = file if "/" in file else f"{folder}/{file}"
        return Truth("curvature", (stage,), what, truth, path, tests)

    return [
        row(
            "kfac",
            "linear layers",
            "autograd, one example at a time; the dense Fisher matrix of deep linear networks",
            "test_kfac.py",
            "test_any_rank_has_the_first_dimension_as_examples",
            "test_a_shared_module_sums_over_its_uses",
            "test_deep_linear_network_is_exact",
        ),
        row(
            "kfac",
            "sides too wide for a matrix",
            "the dense matrix of diagonals or blocks",
            "test_wide.py",
            "test_a_step_is_that_of_the_claimed_matrix",
        ),
        row("conv_kfac", "every padding", alone, conv, "test_every_padding_and_mode"),
        row("conv_kfac", "every `spatial`", "loops by hand", conv, "test_factors_are_the_loops"),
        *(
            row(
                "conv_kfac",
                f'`spatial="{form}"`',
                "the dense Fisher matrix where the form is exact",
                f"{CORE}/optim/test_optimizer_exactness.py",
                *(f"{exact}[{groups}-kfac-{form}]" for groups in (1, 2)),
            )
            for form in ("sud", "sua", "reduce")
        ),
        row(
            "conv_kfac",
            '`spatial="stationary"`',
            "means over taps, by hand",
            conv,
            "test_channels_and_taps_are_the_partial_traces_of_patches",
        ),
        row(
            "conv_kfac",
            "transposed",
            "autograd, one example at a time, and loops by hand",
            "test_transposed.py",
            "test_rows_are_what_each_output_sees",
            "test_factors_are_the_loops",
        ),
        row(
            "embedding",
            "tables",
            "counts by hand; " + alone,
            "test_embedding.py",
            "test_factors_are_counts_and_the_moment_of_gradients",
            "test_squares_are_those_of_whole_gradients",
        ),
        row(
            "embedding",
            "tables and bags",
            alone,
            "test_embedding.py",
            "TestEmbedding::test_per_example_gradients_are_autograds",
        ),
        row(
            "embedding",
            "tied to a head",
            "sums by hand; " + alone,
            "test_tied.py",
            "test_factors_are_sums_over_positions_of_both_kinds",
            "test_squares_in_slices_are_those_of_whole_gradients",
        ),
        *(
            row(
                stage,
                "gradients inside of the module, and a step",
                f"{alone}; {dense}",
                f"test_{stage}.py",
                "test_gradients_inside_are_those_of_autograd",
                "test_a_step_is_that_of_dense_algebra",
            )
            for stage in ("attention", "rnn", "experts")
        ),
        row(
            "rnn",
            "a chain over time",
            "dense sums over all lags",
            "test_rnn_chain.py",
            "test_a_step_on_packed_sequences_is_that_of_dense_algebra",
            "test_a_step_on_sequences_of_one_length_is_that_of_dense_algebra",
        ),
        row("norm", "", alone, "test_norm.py", "test_an_example_gets_what_flows_through_its_rows"),
        row(
            "gradient",
            "",
            "outer products by hand",
            "test_gradient.py",
            "test_factors_are_outer_products_of_the_merged_gradient",
            "test_stacked_matrices_have_moments_of_their_own",
            "test_squares_side_by_side_have_moments_of_their_own",
            "test_vectors_have_a_diagonal_for_their_rows",
        ),
        row("rows", "", dense, "test_rows.py", "test_a_step_is_the_dense_solve"),
        row(
            "taylor",
            "",
            "gradients of each residual, by autograd twice; the dense step",
            "test_taylor.py",
            "test_curvature_is_that_of_the_residual",
            "test_a_dense_step_on_one_layer",
        ),
    ]


def bases() -> list[Truth]:
    """Return the rows of bases."""
    folder, statistics = f"{STAGES}/basis", f"{PEERS}/test_gradient_statistics.py"
    first = f"{CORE}/preconditioner/test_preconditioner.py"
    curvlinops, soap = f"{PEERS}/test_curvlinops.py", "test_soap_is_that_of_pytorch_optimizer"

    def row(stage: str, what: str, truth: str, file: str, *tests: str) -> Truth:
        path = file if "/" in file else f"{folder}/{file}"
        return Truth("basis", (stage,), what, truth, path, tests)

    def lgm(option: int) -> Truth:
        solves = (f"test_a_solve_is_that_of_dense_algebra[0.01-{option}-{n}]" for n in (2, 8, 40))
        product = f"test_a_product_is_that_of_dense_algebra[{option}]"
        what = f"`option={option}`"
        return row("lgm", what, "dense sums over all lags", "test_lgm.py", *solves, product)

    return [
        Truth(
            "basis",
            ("kfac", "ekfac"),
            "a first step",
            "dense algebra on gradients of autograd",
            first,
            ("test_the_first_step_is_dense_algebra",),
        ),
        *(
            row(
                basis,
                "products and damped inverses",
                "curvlinops",
                curvlinops,
                f"test_products_and_damped_inverses[{basis}-exact-sud-convolutions-softmax]",
                f"test_products_and_damped_inverses[{basis}-empirical-reduce-convolutions-mse]",
            )
            for basis in ("kfac", "ekfac")
        ),
        row(
            "ekfac",
            "of channels, or channels and taps",
            "the dense operator; autograd, one example at a time",
            "test_ekfac_channels.py",
            "test_views_are_of_the_dense_block",
            "test_the_scale_is_that_of_autograds_gradients",
        ),
        row(
            "unitwise",
            "",
            "dense inverses",
            "test_unitwise.py",
            "test_any_block_is_inverted_exactly",
        ),
        lgm(1),
        lgm(2),
        row(
            "cg",
            "both polynomials",
            "Woodbury's formula; dense algebra",
            "test_cg.py",
            "test_enough_steps_are_the_solution_of_woodburys_formula",
            "test_pairs_of_one_example_are_one_gradient",
            "test_chebyshev_is_the_minimax_polynomial",
        ),
        row(
            "singd",
            "",
            "a loop by hand; the dense damped inverse",
            "test_singd.py",
            "test_fifty_refreshes_are_the_loop_by_hand",
            "test_the_fixed_point_is_the_damped_inverse",
        ),
        row(
            "singd",
            '`variant="ingd"`',
            "a loop by hand",
            "test_singd.py",
            "test_sides_that_need_each_other_are_the_loop_by_hand",
        ),
        row(
            "singd",
            '`variant="ingd"`',
            "the package singd",
            f"{PEERS}/test_singd.py",
            "test_ingd_is_that_of_singd",
        ),
        row(
            "shampoo",
            "",
            "powers of the dense matrix",
            "test_shampoo.py",
            "test_the_step_is_a_power_of_the_dense_matrix",
        ),
        row(
            "shampoo",
            "30 steps",
            "pytorch_optimizer",
            statistics,
            "test_shampoo_is_that_of_pytorch_optimizer",
        ),
        row(
            "soap",
            "",
            "powers of the dense matrix",
            "test_soap.py",
            "test_the_step_is_a_power_of_the_dense_matrix",
        ),
        *(
            row("soap", what, truth, statistics, *(f"{soap}[{how}-{name}]" for name in SHAPES))
            for what, truth, how in (
                ("30 steps in one basis", "pytorch_optimizer", "100-1e-11"),
                ("bases of 5 steps", "pytorch_optimizer, whose QR is in float32", "5-1e-05"),
            )
        ),
        row("kl", "", "a loop by hand", "test_kl.py", "test_steps_are_the_loop_by_hand"),
        row("muon", "30 steps", "torch", statistics, "test_muon_is_that_of_torch"),
        row(
            "muon",
            "the exact factor, lines of one length",
            "singular vectors",
            "test_muon.py",
            "test_even_lines_have_one_length_and_the_norm_stays",
        ),
        row(
            "newton_muon",
            "",
            "dense algebra",
            "test_newton_muon.py",
            "test_the_step_is_that_of_dense_algebra",
        ),
    ]


def likelihoods() -> list[Truth]:
    """Return the rows of Fisher estimators and likelihoods."""
    divisor = f"{STAGES}/likelihood/test_divisor.py"
    information = "TestLaws::test_root_columns_make_the_fisher_information"
    density = "TestLaws::test_nll_is_minus_the_log_probability"
    names = ("bernoulli", "gaussian", "heteroscedastic", "poisson")
    return [
        Truth(
            "fisher",
            ("exact",),
            "",
            "the dense Fisher matrix; the Gauss-Newton matrix of a network",
            f"{STAGES}/fisher/test_exact.py",
            (
                "TestLaws::test_outer_products_are_the_dense_fisher",
                "TestLaws::test_through_a_network_they_are_the_gauss_newton_matrix",
            ),
        ),
        Truth(
            "fisher",
            ("mc",),
            "the same draws",
            "curvlinops",
            f"{PEERS}/test_curvlinops.py",
            ("test_sampled_targets",),
        ),
        Truth(
            "fisher",
            ("empirical",),
            "",
            "autograd, one example at a time",
            divisor,
            ("test_the_empirical_fisher_of_the_mean_loss",),
        ),
        Truth(
            "likelihood",
            ("categorical",),
            "",
            "the Fisher information by its definition",
            f"{STAGES}/likelihood/test_categorical.py",
            (information,),
        ),
        *(
            Truth(
                "likelihood",
                (name,),
                "",
                "torch.distributions; the Fisher information by its definition",
                f"{STAGES}/likelihood/test_{name}.py",
                (density, information),
            )
            for name in names
        ),
        Truth(
            "likelihood",
            ("gaussian", "bernoulli"),
            '`divisor="entries"`',
            "the Hessian of torch's loss",
            divisor,
            ("test_entries_give_the_curvature_of_the_mean_loss",),
        ),
    ]


def of_steps() -> list[Truth]:
    """Return the rows of what follows the preconditioned gradients of single layers."""
    clip, link = f"{STAGES}/clip", f"{STAGES}/link"
    return [
        Truth(
            "link",
            ("block_tridiagonal",),
            "",
            "dense inverses",
            f"{link}/test_block_tridiagonal.py",
            ("test_step_is_the_dense_inverse_of_the_claimed_matrix",),
        ),
        Truth(
            "link",
            ("block_tridiagonal",),
            "convolutions",
            "dense inverses",
            f"{link}/test_block_tridiagonal_layers.py",
            ("test_convolutions_join_where_their_rows_are_reduced",),
        ),
        Truth(
            "link",
            ("two_level",),
            "",
            "dense algebra on gradients of autograd",
            f"{link}/test_two_level.py",
            (
                "test_step_is_that_of_the_dense_matrix",
                "test_sums_of_every_kind_of_layer_are_those_of_autograd",
            ),
        ),
        Truth(
            "clip",
            ("trust_region",),
            "",
            "the dense joint Fisher matrix of policy and value",
            f"{clip}/test_trust_region.py",
            ("test_step_is_that_of_the_dense_joint_fisher",),
        ),
        Truth(
            "clip",
            ("kl",),
            "",
            "the formula in Python's numbers",
            f"{clip}/test_kl.py",
            ("test_groups_count_with_their_own_learning_rate",),
        ),
        Truth(
            "clip",
            ("norm",),
            "",
            "torch, which adds 1e-6 to the norm",
            f"{clip}/test_norm.py",
            ("test_agrees_with_torch",),
        ),
        Truth(
            "clip",
            ("value",),
            "",
            "Python's numbers",
            f"{clip}/test_value.py",
            ("test_entries_equal_those_of_python",),
        ),
        Truth(
            "clip",
            ("none",),
            "",
            "what it is given",
            f"{clip}/test_none.py",
            ("test_steps_are_the_preconditioned_gradients",),
        ),
        Truth(
            "controller",
            ("quadratic",),
            "80 steps",
            "a loop by hand with dense matrices",
            f"{STAGES}/controller/test_quadratic.py",
            ("test_equals_the_loop_by_hand",),
        ),
        Truth(
            "pace",
            ("similar",),
            "",
            "a loop by hand",
            f"{STAGES}/pace/test_similar.py",
            ("test_a_run_is_that_of_a_loop_written_by_hand",),
        ),
        Truth(
            "pace",
            (),
            "`lag`",
            "a run that decomposes older factors at once",
            f"{CORE}/preconditioner/test_ahead.py",
            ("test_a_lag_is_a_run_that_decomposes_older_factors",),
        ),
        Truth(
            "pace",
            (),
            "`first_moment`",
            "a run that turns each mean by hand",
            f"{CORE}/preconditioner/test_gradient_mean.py",
            ("test_training_is_that_which_turns_each_mean",),
        ),
    ]


def updates() -> list[Truth]:
    """Return the rows of update rules."""
    tests = {
        "sgd": ("test_equation",),
        "momentum": ("test_equation",),
        "nag": (
            "test_is_equation_12",
            "test_torch_nesterov_agrees_at_a_constant_rate_and_differs_after_a_drop",
        ),
        "adam": ("test_is_equation_13", "TestFusedAmsgrad::test_equals_its_counterpart"),
        "adamw": ("test_equation",),
        "radam": ("test_formulas",),
        "velocity": ("test_constant_numbers_are_heavy_ball",),
    }
    written = "the equation, written out"
    others = {"nag": f"{written}; torch", "adam": f"{written}; torch", "velocity": "torch"}
    rules = [
        Truth(
            "update",
            (name,),
            "",
            others.get(name, written),
            f"{STAGES}/update/test_{name}.py",
            each,
        )
        for name, each in tests.items()
    ]
    loop = Truth(
        "update",
        ("sgd", "momentum", "nag", "adam"),
        "the whole optimizer, with a damping of 2^47",
        "torch",
        f"{CORE}/optim/test_optimizer_loop.py",
        ("test_each_rule_takes_the_steps_of_its_counterpart",),
    )
    return [*rules, loop]


def truths() -> list[Truth]:
    """Return all rows, family by family."""
    found = [*curvatures(), *bases(), *likelihoods(), *of_steps(), *updates()]
    return sorted(found, key=lambda truth: list(FAMILIES).index(truth.family))


def page(measured: Mapping[Truth, str]) -> str:
    """Return the page.

    Args:
        measured: The last two cells of each row.
    """
    lines = [HEAD]
    for family, title in FAMILIES.items():
        lines += [f"## {title}\n", "| what | truth | tests | largest deviation | allowed |"]
        lines += ["|---|---|---|---|---|"]
        mine = [truth for truth in truths() if truth.family == family]
        lines += [f"{truth.cells()} {measured[truth]} |" for truth in mine]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n" + FOOT


def run(ids: Sequence[str]) -> Recorder:
    """Run tests with the plugin that notes their comparisons.

    Raises:
        RuntimeError: One of them did not pass.
    """
    recorder = Recorder()
    os.environ["CI"] = "1"  # fixes what Hypothesis draws
    code = pytest.main(["-q", "-p", "no:cacheprovider", *ids], plugins=[recorder])
    others = {test: how for test, how in recorder.outcomes.items() if how != "passed"}
    if code or others:
        raise RuntimeError(f"these tests must pass first: {others or code}")
    return recorder


def cells(comparisons: Sequence[Comparison]) -> str:
    """Return the largest deviation, and what was allowed there."""
    largest = max(comparisons)
    return " | ".join(f"{x:.1e}" if x else "0" for x in (largest.deviation, largest.allowed))


def measure() -> dict[Truth, str]:
    """Return the measured cells of each row.

    Raises:
        RuntimeError: A test did not pass, or compared nothing in float64.
    """
    recorder, found = run(sorted({each for truth in truths() for each in truth.ids()})), {}
    for truth in truths():
        seen = []
        for name in truth.ids():
            mine = [
                each
                for test, comparisons in recorder.found.items()
                if test == name or test.startswith(f"{name}[")
                for each in comparisons
            ]
            if not mine:
                raise RuntimeError(f"{name} compares nothing in float64: name another test")
            seen += mine
        found[truth] = cells(seen)
    return found


if __name__ == "__main__":
    PAGE.write_text(page(measure()), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
