"""Slides: the findings of a study as a .pptx and as one HTML file that needs no network. No torch.

A slide is what `findings` says: a sentence, its table, a picture where there is one, and where both come from. Both
files are made from one list of slides; from the same tables they are made the same byte for byte.
"""

import argparse
import base64
import copy
import functools
import html
import io
import math
import re
import sys
import zipfile
from pathlib import Path

import pandas as pd
from matplotlib import font_manager
from PIL import Image, ImageFont

from vitlab import findings, record

# -- PowerPoint


@functools.cache
def _font():
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 100)


@functools.cache
def _length(text):
    return _font().getlength(text) / 100


def _width(text, size, bold=False):
    """Inches that a line in points of Arial takes at most, from DejaVu Sans, which matplotlib brings: Arial's words are
    0.88 as wide, bold ones 0.95."""
    return (1 if bold else 0.92) * _length(text) * size / 72


def _lines(text, size, width, bold=False):
    """Lines that text takes, broken at spaces; inf where a word is wider than width (inches)."""
    count, used = 1, 0.0
    for word in text.split(" "):
        if _width(word, size, bold) > width:
            return math.inf
        if used + _width(word, size, bold) > width:
            count, used = count + 1, 0.0
        used += _width(word + " ", size, bold)
    return count


def _fit_text(text, sizes, width, height, bold=False):
    """The largest of sizes (points) at which text fits into width and height (inches), else the smallest."""
    return next((size for size in sizes if _lines(text, size, width, bold) * 1.2 * size / 72 <= height), sizes[-1])


def _fit_table(table, largest, rooms, height):
    """(size in points, widths of columns, heights of rows in inches), as large as fits but not more.

    rooms: widths to try, inches. Headers, which are bold, break at spaces, mostly into two lines. Cells do where none
    of the six largest sizes fits without: then the widest column gives way. None where 8 points do not fit.
    """
    rows, pad = [[*table.columns], *table.itertuples(index=False)], 0.2
    whole = [(size, rooms[0], False) for size in range(largest, largest - 6, -1)] + [(largest - 5, rooms[-1], False)]
    for size, room, wrap in [*whole, *((size, rooms[-1], True) for size in range(largest - 5, 7, -1))]:
        widths = []
        for name in table:
            line, longest = _width(name, size, True), max(_width(word, size, True) for word in name.split(" "))
            header = max(longest, min(line, max(line / 2, _width("0" * 7, size))))
            widths.append(max(header, *(_width(cell, size) for cell in table[name])) + pad)
        widest = widths.index(max(widths))
        widths[widest] -= max(0, sum(widths) - room) if wrap else 0
        lines = [
            max(_lines(cell, size, wide - pad + 1e-6, i == 0) for cell, wide in zip(row, widths, strict=True))
            for i, row in enumerate(rows)
        ]
        heights = [1.2 * size / 72 * count + 0.1 for count in lines]
        if sum(widths) <= room + 1e-6 and sum(heights) <= height:
            return size, widths, heights
    return None


def _ratio(picture):
    """Width over height of a picture file."""
    with Image.open(picture) as image:
        return image.width / image.height


def _arrange(one, top, height):
    """Where the table of a slide goes, (left, top), what `_fit_table` says of it, and (width, height) of the picture,
    all in inches between top and top + height: side by side, or the table below if the picture is larger then.

    Raises ValueError for a table that fits neither way.
    """
    choices = []
    if one.picture is None:
        if fit := _fit_table(one.table, 22, [12.33], height):
            stretched = [width * min(1.5, 12.33 / sum(fit[1])) for width in fit[1]]
            choices.append(((0.5, top), (fit[0], stretched, fit[2]), (0, 0)))
    else:
        ratio = _ratio(one.picture)
        spare = 11.93 - ratio * (height - 0.35)  # what a narrow picture leaves to the table
        if fit := _fit_table(one.table, 16, [max(most, spare) for most in (5, 6)], height):
            wide = min(11.93 - sum(fit[1]), ratio * (height - 0.35))
            choices.append(((12.83 - sum(fit[1]), top), fit, (wide, wide / ratio)))
        if fit := _fit_table(one.table, 13, [12.33], height - 1):
            wide = min(12.33, ratio * (height - 0.5 - sum(fit[2])))
            choices.append(((0.5, top + wide / ratio + 0.45), fit, (wide, wide / ratio)))
    if not choices:
        raise ValueError(f"a table is too large for its slide: {one.title}")
    return max(choices, key=lambda choice: choice[2][0])


