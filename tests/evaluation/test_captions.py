import json
from pathlib import Path

import numpy as np
import pytest

from magma_jax.evaluation.metrics.by_protocol import METRICS
from magma_jax.evaluation.metrics.captions import bleu_counts, bleu_of_counts, cider_d, rouge_l
from magma_jax.evaluation.metrics.ptb import ptb_tokenize

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures/golden/metrics/captions.json").read_text())
IMAGES = list(GOLDEN["references"])


def bleu(hypotheses, references):
    return bleu_of_counts(bleu_counts(hypotheses, references).sum(0))


@pytest.mark.parametrize(
    ("protocol", "prefix", "golden"),
    [
        ("nlgeval", "ptb_", "coco_caption"),  # the scorers alone, on the true tokens
        ("coco", "", "coco_caption"),
        ("nlgeval", "", "no_tokenizer_as_nlg_eval"),
    ],
)
def test_scores_equal_the_reference_programs(protocol, prefix, golden):
    hypotheses = [GOLDEN[f"{prefix}hypotheses"][image][0] for image in IMAGES]
    references = [GOLDEN[f"{prefix}references"][image] for image in IMAGES]
    scores = METRICS[protocol](hypotheses, references)
    expected = GOLDEN[golden]
    orders = [scores.total[f"BLEU-{i}"] for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(orders, expected["BLEU"], rtol=0, atol=1e-9)
    for ours, theirs in (("CIDEr", "CIDEr"), ("ROUGE-L", "ROUGE_L")):
        assert scores.total[ours] == pytest.approx(expected[theirs], rel=0, abs=1e-9)
        per_image = [expected["per_image"][theirs][image] for image in IMAGES]
        np.testing.assert_allclose(scores.per_sample[ours], per_image, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["references", "hypotheses"])
def test_tokens_equal_the_stanford_tokenizers(kind):
    for image in IMAGES:
        assert [ptb_tokenize(caption) for caption in GOLDEN[kind][image]] == GOLDEN[f"ptb_{kind}"][image]


# Seen from Stanford's tokenizer 3.4.1 itself.
@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("(smiling) at 3:30 p.m.", "-lrb- smiling -rrb- at 3:30 p.m."),
        ("[one] {two} dog(s)", "-lsb- one -rsb- -lcb- two -rcb- dog -lrb- s -rrb-"),
        ("w/ graffiti & $5.00", "w / graffiti & $ 5.00"),
        ("gonna cannot gotta lemme gimme wanna", "gon na can not got ta lem me gim me wan na"),
        ("22 3/4", "22\u00a03/4"),
        ("A dog.A cat", "a dog.a cat"),
        ("hello!world yes?no", "hello!world yes?no"),
        ("", ""),
        ("black/white photo and/or b/w", "black/white photo and/or b/w"),
        ("half/half/half/half 24/7 1/2-inch", "half/half/half / half 24/7 1/2-inch"),
        ("AT&T R&B b&w A & W", "at&t r&b b & w a & w"),
        ("t-shirt 20-year-old -foo foo- a_b", "t-shirt 20-year-old foo foo a_b"),
        ("DON'T shouldn't've I'm y'all", "do n't should n't 've i 'm y' all"),
        ("'tis 'twas more'n rock'n'roll fish 'n chips", "'t is 't was more 'n rock 'n' roll fish 'n chips"),
        ("o'clock ma'am O'Brien l'eau c'mon", "o'clock ma'am o'brien l'eau c'mon"),
        ("the '90s 90's 1990's class of '99 the dogs' tails", "the '90s 90 's 1990 's class of '99 the dogs tails"),
        ("\u2018single\u2019 \u201cdouble\u201d it\u2019s \u2014 one \u2013 two\u2026", "single double it 's one two"),
        ("Mr. Smith of St. Louis, U.S. vs. J.K. Inc.", "mr. smith of st. louis u.s. vs. j.k. inc."),
        ("3 ft. tall, 6 in. wide, no. 5, no.", "3 ft. tall 6 in wide no. 5 no"),
        ("vitamin C. The man is on the Miss. river", "vitamin c the man is on the miss. river"),
        ("US$5 $1,000,000.50 50% #1 #hash @user", "us$ 5 $ 1,000,000.50 50 % # 1 #hash @user"),
        ("12:30pm 5pm 7:30 10/12/2014 5'10\" 2x4", "12:30 pm 5pm 7:30 10/12/2014 5 10 2x4"),
        ("wait... what.. no!! ok?", "wait what no !! ok"),
        (":) ;) <b>bold</b> www.foo.com file.txt", ":-rrb- ;-rrb- <b> bold </b> www.foo.com file.txt"),
        ("\u00a35 5\u00a2 caf\u00e9 \U0001f642", "# 5 5 cents caf\u00e9"),
        ("A man in a suit., standing", "a man in a suit. standing"),
        ("a pizza with ham.; a glass", "a pizza with ham. a glass"),
        ("No.: 5 on a bus", "no. 5 on a bus"),
        ("two lbs., of meat", "two lbs. of meat"),
        ("lbs.-x lbs.- x half-eaten., x_y.; AT&T.: don't.,", "lbs.-x lbs x half-eaten. x_y. at&t. do n't"),
        (
            "o\u2019clock O\u2019Brien ma\u2019am y\u2019all don\u2019t it\u2019s \u2019tis \u2019em \u201990s",
            "o\u2019clock o\u2019brien ma\u2019am y\u2019 all do n't it 's tis \u2019em \u201990s",
        ),
        (
            "it`s don`t O\u2018Brien \u2018em MA'AM rock \u2019n\u2019 roll",
            "it s do n`t o\u2018brien em ma'am rock \u2019n\u2019 roll",
        ),
        ("U.S@C a@b,c (a@b) <a@b> a@b{c 9@x a@@b", "u.s@c a@b,c -lrb- a@b -rrb- <a@b> a@b -lcb- c 9@x a@@b"),
        ("C# and F# and D# and C++ and F++", "c# and f# and d # and c++ and f + +"),
        ("#dog ##dog #5 #a5 \u00a3dog @@@ @dog", "#dog ## dog # 5 #a 5 # dog @@@ @dog"),
        ("<< >> <man in red> <a,b> <a b=c> </a>", "<< >> <man\u00a0in\u00a0red> < a b > < a b = c > </a>"),
        (
            "1 1/2 cups, 555 5555, +1 555 555 5555, 10-12-2014, 5'10\"",
            "1\u00a01/2 cups 555 5555 +1 555\u00a0555\u00a05555 10-12-2014 5 10",
        ),
        ("12,half-eaten a.b-c.d 5.5-m caf\u00e9-au-lait", "12,half-eaten a.b-c d 5.5-m caf\u00e9-au-lait"),
        ("a..b a...b . . . .. ..... ?! !!", "a. b a. b ?! !!"),
        ("x:D :-( :Da ;[ :{ ^_^ (^_^) \\*", "x :d :--lrb- da ;[ :{ ^_^ -lrb-^_^-rrb- \\*"),
        (
            "www.a.com/b/c. a-b.com a*b.com foo.com?dog 5.jpg, 5.jpg;",
            "www.a.com/b/c a-b com a*b.com foo.com?dog 5.jpg 5 jpg",
        ),
        (
            "Inc.C Mr.A Jan.-t Co.a-b etc.the St.James Assoc. Pty. PTY. Az. az. Cpl. Treas.",
            "inc. c mr.a jan. t co.a-b etc.the st.james assoc. pty. pty az. az cpl. treas.",
        ),
        ("vitamin C. Here C. Heres C.  The p.m. The", "vitamin c here c. heres c the p.m. the"),
        ("Ph.D. Ed.D. M.Sc. S&Ls anti- war pro- war", "ph.d. ed.d. m.sc s&ls anti- war pro- war"),
        ("\u201c\u201c \u201d\u2019 \u00ab\u00bb \u201e \u2039\u203a", "```` ''' ``'' \u201e `'"),
        ("isnn't isn'tx an't \u00e9an't who's's 's5 'sa 'No", "isnn t is n'tx a n't \u00e9an t who 's 's 's 5 sa no"),
        (
            "cafe\u0301 na\u00adive 5\u00b2 \u00bd cup 1\u00bd x\u200dy \u2603 \u4e2d\u6587 \U0001f642.com",
            "cafe\u0301 naive 5 \u00b2 1/2 cup 1 1/2 x y \u2603 \u4e2d\u6587 \U0001f642.com",
        ),
        ("&lt;3 &amp;c AT&amp;T &mdash; dog&apos;s a&nbsp;b", "< 3 & c at&t dog 's a b"),
        ("w/o a/b/c/d AT&T/x a\\/b caf\u00e9/a", "w/o a/b/c / d at&t / x a\\/b caf\u00e9 / a"),
        ("US$5 us$5 \u20ac5 5\u20ac \u00a55 A$5 ----- ----", "us$ 5 us $ 5 $ 5 5 $ \u00a5 5 a$ 5 -----"),
    ],
)
def test_tokens_of_awkward_captions(caption, tokens):
    assert ptb_tokenize(caption) == tokens


