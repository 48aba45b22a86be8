"""What a compiled program moves between devices."""

from transformer.devices.collectives import Moved, collectives

TEXT = """
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = bf16[8,4]{1,0} all-gather(%part), dimensions={0}
  ROOT %both = (f32[2,2]{1,0}, f32[3]{0}) all-reduce(%a, %b), to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %started = (f32[2]{0}, f32[16]{0}) all-gather-start(%q), dimensions={0}
  %done = f32[16]{0} all-gather-done(%started)
  ROOT %last = f32[8] copy(%p)
}
"""


def test_loops_count_as_often_as_they_run():
    assert collectives(TEXT) == {
        "all-gather": Moved(count=4, bytes=3 * 8 * 4 * 2 + 16 * 4, largest=32),
        "all-reduce": Moved(count=3, bytes=3 * (4 + 3) * 4, largest=4),
    }
