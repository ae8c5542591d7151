"""The report's figures show the numbers, all of them, and look as they should whatever the labels."""

from __future__ import annotations

import assessed
import matplotlib
import numpy as np
import pytest
from assessed import model, one_metric, report
from matplotlib.text import Text

from errors import UserError
from redundancy.finding import Axis, Finding

NAN = float("nan")
LAYERS = Axis("layer", ("input", "0", "1"))


@pytest.fixture(autouse=True)
def metrics():
    with assessed.registered():
        yield


def test_a_plot_leaves_the_notebook_alone():
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30}):
        figure = report(model("a"), model("b", seed=1)).plot("patch.cosine_abs")
        assert figure.axes[0].xaxis.label.get_fontsize() == 8
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before and pyplot.get_fignums() == []


def test_a_figure_says_what_it_shows():
    figure = report(model("a")).plot("weight.spectrum")
    assert figure.get_suptitle() == "Singular values over the largest (last layer: 11)"
    assert report(model("a")).plot("patch.cosine:abs@all").get_suptitle() == "patch.cosine:abs@all"


def test_an_unknown_metric_has_no_plot():
    with pytest.raises(UserError, match=r"patch\.cosine_ab: nothing to plot\. Did you mean patch\.cosine_abs"):
        report(model()).plot("patch.cosine_ab")


def test_a_gap_in_a_curve_is_a_gap():
    mean = np.array([NAN, 0.2, NAN, 0.4, 0.5])
    axis = Axis("layer", ("input", "0", "1", "2", "3"))
    figure = report(one_metric("a", Finding((axis,), mean, np.full(5, 0.1)))).plot("patch.cosine_abs")
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), mean)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["input", "0", "1", "2", "3"]
    low, high = axes.get_ylim()
    assert low == pytest.approx(-0.02) and high == pytest.approx(1.02)  # the metric's limits


def test_a_number_between_gaps_has_a_marker():
    """Where a deep model's curve has markers for some layers only."""
    mean = np.full(60, NAN)
    mean[[0, 1, 31]] = 0.5
    finding = Finding((assessed.layers(59),), mean, np.full(60, 0.1))
    (line,) = report(one_metric("a", finding)).plot("patch.cosine_abs").axes[0].lines
    marked = {int(place) for place in line.get_markevery()}
    assert 31 in marked and 32 not in marked and len(marked) <= 25


def test_bands_are_one_deviation_of_the_seeds():
    values = np.array([[0.2, 0.4, 0.6], [0.4, 0.4, 0.9]])
    figure = report(*(one_metric("a", Finding((LAYERS,), each)) for each in values)).plot("patch.cosine_abs")
    points = figure.axes[0].collections[0].get_paths()[0].vertices
    for x, mean, spread in zip(range(3), values.mean(axis=0), values.std(axis=0, ddof=1), strict=True):
        at = points[points[:, 0] == x, 1]
        assert at.min() == pytest.approx(mean - spread) and at.max() == pytest.approx(mean + spread)


def test_maps_share_one_scale_and_hatch_gaps():
    axis = Axis("layer", ("0", "1"))
    first = Finding((axis, axis), np.array([[0.2, 0.4], [0.4, NAN]]))
    second = Finding((axis, axis), np.array([[1.0, 5.0], [5.0, 2.0]]))
    figure = report(one_metric("a", first, "attn.across"), one_metric("b", second, "attn.across")).plot(
        "attn.across"
    )
    maps = [axes for axes in figure.axes if axes.images]
    assert {axes.images[0].get_clim() for axes in maps} == {(0.2, 5.0)}
    assert [bool(axes.patch.get_hatch()) for axes in maps] == [True, False]
    limited = report(one_metric("a", first, "patch.cka")).plot("patch.cka")
    assert limited.axes[0].images[0].get_clim() == (0, 1)


def test_panels_show_all_numbers():
    """All have one scale, which is that of all of them."""
    matrix = Axis("matrix", ("q", "k", "v"))
    mean = np.array([[1.0, 5.0, 9.0], [2.0, 4.0, NAN], [1.0, 2.0, 3.0]])
    figure = report(one_metric("a", Finding((LAYERS, matrix), mean), "weight.condition")).plot("weight.condition")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["q", "k", "v"]
    for k, axes in enumerate(panels):
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), mean[:, k])
        low, high = axes.get_ylim()
        assert low == 0 and high > 9 and axes.get_yscale() == "linear"


def test_numbers_over_decades_have_a_logarithmic_axis():
    matrix = Axis("matrix", ("q", "k"))
    mean = np.array([[1.0, 5000.0], [2.0, 4000.0], [3.0, 2000.0]])
    figure = report(one_metric("a", Finding((LAYERS, matrix), mean), "weight.condition")).plot("weight.condition")
    for axes in figure.axes:
        assert axes.get_yscale() == "log" and axes.get_ylim()[0] < 1 and axes.get_ylim()[1] > 5000


def test_labels_keep_their_style_where_one_is_missing():
    first = report(model("a"), model("b", seed=1), model("c", seed=2))
    all_three = first.plot("patch.cosine_abs").axes[0].lines
    del first.models[1].findings["patch.cosine_abs"]
    without = first.plot("patch.cosine_abs").axes[0].lines
    assert [line.get_color() for line in without] == [all_three[0].get_color(), all_three[2].get_color()]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in all_three}) == 3


def test_twenty_labels_look_different():
    figure = report(*(model(f"m{k}", seed=k) for k in range(20))).plot("patch.cosine_abs")
    looks = {(line.get_color(), line.get_marker(), line._unscaled_dash_pattern[1]) for line in figure.axes[0].lines}
    assert len({str(look) for look in looks}) == 20


def test_letters_that_the_font_lacks_are_escaped():
    figure = report(*(model(label) for label in assessed.HARD_LABELS)).plot("patch.cosine_abs")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[1] == r"\u6a21\u578b – нечто שלום"  # noqa: RUF001
    assert texts[3] == r"a_b $x$ 100% #1 {c} ~^\ |d|"
    assert all(len(text) < 60 and text.isprintable() for text in texts)


@pytest.mark.parametrize("metric", ["patch.cosine_abs", "patch.cka", "output.top1"])
def test_labels_are_no_mathematics(metric):
    """As such, this one is an error."""
    broken = r"$\frac{$"
    figure = report(model(broken), model("b", seed=1)).plot(metric)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert broken in {text.get_text() for text in figure.findobj(Text)}
