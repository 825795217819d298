import json
from dataclasses import replace
from pathlib import Path

import pytest

from slm.config.packaging import Register
from slm.errors import InputError, StepError
from slm.records import Evaluation, Registration
from slm.registry.names import ANSWERED, ROLLED_BACK, SUCCEEDS, name_of
from slm.registry.promotion import settle
from steps.register import changed, registration
from tests.conftest import Generations, Project, composed, tracking
from tests.registry_state import (
    CHAT,
    CHECKPOINT,
    PROMPT,
    after_kills,
    aliases,
    register,
    seen,
    start_register,
    state,
)


def test_the_first_that_passes_is_champion_with_its_checkpoint(generations: Generations) -> None:
    for name in (CHAT, PROMPT, CHECKPOINT):
        version = generations.client.get_model_version_by_alias(name, "champion")
        assert int(version.version) == 1 and version.tags[SUCCEEDS] == "none"
        assert ANSWERED in version.tags


def test_a_version_says_how_it_measured_and_shows_its_card(generations: Generations) -> None:
    version = generations.client.get_model_version(CHAT, "1")
    metrics = json.loads(version.tags["metrics"])
    assert metrics["perplexity_ratio"] == pytest.approx(
        generations.first.candidate_metrics["perplexity_ratio"], rel=1e-5
    )
    assert version.tags["conditions"] == "one machine"
    assert version.description == "# Card"


def test_who_was_evaluated_before_the_champion_stays_challenger(registry: Generations) -> None:
    registration = register(registry, registry.third)
    assert not registration.promoted and registration.versions[0].alias == "challenger"
    words = "version 1 became champion since it was evaluated; evaluate it again"
    assert registration.reasons == [words]
    assert aliases(registry) == {"champion": "1", "challenger": "3"}


def test_who_is_no_worse_becomes_champion_and_all_its_versions_with_it(
    registry: Generations,
) -> None:
    registration = register(registry, seen(registry.second, "1"))
    assert registration.promoted and registration.uri == f"models:/{CHAT}@champion"
    for name in (CHAT, PROMPT):
        assert aliases(registry, name) == {"champion": "2", "previous": "1", "challenger": "3"}
        assert registry.client.get_model_version(name, "2").tags[SUCCEEDS] == "1"
    assert aliases(registry, CHECKPOINT) == {"champion": "1"}


@pytest.mark.parametrize(
    ("metric", "factor", "words"),
    [
        ("decode_tokens_per_s", 2.0, "(0.85 of the champion's)"),
        ("perplexity_ratio", 0.5, "(1.02 of the champion's)"),
        ("task_accuracy", 2.0, "(0.9 of the champion's)"),
        ("kl_divergence", float("nan"), "kl_divergence was not measured of the champion"),
    ],
)
def test_a_slower_or_worse_one_does_not_replace_the_champion(
    registry: Generations, metric: str, factor: float, words: str
) -> None:
    registration = register(registry, seen(registry.third, "1", **{metric: factor}))
    [reason] = registration.reasons
    assert reason.startswith(metric) and words in reason
    assert not registration.promoted and registration.uri == f"models:/{CHAT}/3"
    assert aliases(registry) == {"champion": "1", "challenger": "3"}


