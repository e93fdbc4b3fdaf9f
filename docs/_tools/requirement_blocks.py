"""A Markdown extension for the spec: requirement blocks as boxes, requirement ids as links.

    ### Exhaustion {#ITER-004}
    ::: req ITER-004 | MUST | profile: iter | needs: ITER-001
    After an iterator has raised StopIteration, every later next() on it MUST raise StopIteration.
    :::

The heading above a block is its anchor. An id anywhere else on the site, docstrings included, links
there. An id that the spec does not have becomes a dead link, which fails a strict build.
"""

import re
from xml.etree import ElementTree

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor

ID = r"[A-Z]{2,8}-\d{3}"
OPENING = re.compile(rf"^::: req (?P<id>{ID}) \| (?P<level>[A-Z ]+?) *(?P<fields>\|.*)?$")


class RequirementBlocks(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        out: list[str] = []
        inside = False
        for line in lines:
            if opening := OPENING.match(line):
                inside = True
                level = opening["level"]
                fields = [field.strip() for field in (opening["fields"] or "").split("|")]
                marks = [f"**{level}**", *filter(None, fields)]
                out += [
                    "",
                    f'<div class="requirement {level.lower().replace(" ", "-")}" markdown="block">',
                    "",
                    f"{opening['id']} {' · '.join(marks)}",
                    "{ .requirement-marks }",
                    "",
                ]
            elif inside and line.strip() == ":::":
                inside = False
                out += ["", "</div>", ""]
            else:
                out.append(line)
        return out


class RequirementLinks(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str):
        del data
        link = ElementTree.Element("autoref", identifier=m[0])
        link.text = m[0]
        return link, m.start(0), m.end(0)


class RequirementExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        # After fenced code has been taken out (25), before HTML blocks are (20).
        md.preprocessors.register(RequirementBlocks(md), "requirement-blocks", 22)
        # After code spans (190) and links (160): an id inside those stays as it is.
        pattern = rf"(?<![\w#/-]){ID}(?![\w-])"
        md.inlinePatterns.register(RequirementLinks(pattern, md), "requirement-links", 100)
