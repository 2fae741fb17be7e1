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
from PIL import ImageFont

import findings
from vitlab import files

WIDTH, HEIGHT = 13.333, 7.5  # inches of a slide
PADDING = 0.2  # inches beside the text of a cell, both sides together
MARGIN = 0.35  # inches at the left and right of a slide
GAP = 0.1  # inches between two pictures
TOP = 1.2  # inches above the body, for the title
BODY = 5.3  # inches of the body: pictures, points or a table
LEAST = 14  # points of a table's text
CAPTION = 12  # points of a caption and a source
TERMS = (14, 13, 12)  # points of the line that says what words mean

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


def _fit_table(table, largest, width, height):
    """Return (size in points, widths of columns, heights of lines in inches), as large as fits.

    largest: size to begin with. width, height: inches that there are. Below LEAST points there is no fit: None.
    """
    for size in range(largest, LEAST - 1, -1):
        widths = [_column_width(name, table[name], size) for name in table]
        # The widest column gives way where there are too few inches.
        widest = widths.index(max(widths))
        widths[widest] -= max(0, sum(widths) - width)
        heights = []
        for number, line in enumerate([[*table.columns], *table.itertuples(index=False)]):
            counts = []
            for cell, room in zip(line, widths, strict=True):
                counts.append(lines_of(cell, size, room - PADDING + 1e-6, bold=number == 0))
            heights.append(_height(max(counts), size) + 0.1)
        if sum(heights) <= height:
            return size, widths, heights
    return None


def arrange(pictures, width, height):
    """Return (left, top, width, height) in inches of pictures beside each other, as large as fits.

    pictures: paths. width, height: inches that there are.
    """
    room = (width - GAP * (len(pictures) - 1)) / len(pictures)
    places = []
    for number, path in enumerate(pictures):
        wide, high = findings.inches(path)
        scale = min(room / wide, height / high)
        left = number * (room + GAP) + (room - scale * wide) / 2
        places.append((left, 0.0, scale * wide, scale * high))
    return places


def _is_number(cells):
    """Return whether all cells of a column are numbers, which stand at the right."""
    return all(re.fullmatch(r"[+−]?[\d.,]*(\u00a0%)?", cell) for cell in cells)


def to_pptx(slides, *, title, date, template=None):
    """Return the bytes of a .pptx.

    slides: list of Slide. Tables are native, pictures the png as it is, in full resolution; the speaker's notes hold
        table, note and source.
    title, date ("2026-11-24"): properties of the file.
    template: path of a .pptx or .potx, whose master, size and layout with a title alone are taken (None: 13.33 x 7.5
        inches, plain).
    Raises ModuleNotFoundError without python-pptx.
    """
    import pptx
    from pptx.util import Inches

    deck = pptx.Presentation(_as_presentation(template) if template else None)
    if template:
        _empty(deck)
    else:
        _widen(deck)
        deck.slide_width, deck.slide_height = Inches(WIDTH), Inches(HEIGHT)
    properties = deck.core_properties
    properties.title = title
    properties.author = properties.last_modified_by = "vitlab"
    properties.created = properties.modified = pd.Timestamp(date).to_pydatetime()
    layout = _title_layout(deck)
    number = _slide_number(layout)
    for content in slides:
        slide = deck.slides.add_slide(layout)
        if number is not None:  # python-pptx leaves it in the layout
            slide.shapes._spTree.append(copy.deepcopy(number._element))
        sides = deck.slide_width.inches, deck.slide_height.inches
        _fill(slide, content, *sides, opening=content is slides[0] and bool(content.points))
        slide.notes_slide.notes_text_frame.text = notes(content)
    return _same_bytes(deck)


def _as_presentation(template):
    """Return a template file as one that python-pptx opens: a .potx says so in its list of types."""
    made = io.BytesIO()
    with zipfile.ZipFile(template) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "[Content_Types].xml":
                data = data.replace(
                    b"presentationml.template.main", b"presentationml.presentation.main"
                )
            new.writestr(name, data)
    made.seek(0)
    return made


