"""Slides: titles hold what the tables hold; both files are whole, native and the same again."""

import html
import html.parser
import io
import math
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import deck
import numpy as np
import pages
import pandas as pd
import published
import pytest
from invented import ALONE, COMMITTED, FIGURES, invent
from PIL import Image

import findings
from vitlab import files

pptx = pytest.importorskip("pptx")


@pytest.fixture(scope="module")
def made(slides):
    return opened(deck.to_pptx(slides, title="title", date="2026-11-24"))


@pytest.fixture(scope="module")
def invented(tmp_path_factory):
    return invent(tmp_path_factory.mktemp("invented"), 3)


def run(*arguments):
    command = [sys.executable, "slides", *arguments]
    return subprocess.run(command, cwd=files.repository(), capture_output=True, text=True)


def opened(made):
    return pptx.Presentation(io.BytesIO(made))


def text_of(shape):
    return shape.text_frame.text.replace("\u2011", "-")  # top-1 is not broken


def test_the_pptx_has_whole_pictures_native_tables_and_notes_and_nothing_overlaps(slides, made):
    assert len(made.slides) == len(slides)
    for slide, one in zip(made.slides, slides, strict=True):
        assert text_of(slide.shapes.title) == one.title
        tables = [shape.table for shape in slide.shapes if shape.has_table]
        assert len(tables) == (not one.pictures and not one.points)
        blobs = [shape.image.blob for shape in slide.shapes if shape.shape_type == 13]  # pictures
        assert blobs == [path.read_bytes() for path in (one.pictures or {}).values()]
        words = slide.notes_slide.notes_text_frame.text
        assert one.source in words and one.note in words and one.terms in words
        shown = [text_of(shape) for shape in slide.shapes if shape.has_text_frame]
        assert (one.terms in shown) == bool(one.terms)
        for picture in (shape for shape in slide.shapes if shape.shape_type == 13):
            assert one.shows in picture._element.nvPicPr.cNvPr.get("descr")  # what is read aloud
        if one.table is not None:
            assert all(cell in words for cell in cells(one.table))
        places = [(s.left, s.top, s.left + s.width, s.top + s.height) for s in slide.shapes]
        for i, (left, top, right, bottom) in enumerate(places):
            assert (
                0 <= left < right <= made.slide_width and 0 <= top < bottom <= made.slide_height
            ), one.title
            for x, y, x1, y1 in places[:i]:
                assert left >= x1 or right <= x or top >= y1 or bottom <= y, one.title


def test_texts_fit_their_boxes_and_can_be_read(made):
    for slide in made.slides:
        for shape in slide.shapes:
            texts = [shape] if shape.has_text_frame else []
            if shape.has_table:
                texts = [cell for row in shape.table.rows for cell in row.cells]
            for text in texts:
                for run in runs_of(text):
                    assert run.font.size.pt >= (deck.LEAST if shape.has_table else deck.CAPTION)
            if shape.has_text_frame:
                assert_fits(shape)


def runs_of(shape):
    return [run for paragraph in shape.text_frame.paragraphs for run in paragraph.runs]


def assert_fits(shape):
    """Each paragraph is one run, and all of them fit the shape."""
    height = 0
    for run in runs_of(shape):
        size = run.font.size.pt
        lines = deck.lines_of(run.text, size, shape.width.inches + 1e-6, run.font.bold)
        height += lines * 1.2 * size / 72
    assert height <= shape.height.inches + 1e-6, shape.text_frame.text


