"""Write slides as a .pptx and as one HTML file that needs no network. No torch.

Both files are made from the same list of slides. From the same tables they are the same, byte for byte.
"""

import base64
import copy
import functools
import html
import io
import math
import re
import zipfile
from pathlib import Path

import pandas as pd
from matplotlib import font_manager
from PIL import Image, ImageFont

import findings
from vitlab import files

WIDTH, HEIGHT = 13.333, 7.5  # inches of a slide
PADDING = 0.2  # inches beside the text of a cell, both sides together

# -- PowerPoint


@functools.cache
def _font():
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 100)


@functools.cache
def _length(text):
    """Return the length of a text in DejaVu Sans of size 1."""
    return _font().getlength(text) / 100


def _width(text, size, bold=False):
    """Return how many inches a line takes at most.

    text: one line. size: points of Arial. It is measured in DejaVu Sans, which matplotlib brings.
    """
    # Words in Arial are 0.88 as wide as in DejaVu Sans, bold ones 0.95; a little is left as a margin.
    narrower = 1 if bold else 0.92
    return narrower * _length(text) * size / 72


def lines_of(text, size, width, bold=False):
    """Return how many lines a text takes, broken at spaces; inf where a word is wider than the box.

    size: points. width: inches of the box.
    """
    count = 1
    used = 0.0
    for word in text.split(" "):
        if _width(word, size, bold) > width:
            return math.inf
        if used + _width(word, size, bold) > width:
            count += 1
            used = 0.0
        used += _width(word + " ", size, bold)
    return count


def _height(lines, size):
    """Return the inches that so many lines of a size in points need."""
    return 1.2 * size / 72 * lines


def _fit_text(text, sizes, width, height, bold=False):
    """Return the largest of some sizes (points) at which a text fits a box (inches), else the smallest."""
    for size in sizes:
        if _height(lines_of(text, size, width, bold), size) <= height:
            return size
    return sizes[-1]


def _column_width(name, cells, size):
    """Return the inches of a column whose header, which is bold, mostly breaks into two lines."""
    header = _width(name, size, True)
    longest_word = max(_width(word, size, True) for word in name.split(" "))
    least = _width("0" * 7, size)
    broken = max(longest_word, min(header, max(header / 2, least)))
    return max(broken, *(_width(cell, size) for cell in cells)) + PADDING


def _fit_at(table, size, room, wrap):
    """Return (widths, heights) in inches of a table's columns and lines at one size, in points.

    room: inches that there are. wrap: whether the widest column gives way where there are too few.
    """
    widths = [_column_width(name, table[name], size) for name in table]
    if wrap:
        widest = widths.index(max(widths))
        widths[widest] -= max(0, sum(widths) - room)
    heights = []
    for number, line in enumerate([[*table.columns], *table.itertuples(index=False)]):
        counts = []
        for cell, width in zip(line, widths, strict=True):
            counts.append(lines_of(cell, size, width - PADDING + 1e-6, bold=number == 0))
        heights.append(_height(max(counts), size) + 0.1)
    return widths, heights


def _fit_table(table, largest, rooms, height):
    """Return (size in points, widths of columns, heights of lines in inches), as large as fits, or None.

    largest: size to begin with. rooms: widths to try, inches. height: inches that there are.
    Cells are broken only where none of the six largest sizes fits without. Below 8 points there is no fit.
    """
    tries = [(size, rooms[0], False) for size in range(largest, largest - 6, -1)]
    tries.append((largest - 5, rooms[-1], False))
    tries += [(size, rooms[-1], True) for size in range(largest - 5, 7, -1)]
    for size, room, wrap in tries:
        widths, heights = _fit_at(table, size, room, wrap)
        if sum(widths) <= room + 1e-6 and sum(heights) <= height:
            return size, widths, heights
    return None


def _ratio(picture):
    """Return width over height of a picture file."""
    with Image.open(picture) as image:
        return image.width / image.height


def arrange(slide, top, height):
    """Return (left, top) of a slide's table, what `_fit_table` says of it, and (width, height) of the picture.

    All is in inches, between top and top + height. Picture and table stand side by side, or the table below where
    the picture is larger then.
    Raises ValueError for a table that fits neither way.
    """
    choices = []
    if slide.picture is None:
        if fit := _fit_table(slide.table, 22, [12.33], height):
            size, widths, heights = fit
            stretch = min(1.5, 12.33 / sum(widths))
            fit = (size, [width * stretch for width in widths], heights)
            choices.append(((0.5, top), fit, (0, 0)))
    else:
        ratio = _ratio(slide.picture)
        spare = 11.93 - ratio * (height - 0.35)  # what a narrow picture leaves to the table
        if fit := _fit_table(slide.table, 16, [max(5, spare), max(6, spare)], height):
            beside = sum(fit[1])
            wide = min(11.93 - beside, ratio * (height - 0.35))
            choices.append(((12.83 - beside, top), fit, (wide, wide / ratio)))
        if fit := _fit_table(slide.table, 13, [12.33], height - 1):
            wide = min(12.33, ratio * (height - 0.5 - sum(fit[2])))
            choices.append(((0.5, top + wide / ratio + 0.45), fit, (wide, wide / ratio)))
    if not choices:
        raise ValueError(f"a table is too large for its slide: {slide.title}")
    return max(choices, key=lambda choice: choice[2][0])


