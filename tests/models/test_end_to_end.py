"""The benchmark of whole training steps, on the toy method."""

import json

from benchmarks import end_to_end

from . import toy


def test_both_backends_see_the_same_steps(tmp_path, capsys):
    data, out = toy.make_data(tmp_path / "data"), tmp_path / "run"
    assert end_to_end.main(["tests.models.toy", "--data", str(data), "--out", str(out), "--set", "device=cpu", "--steps", "4"]) == 0
    found = json.loads((out / "end_to_end" / "net.json").read_text())
    assert found["fused"]["losses"] == found["reference"]["losses"] and len(found["fused"]["seconds"]) == 4  # it has no operator of ours
    assert found["fused"]["peak_bytes"] > 0 and found["fused"]["operator_share"] == 0
    assert (out / "end_to_end" / "net.png").is_file() and len((out / "end_to_end" / "net.csv").read_text().splitlines()) == 5
    assert "net fused" in capsys.readouterr().out