def test_both_files_are_the_same_byte_for_byte_whenever_they_are_made(
    invented, tmp_path, monkeypatch
):
    first = [path.read_bytes() for path in deck.write(invented, tmp_path / "a")]
    later = time.gmtime(time.time() + 90_000)
    monkeypatch.setattr(time, "localtime", lambda *_: later)  # what zipfile stamps
    assert [path.read_bytes() for path in deck.write(invented, tmp_path / "b")] == first
    with zipfile.ZipFile(io.BytesIO(first[0])) as file:
        assert {one.date_time for one in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert opened(first[0]).core_properties.modified.isoformat()[:10] == "2026-11-24"


class Page(html.parser.HTMLParser):
    """Tags that are open, texts of headings and cells, and addresses of what a page shows."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.addresses = [], {"h2": [], "td": [], "th": []}, []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.texts:
            self.texts[self.open[-1]][-1] += data


def test_the_page_is_whole_and_asks_no_server(slides):
    text = deck.to_html(slides, title="a < b")
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open and "a &lt; b" in text
    assert page.texts["h2"] == [deck._unbroken(slide.title) for slide in slides]
    assert all(html.escape(slide.terms) in text for slide in slides)
    tables = [slide.table for slide in slides if slide.table is not None]
    assert page.texts["td"] == [
        cell for table in tables for row in table.itertuples(index=False) for cell in row
    ]
    assert len(page.addresses) == sum(len(slide.pictures or {}) for slide in slides)
    assert all(
        re.match(r"data:image/(png|svg\+xml);base64,", address) for address in page.addresses
    )
    assert "//" not in re.sub(r"base64,[\w+/=]+", "", text).replace("</", "")


def test_a_folder_without_tables_says_what_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"make study STUDY={tmp_path.name}"):
        findings.slides(tmp_path)
    done = run("never-run")
    assert done.returncode == 1
    assert "figures/never-run has no tables of a study" in done.stderr.replace("\\", "/")


def test_the_command_writes_both_files_where_it_is_told(tmp_path):
    if not COMMITTED:
        pytest.skip("no study is committed")
    assert (
        run(f"notebooks/params/{COMMITTED[0]}.yaml", "--out", str(tmp_path / "new")).returncode == 0
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "slides.html",
        "slides.pptx",
    ]


def test_without_python_pptx_there_is_the_page(invented, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pptx", None)
    with pytest.raises(ModuleNotFoundError, match="pptx"):
        deck.write(invented, tmp_path)
    assert (tmp_path / "slides.html").exists() and not (tmp_path / "slides.pptx").exists()


def test_no_torch_is_loaded():
    code = "import sys, deck; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=files.repository() / "slides")
    assert done.returncode == 0


@pytest.mark.parametrize(
    "text, width, lines", [("", 1, 1), ("one", 1, 1), ("one two", 0.6, 2), ("one " * 9, 0.6, 9)]
)
def test_lines_by_hand(text, width, lines):
    assert deck.lines_of(text.strip(), 18, width) == lines  # "one" is 0.46 inches wide in 18 points


def test_a_word_wider_than_its_box_does_not_fit():
    long = pd.DataFrame({"a": ["incomprehensibilities" * 20]})
    assert deck.lines_of(long.a[0], 18, 9) == float("inf")
    with pytest.raises(ValueError, match="a table is too large for its slide: why"):
        deck.to_pptx([findings.Slide("why", table=long)], title="", date="2026-11-24")


def test_some_slides_by_number_and_on_a_template(invented, tmp_path):
    template = pptx.Presentation()
    template.slides.add_slide(template.slide_layouts[0])
    template.slide_width = pptx.util.Inches(10)
    template.save(tmp_path / "corporate.pptx")
    with (  # a .potx differs in one word
        zipfile.ZipFile(tmp_path / "corporate.pptx") as old,
        zipfile.ZipFile(tmp_path / "corporate.potx", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"presentation.main", b"template.main"))
    every = [slide.title for slide in findings.slides(invented)]
    for file in ("corporate.pptx", "corporate.potx"):
        _, made = deck.write(invented, tmp_path / "out", only=[3, 1], template=tmp_path / file)[
            ::-1
        ]
        deck_of = pptx.Presentation(made)
        titles = [text_of(slide.shapes.title) for slide in deck_of.slides]
        assert titles == [every[2], every[0]] and deck_of.slide_width.inches == 10
    small = pptx.Presentation()
    small.slide_width, small.slide_height = map(pptx.util.Inches, (10, 5.625))
    small.save(tmp_path / "small.pptx")
    made, _ = deck.write(invented, tmp_path / "out", only=[1], template=tmp_path / "small.pptx")
    for shape in pptx.Presentation(made).slides[0].shapes:
        assert_fits(shape)
    with pytest.raises(ValueError, match="there are slides 1 to"):
        deck.write(invented, tmp_path / "out", only=[99])


def test_the_command_says_what_is_no_number_and_no_template(tmp_path, capsys):
    main = runpy.run_path(str(files.repository() / "slides"))["main"]
    (tmp_path / "look.potx").write_text("no archive")
    study = ["cifar10-small", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*study, "--only", "3,a"])
    assert main([*study, "--only", "1", "--template", str(tmp_path / "look.potx")]) == 1
    said = capsys.readouterr().err
    assert "numbers of slides, such as 3,9, got '3,a'" in said
    assert "look.potx is no .potx or .pptx" in said


@pytest.mark.parametrize("count", [1, 2])
def test_pictures_fill_the_slide_side_by_side(tmp_path, count):
    Image.new("RGB", (1200, 800)).save(tmp_path / "picture.png")
    places = deck.arrange([tmp_path / "picture.png"] * count, 12, 5)
    assert len(places) == count
    for left, _, wide, high in places:
        assert wide / high == pytest.approx(1.5) and left + wide <= 12 + 1e-9 and high <= 5 + 1e-9
        assert high == pytest.approx(5) or wide * count + deck.GAP * (count - 1) == pytest.approx(
            12
        )


@pytest.mark.parametrize("study", COMMITTED)
def test_published_pictures_can_be_read_where_slides_show_them(study):
    """No text is below 12 points at the size at which a slide shows the picture."""
    width = deck.WIDTH - 2 * deck.MARGIN
    for slide in findings.slides(FIGURES / study, long=True):
        if not slide.pictures:
            continue
        height = deck.BODY - (0.3 if len(slide.pictures) > 1 else 0)
        places = deck.arrange(slide.pictures.values(), width, height)
        for path, (_, _, wide, _) in zip(slide.pictures.values(), places, strict=True):
            scale = wide / findings.inches(path)[0]
            text = path.with_suffix(".svg").read_text()
            sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", text)]
            # Exponents, such as of 10⁻³, are smaller than the text that they belong to.
            assert sizes and scale * min(size for size in sizes if size > 9) >= 12, path.name


# -- what slides say


def numbers(texts):
    return set(re.findall(r"\d+(?:[.,]\d+)*", " ".join(texts)))


def cells(table):
    return [*table.columns, *(cell for line in table.itertuples(index=False) for cell in line)]


def files_of(slide):
    return set(re.findall(r"[\w.-]+\.(?:csv|png)", slide.source))


def test_every_number_of_a_title_stands_in_its_table(folder, slides):
    assert len(slides) >= 11
    for slide in slides:
        assert not re.search("nan|None|inf|budget-|pool-", slide.title), slide.title
        assert slide.source.startswith("Source: ")
        if slide.table is None:
            continue
        texts = cells(slide.table)
        assert slide.table.map(lambda cell: isinstance(cell, str)).all(axis=None)
        assert not re.search("nan|None|inf|_", " ".join(texts)), slide.title
        title = slide.title.replace("top-1", "")
        blocks = [cell for cell in texts if "." in cell and not cell[-1].isdigit()]
        assert numbers([title]) <= numbers([*texts, *blocks]), slide.title


def test_a_talk_shows_each_finding_once_and_the_appendix_the_rest(invented, capsys):
    talk = findings.slides(invented)
    assert [line for line in capsys.readouterr().out.splitlines() if "no slide" in line] == [
        "no slide peers: bench/accuracy.csv is of CIFAR-10, or missing",
        "no slide backbone: bench/foundation.csv is missing",
    ]
    assert len(talk) == len(findings.TALK) - 2
    assert len({slide.title for slide in talk}) == len(talk)
    long = findings.slides(invented, long=True)
    assert [slide.title for slide in long[: len(talk)]] == [slide.title for slide in talk]
    shown = [path for slide in long for path in (slide.pictures or {}).values()]
    pictures = {path for path in invented.glob("*.png") if path.stem != "cuts-swin"}
    assert pictures <= set(shown) and len(shown) == len(set(shown))
    tables = [slide for slide in long[len(talk) :] if slide.table is not None]
    assert all(len(slide.table) <= findings.LINES for slide in tables)
    by_title = {}
    for slide in tables:
        by_title.setdefault(slide.title, []).append(len(slide.table))
    assert all(max(parts) - parts[-1] < len(parts) for parts in by_title.values())  # none is a rest


def test_slides_that_speak_of_budgets_agree(invented):
    slides = {slide.title for slide in findings.slides(invented) if "the MACs" in slide.title}
    told = [
        re.findall(r"([+−]?\d+\.\d)(?: points)? \((ViT|Swin)\)", title)
        for title in slides
        if "nothing trained" in title.lower()
    ]
    assert len(told) >= 2 and {len(each) for each in told} == {2}
    assert len({tuple(each) for each in told}) == 1


def test_what_is_missing_drops_its_own_slides_and_a_line_says_so(invented, tmp_path, capsys):
    for name in ("summary.csv", "table-runtimes.csv", "sensitivity-vit.png"):
        part = tmp_path / name / invented.name
        shutil.copytree(invented, part, ignore=lambda _, names, name=name: {name} & set(names))
        (part / "sensitivity-swin.png").unlink()
        capsys.readouterr()
        left = findings.slides(part)
        lines = [line for line in capsys.readouterr().out.splitlines() if "no slide" in line]
        assert len(left) + len(lines) == len(findings.TALK)
        assert any(name in line for line in lines)


def test_no_number_lies_between_two_processors(tmp_path):
    """Of two runs the second is ten times as fast; what lies between them would be an average."""
    folder = invent(tmp_path, 2)
    times = pd.read_csv(folder / "table-runtimes.csv")
    known = {round(value, 1) for value in times.achieved_here * times.promised}
    timed = pd.read_csv(folder / "efficiency.csv")
    known |= {round(value, 1) for value in timed.speedup} | {1.0, 2.0}
    (faster,) = [slide for slide in findings.slides(folder) if "in the same runtime" in slide.shows]
    told = [faster.title.replace("ViT", ""), *cells(faster.table.iloc[:, -2:])]
    said = {float(number) for number in re.findall(r"\d+\.\d", " ".join(told))}
    assert len(said) > 4 and said <= known
    claims = [claim for claim in pages.claims(published.Published(folder)) if "as fast" in claim]
    said = {float(number) for claim in claims for number in re.findall(r"\d+\.\d", claim)}
    ends = {round(math.floor(10 * value) / 10, 1) for value in timed.speedup.dropna()}
    ends |= {round(value + 0.1, 1) for value in ends}
    assert claims and said <= known | ends
    zeros = {float(number) for number in re.findall(r"\d+\.\d", faster.note)}
    assert zeros <= ends and "Zeros save no time" in faster.note


def test_no_title_praises_a_control_or_a_cut_of_fewer_seeds(tmp_path):
    folder = invent(tmp_path, 2)
    summary = pd.read_csv(folder / "summary.csv")
    alone = summary.seeds == 1
    assert 0 < alone.sum() < len(summary) and "random" in ALONE
    stages = ["cut", "reconstructed", "finetuned"]
    for stage in stages:
        summary[stage] = summary.dense - np.where(alone, 1.0, 3.0)
    summary.to_csv(folder / "summary.csv", index=False)
    titles = [slide.title for slide in findings.slides(folder)]
    ranked = [title for title in titles if "points" in title]
    assert len(ranked) >= 4
    for title in ranked:
        assert "−3.0" in title and "−1.0" not in title and "random" not in title


# Words of the talk, and what explains each: on the slide that has it first, or before.
EXPLAINED = {
    "MACs": "MACs are the multiply-accumulates",
    "Masked": "Masked weights and rows stay in a matrix as zeros",
    "removed": "removed rows, heads, neurons and ranks make it smaller",
    "ranks": "as many ranks as U has columns",
    "neurons": "Neuron: hidden value of an MLP",
    "qkv": "qkv makes queries, keys and values",
    "nats": "Nats: unit of the loss",
    "Fisher": "Fisher: mean of (w g)²",
    "Taylor": "Taylor: mean of |w g|",
    "val": "val, images kept from training",
    "fine-tuning": "Fine-tuned: some short epochs of training",
    "SVD": "SVD: W ≈ U × V",
    "IHT": "IHT, iterative hard thresholding, chooses",
    "pool": "all of them stand in one queue",
    "units": "units are heads, neurons, filters of the stem and channels",
    "reconstruction": "is solved for anew, so that it answers as in the dense model",
    "CORP": "CORP: Zhang and Yang 2026",
    "Torch-Pruning": "Torch-Pruning (Fang et al. 2023) removes",
    "linear probe": "a linear probe, one linear layer",
    "onnxruntime": "onnxruntime: the exported model",
    "bf16": "bf16: numbers of 16 bits",
}


@pytest.mark.parametrize("study", COMMITTED)
def test_a_word_is_explained_where_it_first_stands_on_a_slide(study):
    opening, *talk = findings.slides(FIGURES / study)  # the opening names peers before they come
    opening = replace(opening, points=opening.points[:3])
    shown = [" ".join([s.title, *s.points, s.terms, s.shows]) for s in (opening, *talk)]
    said = [f"{text} {slide.note}" for text, slide in zip(shown, (opening, *talk), strict=True)]
    for word, words in EXPLAINED.items():
        first = [number for number, text in enumerate(shown) if re.search(rf"\b{word}\b", text)]
        meant = [number for number, text in enumerate(said) if words in text]
        if first:
            assert meant and meant[0] <= first[0], (word, first[0] + 1)
    assert len(talk) <= 13


@pytest.mark.parametrize("study", COMMITTED)
def test_the_last_slide_says_what_the_others_say(study):
    opening, *talk, last = findings.slides(FIGURES / study)
    titles = {f"{slide.title}." for slide in talk}
    backbone, zeros, limits = (point for point in last.points if point not in titles)
    assert len(last.points) >= 6 and zeros in talk[-1].note and limits.startswith("Not shown")
    assert (
        backbone in opening.points and "Caltech-101" in backbone and "linear classifier" in backbone
    )
    words = zeros.partition("zeroed, ")[2]  # as docs/results.md has them
    assert any(words in claim for claim in pages.claims(published.Published(FIGURES / study)))


@pytest.mark.parametrize("study", COMMITTED)
def test_titles_are_of_two_lines(study):
    wide = deck.WIDTH - 2 * deck.MARGIN
    for slide in findings.slides(FIGURES / study)[1:]:
        assert deck.lines_of(slide.title, 26, wide, bold=True) <= 2, slide.title


@pytest.mark.parametrize("study", COMMITTED)
def test_where_models_differ_in_the_best_cut_the_notes_name_it(study):
    found = published.Published(FIGURES / study)
    best, _ = findings.best_budgets(found)
    assert all(name in findings.budgets(found).note for name in best.name)
    assert "SVD + IHT on weights" in findings.heads_svd_iht(found).note


@pytest.mark.parametrize("study", COMMITTED)
def test_captions_are_whole_and_say_seeds_as_one_speaks(study):
    slides = findings.slides(FIGURES / study, long=True)
    for slide in opened(deck.to_pptx(slides, title="title", date="2026-11-24")).slides:
        texts = [text_of(shape) for shape in slide.shapes if shape.has_text_frame]
        assert not any("cuts: " in text or text.endswith("…") for text in texts), texts


@pytest.mark.parametrize("study", COMMITTED)
def test_the_talk_begins_with_its_models_and_its_question(study):
    opening = findings.slides(FIGURES / study)[0]
    models, trained, question = opening.points[:3]
    assert "million parameters" in models and re.search(r"MACs at \d+ px", models)
    assert trained.startswith("Trained on") and question.endswith("?")


def test_times_of_other_cuts_than_those_judged_are_said_to_be(tmp_path):
    folder = invent(tmp_path, 3)
    results = pd.read_csv(folder / "results.csv").assign(checkpoint="budget-pool-0.5")
    said = "Timed were earlier cuts than those of the other slides"

    def written(results):
        results.to_csv(folder / "results.csv", index=False)
        (slide,) = [one for one in findings.slides(folder) if "in the same runtime" in one.shows]
        page = pages.results([folder], page=folder)
        assert (said in slide.shows) == ("Times in efficiency.md are of earlier cuts" in page)
        return said in slide.shows

    assert not written(results)
    timed = results.latency_ms.notna() & (results.method == "pool")
    assert timed.any()
    results.params += timed
    assert written(results)
    other = timed & (
        results.stage == "finetuned"
    )  # judged under no such key: nothing to differ from
    assert not written(
        results[~((results.method == "pool") & results.latency_ms.isna() & other.any())]
    )


def test_a_real_backbone_stands_beside_its_peers_as_on_the_front_page():
    study = published.Published(FIGURES / "cifar10-small")
    slide = findings.backbone(study)
    sentence = pages.backbone_sentence(FIGURES.parent)
    assert numbers([slide.title.replace("top-1", "")]) <= numbers([sentence])
    assert re.search(r"best peer, ([^,]+), leaves", sentence)[1] in slide.title
    assert slide.table.source.all() and {"LAMP", "CORP"} <= {*slide.table.method}
    assert re.search("one draw|median of [23] draws", slide.shows)
    rows = pd.read_csv(FIGURES / "bench" / "foundation.csv")
    rows = rows[(rows.budget == 0.5) & (rows.stage == "cut")].groupby("method").probe_anew
    for method, value in rows.median().items():
        line = slide.table[slide.table.method == method]
        assert len(line) == (method != "random units"), method
        assert len(line) == 0 or line.iloc[0]["50\u00a0% of the MACs (%)"] == published.number(
            value
        )


def test_the_pool_says_what_its_reconstruction_wins_back(invented):
    slide = findings.pool(published.Published(invented))
    lines = pd.read_csv(invented / "summary.csv").set_index(["method", "model"]).loc["pool"]
    said = re.findall(r"\d+\.\d", slide.shows)
    order = [(stage, model) for stage in ("cut", "reconstructed") for model in ("vit", "swin")]
    assert said == [published.number(lines.loc[model, stage]) for stage, model in order]
    assert slide.pictures == {"": FIGURES / "pool.png"}


def test_a_note_sets_beside_each_other_what_takes_equal_time():
    tools = {
        "vitlab, pool": (1.4, 2.16),
        "Torch-Pruning, a": (1.6, 2.7),
        "Torch-Pruning, b": (1.7, 2.6),
    }
    rows = [
        ("small ViT", tool, budget, "cut", speedup)
        for tool, speeds in tools.items()
        for budget, speedup in zip((0.5, 0.25), speeds, strict=True)
    ]
    table = pd.DataFrame(rows, columns="model tool budget stage speedup".split())
    said = findings._at_equal_time(table)
    assert "the pool at a quarter of the MACs is 2.2 (ViT) times as fast" in said
    assert "at half the MACs, at most 1.7 (ViT)" in said
    assert findings._at_equal_time(table.assign(speedup=np.nan)) == ""
