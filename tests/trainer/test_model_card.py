from trainer.config import ModelConfig
from trainer.model_card import TeacherTerms, restrictions
from trainer.starting_weights import licences


def terms(name: str, derivatives: str, license_name: str | None = "MIT") -> TeacherTerms:
    return TeacherTerms(name, license_name, derivatives, None, None, "ab" * 32)


def test_free_teachers_and_pairs_leave_the_student_free():
    assert restrictions([terms("a", "allowed")], ["CC BY 4.0", "not stated"]).startswith("None")


def test_the_strictest_comes_first_and_each_is_named():
    found = restrictions(
        [
            terms("plip", "unknown", None),
            terms("unimed-clip", "conditional", "CC BY-NC 4.0"),
            terms("conch", "forbidden", "CC BY-NC-ND 4.0"),
        ],
        [],
    ).splitlines()
    assert "without the permission of the authors of conch" in found[0]
    assert "Non-commercial use only" in found[1]
    assert "unimed-clip and conch" in found[1]
    assert "conditions of unimed-clip" in found[2]
    assert "Not cleared" in found[3]
    assert "plip" in found[3]


def test_the_pairs_licences_bind_too():
    assert "pairs (CC BY-NC-SA 3.0)" in restrictions([], ["CC BY-NC-SA 3.0", "CC BY 4.0"])
    assert restrictions([], ["CC0", "sync licence"]).startswith("None")  # NC inside a word is no condition


def test_first_weights_and_share_alike_rows_bind_too():
    model = ModelConfig(vision_weights="ViT-B-16-quickgelu/metaclip_400m", text_weights="/data/biomedbert/")
    first = licences(model)
    assert first == {"vision_weights metaclip_400m": "CC-BY-NC-4.0", "text_weights biomedbert": "not recorded"}
    said = restrictions([terms("a", "allowed")], ["CC BY-SA 4.0", "CC0"], first).splitlines()
    assert said[0].startswith("- **Non-commercial use only**, after the licences of the first weights (vision_weights")
    assert said[1].startswith("- **Share alike**: the licences of pairs (CC BY-SA 4.0) ask")
    assert said[2] == "- Not cleared: nobody has recorded the licence of the first weights (text_weights biomedbert)."
    assert licences(ModelConfig()) == {}
    said_by_user = licences(ModelConfig(weights="openai", weights_license="MIT"))
    assert said_by_user == {"weights openai": "MIT"}
    assert restrictions([], [], said_by_user).startswith("None")