def _is_number(cells):
    return all(re.fullmatch(r"[+−]?[\d.,]*(\u00a0%)?", cell) for cell in cells)


def to_pptx(found, *, title, date):
    """Bytes of a .pptx, 13.33 x 7.5 inches, of a list of Slide. title, date ("2026-11-24"): of the file's properties.

    Tables are native, pictures the png as it is, in full resolution. Raises ModuleNotFoundError without python-pptx.
    """
    import pptx
    from pptx.enum.shapes import PP_PLACEHOLDER
    from pptx.util import Inches

    deck = pptx.Presentation()
    for layout in [*deck.slide_layouts, deck.slide_master]:  # the template is 4:3; the master last, as others inherit
        for shape in layout.placeholders:
            place = shape.left * 4 // 3, shape.top, shape.width * 4 // 3, shape.height
            shape.left, shape.top, shape.width, shape.height = place
    deck.slide_width, deck.slide_height = Inches(13.333), Inches(7.5)
    about = deck.core_properties
    about.title, about.author, about.last_modified_by = title, "vitlab", "vitlab"
    about.created = about.modified = pd.Timestamp(date).to_pydatetime()
    plain = deck.slide_layouts[5]  # a title alone
    (number,) = [shape for shape in plain.placeholders if shape.placeholder_format.type == PP_PLACEHOLDER.SLIDE_NUMBER]
    number.left, number.top, number.width, number.height = map(Inches, (12.2, 6.8, 0.63, 0.25))
    for one in found:
        slide = deck.slides.add_slide(plain)
        slide.shapes._spTree.append(copy.deepcopy(number._element))  # python-pptx leaves it in the layout
        _write(slide.shapes.title, one.title, (0.5, 0.3, 12.33, 1.05), range(28, 17, -1), bold=True)
        top, height = 1.5, 4.7 if one.note else 5.2
        place, fit, (wide, high) = _arrange(one, top, height)
        _write_table(slide, one.table, place, *fit)
        if one.picture:
            drawn = slide.shapes.add_picture(str(one.picture), *map(Inches, (0.5, top, wide, high)))
            drawn._element.nvPicPr.cNvPr.set("descr", one.shows)
            _write(_box(slide), one.shows, (0.5, top + high + 0.05, wide, 0.3), range(11, 6, -1), grey=True)
        if one.note:
            _write(_box(slide), one.note, (0.5, 6.3, 12.33, 0.45), range(12, 6, -1))
        _write(_box(slide), one.source, (0.5, 6.85, 11.6, 0.4), range(10, 5, -1), grey=True)
    made, same = io.BytesIO(), io.BytesIO()
    deck.save(made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(same, "w") as new:
        for name in old.namelist():  # a ZipInfo is of 1980, whenever it is made
            new.writestr(zipfile.ZipInfo(name), old.read(name), zipfile.ZIP_DEFLATED)
    return same.getvalue()


def _box(slide):
    return slide.shapes.add_textbox(0, 0, 0, 0)


def _write(shape, text, place, sizes, *, bold=False, grey=False):
    """text into a shape at place (left, top, width, height in inches), as large as fits."""
    from pptx.enum.text import MSO_ANCHOR, MSO_AUTO_SIZE
    from pptx.util import Inches

    shape.left, shape.top, shape.width, shape.height = map(Inches, place)
    frame = shape.text_frame
    frame.margin_left = frame.margin_right = frame.margin_top = frame.margin_bottom = 0
    frame.word_wrap, frame.auto_size = True, MSO_AUTO_SIZE.NONE
    frame.vertical_anchor = MSO_ANCHOR.MIDDLE if bold else MSO_ANCHOR.TOP
    size = _fit_text(text, sizes, *place[2:], bold=bold)
    _say(frame, text, size, color="666666" if grey else "1A1A1A", bold=bold)


def _say(frame, text, size, *, color, bold=False, right=False):
    """One paragraph, as all of the text of a frame. size: points."""
    from pptx.dml.color import RGBColor
    from pptx.enum.text import PP_ALIGN
    from pptx.util import Pt

    paragraph = frame.paragraphs[0]
    paragraph.alignment = PP_ALIGN.RIGHT if right else PP_ALIGN.LEFT
    run = paragraph.add_run()
    run.text = text or "\u00a0"  # an empty cell would be as high as the template's text
    run.font.name, run.font.size, run.font.bold = "Arial", Pt(size), bold
    run.font.color.rgb = RGBColor.from_string(color)


def _write_table(slide, table, place, size, widths, heights):
    """A native table at place (left, top): numbers at the right, the header dark, every second row tinted."""
    from pptx.dml.color import RGBColor
    from pptx.enum.text import MSO_ANCHOR
    from pptx.util import Inches

    sides = map(Inches, (*place, sum(widths), sum(heights)))
    grid = slide.shapes.add_table(len(heights), len(widths), *sides).table
    for line, height in zip(grid.rows, heights, strict=True):
        line.height = Inches(height)
    for i, (name, width) in enumerate(zip(table, widths, strict=True)):
        grid.columns[i].width = Inches(width)
        for j, text in enumerate([name, *table[name]]):
            cell = grid.cell(j, i)
            cell.margin_left = cell.margin_right = Inches(0.08)
            cell.margin_top = cell.margin_bottom = Inches(0.04)
            cell.vertical_anchor = MSO_ANCHOR.MIDDLE
            cell.fill.solid()
            cell.fill.fore_color.rgb = RGBColor.from_string(["F2F2F2", "FFFFFF"][j % 2] if j else "404040")
            color = "1A1A1A" if j else "FFFFFF"
            _say(cell.text_frame, text, size, color=color, bold=j == 0, right=_is_number(table[name]))


# -- HTML

STYLE = """
html { scroll-snap-type: y proximity; font: 16px/1.35 Arial, Helvetica, sans-serif; color: #1a1a1a; }
body { margin: 0; }
section { box-sizing: border-box; min-height: 100vh; padding: 3vh 4vw 2vh; scroll-snap-align: start;
  display: flex; flex-direction: column; gap: 1.5vh; border-bottom: 1px solid #ddd; }
h2 { margin: 0; font-size: clamp(1.2rem, 2.1vw, 2.4rem); line-height: 1.2; }
.body { flex: 1; display: flex; gap: 2vw; align-items: flex-start; }
figure { margin: 0; flex: 1 1 0; min-width: 0; }
img { display: block; width: 100%; height: auto; max-height: 66vh; object-fit: contain; object-position: left top; }
.tall { flex-direction: column; }
.tall figure { flex: none; width: 100%; }
.tall figure + .table { max-width: 100%; }
figcaption, footer { color: #666; font-size: clamp(0.7rem, 0.85vw, 1rem); }
.table { max-width: 100%; overflow-x: auto; }
figure + .table { flex: 0 1 auto; max-width: 46%; }
table { border-collapse: collapse; font-size: clamp(0.75rem, 1vw, 1.3rem); }
.alone table { font-size: clamp(0.8rem, 1.5vw, 2rem); }
th, td { padding: 0.35em 0.6em; text-align: left; vertical-align: middle; }
th { background: #404040; color: #fff; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td:first-child { white-space: nowrap; }
tr:nth-child(even) td { background: #f2f2f2; }
p { margin: 0; font-size: clamp(0.75rem, 0.95vw, 1.1rem); }
@media screen and (max-width: 60rem) { section { min-height: 0; padding: 1rem; } .body { flex-direction: column; }
  figure, figure + .table { flex: none; width: 100%; max-width: 100%; } html { scroll-snap-type: none; } }
@media print { @page { size: 13.33in 7.5in; margin: 0; } html { font-size: 12px; }
  section { height: 7.5in; min-height: 0; break-after: page; break-inside: avoid; border: 0;
    padding: 0.4in 0.5in 0.2in; }
  img { max-height: 4.6in; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
SCRIPT = """
addEventListener("keydown", event => {
  const step = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1 }[event.key];
  if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
  const all = [...document.querySelectorAll("section")];
  const now = all.findIndex(one => one.getBoundingClientRect().bottom > innerHeight / 2);
  event.preventDefault();
  all[Math.min(Math.max(now + step, 0), all.length - 1)].scrollIntoView();
});
"""


def to_html(found, *, title):
    """One HTML page of a list of Slide that asks no server for anything: pictures are within it, the svg where it is
    the smaller file. Arrow keys go from slide to slide; printed, each is a page. title: of the window."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
    ]
    for number, one in enumerate(found, 1):
        kind = "" if one.picture and _ratio(one.picture) < 2.5 else " tall" if one.picture else " alone"
        shows = f"<figcaption>{html.escape(one.shows)}</figcaption>"
        drawn = f"<figure>{_image(one)}{shows}</figure>" if one.picture else ""
        parts += [
            f'<section id="slide-{number}">\n<h2>{html.escape(one.title)}</h2>',
            f'<div class="body{kind}">{drawn}',
            f'<div class="table">{_html_table(one.table)}</div>\n</div>',
            f"<p>{html.escape(one.note)}</p>" if one.note else "",
            f"<footer>{html.escape(one.source)} {number} / {len(found)}</footer>\n</section>",
        ]
    return "\n".join([*parts, f"<script>{SCRIPT}</script>\n</body>\n</html>\n"])


