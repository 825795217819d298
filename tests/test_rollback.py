from pathlib import Path

import pytest

from slm.errors import InputError, StepError
from slm.registry.names import PLAN, ROLLED_BACK
from slm.registry.turns import turn
from tests.conftest import MODEL, Generations
from tests.registry_state import (
    CHAT,
    CHECKPOINT,
    PROMPT,
    after_kills,
    aliases,
    go_back,
    register,
    seen,
    state,
)


@pytest.fixture
def promoted(registry: Generations) -> Generations:
    """A registry in which the second generation, then the third, became champion."""
    register(registry, seen(registry.second, "1"))
    register(registry, seen(registry.third, "2"))
    return registry


def test_a_rollback_makes_the_previous_champion_again_and_records_why(
    promoted: Generations,
) -> None:
    process = promoted.mlflow_run("rollback", "reason=it's slow, says ops")
    assert process.returncode == 0, process.stderr
    for name in (CHAT, PROMPT):
        assert aliases(promoted, name) == {"champion": "2", "previous": "1"}
        tag = promoted.client.get_model_version(name, "3").tags[ROLLED_BACK]
        assert tag.startswith("it's slow, says ops (2")
    assert aliases(promoted, CHECKPOINT) == {"champion": "1"}
    [run] = promoted.client.search_runs(["1"], "tags.mlflow.project.entryPoint = 'rollback'")
    assert run.data.tags["reason"] == tag
    assert run.data.tags["restored"] == f"models:/{CHAT}@champion"


def test_what_was_rolled_back_is_not_promoted_again_and_says_why(promoted: Generations) -> None:
    go_back(promoted)
    registration = register(promoted, seen(promoted.third, "2"))
    assert not registration.promoted and registration.versions[0].alias == ""
    assert registration.reasons[0].startswith("it was rolled back: slow. Delete its tag")
    assert aliases(promoted) == {"champion": "2", "previous": "1"}


def test_a_second_rollback_goes_back_a_second_step_and_a_third_finds_nothing(
    promoted: Generations,
) -> None:
    go_back(promoted)
    go_back(promoted)
    assert aliases(promoted) == aliases(promoted, PROMPT) == {"champion": "1"}
    with pytest.raises(InputError, match="have no version to go back to"):
        go_back(promoted)


def test_nobody_goes_back_to_what_was_rolled_back(promoted: Generations) -> None:
    promoted.client.set_model_version_tag(CHAT, "2", ROLLED_BACK, "by hand")
    go_back(promoted, CHAT)
    assert aliases(promoted) == {"champion": "1"}


def test_who_waited_while_the_champion_changed_does_not_go_back_further(
    promoted: Generations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn_after_another(*arguments: object) -> object:
        monkeypatch.undo()
        go_back(promoted)
        return turn(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("steps.rollback.turn", turn_after_another)
    with pytest.raises(StepError, match="version 2 became champion meanwhile, after 3"):
        go_back(promoted)
    assert aliases(promoted) == {"champion": "2", "previous": "1"}


def test_a_plan_that_a_later_champion_made_void_is_not_carried_out(promoted: Generations) -> None:
    step = {"name": CHAT, "ousted": "2", "restored": "1", "previous": ""}
    plan = f'{{"uri": "", "reason": "old", "steps": [{step}]}}'.replace("'", '"')
    promoted.client.set_registered_model_tag(CHAT, PLAN, plan)
    go_back(promoted)
    assert aliases(promoted) == {"champion": "2", "previous": "1"}
    assert promoted.client.get_model_version(CHAT, "3").tags[ROLLED_BACK] == "slow"


def test_an_unfinished_rollback_is_finished_first_and_a_new_one_must_be_asked_for_again(
    promoted: Generations,
) -> None:
    step = {"name": CHAT, "ousted": "3", "restored": "2", "previous": "1"}
    plan = f'{{"uri": "", "reason": "old", "steps": [{step}]}}'.replace("'", '"')
    promoted.client.set_registered_model_tag(CHAT, PLAN, plan)
    with pytest.raises(StepError, match="finished an earlier rollback, because: old"):
        go_back(promoted)
    assert aliases(promoted) == {"champion": "2", "previous": "1"}
    go_back(promoted)
    assert aliases(promoted) == {"champion": "1"}


def test_where_somebody_took_the_alias_champion_away_previous_gets_it(
    promoted: Generations,
) -> None:
    promoted.client.delete_registered_model_alias(CHAT, "champion")
    go_back(promoted)
    assert aliases(promoted) == {"champion": "2", "previous": "1"}


def test_a_rollback_that_was_killed_anywhere_ends_as_one_that_was_not(
    promoted: Generations, tmp_path: Path
) -> None:
    *states, undisturbed = after_kills(promoted, go_back, tmp_path / "killed")
    assert len(states) > 5
    assert all(state == undisturbed for state in states)
    assert undisturbed["models"][CHAT] == ({"champion": 2, "previous": 1}, {})


def test_nothing_to_go_back_to_changes_nothing(registry: Generations) -> None:
    before = state(registry)
    with pytest.raises(InputError, match=f"{CHAT} and {PROMPT} have no version to go back to"):
        go_back(registry)
    assert state(registry) == before


def test_a_model_without_a_champion_is_one_clear_line(registry: Generations) -> None:
    process = registry.step("rollback", "target=cuda-fp16")
    assert process.returncode == 2
    names = f"{MODEL}-cuda-fp16-chat or {MODEL}-cuda-fp16-prompt"
    words = f"rollback: the registry has no champion of {names}."
    assert process.stderr.splitlines()[-1].startswith(words)