def _empty(deck):
    """Take the slides that a template has out of it."""
    ids = deck.slides._sldIdLst
    for one in list(ids):
        deck.part.drop_rel(one.rId)
        ids.remove(one)


def _title_layout(deck):
    """Return the layout with a title and fewest other places to fill."""
    from pptx.enum.shapes import PP_PLACEHOLDER

    small = (PP_PLACEHOLDER.DATE, PP_PLACEHOLDER.FOOTER, PP_PLACEHOLDER.SLIDE_NUMBER)

    def others(layout):
        kinds = [shape.placeholder_format.type for shape in layout.placeholders]
        return PP_PLACEHOLDER.TITLE not in kinds, len([kind for kind in kinds if kind not in small])

    return min(deck.slide_layouts, key=others)


def notes(content):
    """Return the speaker's notes of a slide as text: what to say, words, what is shown, table and source."""
    table = "" if content.table is None else content.table.to_string(index=False)
    parts = [content.note, content.terms, content.shows, table, content.source]
    return "\n\n".join(filter(None, parts))


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
            shape.left, shape.top, shape.width, shape.height = map(Inches, (12.3, 6.95, 0.68, 0.3))
            return shape


def _fill(slide, content, width, height, *, opening=False):
    """Put title, body and caption on an empty slide of a size in inches.

    The body is pictures at full width, else points, else a table. opening: whether the title is large.
    Raises ValueError for a table that does not fit.
    """
    from pptx.util import Inches

    wide = width - 2 * MARGIN
    body = height - HEIGHT + BODY
    above = 0.45 * body if opening else 0  # inches more than above other slides
    title = (MARGIN, 0.15 + above / 3, wide, 0.95 + above / 2)
    sizes = range(44, 27, -1) if opening else range(28, 17, -1)
    _write(slide.shapes.title, content.title, title, sizes, bold=True)
    if content.pictures:
        has_names = len(content.pictures) > 1
        top = TOP + (0.3 if has_names else 0)
        room = body - (top - TOP)
        places = arrange(content.pictures.values(), wide, room)
        lower = (room - max(place[3] for place in places)) / 2  # in the middle
        for (name, path), (left, _, *size) in zip(content.pictures.items(), places, strict=True):
            if has_names:
                _write(
                    _box(slide),
                    name,
                    (MARGIN + left, TOP + lower, size[0], 0.28),
                    [14],
                    center=True,
                )
            drawn = slide.shapes.add_picture(
                str(path), *map(Inches, (MARGIN + left, top + lower, *size))
            )
            drawn._element.nvPicPr.cNvPr.set("descr", f"{name} {content.shows}".strip())
    elif content.points:
        place = (MARGIN + 0.3, TOP + 0.1 + above, wide - 0.6, body - above - 0.1)
        _write_points(slide, content.points, place)
    elif content.table is not None:
        fit = _fit_table(content.table, 22, wide, body)
        if fit is None:
            raise ValueError(f"a table is too large for its slide: {content.title}")
        _write_table(slide, content.table, (MARGIN, TOP), *fit)
    if content.terms:
        _write(_box(slide), content.terms, (MARGIN, height - 0.98, wide, 0.25), TERMS)
    caption = f"{content.shows} {_short(content.source)}".strip()
    place = (MARGIN, height - 0.68, wide - 0.8, 0.5)
    _write(_box(slide), _shortened(caption, place[2]), place, [CAPTION], grey=True)


def _short(source):
    """Return study and seeds of a source as one says them; files, machines and commits stand in the notes."""
    _, _, rest = source.partition(". ")
    rest = re.sub(r" \((some )?cuts: [^)]*\)", ", or fewer", rest)
    return rest.partition(";")[0].rstrip(".") + "."


def _shortened(text, width):
    """Return as much of a text as two lines of a caption hold; the whole stands in the notes."""
    words = text.split(" ")
    if lines_of(text, CAPTION, width) <= 2:
        return text
    while lines_of(" ".join(words) + " …", CAPTION, width) > 2:
        words.pop()
    return " ".join(words) + " …"


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


