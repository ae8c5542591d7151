"""Specs, what they ask of a forward pass, and the value of every term against loops over layers and matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import reference
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from build import PLAIN, SCHEMES
from errors import UserError
from layers import EMBED, resolve_layers
from losses import Objective
from mixing.mixup import Mixup
from models import Captured, DiverseViT, Needs
from models.adapters import MATRICES
from regularizers import MEASURES, REFERENCE_FLAGS, Diversity, Spec, Term, parse_spec, total
from regularizers import diversity as bound
from regularizers.levels import LEVELS
from regularizers.measures import OPTIONS
from regularizers.registry import Option
from regularizers.specs import all_names

BATCH, PREFIX, TOKENS, WIDTH, HEADS, DEPTH = 2, 2, 6, 5, 3, 4  # of the hand-made forward pass
SHAPES = [(6, 4), (3, 4), (3, 4)], [(6, 4), (6, 4), (3, 4)]  # of W_q, W_k, W_v in even and in odd blocks


def diversity(*texts: str, depth: int = DEPTH, pooled: bool = False) -> Diversity:
    return Diversity([parse_spec(text) for text in texts], depth, pooled)


def takes(term: str) -> str:
    """What the measure of 'level.measure' takes."""
    return MEASURES[term.partition(".")[2]].takes


MEASURABLE = [term for term in all_names() if takes(term) in ("set", "pair")]


def written(term: str, option: str) -> str:
    """A term with one of its options; a number is 0.5 more than the least that is allowed, or than 0."""
    return f"{term}:{OPTIONS[option].written(option, max(OPTIONS[option].above, 0.0) + 0.5)}"


def qkv(*blocks: int) -> frozenset[tuple[int, str]]:
    return frozenset((block, name) for block in blocks for name in "qkv")


# ------------------------------------------------------------------------------------------------------------
# Specs


@pytest.mark.parametrize(
    ("text", "spec", "name"),
    [
        ("patch.cosine=0.5", Spec("patch", "cosine", (), "last", 0.5), "patch.cosine@last"),
        ("patch.cosine@last=0.5", Spec("patch", "cosine", (), "last", 0.5), "patch.cosine@last"),
        ("attn.cosine=1e-4", Spec("attn", "cosine", (), "0", 1e-4), "attn.cosine@0"),
        ("weight.cno=5e-4", Spec("weight", "cno", (), "all", 5e-4), "weight.cno@all"),
        (
            "patch.contrastive=1",
            Spec("patch", "contrastive", (), "first:last", 1.0),
            "patch.contrastive@first:last",
        ),
        (
            "attn.cosine_cross=1",
            Spec("attn", "cosine_cross", (), "first:last", 1.0),
            "attn.cosine_cross@first:last",
        ),
        ("patch.context=1", Spec("patch", "context", (), "embed:norm", 1.0), "patch.context@embed:norm"),
        ("patch.cosine@embed,0,norm=1", Spec("patch", "cosine", (), "embed,0,norm", 1.0), None),
        ("patch.gradient_diversity=1", Spec("patch", "gradient_diversity", (), "last", 1.0), None),
        ("patch.region_mixing=1", Spec("patch", "region_mixing", (), "last", 1.0), "patch.region_mixing"),
        ("patch.mixing=1", Spec("patch", "mixing", (), "last", 1.0), "patch.mixing"),
        ("patch.mixing@last=0.25", Spec("patch", "mixing", (), "last", 0.25), "patch.mixing"),
        ("  patch.so=0  ", Spec("patch", "so", (), "last", 0.0), "patch.so@last"),
        ("patch.cosine:abs=1", Spec("patch", "cosine", ("abs",), "last", 1.0), "patch.cosine:abs@last"),
        (
            "weight.cno:inverse@0,2-3=1",
            Spec("weight", "cno", ("inverse",), "0,2-3", 1.0),
            "weight.cno:inverse@0,2-3",
        ),
        ("patch.cno:raw,inverse=1", Spec("patch", "cno", ("raw", "inverse"), "last", 1.0), None),
        ("patch.cosine_cross@0-1:2,last=1", Spec("patch", "cosine_cross", (), "0-1:2,last", 1.0), None),
        (
            "patch.contrastive:tau=0.1@first:last=0.5",
            Spec("patch", "contrastive", ("tau=0.1",), "first:last", 0.5),
            "patch.contrastive:tau=0.1@first:last",
        ),
        ("attn.contrastive:tau=2=1e-3", Spec("attn", "contrastive", ("tau=2.0",), "first:last", 1e-3), None),
        ("weight.so:fc1,q=1", Spec("weight", "so", (), "all", 1.0, ("q", "fc1")), "weight.so:q,fc1@all"),
    ],
)
def test_parse(text: str, spec: Spec, name: str | None) -> None:
    assert parse_spec(text) == spec
    if name is not None:
        assert parse_spec(text).name == name


@pytest.mark.parametrize("term", all_names())
def test_defaults_per_level(term: str) -> None:
    level, _, _ = term.partition(".")
    spec = parse_spec(f"{term}=1")
    own = {"patch.context": "embed:norm"}
    assert spec.layers == own.get(term, LEVELS[level].default_layers[takes(term)])
    assert spec.name == (term if takes(term) == "labels" else f"{term}@{spec.layers}")


@pytest.mark.parametrize(
    ("level", "layers"),
    [
        ("patch", {"set": "last", "pair": "first:last", "gradient": "last", "labels": "last"}),
        ("attn", {"set": "0", "pair": "first:last"}),
        ("weight", {"set": "all"}),
    ],
)
def test_default_layers(level: str, layers: dict[str, str]) -> None:
    assert LEVELS[level].default_layers == layers


@pytest.mark.parametrize(
    "term", [written(term, option) for term in MEASURABLE for option in MEASURES[term.partition(".")[2]].options]
)
def test_name_parses_to_the_same_term(term: str) -> None:
    spec = parse_spec(f"{term}=0.125")
    assert parse_spec(spec.name, with_coef=False) == Spec(spec.level, spec.measure, spec.options, spec.layers, 1.0)
    assert parse_spec(f"{spec.name}={spec.coef!r}") == spec


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("patch.cosine:signed", "patch.cosine@last"),
        ("patch.cosine:abs,abs@03,07-11", "patch.cosine:abs@3,7-11"),
        ("patch.cno:inverse,raw", "patch.cno:raw,inverse@last"),
        ("patch.cno:normalize", "patch.cno@last"),  # patches are normalised by default
        ("weight.cno:raw", "weight.cno@all"),  # weights are not
        ("weight.cno:normalize", "weight.cno:normalize@all"),
        ("weight.cno:v,q,k", "weight.cno@all"),  # the default
        ("weight.cno:fc2,k,inverse,fc2", "weight.cno:inverse,k,fc2@all"),
        ("weight.so:proj@0", "weight.so:proj@0"),
        ("patch.contrastive:tau=.1", "patch.contrastive:tau=0.1@first:last"),
        ("patch.contrastive:tau=1e-1@first:last", "patch.contrastive:tau=0.1@first:last"),
        ("patch.contrastive:tau=1", "patch.contrastive@first:last"),  # the default
        ("attn.contrastive:tau=1.0@0:1", "attn.contrastive@0:1"),
    ],
)
def test_equal_terms_have_equal_names(text: str, name: str) -> None:
    assert parse_spec(f"{text}=1").name == name


def test_a_term_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"patch.cosine@last is given twice: keep one"):
        diversity("patch.cosine=1", "patch.cosine:signed@last=2")
    with pytest.raises(UserError, match=r"patch.cosine@last and patch.cosine@1 are the same term, given twice"):
        diversity("patch.cosine@last=1", "patch.cosine@1=1", depth=2)
    with pytest.raises(UserError, match=r"patch.mixing is given twice: keep one"):
        diversity("patch.mixing=1", "patch.mixing@last=2")
    with pytest.raises(UserError, match=r"patch.contrastive:tau=0.1@first:last is given twice"):
        diversity("patch.contrastive:tau=0.1=1", "patch.contrastive:tau=.1@first:last=2")
    different = ("patch.contrastive:tau=0.1=1", "patch.contrastive:tau=0.2=1", "patch.contrastive=1", "weight.so=1")
    assert len(diversity(*different, "weight.so:q=1").names) == 5


@pytest.mark.parametrize("text", ["patch.mixing", "patch.gradient_diversity"])
def test_what_depends_on_labels_cannot_be_measured(text: str) -> None:
    with pytest.raises(UserError, match=r"can be trained on .*, not measured"):
        parse_spec(text, with_coef=False)


def test_absurd_ranges_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="is out of range, the model has blocks 0 to"):
        diversity("patch.cosine@0-999999999999=1")


@pytest.mark.parametrize(("flag", "text"), REFERENCE_FLAGS.items())
def test_reference_flags_parse(flag: str, text: str) -> None:
    spec = parse_spec(f"{text}=0.5")
    assert spec.name == text and spec.coef == 0.5


def test_reference_flags_are_the_recipe() -> None:
    recipe = diversity(*(f"{text}=1" for text in REFERENCE_FLAGS.values()), depth=12)
    assert len(REFERENCE_FLAGS) == 5
    tokens, heads = frozenset({-1, 11}), frozenset({(0,)})
    assert Needs(**recipe.needs) == Needs(tokens, weights=qkv(*range(12)), patch_logits=True, heads=heads)
    assert recipe.labelled == ["patch.mixing"] and recipe.averaged == {"patch.mixing"}
    assert recipe.names == [
        "patch.cosine@last",
        "patch.contrastive@first:last",
        "attn.cosine@0",
        "weight.cno@all",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"malformed regularizer '': write level.measure\[:options\]\[@layers\]=coef"),
        ("patch.cosine", r"malformed regularizer 'patch.cosine': write .*=coef, e.g. patch.cosine@last=0.5"),
        ("=1", "malformed regularizer"),
        ("@last=1", "malformed regularizer"),
        ("patch.cosine@last@0=1", "malformed layers"),
        (
            "patch.cosin=1",
            r"unknown regularizer 'patch.cosin'. Did you mean patch.cosine .*\? Known: patch.\{cosine,",
        ),
        ("atn.cosine=1", r"unknown regularizer 'atn.cosine'. Did you mean attn.cosine"),
        ("weight.contrastive=1", "unknown regularizer 'weight.contrastive'"),
        ("attn.gradient_diversity=1", "unknown regularizer"),
        ("attn.mixing=1", "unknown regularizer 'attn.mixing'. Did you mean .*patch.mixing"),
        ("cosine=1", r"unknown regularizer 'cosine'. .*Known: .*attn.\{.*weight.\{"),
        ("patch.cosine:absolute=1", "cosine has no option 'absolute'; its options: abs, signed"),
        ("patch.cosine:=1", "cosine has no option ''"),
        ("patch.cosine:abs,=1", "cosine has no option ''"),
        ("patch.mhs:abs=1", "mhs has no option 'abs'; its options: none"),
        ("patch.cosine:inverse=1", "no option 'inverse'"),
        ("patch.cosine:abs,signed=1", "abs and signed contradict each other"),
        ("patch.cosine=", "'' is not a number"),
        ("patch.cosine=half", "'half' is not a number"),
        ("patch.cosine=1=2", "'1=2' is not a number"),
        ("patch.cosine=-0.5", "the coefficient must be finite and not negative"),
        ("patch.cosine=inf", "the coefficient must be finite and not negative"),
        ("patch.cosine=nan", "the coefficient must be finite and not negative"),
        ("patch.cosine=1e999", "the coefficient must be finite and not negative"),
        ("patch.mixing=-1", "the coefficient must be finite and not negative"),
        ("patch.cosine@=1", "malformed layers ''"),
        ("patch.cosine@-1=1", "malformed layers '-1'"),
        ("patch.cosine@1-=1", "malformed layers '1-'"),
        ("patch.cosine@0,,1=1", "malformed layers"),
        (
            "patch.cosine@middle=1",
            "malformed layers 'middle' .* write first, last, all, embed, norm, a block's number",
        ),
        ("patch.cosine@first-last=1", "malformed layers"),
        ("patch.contrastive@0:=1", "malformed layers"),
        ("patch.cosine@embed-norm=1", "malformed layers"),
        (
            "attn.cosine@norm=1",
            "'attn.cosine@norm=1': the layer norm has patches alone, no attn terms: choose",
        ),
        ("weight.so@0,embed=1", "the layer embed has patches alone, no weight terms: choose blocks"),
        ("patch.gradient_diversity@norm=1", "taken at the last block only"),
        ("patch.cosine@first:last=1", "this measure takes one side, e.g. @last"),
        ("weight.so@0:1=1", "this measure takes one side"),
        ("patch.contrastive@last=1", "this measure takes two sides with a colon, e.g. @first:last"),
        ("patch.contrastive@0:1:2=1", "this measure takes two sides"),
        ("patch.cosine@0:1:2=1", "this measure takes one side"),
        ("patch.gradient_diversity@0=1", "taken at the last block only"),
        ("patch.gradient_diversity@0:1=1", "this measure takes one side"),
        ("patch.mixing:abs=1", "patch.mixing takes no options and works on the last block's patches"),
        ("patch.mixing@0=1", "patch.mixing takes no options and works on the last block's patches"),
        ("patch.contrastive:tau=0.1", "contrastive:tau=0.1': the option tau takes a number, as in tau=0.1$"),
        ("patch.contrastive:tau=1", "the option tau takes a number"),  # 1 is the coefficient
        ("patch.contrastive:tau@0:1=1", "the option tau takes a number"),
        ("patch.contrastive:tau=x=1", "the option tau takes a number, as in tau=0.1, not 'x'"),
        ("patch.contrastive:tau==1", "the option tau takes a number, as in tau=0.1$"),
        ("patch.contrastive:tau=0=1", "tau must be finite and greater than 0"),
        ("patch.contrastive:tau=-0.1=1", "tau must be finite and greater than 0"),
        ("patch.contrastive:tau=inf=1", "tau must be finite and greater than 0"),
        ("patch.contrastive:tau=nan@0:1=1", "tau must be finite and greater than 0"),
        ("patch.contrastive:tau=0.1,tau=0.2=1", "tau is given twice"),
        ("patch.contrastive:tau=0.1,tau=.1=1", "tau is given twice"),
        ("patch.contrastive:tua=0.1=1", "contrastive has no option 'tua'; its options: tau=X"),
        ("patch.contrastive:tau=0.1=x", "'x' is not a number$"),
        ("patch.contrastive:tau=0.1@0:1", "'0.1@0:1' is not a number; the coefficient stands last"),
        ("patch.contrastive:tau=0.1@0:1=-1", "the coefficient must be finite and not negative"),
        ("patch.cosine:tau=0.1=1", "cosine has no option 'tau'; its options: abs, signed"),
        ("patch.cosine:abs=1@0=1", "the option abs takes no number"),
        ("patch.cosine:abs=@0=1", "the option abs takes no number"),
        ("patch.mixing:tau=0.1=1", "patch.mixing takes no options and works on the last block's patches"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_spec(text)


def test_a_number_without_a_limit_is_any_that_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "tau", Option("tau", "any number"))
    assert parse_spec("patch.contrastive:tau=-2@0:1=1").options == ("tau=-2.0",)
    assert parse_spec("patch.contrastive:tau=0@0:1=1").arguments == {"tau": 0.0}
    with pytest.raises(UserError, match=r"tau must be finite$"):
        parse_spec("patch.contrastive:tau=-inf=1")


def test_without_coefficient() -> None:
    assert parse_spec("patch.pairwise_cosine@all", with_coef=False) == Spec(
        "patch", "pairwise_cosine", (), "all", 1
    )
    with pytest.raises(UserError, match=r"write level.measure\[:options\]\[@layers\], e.g. patch.cosine@last$"):
        parse_spec("patch.cosine=1", with_coef=False)
    with pytest.raises(UserError, match=r"malformed regularizer 'patch.contrastive@0:1=1': write"):
        parse_spec("patch.contrastive@0:1=1", with_coef=False)
    for text in ("patch.contrastive:tau=0.1@0:1", "patch.contrastive:tau=0.1"):
        assert parse_spec(text, with_coef=False).options == ("tau=0.1",)
    with pytest.raises(UserError, match="the option abs takes no number"):
        parse_spec("patch.cosine:abs=1", with_coef=False)


@pytest.mark.parametrize("text", ["patch.cosin=1", "patch.cosine:x=1", "patch.cosine=x", "patch.cosine@x=1"])
def test_messages_quote_what_was_given(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_spec(text)
    assert text.partition("=")[0] in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Layers and needs


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        ("first", [-7]),  # the level says what 'first' is
        ("last", [3]),
        ("all", [0, 1, 2, 3]),
        ("2", [2]),
        ("1-3", [1, 2, 3]),
        ("2-2", [2]),
        ("3,0", [3, 0]),
        ("0,2-3", [0, 2, 3]),
        ("1,0-2,last,all", [1, 0, 2, 3]),  # each once
    ],
)
def test_layers(selector: str, layers: list[int]) -> None:
    assert resolve_layers(selector, 4, -7, "spec") == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patch.cosine@4=1", "'patch.cosine@4': layer 4 is out of range, the model has blocks 0 to 3"),
        ("weight.so@2-9=1", "layer 4 is out of range"),
        ("patch.contrastive@first:12=1", "layer 12 is out of range"),
        ("attn.cosine@3-1=1", "'attn.cosine@3-1': the range 3-1 is empty"),
        ("attn.cosine_cross@0-1:2-1=1", "the range 2-1 is empty"),
        ("patch.contrastive@0-1:1-3=1", "2 layers against 3; give one, or equally many"),
    ],
)
def test_layers_that_the_model_does_not_have(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        diversity(text)


@pytest.mark.parametrize(
    ("texts", "needs"),
    [
        ([], Needs()),
        (["patch.cosine=1"], Needs(tokens=frozenset({3}))),
        (["patch.cosine@first=1"], Needs(tokens=frozenset({-1}))),
        (["patch.cosine@all=1"], Needs(tokens=frozenset({0, 1, 2, 3}))),
        (["patch.contrastive=1"], Needs(tokens=frozenset({-1, 3}))),
        (["patch.contrastive@0-1:2-3=1"], Needs(tokens=frozenset({0, 1, 2, 3}))),
        (["attn.cosine@first,last=1"], Needs(heads=frozenset({(0,), (3,)}))),
        (["attn.cno:inverse=1", "attn.so@1=1"], Needs(attention=frozenset({0}), heads=frozenset({(1,)}))),
        (["attn.contrastive@0:1-2=1"], Needs(heads=frozenset({(0, 1), (0, 2)}))),
        (["weight.so@first=1"], Needs(weights=qkv(0))),
        (["weight.so=1"], Needs(weights=qkv(0, 1, 2, 3))),
        (["weight.so:fc1,q@0=1"], Needs(weights=frozenset({(0, "q"), (0, "fc1")}))),
        (["weight.so:v@0=1", "weight.so:k@1=1"], Needs(weights=frozenset({(0, "v"), (1, "k")}))),
        (["patch.mixing=1"], Needs(patch_logits=True)),
        (
            ["patch.mixing=1", "patch.so@0=1", "patch.mhs@2=1", "attn.mgd=1", "weight.cno@1=1"],
            Needs(frozenset({0, 2}), frozenset(), qkv(1), True, frozenset({(0,)}), wide=True),
        ),
        (["patch.mixing=0", "patch.cosine=0", "attn.cosine=0", "weight.cno@9=0"], Needs()),
        (["patch.gradient_diversity=1", "patch.mixing=1"], Needs(tokens=frozenset({3}), patch_logits=True)),
    ],
)
def test_needs(texts: list[str], needs: Needs) -> None:
    assert Needs(**diversity(*texts).needs) == needs
    assert bool(diversity(*texts).needs) == bool(needs != Needs())


def test_label_terms_have_their_coefficient_times_the_number_of_their_items() -> None:
    """What is averaged with the image counts its patches; `losses.py` divides by their sum."""
    logits = torch.randn(2, 6, 3)
    captured = Captured(torch.zeros(2, 3), None, logits, {}, {}, {})
    _, labels = Mixup(patch_size=(8, 8), seed=2)(torch.zeros(2, 3, 16, 24), torch.tensor([0, 2]))
    terms = diversity("patch.mixing=0.25", "patch.cosine=1").of_labels(captured, labels)
    assert list(terms) == ["patch.mixing"] and terms["patch.mixing"].coef == 0.25 * 6
    assert torch.equal(terms["patch.mixing"].value, MEASURES["mixing"].function(logits, labels))
    counted = diversity("patch.mixing=0.25")
    counted.terms[0].averaged = False
    assert counted.of_labels(captured, labels)["patch.mixing"].coef == 0.25 and counted.averaged == frozenset()


def test_needs_are_united() -> None:
    a, b = Needs(frozenset({1}), frozenset({2})), Needs(frozenset({-1}), frozenset(), qkv(0), True)
    assert a | b == Needs(frozenset({-1, 1}), frozenset({2}), qkv(0), True)
    assert not Needs() and Needs(weights=qkv(0)) and Needs(patch_logits=True)


# ------------------------------------------------------------------------------------------------------------
# Values


def forward_pass(dtype: torch.dtype = torch.float64) -> Captured:
    """What a model of DEPTH blocks with PREFIX prefix tokens might have shown."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = {layer: draw(BATCH, TOKENS, WIDTH).requires_grad_() for layer in range(-1, DEPTH)}
    attention = {layer: draw(BATCH, HEADS, TOKENS, TOKENS).softmax(-1) for layer in range(DEPTH)}
    logits = draw(BATCH, 3)
    tokens[EMBED] = draw(BATCH, TOKENS - PREFIX, WIDTH).requires_grad_()
    tokens[DEPTH] = draw(BATCH, TOKENS, WIDTH).requires_grad_()
    prefix = {**dict.fromkeys(tokens, PREFIX), EMBED: 0}
    return Captured(logits, None, None, tokens, attention, prefix)


