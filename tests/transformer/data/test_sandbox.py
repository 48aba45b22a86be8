"""Templates that ask for years or for all memory end in an error, at once."""

import resource

import jinja2
import pytest

from transformer.data.sandbox import Sandbox, limits

LOOPS = (
    "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = i %}{% endfor %}{% endfor %}"
)
DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = X %}{% endfor %}"


def run(template):
    with limits():
        return Sandbox().from_string(template).render()


@pytest.mark.parametrize(
    "template, message",
    [
        (LOOPS, "it takes longer than 1 s"),
        (DOUBLED.replace("X", "ns.x + ns.x"), "it makes too many characters"),
        (DOUBLED.replace("X", "ns.x ~ ns.x"), "it makes too many characters"),
        ("{{ 'x'|center(10**9) }}", "of large values is not allowed"),
        ("{{ 'x'|center(1000000000) }}", "such large numbers"),
        ("{{ 'x'.zfill(1000000000) }}", "such large numbers"),
        ("{{ range(99999)|map('center', 1000000)|list }}", "it makes too many characters"),
        ("{{ '%1000000000d'|format(1) }}", "such long texts"),
        ("{{ '%1000000000d' % 1 }}", "such long texts"),
        ("{{ '{:>1000000000}'.format(1) }}", "such long texts"),
        ("{{ ('x'|center(99999)).replace(' ', 'y'|center(99999)) }}", "such long texts"),
        ("{{ [1]|tojson(indent=1000000000) }}", "such large numbers"),
        ("{{ lipsum(n=1000000) }}", "'lipsum' is undefined"),
        ("{{ 'x'|wordwrap(1) }}", "No filter named 'wordwrap'"),
    ],
)
def test_a_template_has_little_time_and_memory(template, message):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(jinja2.TemplateError, match=message):
        run(template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000  # KiB


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{{ ['a', 'b']|join(', ') }}", "a, b"),
        ("{{ 'x = %s' % 5 }} {{ '%d'|format(7) }} {{ '{}'.format('y') }}", "x = 5 7 y"),
        ("{{ 'a b'.split(' ')[-1] + 'c' }}", "bc"),
        ("{{ {'a': 1}|tojson }}", '{"a": 1}'),
    ],
)
def test_what_templates_do_is_left_alone(template, text):
    assert run(template) == text