def _is_number(cells):
    """Return whether all cells of a column are numbers, which stand at the right."""
    return all(re.fullmatch(r"[+−]?[\d.,]*(\u00a0%)?", cell) for cell in cells)


def to_pptx(slides, *, title, date):
    """Return the bytes of a .pptx of 13.33 x 7.5 inches.

    slides: list of Slide. Tables are native, pictures the png as it is, in full resolution.
    title, date ("2026-11-24"): properties of the file.
    Raises ModuleNotFoundError without python-pptx.
    """
    import pptx
    from pptx.util import Inches

    deck = pptx.Presentation()
    _widen(deck)
    deck.slide_width, deck.slide_height = Inches(WIDTH), Inches(HEIGHT)
    properties = deck.core_properties
    properties.title = title
    properties.author = properties.last_modified_by = "vitlab"
    properties.created = properties.modified = pd.Timestamp(date).to_pydatetime()
    layout = deck.slide_layouts[5]  # a title alone
    number = _slide_number(layout)
    for content in slides:
        slide = deck.slides.add_slide(layout)
        slide.shapes._spTree.append(
            copy.deepcopy(number._element)
        )  # python-pptx leaves it in the layout
        _fill(slide, content)
    return _same_bytes(deck)


def _widen(deck):
    """Stretch the layouts of the template, which are 4:3, to 16:9."""
    for layout in [
        *deck.slide_layouts,
        deck.slide_master,
    ]:  # the master last, as the others inherit from it
        for shape in layout.placeholders:
            place = shape.left * 4 // 3, shape.top, shape.width * 4 // 3, shape.height
            shape.left, shape.top, shape.width, shape.height = place


def _slide_number(layout):
    """Return a layout's shape for the number of the slide, moved to the corner."""
    from pptx.enum.shapes import PP_PLACEHOLDER
    from pptx.util import Inches

    for shape in layout.placeholders:
        if shape.placeholder_format.type == PP_PLACEHOLDER.SLIDE_NUMBER:
            shape.left, shape.top, shape.width, shape.height = map(Inches, (12.2, 6.8, 0.63, 0.25))
            return shape


def _fill(slide, content):
    """Put title, table, picture, note and source on an empty slide."""
    from pptx.util import Inches

    _write(slide.shapes.title, content.title, (0.5, 0.3, 12.33, 1.05), range(28, 17, -1), bold=True)
    top = 1.5
    height = 4.7 if content.note else 5.2
    place, fit, (wide, high) = arrange(content, top, height)
    _write_table(slide, content.table, place, *fit)
    if content.picture:
        drawn = slide.shapes.add_picture(str(content.picture), *map(Inches, (0.5, top, wide, high)))
        drawn._element.nvPicPr.cNvPr.set("descr", content.shows)
        _write(
            _box(slide),
            content.shows,
            (0.5, top + high + 0.05, wide, 0.3),
            range(11, 6, -1),
            grey=True,
        )
    if content.note:
        _write(_box(slide), content.note, (0.5, 6.3, 12.33, 0.45), range(12, 6, -1))
    _write(_box(slide), content.source, (0.5, 6.85, 11.6, 0.4), range(10, 5, -1), grey=True)