def test_a_challenger_is_not_registered_again_while_the_same_keeps_it_from_champion(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, file = project.client, project.folder / "evaluation.json"
    client.create_registered_model("m")
    for _ in range(3):
        client.create_model_version("m", "/nowhere")
    client.set_registered_model_alias("m", "champion", "1")
    evaluation = Evaluation(
        *("", ["models:/m-2"], "models:/m-1", "models:/m/1", "passed", [], []),
        *({"size_mb": 9.0}, {}, {"size_mb": 1.0}, [], "one machine"),
    )
    file.write_text(json.dumps({"outcome": evaluation.json()}))

    def settled(evaluation: Evaluation, settings: Register, *_: object) -> Registration:
        with tracking(project):
            lead = client.get_model_version("m", "2")
            reasons = settle(client, [lead], evaluation, settings.margins)
            return registration(client, [lead], "passed", reasons)

    monkeypatch.setattr("steps.register.register", settled)

    def reused() -> str:
        made = project.call("register", f"source={file}")
        assert made.reasons and not made.promoted
        return project.runs("register")[0].data.tags["reused"]

    def why(registration: Registration) -> str:
        with tracking(project):
            return changed(registration, evaluation, margins)

    assert (reused(), reused()) == ("false", "true")
    margins = composed().register.margins
    before = settled(evaluation, composed().register)
    client.set_model_version_tag("m", "2", ROLLED_BACK, "slow")
    assert why(before).startswith("it was rolled back: slow")
    after = settled(evaluation, composed().register)
    assert why(after) == ""
    client.delete_model_version_tag("m", "2", ROLLED_BACK)
    assert "size_mb is 9, above 1.1" in why(after) and why(before) == ""
    client.set_registered_model_alias("m", "champion", "3")
    assert why(before).startswith("version 3 became champion since")
    client.set_registered_model_alias("m", "champion", "2")
    assert why(before) == "version 2 is champion by now"
    client.delete_registered_model_alias("m", "champion")
    assert why(before) == "nothing keeps version 2 from becoming champion"
    client.delete_registered_model_alias("m", "challenger")
    assert why(before) == "alias challenger of m was moved"


def test_a_superseded_version_does_not_take_the_champion_back(registry: Generations) -> None:
    register(registry, seen(registry.second, "1"))
    before = state(registry)
    registration = register(registry, registry.first)
    assert not registration.promoted and registration.versions[0].alias == ""
    assert "version 2 became champion" in registration.reasons[0]
    assert state(registry) == before


def test_an_older_one_does_not_displace_a_newer_challenger(registry: Generations) -> None:
    before = state(registry)
    register(registry, registry.second)
    assert state(registry) == before


def test_the_same_evaluation_again_changes_nothing(registry: Generations) -> None:
    evaluation = seen(registry.second, "1")
    register(registry, evaluation)
    before = state(registry)
    assert register(registry, evaluation).promoted
    assert state(registry) == before


def test_a_new_measurement_of_the_same_content_is_brought_onto_its_version(
    registry: Generations,
) -> None:
    evaluation = replace(registry.first, conditions="another machine", model_card="# New")
    register(registry, evaluation)
    version = registry.client.get_model_version(CHAT, "1")
    assert (version.tags["conditions"], version.description) == ("another machine", "# New")


def test_an_interface_that_is_registered_later_follows_the_champion(registry: Generations) -> None:
    chat, prompt = registry.second.candidates
    evaluation = seen(registry.second, "1")
    register(registry, replace(evaluation, candidates=[chat]))
    assert aliases(registry, PROMPT)["champion"] == "1"
    register(registry, evaluation)
    assert aliases(registry, PROMPT)["champion"] == "2"


def test_what_failed_is_not_registered(registry: Generations) -> None:
    before = state(registry)
    evaluation = replace(registry.second, verdict="failed", reasons=["it loops"])
    with pytest.raises(StepError, match="not registered, the evaluation failed: it loops."):
        register(registry, evaluation)
    assert state(registry) == before


def test_what_failed_is_registered_without_an_alias_if_asked_for(registry: Generations) -> None:
    evaluation = replace(registry.second, verdict="failed", reasons=["it loops"])
    registration = register(registry, evaluation, "register.failed=true")
    assert registration.uri == f"models:/{CHAT}/4" and not registration.promoted
    assert registry.client.get_model_version(CHAT, "4").tags["verdict"] == "failed"
    assert aliases(registry) == {"champion": "1", "challenger": "3"}


def test_a_version_that_does_not_answer_is_no_challenger_and_the_run_fails(
    registry: Generations,
) -> None:
    registry.client.delete_model_version_tag(CHAT, "3", ANSWERED)
    model = registry.client.get_logged_model(registry.third.candidates[0].split("/")[1])
    files = Path(model.artifact_location.removeprefix("file://"))
    weights = next(files.rglob("model.onnx.data"))
    hidden = weights.rename(weights.with_name("hidden"))
    try:
        with pytest.raises(StepError, match=f"not promoted: models:/{CHAT}/3 does not answer"):
            register(registry, seen(registry.third, "1"))
    finally:
        hidden.rename(weights)
    assert aliases(registry) == aliases(registry, PROMPT) == {"champion": "1"}


def test_of_two_registers_at_once_exactly_one_wins_and_the_loser_says_so(
    registry: Generations, tmp_path: Path
) -> None:
    processes = [
        start_register(registry, seen(evaluation, "1")) for evaluation in registry.evaluations[1:]
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    winner = int(aliases(registry)["champion"])
    loser = 5 - winner
    assert f"{CHAT} version {winner} is champion" in said[winner - 2]
    words = f"version {loser} stays challenger: version {winner} became champion since"
    assert words in said[loser - 2]
    expected = {"champion": str(winner), "previous": "1", "challenger": str(loser)}
    assert aliases(registry) == aliases(registry, PROMPT) == expected


def test_a_register_that_was_killed_anywhere_ends_as_one_that_was_not(
    generations: Generations, tmp_path: Path
) -> None:
    first = Generations(generations.folder / "first", generations.evaluations)
    *states, undisturbed = after_kills(first, register_second, tmp_path)
    assert len(states) > 12
    assert all(state == undisturbed for state in states)
    chat = undisturbed["models"][CHAT]
    assert chat == ({"champion": 2, "previous": 1}, {})


def test_names_follow_the_template_and_unity_catalog_has_no_dots_in_them() -> None:
    settings = composed("register.catalog=prod.llm").register
    assert name_of("phi-3.5", "cpu", "chat", settings) == "prod.llm.phi-3_5-cpu-chat"
    settings = composed("register.name_template='{interface}_{model}'").register
    assert name_of("phi-3.5", "cpu", "chat", settings) == "chat_phi-3.5"
    assert name_of("phi-3.5", "", "chat", settings) == "phi-3.5-transformers"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name_template": "{modle}"}, "register.name_template is '{modle}'; it must be"),
        ({"name_template": ""}, "register.name_template is ''"),
        ({"name_template": "a/{model}"}, "and of {model}, {target}, {interface}"),
        ({"reference_name_template": "{target}"}, "register.reference_name_template is"),
        ({"catalog": "main"}, "register.catalog is 'main'; it must be"),
    ],
)
def test_a_wrong_template_is_refused_with_its_key(change: dict[str, str], words: str) -> None:
    valid = {"name_template": "{model}", "reference_name_template": "{model}"}
    with pytest.raises(InputError, match=words.replace("{", r"\{")):
        Register(**(valid | change))  # type: ignore[arg-type]


def test_interfaces_need_names_of_their_own(registry: Generations) -> None:
    with pytest.raises(InputError, match="Put {interface} into the template"):
        register(registry, registry.second, "register.name_template='{model}'")


def register_second(project: Generations) -> None:
    assert register(project, seen(project.second, "1")).promoted