def _write(shape, text, place, sizes, *, bold=False, grey=False, center=False):
    """Write a text into a shape at (left, top, width, height) in inches, as large as fits."""
    from pptx.enum.text import MSO_ANCHOR

    frame = _empty_frame(shape, place)
    frame.vertical_anchor = MSO_ANCHOR.MIDDLE if bold else MSO_ANCHOR.TOP
    size = _fit_text(text, sizes, *place[2:], bold=bold)
    side = "CENTER" if center else "LEFT"
    _add_paragraph(frame, text, size, color="595959" if grey else "1A1A1A", bold=bold, side=side)


def _write_points(slide, points, place):
    """Write points below each other, all as large as fits at (left, top, width, height) in inches."""
    from pptx.util import Inches

    _, _, width, height = place
    for size in range(24, 11, -1):
        lines = sum(lines_of(point, size, width) for point in points)
        gap = min(0.3, max(0, height - _height(lines, size)) / len(points))
        if gap >= 0.1:
            break
    frame = _empty_frame(_box(slide), place)
    for point in points:
        _add_paragraph(frame, point, size, color="1A1A1A").space_after = Inches(gap)


def _empty_frame(shape, place):
    """Return the text frame of a shape that is put at (left, top, width, height) in inches."""
    from pptx.enum.text import MSO_AUTO_SIZE
    from pptx.util import Inches

    shape.left, shape.top, shape.width, shape.height = map(Inches, place)
    frame = shape.text_frame
    frame.margin_left = frame.margin_right = frame.margin_top = frame.margin_bottom = 0
    frame.word_wrap = True
    frame.auto_size = MSO_AUTO_SIZE.NONE
    return frame


def _add_paragraph(frame, text, size, *, color, bold=False, side="LEFT"):
    """Add a paragraph to the text of a frame, and return it. size: points. side: LEFT, CENTER or RIGHT."""
    from pptx.dml.color import RGBColor
    from pptx.enum.text import PP_ALIGN
    from pptx.util import Pt

    paragraph = frame.add_paragraph() if frame.text else frame.paragraphs[0]
    paragraph.alignment = PP_ALIGN[side]
    run = paragraph.add_run()
    text = text or "\u00a0"  # an empty cell would be as high as the template's text
    run.text = _unbroken(text)
    run.font.name = "Arial"
    run.font.size = Pt(size)
    run.font.bold = bold
    run.font.color.rgb = RGBColor.from_string(color)
    return paragraph


def _unbroken(text):
    """Return a text with a hyphen in top-1 that no line ends at."""
    return text.replace("top-1", "top\u20111")


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
    side = "RIGHT" if right else "LEFT"
    _add_paragraph(cell.text_frame, text, size, color=color, bold=is_header, side=side)


# -- HTML