def weights_by_shape(shapes: Sequence[list[tuple[int, int]]]) -> dict[int, list[Tensor]]:
    """W_q, W_k, W_v of every block."""
    generator = torch.Generator().manual_seed(1)
    return {
        block: [
            torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in shapes[block % len(shapes)]
        ]
        for block in range(DEPTH)
    }


WEIGHTS = weights_by_shape(SHAPES)


def read(matrices: Mapping[int, Sequence[Tensor]]) -> Callable[[int, Sequence[str]], list[Tensor]]:
    """What a model's `weights` is: block, kinds -> its matrices, each [1, n, d]. proj, fc1, fc2 are q, k, v."""
    return lambda block, kinds: [matrices[block][MATRICES.index(kind) % 3][None] for kind in kinds]


weights = read(WEIGHTS)


def no_weights(block: int, kinds: Sequence[str]) -> list[Tensor]:
    raise AssertionError("no term asked for weights")


def value_of(text: str, captured: Captured | None = None) -> Tensor:
    """The value of the only term of a spec."""
    terms = diversity(f"{text}=0.25")(captured or forward_pass(), weights)
    assert [term.coef for term in terms.values()] == [0.25]
    (term,) = terms.values()
    return term.value


def patches(layer: int) -> Tensor:
    """Without the prefix tokens."""
    return torch.stack([forward_pass().tokens[layer][:, token] for token in range(PREFIX, TOKENS)], dim=1)


