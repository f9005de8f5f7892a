import pytest

from common.config import load_config
from common.errors import ClusterError, ConfigError
from extractor.config import ExtractConfig
from extractor.partitions import describe_inputs, find_teachers
from extractor.placement import ClusterResources, Node, TeacherPlacement, place, ray_options

NINE = tuple("abcdefghi")


def one_machine(gpus: float, cpus: float = 16) -> ClusterResources:
    return ClusterResources((Node(gpus=gpus, cpus=cpus),))


def mixed() -> ClusterResources:
    """Two machines with two GPUs of one kind, one with four of another, one without."""
    return ClusterResources(
        (
            Node(2, 8, {"pool": "old"}, ("A100",)),
            Node(4, 32, {"pool": "new"}, ("H100",), {"licence": 1}),
            Node(2, 8, {"pool": "old"}, ("A100",)),
            Node(0, 64, {"pool": "cpu"}),
        )
    )


def gpus_of(placements: dict[str, TeacherPlacement]) -> dict[str, float | None]:
    return {name: placement.gpus for name, placement in placements.items()}


@pytest.mark.parametrize(
    ("gpus", "each"), [(0, 0), (1, 1 / 9), (2, 1 / 5), (4, 1 / 3), (8, 1 / 2), (9, 1), (10, 1), (64, 1)]
)
def test_gpus_are_shared_out_so_that_every_actor_fits(gpus, each):
    assert gpus_of(place(NINE, one_machine(gpus))) == dict.fromkeys(NINE, pytest.approx(each))


def test_a_fraction_never_spans_two_machines_gpus():
    # Three machines of one GPU: five teachers need two to a GPU, though three GPUs are more than 5 x 0.5.
    cluster = ClusterResources(tuple(Node(gpus=1, cpus=4) for _ in range(3)))
    assert set(gpus_of(place(NINE[:5], cluster)).values()) == {0.5}


def test_several_actors_each_count():
    assert set(gpus_of(place(NINE[:2], one_machine(4), default_actors=3)).values()) == {0.5}
    assert set(gpus_of(place(NINE[:2], one_machine(6), default_actors=3)).values()) == {1.0}


def test_a_request_is_granted_and_the_others_share_the_rest():
    placements = place(NINE, one_machine(4), {"c": TeacherPlacement(actors=2, gpus=1)})
    assert (placements["c"].actors, placements["c"].gpus) == (2, 1)
    assert {gpus for name, gpus in gpus_of(placements).items() if name != "c"} == {0.25}
    assert next(iter(placements)) == "c"  # it starts first: a fraction must not take its GPU


def test_what_a_request_does_not_state_follows_the_defaults():
    overrides = {"a": TeacherPlacement(micro_batch=8), "b": TeacherPlacement(actors=1)}
    placements = place(("a", "b", "c"), one_machine(9), overrides, default_actors=3)
    assert {name: placement.actors for name, placement in placements.items()} == {"a": 3, "b": 1, "c": 3}
    assert placements["a"].micro_batch == 8


@pytest.mark.parametrize(
    ("gpus", "teachers", "asked", "said"),
    [
        (8, NINE, 2, "need 18 GPUs in all and the cluster has 8"),
        (2, NINE[:3], 0.6, r"no room for teacher 'c' \(1 actors with 0.6 GPUs each\)"),
        (0, NINE[:1], 1, r"the cluster has 0 \(no GPU\)"),
        (8, NINE[:2], 1.5, "Above 1, an actor can hold only whole GPUs; ask for 1 or 2"),
    ],
)
def test_more_than_there_is_is_refused(gpus, teachers, asked, said):
    with pytest.raises(ClusterError, match=said):
        place(teachers, one_machine(gpus), default_gpus=asked)


def test_the_gpus_of_one_actor_are_on_one_machine():
    cluster = ClusterResources((Node(gpus=2), Node(gpus=2)))
    assert place(("a", "b"), cluster, default_gpus=2)["a"].gpus == 2
    with pytest.raises(ClusterError, match="An actor's GPUs are on one machine"):
        place(("a",), cluster, default_gpus=4)


