"""What the commands show from the first to the last, on a pseudo-terminal: each scene of the page checks what it is about."""

from pathlib import Path

from measure import a_session


def test_the_page_can_be_made(smollm2: Path) -> None:
    page = a_session.page(1, smollm2)
    documented = (Path(__file__).parents[1] / "docs" / "a-session.md").read_text()
    assert page.startswith(a_session.HEAD) and documented.startswith(a_session.HEAD)
    # it has every scene, as they are now
    for text in (page, documented):
        assert [line for line in text.splitlines() if line.startswith("    $ ")] == [
            f"    $ kvlocal {scene.command}".rstrip() for scene in a_session.scenes("--temp 0 --threads 1")
        ]
    assert "~/.local/state/kvlocal/sessions/trip.jsonl" in documented and "/tmp" not in documented
