"""What the site makes of a requirement, and of a script."""

import textwrap

import markdown
import pytest
from requirement_blocks import RequirementExtension
from script_pages import page_of, results_of

pytestmark = pytest.mark.internal

BLOCK = """\
::: req ITER-004 | MUST NOT | profile: iter | needs: ITER-001
An iterator that has ended MUST NOT begin again, see STEP-002 and `STEP-003`.
:::
"""


def html_of(text: str) -> str:
    return markdown.markdown(
        text, extensions=["attr_list", "md_in_html", "pymdownx.superfences", RequirementExtension()]
    )


def test_a_requirement_block_is_a_box_with_its_level_and_needs():
    html = html_of(BLOCK + "\nAfter it.")
    box, _, after = html.partition("</div>")
    assert box.startswith('<div class="requirement must-not">')
    assert "<strong>MUST NOT</strong> · profile: iter · needs: " in box
    assert "<p>An iterator that has ended MUST NOT begin again" in box
    assert after.strip() == "<p>After it.</p>"


def test_an_id_is_a_link_but_not_in_code():
    html = html_of(BLOCK)
    linked = [
        id for id in ("ITER-004", "ITER-001", "STEP-002", "STEP-003") if f">{id}</auto" in html
    ]
    assert linked == ["ITER-004", "ITER-001", "STEP-002"]
    assert "<code>STEP-003</code>" in html


def test_a_block_in_a_fence_is_left_alone():
    html = html_of(f"```markdown\n{BLOCK}```")
    assert "::: req ITER-004 | MUST NOT" in html
    assert "requirement" not in html


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "docs" / "script.py"
    path.parent.mkdir()
    path.write_text(
        textwrap.dedent("""\
            # %% [markdown]
            # # A title
            #
            # Prose.

            # %%
            import subprocess
            print("first", __name__)
            subprocess.run(["echo", "second"])

            # %%
            class Shown:
                def _repr_html_(self):
                    return "<b>shown</b>"

            Shown()
            """)
    )
    return path


def test_a_page_shows_prose_code_and_what_the_code_printed(script):
    page = page_of(script, script.parents[1])
    assert page.startswith("# A title\n\nProse.\n\n```python\nimport subprocess")
    assert "```{ .text .printed }\nfirst __main__\nsecond\n```" in page
    assert '<div class="shown"><b>shown</b></div>' in page


def test_a_script_that_fails_fails_the_page(script):
    script.write_text("# %%\nraise RuntimeError('no')\n")
    with pytest.raises(RuntimeError, match="no"):
        list(results_of(script))