def heads(layer: int) -> Tensor:
    """Every head's map as one long row, prefix tokens included."""
    rows = forward_pass().attention[layer].unbind(2)
    return torch.cat(rows, dim=-1)


def loops(function: Callable[..., float], *sets: Tensor) -> float:
    return reference.mean_over_leading(function, *sets)


def normalised_so(x: reference.Rows) -> float:
    return reference.so(x, normalize=True)


def named(part: object) -> str:
    """A case's name: the term's, or ''."""
    return part if isinstance(part, str) else ""


SET_TERMS: list[tuple[str, Callable[[reference.Rows], float]]] = [
    ("cosine", reference.cosine),
    ("cosine:signed", reference.cosine),
    ("cosine:abs", lambda x: reference.cosine(x, absolute=True)),
    ("pairwise_cosine", reference.pairwise_cosine),
    ("mhs", reference.mhs),
    ("mgd", reference.mgd),
    ("so:raw", reference.so),
    ("so:normalize", normalised_so),
]
PAIR_TERMS: list[tuple[str, Callable[[reference.Rows, reference.Rows], float]]] = [
    ("cosine_cross", reference.cosine_cross),
    ("cosine_cross:abs", lambda x, y: reference.cosine_cross(x, y, absolute=True)),
    ("contrastive", reference.contrastive),
    ("contrastive:tau=0.25", lambda x, y: reference.contrastive(x, y, tau=0.25)),
]