def _image(one):
    """The picture of a slide as an img with its data within."""
    files = {"svg+xml": one.picture.with_suffix(".svg"), "png": one.picture}
    kind, path = min(((k, p) for k, p in files.items() if p.is_file()), key=lambda pair: pair[1].stat().st_size)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(one.shows)}" src="data:image/{kind};base64,{data}">'


def _html_table(table):
    sides = [' class="number"' if _is_number(table[name]) else "" for name in table]

    def line(cells, tag):
        marked = [f"<{tag}{s}>{html.escape(c)}</{tag}>" for c, s in zip(cells, sides, strict=True)]
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(line(row, "td") for row in table.itertuples(index=False))
    return f"<table>\n<thead>{line(table, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def write(folder, out=None):
    """Write slides.html and slides.pptx of a folder of tables and pictures into out (default: its folder `slides`).

    Returns both paths. Raises FileNotFoundError for a folder without results.csv and ModuleNotFoundError without
    python-pptx, then with slides.html written.
    """
    found, out = findings.slides(folder), Path(out or Path(folder) / "slides")
    title, dates = found[0].title, re.findall(r"\d{4}-\d\d-\d\d", found[0].source)
    record.write_atomic(out / "slides.html", to_html(found, title=title))
    record.write_atomic(out / "slides.pptx", to_pptx(found, title=title, date=[*dates, "2000-01-01"][0]))
    record.say(f"{len(found)} slides: {out / 'slides.pptx'}, {out / 'slides.html'}")
    return out / "slides.pptx", out / "slides.html"


def main(arguments=None):
    """python -m vitlab.deck STUDY [--out FOLDER]: the slides of figures/STUDY. Returns the exit status, 0 or 1."""
    parser = argparse.ArgumentParser("python -m vitlab.deck", description=__doc__.split("\n")[0])
    parser.add_argument("study", help="name of a study, or path of its .yaml file: the slides of figures/<its name>")
    parser.add_argument("--out", help="where they are written (default: figures/<study>/slides)")
    asked = parser.parse_args(arguments)
    try:
        name = re.sub(r"\.ya?ml$", "", Path(asked.study).name)
        write(record.repository() / "figures" / name, asked.out)
    except FileNotFoundError as error:
        print(f"vitlab.deck: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"vitlab.deck: no slides.pptx, as {error.name} is missing: pip install python-pptx", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