def _same_bytes(deck):
    """Return a deck's bytes without the time at which they were made."""
    made = io.BytesIO()
    same = io.BytesIO()
    deck.save(made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(same, "w") as new:
        for name in old.namelist():
            # A ZipInfo is dated 1980, whenever it is made.
            new.writestr(zipfile.ZipInfo(name), old.read(name), zipfile.ZIP_DEFLATED)
    return same.getvalue()


def _box(slide):
    return slide.shapes.add_textbox(0, 0, 0, 0)


def _write(shape, text, place, sizes, *, bold=False, grey=False):
    """Write a text into a shape at (left, top, width, height) in inches, as large as fits."""
    from pptx.enum.text import MSO_ANCHOR, MSO_AUTO_SIZE
    from pptx.util import Inches

    shape.left, shape.top, shape.width, shape.height = map(Inches, place)
    frame = shape.text_frame
    frame.margin_left = frame.margin_right = frame.margin_top = frame.margin_bottom = 0
    frame.word_wrap = True
    frame.auto_size = MSO_AUTO_SIZE.NONE
    frame.vertical_anchor = MSO_ANCHOR.MIDDLE if bold else MSO_ANCHOR.TOP
    size = _fit_text(text, sizes, *place[2:], bold=bold)
    _add_paragraph(frame, text, size, color="666666" if grey else "1A1A1A", bold=bold)


def _add_paragraph(frame, text, size, *, color, bold=False, right=False):
    """Write one paragraph as all of the text of a frame. size: points."""
    from pptx.dml.color import RGBColor
    from pptx.enum.text import PP_ALIGN
    from pptx.util import Pt

    paragraph = frame.paragraphs[0]
    paragraph.alignment = PP_ALIGN.RIGHT if right else PP_ALIGN.LEFT
    run = paragraph.add_run()
    run.text = text or "\u00a0"  # an empty cell would be as high as the template's text
    run.font.name = "Arial"
    run.font.size = Pt(size)
    run.font.bold = bold
    run.font.color.rgb = RGBColor.from_string(color)


def _write_table(slide, table, place, size, widths, heights):
    """Add a native table at (left, top): numbers at the right, the header dark, every second line tinted."""
    from pptx.util import Inches

    sides = map(Inches, (*place, sum(widths), sum(heights)))
    grid = slide.shapes.add_table(len(heights), len(widths), *sides).table
    for line, height in zip(grid.rows, heights, strict=True):
        line.height = Inches(height)
    for column, (name, width) in enumerate(zip(table, widths, strict=True)):
        grid.columns[column].width = Inches(width)
        right = _is_number(table[name])
        for line, text in enumerate([name, *table[name]]):
            _write_cell(grid.cell(line, column), text, size, line, right)


def _write_cell(cell, text, size, line, right):
    """Write and colour one cell. line: its number from 0, the header."""
    from pptx.dml.color import RGBColor
    from pptx.enum.text import MSO_ANCHOR
    from pptx.util import Inches

    is_header = line == 0
    tint = "404040" if is_header else ["F2F2F2", "FFFFFF"][line % 2]
    cell.margin_left = cell.margin_right = Inches(0.08)
    cell.margin_top = cell.margin_bottom = Inches(0.04)
    cell.vertical_anchor = MSO_ANCHOR.MIDDLE
    cell.fill.solid()
    cell.fill.fore_color.rgb = RGBColor.from_string(tint)
    color = "FFFFFF" if is_header else "1A1A1A"
    _add_paragraph(cell.text_frame, text, size, color=color, bold=is_header, right=right)


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


def to_html(slides, *, title):
    """Return one HTML page that asks no server for anything.

    slides: list of Slide. Pictures are within the page, the svg where it is the smaller file.
    title: of the window. Arrow keys go from slide to slide; printed, each is a page.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
    ]
    for number, slide in enumerate(slides, 1):
        parts += _section(slide, number, len(slides))
    return "\n".join([*parts, f"<script>{SCRIPT}</script>\n</body>\n</html>\n"])


def _section(slide, number, count):
    """Return one slide as lines of HTML."""
    layout = " alone"
    figure = ""
    if slide.picture:
        layout = "" if _ratio(slide.picture) < 2.5 else " tall"
        figure = (
            f"<figure>{_image(slide)}<figcaption>{html.escape(slide.shows)}</figcaption></figure>"
        )
    return [
        f'<section id="slide-{number}">\n<h2>{html.escape(slide.title)}</h2>',
        f'<div class="body{layout}">{figure}',
        f'<div class="table">{_html_table(slide.table)}</div>\n</div>',
        f"<p>{html.escape(slide.note)}</p>" if slide.note else "",
        f"<footer>{html.escape(slide.source)} {number} / {count}</footer>\n</section>",
    ]


def _image(slide):
    """Return the picture of a slide as an img with its data within."""
    svg = slide.picture.with_suffix(".svg")
    kind, path = "png", slide.picture
    if svg.is_file() and svg.stat().st_size < path.stat().st_size:
        kind, path = "svg+xml", svg
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(slide.shows)}" src="data:image/{kind};base64,{data}">'


def _html_table(table):
    """Return a table as HTML, numbers at the right."""
    sides = [' class="number"' if _is_number(table[name]) else "" for name in table]
    header = _html_line(table, "th", sides)
    body = "\n".join(_html_line(line, "td", sides) for line in table.itertuples(index=False))
    return f"<table>\n<thead>{header}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _html_line(cells, tag, sides):
    """Return one line of a table. sides: the class of each column."""
    marked = [
        f"<{tag}{side}>{html.escape(cell)}</{tag}>" for cell, side in zip(cells, sides, strict=True)
    ]
    return f"<tr>{''.join(marked)}</tr>"


def write(folder, out=None):
    """Write slides.html and slides.pptx of a folder of tables and pictures, and return both paths.

    out: the folder to write to (default: `slides` in the folder).
    Raises FileNotFoundError for a folder without results.csv, and ModuleNotFoundError without python-pptx, then with
    slides.html written.
    """
    slides = findings.slides(folder)
    out = Path(out or Path(folder) / "slides")
    title = slides[0].title
    dates = re.findall(r"\d{4}-\d\d-\d\d", slides[0].source)
    date = dates[0] if dates else "2000-01-01"
    files.write_atomic(out / "slides.html", to_html(slides, title=title))
    files.write_atomic(out / "slides.pptx", to_pptx(slides, title=title, date=date))
    files.log(f"{len(slides)} slides: {out / 'slides.pptx'}, {out / 'slides.html'}")
    return out / "slides.pptx", out / "slides.html"