def test_who_has_no_choice_goes_first_and_finds_its_place():
    overrides = {"h": TeacherPlacement(accelerator_type="H100", gpus=1, actors=2)}
    placements = place(("a", "b", "c", "d", "e", "f", "h"), mixed(), overrides)
    assert next(iter(placements)) == "h"
    assert set(gpus_of(placements).values()) == {1}  # two on the new machine, the six others on what is left


def test_kinds_labels_and_resources_choose_machines():
    # Five actors of one kind on its four GPUs must share, and equal shares are for all that did not ask otherwise.
    kind = {name: TeacherPlacement(accelerator_type="A100") for name in "abcde"}
    assert set(gpus_of(place(tuple("abcde"), mixed(), kind)).values()) == {0.5}
    labels = {"a": TeacherPlacement(labels={"pool": "new"}, gpus=4)}
    assert place(("a", "b", "c", "d", "e"), mixed(), labels)["b"].gpus == 1
    with pytest.raises(ClusterError, match=r"no room for teacher 'b' .* on 1 of resource licence"):
        place(("a", "b"), mixed(), dict.fromkeys("ab", TeacherPlacement(resources={"licence": 1})))


@pytest.mark.parametrize(
    ("selector", "fits"),
    [("new", True), ("!cpu", True), ("in(new, newer)", True), ("!in(cpu,old)", True), ("in(newer)", False)],
)
def test_label_selectors_are_those_of_ray(selector, fits):
    overrides = {"a": TeacherPlacement(labels={"pool": selector}, gpus=4)}
    if fits:
        assert place(("a",), mixed(), overrides)["a"].gpus == 4
    else:
        with pytest.raises(ClusterError, match=r"asks for label pool=in\(newer\)"):
            place(("a",), mixed(), overrides)


@pytest.mark.parametrize(
    ("wanted", "asked"),
    [
        (TeacherPlacement(accelerator_type="B200"), "accelerator type B200"),
        (TeacherPlacement(labels={"pool": "gold"}), "label pool=gold"),
        (TeacherPlacement(resources={"licence": 2}), "2 of resource licence"),
    ],
)
def test_a_kind_of_machine_that_is_not_there_is_named_beside_those_that_are(wanted, asked):
    with pytest.raises(ClusterError) as caught:
        place(("a",), mixed(), {"a": wanted})
    said = str(caught.value)
    assert f"'a', which asks for {asked}." in said
    assert "accelerator types A100, H100, labels pool=cpu, pool=new, pool=old and custom resources licence" in said


def test_a_teacher_bound_to_a_machine_without_gpus_must_say_so():
    labels = {"pool": "cpu"}
    with pytest.raises(ClusterError, match="set a teacher's to 0 to run it on CPUs"):
        place(("a",), mixed(), {"a": TeacherPlacement(labels=labels)})
    assert place(("a",), mixed(), {"a": TeacherPlacement(labels=labels, gpus=0)})["a"].gpus == 0


def test_options_name_only_what_is_asked_for():
    assert ray_options(TeacherPlacement(gpus=0.5)) == {"num_gpus": 0.5, "num_cpus": 0}
    everything = TeacherPlacement(gpus=2, accelerator_type="A100", labels={"pool": "old"}, resources={"licence": 1})
    assert ray_options(everything) == {
        "num_gpus": 2,
        "num_cpus": 0,
        "accelerator_type": "A100",
        "label_selector": {"pool": "old"},
        "resources": {"licence": 1},
    }


@pytest.mark.parametrize(
    ("version", "there"), [(None, "biomedclip, plip"), ("notebook", "biomedclip.notebook, plip.notebook")]
)
def test_a_placement_of_no_teacher_of_the_run_is_told(version, there):
    overrides = ["hardware.teachers.biomedclp.actors=4"]
    config = load_config(ExtractConfig, None, overrides, teachers=("plip", "biomedclip"), teacher_version=version)
    with pytest.raises(ConfigError, match=rf"places biomedclp, and no teacher of this run.*there are: {there}\)"):
        describe_inputs(find_teachers(config), config)


def test_a_teacher_whose_name_has_a_dot_is_placed_from_the_command_line():
    config = load_config(ExtractConfig, None, ["hardware.teachers.pmc-clip.notebook.actors=4"])
    assert config.hardware.teachers == {"pmc-clip.notebook": TeacherPlacement(actors=4)}
