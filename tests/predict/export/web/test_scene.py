"""Objects of the page and undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Node = Callable[[str], Any]

BEGIN = """
    const all = new scene.Scene();
    const add = (change) => all.setPrompts(all.promptsWith(change), { area: 1 });
    const seen = () => [all.state.current, all.objects.map(({ id, points, box }) => [id, points.length, box])];
"""


def test_prompts_go_to_the_current_object_until_a_new_one_is_begun(node: Node) -> None:
    found = node(f"""{BEGIN}
        add({{ point: [1, 2, 1] }});
        add({{ point: [3, 4, 0] }});
        add({{ box: [0, 0, 5, 5] }});
        all.finish();
        add({{ box: [1, 1, 2, 2] }});
        result = [seen(), all.objects.map(({{ colour }}) => colour.join())];
    """)
    objects, colours = found
    assert objects == [2, [[1, 2, [0, 0, 5, 5]], [2, 0, [1, 1, 2, 2]]]]
    assert len(set(colours)) == 2


def test_undo_goes_back_through_every_action(node: Node) -> None:
    found = node(f"""{BEGIN}
        const states = [seen()];
        const act = (action) => {{ action(); states.push(seen()); }};
        act(() => add({{ point: [1, 2, 1] }}));
        act(() => add({{ point: [3, 4, 0] }}));
        act(() => all.finish());
        act(() => add({{ point: [9, 9, 1] }}));
        act(() => all.select(1));
        act(() => all.remove(1));
        const back = [seen()];
        while (all.canUndo) {{ all.undo(); back.unshift(seen()); }}
        all.undo();
        result = [states, back, seen()];
    """)
    states, back, end = found
    assert states == back
    assert states[-1] == [None, [[2, 1, None]]]
    assert end == [None, []]


def test_hiding_is_no_action_and_a_deleted_objects_number_is_not_used_again(node: Node) -> None:
    found = node(f"""{BEGIN}
        add({{ point: [1, 2, 1] }});
        all.toggle(1);
        const hidden = all.objects[0].hidden;
        all.remove(1);
        add({{ point: [1, 2, 1] }});
        result = [hidden, seen()];
    """)
    assert found == [True, [2, [[2, 1, None]]]]