@pytest.mark.parametrize(
    ("layers", "blocks"), [("first", [-1]), ("last", [3]), ("all", [0, 1, 2, 3]), ("first,1-2", [-1, 1, 2])]
)
@pytest.mark.parametrize(("term", "function"), [*SET_TERMS, ("so", normalised_so)], ids=named)
def test_patch_terms(term: str, function: Callable[..., float], layers: str, blocks: list[int]) -> None:
    """Sum over layers of the mean over images; prefix tokens dropped."""
    expected = sum(loops(function, patches(block)) for block in blocks)
    assert value_of(f"patch.{term}@{layers}").item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("layers", "blocks"), [("first", [0]), ("last", [3]), ("1,2-3", [1, 2, 3])])
@pytest.mark.parametrize(("term", "function"), [*SET_TERMS, ("so", reference.so)], ids=named)
def test_attention_terms(term: str, function: Callable[..., float], layers: str, blocks: list[int]) -> None:
    expected = sum(loops(function, heads(block)) for block in blocks)
    assert value_of(f"attn.{term}@{layers}").item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("layers", "blocks"), [("first", [0]), ("1", [1]), ("all", [0, 1, 2, 3]), ("0,3", [0, 3])])
@pytest.mark.parametrize(("term", "function"), [*SET_TERMS, ("so", reference.so)], ids=named)
def test_weight_terms(term: str, function: Callable[..., float], layers: str, blocks: list[int]) -> None:
    """Sum over all matrices of the blocks, whose shapes differ."""
    expected = sum(loops(function, matrix) for block in blocks for matrix in WEIGHTS[block])
    value = value_of(f"weight.{term}@{layers}")
    assert value.item() == pytest.approx(expected, rel=1e-10)
    used = [matrix for block in blocks for matrix in WEIGHTS[block]]
    assert all(gradient.count_nonzero() for gradient in torch.autograd.grad(value, used))


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ("first:last", [("first", 3)]),
        ("0:1", [(0, 1)]),
        ("2:0-1", [(2, 0), (2, 1)]),
        ("0-1:2", [(0, 2), (1, 2)]),
        ("0-1:2-3", [(0, 2), (1, 3)]),
        ("first,2:3,1", [("first", 3), (2, 1)]),
    ],
)
@pytest.mark.parametrize(("level", "items", "first"), [("patch", patches, -1), ("attn", heads, 0)])
@pytest.mark.parametrize(("term", "function"), PAIR_TERMS, ids=named)
def test_pair_terms(
    term: str,
    function: Callable[..., float],
    level: str,
    items: Callable[[int], Tensor],
    first: int,
    layers: str,
    pairs: list[tuple[int | str, int]],
) -> None:
    """One against many, or layer by layer; 'first' of patches is the input of block 0."""
    blocks = [(first if a == "first" else int(a), b) for a, b in pairs]
    expected = sum(loops(function, items(a), items(b)) for a, b in blocks)
    assert value_of(f"{level}.{term}@{layers}").item() == pytest.approx(expected, rel=1e-10)


