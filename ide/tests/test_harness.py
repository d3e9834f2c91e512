"""What the other tests stand on: windows, their hosts, the palette, settings, a service and its agent."""

import pytest
from editor import until


def test_a_window_shows_its_folder(window):
    assert window.ask("probe.state")["folders"][0].endswith(str(window.folder))
    assert window.folder.name in window.page.title()


def test_the_palette_runs_a_command(window):
    marks = window.ask("probe.state")["marks"]
    window.command("Probe: Mark")
    until(lambda: window.ask("probe.state")["marks"] == marks + 1, "the palette did not run the command")


def test_what_a_command_throws_is_told(window):
    with pytest.raises(AssertionError, match="probe was asked to throw"):
        window.ask("probe.throws")


def test_a_host_that_is_killed_is_followed_by_another_and_each_window_has_its_own(editor, window, tmp_path):
    other = editor.open(tmp_path)
    first, killed = window.host(), other.kill_host()
    following = until(other.host, "no host followed")
    assert len({first, killed, following}) == 3
    assert window.host() == first
    other.close()
    until(lambda: following not in editor.hosts(), "the host outlives its window")


def test_a_service_keeps_its_state_over_a_stop(service, agent):
    assert service.ask("POST", "/command?wait=20", {"type": "execute_bash", "command": "exit 0"})[1]["outcome"] == "ok"
    service.stop()
    service.start()
    assert len(service.ask("GET", "/commands")[1]["commands"]) == 1
    assert service.ask("GET", "/commands", headers={"Authorization": None})[0] == 401