STYLE = """
html { scroll-snap-type: y proximity; font: 16px/1.35 Arial, Helvetica, sans-serif; color: #1a1a1a; }
body { margin: 0; }
section { box-sizing: border-box; min-height: 100vh; padding: 3vh 4vw 2vh; scroll-snap-align: start;
  display: flex; flex-direction: column; gap: 1.5vh; border-bottom: 1px solid #ddd; }
h2 { margin: 0; font-size: clamp(1.2rem, 2.4vw, 2.8rem); line-height: 1.2; }
.opening h2 { margin-top: 18vh; font-size: clamp(1.6rem, 3.4vw, 4rem); }
.body { flex: 1; display: flex; gap: 1vw; justify-content: center; align-items: center; }
figure { margin: 0; flex: 1 1 0; min-width: 0; text-align: center; }
figure b { font-size: clamp(1rem, 1.2vw, 1.5rem); }
img { display: block; width: 100%; height: auto; max-height: 70vh; object-fit: contain; }
ul { font-size: clamp(1.1rem, 1.9vw, 2.2rem); line-height: 1.35; margin: 0; align-self: flex-start; flex: 1; }
li { margin-bottom: 0.6em; }
.terms { margin: 0; font-size: clamp(1rem, 1.25vw, 1.5rem); }
footer span { float: right; }
footer { color: #595959; font-size: clamp(1rem, 1.1vw, 1.2rem); }
details { font-size: clamp(0.9rem, 1vw, 1.1rem); }
.table { max-width: 100%; overflow-x: auto; flex: 1; }
table { border-collapse: collapse; font-size: clamp(0.95rem, 1.4vw, 1.6rem); }
th, td { padding: 0.35em 0.6em; text-align: left; vertical-align: middle; }
th { background: #404040; color: #fff; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number, td:first-child { white-space: nowrap; }
tr:nth-child(even) td { background: #f2f2f2; }
@media screen and (max-width: 60rem) { section { min-height: 0; padding: 1rem; } .body { flex-direction: column; }
  figure { flex: none; width: 100%; } html { scroll-snap-type: none; } }
@media print { @page { size: 13.33in 7.5in; margin: 0; } html { font-size: 16px; }
  section { height: 7.5in; min-height: 0; break-after: page; break-inside: avoid; border: 0;
    padding: 0.4in 0.5in 0.2in; }
  img { max-height: 5in; } details { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
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
    """Return one slide as lines of HTML: pictures, else points, else the table, which otherwise folds away."""
    table = "" if slide.table is None else f'<div class="table">{_html_table(slide.table)}</div>'
    if slide.pictures:
        body = "".join(_figure(name, path, slide.shows) for name, path in slide.pictures.items())
    elif slide.points:
        points = (f"<li>{html.escape(_unbroken(point))}</li>" for point in slide.points)
        body = f"<ul>{''.join(points)}</ul>"
    else:
        body, table = table, ""
    words = html.escape(f"{slide.note} {slide.source}".strip())
    terms = f'<p class="terms">{html.escape(slide.terms)}</p>\n' if slide.terms else ""
    caption = f"{slide.shows} {_short(slide.source)}".strip()
    opening = ' class="opening"' if number == 1 and slide.points else ""
    return [
        f'<section id="slide-{number}"{opening}>\n<h2>{html.escape(_unbroken(slide.title))}</h2>',
        f'<div class="body">{body}</div>',
        f"{terms}<footer><span>{number} / {count}</span>{html.escape(caption)}</footer>",
        f"<details><summary>Notes</summary>{table}{words}</details>\n</section>",
    ]


def _figure(name, path, shows):
    """Return a picture with its name above, its data within."""
    svg = path.with_suffix(".svg")
    kind = "png"
    if svg.is_file() and svg.stat().st_size < path.stat().st_size:
        kind, path = "svg+xml", svg
    data = base64.b64encode(path.read_bytes()).decode()
    above = f"<b>{html.escape(name)}</b>" if name else ""
    words = html.escape(f"{name} {shows}".strip())
    return f'<figure>{above}<img alt="{words}" src="data:image/{kind};base64,{data}"></figure>'


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


def write(folder, out=None, *, long=False, only=None, template=None):
    """Write slides.html and slides.pptx of a folder of tables and pictures, and return both paths.

    out: the folder to write to (default: `slides` in the folder).
    long: whether the appendix follows. only: the numbers of the slides to write, from 1 (None: all).
    template: path of a .pptx or .potx for the .pptx.
    Raises FileNotFoundError for a folder without results.csv, ValueError for a number that no slide has, and
    ModuleNotFoundError without python-pptx, then with slides.html written.
    """
    slides = findings.slides(folder, long=long)
    title = slides[0].title
    dates = re.findall(r"\d{4}-\d\d-\d\d", slides[0].source)
    if only:
        if not all(1 <= number <= len(slides) for number in only):
            raise ValueError(f"there are slides 1 to {len(slides)}, got {only}")
        slides = [slides[number - 1] for number in only]
    out = Path(out or Path(folder) / "slides")
    files.write_atomic(out / "slides.html", to_html(slides, title=title))
    made = to_pptx(slides, title=title, date=dates[0] if dates else "2000-01-01", template=template)
    files.write_atomic(out / "slides.pptx", made)
    files.log(f"{len(slides)} slides: {out / 'slides.pptx'}, {out / 'slides.html'}")
    return out / "slides.pptx", out / "slides.html"