def cno_loops(x: Tensor, normalize: bool, inverse: bool) -> float:
    """Of [B, n, d]: standard normal probes, all for lambda_max, then all for lambda_min, and eps = 1e-6."""
    n = x.shape[2 if inverse else 1]
    first, second = (torch.randn(len(x), n, 1, dtype=torch.float64) for _ in range(2))
    grams = [reference.gram(rows, normalize, inverse) for rows in x.tolist()]
    return sum(reference.cno(g, p, q, 1e-6) for g, p, q in zip(grams, first, second, strict=True)) / len(x)


@pytest.mark.parametrize(
    ("text", "items", "blocks", "normalize", "inverse"),
    [
        ("patch.cno", patches, [3], True, False),
        ("patch.cno@first,1", patches, [-1, 1], True, False),
        ("patch.cno:raw@0", patches, [0], False, False),
        ("patch.cno:inverse@0", patches, [0], True, True),
        ("patch.cno:raw,inverse@0", patches, [0], False, True),
        ("attn.cno@0,2", heads, [0, 2], False, False),
        ("attn.cno:normalize", heads, [0], True, False),
    ],
)
def test_cno_of_patches_and_heads(
    text: str, items: Callable[[int], Tensor], blocks: list[int], normalize: bool, inverse: bool
) -> None:
    torch.manual_seed(5)
    value = value_of(text)
    torch.manual_seed(5)
    expected = sum(cno_loops(items(block), normalize, inverse) for block in blocks)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("together", [3, 2, 1])
