"""A line of results of ``bench.federation`` to change one thing of."""

from __future__ import annotations

from bench.federation.lines import Key, Line, RoundLine

KEY = Key("banking77", 0.5, 0, "lora-r8", "", "", False)


def a_line(key: Key) -> Line:
    made = RoundLine(0.5, 10, 20, 3, 4, 0.1, 1.5, 0.5, 8.0, 1.0)
    values = {name: getattr(key, name) for name in key.__struct_fields__}
    counts = dict.fromkeys(("bytes_up", "bytes_down", "params_up", "params_down", "bytes_head"), 7)
    return Line(
        **values,
        **counts,
        accuracy=0.5,
        bytes_first_download=9,
        device_gflop=0.1,
        rounds=1,
        rounds_to_95=1,
        accuracy_start=0.1,
        drift=1.5,
        devices=2,
        seconds=3.0,
        commit="abc",
        curve=(made,),
        host={"cpu": "x"},
    )