def test_known_answers():
    np.testing.assert_allclose(bleu(["a b c d e"], [["a b c d e"]]), 1, atol=1e-8)
    assert bleu(["a b"], [["a b c d"]])[0] == pytest.approx(np.exp(-1))  # brevity penalty alone
    assert bleu(["a a a"], [["a b c"]])[0] == pytest.approx(1 / 3)  # clipped count
    captions = ["a dog runs fast", "two cats sit still"]
    np.testing.assert_allclose(cider_d(captions, [[caption] for caption in captions]), 10)
    np.testing.assert_array_equal(cider_d(captions[:1], [captions[:1]]), [0])  # a set of one has no rare words
    assert rouge_l(["a c"], [["a b c"]])[0] == pytest.approx((1 + 1.44) * (2 / 3) / (2 / 3 + 1.44))


def test_rarity_is_counted_over_the_set_that_is_scored():
    hypotheses = [GOLDEN["ptb_hypotheses"][image][0] for image in IMAGES]
    references = [GOLDEN["ptb_references"][image] for image in IMAGES]
    inside, alone = cider_d(hypotheses, references)[:20], cider_d(hypotheses[:20], references[:20])
    assert abs(inside.mean() - alone.mean()) > 0.01


def test_empty_captions_score_without_error():
    scores = METRICS["coco"](["", "a dog"], [["a cat", ""], ["a dog"]])
    assert np.isfinite([*scores.total.values()]).all()
    np.testing.assert_array_equal(scores.per_sample["ROUGE-L"], [1, 1])


def test_exact_match():
    predictions, references = ["Yes.", "no", "bed room"], [["yes"], ["no", "nope"], ["bedroom"]]
    np.testing.assert_array_equal(METRICS["exact_match"](predictions, references).per_sample["accuracy"], [0, 100, 0])
    assert METRICS["exact_match_relaxed"](predictions, references).total["accuracy"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("name", METRICS)
def test_unusable_input_is_refused_in_one_line(name):
    for predictions, references, says in [
        (["a"], [["a"], ["b"]], "1 predictions for 2"),
        ([], [], "nothing to score"),
        (["a", "b"], [["a"], []], "sample 1: references"),
        (["a", "b"], ["a", "b"], "sample 0: references"),
    ]:
        with pytest.raises(ValueError, match=says) as error:
            METRICS[name](predictions, references)
        assert "\n" not in str(error.value)