@pytest.mark.parametrize("inverse", [False, True])
def test_cno_of_weights(monkeypatch: pytest.MonkeyPatch, inverse: bool, together: int) -> None:
    """Uniform probes for lambda_max, lambda_min of each matrix in turn: block by block, q, k, v. No eps.

    Whether the matrices of some blocks are stacked, or each block's stay by themselves.
    """
    monkeypatch.setattr(bound, "STACKED", together * 3 * 6 * 4)
    weights = weights_by_shape([[(6, 4)] * 3])
    term = diversity("weight.cno:inverse@1-3=1" if inverse else "weight.cno@1-3=1")
    torch.manual_seed(5)
    (value,) = (t.value for t in term(forward_pass(), read(weights)).values())
    torch.manual_seed(5)
    expected = 0.0
    for block in (1, 2, 3):
        for matrix in weights[block]:
            first, second = (torch.rand(matrix.shape[inverse], 1, dtype=torch.float64) for _ in range(2))
            expected += reference.cno(reference.gram(matrix.tolist(), inverse=inverse), first, second, 0.0)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_terms_are_named_in_order_and_weighted() -> None:
    texts = ["weight.so@0=0.125", "patch.cosine=0", "patch.mixing=1", "patch.cosine:abs=0.5", "attn.mhs=2"]
    objective = diversity(*texts)
    captured = forward_pass()
    terms = objective(captured, weights)
    assert list(terms) == objective.names == ["patch.cosine:abs@last", "attn.mhs@0", "weight.so@0"]
    assert [term.coef for term in terms.values()] == [0.5, 2.0, 0.125]
    assert objective.labelled == ["patch.mixing"]
    expected = sum(term.coef * term.value.item() for term in terms.values())
    assert total(terms).item() == pytest.approx(expected)
    total(terms).backward()
    assert captured.tokens[DEPTH - 1].grad is not None and WEIGHTS[0][0].grad is not None
    assert (captured.tokens[DEPTH - 1].grad[:, :PREFIX] == 0).all()  # prefix tokens are not regularized
    WEIGHTS[0][0].grad = None


def test_total_is_the_weighted_sum() -> None:
    a, b = (torch.tensor(value, requires_grad=True) for value in (3.0, 5.0))
    value = total({"a": Term(a, 2.0), "b": Term(b, 0.5)})
    assert value.item() == 8.5
    assert [gradient.item() for gradient in torch.autograd.grad(value, [a, b])] == [2.0, 0.5]
    assert total({"a": Term(a, 2.0)}).item() == 6


@pytest.mark.parametrize("texts", [[], ["patch.cosine=0"], ["patch.mixing=0", "attn.cosine=0"]])
def test_empty_objective(texts: list[str]) -> None:
    """Plain DeiT: nothing is asked for, nothing is computed."""
    empty = diversity(*texts, depth=0)
    assert Needs(**empty.needs) == Needs() and not empty.needs
    assert empty.labelled == [] and empty.names == [] and empty.terms == []
    bare = Captured(torch.zeros(2, 3), None, None, {}, {}, {})
    assert empty(bare, no_weights) == empty.of_labels(bare, None) == {}


@pytest.mark.parametrize(("text", "which"), [("q", "q"), ("k,v", "kv"), ("v,q", "qv")])
def test_a_weight_term_reads_the_matrices_it_names(text: str, which: str) -> None:
    expected = sum(
        float(reference.mean_over_leading(reference.so, WEIGHTS[block]["qkv".index(name)][None]))
        for block in (1, 2)
        for name in which
    )
    assert value_of(f"weight.so:{text}@1-2").item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("text", ["patch.so:q", "attn.so:fc1", "weight.so:w"])
def test_matrices_are_for_weights_and_known(text: str) -> None:
    with pytest.raises(
        UserError, match=r"so has no option .*its options: normalize, raw(; its matrices: q, k, v, p|$)"
    ):
        parse_spec(f"{text}=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "patch.contrastive@0:1",
            r"layers 0 and 1 cannot be compared, their patches x width differ: 4 x 5 and 2 x 10; choose two layers",
        ),
        ("patch.cosine_cross@all:1", r"layers 0 and 1 cannot be compared"),
        ("attn.cosine_cross@2:0", r"layers 2 and 0 cannot be compared, their heads x map differ: 6 x 9 and 3 x 36"),
    ],
)
def test_layers_of_different_width_or_grid_are_refused(text: str, message: str) -> None:
    captured = forward_pass()
    tokens = {**captured.tokens, 1: torch.randn(BATCH, PREFIX + 2, 2 * WIDTH)}
    attention = {**captured.attention, 2: torch.rand(BATCH, 2 * HEADS, 3, 3)}
    captured = captured._replace(tokens=tokens, attention=attention)
    diversity("patch.contrastive@0:2=1", "attn.cosine_cross@0:1=1", "patch.so@1=1").check(captured)
    with pytest.raises(UserError, match=message):
        diversity(f"{text}=1").check(captured)


def test_embed_and_norm_are_the_layers_before_and_after_all_blocks() -> None:
    """Without prefix tokens the one, with the final ones the other; regularizers/ and models/ count alike."""
    assert resolve_layers("embed,first,last,norm", 5, -1, "") == [EMBED, -1, 4, 5]
    captured = forward_pass()
    terms = diversity("patch.so@embed=1", "patch.so@norm=1", "patch.cosine_cross@embed:norm=1")
    assert terms.needs == {"tokens": frozenset({EMBED, DEPTH})}
    first, last = captured.tokens[EMBED], captured.tokens[DEPTH][:, PREFIX:]
    found = terms(captured, no_weights)
    expected = {
        "patch.so@embed": MEASURES["so"].function(first, normalize=True),
        "patch.so@norm": MEASURES["so"].function(last, normalize=True),
        "patch.cosine_cross@embed:norm": MEASURES["cosine_cross"].function(first, last),
    }
    assert {name: term.value.item() for name, term in found.items()} == {k: v.item() for k, v in expected.items()}


def test_the_first_layer_of_context_is_a_target() -> None:
    captured = forward_pass()
    (term,) = diversity("patch.context=1")(captured, no_weights).values()
    first, last = captured.tokens[EMBED], captured.tokens[DEPTH]
    expected = reference.mean_over_leading(reference.context, first, last[:, PREFIX:])
    assert term.value.item() == pytest.approx(expected, rel=1e-12)
    gradients = torch.autograd.grad(term.value, [first, last], allow_unused=True)
    assert gradients[0] is None and gradients[1] is not None and gradients[1][:, PREFIX:].all()


def test_context_takes_the_grid_and_refuses_patches_of_another() -> None:
    captured = forward_pass()
    values = {}
    for grid in (None, (2, 2), (1, 4), (4, 1)):
        terms = Diversity([parse_spec("patch.context=1"), parse_spec("patch.so=1")], DEPTH, grid=grid)
        terms.check(captured)
        assert terms.looks_at_neighbours == ["patch.context@embed:norm"]
        values[grid] = terms(captured, no_weights)["patch.context@embed:norm"].value.item()
    assert values[None] == values[2, 2]
    with pytest.raises(UserError, match="takes patches of the last block's grid, 2 x 3, but layer embed has 4"):
        Diversity([parse_spec("patch.context=1")], DEPTH, grid=(2, 3)).check(captured)


@pytest.mark.parametrize("text", ["patch.cosine=1", "attn.cosine=1"])
def test_weights_are_not_read_without_a_weight_term(text: str) -> None:
    diversity(text)(forward_pass(), no_weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("term", MEASURABLE)
def test_half_precision_captures_give_float32_terms(term: str, dtype: torch.dtype) -> None:
    captured = forward_pass(dtype)
    weights = {block: tuple(w.detach().to(dtype) for w in matrices) for block, matrices in WEIGHTS.items()}
    (result,) = diversity(f"{term}=1")(captured, read(weights)).values()
    assert result.value.dtype == torch.float32 and result.value.isfinite()


# ------------------------------------------------------------------------------------------------------------
# With a real model


def tiny_vit(objective: Diversity, dtype: torch.dtype = torch.float32, **options: object) -> DiverseViT:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5, **options
    )
    return DiverseViT(backbone.to(dtype), Needs(**objective.needs))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.tensor([0, 1, 2, 3])


def step(model: DiverseViT, objective: Diversity, dtype: torch.dtype = torch.float32) -> dict[str, Term]:
    """All terms of one training step."""
    images, labels = Mixup(patch_size=(8, 8), seed=2)(*batch(dtype))
    whole = Objective(diversity=objective)
    return whole(model(images), labels) | whole.of_weights(model.weights)


# All terms but those that take another scheme's labels than Mixup's.
EVERYTHING = [f"{term}=0.1" for term in all_names() if SCHEMES.get(term, PLAIN) == PLAIN]


def test_every_term_on_a_real_model() -> None:
    """Finite values, and a finite gradient at every parameter."""
    objective = diversity(*EVERYTHING, depth=2)
    model = tiny_vit(objective)
    terms = step(model, objective)
    assert len(terms) == len(EVERYTHING) + 1  # and 'ce'
    assert all(term.value.shape == () and term.value.isfinite() for term in terms.values())
    total(terms).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_autocast_leaves_terms_in_float32() -> None:
    objective = diversity(*EVERYTHING, depth=2)
    model = tiny_vit(objective)
    images, labels = Mixup(patch_size=(8, 8), seed=2)(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = model(images)
    assert captured.patch_logits is not None and captured.patch_logits.dtype == torch.bfloat16  # autocast was on
    whole = Objective(diversity=objective)
    terms = whole(captured, labels) | whole.of_weights(model.weights)
    assert {name: term.value.dtype for name, term in terms.items()} == dict.fromkeys(terms, torch.float32)
    assert all(term.value.isfinite() for term in terms.values())
    total(terms).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_gradient_diversity_needs_patches_that_reach_the_label() -> None:
    message = "patch.gradient_diversity@last: with a class-token head .* add patch.mixing=1 or choose an average"
    with pytest.raises(UserError, match=message):
        diversity("patch.gradient_diversity=1")
    with pytest.raises(UserError, match=message):
        diversity("patch.gradient_diversity=1", "patch.mixing=0")
    diversity("patch.gradient_diversity=0")
    diversity("patch.gradient_diversity=1", "patch.mixing=0.5")
    diversity("patch.gradient_diversity=1", pooled=True)


MIXED = ["patch.gradient_diversity=1", "patch.mixing=1"]


@pytest.mark.parametrize(
    ("texts", "options"),
    [(MIXED, {}), (MIXED[:1], {"global_pool": "avg", "class_token": False}), (MIXED, {"reg_tokens": 2})],
)
def test_gradient_diversity_is_the_loops(texts: list[str], options: dict[str, object]) -> None:
    """The gradient of the label loss, patch by patch, at the last block's output."""
    objective = diversity(*texts, depth=2, pooled=True)
    model = tiny_vit(objective, torch.float64, **options)
    images, labels = Mixup(patch_size=(8, 8), seed=2)(*batch(torch.float64))
    captured = model(images)
    label_terms = Objective(diversity=diversity(*texts[1:]))(captured, labels)
    assert list(label_terms) == ["ce", *objective.labelled]
    (term,) = objective(captured, model.weights, total(label_terms)).values()
    (gradient,) = torch.autograd.grad(total(label_terms), captured.tokens[1], retain_graph=True)
    assert gradient.shape[1] - captured.prefix_tokens[1] == 16
    expected = reference.mean_over_leading(reference.gradient_diversity, gradient[:, -16:])
    assert term.value.item() == pytest.approx(expected, rel=1e-9)


def test_gradient_diversity_trains_by_a_double_backward() -> None:
    """Finite parameter gradients, and the slope along them is what finite differences say."""
    objective = diversity(*MIXED, depth=2)
    model = tiny_vit(objective, torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def value() -> Tensor:
        return step(model, objective, torch.float64)["patch.gradient_diversity@last"].value

    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    reached = {name for (name, _), g in zip(model.named_parameters(), gradients, strict=True) if g is not None}
    assert {
        "backbone.head.weight",
        "backbone.blocks.0.attn.qkv.weight",
        "backbone.patch_embed.proj.weight",
    } <= reached

    direction = [torch.zeros_like(p) if g is None else g / 10 for p, g in zip(parameters, gradients, strict=True)]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    ends, size = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * size * d
        ends.append(value().item())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * size * d
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_gradient_diversity_accumulates_and_is_scaled_like_any_term(scale: float) -> None:
    """Two backward passes without zero_grad give the sum; float16's scaled loss gives scaled gradients."""

    def backward(model: DiverseViT, images: Tensor, scale: float = scale) -> None:
        images, labels = Mixup(patch_size=(8, 8), seed=2)(images, torch.tensor([0, 1]))
        terms = Objective(diversity=objective)(model(images), labels)
        (total(terms) * scale / 2).backward()

    objective = diversity(*MIXED, depth=2)
    images = batch(torch.float64)[0]
    together = tiny_vit(objective, torch.float64)
    backward(together, images[:2])
    backward(together, images[2:])
    apart = [tiny_vit(objective, torch.float64) for _ in range(2)]
    backward(apart[0], images[:2])
    backward(apart[1], images[2:])
    if scale != 1:
        for model in (*apart, together):
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= scale
    unscaled = tiny_vit(objective, torch.float64)
    backward(unscaled, images[:2], scale=1.0)
    for both, first, second, plain in zip(*(m.parameters() for m in (together, *apart, unscaled)), strict=True):
        assert (
            both.grad is not None and first.grad is not None and second.grad is not None and plain.grad is not None
        )
        torch.testing.assert_close(both.grad, first.grad + second.grad, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(first.grad, plain.grad, rtol=1e-9, atol=1e-12)
